"""How many steps an arm needs for the baseline's loss: python studies/steps_to_reach.py results/gpt2 [results/...]

Reads report.json of a comparison and writes steps.json and steps.md beside it. For every arm and seed the target is the higher of the two best
validation losses, the arm's and the baseline's, which both reach; the step at which a curve first reaches it is interpolated between evaluations.
The ratio is the baseline's steps by the arm's: above 1 the arm is faster. Mean and 95 % t interval are those of its logarithm over seeds, so the
mean is a geometric one. A pair of which one curve begins at the target or below has no ratio and is left out.

With several directories the arms of all of them (across.py); the baseline is the first arm of the first, or its first without diffusion, and the
files go there.

All runs have the schedule of their full length. A run planned for fewer steps would have a lower rate by then, and a lower loss.
"""

import math

from across import together
from reports import read_reports, run, write_table

from configurator import InputError


def reached(curve: list, target: float) -> float:
    """The step at which a curve [[step, loss, ...], ...] is first at `target` or below, linear between evaluations. Raises ValueError if never."""
    before = None
    for step, loss, *_ in curve:
        if loss <= target:
            return float(step) if before is None else before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    raise ValueError(f"the curve stays above {target}")


def ratios(report: dict) -> dict[str, dict]:
    """{arm: `seeds`, `targets`, `baseline_steps`, `arm_steps` and `ratios` of the seeds, and their `mean` and `interval`}. Raises InputError."""
    from report import paired_difference

    found = {}
    try:
        baseline, *others = report["arms"].values()
        first = {cell["seed"]: cell["curve"] for cell in baseline["cells"] if "diverged_at" not in cell}
        for name, arm in zip(list(report["arms"])[1:], others):
            own = {cell["seed"]: cell["curve"] for cell in arm["cells"] if "diverged_at" not in cell and cell["seed"] in first}
            pairs = [(first[seed], curve) for seed, curve in own.items()]
            targets = [max(min(loss for _, loss, *_ in curve) for curve in pair) for pair in pairs]
            steps = [[reached(curve, target) for curve in pair] for pair, target in zip(pairs, targets)]
            kept = [all(some) for some in steps]
            seeds, targets, steps = ([one for one, there in zip(some, kept) if there] for some in (own, targets, steps))
            logs = [math.log(a / b) for a, b in steps]
            whole = paired_difference([0.0] * len(logs), logs)
            found[name] = {"seeds": seeds, "targets": targets, "baseline_steps": [a for a, _ in steps], "arm_steps": [b for _, b in steps]}
            found[name] |= {"ratios": [math.exp(log) for log in logs], "mean": None if whole["mean"] is None else math.exp(whole["mean"])}
            found[name]["interval"] = whole["interval"] and [math.exp(end) for end in whole["interval"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the report is not one of compare.py ({type(error).__name__}: {error})") from None
    return found


def table(found: dict[str, dict], baseline: str) -> str:
    """The ratios as Markdown."""
    from tabulate import tabulate

    from report import estimate

    rows = []
    for name, entry in found.items():
        rows.append([name, len(entry["ratios"]), ", ".join(f"{steps:.0f}" for steps in entry["arm_steps"])])
        rows[-1] += [", ".join(f"{steps:.0f}" for steps in entry["baseline_steps"]), estimate(entry, ".2f")]
    headers = ["arm", "pairs", "its steps", f"steps of {baseline}", "ratio"]
    text = "Steps to the worse of the two arms' best validation losses, for every seed; ratio, with its 95 % t interval: above 1 the arm needs fewer."
    return f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n\n{text}"


def main(arguments: list[str]):
    """Raises InputError."""
    (folder, report), *others = read_reports(arguments, __doc__, 1, 9)
    if others:
        report = together([report, *(other for _, other in others)])
    found = ratios(report)
    if not found:
        raise InputError("one arm alone has nothing to reach: name the directory of another comparison as well")
    write_table(folder, "steps", found, table(found, next(iter(report["arms"]), "")))


if __name__ == "__main__":
    run(main)
