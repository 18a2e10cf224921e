"""What a repetition moves: python studies/repeats.py results/NEW results/OLD [results/...]

Reads the report.json of comparisons that have runs in common, made with other code, say, or on another kind of device, and writes repeats.json and
repeats.md into the first directory: of every arm and seed that is in two of them, the endpoint in the one named first minus that in the other; the
mean, its 95 % t interval and the standard deviation of a single difference, by arm and over all of them as if they were independent. A run that
three have counts twice, against the first each time. Refuses other data, another endpoint, an arm whose recipes differ, and a run that diverged.
"""

import dataclasses
import json
from statistics import mean

from across import endpoints
from reports import read_reports, run, unlike, write_table

from configurator import InputError, TrainConfig


def repeated(reports: list[dict]) -> dict[str, dict]:
    """{arm: {"seeds", "first", "again"}, the endpoints in the report named first and in a later one}. Raises InputError."""
    from compare import HARMLESS

    found, young = {}, json.loads(json.dumps(dataclasses.asdict(TrainConfig())))  # keys that a report is too old for have their defaults
    try:
        if keys := unlike([{"endpoint": one["endpoint"], "data": one["provenance"]["data_sha256"]} for one in reports]):
            raise InputError(f"the reports differ in {keys}: a repetition has the same")
        there: dict[str, tuple[dict, dict]] = {}
        for report in reports:
            for name, values in endpoints(report).items():
                if len(values) < len(report["arms"][name]["cells"]):
                    raise InputError(f"a run of {name} diverged: it has no endpoint to compare")
                own = {key: value for key, value in (young | report["provenance"]["configs"][name]).items() if key not in HARMLESS}
                recipe, before = there.setdefault(name, (own, {}))
                if keys := unlike([recipe, own]):
                    raise InputError(f"arm {name} has other recipes in two of the reports: {keys}")
                arm = found.setdefault(name, {"seeds": [], "first": [], "again": []})
                for seed in sorted(values.keys() & before.keys()):
                    arm["seeds"].append(seed)
                    arm["first"].append(before[seed])
                    arm["again"].append(values[seed])
                before |= {seed: value for seed, value in values.items() if seed not in before}
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"a report is not one of compare.py ({type(error).__name__}: {error})") from None
    found = {name: arm for name, arm in found.items() if arm["seeds"]}
    if not found:
        raise InputError("no run is in two of the reports: there is nothing to compare")
    return found


def measured(found: dict[str, dict]) -> dict[str, dict]:
    """By arm, and under "all", the paired difference of the first from the repetition."""
    from report import paired_difference

    pooled = {end: [value for arm in found.values() for value in arm[end]] for end in ("first", "again")}
    return {name: paired_difference(arm["again"], arm["first"]) for name, arm in (*found.items(), ("all", pooled))}


def table(differences: dict[str, dict]) -> str:
    """The differences as Markdown."""
    from tabulate import tabulate

    from report import estimate

    rows = []
    for name, pair in differences.items():
        largest = max(map(abs, pair["differences"]))
        rows.append([name, pair["n"], estimate(pair), "-" if pair["sd"] is None else f"{pair['sd']:.4f}", f"{largest:.4f}"])
    headers = ["arm", "runs", "difference, mean and 95 % interval", "sd of one", "largest"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(arguments: list[str]):
    """Raises InputError."""
    read = read_reports(arguments, __doc__, 2, 9)
    found = repeated([report for _, report in read])
    differences = measured(found)
    sources = [
        f"- {folder.name}: code {report['provenance']['code_sha256'][:8]}, torch {report['provenance']['versions']['torch']}, "
        f"{report['provenance']['device']}"
        for folder, report in read
    ]
    text = table(differences) + "\n\nThe first named minus the others, where both have the run. Over all, the runs count as independent.\n\n"
    contents = {"reports": [folder.name for folder, _ in read], "arms": found}
    contents |= {"differences": differences, "mean of the absolute differences": mean(map(abs, differences["all"]["differences"]))}
    write_table(read[0][0], "repeats", contents, text + "\n".join(sources))


if __name__ == "__main__":
    run(main)
