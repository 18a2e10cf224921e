"""The numbers of docs/theory.md and docs/barrier.md are those of the committed reports."""

import json
import re
import runpy

import pytest
from pages import BARRIER, IN_BARRIER, IN_README, IN_THEORY, ROOT, THEORY, report_of
from scipy import stats

from report import FRONTIER, robustness


def test_the_table_of_pictures_as_tokens_is_the_committed_report():
    report = json.loads((ROOT / "results" / "unroll_mnist" / "report.json").read_text())
    assert (report["n"], report["config"]["seeds"], report["config"]["steps"]) == (2000, 5, 8)
    labels = {"before": "before: a random linear map", "A, after": "A, 8 steps", "A − I, after": "A − I, 8 steps"}
    for name, entry in report["summary"].items():
        cells = [entry[key] for key in ("knn_2", "knn", "silhouette", "within_between")]
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(cell["mean"], *cell["interval"]).replace("-", "−") for cell in cells]
        assert f"| {labels.get(name, f'{name} of the pictures')} | {' | '.join(cells)} |\n" in THEORY
    before, a, laplacian = (report["summary"][key] for key in ("before", "A, after", "A − I, after"))
    two = [f"{entry['knn_2']['mean']:.3f}" for entry in (before, laplacian, a)]
    ends = [f"{entry['knn']['mean']:.3f}" for entry in (before, laplacian)]
    for page in (IN_README, IN_THEORY):
        assert "from {} to {} with A − I and to {} with A".format(*two) in page
    assert "in all dimensions it falls from {} to {} with A − I".format(*ends) in IN_README
    assert "in all dimensions the neighbours get worse, {} to {},".format(*ends) in IN_THEORY
    labels = {"A": "A", "A-I": "A − I", "-(A-I)": "−(A − I)", "gradient": "plain gradient of F"}
    for kind, runs in report["climb"].items():
        steps = [row for run in runs for row in run if "gain" in row]
        counts = [f"{sum(row[key] > 0 for row in steps)} of {len(steps)}" for key in ("gain_data", "gain")]
        ends = [f"{sum(run[end]['dirichlet'] for run in runs) / len(runs):.3f}" for end in (0, -1)]
        assert f"| {labels[kind]} | {' | '.join(counts)} | {' → '.join(ends)} |\n" in THEORY


def test_the_sentence_about_ten_thousand_pictures_is_the_committed_report():
    report = report_of("unroll_mnist_10000")
    assert (report["n"], report["config"]["seeds"]) == (10000, 3)
    before, a, laplacian = (report["summary"][key] for key in ("before", "A, after", "A − I, after"))
    two, all_dims = ([f"{entry[key]['mean']:.3f}" for entry in (before, laplacian, a)] for key in ("knn_2", "knn"))
    sentence = "from {} to {} with A − I and to {} with A, all dimensions from {} to {} and {}."
    assert sentence.format(*two, *all_dims) in IN_THEORY


def test_the_numbers_of_the_initial_weights_are_the_committed_report():
    report = json.loads((ROOT / "results" / "weight_init_quick" / "report.json").read_text())
    best = {name: [cell["best_val_loss"] for cell in arm["cells"]] for name, arm in report["arms"].items()}
    for name in ("quick", "quick_laplacian"):
        plain, unrolled = best[name], best[f"{name}_weight_init=unrolled"]
        difference = stats.ttest_1samp([b - a for a, b in zip(plain, unrolled, strict=True)], 0).confidence_interval(0.95)
        assert f"{sum(unrolled) / 3:.4f} against {sum(plain) / 3:.4f}" in IN_THEORY
        values = [f"{value:.3f}".replace("-", "−") for value in ((sum(unrolled) - sum(plain)) / 3, *difference)]
        middle = "95 % interval " if name == "quick" else ""
        assert "({}, {}{} to {})".format(values[0], middle, *values[1:]) in IN_THEORY


@pytest.mark.parametrize("text", ["wikitext2", "shakespeare"])
def test_the_table_of_the_barrier_is_the_committed_report(text, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    printed = runpy.run_path(str(ROOT / "studies" / "map_table.py"))["table"](report_of(f"map_{text}_char"))
    rows = [" | ".join(cell.strip() for cell in line.strip("| ").split("|")) for line in printed.splitlines()[2:] if line.startswith("|")]
    assert len(rows) == 8 and all(f"| {row} |\n" in BARRIER for row in rows)
    assert sum(line.startswith(("| barrier: ", "| control: ")) for line in BARRIER.splitlines()) == 16


def test_the_words_about_the_barrier_are_the_committed_reports():

    selection, texts = report_of("map_selection"), {text: report_of(f"map_{text}_char") for text in ("shakespeare", "wikitext2")}
    configs = selection["provenance"]["configs"]
    barriers = [name for name, config in configs.items() if config["prior_lambda"]]
    assert len(barriers) == 16 and len(configs) - len(barriers) == 1 + 6
    paper = {config["prior_lambda"]: selection["pairs"][name] for name, config in configs.items() if name.count("barrier_prior_lambda")}
    assert f"cost {1 - paper[0.05]['gains']['noise 1 RMS']['mean']:.1f} times as much with it at λ = 0.05" in IN_BARRIER
    assert f"the clean loss rose by {paper[0.5]['clean_percent']['mean']:.1f} % at 0.5" in IN_BARRIER

    def arm(text, words):
        (name,) = (name for name in texts[text]["pairs"] if name.endswith(words))
        return name, texts[text]["pairs"][name]["gains"]

    median = {
        name: sum(cell["evaluation"]["margins"]["margins, sum over layers and heads"]["quantiles"]["0.5"] for cell in entry["cells"]) / 5
        for name, entry in texts["wikitext2"]["arms"].items()
    }
    own = "own_prior_form=softplus_prior_lambda=0.02"
    assert f"from a median of {median['wikitext2_char']:.1f} to {median[arm('wikitext2', own)[0]]:.1f} on WikiText-2" in IN_BARRIER
    intervals = [
        (name, text, gain["mean"], gain["interval"])
        for text, report in texts.items()
        for name, pair in report["pairs"].items()
        for gain in pair["gains"].values()
        if "barrier" in name and "noise" not in name and gain["interval"]
    ]
    above = [(name, mean) for name, _, mean, (low, _) in intervals if low > 0]
    below = sum(high < 0 for *_, (_, high) in intervals)
    assert not any(own in name for name, _ in above) and all(mean < 0.01 for _, mean in above)
    assert f"{len(above)} of {len(intervals)} have an interval above 0 (neither reaches 1 %) and {below} one below, no more" in IN_BARRIER
    endpoints = {
        text: [pair["gains"][e]["interval"] for name, pair in report["pairs"].items() if "barrier" in name and "noise" not in name for e in FRONTIER]
        for text, report in texts.items()
    }
    assert all(high < 0.15 for _, high in endpoints["shakespeare"][1::2])
    assert [sum(low < 0.15 < high for low, high in some) for some in (endpoints["shakespeare"][::2], endpoints["wikitext2"])] == [3, 6]
    stage = {name.removeprefix("shakespeare_char_"): pair for name, pair in selection["pairs"].items()}
    assert f"does {1 - stage['embed_noise=1']['gains'][FRONTIER[1]]['mean']:.1f} times the damage (stage 1, two seeds, undecided)" in IN_BARRIER
    dropout = stage["dropout=0.3"]
    gains = [100 * dropout["gains"][e]["mean"] for e in FRONTIER]
    assert "(+{:.0f} % and +{:.0f} % at +{:.1f} % clean loss)".format(*gains, dropout["clean_percent"]["mean"]) in IN_BARRIER
    detached = report_of("map_detach")
    again = [report["arms"]["shakespeare_char"]["cells"][1] for report in (texts["shakespeare"], detached)]
    assert [cell["seed"] for cell in again] == [2, 2] and texts["shakespeare"]["provenance"]["code_sha256"] == detached["provenance"]["code_sha256"]
    assert "{} and {} for one seed".format(*sorted(f"{cell['best_val_loss']:.4f}" for cell in again)) in IN_BARRIER
    (cut,) = detached["pairs"].values()
    gain = cut["gains"]["noise 1 RMS"]
    assert (
        "GPU: {:+.1f} % ({:+.1f} to {:+.1f}) on noise of 1 RMS".format(*(100 * x for x in (gain["mean"], *gain["interval"]))).replace("-", "−")
        in IN_BARRIER
    )
    assert {len(pair["gains"]) for report in texts.values() for pair in report["pairs"].values()} == {25}
    noise = arm("shakespeare", "char_embed_noise=0.5")[1]["substitution 10%"]["mean"]
    smooth = [arm(text, "label_smoothing=0.05")[1]["substitution 10%"]["mean"] for text in texts]
    assert f"on Shakespeare {-100 * noise:.0f} % more damage from 10 % substituted" in IN_BARRIER
    assert (
        "takes {:.0f} % off the damage of substitutions on Shakespeare and {:.0f} % on WikiText-2".format(*(100 * value for value in smooth))
        in IN_BARRIER
    )
    costs = []
    for text in texts:
        names = [arm(text, words)[0] for words in ("char_embed_noise=0.5", "barrier_noise_embed_noise=0.5")]
        pair = robustness(list(zip(*(texts[text]["arms"][name]["cells"] for name in names))))
        assert all(low < 0 < high for low, high in (pair["gains"][e]["interval"] for e in FRONTIER))
        costs += [pair["clean_percent"]["mean"], *pair["clean_percent"]["interval"]]
    words = "costs {:.2f} % ({:.2f} to {:.2f}) of the clean loss on Shakespeare and {:.2f} % ({:.2f} to {:.2f}) on WikiText-2"
    assert words.format(*costs).replace("-", "−").replace("WikiText−2", "WikiText-2") in IN_BARRIER


def test_the_support_tokens_it_names_are_the_committed_ones():
    support = json.loads((ROOT / "results" / "margins_quick" / "report.json").read_text())["margins"]["support tokens"]
    names = [token for token in support if re.search(r"\n\n[A-Z]?$", token["before"]) and token["token"].isupper()]
    assert f"of the twenty lowest in 256 windows {len(names)} are the first or second letter" in IN_BARRIER and len(support) == 20
