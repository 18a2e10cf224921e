"""Arms of one comparison or of several, every pair of them: python studies/across.py results/gpt2_own_rates results/gpt2

Reads the report.json of each and writes across.json, across.md and across.png into the first directory: the endpoint of every arm, the paired
difference of every two over the seeds that both have, and their curves; arms without diffusion come first. Refuses reports that do not belong
together: other data, endpoint or torch, another kind of device for the same seed, an arm that is in two of them on the same seed, a key of the recipe
that differs though it is none of attention's or of the barrier, no arm has it in its name and no report tells its arms apart by it. Code may differ,
and so may the devices of different seeds, and then the table says so.
"""

import itertools
import math

from reports import read_reports, recipe_of, run, write_table

from configurator import InputError

ARM = ("attention_kernel", "head_combine", "weight_init")  # with those of diffusion and of the barrier, what an arm is there for


def together(reports: list[dict]) -> dict:
    """One report: the `endpoint` and the `arms` of all, with their cells alone, and each one's `commands` and `code`. Raises InputError."""

    def alike(what: str, values: list):
        if any(value != values[0] for value in values):
            raise InputError(f"the reports differ in {what}: {' and '.join(dict.fromkeys(map(str, values)))}")

    cells, recipes, device_of, young = {}, {}, {}, recipe_of({})
    tell = {key for key in young if key.startswith(("diffusion", "prior_")) or key in ARM}
    try:
        sources = [report["provenance"] for report in reports]
        alike("endpoint", [report["endpoint"] for report in reports])
        sums = [source["data_sha256"] for source in sources]
        if any(one != sums[0] for one in sums):
            alike("data", [f"{source.get('data')} (sha256 {', '.join(map(str, one.values()))})" for source, one in zip(sources, sums)])
        alike("torch", [source["versions"]["torch"] for source in sources])
        for report, source in zip(reports, sources):
            own = {name: recipe_of(source["configs"][name]) for name in report["arms"]}
            tell |= {key for one, other in itertools.combinations(own.values(), 2) for key in one if other[key] != one[key]}
            for name, arm in report["arms"].items():
                if other := [key for key, value in recipes.setdefault(name, own[name]).items() if own[name][key] != value]:
                    raise InputError(f"arm {name} is in two of the reports with different recipes: {', '.join(other)}")
                if twice := {cell["seed"] for cell in arm["cells"]} & {cell["seed"] for cell in cells.setdefault(name, [])}:
                    raise InputError(f"arm {name} is in two of the reports on the same seed, {min(twice)}: leave one of them out")
                cells[name] += arm["cells"]
                for seed in sorted(cell["seed"] for cell in arm["cells"]):  # pairs are of one seed, so of one kind of device
                    alike(f"device on seed {seed}", [device_of.setdefault(seed, source["device"]), source["device"]])
                if not all("diverged_at" in cell or [step + loss for step, loss, *_ in cell["curve"]] for cell in arm["cells"]):
                    raise ValueError("an empty curve")
        tell |= {key for key in young for name in cells if f"{key}=" in name}  # an arm is named by its own options
        for key in next(iter(recipes.values())).keys() - tell:
            alike(key, [recipe[key] for recipe in recipes.values()])
        names = sorted(cells, key=lambda name: recipes[name]["diffusion"])
        whole = {"endpoint": reports[0]["endpoint"], "arms": {name: {"cells": cells[name]} for name in names}}
        whole["commands"] = [source["command"] + "" for source in sources]
        whole["code"] = [source["code_sha256"][:8] for source in sources]
        whole["devices"] = {device: sorted(seed for seed in device_of if device_of[seed] == device) for device in dict.fromkeys(device_of.values())}
        return whole
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise InputError(f"a report is not one of compare.py ({type(error).__name__}: {error})") from None


def endpoints(whole: dict) -> dict[str, dict[int, float]]:
    """{arm: {seed: the endpoint's value}}, without runs that diverged. Raises InputError."""
    from report import ENDPOINTS

    try:
        key = ENDPOINTS[whole["endpoint"]][1]
        if not all(math.isfinite(cell[key]) for arm in whole["arms"].values() for cell in arm["cells"] if "diverged_at" not in cell):
            raise ValueError("a loss that is no number")
        return {name: {cell["seed"]: cell[key] + 0.0 for cell in arm["cells"] if "diverged_at" not in cell} for name, arm in whole["arms"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"a report is not one of compare.py ({type(error).__name__}: {error})") from None


def differences(arms: dict[str, dict[int, float]]) -> dict[str, dict]:
    """{"b − a": paired difference of arm b from arm a over their common seeds}, a before b."""
    from report import paired_difference

    found = {}
    for (a, of_a), (b, of_b) in itertools.combinations(arms.items(), 2):
        seeds = sorted(of_a.keys() & of_b.keys())
        found[f"{b} − {a}"] = {"arm": b, "baseline": a, "seeds": seeds} | paired_difference([of_a[s] for s in seeds], [of_b[s] for s in seeds])
    return found


def tables(whole: dict, arms: dict, pairs: dict, folders: list) -> str:
    """Both as Markdown, and where each report comes from."""
    from tabulate import tabulate

    from report import ENDPOINTS, spread, summary

    rows = []
    for name, values in arms.items():
        of = summary(list(values.values()))
        lost = sum("diverged_at" in cell for cell in whole["arms"][name]["cells"])
        n = f"{of['n']}" + (f" (+ {lost} diverged)" if lost else "")
        rows.append([name, n, spread(of)])
    text = tabulate(rows, ["arm", "n", ENDPOINTS[whole["endpoint"]][0]], tablefmt="github", disable_numparse=True) + "\n\n"
    rows = []
    for name, pair in pairs.items():
        interval = "{:+.4f} to {:+.4f}".format(*pair["interval"]) if pair["interval"] else "-"
        p = "-" if pair["sign_flip_p"] is None else f"{pair['sign_flip_p']:.4f}"
        if pair["n"]:
            rows.append([name, pair["n"], f"{pair['mean']:+.4f}", interval, p])
    headers = ["difference", "pairs", "mean", "95 % t interval", "sign-flip p"]
    text += tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n\n" if rows else ""
    if any(pair["n"] == 0 for pair in pairs.values()):
        text += "Arms without a seed that both have finished have no difference. "
    if any(0 < pair["n"] <= 3 for pair in pairs.values()):
        text += "A difference of three pairs or fewer is a hint, not an answer. "
    intervals = sum(pair["interval"] is not None for pair in pairs.values())
    text += f"The {intervals} intervals are not corrected for their number." if intervals > 1 else ""
    text += "" if len(set(whole["code"])) == 1 else " The reports are of different versions of the code."
    if len(whole["devices"]) > 1:
        where = (f"{device} on seeds {', '.join(map(str, seeds))}" for device, seeds in whole["devices"].items())
        text += f" The runs are from {' and '.join(where)}; no pair is of two devices."
    text = text.rstrip() + ("\n\n![validation loss](across.png)\n" if any(arms.values()) else "\n")  # else there is no curve to draw
    sources = zip(folders, whole["code"], whole["commands"])
    return text + "".join(f"\n- {folder.name}: code {code}, {command}" for folder, code, command in sources) + "\n"


def main(arguments: list[str]):
    """Raises InputError."""
    found = read_reports(arguments, __doc__, 1, 9)
    whole = together([report for _, report in found])
    arms = endpoints(whole)
    pairs = differences(arms)
    from report import draw_curves

    contents = {"reports": [folder.name for folder, _ in found]} | {key: whole[key] for key in ("commands", "code", "devices", "endpoint")}
    contents |= {"arms": arms, "pairs": pairs}
    folder = found[0][0]
    write_table(folder, "across", contents, tables(whole, arms, pairs, [one for one, _ in found]))
    draw_curves(folder / "across.png", {name: arm["cells"] for name, arm in whole["arms"].items()})


if __name__ == "__main__":
    run(main)
