"""What the branches add and where heads look, arm by arm: python studies/branches.py results/gpt2

Reads report.json of a comparison with --probe_interval and the records probe.jsonl of its cells, which lie beside it where it was made (cells are
not committed), and writes branches.json and branches.md. For the first and the last record of every run, averaged over layers and heads, then over
seeds with their standard deviation:

    attention, mlp      RMS of what the sub-layer adds, as a share of the tokens' before the block; the first layer apart from the others
    diagonal            mass of A on its diagonal without the first layer, of plain heads and of diffusing ones: a diffusing head that looks at its
                        own token alone adds nothing
"""

from pathlib import Path
from types import SimpleNamespace

from reports import read_report, run, write_table

from configurator import InputError

QUANTITIES = ("attention, first layer", "attention, others", "mlp, first layer", "mlp, others", "diagonal, plain heads", "diagonal, diffusing heads")


def measure(values: dict, config: dict) -> dict[str, float | None]:
    """One record of probe.py -> QUANTITIES; None where there is no such head."""
    from model import diffusing_heads

    layers, H, form = range(config["n_layer"]), config["n_head"], SimpleNamespace(**config)
    sums: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for layer in layers:
        where = "first layer" if layer == 0 else "others"
        for branch in ("attention", "mlp"):
            sums[f"{branch}, {where}"].append(values[f"layer {layer} {branch}_rms"] / values[f"layer {layer} stream_rms"])
        for head in range(H) if layer else ():
            kind = "diffusing" if head >= H - diffusing_heads(form, layer) else "plain"
            sums[f"diagonal, {kind} heads"].append(values[f"layer {layer} head {head} diagonal"])
    return {name: sum(some) / len(some) if some else None for name, some in sums.items()}


def read(folder: Path, report: dict) -> dict:
    """{arm: {"first" or "last": {"step", and for each of QUANTITIES mean, sd and n over seeds}}}. Raises InputError."""
    from probe import read_record
    from report import summary

    found = {}
    if not (folder / "cells").is_dir():
        raise InputError(f"{folder / 'cells'}, where the probes lie, is missing: run this where the comparison was made (cells are not committed)")
    try:
        for name, arm in report["arms"].items():
            config = report["provenance"]["configs"][name]
            records = [read_record(folder / "cells" / name / f"seed-{cell['seed']}") for cell in arm["cells"] if "diverged_at" not in cell]
            found[name] = {}
            for end, at in (("first", 0), ("last", -1)):
                if len({rows[at]["step"] for rows in records}) > 1:
                    raise InputError(f"the {end} records of the runs of {name} are of different steps: make all with the same --probe_interval")
                measured = [measure(rows[at]["values"], config) for rows in records]
                entry = {what: summary([one[what] for one in measured if one[what] is not None]) for what in QUANTITIES}
                found[name][end] = {"step": records[0][at]["step"]} | entry
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"the report is not one of a comparison with --probe_interval ({type(error).__name__}: {error})") from None
    return found


def table(found: dict) -> str:
    """The numbers as Markdown."""
    from tabulate import tabulate

    from report import spread

    rows = [[name, end["step"], *(spread(end[what], 3) for what in QUANTITIES)] for name, ends in found.items() for end in ends.values()]
    return tabulate(rows, ["arm", "step", *QUANTITIES], tablefmt="github", disable_numparse=True)


def main(arguments: list[str]):
    """Raises InputError."""
    folder, report = read_report(arguments, __doc__)
    found = read(folder, report)
    write_table(folder, "branches", found, table(found))


if __name__ == "__main__":
    run(main)
