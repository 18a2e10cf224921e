"""train.py: a run against a plain loop, one process against two, an interrupted run against an undisturbed one, and refusals."""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import build, command, losses, options, run, tiny, torchrun
from torch.nn import functional as F

import checkpoint
import train
from configurator import InputError, TrainConfig, one_line_errors
from dataset import Tokens, write_tokens
from metrics import KEYS, Metrics, read_metrics
from model import GPT, GPTConfig
from place import find_place
from train import learning_rate

ROOT = Path(__file__).resolve().parents[1]
NOISY = dict(dropout=0.2, diffusion=True, diffusion_heads=(0, 1), diffusion_alpha=0.9, bias=True)


def refused(config: TrainConfig, capsys) -> str:
    """Ends as the command line does with status 2; returns the one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, one_line_errors():
        sys.exit(train.main(config))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    meta = checkpoint.read_meta(directory)
    return {f"{kind} {name}": t for kind in meta["files"] for name, t in checkpoint._read_tensors(directory, meta, kind).items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def send(number: int):
    """This process gets a signal; not when nothing would catch it, which would end the tests."""
    assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    os.kill(os.getpid(), number)


def stopping_at(step: int, number: int, program: train.Program) -> train.Program:
    """The program, which gets this signal while it does optimizer step `step` (from 0)."""

    def interrupted(seed, i):
        if i == step:
            send(number)
        return program.step(seed, i)

    return program._replace(step=interrupted)


@pytest.fixture(scope="module")
def undisturbed(tokens_dir, tmp_path_factory) -> Path:
    """A run of 40 steps with dropout on, evaluated at its two ends alone. No test changes it."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(tiny(tokens_dir, out, **NOISY))
    return out


# ---------------------------------------------------------------------------------------------------------------------------------
# What a step computes


@pytest.mark.parametrize("arm", [{}, {"diffusion": True, "diffusion_lambda": 1.2}], ids=["A", "diffusion"])
def test_training_equals_a_plain_loop(tokens_dir, tmp_path, arm):
    """AdamW, decay of matrices alone, clipping, schedule and accumulation, in float64, one sequence at a time."""
    config = tiny(tokens_dir, tmp_path, max_iters=12, gradient_accumulation_steps=3, grad_clip=1.2, weight_decay=0.3, bias=True, **arm)
    rows = run(config)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)}
    data = np.frombuffer((tokens_dir / "train.bin").read_bytes(), dtype="<u2").astype(np.int64)
    tokens = Tokens(tokens_dir, config.block_size, "cpu")
    model = GPT(GPTConfig(**shared | {"vocab_size": tokens.vocab_size}))
    model.init_weights(config.seed)
    model = model.double()
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    expected, norms = {}, {}
    for step in range(12):
        total = 0.0
        model.zero_grad()
        for start in tokens.draw(config.seed, step, 12):
            x, y = (torch.from_numpy(data[start + shift : start + shift + 16])[None] for shift in (0, 1))
            loss = F.cross_entropy(model(x, y)[0][0], y[0]) / 12
            loss.backward()
            total += loss.item()
        norm = float(sum(p.grad.square().sum() for p in model.parameters())) ** 0.5
        rate = 1e-2 * (step + 1) / 6 if step < 5 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 5) / 7)) / 2
        with torch.no_grad():
            for name, p in model.named_parameters():
                first, second = moments[name]
                g = p.grad * min(1, 1.2 / norm)
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.95).add_(0.05 * g * g)
                if p.dim() == 2:
                    p -= rate * 0.3 * p
                p -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        expected[step + 1], norms[step + 1] = total, norm
        assert rows[step + 1]["lr"] == pytest.approx(rate, rel=1e-12)
    assert min(norms.values()) < 1.2 < max(norms.values())  # clipped at some steps only
    assert losses(rows) == pytest.approx(expected, abs=2e-5)
    assert losses(rows, "grad_norm") == pytest.approx(norms, rel=1e-3)


def test_accumulation_equals_one_large_batch(tokens_dir, tmp_path):
    parts, whole = tiny(tokens_dir, tmp_path / "parts", gradient_accumulation_steps=3), tiny(tokens_dir, tmp_path / "whole", batch_size=12)
    assert losses(run(parts)) == pytest.approx(losses(run(whole)), abs=1e-5)


def test_alpha_zero_trains_as_attention_bit_for_bit(tokens_dir, tmp_path):
    plain = run(tiny(tokens_dir, tmp_path / "a"))
    zero = run(tiny(tokens_dir, tmp_path / "b", diffusion=True, diffusion_alpha=0.0))
    laplacian = run(tiny(tokens_dir, tmp_path / "c", diffusion=True))
    assert losses(plain) == losses(zero) and losses(plain, "val_loss") == losses(zero, "val_loss")
    assert losses(plain) != losses(laplacian)


def test_equal_seeds_give_equal_runs_and_others_do_not(tokens_dir, tmp_path):
    runs = [losses(run(tiny(tokens_dir, tmp_path / str(i), max_iters=8, seed=seed, **NOISY))) for i, seed in enumerate((1, 1, 2))]
    assert runs[0] == runs[1]
    assert all(runs[0][step] != runs[2][step] for step in range(1, 9))


def test_dropout_is_a_pure_function_of_seed_and_step(tokens_dir, tmp_path):
    program = build(tiny(tokens_dir, tmp_path, **NOISY))
    batch = program.data.draw(0, 0, 4)
    program.data.draw = lambda seed, step, rows: batch  # the same sequences at every step

    def loss(seed, step):
        program.model.init_weights(0)
        return program.step(seed, step)[0].item()

    keys = [(seed, step) for seed in (1, 2) for step in (0, 1, 2)]
    first = {key: loss(*key) for key in keys}
    torch.manual_seed(5)
    assert {key: loss(*key) for key in reversed(keys)} == first
    assert len(set(first.values())) == len(keys)


def test_one_program_trains_seed_after_seed_as_if_it_were_new(tokens_dir, tmp_path):
    config = tiny(tokens_dir, tmp_path, max_iters=8, **NOISY)
    program = build(config)
    results = {}
    for name, seed in (("first", 1), ("other", 2), ("again", 1)):
        results[name] = train.train(program, seed, tmp_path / name, save=False, quiet=True)
        assert os.listdir(tmp_path / name) == ["metrics.jsonl"]
    rows = {name: losses(read_metrics(tmp_path / name)) for name in results}
    assert rows["first"] == rows["again"] == losses(run(dataclasses.replace(config, seed=1, out_dir=str(tmp_path / "new"))))
    assert results["first"]["curve"] == results["again"]["curve"] != results["other"]["curve"]


def test_the_model_learns(undisturbed):
    curve = losses(read_metrics(undisturbed), "val_loss")
    assert sorted(curve) == [0, 40]
    assert curve[0] > 3.2 and curve[40] < 2.3  # ln 27 = 3.3; counts of single characters alone give 2.8


def test_schedule_against_numbers_worked_out_by_hand():
    config = TrainConfig(learning_rate=1e-3, warmup_iters=10, max_iters=110)
    rates = {0: 1e-3 / 11, 4: 5e-3 / 11, 9: 1e-2 / 11, 10: 1e-3, 60: 5.5e-4, 110: 1e-4, 111: 1e-4, 10**6: 1e-4}
    rates |= {35: 1e-4 + 9e-4 * (2 + 2**0.5) / 4, 85: 1e-4 + 9e-4 * (2 - 2**0.5) / 4, 10 + 100 / 3: 1e-4 + 9e-4 * 0.75}
    assert {step: learning_rate(config, step) for step in rates} == pytest.approx(rates, rel=1e-12)
    shorter = dataclasses.replace(config, lr_decay_iters=60, min_lr=0.0)
    assert [learning_rate(shorter, step) for step in (10, 35, 60, 100)] == pytest.approx([1e-3, 5e-4, 0.0, 0.0], abs=1e-18)
    assert {learning_rate(dataclasses.replace(config, decay_lr=False), step) for step in (0, 5, 10**6)} == {1e-3}
    assert learning_rate(dataclasses.replace(config, warmup_iters=0), 0) == 1e-3


def test_weight_decay_is_on_matrices_alone_and_groups_cover_the_model(tokens_dir, tmp_path):
    program = build(tiny(tokens_dir, tmp_path, bias=True, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in program.optimizer.param_groups for p in group["params"]}
    assert {name: decay.pop(id(p)) for name, p in program.model.named_parameters()} == {
        name: 0.3 if name.endswith("weight") and "ln_" not in name else 0.0 for name, _ in program.model.named_parameters()
    }
    assert decay == {}


# ---------------------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("T, batch_size, at_least", [(16, 100, 1), (13, 4, 1), (16, 4, train.EVAL_TOKENS)])
def test_evaluation_is_the_mean_over_every_target(tokens_dir, tmp_path, monkeypatch, T, batch_size, at_least):
    monkeypatch.setattr(train, "EVAL_TOKENS", at_least)
    config = tiny(tokens_dir, tmp_path, block_size=T, batch_size=batch_size, eval_tokens=0, dropout=0.5)
    program = build(config)
    with torch.no_grad():
        for p in program.model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    ids = torch.from_numpy(np.frombuffer((tokens_dir / "val.bin").read_bytes(), dtype="<u2").astype(np.int64))
    model, total = GPT(program.model.config).double().eval(), 0.0
    model.load_state_dict(program.model.state_dict())
    for start in range(0, len(ids) - 1, T):
        x, y = ids[start : start + T][: len(ids) - 1 - start], ids[start + 1 : start + 1 + T]
        total += F.cross_entropy(model(x[None], y[None])[0][0], y, reduction="sum").item()
    assert program.evaluate()["val_loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-6)


def test_evaluation_does_not_disturb_training(tokens_dir, tmp_path, undisturbed):
    often = run(tiny(tokens_dir, tmp_path, **NOISY | {"eval_interval": 3, "eval_tokens": 0, "log_interval": 1}))
    assert losses(often) == losses(read_metrics(undisturbed))
    assert sorted(losses(often, "val_loss")) == [*range(0, 40, 3), 40]
    assert equal(tensors(tmp_path / "last"), tensors(undisturbed / "last"))


def test_rows_have_exactly_the_keys_and_the_mean_of_their_steps(tokens_dir, tmp_path, undisturbed):
    rows = run(tiny(tokens_dir, tmp_path, **NOISY | {"log_interval": 4, "eval_interval": 10}))
    each = losses(read_metrics(undisturbed))
    assert all(list(row) == list(KEYS) for row in rows)
    assert KEYS == ("step", "train_loss", "val_loss", "top1", "top5", "ms", "tokens_per_s", "lr", "grad_norm", "mfu")
    found = losses(rows)
    assert sorted(found) == sorted({*range(4, 41, 4), *range(10, 41, 10)})
    before = 0
    for step in sorted(found):
        assert found[step] == pytest.approx(sum(each[i] for i in range(before + 1, step + 1)) / (step - before), rel=1e-12)
        before = step
    for row in rows:
        if row["val_loss"] is None:
            assert all(row[key] > 0 for key in ("train_loss", "ms", "tokens_per_s", "lr", "grad_norm")) and row["mfu"] is None
        else:
            assert [key for key in KEYS if row[key] is not None] == ["step", "val_loss"]


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(tokens_dir, tmp_path):
    config = tiny(tokens_dir, tmp_path, max_iters=60, eval_interval=4, decay_lr=False, learning_rate=0.1)
    result = train.train(build(config), config.seed, tmp_path, quiet=True)
    curve = losses(read_metrics(tmp_path), "val_loss")
    best = min(curve, key=curve.get)
    assert 0 < best < 60  # a rate at which it gets worse again
    assert result["curve"] == [[step, loss] for step, loss in curve.items()]
    assert (result["best_step"], result["best_val_loss"], result["val_loss"]) == (best, curve[best], curve[60])
    for name, step in (("best", best), ("last", 60)):
        model, _, meta = checkpoint.load_model(tmp_path, name)
        assert (meta["step"], meta["best_step"], meta["best_val_loss"], meta["val_loss"]) == (step, best, curve[best], curve[step])
        program = build(config)
        program.model.load_state_dict(model.state_dict())
        assert program.evaluate() == {"val_loss": curve[step]}
    assert list(checkpoint.read_meta(tmp_path / "best")["files"]) == ["model"]


def test_last_is_written_at_the_end_alone_when_asked(tokens_dir, tmp_path):
    steps = []
    config = tiny(tokens_dir, tmp_path, max_iters=6, eval_interval=2, always_save_checkpoint=False)
    program = build(config)

    def watching(seed, i):
        steps.append((tmp_path / "last").exists())
        return program.step(seed, i)

    train.train(program._replace(step=watching), 1, tmp_path, quiet=True)
    assert steps == [False] * 6 and checkpoint.read_meta(tmp_path / "last")["step"] == 6


def test_eval_only_leaves_files_untouched(tokens_dir, tmp_path, undisturbed, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    before = content(out)
    for init_from, expected in (("resume", losses(read_metrics(out), "val_loss")[40]), ("scratch", losses(read_metrics(out), "val_loss")[0])):
        config = tiny(tokens_dir, out, **NOISY | {"eval_only": True, "init_from": init_from, "overwrite": True})
        assert train.main(config) == 0
        assert content(out) == before
        assert f"val loss {expected:.4f}\n" in capsys.readouterr().out
    assert train.main(tiny(tokens_dir, tmp_path / "none", eval_only=True)) == 0
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------------------------------------------------------------
# Interruption and continuation

KILLED = """
import os, signal, sys
import train
from configurator import TrainConfig, configure
build = train.build
def dying(*args):
    program = build(*args)
    def step(seed, i):
        if i == 27:
            os.kill(os.getpid(), signal.SIGKILL)
        return program.step(seed, i)
    return program._replace(step=step)
train.build = dying
train.main(configure(train.TrainConfig, sys.argv[1:]))
"""


def test_a_killed_run_resumes_exactly(tokens_dir, tmp_path, undisturbed):
    config = tiny(tokens_dir, tmp_path, **NOISY | {"eval_interval": 5})
    dying = [sys.executable, "-c", KILLED, *options(config)]
    killed = subprocess.run(dying, capture_output=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.read_meta(tmp_path / "last")["step"] == 25
    assert max(losses(read_metrics(tmp_path))) == 27
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 28, "train_lo')  # a line that the kill cut short
    assert max(losses(read_metrics(tmp_path))) == 27
    again = command(*options(config, init_from="resume", eval_interval=7))
    assert (again.returncode, again.stderr) == (0, "")
    assert losses(read_metrics(tmp_path)) == losses(read_metrics(undisturbed))
    assert sorted(losses(read_metrics(tmp_path), "val_loss")) == [0, 5, 10, 15, 20, 25, 28, 35, 40]
    assert losses(read_metrics(tmp_path), "val_loss")[40] == losses(read_metrics(undisturbed), "val_loss")[40]
    assert equal(tensors(tmp_path / "last"), tensors(undisturbed / "last"))


def test_sigterm_saves_and_a_live_run_keeps_its_directory(tokens_dir, tmp_path, capsys):
    config = tiny(tokens_dir, tmp_path / "run", **NOISY | {"max_iters": 10**6, "decay_lr": False, "batch_size": 2})
    live = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *options(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "run" / "metrics.jsonl").exists() and read_metrics(tmp_path / "run")[3:]):
            assert live.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(live.pid, signal.SIGSTOP)  # so that what is there can be compared
        before = content(tmp_path / "run")
        intruder = dataclasses.replace(config, max_iters=6)
        messages = [refused(dataclasses.replace(intruder, overwrite=overwrite), capsys) for overwrite in (True, False)]
        assert content(tmp_path / "run") == before
        os.kill(live.pid, signal.SIGCONT)
        live.terminate()
        out, err = live.communicate(timeout=60)
    finally:
        live.kill()
    assert all(f"--out_dir={tmp_path / 'run'}" in message and "another training" in message for message in messages)
    step = checkpoint.read_meta(tmp_path / "run" / "last")["step"]
    assert (live.returncode, err) == (143, "")
    assert f"stopped at step {step}, saved in {tmp_path / 'run' / 'last'}" in out.splitlines()[-1]
    assert max(losses(read_metrics(tmp_path / "run"))) == step
    run(dataclasses.replace(config, init_from="resume", max_iters=step + 3))
    expected = run(dataclasses.replace(config, out_dir=str(tmp_path / "whole"), max_iters=step + 3))
    assert losses(read_metrics(tmp_path / "run")) == losses(expected)
    assert equal(tensors(tmp_path / "run" / "last"), tensors(tmp_path / "whole" / "last"))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("log_interval", [1, 4])
def test_a_signal_saves_after_the_step_and_resumes(tokens_dir, tmp_path, undisturbed, number, status, log_interval, monkeypatch):
    config = tiny(tokens_dir, tmp_path, **NOISY | {"log_interval": log_interval})
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", lambda *args, plain=train.build: stopping_at(13, number, plain(*args)))
        assert train.main(config) == status
    assert signal.getsignal(number) is before
    assert checkpoint.read_meta(tmp_path / "last")["step"] == 14 == max(losses(read_metrics(tmp_path)))
    rows = run(dataclasses.replace(config, init_from="resume", log_interval=1))
    expected = losses(read_metrics(undisturbed))
    assert {step: loss for step, loss in losses(rows).items() if step > 14} == {step: loss for step, loss in expected.items() if step > 14}
    assert equal(tensors(tmp_path / "last"), tensors(undisturbed / "last"))


def test_a_finished_run_continues_with_more_steps(tokens_dir, tmp_path):
    shared = {"lr_decay_iters": 30, "eval_interval": 10}
    parts = tiny(tokens_dir, tmp_path / "parts", max_iters=20, **NOISY | shared)
    run(parts)
    finished = content(tmp_path / "parts")
    run(dataclasses.replace(parts, init_from="resume"))
    assert content(tmp_path / "parts") == finished  # nothing left to do
    rows = run(dataclasses.replace(parts, init_from="resume", max_iters=30))
    whole = run(tiny(tokens_dir, tmp_path / "whole", max_iters=30, **NOISY | shared))
    for key in ("train_loss", "val_loss", "lr"):
        assert losses(rows, key) == losses(whole, key)
    metas = [checkpoint.read_meta(tmp_path / name / "last") for name in ("parts", "whole")]
    assert all(metas[0][key] == metas[1][key] for key in ("step", "best_step", "best_val_loss", "val_loss"))
    assert equal(tensors(tmp_path / "parts" / "last"), tensors(tmp_path / "whole" / "last"))


def test_a_signal_in_the_last_step_loses_nothing(tokens_dir, tmp_path, undisturbed):
    config = tiny(tokens_dir, tmp_path, **NOISY)
    train.train(stopping_at(39, signal.SIGTERM, build(config)), config.seed, tmp_path, quiet=True)  # there is nothing to interrupt any more
    for key in ("train_loss", "val_loss"):
        assert losses(read_metrics(tmp_path), key) == losses(read_metrics(undisturbed), key)
    assert equal(tensors(tmp_path / "last"), tensors(undisturbed / "last"))


class InterruptingPlace:
    """A place at which SIGTERM arrives as soon as the loop asks for the device, after it has set up its signal handlers."""

    def __init__(self, place):
        self.place = place

    def __getattr__(self, name):
        if name == "device":
            send(signal.SIGTERM)
        return getattr(self.place, name)


@pytest.mark.parametrize("eval_step", [0, 20])
def test_a_signal_at_an_evaluation_loses_no_evaluation(tokens_dir, tmp_path, eval_step):
    shared = NOISY | {"eval_interval": 10}
    whole = run(tiny(tokens_dir, tmp_path / "whole", **shared))
    config = tiny(tokens_dir, tmp_path / "parts", **shared)
    program = build(config)
    with pytest.raises(train.Interrupted):
        if eval_step == 0:
            arrive = program._replace(place=InterruptingPlace(program.place))
            train.train(arrive, config.seed, tmp_path / "parts", quiet=True)
        else:
            train.train(stopping_at(eval_step - 1, signal.SIGTERM, program), config.seed, tmp_path / "parts", quiet=True)
    assert checkpoint.read_meta(tmp_path / "parts" / "last")["step"] == eval_step
    assert losses(run(dataclasses.replace(config, init_from="resume")), "val_loss") == losses(whole, "val_loss")


def test_a_run_starts_from_the_weights_of_another(tokens_dir, tmp_path, undisturbed):
    changes = {"init_from": str(undisturbed / "last"), "block_size": 8, "max_iters": 6, "n_layer": TrainConfig.n_layer, "diffusion_heads": ()}
    config = tiny(tokens_dir, tmp_path, **NOISY | changes)
    program = build(config)
    assert (program.config.n_layer, program.config.block_size) == (2, 8)
    assert train.start_state(program, 1, tmp_path) == (0, {})
    weights = checkpoint.read_weights(undisturbed / "last")[0]
    for name, p in program.model.named_parameters():
        assert torch.equal(p, weights[name][:8] if name.endswith("wpe.weight") else weights[name])
    assert all(not tensor.any() for state in program.optimizer.state.values() for tensor in state.values())
    assert max(losses(run(config))) == 6
    with pytest.raises(InputError, match="--block_size=17 .* 16 positions"):
        build(dataclasses.replace(config, block_size=17))
    with pytest.raises(InputError, match="has n_layer=2, this run asks for --n_layer=4"):  # a wish that would otherwise be ignored
        build(dataclasses.replace(config, n_layer=4))


def test_weights_of_another_vocabulary_are_noted(undisturbed, tokens_dir, tmp_path, capsys):
    meta = json.loads((tokens_dir / "meta.json").read_text())
    characters = meta["tokenizer"]["characters"]
    other = {"vocab_size": len(characters), "tokenizer": {"type": "char", "characters": characters[::-1]}}
    (tmp_path / "other").mkdir()
    write_tokens(tmp_path / "other", *(np.arange(2000) % len(characters) for _ in range(2)), other)
    notes = []
    for data in (tokens_dir, tmp_path / "other"):
        config = tiny(data, tmp_path / "out", init_from=str(undisturbed / "last"), max_iters=1, warmup_iters=0, bias=True, overwrite=True)
        assert train.run(config, find_place("cpu", "float32")) == 0
        notes.append("the same numbers mean other things" in capsys.readouterr().out)
    assert notes == [False, True]


# ---------------------------------------------------------------------------------------------------------------------------------
# Refusals and divergence


def test_a_directory_that_holds_a_run_is_refused_and_unchanged(tokens_dir, tmp_path, undisturbed):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    before = content(out)
    done = command(*options(tiny(tokens_dir, out, **NOISY)))
    assert done.returncode == 2 and content(out) == before
    assert done.stderr.startswith(f"error: --out_dir={out} holds a run: ") and done.stderr.count("\n") == 1
    assert "--overwrite=True" in done.stderr and "--init_from=resume" in done.stderr


def test_overwrite_replaces_the_run(tokens_dir, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    config = tiny(tokens_dir, tmp_path / "run", max_iters=6, overwrite=True)
    assert losses(run(config)) == losses(run(dataclasses.replace(config, out_dir=str(tmp_path / "new"))))
    assert checkpoint.read_meta(tmp_path / "run" / "last")["step"] == 6
    assert len(list((tmp_path / "run").rglob("*.safetensors"))) == len(list((tmp_path / "new").rglob("*.safetensors"))) == 3


def test_overwrite_leaves_nothing_of_the_old_run(tokens_dir, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(train.Interrupted):
        config = tiny(tokens_dir, tmp_path / "run", overwrite=True)
        train.train(stopping_at(3, signal.SIGTERM, build(config)), config.seed, tmp_path / "run", quiet=True)
    assert checkpoint.read_meta(tmp_path / "run" / "last")["step"] == 4
    assert not (tmp_path / "run" / "best").exists()  # 40 steps of another architecture


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_embd": 16}, ["n_embd=32", "n_embd=16"]),
        ({"n_layer": 3, "diffusion_heads": ()}, ["n_layer=2", "n_layer=3"]),
        ({"n_head": 4}, ["n_head=2", "n_head=4"]),
        ({"block_size": 8}, ["block_size=16", "block_size=8"]),
        ({"dropout": 0.1}, ["dropout=0.2", "dropout=0.1"]),
        ({"bias": False}, ["bias=True", "bias=False"]),
        ({"vocab_size": 64}, ["vocab_size=", "vocab_size=64"]),
        ({"diffusion_heads": (1, 1)}, ["diffusion_heads=(0, 1)", "diffusion_heads=(1, 1)"]),
        ({"diffusion_alpha": 1.0}, ["diffusion_alpha=0.9", "diffusion_alpha=1.0"]),
        ({"diffusion_lambda": 2.0}, ["diffusion_lambda=1.0", "diffusion_lambda=2.0"]),
        ({"seed": 7}, ["--seed=1337", "--seed=7"]),
    ],
    ids=str,
)
def test_resume_of_another_run_is_refused_by_name(tokens_dir, tmp_path, undisturbed, capsys, changes, words):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    before = content(out)
    message = refused(tiny(tokens_dir, out, **NOISY | {"init_from": "resume", "max_iters": 50} | changes), capsys)
    assert str(out / "last") in message and all(word in message for word in words), message
    assert content(out) == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_resume_on_other_data_is_refused_by_name(tokens_dir, tmp_path, undisturbed, capsys, split):
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(undisturbed, out)
    ids = {name: np.frombuffer((tokens_dir / f"{name}.bin").read_bytes(), dtype="<u2").copy() for name in ("train", "val")}
    ids[split][100] = (ids[split][100] + 1) % 20
    meta = json.loads((tokens_dir / "meta.json").read_text())
    other.mkdir()
    write_tokens(other, ids["train"], ids["val"], {key: meta[key] for key in ("vocab_size", "tokenizer")})
    before = content(out)
    message = refused(tiny(other, out, **NOISY | {"init_from": "resume", "max_iters": 50}), capsys)
    assert f"--dataset={other}" in message and "other data" in message and content(out) == before


def test_what_is_not_there_is_named(tokens_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cases = [
        ({"init_from": "resume"}, str(tmp_path / "out" / "last")),
        ({"init_from": str(tmp_path / "none")}, str(tmp_path / "none")),
        ({"init_from": str(tmp_path / "none.pt")}, str(tmp_path / "none.pt")),
        ({"dataset": str(tmp_path / "nodata")}, f"--dataset={tmp_path / 'nodata'}"),
        ({"out_dir": str(tmp_path / "file" / "run")}, f"--out_dir={tmp_path / 'file' / 'run'}"),
        ({"out_dir": str(tmp_path / "file")}, f"--out_dir={tmp_path / 'file'}"),
        ({"vocab_size": 5}, "--vocab_size=5"),
        ({"block_size": 1999 + 1}, "--block_size=2000"),
        ({"dtype": "float16"}, "--dtype=float16"),
        ({"cuda_graph": True}, "--cuda_graph=True"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "--device=cuda")]),
    ]
    for changes, word in cases:
        assert word in refused(tiny(tokens_dir, tmp_path / "out", **changes), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("log_interval", [1, 10])
def test_divergence_ends_with_status_1_and_leaves_the_last_checkpoint(tokens_dir, tmp_path, capsys, log_interval):
    config = tiny(tokens_dir, tmp_path, max_iters=6, eval_interval=3)
    run(config)
    before = {name: value for name, value in content(tmp_path).items() if name != "metrics.jsonl"}
    rows = read_metrics(tmp_path)
    capsys.readouterr()
    wild = dataclasses.replace(
        config, init_from="resume", max_iters=30, eval_interval=1000, learning_rate=1e30, decay_lr=False, grad_clip=0.0, log_interval=log_interval
    )
    assert train.main(wild) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: step 8: loss nan") and err.count("\n") == 1 and "--learning_rate" in err
    assert {name: value for name, value in content(tmp_path).items() if name != "metrics.jsonl"} == before
    assert read_metrics(tmp_path)[: len(rows)] == rows
    assert all(math.isfinite(loss) for loss in losses(read_metrics(tmp_path)).values())


def test_divergence_that_the_evaluation_sees_first_is_one_line(tokens_dir, tmp_path, capsys):
    config = tiny(tokens_dir, tmp_path, max_iters=6, eval_interval=1, learning_rate=1e30, decay_lr=False)
    assert train.main(config) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: step ") and err.count("\n") == 1 and "--learning_rate" in err
    assert not (tmp_path / "last").exists()


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_loss_or_a_gradient_that_is_not_finite_stops_at_its_step(tokens_dir, tmp_path, loss, norm):
    program = build(tiny(tokens_dir, tmp_path, log_interval=10))

    def step(seed, i):
        return (torch.tensor(loss), torch.tensor(norm)) if i == 14 else program.step(seed, i)

    with pytest.raises(train.Diverged, match="^step 15: ") as error:
        train.train(program._replace(step=step), 1, tmp_path, quiet=True)
    assert error.value.step == 15


# ---------------------------------------------------------------------------------------------------------------------------------
# The log


class RecordingWandb:
    """Stands in for the module wandb: keeps what it is given."""

    def __init__(self, error: Exception | None = None):
        self.error, self.options, self.rows, self.finished = error, None, [], 0

    def init(self, **options):
        self.options = options
        if self.error:
            raise self.error
        return self

    def log(self, values):
        self.rows.append(values)

    def finish(self):
        self.finished += 1


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_leaves_a_run_to_be_synchronised(tokens_dir, tmp_path):
    config = tiny(tokens_dir, tmp_path / "run", max_iters=4, warmup_iters=0, eval_interval=2, wandb_log=True)
    done = command(*options(config), env=os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    assert max(losses(read_metrics(tmp_path / "run"))) == 4
    (left,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (log,) = left.glob("run-*.wandb")
    assert all(key in log.read_bytes() for key in (b"train_loss", b"val_loss", b"grad_norm"))


def test_wandb_gets_config_and_rows(tokens_dir, tmp_path, monkeypatch):
    fake = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny(tokens_dir, tmp_path, max_iters=4, warmup_iters=0, eval_interval=2, wandb_log=True, wandb_project="p")
    rows = run(config)
    assert fake.options == {"dir": tmp_path, "project": "p", "name": str(tmp_path), "config": dataclasses.asdict(config)}
    assert [{key: row.get(key) for key in KEYS} for row in fake.rows] == rows and all(row.keys() <= set(KEYS) for row in fake.rows)
    assert fake.finished == 1
    run(dataclasses.replace(config, init_from="resume", max_iters=6, wandb_run_name="mine"))
    assert fake.options["name"] == "mine" and [row["step"] for row in fake.rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [None, RuntimeError("no API key configured")], ids=["not there", "no key"])
def test_wandb_that_does_not_work_is_one_line(tokens_dir, tmp_path, capsys, monkeypatch, error):
    monkeypatch.setitem(sys.modules, "wandb", RecordingWandb(error) if error else None)
    message = refused(tiny(tokens_dir, tmp_path, wandb_log=True), capsys)
    assert message.startswith("error: --wandb_log=True: ") and "WANDB_MODE=offline" in message
    assert ("no API key configured" if error else "wandb") in message
    assert content(tmp_path) in ({}, {"metrics.jsonl": b""})  # nothing that would be taken for a run


def test_wandb_that_is_not_installed_is_one_line_with_status_2(tokens_dir, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    config = tiny(tokens_dir, tmp_path / "run", max_iters=4, warmup_iters=0, wandb_log=True)
    done = command(*options(config), env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --wandb_log=True: ModuleNotFoundError") and "pip install wandb" in done.stderr


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    whole = "".join(json.dumps({"step": step, "train_loss": 2.0}) + "\n" for step in (1, 2, 3))
    for cut in ('{"step": 3, "val', '{"step": 3}', "{"):  # even one that lacks its line end alone
        (tmp_path / "metrics.jsonl").write_text(whole + cut)
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
        log = Metrics(tmp_path, resume_at=3)
        log.record(step=4, train_loss=1.0)
        log.close()
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_closed_log_frees_its_directory(tmp_path):
    log = Metrics(tmp_path)
    for arguments in ({}, {"overwrite": True}, {"resume_at": 3}):
        with pytest.raises(InputError, match="another training"):
            Metrics(tmp_path, **arguments)
    log.record(step=1, train_loss=2.0)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1  # on disk before it is closed
    log.close()
    Metrics(tmp_path, resume_at=1).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    Metrics(tmp_path, resume_at=0).close()
    assert read_metrics(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------------------
# Two processes, and the compiler

RECORDED = """
import json, os, sys
import torch
import dataset, train
from configurator import TrainConfig, configure
seen, plain = [], dataset.Tokens.batch
def batch(self, drawn):
    seen.append([drawn.tolist(), torch.initial_seed()])
    return plain(self, drawn)
dataset.Tokens.batch = batch
status = train.main(configure(TrainConfig, sys.argv[1:]))
with open(os.environ["SEEN"] + os.environ["RANK"], "w") as file:
    json.dump(seen, file)
sys.exit(status)
"""


def test_two_processes_equal_one(tokens_dir, tmp_path):
    config = tiny(tokens_dir, tmp_path / "two", max_iters=20, eval_interval=10, eval_tokens=0, diffusion=True)
    done = torchrun(ROOT / "train.py", *options(config))
    assert done.returncode == 0, done.stderr
    two, one = read_metrics(tmp_path / "two"), run(dataclasses.replace(config, out_dir=str(tmp_path / "one")))
    for key in ("train_loss", "val_loss"):
        assert losses(two, key) == pytest.approx(losses(one, key), abs=1e-5)
    assert done.stdout.count("done: best val loss") == 1  # one process speaks


def test_two_processes_with_uneven_shares_read_the_same_data(tokens_dir, tmp_path):
    """9 sequences a step in batches of at most 3: one process takes 5 of them as 3 + 2, the other 4 as 2 + 2."""
    config = tiny(tokens_dir, tmp_path / "two", max_iters=20, batch_size=3, gradient_accumulation_steps=3, log_interval=4)
    (tmp_path / "recorded.py").write_text(RECORDED)
    done = torchrun(tmp_path / "recorded.py", *options(config), SEEN=str(tmp_path / "seen"))
    assert done.returncode == 0, done.stderr
    two, one = read_metrics(tmp_path / "two"), run(dataclasses.replace(config, out_dir=str(tmp_path / "one")))
    for key in ("train_loss", "val_loss"):
        assert losses(two, key) == pytest.approx(losses(one, key), abs=1e-5)
    first, second = (json.loads((tmp_path / f"seen{rank}").read_text()) for rank in (0, 1))
    seeds = [seed for _, seed in first[::2] + second[::2]]
    assert len(set(seeds)) == 40  # of dropout, by step and process
    first, second = ([batch for batch, _ in seen] for seen in (first, second))
    assert [len(batch) for batch in first] == [3, 2] * 20 and [len(batch) for batch in second] == [2, 2] * 20
    tokens = Tokens(tokens_dir, config.block_size, "cpu")
    for step in range(20):
        batches = first[2 * step : 2 * step + 2] + second[2 * step : 2 * step + 2]
        assert sum(batches, []) == tokens.draw(config.seed, step, 9).tolist()


def test_a_compiler_that_fails_leaves_an_eager_run(tokens_dir, tmp_path, monkeypatch):
    def broken(function, **_):
        def raising(*args):
            raise RuntimeError("no compiler here\nand a long story")

        return raising

    config = tiny(tokens_dir, tmp_path / "eager", max_iters=4, warmup_iters=0)
    eager = run(config)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="^torch.compile FAILED here; .*: RuntimeError: no compiler here$"):
        program = build(dataclasses.replace(config, compile=True))
    assert program.mode == "eager"
    train.train(program, config.seed, tmp_path / "fallen", quiet=True)
    assert losses(read_metrics(tmp_path / "fallen")) == losses(eager)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_training_equals_eager(tokens_dir, tmp_path):
    config = tiny(tokens_dir, tmp_path / "eager", n_layer=1, max_iters=10, eval_interval=5, diffusion=True)
    eager = run(config)
    program = build(dataclasses.replace(config, compile=True))
    assert program.mode == "compiled"
    train.train(program, config.seed, tmp_path / "compiled", quiet=True)
    compiled = read_metrics(tmp_path / "compiled")
    for key in ("train_loss", "val_loss"):
        assert losses(compiled, key) == pytest.approx(losses(eager, key), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------------------
# Known faults


@pytest.mark.parametrize("left", ["a checkpoint", "a file of another's"])
def test_best_is_not_removed_without_overwrite(tokens_dir, tmp_path, undisturbed, left):
    if left == "a checkpoint":
        shutil.copytree(undisturbed / "best", tmp_path / "best")
    else:
        (tmp_path / "best").mkdir()
        (tmp_path / "best" / "picture.jpg").write_text("mine")
    before = content(tmp_path / "best")
    try:
        run(tiny(tokens_dir, tmp_path, max_iters=1, warmup_iters=0, eval_interval=1, learning_rate=1e-9))
    except InputError:
        pass
    assert before.items() <= content(tmp_path / "best").items()


def test_overwrite_keeps_the_log_when_the_run_does_not_begin(tokens_dir, tmp_path, undisturbed, capsys, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "run")
    before = content(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(tiny(tokens_dir, tmp_path / "run", overwrite=True, wandb_log=True), capsys)
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("arguments", [{}, {"resume_at": 40, "wandb_options": {}}], ids=["holds a run", "wandb"])
def test_a_refusal_leaves_no_lock(tmp_path, undisturbed, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "wandb", None)
    shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(InputError) as error:
        Metrics(tmp_path / "run", **arguments)
    Metrics(tmp_path / "run", resume_at=40).close()
    assert "another training" not in str(error.value)


def test_a_closed_pipe_saves_and_ends_quietly(tokens_dir, tmp_path):
    config = tiny(tokens_dir, tmp_path / "out", max_iters=100_000, eval_interval=100_000)
    script = f"{sys.executable} {ROOT / 'train.py'} " + " ".join(f"'{word}'" for word in options(config)) + " | head -n 3; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "") and len(done.stdout.splitlines()) == 3
    assert checkpoint.read_meta(tmp_path / "out" / "last")["step"] > 0


def test_keys_of_pictures_are_not_ignored_for_text(tokens_dir, tmp_path):
    with pytest.raises(InputError, match="--patch_size/--flip has no effect on text"):
        build(tiny(tokens_dir, tmp_path, patch_size=4, flip=False))
