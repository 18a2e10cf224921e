"""Heat maps of the lambda study: python studies/lambda_map.py results/lambda_map [results/...]

Reads report.json of a comparison whose arms differ in diffusion_lambda, diffusion_alpha, learning_rate and batch_size, and writes map.png, map.md
and map.json beside it: for every batch size the mean best validation loss over seeds by lambda and learning rate of lambda (A - I), below it the
mean paired difference from A where A was run at that rate and batch size, and the loss by alpha of A - alpha I, at one rate and batch size, where
there are such arms. A cell with runs that diverged says how many of how many, and its numbers are of the others. All runs must have the same number
of steps or of sequences. Further reports add cells; a difference is from A of the cell's own report, and where A is in two of them the first's loss
is shown.
"""

import math
from pathlib import Path

from reports import read_reports, run, unlike, write_table

from configurator import InputError

FREE = ("diffusion", "diffusion_lambda", "diffusion_alpha", "learning_rate", "batch_size", "gradient_accumulation_steps", "out_dir")
FREE += ("max_iters", "warmup_iters", "eval_interval")  # of a batch size


def read_cells(*reports: dict) -> dict[str, dict]:
    """{arm: {lambda, alpha (None for A), rate, batch, steps, losses ({seed: best}), loss (mean; nan if all diverged), diverged, runs, plain (losses
    of A of the same rate, batch and report)}}.

    Raises InputError.
    """
    cells, others = {}, []
    try:
        for report in reports:
            own, plain = {}, {}
            for name, arm in report["arms"].items():
                config = report["provenance"]["configs"][name]
                others.append({key: value for key, value in config.items() if key not in FREE})
                others[-1]["data"] = report["provenance"].get("data_sha256")
                is_plain = not config["diffusion"]
                cell = {
                    "lambda": None if is_plain else config["diffusion_lambda"] + 0.0,
                    "alpha": None if is_plain else config["diffusion_alpha"] + 0.0,
                }
                cell |= {"rate": config["learning_rate"] + 0.0, "batch": config["batch_size"] * config["gradient_accumulation_steps"]}
                losses = {one["seed"]: one["best_val_loss"] + 0.0 for one in arm["cells"] if "diverged_at" not in one}
                if not all(map(math.isfinite, losses.values())):
                    raise ValueError("a loss that is no number")
                if is_plain:
                    plain[cell["rate"], cell["batch"]] = losses
                same = [other for other, one in (cells | own).items() if all(one[key] == value for key, value in cell.items())]
                if same and is_plain and same[0] not in own:
                    continue
                if same:
                    raise InputError(f"arms {same[0]} and {name} have the same lambda, alpha, rate and batch size: a cell of the map has one")
                cell |= {"steps": config["max_iters"], "losses": losses, "loss": sum(losses.values()) / len(losses) if losses else math.nan}
                own[name] = cell | {"diverged": len(arm["cells"]) - len(losses), "runs": len(arm["cells"])}
            for name, cell in own.items():
                if name in cells:
                    raise InputError(f"arm {name} is in two of the reports with different recipes")
                cells[name] = cell | {"plain": plain.get((cell["rate"], cell["batch"]), {})}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError("the report is not one of compare.py") from None
    if keys := unlike(others):
        raise InputError(f"the arms of the report differ in other keys too, {keys}: a map would mix them up")
    if all(cell["lambda"] is None for cell in cells.values()):
        raise InputError("no arm of the report has diffusion=True: there is nothing to map")
    if not any(cell["losses"] for cell in cells.values() if cell["alpha"] == 1 and cell["lambda"]):
        raise InputError("no arm with diffusion_alpha=1 and a lambda above 0 has a run that did not diverge: there is nothing to map")
    if len({(cell["rate"], cell["batch"]) for cell in cells.values() if cell["alpha"] not in (None, 1)}) > 1:
        raise InputError("the arms with another diffusion_alpha than 1 have several rates or batch sizes: the line by alpha has one")
    if len({cell["steps"] for cell in cells.values()}) > 1 and len({cell["steps"] * cell["batch"] for cell in cells.values()}) > 1:
        raise InputError("the arms have neither the same number of steps (max_iters) nor the same number of sequences: a map would mix them up")
    return cells


def against_plain(cells: dict) -> dict[str, float]:
    """{arm of diffusion: mean over the seeds of both of its loss minus A's at the same rate and batch size}, where there is such an A."""
    found = {}
    for name, cell in cells.items():
        pairs = [cell["losses"][seed] - cell["plain"][seed] for seed in cell["losses"].keys() & cell["plain"].keys()]
        if cell["lambda"] is not None and pairs:
            found[name] = sum(pairs) / len(pairs)
    return found


def grid(cells: dict) -> dict[int, dict]:
    """{batch: {(lambda or None for A, rate): arm}} of the arms with the whole identity and, beside them, A."""
    found: dict[int, dict] = {}
    for name, cell in cells.items():
        if cell["alpha"] in (None, 1):
            found.setdefault(cell["batch"], {})[cell["lambda"], cell["rate"]] = name
    return dict(sorted(found.items()))


def line_of(cells: dict) -> list[dict]:
    """The cells of A - alpha I of one rate and batch size, alphas ascending, A standing for 0; none where alpha is 1 everywhere."""
    other = next((cell for cell in cells.values() if cell["alpha"] not in (None, 1)), None)
    if other is None:
        return []
    found = {}
    for cell in cells.values():
        if (cell["rate"], cell["batch"]) == (other["rate"], other["batch"]) and cell["lambda"] in (None, 1):
            found.setdefault(cell["alpha"] or 0, cell)
    return [found[alpha] | {"alpha": alpha} for alpha in sorted(found)]


def words(cell: dict, value: float | None, form: str, between: str) -> str:
    """A cell's number, and how many of its runs diverged."""
    some = [] if value is None or math.isnan(value) else [format(value, form)]
    return between.join(some + ([f"{cell['diverged']} of {cell['runs']} diverged"] if cell["diverged"] else []))


def table(cells: dict) -> str:
    """The map, and below it the line by alpha, as Markdown."""
    from tabulate import tabulate

    def one(name: str | None) -> str:
        if name is None:
            return "-"
        text = words(cells[name], cells[name]["loss"], ".4f", ", ")
        return text + (f" ({difference[name]:+.4f}{'*' * other(name)})" if name in difference else "")

    def other(name: str) -> bool:
        """Whether the difference is from another A than the table's."""
        plain = maps[cells[name]["batch"]].get((None, cells[name]["rate"]))
        return plain is not None and cells[plain]["losses"] != cells[name]["plain"]

    difference, maps = against_plain(cells), grid(cells)
    columns = sorted({row for arms in maps.values() for row, _ in arms}, key=lambda value: -1 if value is None else value)
    rows = []
    for batch, arms in maps.items():
        for rate in sorted({rate for _, rate in arms}):
            steps = cells[next(name for (_, other), name in arms.items() if other == rate)]["steps"]
            rows.append([batch, steps, f"{rate:g}", *(one(arms.get((column, rate))) for column in columns)])
    headers = ["batch", "steps", "rate", *("A" if column is None else f"λ = {column:g}" for column in columns)]
    text = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    if line := line_of(cells):
        rows = [[f"{cell['alpha']:g}", words(cell, cell["loss"], ".4f", ", ")] for cell in line]
        text += f"\n\nA − α I, rate {line[0]['rate']:g}, batch {line[0]['batch']}:\n\n"
        text += tabulate(rows, ["α", "loss"], tablefmt="github", disable_numparse=True)
    text += "\n\nMean best validation loss, in brackets the mean paired difference from A of the same rate and batch size."
    starred = any(other(name) for name in difference if cells[name]["alpha"] == 1)
    return text + " * from the A of its own report, which is not the one shown." * starred


def draw(path: Path, cells: dict):
    """map.png: heat maps of lambda x rate per batch size, of losses and of differences from A, and the losses by alpha."""
    import numpy as np

    from figures import plt, save_figure

    maps, line, difference = grid(cells), line_of(cells), against_plain(cells)
    kinds = [({name: cell["loss"] for name, cell in cells.items()}, ".3f", "best validation loss")]
    plain = [cell for cell in cells.values() if cell["lambda"] is None]
    scale = {name for name, cell in cells.items() if cell["lambda"] != 0}  # without attention a loss is so high that it would hide the rest
    if len(plain) > 1 and scale & difference.keys():  # more of A than the line by alpha needs
        kinds.append((difference, "+.3f", "difference from A"))
    columns, rates = len(maps) + bool(line), sorted({rate for arms in maps.values() for _, rate in arms})
    size = (1.6 + 3.2 * columns, 0.6 + 3.5 * len(kinds))
    figure, places = plt.subplots(len(kinds), columns, figsize=size, layout="constrained", squeeze=False)
    for (values, form, label), row_of_places in zip(kinds, places):
        names = sorted({row for arms in maps.values() for row, _ in arms if row is not None})
        if values is not difference and len(kinds) > 1:  # A is a row of the map
            names = [*names, None]
        known = [values[name] for name in scale if not math.isnan(values.get(name, math.nan))]
        if values is difference:
            reach = float(np.quantile(np.abs(known), 0.9))
            look = {"vmin": -reach, "vmax": reach, "cmap": "RdBu_r"}
        else:
            look = {"vmin": min(known), "vmax": np.quantile(known, 0.9), "cmap": "viridis_r"}
        for place, (batch, arms) in zip(row_of_places, maps.items()):
            found = np.full((len(names), len(rates)), np.nan)
            for (row, rate), name in arms.items():
                if row in names:
                    at = names.index(row), rates.index(rate)
                    found[at] = values.get(name, math.nan)
                    text = words(cells[name], values.get(name), form, "\n")
                    color = "red" if cells[name]["diverged"] else "black"
                    place.text(at[1], at[0], text, ha="center", va="center", fontsize=7, color=color)
            shown = place.imshow(found, aspect="auto", origin="lower", alpha=0.75, **look)
            place.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            place.set_yticks(range(len(names)), ["A" if name is None else f"{name:g}" for name in names])
            steps = {cells[name]["steps"] for name in arms.values()}
            place.set(title=f"batch {batch}, {max(steps)} steps", xlabel="learning rate", ylabel="λ" if place is row_of_places[0] else "")
        figure.colorbar(shown, ax=row_of_places[: len(maps)], label=f"{label}, λ (A − I)", extend="max" if values is not difference else "both")
    if line:
        places[0][-1].plot([cell["alpha"] for cell in line], [cell["loss"] for cell in line], "o-")
        places[0][-1].set(title=f"A − α I, rate {line[0]['rate']:g}, batch {line[0]['batch']}", xlabel="α", ylabel="best validation loss")
        places[0][-1].grid(alpha=0.3)
        for place in places[1:, -1]:
            place.axis("off")
    save_figure(path, figure)


def main(arguments: list[str]):
    """Raises InputError."""
    reports = read_reports(arguments, __doc__, 1, 9)
    folder, cells = reports[0][0], read_cells(*(report for _, report in reports))
    found, difference = {}, against_plain(cells)
    for name, cell in cells.items():
        found[name] = {key: value for key, value in cell.items() if key != "plain"} | {
            "loss": None if math.isnan(cell["loss"]) else cell["loss"],
            "against_A": difference.get(name),
        }
    write_table(folder, "map", found, table(cells))  # first, since it may refuse
    draw(folder / "map.png", cells)
    print(folder / "map.png")


if __name__ == "__main__":
    run(main)
