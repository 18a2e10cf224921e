"""The numbers about GPT-2 in README.md and docs/results.md are those of the committed reports."""

import json
import re
import sys

import pytest
from pages import IN_README, IN_RESULTS, IN_STUDIES, RESULTS, ROOT, paired, report_of, words
from scipy import stats


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
    sentence = "by {:.3f} at 2.4e-3 and {:.3f} at 1.2e-3, on every one of six seeds (sign-flip p = {:.3f} each);"
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
    shown = [entry for entry in committed if entry["arm"] == "A − I in half of the heads"]
    found = [entry for entry in shown if not entry["at_best"]]

    def spread(of):
        return words(of["mean"]) + ("" if of["sd"] is None else f" ± {of['sd']:.4f}")

    rows = []
    for entry in shown:
        seeds, interval = entry["seeds"], entry["interval"]
        named = f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 2 else ", ".join(map(str, seeds))
        difference = words(entry["mean"], "+") + (" ({} to {})".format(*(words(x, "+") for x in interval)) if interval else "")
        size = f"{entry['parameters'] / 1e6:,.0f} M"
        rows.append(f"| {size} | {entry['rate']} | {named} | {spread(entry['A'])} | {spread(entry['loss'])} | {difference} |")
    table = RESULTS[RESULTS.index("| parameters | rate | seeds |") :].partition("\n\n")[0].splitlines()[2:]
    assert table == rows and len(rows) == 10 and len(found) == 8
    pairs = [difference for entry in found for difference in entry["differences"]]
    assert (
        f"Half of the heads are ahead in all {len(pairs)} pairs. Six of these are of larger models; three, those of seed 101 at 124M," in IN_RESULTS
    )
    assert max(pairs) < 0 and len([0 for entry in found if entry["parameters"] < 2e8 and 101 in entry["seeds"]]) == 3
    larger = [-difference for entry in found for difference in entry["differences"] if entry["parameters"] > 2e8]
    assert len(larger) == 6 and f"half of the heads lead too, a pair by {min(larger):.2f} to {max(larger):.2f}, but" in IN_README
    (alone,) = (cell["val_loss"] for name, arm in report_of("gpt2_350m_102")["arms"].items() if "1.2e-3" in name for cell in arm["cells"])
    assert f"half of the heads at 350M and 1.2e-3 on seed 102, where A has {words(alone)}," in IN_RESULTS
    short = {entry["rate"]: -entry["mean"] for entry in found if entry["parameters"] < 2e8}
    long = {rate: -paired(across[f"learning_rate={rate}"], across[HALF + rate])[0] for rate in short}
    assert all(short[rate] > long[rate] for rate in short), "a lead is larger than at the end"
    assert f"at 124M it is {short['1.2e-3']:.4f} at 1.2e-3 here and {long['1.2e-3']:.4f} after 100 M tokens" in IN_RESULTS
    middle = {entry["rate"]: entry["differences"] for entry in found if 2e8 < entry["parameters"] < 5e8}
    of_a = {entry["rate"]: entry["A"]["mean"] for entry in found if 2e8 < entry["parameters"] < 5e8}
    assert set(middle) == {"3e-4", "6e-4", "1.2e-3"} and min(of_a, key=of_a.get) == "3e-4", "A's best rate is the smallest"


def test_where_in_the_network_is_the_committed_report():
    report = report_of("gpt2_where")
    losses = [{cell["seed"]: cell["val_loss"] for cell in arm["cells"]} for arm in report["arms"].values()]
    assert all(sorted(some) == [7, 8, 9, 10, 11, 12] for some in losses) and report["endpoint"] == "last"
    names = "none (A)", "six of twelve in every layer", "six of twelve in all layers but the first", "six of twelve in the first layer alone"
    for name, some in zip(names, losses, strict=True):
        values = list(some.values())
        cell = f"{sum(values) / 6:.4f} ± {stats.tstd(values):.4f}"
        difference = "" if some is losses[0] else " {} ({} to {})".format(*(words(x, "+") for x in paired(losses[0], some)))
        assert f"| {name} | {cell} |{difference} |\n" in RESULTS
        assert all(some[seed] <= losses[0][seed] for seed in some)
    assert "but the first against the first alone: {}, {} to {})".format(*(words(x, "+") for x in paired(losses[3], losses[2]))) in IN_RESULTS
    for one, other in ((1, 2), (1, 3), (2, 3)):
        _, low, high = paired(losses[one], losses[other])
        assert low < 0 < high


def test_which_layer_is_the_committed_report():
    """And that every pair that it names is in across.json, which test_studies.py compares with the report."""
    sys.path.append(str(ROOT / "studies"))
    from seeds_needed import power

    report, where = report_of("gpt2_which"), report_of("gpt2_where")
    losses = [{cell["seed"]: cell["val_loss"] for cell in arm["cells"]} for arm in report["arms"].values()]
    assert all(sorted(some) == [7, 8, 9, 10, 11, 12] for some in losses) and report["endpoint"] == "last"
    heads = [report["provenance"]["configs"][name]["diffusion_heads"] for name in report["arms"]][1:]
    assert [(max(some), some.index(max(some))) for some in heads] == [(6, 0), (6, 5), (6, 11), (2, 0), (6, 0)] and all(
        len(some) == 12 for some in heads
    )
    a, first, sixth, last, two, control = losses
    names = ["none (A)", "six of twelve in the first layer alone", "six of twelve in the sixth alone", "six of twelve in the last alone"]
    names += ["two of twelve in the first alone", "none, six of twelve in the first with 0.5 A (control)"]
    rows = []
    for name, some in zip(names, losses, strict=True):
        pairs = [paired(a, some) if some is not a else None, paired(some, first) if some in (sixth, last, control) else None]
        cells = ["{} ({} to {})".format(*(words(x, "+") for x in pair)) if pair else "" for pair in pairs]
        values = list(some.values())
        rows.append(re.sub(" +", " ", f"| {name} | {sum(values) / 6:.4f} ± {stats.tstd(values):.4f} | {' | '.join(cells)} |"))
    assert RESULTS[RESULTS.index("| heads with A − I | | against A | six in") :].partition("\n\n")[0].splitlines()[2:] == rows

    means = [words(paired(one, other)[0]) for one, other in ((a, first), (sixth, first), (last, first), (control, first))]
    sentence = "the first layer are ahead of A ({}), of the sixth ({}), of the last ({}) and of the control ({}), each interval without 0;"
    assert sentence.format(*means) in IN_STUDIES and all(paired(some, first)[2] < 0 for some in (a, sixth, last, control))
    means = [words(paired(a, some)[0]) for some in (last, two, sixth, control)]
    assert "the last ({}) and two heads of the first ({}) are ahead of A, the sixth ({}) and the control ({}) undecided.".format(*means) in IN_STUDIES

    others = a, sixth, last, control
    assert all(first[seed] < some[seed] for some in others for seed in some), "in six pairs of six each"

    def p_of(one, other):
        return stats.ttest_1samp([other[seed] - one[seed] for seed in one], 0).pvalue

    corrected = [8 * p_of(some, first) for some in others]
    sentence = "Multiplied by eight, the p values of their t tests are {:.3f}, {:.3f}, {:.3f} and {:.3f}; the sign-flip"
    assert sentence.format(*corrected) in IN_RESULTS and max(corrected) < 0.05
    flips = [pair["last"]["sign_flip_p"] for pair in report["pairs"].values()]
    assert "though not by the sign-flip test (p = {:.3f} and {:.3f}), nor after a correction;".format(*flips[2:4]) in IN_RESULTS
    assert all(paired(a, some)[2] < 0 and 8 * p_of(a, some) > 0.05 for some in (last, two))
    assert "two are behind six by {:.4f} ({:.4f} to {:.4f}), a comparison".format(*paired(first, two)) in IN_RESULTS
    for some, found in ((sixth, 0.044), (control, 0.024)):
        _, low, high = paired(a, some)
        sd = stats.tstd([some[seed] - a[seed] for seed in a])
        assert low < 0 < high and power(found, sd, 6) > 0.8 > power(found - 0.001, sd, 6)
    assert "six pairs find a difference of 0.044 and of 0.024 four times in five" in IN_RESULTS
    lead = -paired(a, first)[0]
    assert all(-paired(a, some)[0] < lead / 2 for some in (sixth, last)), "less than half of it on average"
    without = [{cell["seed"]: cell["val_loss"] for cell in arm["cells"]} for arm in where["arms"].values()]
    assert abs(paired(without[0], without[2])[0] + lead) < 0.0025, "all layers but the first had as much"
    assert f"of the first layer alone lead by {lead:.3f}, six of the sixth or the last by less, six of all but the first by as much." in IN_README


def test_what_a_repetition_of_gpt2_moves_is_the_committed_table():
    found = json.loads((ROOT / "results" / "gpt2_which" / "repeats.json").read_text())
    pooled, (a, first) = found["pooled"], found["differences"].values()
    means = [words(entry["mean"], "+") for entry in (a, first)]
    assert "A {}, the first layer's six heads {}, neither told from 0.".format(*means) in IN_STUDIES
    assert found["reports"] == ["gpt2_which", "gpt2_where"] and pooled["n"] == 12
    flat = [words(x, "+") for entry in (a, first, pooled) for x in (entry["mean"], *entry["interval"])]
    assert "by {} ({} to {}) for A and {} ({} to {}) for the six heads, over both by {} ({} to {}), as if".format(*flat) in IN_RESULTS
    sentence = "difference is {:.4f}, at most it is {:.4f}, and that of two seeds of one arm is {:.4f}"
    assert sentence.format(pooled["sd"], max(map(abs, pooled["differences"])), pooled["of_seeds"]) in IN_RESULTS
