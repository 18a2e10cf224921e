"""probe.py against plain loops, and its record along a training that it must not disturb."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import ROOT, build, losses, run, tiny
from torch.nn import functional as F

import probe
from checkpoint import load_model
from configurator import InputError
from dataset import Tokens
from model import GPT, ViT
from tests.test_train import equal, tensors
from tests.test_variants import ALL, ARMS, gpt, plain_matrix, vit
from train import Diverged, Interrupted, train

IDS = torch.randint(19, (3, 12), generator=torch.Generator().manual_seed(2))
PICTURES = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def inputs_of(model):
    return IDS if isinstance(model, GPT) else PICTURES


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("keys", ALL)
def test_the_heads_updates_and_the_bias_are_the_sub_layers_output(keys, arm):
    for model in (gpt(**keys, **arm), vit(**keys, **arm)):
        attn, u = model.transformer.h[1].attn, torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        A, updates = probe.head_parts(attn, u)
        torch.testing.assert_close(updates.sum(dim=1) + attn.c_proj.bias, attn(u), rtol=1e-10, atol=1e-10)
        if keys["attention_kernel"] == "softmax1":
            assert A.sum(-1).max() < 1
        else:
            torch.testing.assert_close(A.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))


@torch.no_grad()
def plain_probe(model, inputs) -> dict[str, float]:
    """Every value by loops over sequences, layers, heads and tokens."""
    found: dict[str, list[float]] = {}

    def put(name, value):
        found.setdefault(name, []).append(float(value))

    def rank(x):
        s = np.linalg.svd(F.layer_norm(x, x.shape[-1:]).numpy(), compute_uv=False)
        share = s / s.sum()
        return math.exp(-sum(p * math.log(p) for p in share if p > 0))

    def cosine(update, direction):
        both = [(a, b) for a, b in zip(update, direction) if min(a.norm(), b.norm()) > 1e-12]
        return sum(float(a @ b / (a.norm() * b.norm())) for a, b in both) / len(both)

    for one in inputs.split(1):
        seen = []
        hooks = [module.register_forward_pre_hook(lambda _, a: seen.append(a[0][0])) for module in (*model.transformer.h, model.transformer.ln_f)]
        model(one)
        for hook in hooks:
            hook.remove()
        put("layer 0 effective_rank", rank(seen[0]))
        for layer, (block, x, after) in enumerate(zip(model.transformer.h, seen, seen[1:])):
            attn, u = block.attn, block.ln_1(x)
            T, C = u.shape
            d = C // attn.n_head
            q, k, _ = attn.c_attn(u).split(C, dim=-1)
            _, updates = probe.head_parts(attn, u[None])  # tested above
            mean_A = torch.zeros(T, T, dtype=torch.float64)
            for h in range(attn.n_head):
                part = slice(h * d, (h + 1) * d)
                A = plain_matrix(q[:, part], k[:, part], attn.causal, getattr(attn, "kernel", "softmax"))
                mean_A += A / attn.n_head
                name = f"layer {layer} head {h}"
                put(f"{name} cosine", cosine(updates[0, h], A @ u - u))
                put(f"{name} cosine_average", cosine(updates[0, h], A @ u))
                rows = [(row[row > 0], math.log(i + 1 if attn.causal else T)) for i, row in enumerate(A) if i > 0 or not attn.causal]
                put(f"{name} entropy", sum(-float((row * row.log()).sum()) / most for row, most in rows) / len(rows))
                put(f"{name} diagonal", sum(float(A[i, i]) for i in range(T)) / T)
                for suffix, tokens in (("in", x), ("out", after)):
                    X = F.layer_norm(tokens, (C,))
                    put(f"{name} dirichlet_{suffix}", torch.trace(X.T @ (torch.eye(T, dtype=torch.float64) - A) @ X) / torch.trace(X.T @ X))
            put(f"layer {layer} cosine", cosine(updates[0].sum(0), mean_A @ u - u))
            put(f"layer {layer} cosine_average", cosine(updates[0].sum(0), mean_A @ u))
            put(f"layer {layer + 1} effective_rank", rank(after))
            middle = x + updates[0].sum(0) + (0 if attn.c_proj.bias is None else attn.c_proj.bias)
            mlp = block.mlp(block.ln_2(middle))
            for name, part in (("stream", x), ("attention", middle - x), ("mlp", mlp)):
                put(f"layer {layer} {name}_rms", math.sqrt(sum(float(row @ row) for row in part) / part.numel()))
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("keys", [{}, {"attention_kernel": "student_t", "head_combine": "product", "diffusion": True}])
@pytest.mark.parametrize("kind", [gpt, vit])
def test_every_value_is_that_of_the_loops(kind, keys):
    model = kind(**keys)
    found, expected = dict(probe.probe(model, [(inputs_of(model),)])), plain_probe(model, inputs_of(model))
    assert found.keys() == expected.keys() and len(found) == 1 + 2 * (6 + 4 * 6)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def test_only_so_many_sequences_are_read_however_they_are_batched():
    model = gpt()
    two = dict(probe.probe(model, [(IDS[:2],)]))
    assert dict(probe.probe(model, [(IDS[:1],), (IDS[1:],)], sequences=2)) == two != dict(probe.probe(model, [(IDS,)]))
    with pytest.raises(ValueError, match="no sequence"):
        dict(probe.probe(model, []))


def test_a_step_of_the_theory_has_cosine_1_and_the_averages_step_has_not():
    from variants import add_theory

    for diffusion in (True, False):
        model = vit(diffusion=diffusion, n_head=1)
        for block in model.transformer.h:
            block.ln_1.weight.data.fill_(1)
            block.ln_1.bias.data.zero_()
            for weight in (block.attn.c_attn, block.attn.c_proj):
                weight.weight.data.zero_()
                weight.bias.data.zero_()
        add_theory(model)
        found = dict(probe.probe(model, [(PICTURES,)]))
        for layer in range(2):
            assert found[f"layer {layer} head 0 {'cosine' if diffusion else 'cosine_average'}"] == pytest.approx(1, abs=1e-9)
            assert found[f"layer {layer} head 0 {'cosine_average' if diffusion else 'cosine'}"] < 0.9


def test_the_model_is_left_as_it_was():
    model = gpt(dropout=0.5).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    dict(probe.probe(model, [(IDS,)]))
    assert model.training and torch.equal(torch.get_rng_state(), state) and equal(before, dict(model.named_parameters()))
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------------------------
# Along training

NOISY = dict(max_iters=12, eval_interval=6, log_interval=4, dropout=0.2, diffusion=True, decay_lr=False)


@pytest.fixture(scope="module")
def probed(tokens_dir, tmp_path_factory):
    """A run that is probed every 3 steps. No test changes it."""
    out = tmp_path_factory.mktemp("probed") / "run"
    run(tiny(tokens_dir, out, probe_interval=3, **NOISY))
    return out


def test_probing_changes_no_loss_and_no_weight(probed, tokens_dir, tmp_path):
    rows = run(tiny(tokens_dir, tmp_path, **NOISY))
    plain = [json.loads(line) for line in (probed / "metrics.jsonl").read_text().splitlines()]
    for key in ("train_loss", "val_loss"):
        assert losses(rows, key) == losses(plain, key)
    assert equal(tensors(tmp_path / "last"), tensors(probed / "last"))
    assert not (tmp_path / "probe.jsonl").exists()


def test_the_record_is_the_probe_of_the_checkpoint(probed, tokens_dir):
    rows = probe.read_record(probed)
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12]
    model, _, _ = load_model(probed, "last")
    data = Tokens(str(tokens_dir), 16, "cpu")
    assert rows[-1]["values"] == dict(probe.probe(model, probe.validation_sequences(data)))
    (inputs,) = next(iter(probe.validation_sequences(data)))
    assert inputs.shape == (probe.SEQUENCES, 16)


def test_of_long_sequences_fewer_are_looked_at(probed, tokens_dir, monkeypatch):
    model, _, _ = load_model(probed, "last")
    data, looked_at = Tokens(str(tokens_dir), 16, "cpu"), []
    monkeypatch.setattr(probe, "probe", lambda model, batches: looked_at.append(sum(len(inputs) for (inputs,) in batches)) or [])
    for tokens in (1, 16 * 3 + 5, 16 * 1000):
        monkeypatch.setattr(probe, "TOKENS", tokens)
        probe.measure(model, data)
    assert looked_at == [1, 3, probe.SEQUENCES]


def test_an_interrupted_record_continues_and_a_new_run_takes_the_old_one_away(probed, tokens_dir, tmp_path):
    config = tiny(tokens_dir, tmp_path, probe_interval=3, **NOISY)
    program = build(config)

    def interrupted(seed, i):
        if i == 7:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return program.step(seed, i)

    with pytest.raises(Interrupted):
        train(program._replace(step=interrupted), config.seed, tmp_path, quiet=True)
    whole = (probed / "probe.jsonl").read_text()
    kept = (tmp_path / "probe.jsonl").read_text()
    assert whole.startswith(kept) and len(kept.splitlines()) == 3
    # as if it had gone on, to a step after the checkpoint's, and been killed in the middle of a row
    (tmp_path / "probe.jsonl").write_text("".join(whole.splitlines(keepends=True)[:4]) + '{"step": 12, "val')
    run(dataclasses.replace(config, init_from="resume"))
    assert (tmp_path / "probe.jsonl").read_text() == whole
    run(dataclasses.replace(config, probe_interval=0, overwrite=True, max_iters=2))
    assert not (tmp_path / "probe.jsonl").exists()


def test_pictures_can_be_probed_too(tmp_path):
    from pictures import PictureWriter

    draw = np.random.default_rng(0)
    with PictureWriter(tmp_path / "data", shape=(3, 8, 8)) as writer:
        for split in ("train", "val"):
            writer.add(split, draw.integers(0, 256, (20, 3, 8, 8), dtype=np.uint8))
        writer.finish(dict.fromkeys(("train", "val"), np.arange(20) % 4), list("abcd"), "noise", {})
    run(tiny(tmp_path / "data", tmp_path / "run", max_iters=2, warmup_iters=1, probe_interval=2, attention_kernel="rbf"))
    rows = probe.read_record(tmp_path / "run")
    model, _, _ = load_model(tmp_path / "run", "last")
    assert isinstance(model, ViT) and [row["step"] for row in rows] == [0, 2]
    assert all(math.isfinite(value) for row in rows for value in row["values"].values())


# ---------------------------------------------------------------------------------------------------------------------------------
# Figure and command line


def test_curves_are_means_over_heads_per_layer():
    names = [f"layer {layer} head {head} {q}" for layer in range(2) for head in range(2) for q in ("cosine", "dirichlet_in", "dirichlet_out")]
    row = {"step": 0, "values": {name: float(i) for i, name in enumerate(names)} | {"layer 2 effective_rank": 7.0, "layer 0 cosine": 99.0}}
    assert probe.curves([row, row], "cosine") == {0: [1.5, 1.5], 1: [7.5, 7.5]}
    assert probe.curves([row], "smoothing") == {0: [1.0], 1: [1.0]}
    assert probe.curves([row], "effective_rank") == {2: [7.0]}
    row["values"] |= {"layer 1 attention_rms": 1.0, "layer 1 mlp_rms": 6.0, "layer 1 stream_rms": 4.0}
    assert probe.curves([row], "attention_share") == {1: [0.25]} and probe.curves([row], "mlp_share") == {1: [1.5]}


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "probe.py"), *args], capture_output=True, text=True, timeout=120)


def test_the_command_draws_the_record(probed, tmp_path):
    done = command(str(probed), f"--out={tmp_path / 'figure.png'}")
    assert done.returncode == 0 and "| layer   | cosine" in done.stdout
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("args,words", [
    ([], "no run is named"), (["nowhere"], "nowhere/probe.jsonl is missing: train with --probe_interval=N"),
    (["x", "--out=figure"], "--out=figure must be a file name that ends in .png"), (["x", "--oout=a.png"], "perhaps you meant 'out'"),
])  # fmt: skip
def test_bad_input_is_one_line(args, words):
    done = command(*args)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_negative_interval_is_refused(tokens_dir, tmp_path):
    with pytest.raises(InputError, match="--probe_interval=-1 must not be negative"):
        tiny(tokens_dir, tmp_path, probe_interval=-1)


def test_a_run_that_diverges_before_it_is_probed_is_told_as_such(tokens_dir, tmp_path, monkeypatch):
    program = build(tiny(tokens_dir, tmp_path, max_iters=20, eval_interval=20, log_interval=10, probe_interval=5))
    step = program.step

    def broken(seed, i):
        loss, norm = step(seed, i)
        if i == 1:
            with torch.no_grad():
                next(program.model.parameters()).fill_(math.nan)
        return loss, norm

    with pytest.raises(Diverged, match="step 3: loss nan"):
        train(program._replace(step=broken), 1, tmp_path, quiet=True)


def test_a_full_disk_under_the_record_is_one_line(tmp_path):
    (tmp_path / "probe.jsonl").mkdir()
    with pytest.raises(InputError, match="probe.jsonl: Is a directory"):
        probe.append(tmp_path, 1, {})


def test_runs_whose_directories_have_one_name_are_all_drawn(probed, tmp_path, capsys):
    for parent in ("A", "B"):
        (tmp_path / parent / "seed-1").mkdir(parents=True)
        (tmp_path / parent / "seed-1" / "probe.jsonl").write_bytes((probed / "probe.jsonl").read_bytes())
    probe.main(probe.ProbeConfig(out=str(tmp_path / "probe.png")), [str(tmp_path / parent / "seed-1") for parent in ("A", "B")])
    shown = [line.partition(", step")[0] for line in capsys.readouterr().out.splitlines() if "means over heads" in line]
    assert shown == ["seed-1", str(tmp_path / "B" / "seed-1")]
