"""The other numbers of docs/results.md, and of README.md, are those of the committed reports."""

import itertools
import json
import math
import re
import sys

from pages import IN_README, IN_RESULTS, IN_SPEED, IN_STUDIES, RESULTS, ROOT, paired, report_of, words
from scipy import stats


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


def test_the_words_about_longer_schedules_are_the_committed_reports():
    report, rates = report_of("shakespeare_char_lengths"), report_of("shakespeare_char_lengths_rates")
    tuning = {name: {cell["seed"]: cell["best_val_loss"] for cell in arm["cells"]} for name, arm in rates["arms"].items()}
    means, lengths, behind = {name: sum(some.values()) / 4 for name, some in tuning.items()}, (1500, 2000, 2500, 3000, 4000, 5000), {}
    assert len(tuning) == 24 and all(some.keys() == {101, 102, 103, 104} for some in tuning.values())
    for rate in ("5e-4", "1e-3"):
        for arm, label in (("", "A"), ("_laplacian", "A − I")):
            row = [words(means[f"shakespeare_char{arm}_learning_rate={rate}_max_iters={steps}"]) for steps in lengths]
            assert f"| {label} at {rate} | {' | '.join(row)} |\n" in RESULTS
        for steps in lengths:
            a, laplacian = (tuning[f"shakespeare_char{arm}_learning_rate={rate}_max_iters={steps}"] for arm in ("", "_laplacian"))
            behind.setdefault(steps, []).extend(laplacian[seed] > a[seed] for seed in a)
    first, last = ([flag for n in some for flag in behind[n]] for some in (lengths[:3], lengths[4:]))
    sentence = f"behind in {sum(first)} pairs of {len(first)} with 2500 steps or fewer; with 3000 in four of four at 5e-4 and none of four at 1e-3; "
    assert sentence in IN_RESULTS and behind[3000] == [True] * 4 + [False] * 4
    assert f"and with 4000 or more, where A over-fits, in {sum(last)} of {len(last)}." in IN_RESULTS
    best = [min((name for name in means if name.startswith(f"shakespeare_char{arm}_learning")), key=means.get) for arm in ("", "_laplacian")]
    assert best == list(report["arms"]) and [name.partition("learning_rate=")[2] for name in best] == ["1e-3_max_iters=2000", "5e-4_max_iters=4000"]
    assert words(means[best[1]]) == words(means["shakespeare_char_laplacian_learning_rate=1e-3_max_iters=3000"]), "as good in the tuning"
    (pair,) = report["pairs"].values()
    shown = [f"{words(arm['best_val_loss']['mean'])} ± {arm['best_val_loss']['sd']:.4f}" for arm in report["arms"].values()]
    difference = "{} ({} to {}), p = {:.2f}".format(
        *(words(x, "+") for x in (pair["best"]["mean"], *pair["best"]["interval"])), pair["best"]["sign_flip_p"]
    )
    sentence = "A, in 2000 steps at 1e-3, {}, A − I, in 4000 steps at 5e-4, {}, {}"
    assert sentence.format(*shown, difference) in IN_RESULTS and pair["best"]["n"] == 10
    low, high = pair["best"]["interval"]
    assert low < 0 < high and "it stays behind by up to {:.3f} is not excluded".format(high) in IN_RESULTS


def test_the_words_about_the_edges_are_the_committed_reports():
    """The choice by the rule of studies/README.md, from all three reports, and the pairs on new seeds."""
    sys.path.append(str(ROOT / "studies"))
    from seeds_needed import power

    reports = {name: report_of(f"shakespeare_char_{name}_rates") for name in ("in_time", "lengths", "edges")}  # of what two have the later counts
    tuned = {name: [cell["best_val_loss"] for cell in arm["cells"]] for report in reports.values() for name, arm in report["arms"].items()}
    assert all([cell["seed"] for cell in arm["cells"]] == [101, 102, 103, 104] for report in reports.values() for arm in report["arms"].values())
    assert not any("diverged_at" in cell for report in reports.values() for arm in report["arms"].values() for cell in arm["cells"])
    made = [(report["provenance"]["code_sha256"], report["provenance"]["device"]) for report in reports.values()]
    assert [len(set(some)) for some in zip(*made)] == [3, 2], "three versions of the code, two kinds of GPU"
    means, lengths, chosen, behind = {}, (1500, 2000, 2500, 3000, 4000, 5000), [], {}
    for arm, label in (("", "A"), ("_laplacian", "A − I")):
        schedules = list(itertools.product(("2.5e-4", "5e-4", "1e-3", "2e-3"), lengths))
        own = {(rate, n): tuned[f"shakespeare_char{arm}_learning_rate={rate}_max_iters={n}"] for rate, n in schedules}
        means[arm] = {at: sum(losses) / 4 for at, losses in own.items()}
        for rate in ("2.5e-4", "2e-3"):
            assert f"| {label} at {rate} | {' | '.join(words(means[arm][rate, n]) for n in lengths)} |\n" in RESULTS
        chosen.append(sorted(means[arm], key=means[arm].get)[:2])
        behind[arm] = own
    assert len(tuned) == 48 and chosen == [[("1e-3", 2000), ("2e-3", 2000)], [("5e-4", 4000), ("1e-3", 3000)]]
    best = [words(means[arm][at]) for arm, at in (("", chosen[0][0]), ("", chosen[0][1]), ("_laplacian", chosen[1][0]))]
    assert "A in 2000 steps at 1e-3 ({}; next 2000 at 2e-3, {}), A − I in 4000 at 5e-4 ({}; 3000 at 1e-3 are level".format(*best) in IN_RESULTS
    fall = means["_laplacian"]["2.5e-4", 4000] - means["_laplacian"]["2.5e-4", 5000]
    assert f"whose loss still falls by {fall:.4f} from 4000 to 5000" in IN_RESULTS
    flags = {at: [b > a for a, b in zip(losses, behind["_laplacian"][at])] for at, losses in behind[""].items()}
    small, large = (
        [flag for (rate, n), some in flags.items() if rate == of and n >= least for flag in some] for of, least in (("2.5e-4", 0), ("2e-3", 3000))
    )
    assert f"behind in {sum(small)} pairs of {len(small)} at 2.5e-4, and in {sum(large)} of {len(large)} at 2e-3" in IN_RESULTS

    report, older = report_of("shakespeare_char_edges"), report_of("shakespeare_char_lengths")
    assert [name.partition("learning_rate=")[2] for name in report["arms"]] == ["1e-3_max_iters=2000", "5e-4_max_iters=4000"]
    assert list(report["arms"]) == list(older["arms"]) and report["provenance"]["device"] != older["provenance"]["device"]
    assert all(sorted(cell["seed"] for cell in arm["cells"]) == list(range(11, 21)) for arm in report["arms"].values())
    (pair,) = (pairs["best"] for pairs in report["pairs"].values())
    shown = [f"{words(arm['best_val_loss']['mean'])} ± {arm['best_val_loss']['sd']:.4f}" for arm in report["arms"].values()]
    interval = "{} ({} to {})".format(*(words(x, "+") for x in (pair["mean"], *pair["interval"])))
    behind_on = sum(x > 0 for x in pair["differences"])
    assert "A {}, A − I {}, {}, behind on seven seeds of ten,".format(*shown, interval) in IN_RESULTS and (behind_on, pair["n"]) == (7, 10)
    p, (low, high) = f"sign-flip p = {pair['sign_flip_p']:.3f}", pair["interval"]
    assert p in IN_RESULTS and f"on new seeds; {p} |" in IN_README and pair["sign_flip_p"] > 0.05
    assert f"The interval begins at {low:.5f}:" in IN_RESULTS and f"the interval of the ten ends at {high:.4f}." in IN_RESULTS and low > 0
    assert power(0.006, pair["sd"], 10) > 0.8 > 0.6 > power(pair["mean"], pair["sd"], 10)

    both = json.loads((ROOT / "results" / "shakespeare_char_edges" / "across.json").read_text())
    (twenty,) = both["pairs"].values()
    values = [list(arm.values()) for arm in both["arms"].values()]
    shown = [f"{sum(some) / 20:.4f} ± {stats.tstd(some):.4f}" for some in values]
    interval = "{} ({} to {})".format(*(words(x, "+") for x in (twenty["mean"], *twenty["interval"])))
    sentence = "A {}, A − I {}, {}, p = {:.3f} ([pairs]".format(*shown, interval, twenty["sign_flip_p"])
    assert sentence in IN_RESULTS and twenty["seeds"] == list(range(1, 21))
    assert f"A − I is, only just, behind what A has in 2000, by {twenty['mean']:.4f} on twenty seeds." in IN_README
    assert f"`shakespeare_char_edges`: {words(pair['mean'], '+')} (" in IN_STUDIES and f"not judged, {interval}." in IN_STUDIES
    assert f"behind by {pair['mean']:.3f}, only just told apart, with a schedule of its own too." in IN_README


def test_the_words_about_repetitions_are_the_committed_table():
    moved = json.loads((ROOT / "results" / "shakespeare_char_lengths" / "repeats.json").read_text())["pooled"]
    mean = [words(x, "+" if x > 0 else "") for x in (moved["mean"], *moved["interval"])]
    assert f"{moved['n']} of these runs are made twice" in IN_RESULTS
    assert "of the second differs by {} ({} to {}, as if the runs were independent) on average".format(*mean) in IN_RESULTS
    assert "{} runs, made again with these kernels".format(moved["n"]) in IN_SPEED and "differ by {} ({} to {}".format(*mean) in IN_SPEED
    largest = max(map(abs, moved["differences"]))
    sentence = f"difference is {moved['sd']:.4f}, at most it is {largest:.4f}; that of two seeds of one arm is {moved['of_seeds']:.4f}"
    assert sentence in IN_RESULTS
    spreads = []
    for name in ("own_rate", "lengths"):
        report = report_of(f"shakespeare_char_{name}")
        (pair,) = report["pairs"].values()
        spreads += [pair["best"]["sd"], math.hypot(*(arm["best_val_loss"]["sd"] for arm in report["arms"].values()))]
    sentence = (
        "differences is {:.4f} where it would be {:.4f} without it, for two arms with one schedule (1e-3, 5000 steps), and {:.4f} instead of {:.4f}"
    )
    assert sentence.format(*spreads) in IN_RESULTS


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
    assert "with other code on each, by up to {:.4f}, {:.4f}, {:.4f} and {:.4f} at the four rates, the last as much as".format(*moved) in IN_RESULTS
    assert 0 < min(behind) - moved[3] < 0.001 and min(cells, key=lambda at: cells[at]["against_A"] if at[0] else 9)[1] == 4e-3
    pairs = [loss - bases[at][s] for at, c in cells.items() if at[0] for s, loss in c["losses"].items()]
    count = f"in {sum(pair > 0 for pair in pairs)} pairs of {len(pairs)}"
    assert f"in all {len(behind)} cells with λ > 0, {count}, by {min(behind):.3f} to {max(behind):.3f} a cell," in IN_RESULTS and min(behind) > 0
    assert f"In a map of runs there that end before they over-fit A − I is behind {count}, at every rate, batch size and λ > 0 tried." in IN_README
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
