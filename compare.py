"""Is the change real? Arms x seeds -> a paired table, an interval, a verdict in one sentence, and figures.

    python compare.py config/quick.py config/quick_laplacian.py --seeds=3
    python compare.py config/quick.py "config/quick_laplacian.py --learning_rate=2e-3" --seeds=5 --max_iters=500
    torchrun --standalone --nproc_per_node=8 compare.py config/shakespeare_char.py config/shakespeare_char_laplacian.py --seeds=16

An arm is a config file, in quotes with options of its own; the first arm is the baseline. Options outside the quotes hold for all arms. Seed s of one
arm is paired with seed s of the baseline: both start from the same weights of the parameters they share and see the same batches.

An arm may start from weights, --init_from=PATH in its quotes; {seed} in the path is the cell's seed: "config/x.py --init_from=runs/seed-{seed}/best".

A cell is one arm with one seed. Its result is written when its run has finished, so a killed comparison goes on with the others; one that is
interrupted, by Ctrl-C or SIGTERM, goes on inside its cells. torchrun spreads the cells over its processes. Cells made with other keys, data, code or
device are refused, never mixed. With --report_only=True nothing is run: all cells are there, copied together from other machines, say; they must be
of one code, one torch and one kind of device, which the report names.

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
    report_only: bool = False  # run nothing: a report of finished cells, also of those that another machine made
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
        if self.report_only and self.save_checkpoints:
            raise InputError("--report_only=True trains nothing, so there is no checkpoint to keep: take out --save_checkpoints=True")
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
        if outside := [key for key, _ in own if key in ours and key != "out_dir"]:
            raise InputError(f"--{outside[0]} is for the whole comparison: give it outside the quotes of arm {word!r}")
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
    if not arms:
        raise InputError(
            "no arm given: name configs, the first of which is the baseline: python compare.py config/quick.py config/quick_laplacian.py"
        )
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
import time
from datetime import timedelta

import numpy as np
import scipy
import torch
import torch.distributed as dist

import checkpoint
import evaluate
from dataset import ROOT, incomplete, prepare_if_missing, read_meta, sha256_of, write_file
from place import find_place, say, warn_if_long
from report import ENDPOINTS, analyse, draw_curves, draw_frontier, draw_paired, tables, title
from train import SCHEDULE, Diverged, Interrupted, build, check_prior, rescheduled, train

# keys that cannot change a run's losses, so a cell may be used again when they differ; data and device are told by checksum and name
HARMLESS = {"out_dir", "overwrite", "seed", "dataset", "log_interval", "always_save_checkpoint", "device", "eval_only", "probe_interval"}
HARMLESS |= {"wandb_log", "wandb_project", "wandb_run_name"}
BUDGET = ("max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "eval_tokens")  # what makes a comparison one of more than the arms
SHARED = SCHEDULE | HARMLESS - {"dataset", "device"} | {"eval_interval"}  # keys by which arms of one program may differ


# ---------------------------------------------------------------------------------------------------------------------------------
# Cells


def code_sha256() -> str:
    """One checksum of the files that decide a run's numbers."""
    names = (
        "model.py",
        "variants.py",
        "prior.py",
        "dropout.py",
        "fused.py",
        "fused_attention.py",
        "fused_attention_hopper.py",
        "fused_norm.py",
        "fused_norm_hopper.py",
        "fused_products.py",
        "fused_products_hopper.py",
        "fused_prior.py",
        "operators.py",
        "dataset.py",
        "train.py",
        "optimizer.py",
        "parallel.py",
        "onednn.py",
        "fused_cpu.py",
        "fused_cpu.c",
        "place.py",
        "checkpoint.py",
    )
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()


def fingerprint(config: TrainConfig, data: dict, made: dict, evaluators: list[str]) -> dict:
    """What decides a cell's numbers besides its seed: keys, data, what it is `made` with (code, torch and device), and what it was examined with."""
    keys = {key: value for key, value in dataclasses.asdict(config).items() if key not in HARMLESS}
    if evaluators:
        keys |= {"evaluate": sorted(evaluators), "evaluate_code": hashlib.sha256((ROOT / "evaluate.py").read_bytes()).hexdigest()}
    everything = keys | data | given_weights(config.init_from) | made
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


def made_with(path: Path) -> dict:
    """Code, torch and device of a finished cell, and the code that examined it, for a report of cells from elsewhere. Raises InputError."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        return {key: made[key] + "" for key in ("code", "torch", "device", "evaluate_code") if key in made or key != "evaluate_code"}
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"--report_only=True: cell {path} is not there; run the comparison without it, or copy the cell") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cell {path} is damaged ({type(error).__name__}): remove it and run the comparison again") from None


def is_result(result: dict) -> bool:
    """Whether a cell's result has what a report is made of."""
    if "diverged_at" in result:
        return True
    losses = [result[key] for key in ("best_val_loss", "val_loss")]
    points = [point[:2] for point in result["curve"]]
    whole = all(math.isfinite(value) for value in [*losses, *itertools.chain(*points)]) and len(points) > 0
    return whole and {"best_step", "seconds", "ms", "tokens_per_s"} <= result.keys()


def read_cell(path: Path, expected: dict, collected: bool = False) -> dict | None:
    """A finished cell's result, None when there is none yet. Raises InputError for a cell that is damaged, made differently (`collected`: than the
    first one) or another one's."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        made, result = cell["fingerprint"], cell["result"]
        place = path.parent.parent.name, int(path.parent.name.removeprefix("seed-"))
        if not isinstance(made, dict) or not isinstance(result, dict) or not is_result(result):
            raise TypeError("fingerprint or result")
        found = result["arm"], result["seed"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cell {path} is damaged ({type(error).__name__}): remove it and run the comparison again") from None
    if made != expected and collected:
        raise InputError(
            f"--report_only=True: cell {path} was made with {unlike(made, expected, 'another or the command')}: one report is of one kind"
        )
    if made != expected:
        raise InputError(f"cell {path} was made with {unlike(made, expected)}: choose another --out_dir or remove it")
    if found != place:
        raise InputError(f"cell {path} is that of arm {found[0]}, seed {found[1]}: put it where it belongs")
    return result


def unlike(made: dict, expected: dict, now: str = "") -> str:
    """The first key in which two fingerprints differ, in words; `now`: whose the second one is, if not today's."""
    key = min(key for key in made.keys() | expected.keys() if made.get(key) != expected.get(key))
    return f"{key}={made.get(key)}, {f'{now} with' if now else 'now it is'} {expected.get(key)}"


def check_out_dir(out_dir: Path, arms: dict[str, TrainConfig], seeds: range, data: dict):
    """Raises InputError where a run of train.py would be in the way, or a report be lost that its directory's cells cannot make again.

    Where the cells are gone, as those of a committed report are, the same comparison may be made again: all its arms, recipes, data and seeds.
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
        gone = sorted(report["arms"].keys() - arms.keys()) + [f"seed {seed}" for seed in sorted({seed for _, seed in cells} - set(seeds))]
        if gone and int(os.environ.get("RANK", 0)) == 0:
            say(f"note: the report in {out_dir} will be one without {', '.join(gone)}; what was trained stays in cells/ for a report of all")
        return
    ours = {name: json.loads(json.dumps(dataclasses.asdict(config))) for name, config in arms.items()}
    if recipes.keys() != arms.keys():
        what = f"other arms, {', '.join(list(recipes)[:2])}" + ", ..." * (len(recipes) > 2)
    elif changed := sorted({key for name, recipe in recipes.items() for key, value in recipe.items() if ours[name].get(key, value) != value}):
        what = f"these arms with other values of {', '.join(changed)}"
    elif report["provenance"].get("data_sha256", data) != data:
        what = f"other data ({report['provenance'].get('data', 'unnamed')})"
    elif missing := sorted({seed for _, seed in cells} - set(seeds)):
        what = f"more seeds, {', '.join(map(str, missing[:5]))}"
    else:
        return
    raise InputError(f"--out_dir={out_dir} holds a report of {what}, and not its cells: it would be lost, so name another directory")


def interrupted_at(directory: Path, expected: dict, save: bool, kept: bool) -> int | None:
    """The step at which a cell can go on: that of its last/ if it is whole; None for a start from step 0.

    With `save` best/ must be there too, unless no evaluation has beaten the first. Raises InputError for a checkpoint of another run, and for one
    of a run whose weights were to be kept, where they are not.
    """
    try:
        meta = checkpoint.readable(directory / "last")
    except InputError:
        return None
    made = meta.get("fingerprint")
    if isinstance(made, dict) and made.pop("kept", False) and not kept:
        raise InputError(f"cell {directory} was interrupted with --save_checkpoints=True: give it again, or remove the cell")
    if isinstance(made, dict) and made != expected:
        again = "give the same command to go on, choose another --out_dir, or remove the cell"
        raise InputError(f"cell {directory} was interrupted at step {meta['step']} with {unlike(made, expected)}: {again}")
    lacks_best = save and meta.get("best_step") and not (directory / "best" / "checkpoint.json").is_file()
    return None if lacks_best or made is None else meta["step"]


def run_cells(comparison: CompareConfig, arms: dict[str, TrainConfig]) -> tuple[dict[str, list[dict]], dict]:
    """Runs the cells that are not there yet, arms that can share a program do; under torchrun this process's share. Returns results per arm, and what
    they were made with: code, torch and device."""
    out_dir = Path(comparison.out_dir)
    seeds = range(comparison.first_seed, comparison.first_seed + comparison.seeds)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cells = [(name, seed) for name in arms for seed in seeds]
    path = {cell: out_dir / "cells" / cell[0] / f"seed-{cell[1]}" / "result.json" for cell in cells}
    elsewhere = made_with(path[cells[0]]) if comparison.report_only else None
    place = {} if elsewhere else {name: find_place(config.device, config.dtype, distributed=False) for name, config in arms.items()}
    for dataset in {config.dataset for config in arms.values()}:
        prepare_if_missing(dataset)
    data = {name: data_checksum(config.dataset) for name, config in arms.items()}
    for name in arms:
        if data[name] != data[cells[0][0]]:
            raise InputError(f"arm {name!r} reads other data than {cells[0][0]!r}: their losses cannot be compared")
        check_prior(arms[name], read_meta(arms[name].dataset)[1]["kind"] == "pictures")
        if comparison.endpoint in ("top1", "top5") and read_meta(arms[name].dataset)[1]["kind"] != "pictures":
            raise InputError(f"--endpoint={comparison.endpoint} is for pictures: use best or last for --dataset={arms[name].dataset}")
    check_out_dir(out_dir, arms, seeds, data[cells[0][0]])
    here = {"code": code_sha256(), "torch": torch.__version__}
    means = {name: elsewhere or here | {"device": place[name].name().partition(",")[0]} for name in arms}
    expected = {(name, seed): fingerprint(of_seed(arms[name], seed), data[name], means[name], comparison.evaluators) for name, seed in cells}
    there = {cell: read_cell(path[cell], expected[cell], comparison.report_only) for cell in cells}  # all are checked before any is run
    missing = [cell for cell in cells if there[cell] is None]
    if elsewhere:
        for cell in missing:
            made_with(path[cell])  # which refuses
        return {name: [there[name, seed] for seed in seeds] for name in arms}, elsewhere
    save = comparison.save_checkpoints or bool(comparison.evaluators)
    asked = {"kept": True} if comparison.save_checkpoints else {}
    onward = {cell: interrupted_at(path[cell].parent, expected[cell], save, comparison.save_checkpoints) for cell in missing}
    for cell in cells:
        made = there[cell] is not None and "diverged_at" not in there[cell]
        if comparison.save_checkpoints and made and not (path[cell].parent / "last").is_dir():
            raise InputError(f"cell {path[cell].parent} was made without --save_checkpoints=True: choose another --out_dir or remove it")
    if rank == 0:
        done = len(cells) - len(missing)
        say(f"data: {read_meta(arms[cells[0][0]].dataset)[1].get('source', 'unnamed')}")
        say(f"{len(arms)} arms x {len(seeds)} seeds = {len(cells)} runs, {done} of them finished before; {place[cells[0][0]].name()} -> {out_dir}")
        if len(arms) == 1:
            say("note: one arm: there will be its mean and spread over seeds, and nothing that it is compared with")
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
        steps = sum(configs[cell].max_iters - (onward[cell] or 0) for cell in own)
        warn_if_long(program.model.flops_per_token() * program.tokens * steps, program.place)
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
                result = train(start, cell[1], directory, save=save, quiet=True, fingerprint=expected[cell] | asked)
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
    results = {name: [read_cell(path[name, seed], expected[name, seed]) for seed in seeds] for name in arms}
    return results, here | {"device": place[cells[0][0]].name()}


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
# Report


def provenance(arms: dict[str, TrainConfig], made: dict, report_only: bool, source: str, data: dict) -> dict:
    """What a reader needs to repeat the comparison. `made`: code, torch and device of the cells."""

    def git(*command):
        try:
            return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    words, asked = [], iter(sys.argv[1:])  # of the command that makes the cells
    for word in asked:
        if not re.match(r"--report[_-]only\b", word):
            words.append(word)
        elif "=" not in word:
            next(asked, None)  # its value
    return {
        "command": shlex.join(["python", "compare.py", *words]),
        "report_only": report_only,
        "processes_of_this_call": int(os.environ.get("WORLD_SIZE", 1)),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": made["device"],
        "versions": {"torch": made["torch"]} | ({"report": versions} if report_only else versions),
        "data": source,
        "data_sha256": data,
        "git_revision": None if report_only else git("rev-parse", "HEAD"),  # of cells from elsewhere nobody knows it
        "git_modified": None if changes is None or report_only else bool(changes),
        "code_sha256": made["code"],
        "configs": {name: dataclasses.asdict(config) for name, config in arms.items()},
    }


def main(comparison: CompareConfig, arms: dict[str, TrainConfig]):
    """Runs what is missing and, in the first process, writes report.md, report.json, curves.png and, of several arms, paired.png."""
    began = time.perf_counter()
    results, made = run_cells(comparison, arms)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    out_dir, first = Path(comparison.out_dir), next(iter(arms.values()))
    summaries, pairs = analyse(comparison.endpoint, results, bool(comparison.evaluators))
    source = read_meta(first.dataset)[1].get("source", first.dataset)
    for name, pair in pairs.items():
        if unequal := [
            f"{key} ({getattr(first, key)} and {getattr(arms[name], key)})" for key in BUDGET if getattr(first, key) != getattr(arms[name], key)
        ]:
            pair["verdict"] += f" The two differ in {', '.join(unequal)}: this is not the arm alone."
    origin = provenance(arms, made, comparison.report_only, source, data_checksum(first.dataset))
    origin["seconds_of_this_call"] = round(time.perf_counter() - began, 1)
    text = tables(summaries, pairs)
    figures = {}
    if draw_curves(out_dir / "curves.png", results):
        figures["curves.png"] = "validation loss"
    if pairs:
        draw_paired(out_dir / "paired.png", comparison.endpoint, pairs)
        figures["paired.png"] = "paired differences"
    if "perturb" in comparison.evaluators and draw_frontier(out_dir / "frontier.png", pairs):
        figures["frontier.png"] = "robustness against clean loss"
    report = {"endpoint": comparison.endpoint, "arms": summaries, "pairs": pairs, "provenance": origin}
    write_file(out_dir / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    lines = [f"# {title(list(arms))}", "", text, "", *(f"![{words}]({name})" for name, words in figures.items()), ""]
    lines += [f"Data: {origin['data']}. Losses on other data are not comparable.", ""]
    processes = origin["processes_of_this_call"]
    how = f" in {processes} processes of torchrun" if processes > 1 else ""
    words = f"Made by `{origin['command']}`{how} on {origin['device']}, torch {made['torch']}, finished {origin['finished'][:10]},"
    words += " from cells that were there," * comparison.report_only
    lines += [f"Endpoint: {ENDPOINTS[comparison.endpoint][0]}. {words}"]
    revision = f"revision {origin['git_revision'] or 'unknown'}{' with local changes' if origin['git_modified'] else ''}"
    lines += [f"{revision}, code sha256 {origin['code_sha256'][:12]}; configurations and every cell: report.json.", ""]
    write_file(out_dir / "report.md", "\n".join(lines).encode())
    print(f"\n{text}\n\n{', '.join([str(out_dir / 'report.md'), 'report.json', *figures])}")


if __name__ == "__main__":
    try:
        with one_line_errors():
            main(*command_line)
    except (Interrupted, KeyboardInterrupt) as stop:
        say("interrupted; finished runs are kept, the same command goes on, inside the interrupted run where its state was saved")
        sys.exit(128 + getattr(stop, "signal", signal.SIGINT))
