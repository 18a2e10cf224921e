"""What a comparison says: means, paired differences with intervals, verdicts, tables and figures; for compare.py and for studies/."""

import itertools
import math
import re
import textwrap
from pathlib import Path

import numpy as np
from scipy import stats
from tabulate import tabulate

from configurator import TrainConfig, field_names
from figures import plt, save_figure

# --endpoint: what it is called, its key in a cell's result, its unit, and +1 where more is better
ENDPOINTS = {
    "best": ("best validation loss", "best_val_loss", " nats", -1),
    "last": ("last validation loss", "val_loss", " nats", -1),
    "top1": ("last top-1 accuracy", "top1", "", 1),
    "top5": ("last top-5 accuracy", "top5", "", 1),
}
FRONTIER = ("noise 1 RMS", "attack 0.1, 10 steps")  # the perturbations of frontier.png


# ---------------------------------------------------------------------------------------------------------------------------------
# Statistics


def summary(values: list[float]) -> dict:
    """n, mean and standard deviation (n - 1 in the denominator; None for n < 2)."""
    return {"n": len(values), "mean": float(np.mean(values)) if values else None, "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def spread(entry: dict, digits: int = 4) -> str:
    """A summary in words: mean ± standard deviation, as far as there are such."""
    if entry["mean"] is None:
        return "-"
    return f"{entry['mean']:.{digits}f}" + (f" ± {entry['sd']:.{digits}f}" if entry["sd"] is not None else "")


def estimate(entry: dict, form: str = "+.4f", scale: float = 1, unit: str = "") -> str:
    """A mean in words and its interval in brackets, as far as there are such."""
    if entry["mean"] is None:
        return "-"
    mean, *ends = (f"{scale * value:{form}}" for value in (entry["mean"], *(entry["interval"] or ())))
    return mean + unit + (f" ({ends[0]} to {ends[1]})" if ends else "")


def paired_difference(baseline: list[float], arm: list[float]) -> dict:
    """arm - baseline over paired seeds: mean, sd, 95 % t interval and the two-sided sign-flip p value, by scipy.stats.

    The sign-flip test enumerates all 2^n signs up to n = 16 (p is exact) and draws 100,000 beyond. interval and p are None for n < 2, or when all
    differences are equal, where t has no meaning.
    """
    difference = np.asarray(arm, dtype=float) - np.asarray(baseline, dtype=float)
    n = len(difference)
    result = summary(difference.tolist()) | {"interval": None, "sign_flip_p": None, "differences": difference.tolist()}
    if n >= 2 and np.ptp(difference) > 0:
        interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
        result["interval"] = [float(interval.low), float(interval.high)]
        exact = n <= 16
        flips = np.inf if exact else 100_000
        test = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=flips, vectorized=True, rng=0)
        result |= {"sign_flip_p": float(test.pvalue), "sign_flip_exact": exact}
    return result


def verdict(arm: str, baseline: str, endpoint: str, pair: dict) -> str:
    """One sentence about the paired difference of the endpoint, which says so when no difference is shown."""
    n, (what, _, unit, sign) = pair["n"], ENDPOINTS[endpoint]
    if n < 2:
        return f"{arm} against {baseline}: {n} pair(s) of seeds give no interval, so nothing can be said about the {what}."
    if pair["interval"] is None:
        return f"{arm} against {baseline}: the {what} differs by exactly {pair['mean']:g} in each of the {n} pairs."
    low, high = pair["interval"]
    numbers = f"by {abs(pair['mean']):.4f}{unit} (95 % interval of the difference {low:+.4f} to {high:+.4f}, {n} paired seeds)"
    if low > 0 or high < 0:
        few = "" if n > 3 else " So few pairs are a hint, not an answer: take more seeds."
        return f"{arm} is {'better' if sign * pair['mean'] > 0 else 'worse'} than {baseline} in {what} {numbers}.{few}"
    return (
        f"No difference shown between {arm} and {baseline} in {what}: the mean difference is {pair['mean']:+.4f}{unit}, and its 95 % interval "
        f"{low:+.4f} to {high:+.4f} contains 0 ({n} paired seeds)."
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# Tables


def analyse(endpoint: str, results: dict[str, list[dict]], perturbed: bool = False) -> tuple[dict, dict]:
    """Results per arm -> (`arms`: a summary each, `pairs`: each arm against the first); with `perturbed` cells' evaluations too."""
    arms, pairs, names = {}, {}, list(results)
    first = next((cell for cells in results.values() for cell in cells if "diverged_at" not in cell), {})
    measured = [name for name, (_, key, _, _) in ENDPOINTS.items() if key in first] or list({"best": 0, "last": 0, endpoint: 0})
    for name, cells in results.items():
        good = [cell for cell in cells if "diverged_at" not in cell]
        arms[name] = {
            "n": len(good),
            "diverged": [{"seed": cell["seed"], "step": cell["diverged_at"]} for cell in cells if "diverged_at" in cell],
            **{key: summary([cell[key] for cell in good]) for key in (ENDPOINTS[one][1] for one in measured)},
            "best_step": summary([cell["best_step"] for cell in good]),
            "seconds": summary([cell["seconds"] for cell in good if cell.get("resumed_at") is None]),  # those that one call ran whole
            "ms": summary([cell["ms"] for cell in good if cell["ms"] is not None]),  # None: resumed after its last step
            "tokens_per_s": summary([cell["tokens_per_s"] for cell in good if cell["tokens_per_s"] is not None]),
            "mode": cells[0]["mode"],
            "cells": [brief(cell) for cell in cells],
        }
    for name in names[1:]:
        both = [(a, b) for a, b in zip(results[names[0]], results[name]) if "diverged_at" not in a | b]
        pair = {"baseline": names[0], "seeds": [a["seed"] for a, _ in both], "pairs_lost_to_divergence": len(results[name]) - len(both)}
        for one in measured:
            key = ENDPOINTS[one][1]
            pair[one] = paired_difference([a[key] for a, _ in both], [b[key] for _, b in both])
        pair["verdict"] = verdict(name, names[0], endpoint, pair[endpoint])
        if pair["pairs_lost_to_divergence"]:
            counts = ", ".join(f"{arm}: {len(arms[arm]['diverged'])} of {len(results[arm])}" for arm in (names[0], name))
            pair["verdict"] += f" Runs that diverged and are left out of it: {counts}."
        if perturbed:
            pair |= robustness(both)
        pairs[name] = pair
    return arms, pairs


def brief(cell: dict) -> dict:
    """A cell as the report has it: of the margins means and quantiles alone. Histograms and support tokens are long and stay in the cell's file."""
    evaluation = cell.get("evaluation", {})
    if "margins" not in evaluation:
        return cell
    short = {}
    for name, value in evaluation["margins"].items():
        if name not in ("support tokens", "passage"):
            short[name] = {key: value[key] for key in ("mean", "quantiles")} if isinstance(value, dict) else value
    return cell | {"evaluation": evaluation | {"margins": short}}


def robustness(both: list[tuple[dict, dict]]) -> dict:
    """Paired cells (baseline, arm) -> clean_percent, the relative change of the clean loss, and gains, 1 - delta(arm) / delta(baseline).

    Both are computed seed by seed and then treated like any paired difference. `mean_deltas` are those of the baseline and the arm, and `of_means`
    is the gain from them. A perturbation has no gain (n = 0) unless it hurts the baseline on every seed, by a tenth of its mean at
    least: a ratio to something near 0 says nothing.
    """
    sections = [[cell["evaluation"] for cell in cells] for cells in zip(*both)]
    losses = [np.array([section["clean"]["loss"] for section in some]) for some in sections]
    change = (100 * (losses[1] / losses[0] - 1)).tolist() if both else []
    result = {"clean_percent": paired_difference([0.0] * len(change), change), "gains": {}}
    first = sections[0][0].get("perturb", {}) if both else {}
    for name in (name for name, value in first.items() if isinstance(value, dict)):
        base, arm = (np.array([section["perturb"][name]["delta"] for section in some]) for some in sections)
        gains = (1 - arm / base).tolist() if base.min() > 0.1 * base.mean() > 0 else []
        entry = paired_difference([0.0] * len(gains), gains) | {"mean_deltas": [float(base.mean()), float(arm.mean())]}
        result["gains"][name] = entry | {"of_means": float(1 - arm.mean() / base.mean()) if base.mean() > 0 else None}
    return result


def title(arms: list[str]) -> str:
    """The arms by name, of many the first."""
    return " against ".join(arms) if len(arms) <= 4 else f"{arms[0]} against {len(arms) - 1} other arms"


def tables(arms: dict, pairs: dict) -> str:
    """The two tables and the verdicts as Markdown."""
    rows = []
    for name, arm in arms.items():
        cells = [name, f"{arm['n']}" + (f" (+ {len(arm['diverged'])} diverged)" if arm["diverged"] else "")]
        cells += [spread(arm[key]) for _, key, _, _ in ENDPOINTS.values() if key in arm] + [spread(arm["best_step"], 0)]
        seconds = spread(arm["seconds"], 1) + (f" (n = {arm['seconds']['n']})" if 0 < arm["seconds"]["n"] < arm["n"] else "")
        rows.append(cells + [seconds, f"{arm['tokens_per_s']['mean']:,.0f}" if arm["tokens_per_s"]["n"] else "-"])
    measured = [what for what, key, _, _ in ENDPOINTS.values() if key in next(iter(arms.values()))]
    headers = ["arm", "n", *measured, "step of best", "seconds a run", "tokens/s"]
    text = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    rows = []
    for name, pair in pairs.items():
        for endpoint, (what, _, _, _) in ENDPOINTS.items():
            if endpoint not in pair:
                continue
            entry = pair[endpoint]
            interval = "{:+.4f} to {:+.4f}".format(*entry["interval"]) if entry["interval"] else "-"
            p = f"{entry['sign_flip_p']:.4f}" if entry["sign_flip_p"] is not None else "-"
            mean = f"{entry['mean']:+.4f}" if entry["mean"] is not None else "-"
            rows.append([f"{name} − {pair['baseline']}", what, entry["n"], mean, interval, p])
    headers = ["difference", "in", "pairs", "mean", "95 % t interval", "sign-flip p"]
    text += "\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else ""
    text += robustness_tables(arms, pairs)
    text += "\n\nMean ± standard deviation over seeds; losses in nats per prediction, accuracies as shares.\n\n"
    text += "\n".join(f"**{pair['verdict']}**" for pair in pairs.values()) or "One arm: there is nothing that it is compared with."
    if not pairs and (lost := [f"seed {run['seed']} at step {run['step']}" for arm in arms.values() for run in arm["diverged"]]):
        text += f" Runs that diverged: {', '.join(lost)}."
    if len(pairs) > 1:
        text += f"\n\nThe {len(pairs)} intervals are each at 95 %: they are not corrected for their number."
    return text


def robustness_tables(arms: dict, pairs: dict) -> str:
    """Clean change, gains and margins as Markdown, of one arm what the perturbations cost it; nothing for a comparison without --evaluate."""
    pairs = {name: pair for name, pair in pairs.items() if "gains" in pair}
    evaluations = {name: [cell["evaluation"] for cell in arm["cells"] if "evaluation" in cell] for name, arm in arms.items()}
    text = gains_table(pairs) if pairs else costs_table(evaluations) if len(arms) == 1 else ""
    rows = []
    for name, some in evaluations.items():
        found = [evaluation["margins"]["margins, sum over layers and heads"] for evaluation in some if "margins" in evaluation]
        if found:
            rows.append([name, *(f"{np.mean([one['quantiles'][q] for one in found]):+.3f}" for q in ("0", "0.05", "0.5", "0.95"))])
    if rows:
        text += "\n\n" + tabulate(rows, ["margins, sum over heads", "min", "5 %", "50 %", "95 %"], tablefmt="github", disable_numparse=True)
    return text


def gains_table(pairs: dict) -> str:
    """Change of the clean loss and robustness gains of each arm against the baseline."""
    rows = [["clean loss", "-", *(estimate(pair["clean_percent"], "+.2f", 1, " %") for pair in pairs.values())]]
    for name in next((pair["gains"] for pair in pairs.values() if pair["gains"]), {}):  # an arm that diverged on every seed has none
        entries = [pair["gains"].get(name) for pair in pairs.values()]
        delta = next(entry["mean_deltas"][0] for entry in entries if entry)
        rows.append([f"gain: {name}", f"{delta:+.4f}", *(estimate(entry, "+.1f", 100, " %") if entry else "-" for entry in entries)])
    text = "\n\n" + tabulate(rows, ["", "baseline's delta", *pairs], tablefmt="github", disable_numparse=True)
    text += (
        "\n\nRobustness gain = 1 − delta(arm) / delta(baseline), delta = perturbed − clean loss of the best weights; above 0 the arm is more robust."
    )
    return text + " Computed for each seed; in brackets the 95 % t interval of these gains."


def costs_table(evaluations: dict[str, list[dict]]) -> str:
    """Clean loss and what each perturbation adds to it, mean and standard deviation over the seeds of the one arm."""
    (name, some), *_ = evaluations.items()
    if not some:
        return ""
    found = {"clean loss": summary([one["clean"]["loss"] for one in some])}
    for what, value in some[0].get("perturb", {}).items():
        if isinstance(value, dict):
            found[f"delta: {what}"] = summary([one["perturb"][what]["delta"] for one in some])
    rows = [[what, spread(of)] for what, of in found.items()]
    return "\n\n" + tabulate(rows, ["best weights", name], tablefmt="github", disable_numparse=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# Figures


def label(name: str) -> str:
    """An arm's name as figures show it: each option on a line of its own."""
    return re.sub(rf"_(?=(?:{'|'.join(field_names(TrainConfig))})=)", "\n", name)


def draw_curves(path: Path, results: dict[str, list[dict]]) -> bool:
    """curves.png: validation loss over steps, mean over seeds and a band of one standard deviation. Returns whether there was a run to draw."""
    if all("diverged_at" in cell for cells in results.values() for cell in cells):
        return False
    longest = max(map(len, results))
    columns = 2 if longest < 30 else 1
    size = max(7, 1.7 + 0.085 * longest), 4.2 + 0.22 * math.ceil(len(results) / columns)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    shown = []
    for i, (name, cells) in enumerate(results.items()):
        curves = [cell["curve"] for cell in cells if "diverged_at" not in cell]
        if not curves:
            continue
        steps = np.array([point[0] for point in curves[0]])
        losses = np.array([[point[1] for point in curve] for curve in curves])
        mean = losses.mean(axis=0)
        (line,) = axes.plot(steps, mean, label=f"{name} (n = {len(curves)})", linewidth=1.8, linestyle=("-", "--", ":", "-.")[i // 10 % 4])
        if len(curves) > 1:
            sd = losses.std(axis=0, ddof=1)
            axes.fill_between(steps, mean - sd, mean + sd, color=line.get_color(), alpha=0.25, linewidth=0)
        late = mean[steps >= 0.15 * steps[-1]]  # the fall from log(vocabulary) would flatten everything that matters
        shown += [losses.min(), *(late if len(late) > 2 else mean)]
    margin = 0.08 * (max(shown) - min(shown)) + 1e-3
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xlabel="step", ylabel="validation loss (nats per prediction)", title="mean ± 1 sd over seeds")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=columns)
    save_figure(path, figure)
    return True


def draw_paired(path: Path, endpoint: str, pairs: dict):
    """paired.png: arm - baseline for every seed, with mean and 95 % t interval; a row for each arm."""
    names = [label(name) for name in pairs]
    lines = [max(3, 2 + name.count("\n")) for name in names]
    place = np.cumsum([0, *((one + other) / 2 for one, other in itertools.pairwise(lines))])
    width = 5 + 0.085 * max(len(line) for name in names for line in name.split("\n"))
    figure, axes = plt.subplots(figsize=(width, max(3, 1.5 + 0.19 * sum(lines))), layout="constrained")
    for y, pair in zip(place, pairs.values()):
        entry = pair[endpoint]
        points = entry["differences"]
        rows = y + (np.linspace(-0.7, 0.3, len(points)) if len(points) > 1 else np.zeros(len(points)))
        axes.scatter(points, rows, s=28, alpha=0.75, zorder=3, label=None if y else "one seed")
        if entry["interval"]:
            low, high = entry["interval"]
            error = [[entry["mean"] - low], [high - entry["mean"]]]
            axes.errorbar(
                [entry["mean"]], [y + 0.8], xerr=error, fmt="D", color="black", capsize=5, zorder=4, label=None if y else "mean, 95 % interval"
            )
    axes.axvline(0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(place, names)
    axes.set_ylim(place[-1] + lines[-1] / 2, -lines[0] / 2)
    what, _, _, sign = ENDPOINTS[endpoint]
    better = f"{what}, arm − baseline ({'right' if sign > 0 else 'left'} of 0: the arm is better)"
    baseline = f"baseline: {label(next(iter(pairs.values()))['baseline'])}".replace("\n", " ")
    figure.supxlabel("\n".join(textwrap.fill(line, int(11 * width)) for line in (better, baseline)), fontsize="medium")
    axes.locator_params(axis="x", nbins=7)
    axes.grid(alpha=0.3, axis="x")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=2)
    save_figure(path, figure)


def draw_frontier(path: Path, pairs: dict) -> bool:
    """frontier.png: robustness gain against the change of the clean loss, one point per arm with both intervals, from the report's pairs.

    Returns whether there was anything to draw.
    """
    pairs = {arm: pair for arm, pair in pairs.items() if pair["gains"]}  # an arm that diverged on every seed has none
    names = [name for name in FRONTIER if all(name in pair["gains"] for pair in pairs.values())] if pairs else []
    if not names:
        return False
    colours = plt.get_cmap("tab10" if len(pairs) <= 10 else "tab20").colors
    height = 4.5 + 0.1 * min(len(pairs), 40)  # the legend, two arms a line
    figure, places = plt.subplots(1, len(names), figsize=(5.5 * len(names), height), layout="constrained", squeeze=False)
    for place, name in zip(places[0], names):
        for number, (arm, pair) in enumerate(pairs.items()):
            x, y = pair["clean_percent"], pair["gains"][name]
            if x["mean"] is None or y["mean"] is None:
                continue
            spread = [  # of two pairs an interval says nothing and would fill the figure
                [[scale * (e["mean"] - e["interval"][0])], [scale * (e["interval"][1] - e["mean"])]] if e["interval"] and e["n"] > 2 else None
                for e, scale in ((x, 1), (y, 100))
            ]
            form = {"fmt": "os^"[number // len(colours) % 3], "color": colours[number % len(colours)], "capsize": 3, "label": arm}
            place.errorbar([x["mean"]], [100 * y["mean"]], xerr=spread[0], yerr=spread[1], **form)
        place.axhline(0, color="black", linewidth=1, linestyle="--")
        place.axvline(0, color="black", linewidth=1, linestyle="--")
        aim = {"color": "green", "linewidth": 1, "linestyle": ":"}  # of studies/map.md: above the one line, left of the other
        place.axhline(15, label="15 % gained for 1.7 % of clean loss", **aim)
        place.axvline(1.7, **aim)
        place.set(xlabel="change of the clean loss (%)", ylabel=f"robustness gain, {name} (%)")
        place.grid(alpha=0.3)
    if len(pairs) <= 40:
        figure.legend(*places[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    save_figure(path, figure)
    return True
