"""Faults, and what must survive them: what tests/test_faults.py takes a few of and tests/campaign.py hundreds.

Every fault is a generator of a folder and a random.Random. It yields, for each try that was survived, what was tried; when something is lost, or
silently wrong, it raises AssertionError. The scripts run unchanged (runpy, as `__main__`) in processes forked from a server that has imported torch
once, so that a try costs a tenth of a second and not three. What is patched in them are marks that say in what phase a process is, and the faults.
"""

import codecs
import contextlib
import functools
import importlib
import io
import itertools
import json
import lzma
import math
import mmap
import multiprocessing
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [path for path in (str(ROOT), str(TESTS)) if path not in sys.path]
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order

import numpy as np
import torch
import tqdm

import checkpoint
import dataset
from configurator import InputError
from dataset import Pictures, Tokens, write_tokens
from metrics import read_metrics
from model import GPT

CONTEXT = multiprocessing.get_context("forkserver")
# the last two are what torch loads when the first model is made
PRELOADED = ["faults", "train", "compare", "sample", "classify", "corpus", "pictures", "torch._dynamo", "torch._dynamo.convert_frame"]
CONTEXT.set_forkserver_preload(PRELOADED)
PHASES = ("starting", "building", "training", "evaluating", "saving")
LONGEST = {"starting": 0.02, "building": 0.05, "training": 0.01, "evaluating": 0.01, "saving": 0.02}  # seconds after its beginning until the kill
TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
    "warmup_iters": 5, "max_iters": 40, "eval_interval": 8, "eval_tokens": 320, "log_interval": 1, "device": "cpu", "dtype": "float32",
    "compile": False,
}  # fmt: skip
NOISY = {"dropout": 0.2, "bias": True}
ARMS = {"A": {}, "A - I": {"diffusion": True}, "some heads": {"diffusion": True, "diffusion_heads": "0,1", "diffusion_alpha": 0.9}}


# ---------------------------------------------------------------------------------------------------------------------------------
# Processes


def _marked(marks, phase: int, function, generator: bool = False):
    """The function, during which marks[0] is the phase (building and training: until another begins); marks[phase + 1] counts its beginnings."""

    def begin():
        before, marks[0] = marks[0], phase
        marks[phase + 1] = min(255, marks[phase + 1] + 1)
        return before

    @functools.wraps(function)
    def during(*args, **kwargs):
        before = begin()
        try:
            return function(*args, **kwargs)
        finally:
            marks[0] = phase if phase < 3 else before

    @functools.wraps(function)
    def over(*args, **kwargs):
        before = begin()
        try:
            yield from function(*args, **kwargs)
        finally:
            marks[0] = before

    return over if generator else during


def _enter(script: str, arguments: list[str], folder: str, setup):
    """In the child: the script as `__main__`, its output in folder/out and folder/err, its phases in folder/marks."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    with open(Path(folder) / "marks", "r+b") as file:
        marks = mmap.mmap(file.fileno(), 16)
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its lock for processes would outlive a killed one
    for owner, name, phase, generator in (
        (dataset, "load", 1, False), (Tokens, "batch", 2, False), (Pictures, "batch", 2, False), (Tokens, "validation", 3, True),
        (Pictures, "validation", 3, True), (checkpoint, "save", 4, False),
    ):  # fmt: skip
        setattr(owner, name, _marked(marks, phase, getattr(owner, name), generator))
    if setup:
        setup()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


@functools.cache
def _start_server():
    """The server looks for its modules in PYTHONPATH and, before that, in the current directory, which may be another clone's."""
    from multiprocessing import forkserver

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{TESTS}:{ROOT}"
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


class Child:
    """A script in a process of its own. `marks` is shared with it."""

    def __init__(self, script, arguments: list, folder: Path, setup=None):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "marks").write_bytes(bytes(16))
        with open(folder / "marks", "r+b") as file:
            self.marks = mmap.mmap(file.fileno(), 16)
        self.folder = folder
        _start_server()
        self.process = CONTEXT.Process(target=_enter, args=(str(ROOT / script), [str(word) for word in arguments], str(folder), setup))
        self.process.start()

    def signal(self, number: int, phase: int | None, draw: random.Random, first: int = 12) -> str | None:
        """Sends the signal within a beginning of this phase drawn from the first ones, or at any moment (None).

        Returns the phase it came in, None when the process had ended before.
        """
        wanted = draw.randint(1, first if phase == 2 else max(1, first // 3))
        if phase is None:
            time.sleep(draw.uniform(0, 0.4))
        while phase is not None and self.marks[phase + 1] < (wanted if phase > 1 else 1) and self.process.is_alive():
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, LONGEST[PHASES[phase or 0]]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGSTOP)  # so that what is read is where it was
            found = PHASES[self.marks[0]]
            os.kill(self.process.pid, number)
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.join(60)
        ended = self.process.exitcode
        assert ended is not None, f"still running a minute after signal {number} while {found}"
        return found if ended in (-number, 128 + number) else None

    def wait(self, seconds: float = 120) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)."""
        self.process.join(seconds)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s")
        return status, *((self.folder / name).read_text(errors="backslashreplace") for name in ("out", "err"))


def run(script, arguments, folder: Path, setup=None) -> tuple[int, str, str]:
    """A script from its start to its end: (exit status, stdout, stderr)."""
    return Child(script, arguments, folder, setup).wait()


def options(keys: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


def succeed(script, arguments, folder: Path, setup=None) -> str:
    status, out, err = run(script, arguments, folder, setup)
    assert status == 0, (script, arguments, status, err[-2000:])
    return out


def one_line(result: tuple[int, str, str], *words: str, status: int = 2) -> str:
    """The message of a refusal: status 2, one line on stderr that has the words."""
    found, _, err = result
    lines = [line for line in err.splitlines() if not line.startswith(("note: ", "warning: "))]
    assert found == status and len(lines) == 1 and lines[0].startswith("error: "), (found, err[-3000:])
    assert all(word in lines[0] for word in words), (words, err)
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------------------------
# Data and what is compared


def sentences(characters: int, seed: int = 2507) -> str:
    draw = random.Random(seed)
    nouns, verbs = ["head", "token", "value", "graph", "margin"], ["sees", "mixes", "moves", "keeps"]
    lines = (f"The {draw.choice(nouns)} {draw.choice(verbs)} a {draw.choice(nouns)}{draw.choice('.!?')}\n" for _ in itertools.count())
    text = ""
    while len(text) < characters:
        text += next(lines)
    return text[:characters]


def text_data(folder: Path, characters: int = 8000) -> Path:
    """A prepared data set of characters."""
    text = sentences(characters)
    known = "".join(sorted(set(text)))
    ids, cut = np.array([known.index(character) for character in text]), characters * 9 // 10
    folder.mkdir(parents=True, exist_ok=True)
    write_tokens(folder, ids[:cut], ids[cut:], {"vocab_size": len(known), "tokenizer": {"type": "char", "characters": known}})
    return folder


def picture_data(folder: Path, seed: int = 0) -> Path:
    """A prepared data set of pictures of two brightnesses, its classes."""
    from pictures import PictureWriter

    draw = np.random.default_rng(seed)
    labels = {"train": np.arange(60) % 2, "val": np.arange(20) % 2}
    with PictureWriter(folder, (3, 8, 8)) as writer:
        for split, which in labels.items():
            writer.add(split, (draw.integers(0, 128, (len(which), 192)) + 100 * which[:, None]).astype(np.uint8))
        writer.finish(labels, ["dark", "bright"], "noise", {})
    return folder


def losses(out_dir: Path) -> dict:
    """{(key, step): loss} of a run's log; a step may have each once only."""
    found = [((key, row["step"]), row[key]) for row in read_metrics(out_dir) for key in ("train_loss", "val_loss") if row[key] is not None]
    assert len(dict(found)) == len(found), "a step is in the log twice"
    return dict(found)


def tensors(directory: Path, name: str = "checkpoint.json") -> dict:
    """{name: bytes} of weights and, if there, the optimizer's state; and step, losses and the like."""
    meta = checkpoint.read_meta(directory, name)
    found = {f"{kind} {key}": t.numpy().tobytes() for kind in meta["files"] for key, t in checkpoint._read_tensors(directory, meta, kind).items()}
    return found | {key: meta[key] for key in ("step", "val_loss", "best_val_loss", "best_step", "evaluated")}


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def check_checkpoints(out: Path) -> int | None:
    """last/ and best/, where they are, load with all their tensors; returns the step of last/."""
    step = None
    for name in ("best", "last"):
        if (out / name / "checkpoint.json").exists():
            found = tensors(out / name)
            checkpoint.load_model(out, name)
            step = found["step"] if name == "last" else step
        if (out / name / checkpoint.PREVIOUS).exists():
            assert tensors(out / name, checkpoint.PREVIOUS)["step"] <= step
    return step


# ---------------------------------------------------------------------------------------------------------------------------------
# Kills


def continued(out: Path) -> dict:
    """The keys with which a run goes on: from its checkpoint, or from its start when it had none yet."""
    return {"init_from": "resume"} if (out / "last" / "checkpoint.json").exists() else {"overwrite": True}


def kills_in_training(folder: Path, draw: random.Random):
    """kill -9 again and again, until the run is through: its log and its checkpoints are those of a run that nobody disturbed."""
    data = {"text": text_data(folder / "text"), "pictures": picture_data(folder / "pictures")}
    kinds = [(kind, arm) for arm in ARMS for kind in data]
    undisturbed = {}
    for number in itertools.count():
        kind, arm = kinds[number % len(kinds)]
        keys = TINY | NOISY | ARMS[arm] | {"dataset": data[kind]} | ({"patch_size": 4, "eval_tokens": 0} if kind == "pictures" else {})
        if (kind, arm) not in undisturbed:
            undisturbed[kind, arm] = folder / f"undisturbed-{kind}-{arm}"
            succeed("train.py", options(keys | {"out_dir": undisturbed[kind, arm]}), folder / "io")
        whole, out = undisturbed[kind, arm], folder / f"killed-{number}"
        expected = losses(whole)
        for attempt in itertools.count():
            keys |= {"overwrite": False} | continued(out) | {"out_dir": out}
            child = Child("train.py", options(keys), folder / "io")
            phase = child.signal(signal.SIGKILL, draw.choice((None, 1, 2, 3, 4, 4)), draw) if attempt < 9 else None
            check_checkpoints(out)
            if (out / "metrics.jsonl").exists():
                found = losses(out)
                assert found.items() <= expected.items(), "other losses than an undisturbed run"
            if phase is None:
                status, _, err = child.wait()
                assert status == 0, err[-2000:]
                break
            yield f"kill -9 while {phase}"
        assert losses(out) == expected
        for name in ("last", "best"):
            assert tensors(out / name) == tensors(whole / name), "other tensors than an undisturbed run"
        shutil.rmtree(out)


def comparison(folder: Path) -> list:
    """The command line of a small comparison of both arms, its data already there."""
    keys = TINY | {"max_iters": 8, "eval_interval": 4, "n_layer": 1, "dropout": 0.1}
    lines = [f"{key} = {value!r}" for key, value in (keys | {"dataset": str(text_data(folder / "text"))}).items()]
    (folder / "base.py").write_text("\n".join(lines) + "\n")
    (folder / "laplacian.py").write_text('base = "base.py"\ndiffusion = True\n')
    return [folder / "base.py", folder / "laplacian.py", "--seeds=3"]


def report(out: Path) -> tuple:
    """What a report says, without times and places."""
    found = json.loads((out / "report.json").read_text())
    for arm in found["arms"].values():
        for key in ("seconds", "ms", "tokens_per_s"):
            del arm[key]
            for cell in arm["cells"]:
                cell.pop(key, None)
                cell.pop("resumed_at", None)
    return found["arms"], found["pairs"]


def kills_in_comparison(folder: Path, draw: random.Random):
    """kill -9 and SIGTERM again and again, until the comparison is through: its table is that of one that nobody disturbed."""
    command = comparison(folder)
    succeed("compare.py", [*command, f"--out_dir={folder / 'undisturbed'}", "--save_checkpoints=True"], folder / "io")
    expected = report(folder / "undisturbed")
    for number in itertools.count():
        out = folder / f"killed-{number}"
        for attempt in itertools.count():
            child = Child("compare.py", [*command, f"--out_dir={out}", "--save_checkpoints=True"], folder / "io")
            number_sent, word = draw.choice(((signal.SIGKILL, "kill -9"), (signal.SIGTERM, "SIGTERM")))
            phase = child.signal(number_sent, draw.choice((None, None, 1, 2, 3, 4)), draw, first=6) if attempt < 9 else None
            cells = [json.loads(path.read_text()) for path in out.rglob("result.json")]  # whole, each of them
            assert all("fingerprint" in cell for cell in cells)
            for path in out.glob("cells/*/*"):
                check_checkpoints(path)
            if phase is None:
                status, _, err = child.wait()
                assert status == 0, err[-2000:]
                break
            yield f"{word} in a comparison"
        assert report(out) == expected, "another table than an undisturbed comparison"
        shutil.rmtree(out)


ENCODER = """
import random, sys
sys.path[:0] = [{root!r}, {tests!r}]
import corpus
from pathlib import Path
from faults import Letters
if __name__ == "__main__":
    corpus.BLOCK, corpus.SHARD = 4_000, 8_000
    corpus.write_corpus(corpus.Files([Path(sys.argv[1])]), Path(sys.argv[2]), 1, Letters)
"""


class Letters:
    """An encoder for corpus.py that needs no vocabulary: bytes, and 256 as the end mark."""

    vocab_size, tokenizer, end = 257, {"type": "bytes"}, 256

    def encode_documents(self, texts):
        return np.concatenate([np.append(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16), 256) for text in texts])


def kills_in_preparation(folder: Path, draw: random.Random):
    """kill -9 while new data replace old ones: what is there afterwards is the old set, the new one, or none; then it is prepared whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.py").write_text(ENCODER.format(root=str(ROOT), tests=str(TESTS)))
    sources = {}
    for age, seed in (("old", 1), ("new", 2)):
        (folder / f"{age}.txt").write_text(sentences(300_000, seed))
        documents = [json.dumps({"text": sentences(300, seed=1000 * seed + i)}) for i in range(120)]
        (folder / f"{age}.jsonl").write_text("\n".join(documents))
        _write_npz(folder / f"{age}-npz", seed)
        sources[age] = {
            "text": ("data/shakespeare_char/prepare.py", [f"--source={folder / f'{age}.txt'}"]),
            "corpus": (str(folder / "corpus.py"), [str(folder / f"{age}.jsonl")]),
            "pictures": ("data/imagenet16/prepare.py", [f"--source={folder / f'{age}-npz'}"]),
        }

    def command(age, kind, out):
        script, words = sources[age][kind]
        return script, [*words, str(out) if kind == "corpus" else f"--out_dir={out}"]

    whole = {}
    for age, kind in itertools.product(("old", "new"), sources["old"]):
        succeed(*command(age, kind, folder / f"whole-{age}-{kind}"), folder / "io")
        whole[age, kind] = {name: body for name, body in content(folder / f"whole-{age}-{kind}").items() if not name.startswith(".")}
    longest = 0.3
    for number in itertools.count():
        kind, out = ("text", "corpus", "pictures")[number % 3], folder / f"killed-{number}"
        shutil.copytree(folder / f"whole-old-{kind}", out)
        for attempt in range(4):
            began = time.monotonic()
            child = Child(*command("new", kind, out), folder / "io")
            if attempt < 3:
                time.sleep(draw.uniform(0, longest))
                child.process.kill()
            status, _, err = child.wait()
            found = {name: body for name, body in content(out).items() if not name.startswith(".")}
            if "meta.json" in found:  # as what train.py would take it
                try:
                    Pictures(out, 4, 0, False, "cpu") if kind == "pictures" else Tokens(out, 8, "cpu")
                finally:
                    assert found in (whole["old", kind], whole["new", kind]), "a mixture of two data sets"
            if status == 0:
                longest = 0.7 * longest + 0.3 * (time.monotonic() - began)
                break
            assert status == -signal.SIGKILL, err[-2000:]
            yield "kill -9 while preparing data"
        assert found == whole["new", kind] and content(out).keys() == found.keys(), "something is left behind"
        shutil.rmtree(out)


def _write_npz(folder: Path, seed: int):
    """ImageNet's .npz layout, small."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train_a", 300), ("train_b", 200), ("val", 60)):
        labels = np.arange(count) % 3
        arrays = {"data": draw.integers(0, 256, (count, 768), dtype=np.uint8), "labels": np.array([20, 450, 900])[labels], "labels200": labels}
        np.savez(folder / f"{stem}.npz", **arrays)


def kills_of_reports(folder: Path, draw: random.Random):
    """kill -9 and files limited in size for evaluate.py and unroll.py: whole reports or none, and the same from the next run."""
    keys = TINY | ARMS["A - I"] | {"dataset": text_data(folder / "text"), "out_dir": folder / "run", "max_iters": 8}
    succeed("train.py", options(keys), folder / "io")
    commands = {
        "evaluate.py": [f"--out_dir={folder / 'run'}", "--margins=True", "--perturb=True", "--eval_tokens=64", "--device=cpu", "--out="],
        "unroll.py": ["--n=100", "--steps=2", "--seeds=1", "--latent_dim=4", "--device=cpu", "--out_dir="],
    }
    whole, seconds = {}, {}
    for script, words in commands.items():
        began = time.monotonic()
        succeed(script, [*words[:-1], f"{words[-1]}{folder / 'whole'}"], folder / "io")
        whole[script], seconds[script] = {path.name for path in (folder / "whole").iterdir()}, time.monotonic() - began
        shutil.rmtree(folder / "whole")
    for number in itertools.count():
        script = list(commands)[number % len(commands)]
        out, words = folder / f"killed-{number}", commands[script]
        command = [*words[:-1], f"{words[-1]}{out}"]
        child = Child(script, command, folder / "io")
        time.sleep(draw.uniform(0.3, 1) * seconds[script])
        child.process.kill()
        child.wait()
        for path in out.glob("*.json") if out.exists() else []:
            json.loads(path.read_text())
        one_line(run(script, command, folder / "io", functools.partial(_small_files, 1000)), "File too large")
        succeed(script, command, folder / "io")
        assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == whole[script]
        shutil.rmtree(out)
        yield f"kill -9 of {script}, and files limited in size"


def kills_of_the_command_line(folder: Path, draw: random.Random):
    """kill -9 of `python train.py` as a user starts it, at any moment from the first import on."""
    keys = TINY | NOISY | ARMS["A - I"] | {"dataset": text_data(folder / "text"), "out_dir": folder / "undisturbed"}
    succeed("train.py", options(keys), folder / "io")
    expected = losses(folder / "undisturbed")
    for number in itertools.count():
        out = folder / f"killed-{number}"
        while True:
            command = [sys.executable, str(ROOT / "train.py"), *options(keys | {"out_dir": out} | continued(out))]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, 6))
            process.kill()
            _, err = process.communicate()
            check_checkpoints(out)
            if (out / "metrics.jsonl").exists():
                assert losses(out).items() <= expected.items()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, err
            yield "kill -9 of the command line"
        assert losses(out) == expected and tensors(out / "last") == tensors(folder / "undisturbed" / "last")
        yield "kill -9 of the command line"


def _slow_steps():
    """In the child: from the fifth forward pass on each takes half a minute, as a large batch does on a CPU."""
    forward, passes = GPT.forward, itertools.count()

    def slow(self, *args, **kwargs):
        for _ in range(300 if next(passes) >= 5 else 0):
            time.sleep(0.1)
        return forward(self, *args, **kwargs)

    GPT.forward = slow


def _slow_disk(seconds: float = 0.05):
    """In the child: a disk that takes its time for everything that must be safe."""

    def slow(plain, *args, **kwargs):
        time.sleep(seconds)
        return plain(*args, **kwargs)

    for name in ("fsync", "replace"):
        setattr(os, name, functools.partial(slow, getattr(os, name)))


def sigterms(folder: Path, draw: random.Random):
    """SIGTERM in any phase: the end within 10 s, and what an undisturbed run gives after going on."""
    data = text_data(folder / "text")
    (folder / "io").mkdir(parents=True, exist_ok=True)
    command = comparison(folder / "compare")
    succeed("compare.py", [*command, f"--out_dir={folder / 'table'}"], folder / "io")
    (folder / "new.txt").write_text(sentences(300_000, 5))
    for number in itertools.count():
        arm = list(ARMS)[number % 3]
        keys = TINY | NOISY | ARMS[arm] | {"dataset": data}
        whole, out = folder / f"undisturbed-{arm}", folder / f"stopped-{number}"
        if not whole.exists():
            succeed("train.py", options(keys | {"out_dir": whole}), folder / "io")
        for phase, setup in ((1, None), (2, None), (3, None), (4, _slow_disk), (4, None), (2, _slow_steps)):
            if setup is _slow_steps and number % 3:
                continue
            child = Child("train.py", options(keys | continued(out) | {"out_dir": out}), folder / "io", setup)
            if setup is _slow_steps:
                while child.marks[3] < 3 and child.process.is_alive():
                    time.sleep(0.05)
            began = time.monotonic()
            found = child.signal(signal.SIGTERM, phase, draw, first=6)
            step = check_checkpoints(out)
            assert time.monotonic() - began < 60
            if found:
                if child.process.exitcode == 143:  # else it had nothing to save yet
                    assert f"stopped at step {step}" in (child.folder / "out").read_text()
                yield f"SIGTERM while {found}" + (", a step of half a minute" if setup is _slow_steps else "")
        succeed("train.py", options(keys | continued(out) | {"out_dir": out}), folder / "io")
        expected, found = losses(whole), losses(out)
        assert found.items() <= expected.items() and all(key in found for key in expected if key[0] == "val_loss")
        assert tensors(out / "last") == tensors(whole / "last") and tensors(out / "best") == tensors(whole / "best")
        shutil.rmtree(out)

        table = folder / f"table-{number}"
        child = Child("compare.py", [*command, f"--out_dir={table}"], folder / "io")
        if child.signal(signal.SIGTERM, draw.choice((1, 2, 3)), draw, first=6):
            yield "SIGTERM in a comparison"
        succeed("compare.py", [*command, f"--out_dir={table}"], folder / "io")
        assert report(table) == report(folder / "table")
        shutil.rmtree(table)

        prepared = folder / f"prepared-{number}"
        child = Child("data/shakespeare_char/prepare.py", [f"--source={folder / 'new.txt'}", f"--out_dir={prepared}"], folder / "io")
        time.sleep(draw.uniform(0, 0.15))
        child.process.terminate()
        status, _, err = child.wait()
        assert status in (0, -signal.SIGTERM) and not err, err
        if status:
            succeed("data/shakespeare_char/prepare.py", [f"--source={folder / 'new.txt'}", f"--out_dir={prepared}"], folder / "io")
            yield "SIGTERM while preparing data"
        Tokens(prepared, 8, "cpu")
        shutil.rmtree(prepared)


# ---------------------------------------------------------------------------------------------------------------------------------
# Disks


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A tmpfs at `folder`. Raises PermissionError where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True).returncode:
        raise PermissionError("mounting a tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    try:
        with mounted(folder, "size=64k"):
            return True
    except (PermissionError, FileNotFoundError):
        return False


def _goes_on(folder: Path, keys: dict, out: Path, whole: Path, removed: bool = False):
    """After a fault: the run goes on, or begins again, and ends as an undisturbed one; a row of the log that could not be written may lack.

    removed: so may what somebody has removed, rows of the log and best/.
    """
    check_checkpoints(out)
    if not (out / "last" / "checkpoint.json").exists() and out.exists():
        keys = keys | {"overwrite": True}
    succeed("train.py", options(keys | continued(out) | {"out_dir": out}), folder / "io")
    expected, found = losses(whole), losses(out)
    assert found.items() <= expected.items() and (removed or all(key in found for key in expected if key[0] == "val_loss"))
    assert tensors(out / "last") == tensors(whole / "last")
    if not removed or (out / "best").exists():
        assert tensors(out / "best") == tensors(whole / "best")


def full_disks(folder: Path, draw: random.Random):
    """A disk that becomes full at any moment of training, comparing or preparing data: one line, what was there intact, and then it goes on."""
    command = comparison(folder / "compare")
    succeed("compare.py", [*command, f"--out_dir={folder / 'table'}"], folder / "io")
    keys = TINY | NOISY | ARMS["A - I"] | {"dataset": text_data(folder / "text")}
    succeed("train.py", options(keys | {"out_dir": folder / "whole"}), folder / "io")
    (folder / "old.txt").write_text(sentences(20_000, 3))
    (folder / "new.txt").write_text(sentences(60_000, 4))
    for number in itertools.count():
        disk = folder / f"disk-{number}"
        with mounted(disk, f"size={4 * draw.randint(5, 120)}k"):
            result = run("train.py", options(keys | {"out_dir": disk / "run"}), folder / "io")
            if result[0]:
                one_line(result, "No space left on device")
                yield "a full disk while training"
            subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
            if result[0]:
                _goes_on(folder, keys, disk / "run", folder / "whole")
        with mounted(disk, f"size={4 * draw.randint(2, 60)}k"):
            result = run("compare.py", [*command, f"--out_dir={disk / 'table'}"], folder / "io")
            if result[0]:
                one_line(result, "No space left on device")
                yield "a full disk while comparing"
            subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
            succeed("compare.py", [*command, f"--out_dir={disk / 'table'}"], folder / "io")
            assert report(disk / "table") == report(folder / "table")
        script, out = "data/shakespeare_char/prepare.py", disk / "data"
        with mounted(disk, "size=16m"):
            succeed(script, [f"--source={folder / 'old.txt'}", f"--out_dir={out}"], folder / "io")
            (out / "input.txt").unlink()
            before = content(out)
            taken = sum(-(-len(body) // 4096) * 4096 for body in before.values())
            subprocess.run(["mount", "-o", f"remount,size={taken // 1024 + 4 * draw.randint(1, 44)}k", str(disk)], check=True)
            result = run(script, [f"--source={folder / 'new.txt'}", f"--out_dir={out}"], folder / "io")
            if result[0]:
                one_line(result, "No space left on device")
                assert content(out) == before
                yield "a full disk while preparing data"


def _small_files(size: int):
    """In the child: no file may grow beyond this size, as under a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _nobody():
    """In the child: a user who owns nothing. (What is imported later must not lie in the home of another: this codec does.)"""
    codecs.lookup("utf-32-le")
    os.setgid(65534)
    os.setuid(65534)


def bad_disks(folder: Path, draw: random.Random):
    """Quotas, read-only and forbidden directories, directories that disappear or become files, and slow disks."""
    keys = TINY | NOISY | ARMS["A - I"] | {"dataset": text_data(folder / "text")}
    whole = folder / "whole"
    succeed("train.py", options(keys | {"out_dir": whole}), folder / "io")
    for number in itertools.count():
        out = folder / f"run-{number}"
        sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
        result = run("train.py", options(keys | {"out_dir": out}), folder / "io", functools.partial(_small_files, draw.randint(100, max(sizes) - 1)))
        one_line(result, "File too large")
        _goes_on(folder, keys, out, whole)
        yield "files limited in size"
        shutil.rmtree(out)

        child = Child("train.py", options(keys | {"out_dir": out}), folder / "io")
        while child.marks[3] < draw.randint(2, 30) and child.process.is_alive():
            time.sleep(0.001)
        os.kill(child.process.pid, signal.SIGSTOP)
        running, missing = child.process.is_alive(), draw.choice(("the whole directory", "last", "the log"))
        if missing == "last":
            shutil.rmtree(out / "last", ignore_errors=True)
            (out / "last").write_text("not a directory")
        elif missing == "the log":
            (out / "metrics.jsonl").unlink()
        else:
            os.rename(out, folder / "elsewhere")
            shutil.rmtree(folder / "elsewhere")
        os.kill(child.process.pid, signal.SIGCONT)
        result = child.wait()
        if running and result[0]:
            message = one_line(result, str(out))
            if missing == "last":
                (out / "last").unlink()
                shutil.rmtree(out)
            else:
                assert "--init_from=resume continues" in message
            _goes_on(folder, keys, out, whole, removed=True)
            yield f"{missing} removed while training" if missing != "last" else "a file in the place of last/"
        shutil.rmtree(out, ignore_errors=True)

        succeed("train.py", options(keys | {"out_dir": out}), folder / "io", functools.partial(_slow_disk, 0.003))
        assert losses(out) == losses(whole) and tensors(out / "last") == tensors(whole / "last")
        shutil.rmtree(out)
        yield "a slow disk"

        if can_mount(folder / "mount"):
            with mounted(folder / "mount", "ro"):
                for script, words in (
                    ("train.py", options(keys | {"out_dir": folder / "mount" / "run"})),
                    ("compare.py", [*comparison(folder / "compare"), f"--out_dir={folder / 'mount' / 'table'}"]),
                    ("data/shakespeare_char/prepare.py", [f"--source={folder / 'compare' / 'base.py'}", f"--out_dir={folder / 'mount' / 'data'}"]),
                ):
                    one_line(run(script, words, folder / "io"), "Read-only file system", str(folder / "mount"))
                    yield "a read-only disk"
        if os.getuid() == 0:
            (folder / "closed").mkdir(mode=0o700, exist_ok=True)
            for path in (folder, *folder.parents):
                if path.stat().st_uid == 0 and not path.stat().st_mode & 1:
                    path.chmod(path.stat().st_mode | 0o55)
            for script, words in (
                ("train.py", options(keys | {"out_dir": folder / "closed" / "run"})),
                ("train.py", options(keys | {"dataset": folder / "closed"})),
                ("sample.py", [f"--out_dir={folder / 'closed'}"]),
                ("data/shakespeare_char/prepare.py", [f"--source={folder / 'compare' / 'base.py'}", f"--out_dir={folder / 'closed' / 'data'}"]),
            ):
                one_line(run(script, words, folder / "io", _nobody))
                yield "permission denied"


# ---------------------------------------------------------------------------------------------------------------------------------
# Damage


def damaged(whole: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """The bytes of a file with something wrong in them, and what."""
    place, length = draw.randrange(len(whole)), draw.choice((1, 2, 8, 64, 512))
    kinds = {
        "a flipped bit": whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :],
        "cut short": whole[:place],
        "zeros": whole[:place] + bytes(len(whole[place : place + length])) + whole[place + length :],
        "noise": whole[:place] + draw.randbytes(len(whole[place : place + length])) + whole[place + length :],
        "bytes left out": whole[:place] + whole[place + length :],
        "bytes too many": whole[:place] + draw.randbytes(length) + whole[place:],
        "another file": draw.choice(others),
        "empty": b"",
    }
    kind = draw.choice(list(kinds))
    return kind, kinds[kind]


def damaged_checkpoints(folder: Path, draw: random.Random):
    """Any region of any file of a checkpoint: the same bits, the checkpoint before it with a warning that names both, or a refusal by name."""
    keys = TINY | NOISY | ARMS["A - I"] | {"dataset": text_data(folder / "text"), "out_dir": folder / "run"}
    succeed("train.py", options(keys), folder / "io")
    best, last = folder / "run" / "best", folder / "run" / "last"
    for path in (best, last):
        (path / "notes.txt").unlink(missing_ok=True)
    intact = {path: content(path) for path in (best, last)}
    right = {(path, name): tensors(path, name) for path, name in ((best, "checkpoint.json"), (last, "checkpoint.json"), (last, checkpoint.PREVIOUS))}
    assert right[last, "checkpoint.json"]["step"] > right[last, checkpoint.PREVIOUS]["step"]
    warnings = folder / "warnings"
    for number in itertools.count():
        directory = (last, last, best)[number % 3]
        name = draw.choice(list(intact[directory]))
        kind, body = damaged(intact[directory][name], draw, [other for path in intact for key, other in intact[path].items() if "json" not in key])
        (directory / name).write_bytes(body)
        try:
            with open(warnings, "w") as file, contextlib.redirect_stderr(file):
                meta = checkpoint.readable(directory, "model", "optimizer")
            said = warnings.read_text()
            found = "checkpoint.json" if not said else checkpoint.PREVIOUS
            assert tensors(directory, found) == right[directory, found] and meta["step"] == right[directory, found]["step"], (name, kind)
            if said:
                assert said.startswith("warning: ") and said.count("\n") == 1 and str(directory / checkpoint.PREVIOUS) in said, said
                assert name in said or (name != "checkpoint.json" and "checkpoint.json" in said), said
        except InputError as error:  # best/ has no checkpoint before it
            assert directory == best and str(directory / name) in str(error), (name, kind, str(error))
        finally:
            (directory / name).write_bytes(intact[directory][name])
        yield "a damaged checkpoint: fallen back or refused by name" if said or directory == best else "a damaged checkpoint: the same bits"


def damaged_last(folder: Path, draw: random.Random):
    """The command line with a damaged last/: it goes on from the checkpoint before it, exactly."""
    keys = TINY | NOISY | ARMS["A - I"] | {"dataset": text_data(folder / "text")}
    whole, half = folder / "whole", folder / "half"
    succeed("train.py", options(keys | {"out_dir": whole}), folder / "io")
    succeed("train.py", options(keys | {"out_dir": half, "max_iters": 24, "lr_decay_iters": 40}), folder / "io")
    for number in itertools.count():
        out = folder / f"run-{number}"
        shutil.copytree(half, out)
        name = draw.choice([path.name for path in (out / "last").iterdir() if path.suffix != ".json" and "000024" in path.name] + ["checkpoint.json"])
        _, body = damaged((out / "last" / name).read_bytes(), draw, [b"another"])
        (out / "last" / name).write_bytes(body)
        status, _, err = run("train.py", options(keys | {"out_dir": out, "init_from": "resume"}), folder / "io")
        assert status == 0, err
        if err:
            assert err.startswith("warning: ") and name in err and f"step 16 of {out / 'last' / checkpoint.PREVIOUS}" in err, err
        assert losses(out) == losses(whole) and tensors(out / "last") == tensors(whole / "last")
        shutil.rmtree(out)
        yield "last/ damaged, resumed exactly from the one before"


def damaged_data(folder: Path, draw: random.Random):
    """Any region of the files of a data set, or of a comparison's cells: the same batches, or a refusal by name."""
    sets = {
        text_data(folder / "text"): lambda path: Tokens(path, 8, "cpu"),
        picture_data(folder / "p"): lambda path: Pictures(path, 4, 0, False, "cpu"),
    }
    intact = {path: content(path) for path in sets}

    def all_of(data) -> dict:
        found = {key: value for key, value in vars(data).items() if key in ("vocab_size", "tokenizer", "checksum", "n_classes", "image_size")}
        parts = {name: part if isinstance(part, tuple) else (part,) for name, part in data.split.items()}
        return found | {name: [t.numpy().tobytes() for t in part] for name, part in parts.items()}

    right = {path: all_of(read(path)) for path, read in sets.items()}
    for number in itertools.count():
        path = list(sets)[number % 2]
        name = draw.choice(list(intact[path]))
        kind, body = damaged(intact[path][name], draw, [other for some in intact.values() for other in some.values()])
        (path / name).write_bytes(body)
        try:
            assert all_of(sets[path](path)) == right[path], (name, kind)
        except InputError as error:
            assert str(path) in str(error) and str(error).isprintable(), (name, kind, str(error))
        finally:
            (path / name).write_bytes(intact[path][name])
        yield "a damaged data set"


# ---------------------------------------------------------------------------------------------------------------------------------
# Numbers


def _poison(step: int, parameter: int, value: float):
    """In the child: one element of the gradient of a parameter is not a number at this optimizer step (from 1)."""
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def poisoned(parameters, *args):
        parameters = list(parameters)
        if next(steps) == step:
            parameters[parameter % len(parameters)].grad.view(-1)[0] = value
        return clip(parameters, *args)

    torch.nn.utils.clip_grad_norm_ = poisoned


def divergence(folder: Path, draw: random.Random):
    """A gradient that is not finite at any step in any parameter: the end with step, layer norms and the checkpoint before, which goes on."""
    data = text_data(folder / "text")
    for number in itertools.count():
        arm, step, value = list(ARMS)[number % 3], draw.randint(1, 40), draw.choice((math.nan, math.inf, -math.inf))
        keys = TINY | NOISY | ARMS[arm] | {"dataset": data, "log_interval": draw.choice((1, 10))}
        whole, out = folder / f"undisturbed-{arm}", folder / f"run-{number}"
        if not whole.exists():
            succeed("train.py", options(keys | {"out_dir": whole, "log_interval": 1}), folder / "io")
        result = run("train.py", options(keys | {"out_dir": out}), folder / "io", functools.partial(_poison, step, draw.randrange(1000), value))
        before = (step - 1) // 8 * 8
        there = f"{out / 'last'} of step {before} is from before it" if before else "there is no checkpoint from before it"
        message = one_line(result, f"step {step}: loss", "gradient norm", "not finite", "h.0 ", "h.1 ", "wte ", "ln_f ", there, status=1)
        assert "nan" in message or "inf" in message
        assert check_checkpoints(out) == (before or None)
        if before:
            succeed("train.py", options(keys | {"out_dir": out, "init_from": "resume"}), folder / "io")
            assert tensors(out / "last") == tensors(whole / "last")
        shutil.rmtree(out)
        yield "a gradient that is not finite"


# ---------------------------------------------------------------------------------------------------------------------------------
# Processes

DYING = """
import os, runpy, signal, sys
from dataset import Tokens
batch, calls, call, way = Tokens.batch, [0], int(sys.argv[1]), sys.argv[2]
def dying(self, drawn):
    calls[0] += 1
    if os.environ["RANK"] == "1" and calls[0] == call and way != "stop":
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this rank has had enough")
    return batch(self, drawn)
Tokens.batch = dying
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def dying_ranks(folder: Path, draw: random.Random):
    """One of two processes dies, by kill -9 or by an error of its own: the other ends within a minute, the cause is shown, the run goes on.

    And SIGTERM for torchrun, which passes it on: both leave at the same step, which is saved.
    """
    keys = TINY | NOISY | ARMS["A - I"] | {"dataset": text_data(folder / "text")}
    (folder / "dying.py").write_text(DYING)
    for number in itertools.count():
        out, way = folder / f"run-{number}", ("error", "kill", "stop")[number % 3]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "dying.py", draw.randint(10, 38), way]
        longer = {"max_iters": 100_000, "lr_decay_iters": 40} if way == "stop" else {}
        command = [*map(str, launch), str(ROOT / "train.py"), *options(keys | {"out_dir": out} | longer)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        began = time.monotonic()
        while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < 12:
            if process.poll() is not None or time.monotonic() > began + 60:
                break
            time.sleep(0.05)
        if way == "stop":
            process.terminate()
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0
        step = check_checkpoints(out)
        if way == "stop":
            assert step >= 10, step  # both left at the same step, and saved it
            assert max(row["step"] for row in read_metrics(out)) == step
        else:
            cause = "ValueError: this rank has had enough" if way == "error" else "Signal 9 (SIGKILL)"
            assert cause in err and "rank      : 1" in err, err
            assert step in (8, 16, 24, 32)
            succeed("train.py", options(keys | {"out_dir": out, "init_from": "resume"}), folder / "io")
        shutil.rmtree(out)
        yield {"error": "a rank of two that dies by an error", "kill": "a rank of two that dies by kill -9", "stop": "SIGTERM for torchrun"}[way]


def locks(folder: Path, draw: random.Random):
    """A directory in which a training lives is refused and stays as it is; a killed one holds nothing."""
    keys = TINY | {"dataset": text_data(folder / "text"), "max_iters": 100_000, "eval_interval": 100_000, "decay_lr": False}
    for number in itertools.count():
        out = folder / f"run-{number}"
        owner = Child("train.py", options(keys | {"out_dir": out}), folder / "owner")
        while owner.marks[3] < 5:
            time.sleep(0.01)
        os.kill(owner.process.pid, signal.SIGSTOP)
        before = content(out)
        for more in ({"overwrite": True}, {}):
            one_line(run("train.py", options(keys | {"out_dir": out} | more), folder / "io"), "another training is writing", str(out))
        assert content(out) == before
        owner.process.kill()
        owner.process.join()
        succeed("train.py", options(keys | {"out_dir": out, "overwrite": True, "max_iters": 3, "warmup_iters": 1}), folder / "io")
        shutil.rmtree(out)
        yield "two trainings in one directory"


# ---------------------------------------------------------------------------------------------------------------------------------
# Input

ODD = [
    "",
    " ",
    "\n",
    "\t",
    "a\nb",
    "\x1b[31m",
    "é",
    "\U0001f600",
    "\u202e",
    "\ud800",
    "--",
    "-",
    "=",
    "==",
    "/",
    "..",
    "~",
    "*",
    "$HOME",
    "None",
    "nan",
]
ODD += [
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "1e-400",
    "9" * 30,
    "0x10",
    "١",
    "True",
    "[1]",
    "{}",
    "()",
    "a" * 300,
    "a/" * 200,
    "'",
    '"',
    "\\",
    "%s",
    "\x7f",
]


def odd_text(draw: random.Random, longest: int = 12) -> str:
    """Any text without zero bytes, which a command line cannot have."""
    parts = [draw.choice(ODD) if draw.random() < 0.5 else chr(draw.choice((draw.randint(1, 127), draw.randint(1, 0x10FFFF)))) for _ in range(longest)]
    return "".join(parts[: draw.randint(0, longest)])


def odd_command_lines(folder: Path, draw: random.Random):
    """Any key, any text, for every script: a config, or one line."""
    from compare import parse
    from configurator import TrainConfig, configure, field_names, one_line_errors
    from sample import SampleConfig

    data = text_data(folder / "text")
    succeed("train.py", options(TINY | {"dataset": data, "out_dir": folder / "run", "max_iters": 8}), folder / "io")
    (folder / "base.py").write_text("max_iters = 3\n")
    classes = [TrainConfig, SampleConfig]
    for script, name in (("bench", "BenchConfig"), ("evaluate", "EvaluateConfig"), ("unroll", "UnrollConfig")):
        if (ROOT / f"{script}.py").exists():
            classes.append(getattr(importlib.import_module(script), name))
    targets = [(cls, functools.partial(configure, cls)) for cls in classes]
    targets.append((TrainConfig, lambda words: parse([str(folder / "base.py"), *words, f"--out_dir={folder / 'table'}"])))
    for number in itertools.count():
        cls, target = targets[number % len(targets)]
        words = []
        for _ in range(draw.randint(1, 3)):
            key = draw.choice(field_names(cls)) if draw.random() < 0.8 else odd_text(draw, 4)
            value = odd_text(draw, 3) if draw.random() < 0.7 else str(draw.choice((draw.randint(-5, 5), draw.random() * 10 ** draw.randint(-5, 30))))
            words += draw.choice(([f"--{key}={value}"], [f"--{key}", value], [value, f"--{key}={value}"], [f"{value}.py"]))
        said = folder / "said"
        with open(said, "w", errors="backslashreplace") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            try:
                with one_line_errors():
                    target([word for word in words if "-h" not in word])
                status = 0
            except SystemExit as stop:
                status = stop.code
        err = said.read_text()
        assert (status, err) == (0, "") or (status == 2 and err.startswith("error: ") and err.count("\n") == 1 and err[:-1].isprintable()), (
            words,
            err,
        )
        yield "an odd command line"
        if number % 20 == 0:  # names that pass: the whole script
            key, value = draw.choice(("dataset", "out_dir", "init_from")), odd_text(draw, 4)
            keys = TINY | {"dataset": data, "out_dir": folder / "odd", "max_iters": 1, "warmup_iters": 0, "overwrite": True}
            if key == "out_dir":
                value = str(folder / "odd") + "/" + value.replace("..", "").replace("~", "")
            result = run("train.py", options(keys | {key: value.strip("/") if key != "out_dir" else value}), folder / "io")
            assert result[0] == 0 or one_line(result), value
            shutil.rmtree(folder / "odd", ignore_errors=True)
            yield "an odd name of a file"
        if number % 20 == 10:
            prompt = draw.choice(("", odd_text(draw), sentences(draw.randint(1, 400)), "FILE:" + odd_text(draw, 3), "T" * 5000))
            words = [f"--out_dir={folder / 'run'}", f"--start={prompt}", "--max_new_tokens=3", "--num_samples=1", "--device=cpu"]
            result = run("sample.py", words, folder / "io")
            assert result[0] == 0 or one_line(result), prompt
            yield "an odd prompt"


def odd_sources(folder: Path, draw: random.Random):
    """Texts and pictures that are not what a preparation hopes for: a data set that loads, or one line and nothing changed."""
    from PIL import Image

    (folder / "corpus.py").write_text(ENCODER.format(root=str(ROOT), tests=str(TESTS)))
    some = sentences(3000).encode()
    texts = {
        "empty": b"", "binary": bytes(range(256)) * 40, "one character": b"x" * 5000, "one letter": b"x", "one document": some,
        "a line of 10 MB": b"word " * 2_000_000, "no newline": some.replace(b"\n", b" "), "CRLF": some.replace(b"\n", b"\r\n"),
        "invalid UTF-8": some + b"\xff\xfe" + some, "a byte order mark": b"\xef\xbb\xbf" + some, "zeros": bytes(5000),
        "UTF-16": some.decode().encode("utf-16"), "half a surrogate": b"\xed\xa0\x80" * 500, "a JSON bomb": b"[" * 100_000,
        "lines of JSON": b'{"text": "a"}\n' * 50, "other JSON": b'{"tixt": 1}\n[]\n7\n',
    }  # fmt: skip

    def picture_folder(kind: str) -> Path:
        root = folder / f"pictures {kind}"
        shutil.rmtree(root, ignore_errors=True)
        for split, name in itertools.product(("train", "val"), ("cat",) if kind == "one class" else ("cat", "dog")):
            for i in range(3):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                side = 1 if kind == "1 x 1" else 20
                mode = "RGBA" if kind == "alpha channel" else "L" if kind == "grey" else "RGB"
                channels = {"RGBA": (4,), "L": (), "RGB": (3,)}[mode]
                noise = np.frombuffer(draw.randbytes(side * side * math.prod(channels)), np.uint8).reshape(side, side, *channels)
                Image.fromarray(noise, mode).save(path)
        victim = root / "train" / "cat" / "0.png"
        if kind == "corrupt JPEG":
            Image.new("RGB", (64, 64)).save(victim.with_suffix(".jpg"), quality=90)
            body = bytearray(victim.with_suffix(".jpg").read_bytes())
            for _ in range(20):
                body[draw.randrange(2, len(body))] = draw.randrange(256)
            victim.with_suffix(".jpg").write_bytes(body[: draw.randint(3, len(body))])
        elif kind == "not a picture":
            victim.write_bytes(draw.randbytes(300))
        elif kind == "empty file":
            victim.write_bytes(b"")
        elif kind == "a bomb":
            Image.new("1", (30_000, 30_000)).save(victim)
        elif kind == "a link out":
            victim.unlink()
            victim.symlink_to("/etc/passwd")
        return root

    kinds = ("corrupt JPEG", "one class", "alpha channel", "1 x 1", "grey", "not a picture", "empty file", "a bomb", "a link out")
    for number in itertools.count():
        out = folder / f"out-{number}"
        for name, body in texts.items():
            suffix = draw.choice((".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".tar", ".xz", ".parquet", ".jsonl.zst"))
            (folder / f"source{suffix}").write_bytes(body)
            (folder / "wikitext").mkdir(exist_ok=True)
            for part in ("train", "valid"):
                (folder / "wikitext" / f"{part}.txt").write_bytes(body)
            for script, words in (
                ("data/shakespeare_char/prepare.py", [f"--source={folder / f'source{suffix}'}", f"--out_dir={out}"]),
                (str(folder / "corpus.py"), [folder / f"source{suffix}", out]),
                ("data/wikitext2_char/prepare.py", [f"--source={folder / 'wikitext'}", f"--out_dir={out}"]),
            ):
                result = run(script, words, folder / "io")
                if result[0]:
                    assert script.endswith("corpus.py") or one_line(result), (name, result)
                    assert result[2].rstrip().rpartition("\n")[2].startswith(("error: ", "configurator.InputError: ")), (name, result)
                    assert not out.exists() or not content(out), (name, script, content(out).keys())
                else:
                    Tokens(out, 1, "cpu")
                shutil.rmtree(out, ignore_errors=True)
                yield "an odd text"
            (folder / f"source{suffix}").unlink()
        for kind in kinds:
            result = run("data/imagenet16/prepare.py", [f"--source={picture_folder(kind)}", f"--out_dir={out}"], folder / "io")
            if result[0]:
                one_line(result)
                assert not out.exists() or not content(out)
            else:
                Pictures(out, 4, 0, False, "cpu")
            shutil.rmtree(out, ignore_errors=True)
            yield "an odd folder of pictures"


# ---------------------------------------------------------------------------------------------------------------------------------
# Files that would run something


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def hostile_files(folder: Path, draw: random.Random):
    """A pickle in the place of every file that is read, and archives that lead out of their folder: nothing runs, nothing appears, one line."""
    mark = folder / "mark"
    evil = pickle.dumps(Payload(mark), protocol=2)
    torch.save({"model": Payload(mark), "model_args": {}}, folder / "zip")
    pickle.loads(evil)
    assert mark.exists()  # the payload works
    mark.unlink()
    keys = TINY | {"dataset": text_data(folder / "text"), "out_dir": folder / "run", "max_iters": 16}
    succeed("train.py", options(keys), folder / "io")
    last, meta = folder / "run" / "last", checkpoint.read_meta(folder / "run" / "last")
    before = content(folder / "run")
    resume = options(keys | {"init_from": "resume", "max_iters": 20})
    while True:
        for body in (evil, (folder / "zip").read_bytes()):
            for kind, script, words in (
                ("model", "train.py", resume), ("optimizer", "train.py", resume),
                ("model", "sample.py", [f"--out_dir={folder / 'run'}", "--which=last"]),
            ):  # fmt: skip
                path = last / meta["files"][kind]["name"]
                path.write_bytes(body)
                changed = json.loads((last / "checkpoint.json").read_text())
                changed["files"][kind]["sha256"] = dataset.sha256_of(path)
                changed["sha256"] = checkpoint._checksum(changed)
                (last / "checkpoint.json").write_text(json.dumps(changed))
                one_line(run(script, words, folder / "io"), str(path))
                assert not mark.exists()
                for name in ("checkpoint.json", path.name):
                    (last / name).write_bytes(before[f"last/{name}"])
                yield "a pickle for a checkpoint"
            (folder / "ckpt.pt").write_bytes(body)
            one_line(run("train.py", options(keys | {"out_dir": folder / "new", "init_from": folder / "ckpt.pt"}), folder / "io"), "ckpt.pt")
            yield "a pickle for nanoGPT's checkpoint"
            hub = folder / "hub"
            hub.mkdir(exist_ok=True)
            (hub / "config.json").write_text('{"model_type": "gpt2", "auto_map": {"AutoModel": "evil.Evil"}}')
            (hub / "pytorch_model.bin").write_bytes(body)
            (hub / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
            one_line(run("train.py", options(keys | {"out_dir": folder / "new", "init_from": hub}), folder / "io"), str(hub))
            yield "a pickle and a program for a folder of transformers"
            for layout in ("batches", "npz", "object array"):
                source = folder / layout
                shutil.rmtree(source, ignore_errors=True)
                if layout == "batches":
                    source.mkdir()
                    for name in (*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"):
                        (source / name).write_bytes(body)
                else:
                    _write_npz(source, 1)
                    (source / "train_a.npz").write_bytes(body)
                    if layout == "object array":
                        np.savez(source / "train_a.npz", data=np.array([Payload(mark)], dtype=object), labels=np.array([1]), labels200=np.array([0]))
                one_line(run("data/imagenet16/prepare.py", [f"--source={source}", f"--out_dir={folder / 'new'}"], folder / "io"))
                assert not (folder / "new").exists() or not content(folder / "new")
                yield f"a pickle for ImageNet's {'batches' if layout == 'batches' else '.npz'}"
            for name in ("metrics.jsonl", "last/checkpoint.json", "last/previous.json"):
                (folder / "run" / name).write_bytes(body)
                run("train.py", resume, folder / "io")
                shutil.rmtree(folder / "run")
                for path, old in before.items():
                    (folder / "run" / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / "run" / path).write_bytes(old)
                yield "a pickle for JSON"
            assert not mark.exists() and not (folder / "new").exists()
        for name in ("../escaped.txt", str(folder / "escaped.txt"), "a/../../escaped.txt"):
            with tarfile.open(folder / "a.tar", "w") as archive, zipfile.ZipFile(folder / "Imagenet16_train.zip", "w") as packed:
                for member, type_ in (
                    (name, tarfile.REGTYPE),
                    ("link.txt", tarfile.SYMTYPE),
                    ("hard.txt", tarfile.LNKTYPE),
                    ("good.txt", tarfile.REGTYPE),
                ):
                    info = tarfile.TarInfo(member)
                    info.type, info.linkname, info.size = type_, str(folder / "a.tar"), 5 if type_ == tarfile.REGTYPE else 0
                    archive.addfile(info, io.BytesIO(b"hello"))
                    packed.writestr(member, b"hello")
            (folder / "Imagenet16_val.zip").write_bytes((folder / "Imagenet16_train.zip").read_bytes())
            (folder / "corpus.py").write_text(ENCODER.format(root=str(ROOT), tests=str(TESTS)))
            run(folder / "corpus.py", [folder / "a.tar", folder / "new"], folder / "io")  # one document is left, too few
            both = f"{folder / 'Imagenet16_train.zip'},{folder / 'Imagenet16_val.zip'}"
            one_line(run("data/imagenet16/prepare.py", [f"--source={both}", f"--out_dir={folder / 'new'}"], folder / "io"))
            assert not list(folder.rglob("escaped.txt")) and not (folder.parent / "escaped.txt").exists() and not (folder / "new").exists()
            yield "an archive that leads out of its folder"
        with lzma.open(folder / "bomb.jsonl.xz", "w") as file:
            for _ in range(40):
                file.write(bytes(10_000_000))
        status, _, err = run(folder / "corpus.py", [folder / "bomb.jsonl.xz", folder / "new"], folder / "io")
        assert status and "unpacks to more than" in err and not (folder / "new").exists(), err
        yield "a bomb"


# ---------------------------------------------------------------------------------------------------------------------------------
# A long run


def long_run(folder: Path, steps: int, eval_interval: int = 50) -> Child:
    """Starts a run of many short steps and evaluations, which `resources` watches and `finish_long_run` ends."""
    keys = TINY | NOISY | ARMS["A - I"] | {"dataset": text_data(folder / "text"), "out_dir": folder / "run", "max_iters": steps}
    keys |= {"eval_interval": eval_interval, "log_interval": 10, "learning_rate": 1e-3, "always_save_checkpoint": False}
    return Child("train.py", options(keys), folder / "io")


def resources(child: Child) -> list[tuple[int, int]]:
    """Resident bytes and open files of a process: one sample, or none of a process that has just ended."""
    try:
        pages = int(Path(f"/proc/{child.process.pid}/statm").read_text().split()[1])
        return [(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{child.process.pid}/fd")))]
    except (FileNotFoundError, ProcessLookupError):
        return []


def finish_long_run(child: Child, folder: Path, samples: list[tuple[int, int]]) -> str:
    """Ends it by SIGTERM if it still runs. Memory, files and the log must be as they should; returns them in words."""
    child.process.terminate()
    status, _, err = child.wait()
    assert status in (0, 143) and not err, err
    samples = [sample for sample in samples if sample[1]]  # no files: it was just ending
    tenth = max(1, len(samples) // 10)
    early, late = (max(memory for memory, _ in part) for part in (samples[tenth : 2 * tenth + 1], samples[-tenth:]))
    files = {files for _, files in samples[tenth:]}
    rows = read_metrics(folder / "run")
    step = checkpoint.read_meta(folder / "run" / "last")["step"]
    logged, evaluated = ([row["step"] for row in rows if row[key] is not None] for key in ("train_loss", "val_loss"))
    assert logged[:-1] == list(range(10, logged[-1], 10)) and logged[-1] == step, "rows are missing"
    assert evaluated == list(range(0, evaluated[-1] + 1, 50)) or evaluated[-1] == step, "evaluations are missing"
    assert late < 1.02 * early, f"resident memory grew from {early:,} to {late:,} bytes"
    assert max(files) - min(files) <= 2 and samples[-1][1] <= samples[tenth][1] + 2, f"open files: {sorted(files)}"  # a file may be open just then
    return f"{step:,} steps, {len(evaluated):,} evaluations, memory {late / early - 1:+.2%}, {min(files)} open files"
