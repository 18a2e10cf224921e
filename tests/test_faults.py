"""A few tries of every fault of faults.py (tests/campaign.py takes hundreds), and what single functions promise about them."""

import dataclasses
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import metrics
import signals
import train
from compare import parse
from configurator import InputError, TrainConfig, configure, field_names
from metrics import Metrics, read_metrics
from place import find_place
from sample import SampleConfig

# how many tries of each here
FEW = {
    faults.kills_in_training: 6, faults.kills_in_comparison: 2, faults.kills_in_preparation: 4, faults.sigterms: 4, faults.full_disks: 1,
    faults.bad_disks: 3, faults.damaged_checkpoints: 60, faults.damaged_last: 1, faults.damaged_data: 90, faults.divergence: 2,
    faults.dying_ranks: 1, faults.locks: 1, faults.kills_of_reports: 2, faults.odd_command_lines: 42, faults.odd_sources: 12,
    faults.hostile_files: 9,
}  # fmt: skip


@pytest.mark.parametrize("fault", FEW, ids=lambda fault: fault.__name__)
def test_survived(fault, tmp_path):
    if fault is faults.full_disks and not faults.can_mount(tmp_path / "try"):
        pytest.skip("mounting a tmpfs needs root; tests below let writing fail in other ways")
    tries = fault(tmp_path, random.Random(f"{fault.__name__}"))
    try:
        for _ in range(FEW[fault]):
            assert next(tries)
    finally:
        tries.close()


def test_a_long_run_grows_neither_in_memory_nor_in_files(tmp_path):
    child, samples = faults.long_run(tmp_path, 500), []
    while child.process.is_alive():
        if child.marks[3] > 100:
            samples.extend(faults.resources(child))
        time.sleep(0.02)
    assert len(samples) > 10
    assert faults.finish_long_run(child, tmp_path, samples).startswith("500 steps, 11 evaluations")


# ---------------------------------------------------------------------------------------------------------------------------------
# In this process


def config_of(data: Path, out: Path, **changes) -> TrainConfig:
    return TrainConfig(**faults.TINY | {"dataset": str(data), "out_dir": str(out)} | changes).check()


def built(config: TrainConfig) -> train.Program:
    return train.build(config, find_place("cpu", "float32"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return faults.text_data(tmp_path_factory.mktemp("text"))


def test_a_full_disk_keeps_the_log_whole_and_saves_what_can_be_saved(data, tmp_path, monkeypatch):
    """The log cannot grow from step 13 on, the checkpoint can be written: it is, and the run goes on from there."""
    program = built(config_of(data, tmp_path / "whole", diffusion=True))
    train.train(program, 1, tmp_path / "whole", quiet=True)
    plain, rows = os.fstat, []

    def full(handle):
        rows.append(handle)
        if len(rows) > 13:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(handle)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "fstat", full)
        with pytest.raises(InputError) as error:
            train.train(program, 1, tmp_path / "full", quiet=True)
    step = checkpoint.read_meta(tmp_path / "full" / "last")["step"]
    assert f"{tmp_path / 'full' / 'metrics.jsonl'}: No space left on device; stopped at step {step}, saved in" in str(error.value)
    assert len(read_metrics(tmp_path / "full")) == 13 and (tmp_path / "full" / "metrics.jsonl").read_text().endswith("\n")
    train.train(program._replace(config=dataclasses.replace(program.config, init_from="resume")), 1, tmp_path / "full", quiet=True)
    assert faults.tensors(tmp_path / "full" / "last") == faults.tensors(tmp_path / "whole" / "last")


def test_a_row_that_is_cut_short_by_a_full_disk_is_taken_back(tmp_path):
    log = Metrics(tmp_path)
    log.record(step=1, train_loss=2.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    class Half:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            if len(content) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content[: len(content) // 2])

    log.file = Half(log.file)
    with pytest.raises(InputError, match="metrics.jsonl: No space left on device"):
        log.record(step=2, train_loss=1.5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.close()


def test_numbers_that_are_not_finite_leave_a_log_that_is_json(tmp_path):
    log = Metrics(tmp_path)
    log.record(step=1, train_loss=2.0, grad_norm=math.inf)
    log.close()
    (row,) = (json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["train_loss"] == 2.0 and row["grad_norm"] is None


@pytest.mark.parametrize("line", ['{"stop": 1}\n', '{"step": "x"}\n', "[]\n", "\x00\n"])
def test_a_damaged_log_is_named_and_left_as_it_is(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '{"step": 3}\n')
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=f"{tmp_path / 'metrics.jsonl'} is damaged at byte 12"):
        Metrics(tmp_path, resume_at=9)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "held"), OSError(errno.ENOLCK, "No locks available")], ids=["held", "no locks"])
def test_a_file_system_without_locks_is_no_other_training(tmp_path, monkeypatch, error):
    def flock(*_):
        raise error

    monkeypatch.setattr(metrics.fcntl, "flock", flock)
    if isinstance(error, BlockingIOError):
        with pytest.raises(InputError, match="another training"):
            Metrics(tmp_path)
    else:
        Metrics(tmp_path).close()


class Scale:
    """Stands in for the float16 scaler of a GPU: halved at every step, as when no gradient is ever finite."""

    def __init__(self):
        self.scale = 2.0**4

    def is_enabled(self):
        return True

    def get_scale(self):
        self.scale /= 2
        return self.scale

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state["scale"] == 2.0**16  # a new run starts as a new scaler does


def test_a_new_seed_starts_with_a_new_float16_scale_and_another_precision_with_its_own(data, tmp_path):
    program = built(config_of(data, tmp_path))._replace(scaler=torch.amp.GradScaler("cpu"))
    fresh = program.scaler.state_dict()
    program.scaler.load_state_dict(fresh | {"scale": 8.0, "_growth_tracker": 6})
    train.start_state(program, 2, tmp_path)
    assert program.scaler.state_dict() == fresh
    plain = built(config_of(data, tmp_path))
    train.train(plain, 1, tmp_path, quiet=True)  # float32: its checkpoint has no scale
    train.start_state(built(config_of(data, tmp_path, init_from="resume"))._replace(scaler=program.scaler), 1, tmp_path)
    assert program.scaler.state_dict() == fresh


def test_a_float16_scale_that_underflows_is_reported_and_stops(data, tmp_path, capsys):
    program = built(config_of(data, tmp_path))._replace(scaler=Scale())
    with pytest.raises(train.Diverged, match=r"step 29: the float16 scale fell to 2.98023e-08.*last of step 24 is from before it"):
        train.train(program, 1, tmp_path, quiet=True)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: step 5: the float16 scale fell to 0.5")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 and its scaler need CUDA")
def test_float16_on_a_gpu_reports_gradients_that_are_never_finite(data, tmp_path):
    config = dataclasses.replace(config_of(data, tmp_path, max_iters=100), device="cuda", dtype="float16")
    program = train.build(config, find_place("cuda", "float16"))
    program.optimizer.param_groups[0]["params"][0].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(train.Diverged, match="the float16 scale fell to"):
        train.train(program, 1, tmp_path, quiet=True)


@pytest.mark.parametrize("arm", faults.ARMS)
def test_layer_norms_are_those_of_the_tensors(data, tmp_path, arm):
    arm = {key: (0, 1) if key == "diffusion_heads" else value for key, value in faults.ARMS[arm].items()}
    program = built(config_of(data, tmp_path, **arm))
    program.step(1, 0)
    named, found = dict(program.model.named_parameters()), train.layer_norms(program.model)
    assert found.startswith("wte ") and [part.split(" ")[0] for part in found.split(", ")] == ["wte", "wpe", "h.0", "h.1", "ln_f"]
    first = [p.double() for name, p in named.items() if ".h.0." in name]
    gradients = [p.grad.double() for name, p in named.items() if ".h.0." in name]
    norm, gradient = (float(torch.cat([t.flatten() for t in tensors]).norm()) for tensors in (first, gradients))
    assert f"h.0 {norm:.3g} ({gradient:.3g})" in found
    program.model.zero_grad(set_to_none=True)
    assert "h.1 " in train.layer_norms(program.model) and "(0)" in train.layer_norms(program.model)


@pytest.mark.parametrize("phase", ["step", "backward pass", "evaluation", "last evaluation"])
def test_what_takes_long_is_given_up_after_a_signal_and_made_up_for_exactly(data, tmp_path, monkeypatch, phase):
    program = built(config_of(data, tmp_path / "whole", dropout=0.2, diffusion=True))
    train.train(program, 1, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(signals, "PATIENCE", 0.05)
    forward, calls = type(program.model).forward, []

    def slow(self, *args, **kwargs):
        calls.append(self.training)
        steps = sum(calls)
        if (steps == 13 and self.training) if phase == "step" else (not self.training and steps == (40 if phase == "last evaluation" else 16)):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(3000):
                time.sleep(0.01)
        return forward(self, *args, **kwargs)

    def slow_gradient(gradient):
        calls.append(True)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(3000):
                time.sleep(0.01)

    with monkeypatch.context() as patch:
        if phase == "backward pass":  # Python that the engine in C++ calls
            hook = program.model.transformer.h[0].ln_1.weight.register_hook(slow_gradient)
        else:
            patch.setattr(type(program.model), "forward", slow)
        with pytest.raises(train.Interrupted):
            train.train(program, 1, tmp_path / "parts", quiet=True)
    if phase == "backward pass":
        hook.remove()
    assert checkpoint.read_meta(tmp_path / "parts" / "last")["step"] == {"evaluation": 16, "last evaluation": 40}.get(phase, 12)
    train.train(program._replace(config=dataclasses.replace(program.config, init_from="resume")), 1, tmp_path / "parts", quiet=True)
    assert faults.losses(tmp_path / "parts") == faults.losses(tmp_path / "whole")
    assert faults.tensors(tmp_path / "parts" / "last") == faults.tensors(tmp_path / "whole" / "last")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


words = st.text(st.characters(exclude_characters="\0"), max_size=12)
values = words | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["True", "none", "0,1", "a=b", "x.py", "--n_layer", "\ud800"])


@given(keys=st.lists(st.tuples(st.sampled_from(field_names(TrainConfig) + field_names(SampleConfig)) | words, values), max_size=4), free=words)
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("target", ["train", "sample", "compare"])
def test_any_command_line_is_a_config_or_an_input_error(target, keys, free):
    options = [f"--{key}={value}" for key, value in keys if "-h" not in key] + ([free] if free and not free.startswith("-") else [])
    try:
        if target == "compare":
            parse([str(faults.ROOT / "config" / "quick.py"), f"{faults.ROOT / 'config' / 'quick.py'} --n_layer=2", *options])
        else:
            configure(TrainConfig if target == "train" else SampleConfig, options)
    except InputError as error:
        assert str(error)


def test_errors_of_the_system_and_odd_characters_are_one_line(capsys):
    from configurator import one_line_errors

    for error, line in (
        (OSError(errno.EIO, "Input/output error", "a\nb"), "error: Input/output error: a\\nb\n"),
        (InputError("--start=\x1b[31m\n\u202e"), "error: --start=\\x1b[31m\\n\\u202e\n"),
    ):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            raise error
        assert stop.value.code == 2 and capsys.readouterr().err == line


def test_a_closed_pipe_is_the_end_without_a_word():
    program = "from configurator import one_line_errors\nwith one_line_errors():\n    for i in range(10 ** 6): print(i)"
    script = f"'{sys.executable}' -c '{program}' | head -n 2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=faults.ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGPIPE, "0\n1\n", "")
