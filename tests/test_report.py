"""What a comparison says: statistics against scipy and by hand, tables, figures."""

import itertools
import statistics
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import report
from report import analyse, paired_difference, summary, tables, verdict

# ---------------------------------------------------------------------------------------------------------------------------------
# Statistics

# baseline and arm; the differences are exact in binary unless the name says otherwise
PAIRS = {
    "two pairs": ([1.5, 1.25], [1.25, 1.125]),
    "two pairs that cancel": ([1.5, 1.25], [1.25, 1.5]),
    "one sign": ([1.5, 1.25, 1.75, 2.0, 1.0], [1.25, 1.125, 1.25, 1.9375, 0.5]),
    "mixed signs": ([1.5, 1.25, 1.75, 2.0, 1.0, 3.0], [1.25, 1.5, 1.25, 1.9375, 0.5, 3.5]),
    "equal sizes": ([1.0, 1.0, 1.0, 1.0], [1.25, 0.75, 1.25, 1.25]),
    "a zero among them": ([1.0, 1.0, 1.0, 1.0], [1.25, 1.0, 1.5, 0.875]),
    "rounded equal sizes": ([1.1, 2.2, 3.3, 10.7, 0.4], [1.2, 2.1, 3.4, 10.8, 0.5]),
    "sixteen": (list(np.arange(16) / 8), list(np.arange(16) / 8 + np.array([1, -3, 5, 2, 2, -1, 4, 3, 7, -2, 1, 0, 6, 2, -4, 3]) / 64)),
}


def sign_flip_p(baseline, arm) -> float:
    """The share of all 2^n choices of signs whose sum is as far from 0 as the observed one, in whole millionths."""
    millionths = [(Fraction(str(float(b))) - Fraction(str(float(a)))) * 10**6 for a, b in zip(baseline, arm)]
    assert all(difference.denominator == 1 for difference in millionths)
    sums = np.array(list(itertools.product((1, -1), repeat=len(millionths)))) @ np.array([int(difference) for difference in millionths])
    return float((abs(sums) >= abs(sum(millionths))).mean())


@pytest.mark.parametrize("name", PAIRS)
def test_interval_and_p_value_equal_scipys_paired_test_and_an_enumeration(name):
    baseline, arm = PAIRS[name]
    pair = paired_difference(baseline, arm)
    interval = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    assert pair["interval"] == pytest.approx([interval.low, interval.high], rel=1e-12)
    assert pair["sign_flip_exact"] is True and pair["sign_flip_p"] == pytest.approx(sign_flip_p(baseline, arm), rel=1e-12)
    assert pair["differences"] == [b - a for a, b in zip(baseline, arm)], "arm minus baseline, in order"
    assert (pair["n"], pair["mean"]) == (len(arm), pytest.approx(statistics.fmean(pair["differences"]), rel=1e-12))
    assert pair["sd"] == pytest.approx(statistics.stdev(pair["differences"]), rel=1e-12)


def test_numbers_worked_out_by_hand():
    pair = paired_difference([1.0, 1.0, 1.0], [1.125, 1.25, 1.375])
    half = 4.302652729911275 * 0.125 / 3**0.5  # t(0.975, 2), sd / sqrt(n)
    assert pair["interval"] == pytest.approx([0.25 - half, 0.25 + half], rel=1e-9)
    assert pair["sign_flip_p"] == 0.25, "2 of the 8 choices of signs: all as observed, or all turned"


@pytest.mark.parametrize("difference", [0.0, 0.25, -0.25])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_equal_differences_have_no_interval(n, difference):
    baseline = [float(i) for i in range(n)]
    pair = paired_difference(baseline, [value + difference for value in baseline])
    assert (pair["n"], pair["mean"], pair["interval"], pair["sign_flip_p"]) == (n, difference, None, None)
    assert pair["sd"] == (None if n == 1 else 0.0)


def test_no_pairs_at_all():
    assert paired_difference([], []) == {"n": 0, "mean": None, "sd": None, "interval": None, "sign_flip_p": None, "differences": []}


def test_beyond_sixteen_pairs_signs_are_drawn_and_the_same_each_time():
    baseline, arm = PAIRS["sixteen"]
    baseline, arm = [*baseline, 1.0], [*arm, 1.0 - 5 / 64]
    pair, exact = paired_difference(baseline, arm), sign_flip_p(baseline, arm)
    assert pair["sign_flip_exact"] is False
    assert abs(pair["sign_flip_p"] - exact) < 5 * (exact * (1 - exact) / 1e5) ** 0.5 + 2e-5, "five standard errors of 100,000 draws"
    assert pair == paired_difference(baseline, arm)


@pytest.mark.parametrize("values", [[], [2.5], [1.0, 4.0], [3.0, 3.0, 3.0], [1.25, 2.5, 7.0, -1.0]])
def test_summary(values):
    got = summary(values)
    assert got["n"] == len(values)
    assert got["mean"] == (pytest.approx(statistics.fmean(values)) if values else None)
    assert got["sd"] == (pytest.approx(statistics.stdev(values)) if len(values) > 1 else None)


BY = "by 0.2708 nats (95 % interval of the difference"
SHARE = "than base in last top-1 accuracy by 0.2708 (95 % interval of the difference"
FOUR = "by 0.2656 nats (95 % interval of the difference"
FEW = "So few pairs are a hint, not an answer: take more seeds."
VERDICTS = {
    "four pairs": (
        "best",
        [-0.25, -0.25, -0.25, -0.3125],
        f"arm is better than base in best validation loss {FOUR} -0.3154 to -0.2159, 4 paired seeds).",
    ),
    "lower loss": (
        "best",
        [-0.25, -0.25, -0.3125],
        f"arm is better than base in best validation loss {BY} -0.3605 to -0.1812, 3 paired seeds). {FEW}",
    ),
    "higher loss": (
        "last",
        [0.25, 0.25, 0.3125],
        f"arm is worse than base in last validation loss {BY} +0.1812 to +0.3605, 3 paired seeds). {FEW}",
    ),
    "lower accuracy": (
        "top1",
        [-0.25, -0.25, -0.3125],
        f"arm is worse {SHARE} -0.3605 to -0.1812, 3 paired seeds). {FEW}",
    ),
    "higher accuracy": (
        "top1",
        [0.25, 0.25, 0.3125],
        f"arm is better {SHARE} +0.1812 to +0.3605, 3 paired seeds). {FEW}",
    ),
    "not shown": (
        "best",
        [-0.125, -0.25, -0.375],
        "No difference shown between arm and base in best validation loss: the mean difference is -0.2500 nats, and its 95 % interval "
        "-0.5605 to +0.0605 contains 0 (3 paired seeds).",
    ),
    "one pair": ("best", [0.5], "arm against base: 1 pair(s) of seeds give no interval, so nothing can be said about the best validation loss."),
    "no pair": ("last", [], "arm against base: 0 pair(s) of seeds give no interval, so nothing can be said about the last validation loss."),
    "the same": ("best", [0.0, 0.0], "arm against base: the best validation loss differs by exactly 0 in each of the 2 pairs."),
    "constant": ("best", [0.25, 0.25], "arm against base: the best validation loss differs by exactly 0.25 in each of the 2 pairs."),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name):
    endpoint, differences, sentence = VERDICTS[name]
    pair = paired_difference([1.0] * len(differences), [1.0 + difference for difference in differences])
    assert verdict("arm", "base", endpoint, pair) == sentence


def test_verdict_agrees_with_the_paired_t_test():
    """p < 0.05 exactly when the verdict is better or worse: for 200 random sets of pairs, about half of them with an effect."""
    draw, counted = np.random.default_rng(3), {"better": 0, "worse": 0, "No difference": 0}
    for i in range(200):
        baseline = draw.normal(size=6)
        arm = baseline + 0.1 * draw.normal(size=6) + (i % 3 - 1) * 0.12
        test = stats.ttest_rel(arm, baseline)
        expected = "No difference" if test.pvalue >= 0.05 else "better" if test.statistic < 0 else "worse"
        sentence = verdict("arm", "base", "last", paired_difference(baseline.tolist(), arm.tolist()))
        assert expected in sentence.partition(" in ")[0] and "last validation loss" in sentence
        counted[expected] += 1
    assert min(counted.values()) > 20, "all three occurred"


# ---------------------------------------------------------------------------------------------------------------------------------
# Tables


def cell(seed: int, loss: float | None) -> dict:
    """A cell's result; None: it diverged at step 40 + seed."""
    common = {"arm": "", "seed": seed, "mode": "eager"}
    if loss is None:
        return common | {"diverged_at": 40 + seed}
    numbers = {"best_val_loss": loss, "val_loss": 2 * loss, "best_step": 8, "step": 12, "seconds": 1.0, "ms": 2.0, "tokens_per_s": 3e4}
    return common | numbers | {"curve": [[0, 5.0], [12, loss]]}


def test_a_diverged_run_is_counted_and_its_pair_left_out():
    results = {
        "base": [cell(1, 2.0), cell(2, None), cell(3, 3.0), cell(4, 4.0)],
        "arm": [cell(1, 1.5), cell(2, 2.5), cell(3, 2.25), cell(4, None)],
    }
    arms, pairs = analyse("best", results)
    assert arms["base"]["best_val_loss"] == summary([2.0, 3.0, 4.0]) and arms["base"]["val_loss"] == summary([4.0, 6.0, 8.0])
    assert arms["base"]["diverged"] == [{"seed": 2, "step": 42}] and arms["arm"]["diverged"] == [{"seed": 4, "step": 44}]
    assert arms["arm"]["n"] == 3 and arms["arm"]["best_val_loss"]["mean"] == pytest.approx(6.25 / 3)
    pair = pairs["arm"]
    assert pair["seeds"] == [1, 3] and pair["pairs_lost_to_divergence"] == 2 and pair["best"]["differences"] == [-0.5, -0.75]
    assert pair["last"]["differences"] == [-1.0, -1.5]
    assert pair["verdict"].endswith("(2 paired seeds). Runs that diverged and are left out of it: base: 1 of 4, arm: 1 of 4.")
    at_the_end = analyse("last", results)[1]["arm"]
    assert at_the_end["verdict"].startswith(verdict("arm", "base", "last", pair["last"])) and "mean difference is -1.2500" in at_the_end["verdict"]
    text = tables(arms, pairs)
    assert "| base  | 3 (+ 1 diverged) | 3.0000 ± 1.0000" in text


@pytest.mark.parametrize("arms, words", [("ab", "a against b"), ("abcd", "a against b against c against d"), ("abcde", "a against 4 other arms")])
def test_a_title_names_a_few_arms_and_counts_many(arms, words):
    assert report.title(list(arms)) == words


def test_pictures_of_which_nothing_is_left_are_reported():
    arms, pairs = analyse("top1", {name: [cell(1, None), cell(2, None)] for name in ("base", "arm")})
    assert "0 pair(s)" in pairs["arm"]["verdict"] and "(+ 2 diverged)" in tables(arms, pairs)


def test_an_arm_that_diverges_on_every_seed_leaves_a_report_of_the_evaluation(tmp_path):
    """Also when it is the only arm besides the baseline."""
    evaluation = {"clean": {"loss": 2.0}, "perturb": {name: {"delta": 0.5, "loss": 2.5} for name in report.FRONTIER}}
    whole = [{"seed": seed, "evaluation": evaluation | {"clean": {"loss": 2.0 + seed / 10}}} for seed in (1, 2)]
    assert report.robustness([])["gains"] == {}
    pairs = {"lost": report.robustness([]), "whole": report.robustness(list(zip(whole, whole)))}
    text = report.robustness_tables({}, pairs)
    assert "| gain: noise 1 RMS" in text and "| - " in text
    assert report.draw_frontier(tmp_path / "frontier.png", pairs) and (tmp_path / "frontier.png").is_file()
    assert not report.draw_frontier(tmp_path / "none.png", {"lost": report.robustness([])})
    assert not (tmp_path / "none.png").exists() and report.robustness_tables({}, {"lost": report.robustness([])})


def test_one_arm_says_what_perturbations_cost_it_and_what_diverged():
    runs = [cell(1, 2.0), cell(2, 2.5), cell(3, None)]
    for run, loss in zip(runs, (2.0, 2.5)):
        run["evaluation"] = {"clean": {"loss": loss}, "perturb": {"noise": {"delta": loss / 4}, "vocabulary": True}}
    arms, pairs = analyse("best", {"a": runs}, perturbed=True)
    text = tables(arms, pairs)
    rows = {row[0]: row[1] for row in ([part.strip() for part in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line)}
    assert (rows["clean loss"], rows["delta: noise"]) == ("2.2500 ± 0.3536", "0.5625 ± 0.0884") and "vocabulary" not in text
    assert text.endswith("nothing that it is compared with. Runs that diverged: seed 3 at step 43.") and "difference" not in text


def test_curves_of_runs_that_all_diverged_are_not_drawn(tmp_path):
    assert not report.draw_curves(tmp_path / "curves.png", {"a": [cell(1, None)], "b": [cell(1, None)]})
    assert not (tmp_path / "curves.png").exists()
    assert report.draw_curves(tmp_path / "curves.png", {"a": [cell(1, None)], "b": [cell(1, 2.0)]}) and (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("steps, top", [((0, 12), 9.0), ((0, 4, 8, 12), 4.0)])
def test_curves_show_the_start_where_little_else_is_there(tmp_path, monkeypatch, steps, top):
    seen = []
    monkeypatch.setattr(report, "save_figure", lambda path, figure: seen.append(figure.axes[0].get_ylim()))
    report.draw_curves(tmp_path / "curves.png", {"a": [cell(1, 2.0) | {"curve": [[s, 9.0 if s == 0 else 4.0 - s / 12] for s in steps]}]})
    assert top - 0.5 < seen[0][1] < top + 1


def test_a_perturbation_that_hardly_hurts_the_baseline_has_no_gain():
    def cells(deltas):
        return [{"evaluation": {"clean": {"loss": 2.0 + i / 10}, "perturb": {"noise": {"delta": d}}}} for i, d in enumerate(deltas)]

    found = report.robustness(list(zip(cells([0.5, 0.6, 0.55]), cells([0.25, 0.3, 0.275]))))["gains"]["noise"]
    assert found["mean"] == pytest.approx(0.5) and found["n"] == 3
    for deltas in ([0.5, 0.6, -0.01], [0.9, 0.01, 0.02]):  # not on every seed; hardly on two
        assert report.robustness(list(zip(cells(deltas), cells([0.1, 0.1, 0.1]))))["gains"]["noise"]["n"] == 0


def test_the_report_has_quantiles_of_margins_without_their_histograms():
    layer = {"mean": 0.5, "quantiles": {"0": 0.1}, "counts": [1, 2], "edges": [0.0, 1.0, 2.0]}
    margins = {"margins, layer 0": layer, "negative determinants, layer 0": 0.0, "support tokens": [{"token": "a"}], "passage": {"tokens": ["a"]}}
    cell = {"seed": 1, "evaluation": {"clean": {"loss": 2.0}, "margins": margins}}
    short = {"margins, layer 0": {"mean": 0.5, "quantiles": {"0": 0.1}}, "negative determinants, layer 0": 0.0}
    assert report.brief(cell) == {"seed": 1, "evaluation": {"clean": {"loss": 2.0}, "margins": short}} and "counts" in layer
    for other in ({"diverged_at": 3}, {"evaluation": {"clean": {"loss": 2.0}}}):
        assert report.brief(other) is other


# ---------------------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("count", [1, 13])
def test_nothing_of_a_figure_runs_off_its_edge(tmp_path, count):
    names = [f"shakespeare_char_laplacian_diffusion_learned=True_diffusion_alpha=0.{i}_learning_rate=4e-3" for i in range(count + 1)]
    report.draw_curves(tmp_path / "curves.png", {name: [{"curve": [[0, 4.0], [10, 2.0 + i]]}] for i, name in enumerate(names)})
    pair = {"baseline": names[0], "best": paired_difference([1.0, 2.0, 3.0], [1.1, 2.3, 3.2])}
    report.draw_paired(tmp_path / "paired.png", "best", dict.fromkeys(names[1:], pair))
    for name in ("curves.png", "paired.png"):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(*pixels[[0, -1]].flat, *pixels[:, [0, -1]].flat) > 250, f"the border of {name} is white"
    assert report.label(names[1]).splitlines() == [
        "shakespeare_char_laplacian",
        "diffusion_learned=True",
        "diffusion_alpha=0.1",
        "learning_rate=4e-3",
    ]
