"""Arms of several comparisons, every pair of them: python studies/across.py results/gpt2_own_rates results/gpt2

Reads the report.json of each and writes across.json and across.md into the first directory: the endpoint of every arm, and the paired difference of
every two over the seeds that both have; arms without diffusion come first. Refuses reports that do not belong together: other data, endpoint, torch
or kind of device, an arm that is in two of them, a key of the recipe that differs though no report tells its arms apart by it. Code may differ, and
then the table says so.
"""

import itertools
import json

from reports import read_reports, run

from configurator import InputError


def together(reports: list[dict]) -> tuple[str, dict[str, dict[int, float]], bool]:
    """(endpoint, {arm: {seed: its value}}, whether all reports are of the same code). Raises InputError."""
    from compare import ENDPOINTS, HARMLESS

    def alike(what: str, values: list):
        if any(value != values[0] for value in values):
            raise InputError(f"the reports differ in {what}: {' and '.join(dict.fromkeys(map(str, values)))}")

    arms, configs = {}, []
    try:
        endpoint = reports[0]["endpoint"]
        _, key, _, _ = ENDPOINTS[endpoint]
        alike("endpoint", [report["endpoint"] for report in reports])
        sources = [report["provenance"] for report in reports]
        alike("data", [source["data_sha256"] for source in sources])
        alike("torch", [source["versions"]["torch"] for source in sources])
        alike("device", [source["device"] for source in sources])
        for report, source in zip(reports, sources):
            for name, arm in report["arms"].items():
                if name in arms:
                    raise InputError(f"arm {name} is in two of the reports")
                arms[name] = {cell["seed"]: cell[key] + 0.0 for cell in arm["cells"] if "diverged_at" not in cell}
            configs.append([{k: v for k, v in source["configs"][name].items() if k not in HARMLESS} for name in report["arms"]])
        tell = {k for some in configs for one, other in itertools.pairwise(some) for k in one if one[k] != other[k]}
        for k in configs[0][0]:
            if k not in tell:
                alike(k, [config[k] for some in configs for config in some])
        same = len({source["code_sha256"] for source in sources}) == 1
        diffuses = {name: source["configs"][name]["diffusion"] for report, source in zip(reports, sources) for name in report["arms"]}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"a report is not one of compare.py ({type(error).__name__}: {error})") from None
    return endpoint, {name: arms[name] for name in sorted(arms, key=diffuses.get)}, same


def differences(arms: dict[str, dict[int, float]]) -> dict[str, dict]:
    """{"b − a": paired difference of arm b from arm a over their common seeds}, a before b."""
    from compare import paired_difference

    found = {}
    for (a, of_a), (b, of_b) in itertools.combinations(arms.items(), 2):
        seeds = sorted(of_a.keys() & of_b.keys())
        found[f"{b} − {a}"] = {"arm": b, "baseline": a, "seeds": seeds} | paired_difference([of_a[s] for s in seeds], [of_b[s] for s in seeds])
    return found


def tables(endpoint: str, arms: dict, pairs: dict, same: bool) -> str:
    """Both as Markdown, with a word on the code."""
    from tabulate import tabulate

    from compare import ENDPOINTS, summary

    rows = []
    for name, values in arms.items():
        of = summary(list(values.values()))
        spread = "" if of["sd"] is None else f" ± {of['sd']:.4f}"
        rows.append([name, of["n"], "-" if of["mean"] is None else f"{of['mean']:.4f}{spread}"])
    text = tabulate(rows, ["arm", "n", ENDPOINTS[endpoint][0]], tablefmt="github", disable_numparse=True) + "\n\n"
    rows = []
    for name, pair in pairs.items():
        interval = "{:+.4f} to {:+.4f}".format(*pair["interval"]) if pair["interval"] else "-"
        rows.append([name, pair["n"], "-" if pair["mean"] is None else f"{pair['mean']:+.4f}", interval])
    text += tabulate(rows, ["difference", "pairs", "mean", "95 % t interval"], tablefmt="github", disable_numparse=True) + "\n\n"
    return text + ("All by the same code.\n" if same else "The reports are of different versions of the code.\n")


def main(arguments: list[str]):
    """Raises InputError."""
    found = read_reports(arguments, __doc__, 2, 9)
    endpoint, arms, same = together([report for _, report in found])
    pairs = differences(arms)
    from dataset import write_file

    text = tables(endpoint, arms, pairs, same)
    contents = {"reports": [folder.as_posix() for folder, _ in found], "endpoint": endpoint, "same_code": same, "arms": arms, "pairs": pairs}
    write_file(found[0][0] / "across.json", (json.dumps(contents, indent=1) + "\n").encode())
    write_file(found[0][0] / "across.md", text.encode())
    print(text, end="")


if __name__ == "__main__":
    run(main)
