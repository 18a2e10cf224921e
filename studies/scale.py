"""The difference by size of the model: python studies/scale.py results/gpt2_350m results/gpt2_25m ...

Reads the report.json of comparisons, each of one size of a text model, and writes scale.json, scale.md and scale.png into the first directory: for
every size and learning rate the endpoint of A and of the arms with diffusion and their paired difference over the seeds that both have, and, where a
size has been run at several rates, the difference with each arm at its best one, which the same seeds choose. All runs must see the same tokens in
the same number of steps, and differ in size, in rate and in what diffuses alone.
"""

from fractions import Fraction
from pathlib import Path
from statistics import mean

from across import endpoints, together
from reports import read_reports, run, unlike, write_table
from tuned import spelled

from configurator import InputError

SIZE = ("n_layer", "n_head", "n_embd")
FREE = SIZE + ("batch_size", "gradient_accumulation_steps", "eval_interval", "learning_rate", "out_dir", "seed")


def parameters(config: dict) -> int:
    """Weights of a GPT of this recipe, with the output layer's, which are the token table's. Raises KeyError, TypeError."""
    C, L = config["n_embd"], config["n_layer"]
    return 12 * L * C * C + (config["vocab_size"] + config["block_size"] + 2 * L + 1) * C


def kind(config: dict) -> str:
    """What diffuses: none, all or so many of the heads of every layer, or those layer by layer."""
    if not config["diffusion"]:
        return "A"
    heads = config.get("diffusion_heads") or [config["n_head"]]
    if len(set(heads)) > 1:
        return f"A − I in {', '.join(map(str, heads))} heads"
    share = Fraction(heads[0], config["n_head"])
    return "A − I" if share == 1 else f"A − I in {'half' if share == Fraction(1, 2) else share} of the heads"


def read_sizes(reports: list[dict]) -> dict[int, dict]:
    """{parameters: {rate: {kind: {seed: endpoint}}}}, ascending. Raises InputError."""
    of_size, others = {}, []
    try:
        for report in reports:
            configs = list(report["provenance"]["configs"].values())
            if unlike([{key: config[key] for key in SIZE} for config in configs]):
                raise InputError("a report has arms of several sizes: a comparison has one")
            of_size.setdefault(parameters(configs[0]), []).append(report)
            for config in configs:
                fixed = {key: value for key, value in config.items() if key not in FREE and not key.startswith("diffusion")}
                others.append(fixed | {"tokens a step": config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]})
                others[-1] |= {"data": report["provenance"]["data_sha256"], "endpoint": report["endpoint"]}
        if reports[0]["endpoint"] not in ("best", "last"):
            raise InputError(f"the reports are about {reports[0]['endpoint']}: this table is of the losses of text models")
        if keys := unlike(others):
            raise InputError(f"the reports differ in other keys too, {keys}: sizes are compared by what is otherwise equal")
        found = {}
        for size, group in sorted(of_size.items()):
            rates = found.setdefault(size, {})
            configs = {name: config for report in group for name, config in report["provenance"]["configs"].items()}
            for name, values in endpoints(together(group)).items():
                arm = rates.setdefault(configs[name]["learning_rate"] + 0.0, {}).setdefault(kind(configs[name]), {})
                if twice := arm.keys() & values.keys():
                    raise InputError(f"two arms of {size:,} parameters diffuse alike at one rate, {kind(configs[name])}, both on seed {min(twice)}")
                arm |= values
        if len(found) < 2:
            raise InputError("the reports are of one size: there is nothing to compare it with")
        return {size: dict(sorted(rates.items())) for size, rates in found.items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"a report is not one of compare.py ({type(error).__name__}: {error})") from None


def at_best(rates: dict[float, dict], arm: str) -> tuple[str, dict, dict] | None:
    """(rates in words, {seed: endpoint} of A, the same of `arm`), each at its best of the rates that both ran on most seeds, or, where that is one
    rate alone, of all that both ran, on the seeds that these share; None without several rates or a seed."""
    seeds = {rate: arms["A"].keys() & arms[arm].keys() for rate, arms in rates.items() if {"A", arm} <= arms.keys()}
    most = max(seeds.values(), key=len, default=set())
    some = {rate for rate in seeds if seeds[rate] >= most}
    some = some if len(some) > 1 else seeds.keys()
    common = sorted(set.intersection(*(set(seeds[rate]) for rate in some))) if some else []
    if len(some) < 2 or not common:
        return None
    a, b = (min(sorted(some), key=lambda rate: mean(rates[rate][name][seed] for seed in common)) for name in ("A", arm))
    return f"best: {spelled(a)} for A, {spelled(b)} for the arm", *(
        {seed: rates[rate][name][seed] for seed in common} for rate, name in ((a, "A"), (b, arm))
    )


def entries(sizes: dict[int, dict]) -> list[dict]:
    """A row for every size, rate and arm with diffusion: size, rate, arm, seeds, both losses and the paired difference. Raises InputError."""
    from report import paired_difference, summary

    found = []
    for size, rates in sizes.items():
        for arm in dict.fromkeys(name for arms in rates.values() for name in arms if name != "A"):
            lines = [(spelled(rate), arms["A"], arms[arm]) for rate, arms in rates.items() if {"A", arm} <= arms.keys()]
            best = at_best(rates, arm)
            for rate, a, b in [*lines, best] if best else lines:
                if seeds := sorted(a.keys() & b.keys()):
                    found.append({"parameters": size, "rate": rate, "at_best": (rate, a, b) == best, "arm": arm, "seeds": seeds})
                    a, b = ([losses[seed] for seed in seeds] for losses in (a, b))
                    found[-1] |= {"A": summary(a), "loss": summary(b)} | paired_difference(a, b)
    if not found:
        raise InputError("no size has A and an arm with diffusion at one rate and seed: there is no difference to show")
    return found


def table(found: list[dict], reports: list[dict]) -> str:
    """As Markdown, with what differs between the reports besides."""
    from tabulate import tabulate

    from report import ENDPOINTS, estimate, spread

    rows = []
    for entry in found:
        size, numbers = f"{entry['parameters'] / 1e6:,.0f} M", (spread(entry["A"]), spread(entry["loss"]), estimate(entry).replace("-", "−"))
        rows.append([size, entry["rate"], entry["arm"], ", ".join(map(str, entry["seeds"])), *numbers])
    headers = ["parameters", "learning rate", "arm", "seeds", f"A: {ENDPOINTS[reports[0]['endpoint']][0]}", "the arm: the same", "difference"]
    text = tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n\n"
    text += "A difference of three pairs or fewer is a hint, one of a single pair not even that. The intervals are not corrected for their number."
    codes, devices = (list(dict.fromkeys(report["provenance"][key] for report in reports)) for key in ("code_sha256", "device"))
    text += f" All runs are from {' and '.join(devices)}"
    text += "." if len(codes) == 1 else f", by {len(codes)} versions of the code ({', '.join(code[:8] for code in codes)})."
    return text + "\n\n![by size](scale.png)\n"


def draw(path: Path, found: list[dict]):
    """Differences over parameters, of the arms run at most sizes; rates side by side in colours, every seed a point, with mean and interval."""
    import numpy as np

    from figures import plt, save_figure

    sizes_of: dict[str, set] = {}
    for entry in found:
        sizes_of.setdefault(entry["arm"], set()).add(entry["parameters"])
    kinds = [kind for kind in sizes_of if len(sizes_of[kind]) == max(map(len, sizes_of.values()))]
    figure, all_axes = plt.subplots(1, len(kinds), figsize=(2 + 4 * len(kinds), 4), layout="constrained", sharey=True, squeeze=False)
    shown = [entry for entry in found if not entry["at_best"]]
    rates = sorted({entry["rate"] for entry in shown}, key=float)
    for axes, name in zip(all_axes[0], kinds):
        for place, rate in enumerate(rates):
            of_rate = [entry for entry in shown if entry["arm"] == name and entry["rate"] == rate]
            x = np.array([entry["parameters"] for entry in of_rate]) * 1.06 ** (place - (len(rates) - 1) / 2)
            axes.plot(x, [entry["mean"] for entry in of_rate], "D", color=f"C{place}", label=f"rate {rate}")
            for at, entry in zip(x, of_rate):
                axes.plot(np.full(entry["n"], at), entry["differences"], "o", color=f"C{place}", alpha=0.4, markersize=4)
                axes.annotate(f"n = {entry['n']}", (at, entry["mean"]), (6, -3), textcoords="offset points", fontsize=7)
                if entry["n"] > 2:  # of two pairs it would hide the rest
                    axes.plot([at, at], entry["interval"], color=f"C{place}", linewidth=3, alpha=0.5)
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
        sizes = sorted(sizes_of[name])
        axes.set(xscale="log", xlim=(0.8 * sizes[0], 1.25 * sizes[-1]), xlabel="parameters", title=name)
        axes.set_xticks(sizes, labels=[f"{size / 1e6:,.0f} M" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    all_axes[0][0].set_ylabel("difference from A, nats (below 0: the arm is better)")
    save_figure(path, figure)


def main(arguments: list[str]):
    """Raises InputError."""
    reports = read_reports(arguments, __doc__, 2, 9)
    of = [report for _, report in reports]
    found, folder = entries(read_sizes(of)), reports[0][0]
    contents = {"reports": [folder.name for folder, _ in reports], "endpoint": of[0]["endpoint"]}
    contents["arms"] = {f"{e['arm']}, {e['parameters']}, {e['rate']}": e for e in found}
    write_table(folder, "scale", contents, table(found, of))
    draw(folder / "scale.png", found)


if __name__ == "__main__":
    run(main)
