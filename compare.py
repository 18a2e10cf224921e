"""Is the change real? Arms x seeds -> a paired table, an interval, a verdict in one sentence, and figures.

    python compare.py config/quick.py config/quick_laplacian.py --seeds=3
    python compare.py config/quick.py "config/quick_laplacian.py --learning_rate=2e-3" --seeds=5 --max_iters=500
    torchrun --standalone --nproc_per_node=8 compare.py config/shakespeare_char.py config/shakespeare_char_laplacian.py --seeds=16

An arm is a config file, in quotes with options of its own; the first arm is the baseline. Options outside the quotes hold for all arms. Seed s of one
arm is paired with seed s of the baseline: both start from the same weights of the parameters they share and see the same batches.

An arm may start from weights, --init_from=PATH in its quotes; {seed} in the path is the cell's seed: "config/x.py --init_from=runs/seed-{seed}/best".

A cell is one arm with one seed. Its result is written when its run has finished, so a killed comparison goes on with the others; one that is
interrupted, by Ctrl-C or SIGTERM, goes on inside its cells. torchrun spreads the cells over its processes. Cells made with other keys, data, code or
device are refused, never mixed.

The rules: the endpoint is named before the runs (--endpoint); every cell is reported; a run that diverges is counted as such and never averaged;
the interval is the paired t interval (bootstrap intervals are too narrow for ten seeds or fewer); the p value is the exact sign-flip test's, which
cannot go below 0.05 with fewer than six seeds.

With --evaluate=perturb every cell's best weights meet the perturbations of evaluate.py, the same ones in every cell. The robustness gain of an arm
is 1 - delta(arm) / delta(baseline), delta = perturbed - clean loss, computed for each seed; its interval is the t interval of these gains.
"""

import dataclasses
import hashlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import InputError, TrainConfig, check_keys, configure, field_names, one_line_errors, quit_on_interrupt, split_arguments
from configurator import build as build_config


@dataclass(frozen=True)
class CompareConfig:
    """Compare arms over paired seeds: python compare.py CONFIG.py "CONFIG.py --key=value" ... [--seeds=N] [any key of train.py, for all arms]"""

    seeds: int = 3  # seeds per arm
    first_seed: int = 1  # seeds are first_seed, first_seed + 1, ...
    endpoint: str = "best"  # what the verdict is about: best or last validation loss of a run; top1 or top5 of the last evaluation of pictures
    out_dir: str = ""  # cells, report and figures; empty: out-compare- and the arms' names
    save_checkpoints: bool = False  # keep last/ and best/ of every cell
    evaluate: str = ""  # perturb, margins or both: examine the best weights of every cell with evaluate.py, on the arm's eval_tokens

    def check(self) -> "CompareConfig":
        """Raises InputError for a value out of range; returns self."""
        if not 1 <= self.seeds <= 10000:
            raise InputError(f"--seeds={self.seeds} must be between 1 and 10000")
        if self.first_seed < 0:
            raise InputError(f"--first_seed={self.first_seed} must not be negative")
        if self.endpoint not in ("best", "last", "top1", "top5"):
            raise InputError(f"--endpoint={self.endpoint} must be best or last, or for pictures top1 or top5")
        if not set(self.evaluators) <= {"perturb", "margins"} or len(set(self.evaluators)) < len(self.evaluators):
            raise InputError(f"--evaluate={self.evaluate} must be perturb, margins, or perturb,margins")
        return self

    @property
    def evaluators(self) -> list[str]:
        """The words of --evaluate."""
        return self.evaluate.split(",") if self.evaluate else []


def parse(arguments: list[str]) -> tuple[CompareConfig, dict[str, TrainConfig]]:
    """Command line -> (the comparison, {arm's name: its config}), in the order given. Raises InputError."""
    words, options = split_arguments(arguments)
    ours = field_names(CompareConfig)
    known = ours + [key for key in field_names(TrainConfig) if key != "seed" or ("seed" in dict(options))]
    check_keys([key for key, _ in options], known)
    if "init_from" in dict(options):
        raise InputError("--init_from is not an option of a comparison: give it to an arm, in its quotes or its config file")
    comparison = build_config(CompareConfig, [], [(key, value) for key, value in options if key in ours])
    shared = [(key, value) for key, value in options if key not in ours]
    arms = {}
    for word in words:
        try:  # a path with a space is a file, not an arm with options
            files, own = ([word], []) if Path(word).is_file() else split_arguments(shlex.split(word))
        except ValueError as error:
            raise InputError(f"arm {word!r} cannot be split into words: {error}") from None
        if not files or not all(file.endswith(".py") for file in files):
            raise InputError(f"arm {word!r} does not begin with a config file: CONFIG.py or 'CONFIG.py --key=value'")
        for key in ("seed", "out_dir", "overwrite"):
            if key in dict(own + shared):
                raise InputError(f"--{key} is not for an arm: the comparison has --seeds, --first_seed and an --out_dir of its own")
        shown = [f"{key}={value[-60:]}" for key, value in own]  # the end of a path tells more than its beginning
        name = re.sub(r"[^\w.=,+-]+", "_", " ".join([Path(file).stem for file in files] + shown))
        if name in arms:
            raise InputError(f"arm {name!r} is given twice: arms are named by their files and options")
        arms[name] = build_config(TrainConfig, files, shared + own)
        if arms[name].init_from == "resume" or arms[name].eval_only:
            raise InputError(f"arm {name!r}: a comparison trains every cell from its start; take out init_from='resume' and eval_only")
        if "margins" in comparison.evaluators and not arms[name].plain_attention:
            raise InputError(f"arm {name!r}: --evaluate=margins is for attention_kernel=softmax, head_combine=concat and no diffusion_learned")
    if len(arms) < 2:
        raise InputError(f"{len(arms)} arm(s) given: a comparison needs a baseline and at least one more config")
    if not comparison.out_dir:
        name = "out-compare-" + "-".join(arms)
        if len(name) > 120:  # a cut name alone would be that of other arms too
            name = f"{name[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        comparison = dataclasses.replace(comparison, out_dir=name)
    return comparison, arms


if __name__ == "__main__":  # before torch is imported
    with one_line_errors():
        if {"--help", "-h"} & set(sys.argv[1:]):
            configure(CompareConfig, ["--help"])
        quit_on_interrupt()
        command_line = parse(sys.argv[1:])

import gc
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import textwrap
import time
from datetime import timedelta

import matplotlib
import numpy as np
import scipy
import torch
import torch.distributed as dist
from scipy import stats
from tabulate import tabulate

import checkpoint
import evaluate
from dataset import ROOT, incomplete, prepare_if_missing, read_meta, sha256_of, write_file
from evaluate import save_figure
from place import find_place, say
from train import SCHEDULE, Diverged, Interrupted, build, check_prior, rescheduled, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# --endpoint: what it is called, its key in a cell's result, its unit, and +1 where more is better
ENDPOINTS = {
    "best": ("best validation loss", "best_val_loss", " nats", -1),
    "last": ("last validation loss", "val_loss", " nats", -1),
    "top1": ("last top-1 accuracy", "top1", "", 1),
    "top5": ("last top-5 accuracy", "top5", "", 1),
}
# keys that cannot change a run's losses, so a cell may be used again when they differ; data and device are told by checksum and name
HARMLESS = {"out_dir", "overwrite", "seed", "dataset", "log_interval", "always_save_checkpoint", "device", "eval_only", "probe_interval"}
HARMLESS |= {"wandb_log", "wandb_project", "wandb_run_name"}
BUDGET = ("max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "eval_tokens")  # what makes a comparison one of more than the arms
SHARED = SCHEDULE | HARMLESS - {"dataset", "device"} | {"eval_interval"}  # keys by which arms of one program may differ
FRONTIER = ("noise 1 RMS", "attack 0.1, 10 steps")  # the perturbations of frontier.png


# ---------------------------------------------------------------------------------------------------------------------------------
# Cells


def code_sha256() -> str:
    """One checksum of the files that decide a run's numbers."""
    names = (
        "model.py",
        "variants.py",
        "prior.py",
        "fused.py",
        "fused_attention.py",
        "fused_mlp.py",
        "fused_mlp_hopper.py",
        "fused_prior.py",
        "operators.py",
        "dataset.py",
        "train.py",
        "optimizer.py",
        "parallel.py",
        "onednn.py",
        "place.py",
        "checkpoint.py",
    )
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()


def fingerprint(config: TrainConfig, data: dict, device: str, evaluators: list[str]) -> dict:
    """What decides a cell's numbers besides its seed: keys, data, code, torch and device, and what it was examined with."""
    keys = {key: value for key, value in dataclasses.asdict(config).items() if key not in HARMLESS}
    if evaluators:
        keys |= {"evaluate": sorted(evaluators), "evaluate_code": hashlib.sha256((ROOT / "evaluate.py").read_bytes()).hexdigest()}
    everything = keys | data | {"code": code_sha256(), "torch": torch.__version__, "device": device, **given_weights(config.init_from)}
    return json.loads(json.dumps(everything))  # as it will be read back: tuples are lists


def of_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """The config of one cell: {seed} in init_from is its seed."""
    return dataclasses.replace(config, init_from=config.init_from.replace("{seed}", str(seed)))


def sharing(arms: dict[str, TrainConfig]) -> list[list[str]]:
    """The arms in groups that one program serves: those that differ in keys which it reads anew at every step, as a learning rate, or never."""
    groups = {}
    for name, config in arms.items():
        fixed = {key: value for key, value in dataclasses.asdict(config).items() if key not in SHARED}
        groups.setdefault(json.dumps(fixed), []).append(name)
    return list(groups.values())


def given_weights(init_from: str) -> dict:
    """One checksum of the files that init_from names; nothing for a start from scratch or a name that transformers knows."""
    path = Path(init_from)
    if init_from in ("scratch", *checkpoint.PRETRAINED):
        return {}
    if not path.exists():  # before any cell is run
        raise InputError(f"--init_from={init_from} of an arm does not exist")
    files = sorted(path.glob("*.json")) + sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {"init_sha256": hashlib.sha256("".join(file.name + sha256_of(file) for file in files).encode()).hexdigest()}


def read_cell(path: Path, expected: dict) -> dict | None:
    """A finished cell's result, None when there is none yet. Raises InputError for a cell that is damaged or made differently."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        made, result = cell["fingerprint"], cell["result"]
        if not isinstance(made, dict) or not isinstance(result, dict):
            raise TypeError("fingerprint or result")
        if "diverged_at" not in result and not {"best_val_loss", "val_loss", "best_step", "seconds", "ms", "tokens_per_s", "curve"} <= result.keys():
            raise KeyError("result")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cell {path} is damaged ({type(error).__name__}): remove it and run the comparison again") from None
    if made != expected:
        raise InputError(f"cell {path} was made with {unlike(made, expected)}: choose another --out_dir or remove it")
    return result


def unlike(made: dict, expected: dict) -> str:
    """The first key in which two fingerprints differ, in words."""
    key = min(key for key in made.keys() | expected.keys() if made.get(key) != expected.get(key))
    return f"{key}={made.get(key)}, now it is {expected.get(key)}"


def check_out_dir(out_dir: Path, arms: dict[str, TrainConfig], seeds: range):
    """Raises InputError where a run of train.py would be in the way, or a report be lost that its directory's cells cannot make again.

    Where the cells are gone, as those of a committed report are, the same comparison may be made again: all its arms, recipes and seeds.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"--out_dir={out_dir} is a file: name a directory")
    if (out_dir / "metrics.jsonl").exists():
        raise InputError(f"--out_dir={out_dir} holds a run of train.py: name another directory for the comparison")
    try:
        report = json.loads((out_dir / "report.json").read_text(encoding="utf-8"))
        cells = {(name, cell["seed"]) for name, arm in report["arms"].items() for cell in arm["cells"]}
        recipes = {
            name: {key: value for key, value in config.items() if key not in HARMLESS} for name, config in report["provenance"]["configs"].items()
        }
    except FileNotFoundError:
        if (out_dir / "report.md").exists():
            raise InputError(f"--out_dir={out_dir} holds a report.md of something else: name another directory for the comparison") from None
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--out_dir={out_dir} holds a report.json of something else: name another directory for the comparison") from None
    if all((out_dir / "cells" / name / f"seed-{seed}" / "result.json").is_file() for name, seed in cells):
        return
    ours = {name: json.loads(json.dumps(dataclasses.asdict(config))) for name, config in arms.items()}
    if recipes.keys() != arms.keys():
        what = f"other arms, {', '.join(list(recipes)[:2])}" + ", ..." * (len(recipes) > 2)
    elif changed := sorted({key for name, recipe in recipes.items() for key, value in recipe.items() if ours[name].get(key, value) != value}):
        what = f"these arms with other values of {', '.join(changed)}"
    elif missing := sorted({seed for _, seed in cells} - set(seeds)):
        what = f"more seeds, {', '.join(map(str, missing[:5]))}"
    else:
        return
    raise InputError(f"--out_dir={out_dir} holds a report of {what}, and not its cells: it would be lost, so name another directory")


def interrupted_at(directory: Path, expected: dict, save: bool) -> int | None:
    """The step at which a cell can go on: that of its last/ if it is whole; None for a start from step 0.

    With `save` best/ must be there too, unless no evaluation has beaten the first. Raises InputError for a checkpoint of another run.
    """
    try:
        meta = checkpoint.readable(directory / "last")
    except InputError:
        return None
    made = meta.get("fingerprint")
    if isinstance(made, dict) and made != expected:
        again = "give the same command to go on, choose another --out_dir, or remove the cell"
        raise InputError(f"cell {directory} was interrupted at step {meta['step']} with {unlike(made, expected)}: {again}")
    lacks_best = save and meta.get("best_step") and not (directory / "best" / "checkpoint.json").is_file()
    return None if lacks_best or made is None else meta["step"]


def run_cells(comparison: CompareConfig, arms: dict[str, TrainConfig]) -> dict[str, list[dict]]:
    """Runs the cells that are not there yet, arms that can share a program do; under torchrun this process's share. Returns results per arm."""
    out_dir = Path(comparison.out_dir)
    seeds = range(comparison.first_seed, comparison.first_seed + comparison.seeds)
    check_out_dir(out_dir, arms, seeds)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cells = [(name, seed) for name in arms for seed in seeds]
    path = {cell: out_dir / "cells" / cell[0] / f"seed-{cell[1]}" / "result.json" for cell in cells}
    place = {name: find_place(config.device, config.dtype, distributed=False) for name, config in arms.items()}
    for dataset in {config.dataset for config in arms.values()}:
        prepare_if_missing(dataset)
    data = {name: data_checksum(config.dataset) for name, config in arms.items()}
    for name in arms:
        if data[name] != data[cells[0][0]]:
            raise InputError(f"arm {name!r} reads other data than {cells[0][0]!r}: their losses cannot be compared")
        check_prior(arms[name], read_meta(arms[name].dataset)[1]["kind"] == "pictures")
        if comparison.endpoint in ("top1", "top5") and read_meta(arms[name].dataset)[1]["kind"] != "pictures":
            raise InputError(f"--endpoint={comparison.endpoint} is for pictures: use best or last for --dataset={arms[name].dataset}")
    words = {name: place[name].name().partition(",")[0] for name in arms}
    expected = {(name, seed): fingerprint(of_seed(arms[name], seed), data[name], words[name], comparison.evaluators) for name, seed in cells}
    there = {cell: read_cell(path[cell], expected[cell]) for cell in cells}  # all are checked before any is run
    missing = [cell for cell in cells if there[cell] is None]
    save = comparison.save_checkpoints or bool(comparison.evaluators)
    onward = {cell: interrupted_at(path[cell].parent, expected[cell], save) for cell in missing}
    for cell in cells:
        made = there[cell] is not None and "diverged_at" not in there[cell]
        if comparison.save_checkpoints and made and not (path[cell].parent / "last").is_dir():
            raise InputError(f"cell {path[cell].parent} was made without --save_checkpoints=True: choose another --out_dir or remove it")
    if rank == 0:
        done = len(cells) - len(missing)
        say(f"data: {read_meta(arms[cells[0][0]].dataset)[1].get('source', 'unnamed')}")
        say(f"{len(arms)} arms x {len(seeds)} seeds = {len(cells)} runs, {done} of them finished before; {place[cells[0][0]].name()} -> {out_dir}")
        for one, other in itertools.combinations(arms, 2):
            if all(getattr(arms[one], key) == getattr(arms[other], key) for key in field_names(TrainConfig) if key not in HARMLESS):
                say(f"note: {one} and {other} are the same recipe by two names")
    # cut from all cells, since processes that start later see fewer missing ones, and into blocks, so that each process builds few programs
    groups = sharing(arms)
    ordered = [(name, seed) for names in groups for name in names for seed in seeds]
    share = np.array_split(np.arange(len(cells)), world)[rank]
    mine, finished, began = [ordered[i] for i in share if ordered[i] in missing], 0, time.perf_counter()
    for names in groups:
        own = [cell for cell in mine if cell[0] in names]
        if not own:
            continue
        began_group = time.perf_counter()
        kept = comparison.save_checkpoints or not comparison.evaluators  # else last/ is written once, and removed
        configs = {(name, seed): of_seed(arms[name], seed) for name, seed in own}
        for cell, config in configs.items():
            configs[cell] = dataclasses.replace(config, overwrite=True, always_save_checkpoint=config.always_save_checkpoint and kept)
        program = build(configs[own[0]], place[own[0][0]])
        if program.mode != "eager":
            program.evaluate()  # compiled here, not in the time of the first run of the program
        setup = time.perf_counter() - began_group
        for cell in own:
            if configs[cell].init_from != program.config.init_from:
                program = program._replace(weights=checkpoint.starting_weights(configs[cell])[1])
            program = rescheduled(program, **{key: getattr(configs[cell], key) for key in SHARED | {"init_from"}})
            directory, late, start = path[cell].parent, None, program
            step = onward[cell]
            if step is not None:
                start = program._replace(config=dataclasses.replace(program.config, init_from="resume"))
                say(f"{cell[0]}, seed {cell[1]}: goes on from step {step}")
            try:
                result = train(start, cell[1], directory, save=save, quiet=True, fingerprint=expected[cell])
                late = result.pop("signal")  # in the run's last step or evaluation
                if comparison.evaluators:
                    if late:  # its checkpoints are there to go on from
                        raise Interrupted(late, "before the evaluators")
                    result["evaluation"] = examine(comparison, program, directory)
                words = f"best {result['best_val_loss']:.4f} at step {result['best_step']}, last {result['val_loss']:.4f}, {result['seconds']:.1f} s"
            except Diverged as error:
                result, late, words = {"diverged_at": error.step}, error.signal, f"DIVERGED: {error}"
            result |= {"arm": cell[0], "seed": cell[1], "mode": program.mode}
            write_file(path[cell], (json.dumps({"fingerprint": expected[cell], "result": result}, indent=1) + "\n").encode())
            if not comparison.save_checkpoints:  # those of an interruption, or for evaluate.py
                checkpoint.remove(directory / "best")
                checkpoint.remove(directory / "last")
            finished += 1
            left = timedelta(seconds=round((time.perf_counter() - began) / finished * (len(mine) - finished)))
            say(f"[{finished}/{len(mine)}] {cell[0]}, seed {cell[1]}: {words}" + (f"; left about {left}" if finished < len(mine) else ""))
            if late:
                raise Interrupted(late, "after a finished run")
        say(f"{', '.join(dict.fromkeys(name for name, _ in own))}: {program.mode}, {setup:.1f} s to build")
        del program
        gc.collect()
        torch.compiler.reset()  # the compiler keeps a limited number of variants of one function, and the next program is another function
    if world > 1:
        ours = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would have to wait for the barrier's end
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()
        dist.destroy_process_group()
        signal.signal(signal.SIGINT, ours)
    return {name: [read_cell(path[name, seed], expected[name, seed]) for seed in seeds] for name in arms}


def examine(comparison: CompareConfig, program, directory: Path) -> dict:
    """evaluate.py's figures of a cell's best weights (its last ones where no evaluation beat the first)."""
    which = "best" if (directory / "best" / "checkpoint.json").is_file() else "last"
    model, _, _ = checkpoint.load_model(directory, which)
    place = program.place._replace(dtype=torch.float32)
    subject = evaluate.Subject(model.to(place.device), program.data, place, program.config.eval_tokens)
    wanted = {"clean": evaluate.clean} | {name: evaluate.EVALUATORS[name] for name in comparison.evaluators}
    return {"which": which, **evaluate.examine(subject, wanted, quiet=True)}


def data_checksum(dataset: str) -> dict:
    """sha256 of the two splits as meta.json states them (build checks them against the files)."""
    directory, meta = read_meta(dataset)
    try:
        checksums = {f"{name}_sha256": meta["splits"][name]["sha256"] for name in ("train", "val")}
        return checksums | {f"{name}_labels": entry["labels_sha256"] for name, entry in meta["splits"].items() if "labels_sha256" in entry}
    except (KeyError, TypeError) as error:
        raise incomplete(directory, error) from None


# ---------------------------------------------------------------------------------------------------------------------------------
# Statistics


def summary(values: list[float]) -> dict:
    """n, mean and standard deviation (n - 1 in the denominator; None for n < 2)."""
    return {"n": len(values), "mean": float(np.mean(values)) if values else None, "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def paired_difference(baseline: list[float], arm: list[float]) -> dict:
    """arm - baseline over paired seeds: mean, sd, 95 % t interval and the two-sided sign-flip p value, by scipy.stats.

    The sign-flip test enumerates all 2^n signs up to n = 16 (p is exact) and draws 100,000 beyond. interval and p are None for n < 2, or when all
    differences are equal, where t has no meaning.
    """
    difference = np.asarray(arm, dtype=float) - np.asarray(baseline, dtype=float)
    n = len(difference)
    result = summary(difference.tolist()) | {"interval": None, "sign_flip_p": None, "differences": difference.tolist()}
    if n >= 2 and np.ptp(difference) > 0:
        interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
        result["interval"] = [float(interval.low), float(interval.high)]
        exact = n <= 16
        flips = np.inf if exact else 100_000
        test = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=flips, vectorized=True, rng=0)
        result |= {"sign_flip_p": float(test.pvalue), "sign_flip_exact": exact}
    return result


def verdict(arm: str, baseline: str, endpoint: str, pair: dict) -> str:
    """One sentence about the paired difference of the endpoint, which says so when no difference is shown."""
    n, (what, _, unit, sign) = pair["n"], ENDPOINTS[endpoint]
    if n < 2:
        return f"{arm} against {baseline}: {n} pair(s) of seeds give no interval, so nothing can be said about the {what}."
    if pair["interval"] is None:
        return f"{arm} against {baseline}: the {what} differs by exactly {pair['mean']:g} in each of the {n} pairs."
    low, high = pair["interval"]
    numbers = f"by {abs(pair['mean']):.4f}{unit} (95 % interval of the difference {low:+.4f} to {high:+.4f}, {n} paired seeds)"
    if low > 0 or high < 0:
        few = "" if n > 3 else " So few pairs are a hint, not an answer: take more seeds."
        return f"{arm} is {'better' if sign * pair['mean'] > 0 else 'worse'} than {baseline} in {what} {numbers}.{few}"
    return (
        f"No difference shown between {arm} and {baseline} in {what}: the mean difference is {pair['mean']:+.4f}{unit}, and its 95 % interval "
        f"{low:+.4f} to {high:+.4f} contains 0 ({n} paired seeds)."
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# Report


def analyse(comparison: CompareConfig, results: dict[str, list[dict]]) -> tuple[dict, dict]:
    """Results per arm -> (`arms`: a summary each, `pairs`: each arm against the first)."""
    arms, pairs, names = {}, {}, list(results)
    first = next((cell for cells in results.values() for cell in cells if "diverged_at" not in cell), {})
    measured = [endpoint for endpoint, (_, key, _, _) in ENDPOINTS.items() if key in first] or list({"best": 0, "last": 0, comparison.endpoint: 0})
    for name, cells in results.items():
        good = [cell for cell in cells if "diverged_at" not in cell]
        arms[name] = {
            "n": len(good),
            "diverged": [{"seed": cell["seed"], "step": cell["diverged_at"]} for cell in cells if "diverged_at" in cell],
            **{ENDPOINTS[endpoint][1]: summary([cell[ENDPOINTS[endpoint][1]] for cell in good]) for endpoint in measured},
            "best_step": summary([cell["best_step"] for cell in good]),
            "seconds": summary([cell["seconds"] for cell in good if cell.get("resumed_at") is None]),  # those that one call ran whole
            "ms": summary([cell["ms"] for cell in good if cell["ms"] is not None]),  # None: resumed after its last step
            "tokens_per_s": summary([cell["tokens_per_s"] for cell in good if cell["tokens_per_s"] is not None]),
            "mode": cells[0]["mode"],
            "cells": [brief(cell) for cell in cells],
        }
    for name in names[1:]:
        both = [(a, b) for a, b in zip(results[names[0]], results[name]) if "diverged_at" not in a | b]
        pair = {"baseline": names[0], "seeds": [a["seed"] for a, _ in both], "pairs_lost_to_divergence": len(results[name]) - len(both)}
        for endpoint in measured:
            key = ENDPOINTS[endpoint][1]
            pair[endpoint] = paired_difference([a[key] for a, _ in both], [b[key] for _, b in both])
        pair["verdict"] = verdict(name, names[0], comparison.endpoint, pair[comparison.endpoint])
        if pair["pairs_lost_to_divergence"]:
            counts = ", ".join(f"{arm}: {len(arms[arm]['diverged'])} of {comparison.seeds}" for arm in (names[0], name))
            pair["verdict"] += f" Runs that diverged and are left out of it: {counts}."
        if comparison.evaluators:
            pair |= robustness(both)
        pairs[name] = pair
    return arms, pairs


def brief(cell: dict) -> dict:
    """A cell as the report has it: of the margins means and quantiles alone. Histograms and support tokens are long and stay in the cell's file."""
    evaluation = cell.get("evaluation", {})
    if "margins" not in evaluation:
        return cell
    short = {}
    for name, value in evaluation["margins"].items():
        if name not in ("support tokens", "passage"):
            short[name] = {key: value[key] for key in ("mean", "quantiles")} if isinstance(value, dict) else value
    return cell | {"evaluation": evaluation | {"margins": short}}


def robustness(both: list[tuple[dict, dict]]) -> dict:
    """Paired cells (baseline, arm) -> clean_percent, the relative change of the clean loss, and gains, 1 - delta(arm) / delta(baseline).

    Both are computed seed by seed and then treated like any paired difference. `mean_deltas` are those of the baseline and the arm, and `of_means`
    is the gain from them. A perturbation has no gain (n = 0) unless it hurts the baseline on every seed, by a tenth of its mean at
    least: a ratio to something near 0 says nothing.
    """
    sections = [[cell["evaluation"] for cell in cells] for cells in zip(*both)]
    losses = [np.array([section["clean"]["loss"] for section in some]) for some in sections]
    change = (100 * (losses[1] / losses[0] - 1)).tolist() if both else []
    result = {"clean_percent": paired_difference([0.0] * len(change), change), "gains": {}}
    first = sections[0][0].get("perturb", {}) if both else {}
    for name in (name for name, value in first.items() if isinstance(value, dict)):
        base, arm = (np.array([section["perturb"][name]["delta"] for section in some]) for some in sections)
        gains = (1 - arm / base).tolist() if base.min() > 0.1 * base.mean() > 0 else []
        entry = paired_difference([0.0] * len(gains), gains) | {"mean_deltas": [float(base.mean()), float(arm.mean())]}
        result["gains"][name] = entry | {"of_means": float(1 - arm.mean() / base.mean()) if base.mean() > 0 else None}
    return result


def tables(comparison: CompareConfig, arms: dict, pairs: dict) -> str:
    """The two tables and the verdicts as Markdown."""

    def spread(entry, digits=4):
        if entry["mean"] is None:
            return "-"
        return f"{entry['mean']:.{digits}f}" + (f" ± {entry['sd']:.{digits}f}" if entry["sd"] is not None else "")

    rows = []
    for name, arm in arms.items():
        cells = [name, f"{arm['n']}" + (f" (+ {len(arm['diverged'])} diverged)" if arm["diverged"] else "")]
        cells += [spread(arm[key]) for _, key, _, _ in ENDPOINTS.values() if key in arm] + [spread(arm["best_step"], 0)]
        seconds = spread(arm["seconds"], 1) + (f" (n = {arm['seconds']['n']})" if 0 < arm["seconds"]["n"] < arm["n"] else "")
        rows.append(cells + [seconds, f"{arm['tokens_per_s']['mean']:,.0f}" if arm["tokens_per_s"]["n"] else "-"])
    measured = [what for what, key, _, _ in ENDPOINTS.values() if key in next(iter(arms.values()))]
    headers = ["arm", "n", *measured, "step of best", "seconds a run", "tokens/s"]
    text = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    rows = []
    for name, pair in pairs.items():
        for endpoint, (what, _, _, _) in ENDPOINTS.items():
            if endpoint not in pair:
                continue
            entry = pair[endpoint]
            interval = "{:+.4f} to {:+.4f}".format(*entry["interval"]) if entry["interval"] else "-"
            p = f"{entry['sign_flip_p']:.4f}" if entry["sign_flip_p"] is not None else "-"
            mean = f"{entry['mean']:+.4f}" if entry["mean"] is not None else "-"
            rows.append([f"{name} − {pair['baseline']}", what, entry["n"], mean, interval, p])
    headers = ["difference", "in", "pairs", "mean", "95 % t interval", "sign-flip p"]
    text += "\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    text += robustness_tables(arms, pairs)
    text += "\n\nMean ± standard deviation over seeds; losses in nats per prediction, accuracies as shares.\n\n"
    text += "\n".join(f"**{pair['verdict']}**" for pair in pairs.values())
    if len(pairs) > 1:
        text += f"\n\nThe {len(pairs)} intervals are each at 95 %: they are not corrected for their number."
    return text


def robustness_tables(arms: dict, pairs: dict) -> str:
    """Clean change, gains and margins as Markdown; nothing for a comparison without --evaluate."""
    pairs = {name: pair for name, pair in pairs.items() if "gains" in pair}
    if not pairs:
        return ""

    def cell(entry, unit, digits):
        if entry["mean"] is None:
            return "-"
        interval = " ({:+.{d}f} to {:+.{d}f})".format(*(unit * value for value in entry["interval"]), d=digits) if entry["interval"] else ""
        return f"{unit * entry['mean']:+.{digits}f} %{interval}"

    rows = [["clean loss", "-", *(cell(pair["clean_percent"], 1, 2) for pair in pairs.values())]]
    for name in next((pair["gains"] for pair in pairs.values() if pair["gains"]), {}):  # an arm that diverged on every seed has none
        entries = [pair["gains"].get(name) for pair in pairs.values()]
        delta = next(entry["mean_deltas"][0] for entry in entries if entry)
        rows.append([f"gain: {name}", f"{delta:+.4f}", *(cell(entry, 100, 1) if entry else "-" for entry in entries)])
    text = "\n\n" + tabulate(rows, ["", "baseline's delta", *pairs], tablefmt="github", disable_numparse=True)
    text += (
        "\n\nRobustness gain = 1 − delta(arm) / delta(baseline), delta = perturbed − clean loss of the best weights; above 0 the arm is more robust."
    )
    text += " Computed for each seed; in brackets the 95 % t interval of these gains."
    rows = []
    for name, arm in arms.items():
        found = [c["evaluation"]["margins"]["margins, sum over layers and heads"] for c in arm["cells"] if "margins" in c.get("evaluation", {})]
        if found:
            rows.append([name, *(f"{np.mean([some['quantiles'][q] for some in found]):+.3f}" for q in ("0", "0.05", "0.5", "0.95"))])
    if rows:
        text += "\n\n" + tabulate(rows, ["margins, sum over heads", "min", "5 %", "50 %", "95 %"], tablefmt="github", disable_numparse=True)
    return text


def draw_frontier(path: Path, pairs: dict):
    """frontier.png: robustness gain against the change of the clean loss, one point per arm with both intervals, from the report's pairs."""
    pairs = {arm: pair for arm, pair in pairs.items() if pair["gains"]}  # an arm that diverged on every seed has none
    names = [name for name in FRONTIER if all(name in pair["gains"] for pair in pairs.values())] if pairs else []
    if not names:
        return
    colours = plt.get_cmap("tab10" if len(pairs) <= 10 else "tab20").colors
    height = 4.5 + 0.1 * min(len(pairs), 40)  # the legend, two arms a line
    figure, places = plt.subplots(1, len(names), figsize=(5.5 * len(names), height), layout="constrained", squeeze=False)
    for place, name in zip(places[0], names):
        for number, (arm, pair) in enumerate(pairs.items()):
            x, y = pair["clean_percent"], pair["gains"][name]
            if x["mean"] is None or y["mean"] is None:
                continue
            spread = [  # of two pairs an interval says nothing and would fill the figure
                [[scale * (e["mean"] - e["interval"][0])], [scale * (e["interval"][1] - e["mean"])]] if e["interval"] and e["n"] > 2 else None
                for e, scale in ((x, 1), (y, 100))
            ]
            form = {"fmt": "os^"[number // len(colours) % 3], "color": colours[number % len(colours)], "capsize": 3, "label": arm}
            place.errorbar([x["mean"]], [100 * y["mean"]], xerr=spread[0], yerr=spread[1], **form)
        place.axhline(0, color="black", linewidth=1, linestyle="--")
        place.axvline(0, color="black", linewidth=1, linestyle="--")
        place.axhline(15, color="green", linewidth=0.8, linestyle=":")  # the aim: above this one, left of the next
        place.axvline(1.7, color="green", linewidth=0.8, linestyle=":")
        place.set(xlabel="change of the clean loss (%)", ylabel=f"robustness gain, {name} (%)")
        place.grid(alpha=0.3)
    if len(pairs) <= 40:
        figure.legend(*places[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    save_figure(path, figure)


def provenance(arms: dict[str, TrainConfig], device: str, source: str, data: dict) -> dict:
    """What a reader needs to repeat the comparison."""

    def git(*command):
        try:
            return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
    return {
        "command": shlex.join(["python", "compare.py", *sys.argv[1:]]),
        "processes_of_this_call": int(os.environ.get("WORLD_SIZE", 1)),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "versions": versions,
        "data": source,
        "data_sha256": data,
        "git_revision": git("rev-parse", "HEAD"),
        "git_modified": None if changes is None else bool(changes),
        "code_sha256": code_sha256(),
        "configs": {name: dataclasses.asdict(config) for name, config in arms.items()},
    }


def label(name: str) -> str:
    """An arm's name as figures show it: each option on a line of its own."""
    return re.sub(rf"_(?=(?:{'|'.join(field_names(TrainConfig))})=)", "\n", name)


def draw_curves(path: Path, results: dict[str, list[dict]]):
    """curves.png: validation loss over steps, mean over seeds and a band of one standard deviation."""
    longest = max(map(len, results), default=0)
    columns = 2 if longest < 30 else 1
    size = max(7, 1.7 + 0.085 * longest), 4.2 + 0.22 * math.ceil(len(results) / columns)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    early = []
    for i, (name, cells) in enumerate(results.items()):
        curves = [cell["curve"] for cell in cells if "diverged_at" not in cell]
        if not curves:
            continue
        steps = np.array([point[0] for point in curves[0]])
        losses = np.array([[point[1] for point in curve] for curve in curves])
        mean = losses.mean(axis=0)
        (line,) = axes.plot(steps, mean, label=f"{name} (n = {len(curves)})", linewidth=1.8, linestyle=("-", "--", ":", "-.")[i // 10 % 4])
        if len(curves) > 1:
            sd = losses.std(axis=0, ddof=1)
            axes.fill_between(steps, mean - sd, mean + sd, color=line.get_color(), alpha=0.25, linewidth=0)
        early += [losses.min(), *mean[steps >= 0.15 * steps[-1]]]
    if early:  # the fall from log(vocabulary) would flatten everything that matters
        margin = 0.08 * (max(early) - min(early)) + 1e-3
        axes.set_ylim(min(early) - margin, max(early) + margin)
    axes.set(xlabel="step", ylabel="validation loss (nats per prediction)", title="mean ± 1 sd over seeds")
    axes.grid(alpha=0.3)
    if early:
        figure.legend(loc="outside lower center", ncols=columns)
    save_figure(path, figure)


def draw_paired(path: Path, endpoint: str, pairs: dict):
    """paired.png: arm - baseline for every seed, with mean and 95 % t interval; a row for each arm."""
    names = [label(name) for name in pairs]
    lines = [max(3, 2 + name.count("\n")) for name in names]
    place = np.cumsum([0, *((one + other) / 2 for one, other in itertools.pairwise(lines))])
    width = 5 + 0.085 * max(len(line) for name in names for line in name.split("\n"))
    figure, axes = plt.subplots(figsize=(width, max(3, 1.5 + 0.19 * sum(lines))), layout="constrained")
    for y, pair in zip(place, pairs.values()):
        entry = pair[endpoint]
        points = entry["differences"]
        rows = y + (np.linspace(-0.7, 0.3, len(points)) if len(points) > 1 else np.zeros(len(points)))
        axes.scatter(points, rows, s=28, alpha=0.75, zorder=3, label=None if y else "one seed")
        if entry["interval"]:
            low, high = entry["interval"]
            error = [[entry["mean"] - low], [high - entry["mean"]]]
            axes.errorbar(
                [entry["mean"]], [y + 0.8], xerr=error, fmt="D", color="black", capsize=5, zorder=4, label=None if y else "mean, 95 % interval"
            )
    axes.axvline(0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(place, names)
    axes.set_ylim(place[-1] + lines[-1] / 2, -lines[0] / 2)
    what, _, _, sign = ENDPOINTS[endpoint]
    better = f"{what}, arm − baseline ({'right' if sign > 0 else 'left'} of 0: the arm is better)"
    baseline = f"baseline: {label(next(iter(pairs.values()))['baseline'])}".replace("\n", " ")
    figure.supxlabel("\n".join(textwrap.fill(line, int(11 * width)) for line in (better, baseline)), fontsize="medium")
    axes.locator_params(axis="x", nbins=7)
    axes.grid(alpha=0.3, axis="x")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=2)
    save_figure(path, figure)


def main(comparison: CompareConfig, arms: dict[str, TrainConfig]):
    """Runs what is missing and, in the first process, writes report.md, report.json, curves.png and paired.png."""
    began = time.perf_counter()
    results = run_cells(comparison, arms)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    out_dir, first = Path(comparison.out_dir), next(iter(arms.values()))
    summaries, pairs = analyse(comparison, results)
    source = read_meta(first.dataset)[1].get("source", first.dataset)
    for name, pair in pairs.items():
        if unequal := [
            f"{key} ({getattr(first, key)} and {getattr(arms[name], key)})" for key in BUDGET if getattr(first, key) != getattr(arms[name], key)
        ]:
            pair["verdict"] += f" The two differ in {', '.join(unequal)}: this is not the arm alone."
    origin = provenance(arms, find_place(first.device, "auto", distributed=False).name(), source, data_checksum(first.dataset))
    origin["seconds_of_this_call"] = round(time.perf_counter() - began, 1)
    text = tables(comparison, summaries, pairs)
    draw_curves(out_dir / "curves.png", results)
    draw_paired(out_dir / "paired.png", comparison.endpoint, pairs)
    figures = ["curves.png", "paired.png"]
    if "perturb" in comparison.evaluators:
        draw_frontier(out_dir / "frontier.png", pairs)
        figures.append("frontier.png")
    report = {"endpoint": comparison.endpoint, "arms": summaries, "pairs": pairs, "provenance": origin}
    write_file(out_dir / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    lines = [f"# {' against '.join(arms)}", "", text, "", "![validation loss](curves.png)", "![paired differences](paired.png)", ""]
    lines += ["![robustness against clean loss](frontier.png)", ""] if "frontier.png" in figures else []
    lines += [f"Data: {origin['data']}. Losses on other data are not comparable.", ""]
    processes = origin["processes_of_this_call"]
    how = f" in {processes} processes of torchrun" if processes > 1 else ""
    made = f"Made by `{origin['command']}`{how} on {origin['device']}, torch {torch.__version__}, finished {origin['finished'][:10]},"
    lines += [f"Endpoint: {ENDPOINTS[comparison.endpoint][0]}. {made}"]
    revision = f"revision {origin['git_revision'] or 'unknown'}{' with local changes' if origin['git_modified'] else ''}"
    lines += [f"{revision}, code sha256 {origin['code_sha256'][:12]}; configurations and every cell: report.json.", ""]
    write_file(out_dir / "report.md", "\n".join(lines).encode())
    print(f"\n{text}\n\n{out_dir / 'report.md'}, report.json, {', '.join(figures)}")


if __name__ == "__main__":
    try:
        with one_line_errors():
            main(*command_line)
    except (Interrupted, KeyboardInterrupt) as stop:
        say("interrupted; finished runs are kept, the same command goes on, inside the interrupted run where its state was saved")
        sys.exit(128 + getattr(stop, "signal", signal.SIGINT))
