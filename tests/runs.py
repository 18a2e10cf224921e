"""Short runs of train.py on the CPU, in this process or as commands, for the tests of several modules."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import train
from configurator import TrainConfig
from metrics import read_metrics
from place import find_place

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2, warmup_iters=5, max_iters=40,
    eval_interval=1000, eval_tokens=320, log_interval=1, device="cpu", dtype="float32", compile=False,
)  # fmt: skip


def tiny(data: Path, out: Path, **changes) -> TrainConfig:
    return TrainConfig(**TINY | {"dataset": str(data), "out_dir": str(out)} | changes).check()


def build(config: TrainConfig) -> train.Program:
    return train.build(config, find_place(config.device, config.dtype))


def run(config: TrainConfig) -> list[dict]:
    """Trains in this process; returns the rows of the log."""
    train.train(build(config), config.seed, Path(config.out_dir), quiet=True)
    return read_metrics(Path(config.out_dir))


def losses(rows: list[dict], key: str = "train_loss") -> dict[int, float]:
    """{step: loss} of the rows that have one; a step may come once only."""
    found = [(row["step"], row[key]) for row in rows if row[key] is not None]
    assert len(dict(found)) == len(found)
    return dict(found)


def options(config: TrainConfig, **changes) -> list[str]:
    """The command line of a config."""
    values = dataclasses.asdict(config) | changes
    words = {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in values.items()}
    return [f"--{key}={word}" for key, word in words.items()]


def command(*args, **kwargs) -> subprocess.CompletedProcess:
    """`python train.py` with these arguments."""
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *args], capture_output=True, text=True, timeout=120, **kwargs)


def torchrun(script: Path, *args, **environment) -> subprocess.CompletedProcess:
    """Two processes of a script, connected by gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *args]
    return subprocess.run(launch, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
