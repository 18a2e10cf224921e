"""prior.py against automatic differentiation in float64, and the barrier's place in training: off is off, runs resume, the log says what happened."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from runs import TINY, build, run
from safetensors.torch import load_file
from torch.nn import functional as F

import checkpoint
import prior
import train
from configurator import InputError, TrainConfig
from metrics import BARRIER, read_metrics
from model import GPT, GPTConfig, ViT, ViTConfig
from prior import EmbeddingPrior, Objective, barrier, draw_pairs, log_abs_det, moments, own_blocks, own_margins

ROOT = Path(__file__).resolve().parents[1]
ARMS = [
    {},
    {"diffusion": True},
    {"diffusion": True, "diffusion_alpha": 0.6, "diffusion_lambda": 1.4},
    {"diffusion": True, "diffusion_alpha": 0.6, "diffusion_lambda": 1.4, "diffusion_heads": (1,)},
]


def tiny(data: Path, out: Path, **changes) -> TrainConfig:
    return runs.tiny(data, out, **{"max_iters": 12, "dropout": 0.1} | changes)


def model_of(kind, arm: dict, n_head: int, seed: int = 0):
    """A float64 model of one layer of 6 channels with weights large enough that attention is far from uniform."""
    if kind is GPT:
        model = GPT(GPTConfig(block_size=5, vocab_size=7, n_layer=1, n_head=n_head, n_embd=6, bias=True, **arm), seed)
    else:
        model = ViT(ViTConfig(image_size=4, patch_size=2, n_classes=3, n_layer=1, n_head=n_head, n_embd=6, bias=True, **arm), seed)
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float64).normal_(0, 0.7, generator=generator))
    return model


def tapped(model, T: int, B: int = 1, seed: int = 1):
    """Normalised inputs u of the first layer's attention, and the q, k, v that it computes from them."""
    u = torch.randn(B, T, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    taps = []
    model.transformer.h[0].attn(u, None, taps)
    return u, taps[0]


def jacobian(model, u):
    """d(u - attention(u)) / du of one sequence, (T, C, T, C)."""
    attention = model.transformer.h[0].attn.eval()
    return torch.autograd.functional.jacobian(lambda u: u - attention(u), u)[0, :, :, 0]


# ---------------------------------------------------------------------------------------------------------------------------------
# Determinants


@pytest.mark.parametrize("p", [1, 2, 3, 8, 17])
def test_log_abs_det_and_its_gradient_are_slogdets(p):
    matrices = torch.randn(3, 7, p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(p), requires_grad=True)
    logs, negative = log_abs_det(matrices)
    expected = torch.linalg.slogdet(matrices)
    torch.testing.assert_close(logs, expected.logabsdet, rtol=1e-11, atol=1e-11)
    assert torch.equal(negative, expected.sign < 0) and (p == 1 or 0 < negative.float().mean() < 1)
    weights = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(p + 1))
    gradients = [torch.autograd.grad((weights * value).sum(), matrices)[0] for value in (logs, expected.logabsdet)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["logdet", "softplus", "square"])
@pytest.mark.parametrize("rank", [0, 3, 7])
def test_at_the_boundary_the_penalty_is_large_and_everything_finite(form, rank):
    ways = [prior.inverse_by_lu]
    if prior.fused_prior and not torch.cuda.is_available():
        ways.append(lambda matrices: prior.fused_prior.inverse(matrices, prior.FLOOR))
    for by in ways:
        generator = torch.Generator().manual_seed(0)
        low = torch.randn(2, 8, rank, generator=generator) @ torch.randn(2, rank, 8, generator=generator)
        low = torch.cat((low, torch.diag(torch.tensor([0.0, *[1.0] * 7]))[None]))
        inverses, logs, _ = by(low.clone())
        assert torch.isfinite(inverses).all() and torch.isfinite(logs).all() and inverses[-1].abs().max() == pytest.approx(1 / prior.FLOOR)
    matrices = low.clone().requires_grad_()
    margins, _ = log_abs_det(matrices)
    penalty = barrier(margins, form)
    assert torch.isfinite(penalty).all() and (penalty > 5).all()
    penalty.sum().backward()
    assert torch.isfinite(matrices.grad).all() and matrices.grad.abs().amax(dim=(1, 2)).min() > 1


def test_the_forms_of_the_barrier():
    m = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(barrier(m, "logdet"), -m)
    torch.testing.assert_close(barrier(m, "softplus"), torch.log1p(1 / m.exp()))
    torch.testing.assert_close(barrier(m, "square"), m**2)
    reward = torch.autograd.grad(barrier(m, "softplus").sum(), m)[0]
    assert reward[-1] > -0.01 and reward[0] < -0.99  # nothing to win far from the boundary, the paper's slope near it


# ---------------------------------------------------------------------------------------------------------------------------------
# The embedding prior


def plain_residuals(model: EmbeddingPrior, u):
    """e (T, p) of one sequence u (T, p), position by position."""
    w_q, w_k = model.query.weight, (model.query if model.tied else model.key).weight
    q, k = u @ w_q.T, u @ w_k.T
    parts = [u[0]]
    for i in range(1, len(u)):
        a = torch.softmax(q[i] @ k[:i].T / math.sqrt(u.size(1)), dim=0)
        parts.append(u[i] - a @ u[:i])
    return torch.stack(parts)


@pytest.mark.parametrize("p", [1, 3, 8])
def test_one_call_gives_the_plain_moments(p):
    generator = torch.Generator().manual_seed(p)
    q, k, u = (torch.randn(2, 6, p, dtype=torch.float64, generator=generator) for _ in range(3))
    mean, covariance = moments(q, k, u)
    for b, i in itertools.product(range(2), range(1, 6)):
        a = torch.softmax(q[b, i] @ k[b, :i].T, dim=0)
        centred = u[b, :i] - a @ u[b, :i]
        torch.testing.assert_close(mean[b, i - 1], a @ u[b, :i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(covariance[b, i - 1], centred.T @ (a[:, None] * centred), rtol=1e-11, atol=1e-12)


def test_gradients_of_the_moments():
    generator = torch.Generator().manual_seed(4)
    q, k, u = (torch.randn(2, 5, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(moments, (q, k, u))


def test_the_moments_take_one_call_with_only_the_distinct_products(monkeypatch):
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **o: calls.append(v.shape) or attention(q, k, v, **o))
    moments(*torch.randn(3, 2, 6, 8))
    assert calls == [(2, 1, 5, 48)]  # 8 + 8 * 9 / 2, filled up to a multiple of 8


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_margins_of_the_prior_are_the_jacobians_blocks(tied, normalise):
    model = EmbeddingPrior(5, 3, tied, normalise, seed=4).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    x = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    margins, negative, energy = model(x)
    for b in range(2):
        u = model.project(F.layer_norm(x[b], (5,)) if normalise else x[b]).detach()
        full = torch.autograd.functional.jacobian(lambda u: plain_residuals(model, u), u)  # (T, p, T, p)
        blocks = torch.linalg.slogdet(torch.stack([full[i, :, i] for i in range(7)]))
        torch.testing.assert_close(margins[b], blocks.logabsdet, rtol=1e-9, atol=1e-9)
        assert torch.equal(negative[b], blocks.sign < 0)
        torch.testing.assert_close(margins[b].sum(), torch.linalg.slogdet(full.reshape(21, 21)).logabsdet, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(energy[b], plain_residuals(model, u).square().mean(dim=-1), rtol=1e-9, atol=1e-12)
    assert margins[:, 0].abs().max() == 0 and margins.abs().max() > 0.1


def test_a_normalising_prior_does_not_see_the_scale_of_the_embeddings():
    model = EmbeddingPrior(12, 4, normalise=True).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x)[0], model(100 * x)[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(EmbeddingPrior(12, 4).double()(x)[0], EmbeddingPrior(12, 4).double()(100 * x)[0], rtol=1e-2)


def test_autocast_does_not_reach_the_determinants():
    model, x = EmbeddingPrior(12, 4), torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(x)[0]
    assert inside.dtype == torch.float32 and torch.equal(inside, model(x)[0])


# ---------------------------------------------------------------------------------------------------------------------------------
# The model's own attention


@pytest.mark.parametrize("kind", [GPT, ViT])
@pytest.mark.parametrize("arm", ARMS, ids=str)
@pytest.mark.parametrize("n_head", [1, 2, 3])
def test_own_blocks_are_the_attentions_jacobian(kind, arm, n_head):
    model = model_of(kind, arm, n_head)
    T = 5 if kind is GPT else 4
    u, (q, k, v) = tapped(model, T)
    attention, positions = model.transformer.h[0].attn, torch.arange(T)[None]
    rows = [own_blocks(attention, q, k, v, positions, torch.full_like(positions, h), joint=True)[0] for h in range(n_head)]
    stacked = torch.eye(6, dtype=torch.float64) - torch.cat(rows, dim=1)  # (T, C, C)
    exact = jacobian(model, u)
    blocks = torch.linalg.slogdet(torch.stack([exact[i, :, i] for i in range(T)]))
    found = torch.linalg.slogdet(stacked)
    torch.testing.assert_close(found.logabsdet, blocks.logabsdet, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.sign, blocks.sign)
    if kind is GPT:  # the full Jacobian is block triangular
        torch.testing.assert_close(torch.linalg.slogdet(exact.reshape(30, 30)).logabsdet, found.logabsdet.sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [GPT, ViT])
@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_the_margin_of_one_head_is_that_of_the_map_with_this_head_alone(kind, arm):
    model, T = model_of(kind, arm, 2), 5 if kind is GPT else 4
    u, (q, k, v) = tapped(model, T)
    attention, positions = model.transformer.h[0].attn, torch.arange(T)[None]
    for head in range(2):
        margins, negative = own_margins(attention, q, k, v, positions, torch.full_like(positions, head))
        alone = model_of(kind, arm, 2)
        with torch.no_grad():
            alone.transformer.h[0].attn.c_proj.weight[:, 3 * (1 - head) : 3 * (2 - head)] = 0
        exact = jacobian(alone, u)
        blocks = torch.linalg.slogdet(torch.stack([exact[i, :, i] for i in range(T)]))
        torch.testing.assert_close(margins[0], blocks.logabsdet, rtol=1e-9, atol=1e-9)
        assert torch.equal(negative[0], blocks.sign < 0)


def test_pairs_in_any_order_and_of_several_sequences():
    model = model_of(GPT, ARMS[3], 3)
    u, (q, k, v) = tapped(model, 5, B=3)
    attention = model.transformer.h[0].attn
    everything = torch.stack([own_margins(attention, q, k, v, torch.arange(5).expand(3, 5), torch.full((3, 5), h))[0] for h in range(3)])  # (H, B, T)
    positions, heads = torch.tensor([[4, 0], [2, 2], [1, 3]]), torch.tensor([[0, 2], [1, 0], [2, 2]])
    some, _ = own_margins(attention, q, k, v, positions, heads)
    for b, n in itertools.product(range(3), range(2)):
        torch.testing.assert_close(some[b, n], everything[heads[b, n], b, positions[b, n]], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("T, H, n", [(4, 3, 2), (5, 2, 2), (6, 2, 6), (3, 2, 1), (7, 3, 3)])
def test_drawn_pairs_estimate_the_mean_over_all_without_bias(T, H, n, monkeypatch):
    """The exact mean over all draws: U takes every value of a grid so fine that each part's positions get their exact share."""
    table = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid, total, count = n * T, 0.0, 0
    for u, first in itertools.product(range(grid), range(H)):  # the parts are drawn independently, so one value for all of them has the same mean
        monkeypatch.setattr(torch, "rand", lambda B, n, device: torch.full((B, n), (u + 0.5) / grid))
        monkeypatch.setattr(torch, "randint", lambda H, shape, device: torch.full(shape, first))
        positions, heads = draw_pairs(1, T, H, n, "cpu")
        total, count = total + float(table[positions[0], heads[0]].mean()), count + 1
    assert total / count == pytest.approx(float(table.mean()), abs=1e-12)


def test_drawn_positions_lie_in_their_parts_and_follow_the_generator():
    torch.manual_seed(3)
    first, heads = draw_pairs(50, 64, 6, 8, "cpu")
    assert torch.equal(first // 8, torch.arange(8).expand(50, 8)) and len(first.unique()) > 60 and set(heads.unique().tolist()) == set(range(6))
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip((first, heads), draw_pairs(50, 64, 6, 8, "cpu")))
    assert not torch.equal(first, draw_pairs(50, 64, 6, 8, "cpu")[0])


# ---------------------------------------------------------------------------------------------------------------------------------
# The objective


def objective_of(**changes) -> tuple[Objective, torch.Tensor, torch.Tensor]:
    config = tiny("data", "out", dropout=0.0, **changes)
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(11, (2, 3, 16), generator=generator)
    torch.manual_seed(5)
    return Objective(model, config), x, y


@pytest.mark.parametrize(
    "changes", [{}, {"prior_form": "logdet", "prior_energy": 0.5}, {"prior_where": "attention", "prior_form": "square"}], ids=str
)
def test_the_total_is_the_cross_entropy_plus_lambda_times_the_barrier(changes):
    objective, x, y = objective_of(prior_lambda=0.3, **changes)
    total, cross_entropy, penalty, margins, negative = objective(x, y)
    torch.testing.assert_close(cross_entropy, objective.model(x, y)[1])
    torch.testing.assert_close(penalty, barrier(margins, objective.config.prior_form).mean())
    energy = 0.0
    if objective.config.prior_energy:
        energy = objective.prior(objective.model.embed(x))[2].mean() / (2 * 0.5**2)
        assert energy > 0
    torch.testing.assert_close(total, cross_entropy + 0.3 * (penalty + energy))
    assert total.requires_grad and not any(part.requires_grad for part in (cross_entropy, penalty, margins))
    assert margins.shape == negative.shape == ((2, 3, 8) if objective.prior is None else (3, 16))


def test_a_detached_barrier_leaves_the_models_gradient_alone():
    gradients = {}
    for name, changes in {"none": {}, "cut": {"prior_lambda": 10.0, "prior_detach": True}, "whole": {"prior_lambda": 10.0}}.items():
        objective, x, y = objective_of(**changes)
        objective(x, y)[0].backward()
        gradients[name] = [p.grad for p in objective.model.parameters()]
        if objective.prior is not None:
            assert all(p.grad.abs().max() > 0 for p in objective.prior.parameters())
    assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients["cut"]))
    assert not torch.equal(gradients["none"][0], gradients["whole"][0])


def test_only_the_named_layers_carry_the_barrier():
    objective, x, y = objective_of(prior_lambda=1.0, prior_where="attention", prior_layers=(0,))
    total, cross_entropy, *_ = objective(x, y)
    first, second = (block.attn.c_attn.weight for block in objective.model.transformer.h)
    gradients = torch.autograd.grad(total - objective.model(x, y)[1], [first, second])
    assert gradients[0].abs().max() > 1e-6 > gradients[1].abs().max()


def test_controls():
    objective, x, y = objective_of(label_smoothing=0.2)
    total, cross_entropy = objective(x, y)
    log_p = objective.model(x, y)[0].log_softmax(dim=-1)
    torch.testing.assert_close(total, 0.8 * cross_entropy - 0.2 * log_p.mean())
    objective, x, y = objective_of(embed_noise=0.5)
    assert objective(x, y)[0] != objective(x, y)[0] != objective.model(x, y)[1]
    seen = []
    objective.model.transformer.drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective(x, y)
    noise, clean = seen[0] - objective.model.embed(x), objective.model.embed(x)
    assert float(noise.detach().std() / clean.detach().square().mean().sqrt()) == pytest.approx(0.5, rel=0.1)


def test_an_annealed_weight_falls_along_half_a_cosine():
    objective, _, _ = objective_of(prior_lambda=0.2, prior_anneal=True)
    found = []
    for step in (0, 6, 12, 20):
        objective.set_step(step)
        found.append(float(objective.weight))
    assert found == pytest.approx([0.2, 0.1, 0.0, 0.0])


@pytest.mark.parametrize("changes", [{}, {"prior_tied": True, "prior_normalise": True}, {"prior_where": "attention"}], ids=str)
def test_a_large_lambda_moves_the_margins_up(tokens_dir, tmp_path, changes):
    means = []
    for weight in (1e-9, 3.0):
        rows = run(tiny(tokens_dir, tmp_path / str(weight), prior_lambda=weight, prior_form="logdet", max_iters=25, **changes))
        means.append([row["margin_mean"] for row in rows if "margin_mean" in row][-1])
    assert means[1] > means[0]


# ---------------------------------------------------------------------------------------------------------------------------------
# Training


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    meta = checkpoint.read_meta(directory)
    return {f"{kind}/{name}": t for kind, entry in meta["files"].items() for name, t in load_file(directory / entry["name"]).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain_run(tokens_dir, tmp_path_factory) -> tuple[Path, list[dict]]:
    """12 steps of plain cross-entropy. No test changes it."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, run(tiny(tokens_dir, out))


def test_without_lambda_nothing_changes_and_prior_is_not_imported(tokens_dir, tmp_path):
    """The program calls the model itself, and its losses are those of a loop that knows nothing of a barrier, to the last bit."""
    config = tiny(tokens_dir, tmp_path / "off", gradient_accumulation_steps=2)
    options = [f"--{key}={value}" for key, value in dataclasses.asdict(config).items() if getattr(TrainConfig, key) != value]
    script = "import sys, train; from configurator import *; train.main(configure(TrainConfig, sys.argv[1:])); assert 'prior' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, *options], check=True, capture_output=True, cwd=ROOT, timeout=120)
    rows = read_metrics(tmp_path / "off")
    assert not any(key in row for row in rows for key in BARRIER)

    program = build(config)
    assert program.prior is None
    train.start_state(program, config.seed, tmp_path / "none")
    model, optimizer = program.model, program.optimizer
    for step in range(5):
        drawn = torch.from_numpy(program.data.draw(config.seed, step, 8))
        key = train.np.random.SeedSequence([config.seed, train.DROPOUT_STREAM, step, 0]).generate_state(1, train.np.uint64)[0]
        torch.manual_seed(int(key >> 1))
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(config, step)
        optimizer.zero_grad()
        model.train()
        total = torch.zeros(())
        for part in drawn.split(4):
            loss = model(*program.data.batch(part))[1] * 0.5
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        logged = [row["train_loss"] for row in rows if row["step"] == step + 1 and row["train_loss"] is not None]
        assert logged == [float(total)]


def test_the_cut_control_trains_the_very_same_model(tokens_dir, tmp_path, plain_run):
    """The prior's gradients are clipped apart, so with the barrier's gradient cut the model cannot know of it."""
    rows = run(tiny(tokens_dir, tmp_path / "cut", prior_lambda=0.5, prior_detach=True))
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in plain_run[1]]
    cut, plain = weights_of(tmp_path / "cut" / "best"), weights_of(plain_run[0] / "best")
    assert same(cut, plain), "and best/ holds the model alone"


@pytest.mark.parametrize("arm", ARMS[:2], ids=str)
@pytest.mark.parametrize("changes", [{"prior_energy": 1.0}, {"prior_where": "attention", "prior_positions": 3}], ids=str)
def test_the_log_tells_cross_entropy_and_barrier_apart(tokens_dir, tmp_path, changes, arm):
    rows = run(tiny(tokens_dir, tmp_path / "on", prior_lambda=2.0, gradient_accumulation_steps=2, log_interval=3, **changes, **arm))
    logged = [row for row in rows if row["train_loss"] is not None]
    assert len(logged) == 4 and all(set(BARRIER) <= row.keys() for row in logged)
    for row in logged:
        assert row["margin_min"] <= row["margin_p05"] <= row["margin_mean"] and 0 <= row["negative_share"] <= 1 and row["barrier"] > 0
        assert 0 < row["train_loss"] < 3.5, "without 2 x softplus(0)"
    final = checkpoint.load_model(tmp_path / "on")[0]
    program = build(tiny(tokens_dir, tmp_path / "none", **arm))
    checkpoint.copy_weights(program.model, dict(final.named_parameters()), "best")
    assert program.evaluate()["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6), "validation is the plain cross-entropy"


CONTINUED = [
    {"prior_energy": 1.0, "prior_tied": True},
    {"prior_anneal": True},
    {"prior_where": "attention", "prior_layers": (1,)},
    {"embed_noise": 0.3},
]


@pytest.mark.parametrize("changes", CONTINUED, ids=str)
def test_a_resumed_run_is_the_undisturbed_one(tokens_dir, tmp_path, changes, capsys):
    keys = changes | ({} if "embed_noise" in changes else {"prior_lambda": 0.1})
    run(tiny(tokens_dir, tmp_path / "whole", eval_interval=6, **keys))
    program = build(tiny(tokens_dir, tmp_path / "cut", eval_interval=6, **keys))

    def interrupted(seed, i):
        if i == 7:
            raise KeyboardInterrupt
        return program.step(seed, i)

    with pytest.raises(KeyboardInterrupt):
        train.train(program._replace(step=interrupted), 1337, tmp_path / "cut", quiet=True)
    assert checkpoint.read_meta(tmp_path / "cut" / "last")["step"] == 6
    run(tiny(tokens_dir, tmp_path / "cut", eval_interval=6, init_from="resume", **keys))
    whole, cut = (weights_of(tmp_path / name / "last") for name in ("whole", "cut"))
    assert same(whole, cut)
    assert "other values" not in capsys.readouterr().out
    assert any(name.startswith("prior/") for name in whole) == (changes in CONTINUED[:2])


def test_a_checkpoint_with_a_prior_and_one_without_are_not_mixed(tokens_dir, tmp_path, plain_run):
    shutil.copytree(plain_run[0], tmp_path / "plain")
    with pytest.raises(InputError, match="without a prior"):
        run(tiny(tokens_dir, tmp_path / "plain", init_from="resume", prior_lambda=0.1))
    run(tiny(tokens_dir, tmp_path / "with", prior_lambda=0.1, max_iters=6))
    with pytest.raises(InputError, match="with a prior"):
        run(tiny(tokens_dir, tmp_path / "with", init_from="resume"))
    with pytest.raises(InputError, match="misshapen|shape"):
        run(tiny(tokens_dir, tmp_path / "with", init_from="resume", prior_lambda=0.1, prior_dim=4))


def test_the_prior_is_no_part_of_the_model(tokens_dir, tmp_path, plain_run):
    config = tiny(tokens_dir, tmp_path / "on", prior_lambda=0.1, max_iters=6)
    program = build(config)
    assert program.model.num_params() == build(tiny(tokens_dir, tmp_path / "off")).model.num_params()
    held = {id(p) for group in program.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in program.prior.parameters()} <= held
    run(config)
    for name in ("last", "best"):
        model, _, meta = checkpoint.load_model(tmp_path / "on", name)
        assert not any("prior" in key for key, _ in model.named_parameters()) and ("prior" in meta["files"]) == (name == "last")
    (damaged,) = (tmp_path / "on" / "last").glob("prior-*")
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(InputError, match="damaged"):
        run(dataclasses.replace(config, init_from="resume"))


def test_seeds_give_the_prior_its_weights():
    first, again, other = (EmbeddingPrior(12, 4, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


@pytest.mark.parametrize("changes", [{"prior_energy": 1.0, "prior_tied": True}, {"prior_where": "attention"}], ids=str)
def test_the_compiler_sees_one_graph_with_the_same_loss_and_gradients(changes):
    found = []
    for compiled in (False, True):
        objective, x, y = objective_of(prior_lambda=0.5, prior_form="logdet", **changes)
        function = torch.compile(objective, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else objective
        torch.manual_seed(7)
        total, *rest = function(x, y)
        total.backward()
        found.append([total.detach(), *rest, *(p.grad for p in objective.parameters())])
    for eager, compiled in zip(*found):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm", ARMS[:3], ids=str)
@pytest.mark.parametrize("changes", [{"prior_energy": 1.0, "embed_noise": 0.2}, {"prior_where": "attention", "prior_form": "square"}], ids=str)
def test_the_fused_model_has_the_same_objective(changes, arm):
    """fused.py's passes around attention leave loss, margins and gradients as they are."""
    pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
    import fused

    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    x, y = torch.randint(11, (2, 3, 16), generator=torch.Generator().manual_seed(0)).to(device)
    for fast in (False, True):
        model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32, **arm)).to(device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.dim() > 1 else 1)
        if fast:
            fused.accelerate(model, torch.float32)
        objective = Objective(model, tiny("data", "out", prior_lambda=0.5, **changes)).to(device)
        torch.manual_seed(7)
        total, *rest = objective(x, y)
        total.backward()
        found.append([total.detach(), *rest, *(p.grad for p in objective.parameters())])
    for plain, fast in zip(*found):
        torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one(tokens_dir, tmp_path):
    """The embedding form draws nothing, so the global batch decides everything."""
    config = tiny(tokens_dir, tmp_path / "one", prior_lambda=0.5, prior_energy=1.0, dropout=0.0, max_iters=6)
    one = run(config)
    options = [f"--{key}={value}" for key, value in dataclasses.asdict(config).items() if getattr(TrainConfig, key) != value and key != "out_dir"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    done = subprocess.run([*launch, *options, f"--out_dir={tmp_path / 'two'}"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for a, b in zip(one, read_metrics(tmp_path / "two")):
        for key in ("train_loss", "val_loss", "barrier", "margin_min", "margin_mean", "negative_share"):
            if a.get(key) is not None:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


# ---------------------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prior_form": "square"}, "prior_form has no effect without --prior_lambda"),
        ({"prior_dim": 4, "prior_detach": True}, "prior_detach/--prior_dim has no effect"),
        ({"prior_lambda": -1.0}, "prior_lambda=-1.0"),
        ({"prior_lambda": 0.1, "prior_where": "head"}, "prior_where=head must be"),
        ({"prior_lambda": 0.1, "prior_form": "log"}, "prior_form=log must be"),
        ({"prior_lambda": 0.1, "prior_where": "attention", "prior_energy": 1.0}, "prior_energy has no effect with --prior_where=attention"),
        ({"prior_lambda": 0.1, "prior_positions": 4}, "prior_positions has no effect with --prior_where=embedding"),
        ({"prior_lambda": 0.1, "prior_where": "attention", "prior_layers": (2,)}, "prior_layers=2 must be"),
        ({"prior_lambda": 0.1, "prior_where": "attention", "prior_layers": (0, 0)}, "prior_layers=0,0"),
        ({"prior_lambda": 0.1, "prior_dim": 0}, "prior_dim=0"),
        ({"embed_noise": -0.1}, "embed_noise=-0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
    ],
    ids=str,
)
def test_keys_that_cannot_be_meant(changes, words):
    with pytest.raises(InputError) as error:
        tiny("data", "out", **changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_pictures_have_no_causal_prior(tmp_path):
    digits = tmp_path / "digits"
    subprocess.run([sys.executable, str(ROOT / "data" / "digits16" / "prepare.py"), f"--out_dir={digits}"], check=True, capture_output=True)
    config = TrainConfig(**TINY | {"dataset": str(digits), "out_dir": str(tmp_path / "v"), "eval_tokens": 640, "patch_size": 4})
    with pytest.raises(InputError, match="use --prior_where=attention"):
        build(dataclasses.replace(config, prior_lambda=0.1))
    rows = run(dataclasses.replace(config, prior_lambda=0.1, prior_where="attention", diffusion=True, max_iters=6))
    assert rows[-1]["val_loss"] > 0 and json.dumps(rows) and any("barrier" in row for row in rows)
