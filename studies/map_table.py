"""The final table of the barrier study: python studies/map_table.py results/map_shakespeare_char

Reads report.json of stage 2 (studies/map.md) and prints, for every arm, the change of the clean loss and the robustness gain on the two endpoints,
each with its 95 % t interval over paired seeds, and whether the arm does what was asked: both gains at least 15 % with an interval above 0, at no
more than 1.7 % of the clean loss.
"""

import sys

from reports import read_report

from configurator import InputError, one_line_errors

ENDPOINTS = ("noise 1 RMS", "attack 0.1, 10 steps")  # gains that were named before the runs
GAIN, COST = 0.15, 1.7  # the aim: as a share, and in per cent of the clean loss


def words(config: dict, baseline: dict) -> str:
    """What an arm is, in words, from the keys in which it differs from the baseline."""
    changed = {key: value for key, value in config.items() if value != baseline[key] and key != "out_dir"}
    if not config["prior_lambda"]:
        names = {"embed_noise": "embedding noise", "label_smoothing": "label smoothing", "dropout": "dropout", "weight_decay": "weight decay"}
        return "control: " + ", ".join(f"{names.get(key, key)} {value:g}" for key, value in changed.items())
    if config["prior_where"] == "attention":
        where = "own heads"
    elif config["embed_noise"]:
        where = f"variational, noise {config['embed_noise']:g}"
    else:
        where = "tied, normalised" if config["prior_tied"] else "full prior" if config["prior_energy"] else "on embeddings"
    return f"barrier: {where}, {config['prior_form']}, λ {config['prior_lambda']:g}"


def verdict(clean: dict, gains: list[dict]) -> str:
    """In one or two words; `-` where an interval is missing."""
    if any(entry["interval"] is None for entry in (clean, *gains)):
        return "-"
    if all(gain["mean"] >= GAIN and gain["interval"][0] > 0 for gain in gains) and clean["mean"] <= COST:
        return "aim met"
    if all(gain["interval"][0] > 0 for gain in gains):
        return "helps, aim missed"
    return "harms" if any(gain["interval"][1] < 0 for gain in gains) else "no gain shown"


def table(report: dict) -> str:
    """The table as Markdown. Raises InputError."""
    from tabulate import tabulate

    def cell(entry, unit, digits):
        if entry["mean"] is None:
            return "-"
        values = [unit * value for value in (entry["mean"], *(entry["interval"] or ()))]
        numbers = [f"{value:+.{digits}f}".replace("-", "−") for value in values]
        return f"{numbers[0]} %" + (f" ({numbers[1]} to {numbers[2]})" if entry["interval"] else "")

    rows = []
    try:
        configs = report["provenance"]["configs"]
        baseline = configs[next(iter(configs))]
        for name, pair in report["pairs"].items():
            clean, gains = pair["clean_percent"], [pair["gains"][endpoint] for endpoint in ENDPOINTS]
            cells = [cell(clean, 1, 2), *(cell(gain, 100, 1) for gain in gains)]
            rows.append([words(configs[name], baseline), *cells, verdict(clean, gains)])
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise InputError("the report is not one of compare.py with --evaluate=perturb") from None
    return tabulate(rows, ["arm", "clean loss", *(f"gain, {name}" for name in ENDPOINTS), ""], tablefmt="github", disable_numparse=True)


def main(arguments: list[str]):
    """Raises InputError."""
    print(table(read_report(arguments, __doc__)[1]))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
