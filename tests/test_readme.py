"""The README's numbers are those of the committed report, and what it names exists."""

import json
import re
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_shakespeare_table_is_the_committed_report():
    report = json.loads((ROOT / "results" / "shakespeare_char" / "report.json").read_text())
    assert report["provenance"]["command"] in README
    for label, name in (("A", "shakespeare_char"), ("A − I", "shakespeare_char_laplacian")):
        arm = report["arms"][name]
        columns = (("best_val_loss", 4), ("val_loss", 4), ("best_step", 0))
        cells = [f"{arm[key]['mean']:.{digits}f} ± {arm[key]['sd']:.{digits}f}" for key, digits in columns]
        assert f"| {label} | {arm['n']} | {' | '.join(cells)} |" in README
    pair = report["pairs"]["shakespeare_char_laplacian"]
    best, last = ([pair[key]["mean"], *pair[key]["interval"]] for key in ("best", "last"))
    numbers = [f"{value:.4f}".replace("-", "−") for value in best + last]
    row = "| A − I against A, paired | {} | **{}, 95 % interval {} to {}** | {}, {} to {} | |".format(len(pair["seeds"]), *numbers)
    assert row in README
    assert f"sign-flip p = {pair['best']['sign_flip_p']:.3f}" in README
    assert sum(difference > 0 for difference in pair["best"]["differences"]) == 1  # "one of the eight seeds goes the other way"


def test_every_file_it_links_or_runs_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    scripts = re.findall(r"(?:config/|data/\w+/|python )([\w/]+\.py)", README)
    assert len(links) > 15 and len(scripts) > 10
    missing = [link for link in links if not (ROOT / link).exists()]
    missing += [name for name in re.findall(r"(?:config|data)/[\w/]+\.py", README) if not (ROOT / name).is_file()]
    assert missing == []


def test_the_table_of_pictures_as_tokens_is_the_committed_report():
    report = json.loads((ROOT / "results" / "unroll_mnist" / "report.json").read_text())
    assert (report["n"], report["config"]["seeds"], report["config"]["steps"]) == (2000, 5, 8)
    labels = {"before": "before: a random linear map", "A, after": "A, 8 steps", "A − I, after": "A − I, 8 steps"}
    for name, entry in report["summary"].items():
        cells = [entry[key] for key in ("knn_2", "knn", "silhouette", "within_between")]
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(cell["mean"], *cell["interval"]).replace("-", "−") for cell in cells]
        assert f"| {labels.get(name, f'{name} of the pictures')} | {' | '.join(cells)} |" in README
    labels = {"A": "A", "A-I": "A − I", "-(A-I)": "−(A − I)", "gradient": "plain gradient of F"}
    for kind, runs in report["climb"].items():
        steps = [row for run in runs for row in run if "gain" in row]
        counts = [f"{sum(row[key] > 0 for row in steps)} of {len(steps)}" for key in ("gain_data", "gain")]
        ends = [f"{sum(run[end]['dirichlet'] for run in runs) / len(runs):.3f}" for end in (0, -1)]
        assert f"| {labels[kind]} | {' | '.join(counts)} | {' → '.join(ends)} |" in README


def test_the_numbers_of_the_initial_weights_are_the_committed_report():
    report = json.loads((ROOT / "results" / "weight_init_quick" / "report.json").read_text())
    best = {name: [cell["best_val_loss"] for cell in arm["cells"]] for name, arm in report["arms"].items()}
    for name in ("quick", "quick_laplacian"):
        plain, unrolled = best[name], best[f"{name}_weight_init=unrolled"]
        difference = stats.ttest_1samp([b - a for a, b in zip(plain, unrolled, strict=True)], 0).confidence_interval(0.95)
        assert f"{sum(unrolled) / 3:.4f} against {sum(plain) / 3:.4f}" in README
        for value in ((sum(unrolled) - sum(plain)) / 3, *difference):
            assert f"{value:.3f}".replace("-", "−") in README


def test_the_speed_table_is_the_committed_benchmarks():
    row = next(line for line in README.splitlines() if line.startswith("| a step of `quick`"))
    found = {}
    for file in ("cpu_quick", "cpu_sample_shakespeare_char", "cpu_sample_gpt2", "cpu_startup"):
        rows = json.loads((ROOT / "results" / "bench" / f"{file}.json").read_text())["rows"]
        found[file] = {entry["arm"]: f"{entry['ms']['median']:.1f}" for entry in rows}
    quick, text, gpt2, start = found.values()
    more = f"A in bf16 {quick['A-bf16']}, with the log-barrier {quick['A+prior']}"
    assert row == f"| a step of `quick`, float32 | {quick['plain']} | {quick['A']} | {quick['A-I']} | {more} |"
    assert f"| a character from the 10.65 M model | {text['A, no cache']} | {text['A']} | {text['A-I']} | |" in README
    assert f"| a token from GPT-2 124M | {gpt2['A, no cache']} | {gpt2['A']} | | transformers with its cache {gpt2['A, transformers']} |" in README
    assert f"to its first iteration | | {start['first iteration']} | | `--help` {start['--help']} |" in README


def test_the_quick_recipes_difference_is_the_committed_report():
    pair = json.loads((ROOT / "results" / "weight_init_quick" / "report.json").read_text())["pairs"]["quick_laplacian"]["best"]
    assert "behind by {:.4f} ({:.4f} to {:.4f}, three seeds".format(pair["mean"], *pair["interval"]) in README
