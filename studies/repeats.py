"""What a repetition moves: python studies/repeats.py results/NEW results/OLD [results/...]

Reads the report.json of comparisons that have runs in common, made with other code, say, or on another kind of device, and writes repeats.json and
repeats.md into the first directory. Of every arm and seed that is in two of them: the endpoint in the one named first minus that in the other, with
mean, 95 % t interval and standard deviation, by arm and over all as if the runs were independent; and beside it the standard deviation that the
difference of two seeds of one arm has, which is the root of 2 times that over seeds within arms. A run that three have counts twice, against the
first each time. Refuses other data, another endpoint, an arm whose recipes differ, a run that diverged, and a copy of a run.
"""

import math
from statistics import variance

from across import endpoints
from reports import read_reports, recipe_of, run, unlike, write_table

from configurator import InputError


def repeated(reports: list[dict]) -> dict[str, dict]:
    """{arm: {"seeds", "first", "again"}, the endpoints in the report named first and in a later one}. Raises InputError."""
    found = {}
    try:
        if keys := unlike([{"endpoint": one["endpoint"], "data": one["provenance"]["data_sha256"]} for one in reports]):
            raise InputError(f"the reports differ in {keys}: a repetition has the same")
        recipes: dict[str, dict] = {}
        there: dict[tuple, tuple] = {}
        for report in reports:
            values = endpoints(report)
            for name, arm in report["arms"].items():
                own = recipe_of(report["provenance"]["configs"][name])
                if keys := unlike([recipes.setdefault(name, own), own]):
                    raise InputError(f"arm {name} has other recipes in two of the reports: {keys}")
                for cell in sorted(arm["cells"], key=lambda cell: cell["seed"]):
                    seed = cell["seed"]
                    if "diverged_at" in cell:
                        raise InputError(f"{name} diverged on seed {seed}: it has no endpoint to compare")
                    value, makings = there.setdefault((name, seed), (values[name][seed], []))
                    if cell in makings:  # with its times: two makings of a run may have one curve, but not one clock
                        raise InputError(f"{name} on seed {seed} is one run, in two of the reports or twice in one: that is no repetition")
                    makings.append(cell)
                    if len(makings) == 1:
                        continue
                    pairs = found.setdefault(name, {"seeds": [], "first": [], "again": []})
                    for key, one in (("seeds", seed), ("first", value), ("again", values[name][seed])):
                        pairs[key].append(one)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"a report is not one of compare.py ({type(error).__name__}: {error})") from None
    if not found:
        raise InputError("no run is in two of the reports: there is nothing to compare")
    return found


def measured(found: dict[str, dict]) -> tuple[dict[str, dict], dict]:
    """By arm, and of all, the paired difference of the first from the repetition; and in each, `of_seeds`, the standard deviation of the difference
    of two seeds of one arm, None where no making has two."""
    from report import paired_difference

    def of_seeds(arms: list[dict]) -> float | None:
        makings = [values for arm in arms for values in (arm["first"], arm["again"]) if len(values) > 1]
        free = sum(len(values) - 1 for values in makings)
        return math.sqrt(2 * sum((len(values) - 1) * variance(values) for values in makings) / free) if free else None

    def entry(arms: list[dict]) -> dict:
        again, first = ([value for arm in arms for value in arm[making]] for making in ("again", "first"))
        return paired_difference(again, first) | {"of_seeds": of_seeds(arms)}

    return {name: entry([arm]) for name, arm in found.items()}, entry(list(found.values()))


def table(differences: dict[str, dict], pooled: dict) -> str:
    """The differences as Markdown."""
    from tabulate import tabulate

    from report import estimate

    rows = []
    for name, pair in (*differences.items(), ("all of them", pooled)):
        spreads = ["-" if value is None else f"{value:.4f}" for value in (pair["sd"], pair["of_seeds"])]
        rows.append([name, pair["n"], estimate(pair), *spreads, f"{max(map(abs, pair['differences'])):.4f}"])
    headers = ["arm", "runs", "difference, mean and 95 % interval", "its sd", "sd between two seeds", "largest"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def sources(reports: list[tuple]) -> str:
    """Which code, torch and device made each. Raises InputError."""
    try:
        made = [(folder.name, report["provenance"]) for folder, report in reports]
        return "\n".join(f"- {name}: code {one['code_sha256'][:8]}, torch {one['versions']['torch']}, {one['device']}" for name, one in made)
    except (KeyError, TypeError) as error:
        raise InputError(f"a report is not one of compare.py ({type(error).__name__}: {error})") from None


def main(arguments: list[str]):
    """Raises InputError."""
    read = read_reports(arguments, __doc__, 2, 9)
    found = repeated([report for _, report in read])
    differences, pooled = measured(found)
    text = "\n\nThe first named minus the others, where both have the run. Over all, the runs count as independent.\n\n"
    contents = {"reports": [folder.name for folder, _ in read], "arms": found, "differences": differences, "pooled": pooled}
    write_table(read[0][0], "repeats", contents, table(differences, pooled) + text + sources(read))


if __name__ == "__main__":
    run(main)
