"""What subtracting alpha I does to weights trained without it: python studies/alpha_curve.py results/pretrained

Reads report.json of a comparison whose arms start from given weights and differ in diffusion_alpha, and writes alpha.md and alpha.png beside it: the
validation loss before the first step and after the last, mean and standard deviation over seeds, and its paired difference from alpha = 0 with
the 95 % t interval.
"""

from pathlib import Path

from reports import read_report, run, unlike

from configurator import InputError

ENDS = {"as they are": 0, "after fine-tuning": -1}  # which point of a run's curve


def read_losses(report: dict) -> dict[float, dict[str, list[float]]]:
    """{alpha: {end: losses of the seeds}}, alphas ascending. Raises InputError."""
    found, others, seeds = {}, [], set()
    try:
        for name, arm in report["arms"].items():
            if arm["diverged"]:
                raise InputError(f"arm {name} has runs that diverged: their pairs are lost, lower the rate of fine-tuning")
            config = report["provenance"]["configs"][name]
            alpha = config["diffusion_alpha"]
            others.append({key: value for key, value in config.items() if key not in ("diffusion_alpha", "out_dir")})
            cells = sorted(arm["cells"], key=lambda cell: cell["seed"])  # pairs are of the same seed
            seeds.add(tuple(cell["seed"] for cell in cells))
            found[alpha] = {end: [cell["curve"][at][1] + 0.0 for cell in cells] for end, at in ENDS.items()}
        if len(seeds) > 1 or () in seeds:
            raise ValueError("numbers of seeds")
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise InputError("the report is not one of compare.py") from None
    if keys := unlike(others):
        raise InputError(f"the arms of the report differ in more than diffusion_alpha, {keys}: a curve over alpha would mix them up")
    if 0 not in found or len(found) < 2:
        raise InputError("no arm of the report has diffusion_alpha=0, or there is no other: nothing to compare with")
    return dict(sorted(found.items()))


def table(losses: dict, steps: int) -> str:
    """The table as Markdown."""
    from tabulate import tabulate

    from report import estimate, paired_difference, spread, summary

    rows = []
    for alpha, ends in losses.items():
        cells = [f"{alpha:g}"]
        for end, values in ends.items():
            pair = paired_difference(losses[0][end], values)
            cells.append(spread(summary(values)))
            cells.append(estimate(pair) if pair["interval"] else "-")
        rows.append(cells)
    headers = ["alpha", "loss of the weights as they are", "against alpha = 0", f"after {steps} steps of fine-tuning", "against alpha = 0"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw(path: Path, losses: dict):
    """alpha.png: both losses over alpha, mean and standard deviation over seeds, and the differences after fine-tuning with their intervals."""
    import numpy as np

    from figures import plt, save_figure
    from report import paired_difference

    figure, (axes, near) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for end in ENDS:  # the last one, after fine-tuning, is the one of the differences
        values = np.array([ends[end] for ends in losses.values()])
        axes.errorbar(list(losses), values.mean(axis=1), values.std(axis=1, ddof=min(1, values.shape[1] - 1)), fmt="o-", capsize=3, label=end)
    axes.set(xlabel="α in A − α I, on weights trained with α = 0", ylabel="validation loss (nats per prediction)", yscale="log")
    axes.legend()
    pairs = {alpha: paired_difference(losses[0][end], ends[end]) for alpha, ends in losses.items() if alpha}
    for alpha, pair in pairs.items():
        low, high = pair["interval"] or (pair["mean"], pair["mean"])
        colour = "tab:green" if high < 0 else "tab:red" if low > 0 else "tab:gray"
        near.plot([alpha, alpha], [low, high], color=colour, linewidth=3)
        near.plot(alpha, pair["mean"], "D", color=colour)
    near.axhline(0, color="black", linestyle="--", linewidth=1)
    near.set_yscale("symlog", linthresh=max(1e-9, min(abs(pair["mean"]) for pair in pairs.values())))
    near.margins(y=0.08)
    near.set(xlabel="α", ylabel=f"loss {end}, minus that at α = 0")
    for some in (axes, near):
        some.grid(alpha=0.3, which="both")
    save_figure(path, figure)


def main(arguments: list[str]):
    """Raises InputError."""
    folder, report = read_report(arguments, __doc__)
    losses = read_losses(report)
    from dataset import write_file

    first = next(iter(report["arms"]))
    text = table(losses, report["provenance"]["configs"][first]["max_iters"])
    draw(folder / "alpha.png", losses)
    write_file(folder / "alpha.md", (text + "\n").encode())
    print(text)


if __name__ == "__main__":
    run(main)
