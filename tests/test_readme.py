"""The numbers of README.md and of the pages in docs/ are those of the committed reports, and what they name exists."""

import itertools
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
from scipy import stats

from report import FRONTIER, robustness

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md", ROOT / "studies" / "README.md")
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
# as they are, for rows of tables and commands, which are lines; and each as one line, for sentences, wrapped anywhere
README = PAGES["README.md"]
RESULTS, THEORY, BARRIER, SPEED = (PAGES[f"docs/{name}.md"] for name in ("results", "theory", "barrier", "speed"))
IN_README, IN_RESULTS, IN_THEORY, IN_BARRIER = (" ".join(page.split()) for page in (README, RESULTS, THEORY, BARRIER))


def report_of(name: str) -> dict:
    return json.loads((ROOT / "results" / name / "report.json").read_text(encoding="utf-8"))


def words(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}".replace("-", "−")


@pytest.fixture(scope="module")
def front_page():
    sys.path.append(str(ROOT / "studies"))
    return runpy.run_path(str(ROOT / "studies" / "front_page.py"))


def test_the_first_table_is_the_committed_reports(front_page):
    """Every row as studies/front_page.py writes it, no other; the commands of all are in docs/results.md, in this order."""
    table = README[README.index("| question |") :].partition("\n\n")[0].splitlines()[2:]
    found = front_page["entries"]()
    assert table == [front_page["row"](entry) for entry in found] and len(table) >= 5
    commands = RESULTS[RESULTS.index("## The commands") :].partition("```sh\n")[2].partition("```")[0].splitlines()
    assert commands == list(dict.fromkeys(command for entry in found for command in entry["commands"]))


def test_a_row_is_what_its_report_says(front_page):
    """The writer itself, against the cells: means, interval and verdict of each row."""
    for entry, (_, _, directories, names) in zip(front_page["entries"](), front_page["ROWS"], strict=True):
        reports = [report_of(directory) for directory in directories]
        (endpoint,) = {report["endpoint"] for report in reports}
        key, factor, more = {"best": ("best_val_loss", 1, False), "last": ("val_loss", 1, False), "top1": ("top1", 100, True)}[endpoint]
        cells = [(name, cell) for report in reports for name, arm in report["arms"].items() for cell in arm["cells"]]
        a, b = ({cell["seed"]: factor * cell[key] for arm, cell in cells if arm == name} for name in names)
        assert a.keys() >= b.keys() and len(b) == entry["n"]
        a = {seed: a[seed] for seed in b}
        test = stats.ttest_1samp([b[seed] - a[seed] for seed in b], 0)
        low, high = test.confidence_interval(0.95)
        assert entry["interval"] == pytest.approx([low, high]) and entry["mean"] == pytest.approx((low + high) / 2)
        assert [of["mean"] for of in entry["arms"]] == pytest.approx([sum(arm.values()) / len(arm) for arm in (a, b)])
        better = low > 0 if more else high < 0
        assert front_page["verdict"](entry) == ("better" if better else "undecided" if low <= 0 <= high else "worse")


def test_the_words_about_shakespeare_are_the_committed_reports():
    arms = {"own_rate": ("", "_laplacian"), "tuned": ("_learning_rate=4e-3", "_laplacian_learning_rate=2e-3")}
    arms = {name: [f"shakespeare_char{word}" for word in both] for name, both in arms.items()}
    reports = {name: report_of(f"shakespeare_char_{name}") for name in arms}
    pairs = [reports[name]["pairs"][both[1]] for name, both in arms.items()]
    for page in (IN_README, IN_RESULTS):
        assert "lower by {:.3f} at the same rate and by {:.3f} at the tuned ones".format(*(-pair["last"]["mean"] for pair in pairs)) in page
        assert "sign-flip p = {:.3f}".format(pairs[0]["best"]["sign_flip_p"]) in page
        assert "the sign turns (p = {:.3f})".format(pairs[1]["best"]["sign_flip_p"]) in page
    steps = []
    for name, report in reports.items():
        a, b = (report["arms"][arm]["best_step"]["mean"] for arm in arms[name])
        steps.append(b - a)
        assert sum(arm["seconds"]["mean"] * arm["n"] for arm in report["arms"].values()) < 600
    assert "best loss comes later (by {:.0f} steps at the same rate, by {:.0f} at the tuned ones)".format(*steps) in IN_RESULTS
    rates = [report_of(name)["arms"] for name in ("shakespeare_char_rates", "shakespeare_char_rates_more")]
    for arm, chosen in (("shakespeare_char", "4e-3"), ("shakespeare_char_laplacian", "2e-3")):
        losses = {
            name.rpartition("=")[2]: found[name]["best_val_loss"]["mean"] for found in rates for name in found if name.startswith(f"{arm}_learning")
        }
        assert len(losses) == 4 and min(losses, key=losses.get) == chosen
    assert f"({words(losses['2e-3'])} and {words(losses['1e-3'])})" in IN_RESULTS
    a, b, tuned_a, tuned_b = (
        {cell["seed"]: cell["best_val_loss"] for cell in reports[name]["arms"][arm]["cells"]} for name, both in arms.items() for arm in both
    )

    def difference(one, other):
        test = stats.ttest_1samp([other[seed] - one[seed] for seed in one], 0)
        low, high = test.confidence_interval(0.95)
        return (low + high) / 2, low, high

    assert len(a) == 10 and a.keys() == b.keys() == tuned_a.keys() == tuned_b.keys()
    assert "2e-3 is worse for it by {:.4f} ({:.4f} to {:.4f})".format(*difference(b, tuned_b)) in IN_RESULTS
    assert "A's gain from 4e-3 is undecided ({}, {} to {})".format(*map(words, difference(tuned_a, a))) in IN_RESULTS
    assert "is undecided too ({}, {} to {})".format(*(words(x, "+") for x in difference(tuned_a, b))) in IN_RESULTS


def test_the_words_about_pictures_are_the_committed_reports():
    report, rates = report_of("imagenet16"), report_of("imagenet16_rates")
    (pair,) = report["pairs"].values()
    a, b = (arm["cells"] for arm in report["arms"].values())
    assert min(pair["top1"]["differences"]) > 0 and max(pair["last"]["differences"]) < 0 and pair["top1"]["n"] == 6
    assert f"Its loss, which is secondary, ends {-pair['last']['mean']:.3f} nats lower" in IN_RESULTS
    assert f"on one other seed ({len(report_of('heads_rates')['arms'])} runs," in IN_RESULTS
    first = [sum(next(loss for step, loss, *_ in cell["curve"] if step == 500) for cell in arm) for arm in (a, b)]
    assert all(len(arm) == 6 for arm in (a, b)) and first[1] < first[0]
    found = {name: arm["top1"]["mean"] for name, arm in rates["arms"].items()}
    leads = [found[f"imagenet16_laplacian_learning_rate={r}"] - found[f"imagenet16_learning_rate={r}"] for r in ("3e-4", "1e-3", "2e-3", "4e-3")]
    assert len(found) == 8 and all(arm["n"] == 3 for arm in rates["arms"].values())
    for page in (IN_README, IN_RESULTS):
        assert f"by {100 * pair['top1']['mean']:.1f} points of top-1 on average and on every one of six seeds" in page
        assert f"six seeds allow no p below {pair['top1']['sign_flip_p']:.3f}" in page
        assert f"on average by {math.floor(1000 * min(leads)) / 10:.1f} points or more at each of the four rates tried, on three other seeds" in page
    for arm in ("imagenet16", "imagenet16_laplacian"):
        assert max((name for name in found if name.startswith(f"{arm}_learning")), key=found.get) == f"{arm}_learning_rate=1e-3"


@pytest.fixture(scope="module")
def across():
    """The comparisons of GPT-2, and the one cell that is in none: arm and rate -> {seed: last loss}."""
    found: dict[str, dict] = {}
    reports = map(report_of, ("gpt2", "gpt2_own_rates", "gpt2_edge", "gpt2_edge_23", "gpt2_new"))
    cells = [cell for report in reports for arm in report["arms"].values() for cell in arm["cells"]]
    cells.append(json.loads((ROOT / "results" / "gpt2_laplacian_edge" / "seed-1.json").read_text())["result"])
    for cell in cells:
        assert found.setdefault(cell["arm"].removeprefix("gpt2_100m_"), {}).setdefault(cell["seed"], cell["val_loss"]) == cell["val_loss"]
    assert len(found) == 12 and sum(map(len, found.values())) == len(cells) == 46
    return found


def paired(a: dict, b: dict) -> tuple[float, float, float]:
    """Mean and 95 % t interval of b - a over the seeds of b, or of a where those are fewer."""
    seeds = min(a.keys(), b.keys(), key=len)
    low, high = stats.ttest_1samp([b[seed] - a[seed] for seed in seeds], 0).confidence_interval(0.95)
    return (low + high) / 2, low, high


HALF, ALL, SILENT = "laplacian_diffusion_heads=6_learning_rate=", "laplacian_learning_rate=", "attention_kernel=softmax1_learning_rate="
FIRST = "laplacian_diffusion_heads=0,12,12,12,12,12,12,12,12,12,12,12_learning_rate="


def test_the_table_of_gpt2_by_rate_is_the_committed_reports(across):
    def cell(values):
        mean, seeds = words(sum(values.values()) / len(values)), sorted(values)
        return f"{mean} ± {stats.tstd(list(values.values())):.4f} ({seeds[0]}–{seeds[-1]})" if len(seeds) > 1 else f"{mean} ({seeds[0]})"

    def against(arm, rate, base="learning_rate=", seeds=range(1, 7)):
        a, b = across[base + rate], {seed: loss for seed, loss in across[arm + rate].items() if seed in seeds}
        return "{} ({} to {})".format(*(words(x, "+") for x in paired(a, b))) if len(b) > 1 else f"{words(b[1] - a[1], '+')} (1)"

    rates = "6e-4", "1.2e-3", "2.4e-3"
    named = {"A": "learning_rate=", "half of the heads": HALF, "A − I in all layers but the first": FIRST, "A − I in all heads": ALL}
    named["A with softmax1"] = SILENT
    rows = [[name, *(cell(across[arm + rate]) if arm + rate in across else "" for rate in rates)] for name, arm in named.items()]
    rows += [["half of the heads against A", *(against(HALF, rate) for rate in rates)]]
    rows += [["the same on seeds 4 to 6 alone", "", *(against(HALF, rate, seeds=(4, 5, 6)) for rate in rates[1:])]]
    for name, arm in (("all layers but the first against A", FIRST), ("A − I in all heads against A", ALL), ("softmax1 against A", SILENT)):
        rows += [[name, "", *(against(arm, rate) for rate in rates[1:])]]
    table = RESULTS[RESULTS.index("| | 6e-4 | 1.2e-3 | 2.4e-3 |") :].partition("\n\n")[0].splitlines()[2:]
    assert table == [re.sub(" +", " ", f"| {' | '.join(row)} |") for row in rows]
    signs = [(HALF, rate, -1) for rate in rates] + [(arm, rate, 1) for arm in (ALL, FIRST) for rate in rates[1:]]
    for arm, rate, sign in signs:
        assert all(sign * (loss - across[f"learning_rate={rate}"][seed]) > 0 for seed, loss in across[arm + rate].items()), "on every seed"
    crossed = [paired(across[f"learning_rate={a}"], across[HALF + b]) for a, b in (("1.2e-3", "2.4e-3"), ("2.4e-3", "1.2e-3"))]
    flat = [f"{-x:.4f}" for mean, low, high in crossed for x in (mean, high, low)]
    sentence = "at 2.4e-3 lead A at 1.2e-3 by {} ({} to {}), and at 1.2e-3 they lead A at 2.4e-3 by {} ({} to {})."
    assert sentence.format(*flat) in IN_RESULTS
    mean, low, high = paired(across["learning_rate=2.4e-3"], across["learning_rate=1.2e-3"])
    assert f"1.2e-3 and 2.4e-3 are level ({mean:.4f}, {words(low)} to {words(high, '+')})" in IN_RESULTS
    new = {rate: {s: loss for s, loss in across[HALF + rate].items() if s > 3} for rate in rates[1:]}
    alone = {rate: paired(across[f"learning_rate={rate}"], new[rate]) for rate in new}
    assert alone["2.4e-3"][2] > 0 > alone["1.2e-3"][2]
    leads = {rate: [across[f"learning_rate={rate}"][s] - across[HALF + rate][s] for s in range(1, 7)] for rate in rates[1:]}
    assert max(leads["1.2e-3"][3:]) < min(leads["1.2e-3"][:3]), "less than each of the first three"
    flat = [f"{lead:.4f}" for lead in leads["1.2e-3"][3:] + leads["1.2e-3"][:3] + leads["2.4e-3"][3:]]
    sentence = "the leads are {}, {} and {} at 1.2e-3, less than each of the first three ({}, {} and {}), and {}, {} and {} at 2.4e-3,"
    assert sentence.format(*flat) in IN_RESULTS
    flat = [f"{lead:.3f}" for lead in leads["1.2e-3"][3:] + leads["2.4e-3"][3:]]
    assert "the leads are smaller, {}, {} and {} at 1.2e-3, and {}, {} and {} at 2.4e-3, where A does badly".format(*flat) in IN_README
    groups = [[across[arm + "1.2e-3"][s] for s in seeds] for arm in ("learning_rate=", HALF) for seeds in ((1, 2, 3), (4, 5, 6))]
    means = [words(sum(group) / 3) for group in groups]
    sentence = "it has {} ± {:.4f} on seeds 1 to 3 and {} ± {:.4f} on 4 to 6, half of the heads {} and {}."
    assert sentence.format(means[0], stats.tstd(groups[0]), means[1], stats.tstd(groups[1]), *means[2:]) in IN_RESULTS
    silent = [paired(across[SILENT + rate], across[HALF + rate]) for rate in rates[1:]]
    flat = [words(-x) for mean, low, high in silent for x in (mean, high, low)]
    assert "lead it on every seed, by {} ({} to {}) at 1.2e-3 and {} ({} to {}) at 2.4e-3,".format(*flat) in IN_RESULTS
    assert sorted(across[SILENT + "2.4e-3"][s] - across[HALF + "2.4e-3"][s] for s in (4, 5, 6))[1] < 0.006
    assert all(across[HALF + rate][s] < across[SILENT + rate][s] for rate in rates[1:] for s in (4, 5, 6))
    gains = [words(paired(across[f"learning_rate={rate}"], across[SILENT + rate])[0], "+") for rate in rates[1:]]
    assert "That shows no gain, {} and {}, but".format(*gains) in IN_RESULTS
    behind = [paired(across["learning_rate=1.2e-3"], across[arm + "1.2e-3"])[0] for arm in (FIRST, ALL)]
    assert "behind A by {:.4f} on seeds 4 to 6 at 1.2e-3, in all heads by {:.4f} on seeds 1 to 3".format(*behind) in IN_RESULTS
    assert f"with the first layer plain A − I is behind A by {behind[0]:.3f}, a hint." in IN_README
    flat = [words(x, sign) for x, sign in zip(paired(across["learning_rate=2.4e-3"], across[FIRST + "2.4e-3"]), ("", "", "+"))]
    all_heads = across[ALL + "2.4e-3"][1] - across["learning_rate=2.4e-3"][1]
    assert f"where all heads end {all_heads:.2f} behind on one seed, it is {flat[0]} ({flat[1]} to {flat[2]}) on three" in IN_RESULTS
    (top,), (two,) = ([cell for arm in report_of(f"gpt2_top_{name}")["arms"].values() for cell in arm["cells"]] for name in ("plain", "two"))
    more, mixed = ([arm["cells"] for arm in report_of(f"gpt2_{name}")["arms"].values()][0] for name in ("top_two_more", "mixed"))
    rows = [("none (A)", across["learning_rate=2.4e-3"]), ("six of twelve in every layer", across[HALF + "2.4e-3"])]
    rows += [("two of twelve in every layer", {cell["seed"]: cell["val_loss"] for cell in (two, *more)})]
    rows += [("six of twelve in all layers but the first", {cell["seed"]: cell["val_loss"] for cell in mixed})]
    table = RESULTS[RESULTS.index("| heads with A − I | seed 4 |") :].partition("\n\n")[0].splitlines()[2:]
    three = [(name, [losses[seed] for seed in (4, 5, 6)]) for name, losses in rows]
    assert table == [f"| {name} | {' | '.join(words(x) for x in (*losses, sum(losses) / 3))} |" for name, losses in three]
    means = [sum(losses) for _, losses in three]
    assert means[1] < means[2] < means[0] < means[3], "two heads are between A and six, and without the first layer there is no lead"
    assert (
        "{:.2f} at step {}, {:.2f} at the end ([seed {}]".format(top["best_val_loss"], top["best_step"], top["val_loss"], top["seed"]) in IN_RESULTS
    )
    log = (ROOT / "results" / "gpt2_top_half" / "seed-4-metrics.jsonl").read_text().splitlines()
    cut = [json.loads(line) for line in log]
    seen = {line["step"]: line["val_loss"] for line in cut if line["val_loss"]}
    same = next(
        cell
        for arm in report_of("gpt2_new")["arms"].values()
        for cell in arm["cells"]
        if (cell["arm"], cell["seed"]) == (f"gpt2_100m_{HALF}2.4e-3", 4)
    )
    sentence = "were cut off at step {}, with {:.3f} at step {} where 2.4e-3 had {:.3f} ("
    assert sentence.format(cut[-1]["step"], seen[1308], 1308, dict(same["curve"])[1308]) in IN_RESULTS and max(seen) == 1308
    curve = json.loads((ROOT / "results" / "gpt2_laplacian_edge" / "seed-1.json").read_text())["result"]["curve"]
    (step, low), (_, end) = min(curve, key=lambda point: point[1]), curve[-1]
    assert f"it falls to {low:.4f} at step {step} and is {end:.4f} at the end" in IN_RESULTS
    assert f"on one seed, its loss turns at {low:.2f} and ends at {end:.2f}." in IN_README


def test_the_words_about_gpt2_are_the_committed_reports(across):
    sys.path.append(str(ROOT / "studies"))
    from seeds_needed import SIZES, seeds

    report, rates = report_of("gpt2"), report_of("gpt2_rates")
    branches = json.loads((ROOT / "results" / "gpt2" / "branches.json").read_text())
    a, everywhere, half = report["arms"]
    assert (a, half) == ("gpt2_100m_learning_rate=6e-4", "gpt2_100m_laplacian_diffusion_heads=6_learning_rate=1.2e-3")
    small, large = across["learning_rate=6e-4"], across["learning_rate=1.2e-3"]
    leads = [-paired(across[f"learning_rate={rate}"], across[HALF + rate])[0] for rate in ("2.4e-3", "1.2e-3", "6e-4")]
    sentence = "by {:.3f} at 2.4e-3 and {:.3f} at 1.2e-3, on every one of six seeds (exact sign-flip p = {:.3f} each);"
    assert sentence.format(*leads[:2], 2 / 2**6) in IN_README and len(large) == 6
    pairs = json.loads((ROOT / "results" / "gpt2_new" / "across.json").read_text())["pairs"]
    flips = {f"{pairs[f'gpt2_100m_{HALF}{rate} − gpt2_100m_learning_rate={rate}']['sign_flip_p']:.3f}" for rate in ("1.2e-3", "2.4e-3")}
    assert flips == {"0.031"} and "which is p = 0.031 each by the exact sign-flip test" in IN_RESULTS
    sentence = "by 0.03 nats on average, on each of six seeds, three of which chose the rates, at each of two rates."
    assert all(f"{lead:.2f}" == "0.03" for lead in leads) and sentence in IN_README
    behind = paired(large, across[ALL + "1.2e-3"])
    assert f"in all heads ends behind A at 1.2e-3, by {behind[0]:.3f}, a hint;" in IN_README
    once, gain = -paired(small, across[HALF + "1.2e-3"])[0], paired(large, small)
    assert f"**A lead of {once:.3f} that was not.**" in RESULTS and f"half of the heads led by {once:.4f}, and" in IN_RESULTS
    undecided = paired(small, across[ALL + "1.2e-3"])
    assert "A − I was undecided, {} ({} to {})".format(*(words(x, "+") for x in undecided)) in IN_RESULTS
    assert "A is better at 1.2e-3 by {:.4f} ({:.4f} to {:.4f})".format(*gain) in IN_RESULTS
    assert "six seeds allow no p below 0.031, three none below 0.25." in IN_README and len(small) == 3

    def ratio(entry):
        return "{:.2f} ({:.2f} to {:.2f})".format(entry["mean"], *entry["interval"])

    steps = json.loads((ROOT / "results" / "gpt2_new" / "steps.json").read_text())
    best = steps[f"gpt2_100m_{HALF}2.4e-3"]
    assert f"at 2.4e-3 they reach A's last loss in {ratio(best)} times fewer steps" in IN_README
    assert f"{ratio(best)} times fewer ([table]" in IN_RESULTS
    assert f"A − I in all heads, at 1.2e-3 against A at 2.4e-3: {ratio(steps[everywhere])}." in IN_RESULTS
    whole = "At 2.4e-3 half of the heads reach A's last loss after {:,.0f} steps on average instead of {:,.0f}:"
    assert whole.format(*(sum(best[key]) / 6 for key in ("arm_steps", "baseline_steps"))) in IN_RESULTS
    others = [json.loads((ROOT / "results" / name / "steps.json").read_text()) for name in ("imagenet16", "shakespeare_char_own_rate")]
    others.append(json.loads((ROOT / "results" / "shakespeare_char_tuned" / "steps.json").read_text()))
    sentence = "On ImageNet the ratio is {} for A − I, on Shakespeare {} at the same rate and {} at tuned ones."
    assert sentence.format(*(ratio(*found.values()) for found in others)) in IN_RESULTS

    losses = {name: arm["val_loss"]["mean"] for name, arm in rates["arms"].items()}
    by_rate = [[losses[f"{arm.rpartition('=')[0]}={rate}"] for rate in ("6e-4", "1.2e-3", "2.4e-3")] for arm in (a, everywhere, half)]
    sentence = "A {}, {} and {} (and {} at 3e-4), A − I {}, {} and {}, half of the heads {}, {} and {}."
    flat = [words(x) for x in (*by_rate[0], losses["gpt2_100m_learning_rate=3e-4"], *by_rate[1], *by_rate[2])]
    assert sentence.format(*flat) in IN_RESULTS and len(losses) == 10 and [arm["n"] for arm in rates["arms"].values()] == [1] * 10
    assert by_rate[0][1] > by_rate[0][0] and gain[1] > 0 and gain[0] > max(*leads, behind[0]), "wrong, by more than any difference between arms"
    curves = {name: [dict(cell["curve"]) for cell in arm["cells"]] for name, arm in report["arms"].items()}
    falls = [f"{sum(curve[step] for curve in curves[a]) / 3:.2f}" for step in (327, 436)]
    assert "between steps 327 and 436 (A at 6e-4 from {} to {})".format(*falls) in IN_RESULTS
    assert all(curve[436] < curve[327] - 0.25 for some in curves.values() for curve in some)
    tuning = {name: arm["best_val_loss"]["mean"] for name, arm in report_of("heads_rates")["arms"].items()}
    best = {}
    for name, loss in tuning.items():
        arm = name.partition("_learning_rate")[0]
        best[arm] = min(loss, best.get(arm, 9.0))
    order = sorted(best, key=best.get)
    assert order[0].endswith("heads=4") and order.index("shakespeare_char_laplacian_diffusion_heads=3") == 6 and len(order) == 10

    last = {name: {what: entry["mean"] for what, entry in found["last"].items() if what != "step"} for name, found in branches.items()}
    first = {name: {what: entry["mean"] for what, entry in found["first"].items() if what != "step"} for name, found in branches.items()}
    plain = {f"{last[name]['diagonal, plain heads']:.2f}" for name in (a, half)}
    own = [f"{last[name]['diagonal, diffusing heads']:.2f}" for name in (everywhere, half)]
    assert plain == {"0.07"} and f"plain heads have {plain.pop()} of their weight on their own token" in IN_RESULTS
    assert "Heads with A − I have {} of it there when all are such, and {} in the mixture.".format(*own) in IN_RESULTS
    loud = [f"{first[name]['attention, first layer']:.2f}" for name in (everywhere, half, a)]
    assert "it adds {} times the tokens' RMS (half of the heads {}, A {})".format(*loud) in IN_RESULTS
    loud = [last[name]["attention, first layer"] for name in (everywhere, half, a)]
    quiet = [f"{last[name]['attention, others']:.2f}" for name in (everywhere, half, a)]
    assert "at the end {:.0f} times ({:.0f}, {:.2f})".format(*loud) in IN_RESULTS and "{} times ({}, {}).".format(*quiet) in IN_RESULTS

    silent = report_of("silent_quick")["pairs"]["quick_attention_kernel=softmax1_learning_rate=8e-3"]["best"]
    sentence = "that arm is undecided: {} ({} to {}) against A on eight seeds".format(*(words(x, "+") for x in (silent["mean"], *silent["interval"])))
    assert sentence in IN_RESULTS and silent["n"] == 8
    rates = {name: arm["best_val_loss"]["mean"] for name, arm in report_of("silent_quick_rates")["arms"].items()}
    assert min(rates, key=rates.get).endswith("rate=8e-3") and len(rates) == 4, "no edge"

    spread = [stats.tstd([loss - large[seed] for seed, loss in across[arm + "1.2e-3"].items()]) for arm in (ALL, HALF)]
    counts = [[seeds(size, sd) for size in SIZES[:3]] for sd in spread]
    sentence = "two arms that differ by 0.02 need {2} paired seeds for a power of 80 %, by 0.01 {1} and by 0.005 {0};"
    assert sentence.format(*counts[0]) in IN_RESULTS and SIZES[:3] == (0.005, 0.01, 0.02)
    assert "it is {2}, {1} and {0} (`".format(*counts[1]) in IN_RESULTS
    assert f"these differences at 1.2e-3, {spread[0]:.4f} for A − I" in IN_RESULTS and f"that of the mixture, {spread[1]:.4f}," in IN_RESULTS

    speed = json.loads((ROOT / "results" / "bench" / "h100_scale_gpt2_1b3.json").read_text())
    hours = 118e6 / speed["rows"][0]["tokens_per_s"] / 3600
    assert f"takes {hours:.2f} hours of an H100" in IN_RESULTS and f"for A with {speed['bench']['batch_size']} sequences a step" in IN_RESULTS
    assert f"21 pairs and one pass are {42 * hours:.0f} GPU-hours, 54 pairs {108 * hours:.0f}." in IN_RESULTS
    assert (counts[0][1], counts[1][1]) == (54, 21)


def test_the_table_by_size_is_the_committed_reports(across):
    committed = json.loads((ROOT / "results" / "gpt2_350m" / "scale.json").read_text())["arms"].values()
    found = [entry for entry in committed if entry["arm"] == "A − I in half of the heads" and not entry["rate"].startswith("best")]

    def spread(of):
        return words(of["mean"]) + ("" if of["sd"] is None else f" ± {of['sd']:.4f}")

    rows = []
    for entry in found:
        seeds, interval = entry["seeds"], entry["interval"]
        named = f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 2 else ", ".join(map(str, seeds))
        difference = words(entry["mean"], "+") + (" ({} to {})".format(*(words(x, "+") for x in interval)) if interval else "")
        size = f"{entry['parameters'] / 1e6:,.0f} M"
        rows.append(f"| {size} | {entry['rate']} | {named} | {spread(entry['A'])} | {spread(entry['loss'])} | {difference} |")
    table = RESULTS[RESULTS.index("| parameters | rate | seeds |") :].partition("\n\n")[0].splitlines()[2:]
    assert table == rows and len(rows) == 8
    pairs = [difference for entry in found for difference in entry["differences"]]
    assert f"Half of the heads are ahead in all {len(pairs)} pairs." in IN_RESULTS and max(pairs) < 0
    larger = [-difference for entry in found for difference in entry["differences"] if entry["parameters"] > 2e8]
    assert f"half of the heads lead too, by {min(larger):.2f} to {max(larger):.2f} on a seed or two" in IN_README
    short = {entry["rate"]: -entry["mean"] for entry in found if entry["parameters"] < 2e8}
    long = {rate: -paired(across[f"learning_rate={rate}"], across[HALF + rate])[0] for rate in short}
    assert all(short[rate] > long[rate] for rate in short), "a lead is larger than at the end"
    assert f"at 124M it is {short['1.2e-3']:.4f} at 1.2e-3 here and {long['1.2e-3']:.4f} after 100 M tokens" in IN_RESULTS
    middle = {entry["rate"]: entry["differences"] for entry in found if 2e8 < entry["parameters"] < 5e8}
    of_a = {entry["rate"]: entry["A"]["mean"] for entry in found if 2e8 < entry["parameters"] < 5e8}
    assert set(middle) == {"3e-4", "6e-4", "1.2e-3"} and min(of_a, key=of_a.get) == "3e-4", "A's best rate is the smallest"


def test_the_words_about_schedules_that_end_in_time_are_the_committed_reports():
    report, rates = report_of("shakespeare_char_in_time"), report_of("shakespeare_char_in_time_rates")
    tuned = {name: arm["best_val_loss"]["mean"] for name, arm in rates["arms"].items()}
    assert len(tuned) == 12 and all(arm["n"] == 4 for arm in rates["arms"].values())
    best = [
        min((name for name in tuned if name.startswith(f"{arm}_learning")), key=tuned.get)
        for arm in ("shakespeare_char", "shakespeare_char_laplacian")
    ]
    assert (
        best
        == list(report["arms"])
        == ["shakespeare_char_learning_rate=1e-3_max_iters=2000", "shakespeare_char_laplacian_learning_rate=1e-3_max_iters=2500"]
    )
    (pair,) = report["pairs"].values()
    losses = [arm["best_val_loss"] for arm in report["arms"].values()]
    shown = [f"{words(loss['mean'])} ± {loss['sd']:.4f}" for loss in losses]
    difference = "{} ({} to {})".format(*(words(x, "+") for x in (pair["best"]["mean"], *pair["best"]["interval"])))
    sentence = "A, best in 2000 steps at 1e-3, has {}, A − I, best in 2500 at 1e-3, {}: {}, on each of the ten seeds"
    assert sentence.format(*shown, difference) in IN_RESULTS
    assert min(pair["best"]["differences"]) > 0 and pair["best"]["n"] == 10
    own = [arm["best_val_loss"] for arm in report_of("shakespeare_char_own_rate")["arms"].values()]
    assert f"with the 5000 steps of the first page it has {words(own[1]['mean'])} ± {own[1]['sd']:.4f}, on the same seeds" in IN_RESULTS
    last = f"still above A's {words(losses[0]['mean'])} in 2000 steps, and A's own {words(own[0]['mean'])} in 5000"
    assert last in IN_RESULTS and losses[0]["mean"] < own[1]["mean"] < own[0]["mean"]
    assert f"A schedule of 2000 steps takes A to {words(losses[0]['mean'])}, lower than A − I in 5000, {words(own[1]['mean'])}." in IN_README


def test_the_words_about_trained_weights_are_the_committed_reports():
    def ends(name):
        """{(alpha, lambda): losses of the seeds before the first step and after the last}"""
        report = report_of(name)
        keys = {arm: (config["diffusion_alpha"], config["diffusion_lambda"]) for arm, config in report["provenance"]["configs"].items()}
        curves = {keys[arm]: {cell["seed"]: cell["curve"] for cell in of["cells"]} for arm, of in report["arms"].items()}
        return {key: [{seed: curve[i][1] for seed, curve in some.items()} for i in (0, -1)] for key, some in curves.items()}

    def mean(values):
        return f"{sum(values.values()) / 5:.4f}"

    def lower(key):
        difference, low, high = paired(found[0, 1][1], found[key][1])
        return f"{-difference:.4f} ({-high:.4f} to {-low:.4f})"

    def higher(some, key):
        return "{:.4f} ({:.4f} to {:.4f})".format(*paired(some[0, 1][1], some[key][1]))

    found, control = ends("pretrained"), ends("alpha_control")
    start = [mean(found[alpha, 1][0]) for alpha in (0, 0.1, 1)]
    assert "rises at once, from {} to {} at α = 0.1 and {} at 1.".format(*start) in IN_RESULTS
    sentence = "it is {} with α = 0, lower by {} at 0.2, {} at 0.3 and {} at 0.4, undecided at 0.1 and 0.5, and higher from 0.6 on, by {} there"
    assert sentence.format(mean(found[0, 1][1]), *(lower((alpha, 1)) for alpha in (0.2, 0.3, 0.4)), higher(found, (0.6, 1))) in IN_RESULTS
    assert f"there and by {higher(found, (1, 1))} at 1." in IN_RESULTS
    intervals = {alpha: paired(found[0, 1][1], found[alpha, 1][1])[1:] for alpha, _ in found if alpha}
    assert [alpha for alpha, (low, high) in sorted(intervals.items()) if low < 0 < high] == [0.1, 0.5]

    weak = [(0, lam) for lam in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]
    assert list(control) == [(0, 1), (0.3, 1), (0.4, 1), *weak]
    assert f"on every seed, from {higher(control, weak[0])} at 0.9 to {higher(control, weak[-1])} at 0.4" in IN_RESULTS
    assert all(loss > control[0, 1][1][seed] for key in weak for seed, loss in control[key][1].items())
    assert f"But that λ starts at {mean(control[weak[-1]][0])}, α = 0.4 at {mean(control[0.4, 1][0])};" in IN_RESULTS
    against = paired(control[0, 0.4][1], control[0.4, 1][1])
    assert "starts nearest to it, 0.4: {} ({} to {}).".format(*map(words, against)) in IN_RESULTS
    flat = []
    for alpha, weaker in ((0.2, 0.4), (0.1, 0.6)):
        difference, low, high = paired(control[0, weaker][1], found[alpha, 1][1])
        flat += [mean(found[alpha, 1][0]), f"{-difference:.4f} ({-high:.4f} to {-low:.4f})"]
    sentence = "α = 0.2 ({}) is ahead of λ = 0.4 by {} and α = 0.1 ({}) of λ = 0.6 ({}) by {}, across"
    assert sentence.format(*flat[:3], mean(control[0, 0.6][0]), flat[3]) in IN_RESULTS
    assert max(weak, key=lambda key: mean(control[key][0])) == weak[-1], "nearest to alpha = 0.4"
    for key in ((0, 1), (0.3, 1), (0.4, 1)):
        assert [mean(values) for values in control[key]] == [mean(values) for values in found[key]], "repeated"


def test_the_table_of_some_heads_is_the_committed_report():
    report = report_of("heads")
    arms = {name: {cell["seed"]: cell["best_val_loss"] for cell in arm["cells"]} for name, arm in report["arms"].items()}
    (a, *_), rows = arms, RESULTS[RESULTS.index("| A − I in | rate |") :].partition("\n\n")[0].splitlines()[2:]
    for row, (name, values) in zip(rows, arms.items(), strict=True):
        _, _, rate, loss, against, _ = (part.strip() for part in row.split("|"))
        assert name.endswith(f"_learning_rate={rate}") and loss == f"{words(sum(values.values()) / 3)} ± {stats.tstd(list(values.values())):.4f}"
        assert against == ("" if name == a else "{} ({} to {})".format(*(words(x, "+") for x in paired(arms[a], values))))
    mixed = [values for name, values in arms.items() if re.search(r"heads=\d_", name)]
    whole = next(values for name, values in arms.items() if name.startswith("shakespeare_char_laplacian_learning"))
    ahead = [sum(values[seed] < base[seed] for values in mixed for seed in base) for base in (arms[a], whole)]
    assert len(mixed) == 5 and "ahead of A on average, in {} of 15 pairs, and ahead of A − I in {} of 15".format(*ahead) in IN_RESULTS
    assert all(sum(values.values()) < sum(arms[a].values()) for values in mixed)


def test_no_committed_result_names_a_path_of_the_machine_it_was_made_on():
    for path in (ROOT / "results").rglob("*"):
        if path.suffix in (".json", ".md"):
            assert not re.search(r"/(tmp|work|root|home)/", path.read_text(encoding="utf-8")), path


def test_every_directory_of_results_is_in_their_list():
    listed = re.findall(r"\[(\w[^]]*)\]\(\1\)", PAGES["results/README.md"])
    assert sorted(listed) == sorted(path.name for path in (ROOT / "results").iterdir() if path.is_dir())


def test_the_readme_stays_a_first_page():
    """Details belong in docs/."""
    assert len((ROOT / "README.md").read_bytes()) < 16_000


def anchors(page: str) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_file_it_links_or_runs_exists(name):
    """Links and pictures from the page's own directory, files of commands from the root."""
    page, here = PAGES[name], (ROOT / name).parent
    links = re.findall(r"\]\(([^)]+)\)", page) + re.findall(r'src="([^"]+)"', page)
    missing = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = here / file if file else ROOT / name
        if not link.startswith("https://") and not (target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))):
            missing.append(link)
    scripts = re.findall(r"(?<![\w/])(?:(?:config|data|studies|tests)/[\w/]+\.py|(?<=python )\w+\.py)", page)
    missing += [script for script in scripts if not (ROOT / script).is_file()]
    assert missing == []
    assert name != "README.md" or (len(links) > 15 and len(scripts) > 10)


def test_every_page_is_linked_from_the_first():
    assert all(f"]({name})" in README or f"]({name}#" in README for name in PAGES if name != "README.md")


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


def test_the_speed_table_is_the_committed_benchmarks():
    row = next(line for line in SPEED.splitlines() if line.startswith("| a step of `quick`"))
    found = {}
    for file in ("cpu_quick", "cpu_sample_shakespeare_char", "cpu_sample_gpt2", "cpu_startup"):
        rows = json.loads((ROOT / "results" / "bench" / f"{file}.json").read_text())["rows"]
        found[file] = {entry["arm"]: f"{entry['ms']['median']:.1f}" for entry in rows}
    quick, text, gpt2, start = found.values()
    more = f"A in bf16 {quick['A-bf16']}, with the log-barrier {quick['A+prior']}"
    assert row == f"| a step of `quick`, float32 | {quick['plain']} | {quick['A']} | {quick['A-I']} | {more} |"
    assert f"| a character from the 10.65 M model | {text['A, no cache']} | {text['A']} | {text['A-I']} | |\n" in SPEED
    assert f"| a token from GPT-2 124M | {gpt2['A, no cache']} | {gpt2['A']} | | transformers with its cache {gpt2['A, transformers']} |\n" in SPEED
    assert f"to its first iteration | | {start['first iteration']} | | `--help` {start['--help']} |\n" in SPEED


def test_the_speed_of_gpus_is_the_committed_benchmarks():
    def rows(name):
        return {row["arm"]: row for row in json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text())["rows"]}

    def ms(row, digits=1):
        return f"{row['ms']['median']:.{digits}f}"

    def rate(row):
        return f"{row['tokens_per_s'] / 1000:.0f}"

    small, gpt2, barrier, pictures = (rows(f"h200_{name}") for name in ("train_shakespeare_char", "train_gpt2", "prior_gpt2", "train_imagenet16"))
    cells = " | ".join(ms(small[arm], 2) for arm in ("plain", "A", "A-I"))
    assert f"| a step of `shakespeare_char` (64 × 256 characters) | {cells} | |\n" in SPEED
    assert f"| a step of `shakespeare_char` (64 × 256 characters) | {cells} |\n" in README
    embedding, own = rows("h200_prior_shakespeare_char"), rows("h200_own_shakespeare_char")
    pairs = [f"{ms(some[arm], 2)} against {ms(some['A'], 2)}" for some, arm in ((embedding, "A+prior"), (own, "A+own"))]
    assert "| the same with the log-barrier, earlier kernels | | | | on the embeddings {}, on the model's own heads {} |\n".format(*pairs) in SPEED
    plain, a, laplacian = (gpt2[arm] for arm in ("plain", "A", "A-I"))
    rates = f"{rate(plain)}, {rate(a)} and {rate(laplacian)} thousand tokens/s"
    memory = "{:.1f}, {:.1f} and {:.1f} GiB".format(*(row["peak_gib"] for row in (plain, a, laplacian)))
    assert f"| a step of GPT-2 124M (64 × 1024 tokens), ungathered | {ms(plain)} | {ms(a)} | {ms(laplacian)} | {rates}; {memory} |\n" in SPEED
    beside = rows("h200_ungathered_gpt2")["A-I"]["ratio"]["median"]
    more = [f"{100 * (ratio - 1):.1f} %" for ratio in (laplacian["ratio"]["median"] / a["ratio"]["median"], beside)]
    in_speed = " ".join(SPEED.split())
    assert "A − I costs {} more than A in the first ungathered row, {} beside A alone".format(*more) in in_speed
    alone = rows("h200_train_gpt2_alone")
    rates = f"{rate(alone['plain'])} and {rate(alone['A'])} thousand tokens/s"
    assert f"| the same on a host whose other GPUs are idle | {ms(alone['plain'])} | {ms(alone['A'])} | | {rates} |\n" in SPEED
    before = rows("h200_gathered_gpt2")
    extra = 100 * (before["A-I"]["ratio"]["median"] / before["A"]["ratio"]["median"] - 1)
    sentence = "nanoGPT's way, A and A − I took {}, {} and {} ms, {:.1f} % more,"
    assert sentence.format(*(ms(before[arm]) for arm in ("plain", "A", "A-I")), extra) in in_speed
    won = sorted(before["A"]["ms"]["median"] - row["ms"]["median"] for row in (a, alone["A"]))
    assert "won A {:.1f} to {:.1f} ms".format(*won) in in_speed
    shares = [f"{row['ratio']['median']:.3f}" for row in (before["A"], a, alone["A"], before["A-I"], laplacian)]
    assert "Of its time A took {} and takes {} and {}, A − I took {} and takes {}.".format(*shares) in in_speed
    assert f"GPT-2's row, {rate(a)} thousand tokens/s for A," in IN_README
    assert f"| a step of GPT-2 124M (64 × 1024 tokens) | {ms(plain)} | {ms(a)} | {ms(laplacian)} |\n" in README
    more = f"on the embeddings {ms(barrier['A+prior'])}, on the model's own heads {ms(barrier['A+own'])}"
    assert f"| the same with the log-barrier, earlier kernels | | {ms(barrier['A'])} | | {more} |\n" in SPEED
    products = "matrix products {matrix products:.2f}, those with GELU inside {products with GELU inside:.2f}, attention {attention:.2f}"
    products = products.format_map(pictures["A"]["kernels_ms"])
    assert f"| a step of `imagenet16` (512 pictures), GELU inside | | {ms(pictures['A'], 2)} | {ms(pictures['A-I'], 2)} | {products} |\n" in SPEED
    text = rows("h200_sample_gpt2")
    cells = " | ".join(ms(text[arm], 2) for arm in ("A, no cache", "A", "A-I"))
    rates = f"{text['A']['tokens_per_s']:,.0f} and {text['A-I']['tokens_per_s']:,.0f} tokens/s"
    assert f"| a token from GPT-2 124M, one sequence, 500 after 100 | {cells} | {rates} |\n" in SPEED
    assert f"| a token from GPT-2 124M, one sequence, 500 after 100 | {cells} |\n" in README
    together = rows("h200_ddp2_gpt2")
    for arm, label in (("A", "A"), ("A-I", "A − I")):
        one, two = together[f"{arm}, alone"], together[f"{arm}, 2 processes"]
        cells = f"{ms(one)}, {ms(two)} | {rate(one)}, {rate(two)} | {two['ratio']['median']:.3f}"
        assert f"| {label}: one alone, two together | {cells} |\n" in SPEED


def test_the_speed_with_gelu_inside_is_the_committed_benchmarks():
    def rows(name):
        found = json.loads((ROOT / "results" / "bench" / f"h100_{name}.json").read_text())["rows"]
        return [(f"{row['ms']['median']:.{1 if 'gpt2' in name else 2}f}", f"{row['tokens_per_s'] / 1000:.0f}", row) for row in found]

    (apart, slow, _), (inside, fast, _) = rows("inside_gpt2")
    assert f"| a step of GPT-2 124M (64 × 1024 tokens) | | {apart} | {inside} | {slow} and {fast} thousand tokens/s |\n" in SPEED
    (plain, slow, one), (a, fast, other) = rows("plain_gpt2")
    memory = f"{one['peak_gib']:.1f} and {other['peak_gib']:.1f} GiB"
    assert f"| the same, other runs | {plain} | | {a} | {slow} and {fast} thousand tokens/s; {memory} |\n" in SPEED
    (a, _, _), (laplacian, _, row) = rows("train_gpt2")
    more = f"A − I {laplacian}, {100 * (row['ratio']['median'] - 1):.1f} % more; {row['peak_gib']:.1f} GiB"
    assert f"| the same, A against A − I | | | {a} | {more} |\n" in SPEED
    (apart, _, _), (inside, _, _) = rows("inside_shakespeare_char")
    assert f"| a step of `shakespeare_char` (64 × 256 characters) | | {apart} | {inside} | |\n" in SPEED
    (apart, _, row), (inside, _, _) = rows("inside_imagenet16")
    products = f"matrix products alone {row['kernels_ms']['matrix products']:.2f}"
    assert f"| a step of `imagenet16` (512 pictures) | | {apart} | {inside} | {products} |\n" in SPEED


def test_the_speed_by_size_is_the_committed_benchmarks():
    for model, label in (("gpt2", "`gpt2`, 124M"), ("gpt2_350m", "`gpt2_350m`"), ("gpt2_774m", "`gpt2_774m`"), ("gpt2_1b3", "`gpt2_1b3`, 1.3B")):
        report = json.loads((ROOT / "results" / "bench" / f"h100_scale_{model}.json").read_text())
        rows = report["rows"]
        ms = [f"{row['ms']['median']:.1f}" for row in rows]
        found = [(f"{row['tokens_per_s'] / 1e3:.1f}", f"{row['mfu']:.1%}", f"{row['peak_gib']:.1f}") for row in rows]
        pairs = [", ".join(some) for some in zip(*found)]
        cells = [label, str(report["bench"]["batch_size"]), ms[0], f"{ms[1]}, {rows[1]['ratio']['median'] - 1:.1%} more", *pairs]
        assert f"| {' | '.join(cells)} |\n".replace("%", " %") in SPEED
    large = json.loads((ROOT / "results" / "bench" / "h100_train_gpt2.json").read_text())["rows"][0]
    assert f"the MFU is {large['mfu']:.1%} (table above, {large['ms']['median']:.1f} ms)".replace("%", " %") in " ".join(SPEED.split())


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


def test_the_table_of_heads_is_the_committed_report():
    report = report_of("heads_quick")
    labels = ["none (A)", "one of four", "two", "three", "all (A − I)", "all, in the first two of four layers", "all, in the last two layers"]
    for (name, arm), label in zip(report["arms"].items(), [*labels, "all, α learned from 0.5, one per head"], strict=True):
        assert arm["n"] == 5 and not arm["diverged"]
        row = f"| {label} | {words(arm['best_val_loss']['mean'])} ± {words(arm['best_val_loss']['sd'])} |"
        if name in report["pairs"]:
            entry = report["pairs"][name]["best"]
            row += " {} ({} to {}) |".format(*(words(value, "+") for value in (entry["mean"], *entry["interval"])))
        assert f"{row}\n" in RESULTS or f"{row} |\n" in RESULTS


def test_the_words_about_heads_at_tuned_rates_are_the_committed_reports():
    report, rates = report_of("heads_quick_tuned"), report_of("heads_quick_rates")
    a, whole, early, late, half = report["arms"]
    heads = {name: config["diffusion_heads"] for name, config in report["provenance"]["configs"].items() if name in (early, late, half)}
    assert [list(value) for value in heads.values()] == [[4, 4, 0, 0], [0, 0, 4, 4], [2]] and all(arm["n"] == 8 for arm in report["arms"].values())
    chosen = {}
    for name, config in rates["provenance"]["configs"].items():
        chosen.setdefault(tuple(config["diffusion_heads"]), []).append((rates["arms"][name]["best_val_loss"]["mean"], config["learning_rate"]))
    for name in heads:
        config = report["provenance"]["configs"][name]
        tried = chosen[tuple(config["diffusion_heads"])]
        assert len(tried) == 4 and min(tried)[1] == config["learning_rate"] not in (2e-3, 1.6e-2)
    low, high = report["pairs"][late]["best"]["interval"]
    assert low < 0 < high and all(report["pairs"][name]["best"]["interval"][0] > 0 for name in (whole, early, half))


def test_the_words_about_the_first_layer_are_the_committed_reports():
    report, tuned = map(report_of, ("heads_quick_first", "heads_quick_tuned"))
    a = {cell["seed"]: cell["best_val_loss"] for cell in next(iter(tuned["arms"].values()))["cells"]}
    first, others = (paired(a, {cell["seed"]: cell["best_val_loss"] for cell in arm["cells"]}) for arm in report["arms"].values())
    assert list(report["arms"]) == [f"quick_laplacian_diffusion_heads={heads}_learning_rate=4e-3" for heads in ("4,0,0,0", "0,4,4,4")] and len(a) == 8
    for study, chosen in (("first", ["4e-3", "4e-3"]), ("mixed", ["8e-3", "4e-3"])):
        best = {}
        for name, arm in report_of(f"heads_quick_{study}_rates")["arms"].items():
            best.setdefault(name.partition("_learning_rate=")[0], []).append((arm["best_val_loss"]["mean"], name.rpartition("=")[2]))
        assert all(len(some) == 4 for some in best.values()) and [min(some)[1] for some in best.values()] == chosen, "tuned, and no edge"
        assert [name.rpartition("=")[2] for name in report_of(f"heads_quick_{study}")["arms"]] == chosen
    without = "{} ({} to {})".format(*(words(x, "+") for x in others))
    cells = [
        {cell["seed"]: cell["best_val_loss"] for cell in arm["cells"]}
        for arm in (list(tuned["arms"].values())[1], next(iter(report["arms"].values())))
    ]
    assert "wins {:.4f} ({:.4f} to {:.4f}) back".format(*paired(*cells)) in IN_RESULTS
    sentence = (
        f"in the first layer, by {first[0]:.3f} at tuned rates; in all layers but the first it neither harms nor helps that can be seen ({without})"
    )
    assert sentence in IN_RESULTS and others[1] < 0 < others[2]
    assert f"the first layer alone does the harm (by {first[0]:.3f}; all layers but the first: {without})" in IN_README


def test_the_table_of_layers_is_the_committed_reports():
    arms = {}
    for name in ("heads_quick_tuned", "heads_quick_first", "heads_quick_mixed"):
        report = report_of(name)
        for arm, config in report["provenance"]["configs"].items():
            heads = (config["diffusion_heads"] or [4]) if config["diffusion"] else [0]
            heads = ", ".join(map(str, heads * 4 if len(heads) == 1 else heads))
            arms[heads] = {cell["seed"]: cell["best_val_loss"] for cell in report["arms"][arm]["cells"]}
    assert len(arms) == 9 and all(len(some) == 8 for some in arms.values())
    a = arms.pop("0, 0, 0, 0")
    for heads, losses in arms.items():
        assert "| {} | {} ({} to {}) |\n".format(heads, *(words(x, "+") for x in paired(a, losses))) in RESULTS
    by_first = {n: [paired(a, losses)[0] for heads, losses in arms.items() if heads[0] == n] for n in "024"}
    sentence = "all of its heads with A − I cost {:.2f} to {:.2f}, half of them {:.2f}, none of them nothing"
    assert sentence.format(min(by_first["4"]), max(by_first["4"]), sum(by_first["2"]) / 2) in IN_RESULTS
    assert all(abs(mean) < 0.002 for mean in by_first["0"]) and max(by_first["2"]) - min(by_first["2"]) < 0.002


def test_the_words_about_the_map_are_the_committed_report():
    table = json.loads((ROOT / "results" / "lambda_map" / "map.json").read_text())
    first, rest = report_of("lambda_map")["arms"], report_of("lambda_map_rest")["arms"]
    assert (len(first), len(rest), len(table)) == (84, 8, 88) and not any(arm["diverged"] for arms in (first, rest) for arm in arms.values())
    late = max(cell["val_loss"] - cell["best_val_loss"] for arms in (first, rest) for arm in arms.values() for cell in arm["cells"])
    assert f"each ends within {math.ceil(late * 1e4) / 1e4:.4f} of its best" in IN_RESULTS
    cells = {(c["lambda"], c["rate"], c["batch"]): c for c in table.values() if c["alpha"] in (None, 1)}
    behind = [cell["against_A"] for (lam, _, _), cell in cells.items() if lam]
    assert all(cell["runs"] == 2 and cell["steps"] * cell["batch"] == 76_800 for cell in table.values())
    twice = [name for name in rest if name in first]
    bases = {(lam, r, b): cells[None, r, b]["losses"] for lam, r, b in cells}
    for name in twice:
        rate, losses = table[name]["rate"], {str(cell["seed"]): cell["best_val_loss"] for cell in rest[name]["cells"]}
        bases[0.5, rate, 64] = losses  # the later cells have an A of their own
    moved = [max(abs(table[name]["losses"][s] - bases[0.5, table[name]["rate"], 64][s]) for s in "12") for name in twice]
    assert "differs between the two kinds of GPU by up to {:.4f}, {:.4f}, {:.4f} and {:.4f} at the four rates".format(*moved) in IN_RESULTS
    pairs = [loss - bases[at][s] for at, c in cells.items() if at[0] for s, loss in c["losses"].items()]
    count = f"in {sum(pair > 0 for pair in pairs)} pairs of {len(pairs)}"
    assert f"in all {len(behind)} cells with λ > 0, {count}, by {min(behind):.3f} to {max(behind):.3f} a cell," in IN_RESULTS and min(behind) > 0
    assert f"A − I is behind {count}, at every rate, batch size and λ > 0 tried." in IN_README
    small = [[c["loss"] for (lam, r, b), c in cells.items() if lam and (r, b) == at] for at in itertools.product((3e-4, 1e-3), (32, 64, 128))]
    assert f"differ by {max(max(some) - min(some) for some in small):.3f} at most" in IN_RESULTS
    scatter = max(abs(c["losses"]["1"] - c["losses"]["2"]) for (lam, r, b), c in cells.items() if lam and (r, b) == (4e-3, 32))
    assert f"two seeds of one cell differ by up to {scatter:.3f}." in IN_RESULTS
    own = report_of("shakespeare_char_own_rate")["arms"]
    a, laplacian = ([dict((step, loss) for step, loss, *_ in cell["curve"]) for cell in arm["cells"]] for arm in own.values())
    behind = {step: sum(b[step] - loss for b, loss in ((two, one[step]) for one, two in zip(a, laplacian))) / len(a) for step in a[0]}
    assert f"behind A by {behind[1000]:.3f} at step 1000" in IN_RESULTS and behind[2000] > 0 > behind[2250]
    first = next(iter(own.values()))
    assert f"at its best (step {first['best_step']['mean']:.0f})" in IN_RESULTS
    ends = cells[None, 2e-3, 32]["loss"], own["shakespeare_char_laplacian"]["best_val_loss"]["mean"]
    assert "ends at {:.4f} after 2400 steps, on two seeds, where A − I's best on the first page is {:.4f}.".format(*ends) in IN_RESULTS
    assert set(cells) == set(itertools.product((None, 0, 0.25, 0.5, 1, 1.5, 2), (3e-4, 1e-3, 2e-3, 4e-3), (32, 64, 128)))
    line = "at 1e-3 and λ = 1 by {:.3f}, {:.3f} and {:.3f} for batches of 32, 64 and 128"
    assert line.format(*(cells[1, 1e-3, batch]["against_A"] for batch in (32, 64, 128))) in IN_RESULTS
    hard = [cells[lam, 4e-3, 32]["against_A"] for lam in (0.25, 0.5, 1, 1.5, 2)]
    assert f"at 4e-3 and a batch of 32 A − I ends {min(hard):.3f} to {max(hard):.3f} behind" in IN_RESULTS
    assert {f"{cell['loss']:.1f}" for (lam, _, _), cell in cells.items() if lam == 0} == {"2.5"} and "(λ = 0) the loss is 2.48." in IN_RESULTS
    by_alpha = {c["alpha"]: c["loss"] for c in table.values() if c["alpha"] not in (None, 1)}
    by_alpha |= {0: cells[None, 1e-3, 64]["loss"], 1: cells[1, 1e-3, 64]["loss"]}
    text = ", ".join(f"{by_alpha[alpha]:.3f} ({alpha:g})" for alpha in (0, 0.25, 0.5, 0.75, 1)) + f" and {by_alpha[1.25]:.3f} (1.25)"
    assert f"By α at 1e-3 and a batch of 64 the loss is {text}." in IN_RESULTS and len(by_alpha) == 6


def test_the_words_about_trained_weights_and_learned_alphas_are_the_committed_reports():
    report = report_of("pretrained")
    curves = {}
    for name, config in report["provenance"]["configs"].items():
        curves[config["diffusion_alpha"]] = {cell["seed"]: [loss for _, loss, *_ in cell["curve"]] for cell in report["arms"][name]["cells"]}
    start = {alpha: sum(curve[0] for curve in some.values()) / 5 for alpha, some in curves.items()}
    assert f"from {start[0]:.4f} to {start[0.1]:.4f} at α = 0.1 and {start[1]:.4f} at 1." in IN_RESULTS and len(curves) == 11
    ends = {alpha: {seed: curve[-1] for seed, curve in some.items()} for alpha, some in curves.items()}
    text = f"it is {sum(ends[0].values()) / 5:.4f} with α = 0, lower by "
    text += "{:.4f} ({:.4f} to {:.4f}) at 0.2, {:.4f} ({:.4f} to {:.4f}) at 0.3 and {:.4f} ({:.4f} to {:.4f}) at 0.4, "
    text += "undecided at 0.1 and 0.5, and higher from 0.6 on, by "
    gains = [x for alpha in (0.2, 0.3, 0.4) for x in paired(ends[alpha], ends[0])]
    text += "{:.4f} ({:.4f} to {:.4f}) there and by {:.4f} ({:.4f} to {:.4f}) at 1."
    assert text.format(*gains, *paired(ends[0], ends[0.6]), *paired(ends[0], ends[1])) in IN_RESULTS and len(ends[0]) == 5
    assert all(low < 0 < high for _, low, high in (paired(ends[0], ends[alpha]) for alpha in (0.1, 0.5)))
    p = [10 * stats.ttest_1samp([ends[alpha][s] - ends[0][s] for s in ends[0]], 0).pvalue for alpha in (0.3, 0.4, 0.2)]
    assert "the p values of 0.3 and 0.4 are {:.3f} and {:.3f}, that of 0.2 is {:.2f},".format(*p) in IN_RESULTS
    probes = [json.loads((ROOT / "results" / "heads_learned" / f"seed-{seed}.json").read_text())["probe"] for seed in (1, 2, 3)]
    logs = [(ROOT / "results" / "heads_learned" / f"seed-{seed}-metrics.jsonl").read_text().splitlines() for seed in (1, 2, 3)]
    runs = [[(row["val_loss"], row["step"]) for row in map(json.loads, log) if row.get("val_loss") is not None] for log in logs]
    again, steps = zip(*map(min, runs))
    learned = next(arm for name, arm in report_of("heads")["arms"].items() if "learned" in name)
    lower = [cell["best_val_loss"] - loss for cell, loss in zip(learned["cells"], again)]
    text = "Its best losses were {:.4f}, {:.4f} and {:.4f}, lower than in the table by {:.4f}, {:.4f} and {:.4f}:"
    assert text.format(*again, *lower) in IN_RESULTS and f"step {min(steps)} to {max(steps)}, α" in IN_RESULTS
    alphas = [[probe[f"layer {layer} head {head} alpha"] for probe in probes for head in range(6)] for layer in range(6)]
    means = [sum(some) / len(some) for some in alphas]
    text = "{:.2f} on average in the second of six layers and {:.2f} to {:.2f} in the later ones, none of them outside {} to {:.2f}."
    rest = [alpha for some in alphas[1:] for alpha in some]
    assert text.format(means[1], min(means[2:]), max(means[2:]), f"{min(rest):.2f}".replace("-", "−"), max(rest)) in IN_RESULTS
    assert f"the heads' α scatter from {min(alphas[0]):.2f} to {max(alphas[0]):.2f} (".replace("-", "−") in IN_RESULTS


def test_the_words_about_heads_and_alpha_are_the_committed_reports():
    report = report_of("lambda_map_quick")
    cells = {}
    for name, config in report["provenance"]["configs"].items():
        if config["diffusion"]:
            cells[config["diffusion_alpha"], config["diffusion_lambda"], config["learning_rate"]] = report["arms"][name]["best_val_loss"]["mean"]
        assert not report["arms"][name]["diverged"]
    line = ", ".join(f"{cells[alpha, 1.0, 1e-3]:.3f} ({alpha:g})" for alpha in (0.0, 0.25, 0.5, 0.75, 1.0))
    assert f"by α the loss is {line} and {cells[1.25, 1.0, 1e-3]:.3f} (1.25)" in IN_RESULTS
    assert f"A − I falls from {cells[1.0, 1.0, 5e-4]:.3f} to {cells[1.0, 1.0, 4e-3]:.3f}" in IN_RESULTS
    probes = [json.loads((ROOT / "results" / "heads_quick_learned" / f"seed-{seed}.json").read_text())["probe"] for seed in (1, 2, 3)]
    means = [sum(probe[f"layer {layer} head {head} alpha"] for probe in probes for head in range(4)) / 12 for layer in range(4)]
    assert "0.5 to {:.2f} in the first layer, {:.2f}, {:.2f} and {:.2f} in the last".format(*means) in IN_RESULTS
    report = report_of("pretrained_quick")
    arms = {config["diffusion_alpha"]: name for name, config in report["provenance"]["configs"].items()}
    start = {alpha: sum(cell["curve"][0][1] for cell in report["arms"][arms[alpha]]["cells"]) / 5 for alpha in (0, 0.1, 1)}
    assert f"from {start[0]:.3f} to {start[0.1]:.3f} at α = 0.1 and {start[1]:.3f} at 1" in IN_RESULTS
    entry = report["pairs"][arms[1]]["last"]
    assert "fine-tuning leave {:+.3f} ({:+.3f} to {:+.3f})".format(entry["mean"], *entry["interval"]) in IN_RESULTS


def test_the_words_about_tuned_rates_are_the_committed_reports():
    report, rates = report_of("alpha_quick_tuned"), report_of("alpha_quick_rates")
    chosen = {}
    for name, config in rates["provenance"]["configs"].items():
        arm = config["diffusion"] and config["diffusion_alpha"]
        chosen.setdefault(arm, []).append((rates["arms"][name]["best_val_loss"]["mean"], config["learning_rate"]))
    assert (
        [min(some)[1] for some in chosen.values()]
        == [config["learning_rate"] for config in report["provenance"]["configs"].values()]
        == [8e-3, 8e-3, 4e-3]
    )
    found = []
    for arm in report["arms"].values():
        assert arm["n"] == 8
        found.append(f"{words(arm['best_val_loss']['mean'])} ± {words(arm['best_val_loss']['sd'])}")
    differences = [[words(x, "+") for x in (pair["best"]["mean"], *pair["best"]["interval"])] for pair in report["pairs"].values()]
    part, whole = ("{} ({} to {})".format(*some) for some in differences)
    assert f"eight seeds: A {found[0]}, A − 0.25 I {found[1]}, by {part} undecided, A − I {found[2]}, by {whole} worse" in IN_RESULTS
    assert f"is at {dict(map(reversed, chosen[1.0]))[8e-3]:.3f} with 8e-3" in IN_RESULTS
    low, high = report["pairs"][list(report["arms"])[1]]["best"]["interval"]
    assert low < 0 < high and report["pairs"][list(report["arms"])[2]]["best"]["interval"][0] > 0


def test_the_support_tokens_it_names_are_the_committed_ones():
    support = json.loads((ROOT / "results" / "margins_quick" / "report.json").read_text())["margins"]["support tokens"]
    names = [token for token in support if re.search(r"\n\n[A-Z]?$", token["before"]) and token["token"].isupper()]
    assert f"of the twenty lowest in 256 windows {len(names)} are the first or second letter" in IN_BARRIER and len(support) == 20


def test_the_words_about_a_longer_small_model_are_the_committed_reports():
    found = []
    for rate in ("8e-3", "4e-3"):
        (pair,) = report_of(f"heads_quick_long_{rate}")["pairs"].values()
        assert pair["best"]["n"] == 4 and pair["best"]["interval"][0] > 0
        found += [words(x, "+") for x in (pair["best"]["mean"], *pair["best"]["interval"])]
    assert "half of the heads are behind A by {} ({} to {}) at 8e-3 and by {} ({} to {}) at 4e-3, on four seeds".format(*found) in IN_RESULTS
    pairs = json.loads((ROOT / "results" / "heads_quick_long_mixed" / "across.json").read_text())["pairs"].values()
    found = {(pair["arm"], pair["baseline"]): pair for pair in pairs}
    mixed = [found[f"quick_laplacian_diffusion_heads=0,2,2,2_learning_rate={rate}", f"quick_learning_rate={rate}"] for rate in ("8e-3", "4e-3")]
    flat = [words(x, "+") for pair in mixed for x in (pair["mean"], *pair["interval"])]
    assert "plain half of the heads are behind A by {} ({} to {}) and {} ({} to {}) on the same seeds, both undecided".format(*flat) in IN_RESULTS
    assert all(pair["interval"][0] < 0 < pair["interval"][1] and pair["n"] == 4 for pair in mixed)
