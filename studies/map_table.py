"""The final table of the barrier study: python studies/map_table.py results/map_shakespeare_char

Reads report.json of stage 2 (studies/map.md) and prints, for every arm, the change of the clean loss and the robustness gain on the two endpoints,
each with its 95 % t interval over paired seeds, and whether the arm does what was asked: both gains at least 15 % with an interval above 0, at no
more than 1.7 % of the clean loss. Below it, what the variational form does beyond the embedding noise in it: the same figures with that noise alone
as baseline.
"""

import itertools

from reports import COST, ENDPOINTS, read_report, run

from configurator import InputError

GAIN = 0.15  # that is aimed at, on both endpoints


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
    more = (", annealed" if config["prior_anneal"] else "") + (", gradient cut" if config["prior_detach"] else "")
    return f"barrier: {where}, {config['prior_form']}, λ {config['prior_lambda']:g}{more}"


def verdict(clean: dict, gains: list[dict]) -> str:
    """In a few words; `-` where an interval is missing."""
    if any(entry["interval"] is None for entry in (clean, *gains)):
        return "-"
    if all(gain["mean"] >= GAIN and gain["interval"][0] > 0 for gain in gains) and clean["mean"] <= COST:
        return "aim met"
    if all(gain["interval"][0] > 0 for gain in gains):
        return "helps, aim missed"
    if any(gain["interval"][1] < 0 for gain in gains):
        return "harms"
    return "one of two" if any(gain["interval"][0] > 0 for gain in gains) else "no gain shown"


def cell(entry: dict, unit: float, digits: int) -> str:
    """Mean and interval of a paired difference in per cent."""
    from report import estimate

    return "-" if entry["mean"] is None else estimate(entry, f"+.{digits}f", unit, " %").replace("-", "−")


def figures(pair: dict) -> list[str]:
    """Clean loss and the gains, as a row has them."""
    return [cell(pair["clean_percent"], 1, 2), *(cell(pair["gains"][endpoint], 100, 1) for endpoint in ENDPOINTS)]


def beyond_noise(report: dict) -> list[str]:
    """One sentence per arm with prior and embedding noise that has a control with the noise alone."""
    from report import robustness

    configs, sentences = report["provenance"]["configs"], []
    noisy = {
        with_prior: [n for n, c in configs.items() if c["embed_noise"] and bool(c["prior_lambda"]) == with_prior] for with_prior in (True, False)
    }
    for name, other in itertools.product(noisy[True], noisy[False]):
        strength = configs[name]["embed_noise"]
        if configs[other]["embed_noise"] == strength:
            cells = [[c for c in report["arms"][arm]["cells"] if "diverged_at" not in c] for arm in (other, name)]
            both = [(a, b) for a in cells[0] for b in cells[1] if a["seed"] == b["seed"]]
            values = figures(robustness(both))
            words = ", ".join(f"gain, {endpoint}, {value}" for endpoint, value in zip(ENDPOINTS, values[1:]))
            sentences.append(f"Variational against its noise of {strength:g} alone: clean loss {values[0]}, {words}.")
    return sentences


def table(report: dict) -> str:
    """The table as Markdown and the sentences below it. Raises InputError."""
    from tabulate import tabulate

    rows = []
    try:
        configs = report["provenance"]["configs"]
        baseline = configs[next(iter(configs))]
        for name, pair in report["pairs"].items():
            gains = [pair["gains"][endpoint] for endpoint in ENDPOINTS]
            rows.append([words(configs[name], baseline), *figures(pair), verdict(pair["clean_percent"], gains)])
        sentences = beyond_noise(report)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise InputError("the report is not one of compare.py with --evaluate=perturb") from None
    headers = ["arm", "clean loss", *(f"gain, {name}" for name in ENDPOINTS), ""]
    return "\n\n".join([tabulate(rows, headers, tablefmt="github", disable_numparse=True), *sentences])


def main(arguments: list[str]):
    """Raises InputError."""
    print(table(read_report(arguments, __doc__)[1]))


if __name__ == "__main__":
    run(main)
