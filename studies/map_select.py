"""Stage 1 of the barrier study decides stage 2: python studies/map_select.py results/map_selection

Reads report.json of the selection (studies/map.md) and prints a table of its arms, the setting that the rule takes of each form and control, and the
commands of stage 2. The rule: of a form the setting with the largest gain on embedding noise of 1 RMS among those that cost at most 1.7 % of the
clean loss, else the one that costs least; the same for embedding noise and for label smoothing alone, and embedding noise alone as strong as in the
variational form, if that is another; of dropout and weight decay the setting whose clean loss is nearest to that of the best form.
"""

import shlex
from pathlib import Path

from reports import COST, ENDPOINTS, read_report, run

from configurator import InputError

REGULARISED = "dropout or weight decay"


def group_of(word: str, config: dict, baseline: dict) -> str:
    """An arm's form or control: its config file (the full prior, with its energy, apart), or the key in which it differs from the baseline."""
    if config["prior_lambda"]:
        form = "barrier" + Path(shlex.split(word)[0]).stem.partition("_barrier")[2]
        return form + "_energy" if form == "barrier" and config["prior_energy"] else form
    for key in ("embed_noise", "label_smoothing"):
        if config[key] != baseline[key]:
            return key
    return REGULARISED


def read_arms(report: dict) -> list[dict]:
    """One {word, group, cost in per cent, gain, embed_noise} per arm but the baseline; gain is None where it could not be told. Raises InputError."""
    try:
        words = [word for word in shlex.split(report["provenance"]["command"])[2:] if not word.startswith("--")]
        configs, pairs = report["provenance"]["configs"], report["pairs"]
        baseline = configs[next(iter(configs))]
        if any(config["prior_detach"] for config in configs.values()):
            raise InputError("the report has arms with prior_detach, the cut control: it is not the selection's")
        arms = []
        for word, (name, config) in list(zip(words, configs.items(), strict=True))[1:]:
            pair = pairs[name]
            arm = {
                "word": word,
                "group": group_of(word, config, baseline),
                "cost": pair["clean_percent"]["mean"],
                "gain": pair["gains"][ENDPOINTS[0]]["mean"],
                "embed_noise": config["embed_noise"],
            }
            if arm["cost"] is not None:  # else every run diverged
                arms.append(arm)
        return arms
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise InputError("the report is not one of compare.py with --evaluate=perturb") from None


def select(arms: list[dict]) -> dict[str, dict]:
    """{group: the arm that the rule takes}. Raises InputError when a report has no form."""
    groups = {}
    for arm in arms:
        groups.setdefault(arm["group"], []).append(arm)
    regularised, chosen = groups.pop(REGULARISED, []), {}
    for group, some in groups.items():
        cheap = [arm for arm in some if arm["cost"] <= COST and arm["gain"] is not None]
        chosen[group] = max(cheap, key=lambda arm: arm["gain"]) if cheap else min(some, key=lambda arm: arm["cost"])
    if "barrier_noise" in chosen:
        strength = chosen["barrier_noise"]["embed_noise"]
        same = [arm for arm in groups.get("embed_noise", []) if arm["embed_noise"] == strength and arm is not chosen["embed_noise"]]
        if same:
            chosen["embed_noise, as strong"] = same[0]
    forms = [arm for group, arm in chosen.items() if group.startswith("barrier") and arm["gain"] is not None]
    if not forms:
        raise InputError("no arm of the report has a barrier and a gain: nothing to select")
    if regularised:
        best = max(forms, key=lambda arm: arm["gain"])
        chosen[REGULARISED] = min(regularised, key=lambda arm: abs(arm["cost"] - best["cost"]))
    return chosen


def commands(baseline: str, chosen: dict[str, dict]) -> str:
    """Stage 2 for the text of the selection, which overfits after 2000 steps, and for WikiText-2's characters."""
    words, prefix, lines = [baseline, *(arm["word"] for arm in chosen.values())], baseline.removesuffix(".py"), []
    for config, options in ((prefix, "--max_iters=2000"), ("config/wikitext2_char", "--max_iters=3000 --eval_tokens=131072")):
        arms = " ".join(f'"{word.replace(prefix, config, 1)}"' for word in words)
        lines.append(f"python compare.py {arms} {options} --seeds=5 --evaluate=perturb,margins --out_dir=results/map_{Path(config).name}")
    return "\n".join(lines)


def main(arguments: list[str]):
    """Raises InputError."""
    from tabulate import tabulate

    _, report = read_report(arguments, __doc__)
    arms = read_arms(report)
    chosen = select(arms)
    rows = [
        [
            arm["word"],
            f"{arm['cost']:+.2f} %",
            "-" if arm["gain"] is None else f"{100 * arm['gain']:+.1f} %",
            "taken" if arm in chosen.values() else "",
        ]
        for arm in arms
    ]
    print(tabulate(rows, ["arm", "clean loss", f"gain, {ENDPOINTS[0]}", ""], tablefmt="github", disable_numparse=True))
    baseline = [word for word in shlex.split(report["provenance"]["command"])[2:] if not word.startswith("--")][0]
    print(f"\n{commands(baseline, chosen)}")


if __name__ == "__main__":
    run(main)
