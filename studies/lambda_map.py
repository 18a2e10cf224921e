"""Heat maps of the lambda study: python studies/lambda_map.py results/lambda_map

Reads report.json of a comparison whose arms differ in diffusion_lambda, diffusion_alpha, learning_rate and batch_size, and writes map.png beside it:
for every batch size the mean best validation loss over seeds by lambda and learning rate of lambda (A - I), and by alpha of A - alpha I where
there are such arms. A cell with runs that diverged says how many of how many, and its colour is the mean of the others.
"""

import json
import math
from pathlib import Path

from reports import read_report, run

from configurator import InputError


def read_cells(report: dict) -> list[dict]:
    """One {lambda, alpha, rate, batch, loss (nan if all diverged), diverged, runs} per arm of graph diffusion. Raises InputError."""
    cells, others = [], set()
    try:
        for name, arm in report["arms"].items():
            config = report["provenance"]["configs"][name]
            if config["diffusion"]:
                free = ("diffusion_lambda", "diffusion_alpha", "learning_rate", "batch_size", "gradient_accumulation_steps", "out_dir")
                others.add(json.dumps({key: value for key, value in config.items() if key not in free}, sort_keys=True))
                cell = {"lambda": config["diffusion_lambda"], "alpha": config["diffusion_alpha"]}
                cell |= {"rate": config["learning_rate"], "batch": config["batch_size"] * config["gradient_accumulation_steps"]}
                mean = arm["best_val_loss"]["mean"]
                cells.append(cell | {"loss": math.nan if mean is None else mean, "diverged": len(arm["diverged"]), "runs": len(arm["cells"])})
    except (KeyError, TypeError):
        raise InputError("the report is not one of compare.py") from None
    if len(others) > 1:
        raise InputError("the arms of the report differ in other keys too: a map would mix them up")
    if not cells:
        raise InputError("no arm of the report has diffusion=True: there is nothing to map")
    return cells


def draw(path: Path, cells: list[dict]):
    """map.png: a heat map of lambda x rate per batch size, and the losses by alpha."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from evaluate import save_figure

    square = [cell for cell in cells if cell["alpha"] == 1]
    line = sorted((cell for cell in cells if cell["lambda"] == 1), key=lambda cell: cell["alpha"])
    line = line if len({cell["alpha"] for cell in line}) > 1 else []
    if line:  # the arms of one rate and batch size, those of the arms that are not in the map
        other = next(cell for cell in line if cell["alpha"] != 1)
        line = [cell for cell in line if (cell["rate"], cell["batch"]) == (other["rate"], other["batch"])]
    batches, rates, lambdas = (sorted({cell[key] for cell in square}) for key in ("batch", "rate", "lambda"))
    losses = [cell["loss"] for cell in square if math.isfinite(cell["loss"])]
    count = len(batches) + bool(line)
    figure, places = plt.subplots(1, count, figsize=(1.6 + 3.2 * count, 4), layout="constrained", squeeze=False)
    for place, batch in zip(places[0], batches):
        values = np.full((len(lambdas), len(rates)), np.nan)
        for cell in (cell for cell in square if cell["batch"] == batch):
            at = lambdas.index(cell["lambda"]), rates.index(cell["rate"])
            values[at] = cell["loss"]
            words = f"{cell['loss']:.3f}" if math.isfinite(cell["loss"]) else ""
            words += f"\n{cell['diverged']} of {cell['runs']} diverged" if cell["diverged"] else ""
            place.text(at[1], at[0], words.strip(), ha="center", va="center", fontsize=7, color="black" if words[:1].isdigit() else "red")
        shown = place.imshow(values, vmin=min(losses), vmax=np.quantile(losses, 0.9), cmap="viridis_r", aspect="auto", origin="lower", alpha=0.75)
        place.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        place.set_yticks(range(len(lambdas)), [f"{value:g}" for value in lambdas])
        place.set(title=f"batch {batch}", xlabel="learning rate", ylabel="λ" if batch == batches[0] else "")
    if batches:
        figure.colorbar(shown, ax=places[0][: len(batches)], label="best validation loss, λ (A − I)")
    if line:
        places[0][-1].plot([cell["alpha"] for cell in line], [cell["loss"] for cell in line], "o-")
        places[0][-1].set(title=f"A − α I, rate {line[0]['rate']:g}, batch {line[0]['batch']}", xlabel="α", ylabel="best validation loss")
        places[0][-1].grid(alpha=0.3)
    save_figure(path, figure)


def main(arguments: list[str]):
    """Raises InputError."""
    folder, report = read_report(arguments, __doc__)
    draw(folder / "map.png", read_cells(report))
    print(folder / "map.png")


if __name__ == "__main__":
    run(main)
