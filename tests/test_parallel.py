"""parallel.py: shards and replicas train as one process does, and a checkpoint goes from any to any."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configurator import InputError
from metrics import read_metrics
from parallel import assign, distribute, gradient_sync, whole

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 3, "gradient_accumulation_steps": 4, "diffusion": True, "bias": True,
    "learning_rate": 1e-3, "warmup_iters": 2, "lr_decay_iters": 9, "log_interval": 1, "eval_interval": 3, "device": "cpu",
}  # fmt: skip


def run(tokens_dir, out_dir, processes: int, **keys):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    options = [f"--{key}={value}" for key, value in (KEYS | {"dataset": tokens_dir, "out_dir": out_dir} | keys).items()]
    command = [sys.executable, *launch, str(ROOT / "train.py"), *options]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]


def losses(out_dir) -> dict[str, dict[int, float]]:
    rows = read_metrics(out_dir)
    return {kind: {row["step"]: row[kind] for row in rows if row[kind] is not None} for kind in ("train_loss", "val_loss")}


def test_shards_then_replicas_then_one_process_train_as_one_process_alone(tokens_dir, tmp_path):
    """Twelve sequences a step in four micro-batches or two; each change is a resume from the checkpoint of the other kind."""
    run(tokens_dir, tmp_path / "one", 1, max_iters=9)
    run(tokens_dir, tmp_path / "many", 2, max_iters=3, parallel="fsdp")
    run(tokens_dir, tmp_path / "many", 2, max_iters=5, parallel="ddp", init_from="resume")
    run(tokens_dir, tmp_path / "many", 2, max_iters=7, parallel="fsdp", init_from="resume")
    run(tokens_dir, tmp_path / "many", 1, max_iters=9, init_from="resume")
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert sorted(one["train_loss"]) == sorted(many["train_loss"]) == list(range(1, 10))
    for step, loss in one["train_loss"].items():
        assert many["train_loss"][step] == pytest.approx(loss, abs=1e-5)
    for step in (0, 3, 6, 9):
        assert many["val_loss"][step] == pytest.approx(one["val_loss"][step], abs=1e-5)


def test_batches_that_cannot_be_cut_are_refused():
    model = torch.nn.Linear(2, 2)
    assert distribute(model, "fsdp", SimpleNamespace(world=1), 1, compiled=False) is model
    with pytest.raises(InputError, match="too small for 4 processes"):
        distribute(model, "ddp", SimpleNamespace(world=4), 3, compiled=False)
    with pytest.raises(InputError, match="5 sequences is not divisible by 2 processes"):
        distribute(model, "fsdp", SimpleNamespace(world=2), 5, compiled=False)


def test_a_single_process_needs_none_of_it():
    tensor = torch.zeros(3)
    assert whole(tensor) is tensor
    assign(tensor, torch.arange(3.0))
    assert tensor.tolist() == [0, 1, 2]
    layer = torch.nn.Linear(3, 1)
    with gradient_sync(layer, on=False):
        layer(tensor).sum().backward()
    assert layer.weight.grad.tolist() == [[0, 1, 2]]
