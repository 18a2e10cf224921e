"""variants.py against plain formulas in float64, and the keys through the model, checkpoints, decoding and refusals."""

import copy
import dataclasses
import itertools
import json
import math
import sys

import pytest
import torch
from runs import build, losses, run, tiny
from torch.nn import functional as F

import checkpoint
import variants
from configurator import InputError, TrainConfig
from export_hf import ExportConfig, export
from model import GPT, Block, CausalSelfAttention, GPTConfig, KVCache, LayerNorm, ViT, ViTConfig, attention_reference
from sample import StaticCache
from tests.test_train import equal, tensors

KERNELS = ("softmax", "softmax1", "rbf", "student_t")
ALL = [dict(zip(("attention_kernel", "head_combine"), pair)) for pair in itertools.product(KERNELS, ("concat", "product"))]
ARMS = [dict(diffusion=False), dict(diffusion=True), dict(diffusion=True, diffusion_alpha=0.7, diffusion_lambda=1.3, diffusion_heads=(2,))]
SIZES = dict(n_layer=2, n_head=4, n_embd=24, bias=True)
TIGHT = dict(rtol=1e-10, atol=1e-10)


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loud(model):
    """Weights large enough for the attention matrices to be far from uniform, in float64."""
    for number, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.double() + 0.3 * draw(*parameter.shape, seed=number)
    return model.eval()


def gpt(**keys) -> GPT:
    return loud(GPT(GPTConfig(block_size=12, vocab_size=19, **SIZES | keys)))


def vit(**keys) -> ViT:
    return loud(ViT(ViTConfig(image_size=8, patch_size=2, n_classes=5, **SIZES | keys)))


def plain_matrix(q, k, causal: bool, kernel: str) -> torch.Tensor:
    """The row-normalised graph of one head by two loops: (T, d), (T, d) -> (T, T)."""
    T, d = q.shape
    A = torch.zeros(T, T, dtype=torch.float64)
    for i in range(T):
        for j in range(i + 1 if causal else T):
            square = float((q[i] - k[j]).square().sum()) / math.sqrt(d)
            product = float(q[i] @ k[j]) / math.sqrt(d)
            A[i, j] = {"rbf": math.exp(-square / 2), "student_t": 1 / (1 + square)}.get(kernel, math.exp(product))
        A[i] /= A[i].sum() + (kernel == "softmax1")
    return A


@torch.no_grad()
def plain_attention(attn: CausalSelfAttention, u) -> torch.Tensor:
    """The attention sub-layer on one sequence (T, C), with every matrix stored and the product of experts as its formula."""
    H, d = attn.n_head, u.size(-1) // attn.n_head
    q, k, v = (part.view(-1, H, d).transpose(0, 1) for part in attn.c_attn(u).split(u.size(-1), dim=-1))
    kernel = getattr(attn, "kernel", "softmax")
    A = torch.stack([plain_matrix(q[h], k[h], attn.causal, kernel) for h in range(H)])
    y = A @ v
    precision = torch.ones(H, len(u), dtype=torch.float64)
    if getattr(attn, "product", False):
        for h, i in itertools.product(range(H), range(len(u))):
            variance = sum(float(A[h, i, s]) * float((v[h, s] - y[h, i]).square().mean()) for s in range(len(u)))
            variance += (1 - float(A[h, i].sum())) * float(y[h, i].square().mean())  # what softmax1 leaves is at 0
            precision[h, i] = 1 / (variance + math.exp(float(attn.log_noise[h])))
    y[H - attn.diffusing_heads :] = attn.lam * (y - attn.alpha * v)[H - attn.diffusing_heads :]
    proposals = torch.stack([H * y[h] @ attn.c_proj.weight[:, h * d : (h + 1) * d].T for h in range(H)])  # mu_h, (H, T, C)
    mean = (precision[:, :, None] * proposals).sum(0) / precision.sum(0)[:, None]
    return mean + attn.c_proj.bias


# ---------------------------------------------------------------------------------------------------------------------------------
# Kernels and heads


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_stored_matrix_of_a_kernel_is_its_definition(kernel, causal):
    q, k = draw(2, 3, 6, 5), 1.5 * draw(2, 3, 6, 5, seed=1)
    A = variants.kernel_matrix(q, k, causal, kernel)
    for b, h in itertools.product(range(2), range(3)):
        torch.testing.assert_close(A[b, h], plain_matrix(q[b, h], k[b, h], causal, kernel), **TIGHT)


def test_rbf_is_softmax_with_the_key_norm_bias():
    q, k = draw(2, 3, 6, 5), 1.5 * draw(2, 3, 6, 5, seed=1)
    distances = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
    bias = -k.square().sum(-1)[..., None, :] / 2
    torch.testing.assert_close((-distances / 2).softmax(-1), (q @ k.mT + bias).softmax(-1), **TIGHT)
    more_q, more_k = variants.with_key_norms(q, k)
    torch.testing.assert_close(more_q @ more_k.mT, (q @ k.mT + bias).expand(2, 3, 6, 6), **TIGHT)


def test_the_second_channel_keeps_what_bfloat16_would_lose():
    k = (4 * draw(1, 1, 50, 64)).bfloat16()
    _, more = variants.with_key_norms(k, k)
    exact = -0.5 * k.double().square().sum(-1)
    one, two = (more[..., 64].double() - exact).abs().max(), (more[..., 64:].double().sum(-1) - exact).abs().max()
    assert one > 0.2 and two < one / 50


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("keys", ALL)
def test_the_sub_layer_is_its_formula(keys, arm):
    for model in (gpt(**keys, **arm), vit(**keys, **arm)):
        u = draw(2, 7, 24, seed=3)
        attn = model.transformer.h[1].attn
        torch.testing.assert_close(attn(u), torch.stack([plain_attention(attn, x) for x in u]), **TIGHT)


@pytest.mark.parametrize("arm", ARMS[:2])
def test_one_head_of_the_product_is_the_ordinary_block_exactly(arm):
    ordinary, product = (gpt(n_head=1, head_combine=combine, **arm) for combine in ("concat", "product"))
    assert type(product.transformer.h[0].attn) is variants.VariantAttention
    assert [name for name, _ in ordinary.named_parameters()] == [name for name, _ in product.named_parameters()]
    idx = torch.arange(24).view(2, 12) % 19
    assert torch.equal(product(idx, idx)[0], ordinary(idx, idx)[0])


def test_equal_precisions_give_the_ordinary_block():
    ordinary, product = gpt(diffusion=True), gpt(diffusion=True, head_combine="product")
    checkpoint.copy_weights(product, {**dict(ordinary.named_parameters()), **{n: p for n, p in product.named_parameters() if "log_noise" in n}}, "")
    idx = torch.arange(24).view(2, 12) % 19
    assert (product(idx, idx)[0] - ordinary(idx, idx)[0]).abs().max() > 1e-2
    for block in product.transformer.h:
        block.attn.log_noise.data.fill_(30.0)  # beside such a noise no variance counts
    torch.testing.assert_close(product(idx, idx)[0], ordinary(idx, idx)[0], rtol=1e-8, atol=1e-8)


def test_a_head_of_softmax1_can_be_silent_and_of_large_logits_is_one_of_softmax():
    q, k = draw(2, 3, 6, 5), draw(2, 3, 6, 5, seed=1)
    k[..., 0] = 1.0  # logits go wherever the first channel of the queries goes
    down, up = q.clone(), q.clone()
    down[..., 0], up[..., 0] = -200.0, 200.0
    assert variants.kernel_matrix(down, k, True, "softmax1").sum(-1).max() < 1e-30
    torch.testing.assert_close(variants.kernel_matrix(up, k, True, "softmax1"), variants.kernel_matrix(up, k, True, "softmax"), **TIGHT)


@pytest.mark.parametrize("keys", [keys for keys in ALL if keys["attention_kernel"] != "softmax1"])
def test_the_first_position_of_a_causal_graph_diffuses_to_nothing(keys):
    attn = gpt(diffusion=True, **keys).transformer.h[0].attn
    q = draw(2, 4, 6, 6)
    first = attn.per_head(q, q, q, q, None, True)[:, :, 0]
    assert first.abs().max() < 1e-12


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("keys", ALL)
def test_decoding_with_a_cache_gives_the_logits_without(keys, arm):
    model = gpt(**keys, **arm)
    idx = torch.randint(19, (2, 12), generator=torch.Generator().manual_seed(1))
    whole, _ = model(idx, idx)
    cache, found = KVCache(model.config, 2, "cpu", torch.float64), []
    for piece in idx.split([3, 1, 4, 1, 3], dim=1):
        found.append((piece.size(1), model(piece, cache=cache)[0][:, 0]))
    for end, (_, logits) in zip(itertools.accumulate(length for length, _ in found), found):
        torch.testing.assert_close(logits, whole[:, end - 1], **TIGHT)


@pytest.mark.parametrize("keys", ALL)
@torch.inference_mode()
def test_decoding_with_the_cache_of_cuda_graphs_gives_the_same(keys):
    model = gpt(**keys, diffusion=True)
    idx = torch.randint(19, (1, 12), generator=torch.Generator().manual_seed(1))
    whole, _ = model(idx, idx)
    cache = StaticCache(model.config, 1, "cpu", torch.float64)
    model(idx[:, :4], cache=cache)
    for i in range(4, 12):
        cache.position.fill_(i)
        torch.testing.assert_close(model(idx[:, i : i + 1], cache=cache)[0][:, 0], whole[:, i], **TIGHT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision attention of a GPU")
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("keys", [*ALL, {"diffusion_learned": True}])
def test_gradients_in_half_precision_are_right_on_a_gpu(keys, arm):
    """Within rounding of float64: cuDNN's kernels have been seen to return wrong ones (model.InOrder)."""
    keys = dict(block_size=64, vocab_size=19, n_layer=2, n_head=4, n_embd=256, **keys, **arm)
    half, idx = GPT(GPTConfig(**keys)).cuda(), torch.randint(19, (2, 64), device="cuda")
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    exact = copy.deepcopy(half).double()
    with torch.autocast("cuda", torch.bfloat16):
        half(idx, idx.roll(-1))[1].backward()
    exact(idx, idx.roll(-1))[1].backward()
    for (name, ours), reference in zip(half.named_parameters(), exact.parameters()):
        assert (ours.grad - reference.grad).norm() < 0.1 * reference.grad.norm(), name


@pytest.mark.parametrize("keys", ALL)
def test_the_compiler_sees_one_graph_and_autocast_stays_close(keys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=12, vocab_size=19, **SIZES | keys | dict(diffusion=True, weight_init="unrolled")))
    idx = torch.randint(19, (2, 12))
    loss = model(idx, idx)[1]
    torch.testing.assert_close(torch.compile(lambda x, y: model(x, y)[1], backend="aot_eager", fullgraph=True)(idx, idx), loss)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(idx, idx)[1]
    assert 0 < abs(float((rough - loss).detach())) < 0.02
    rough.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------------------
# Initial weights


def test_variants_start_from_the_same_weights():
    plain = dict(GPT(GPTConfig(block_size=12, vocab_size=19, **SIZES), seed=5).named_parameters())
    for keys in ALL:
        found = dict(GPT(GPTConfig(block_size=12, vocab_size=19, **SIZES | keys), seed=5).named_parameters())
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
        assert len(found) - len(plain) == (2 if keys["head_combine"] == "product" else 0)


@pytest.mark.parametrize("diffusion", [False, True])
def test_the_unrolled_weights_without_their_noise_are_one_step_of_the_theory(diffusion):
    C, H, layers, temperature, step = 24, 3, 2, 0.5, 0.8
    model = ViT(ViTConfig(n_layer=layers, n_head=H, n_embd=C, diffusion=diffusion))
    for block in model.transformer.h:
        for weight in (block.attn.c_attn.weight, block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight):
            weight.data.zero_()
    variants.add_theory(model, temperature, step)
    block, x, eta = model.double().transformer.h[1], draw(9, C), step / layers
    u = F.layer_norm(x, (C,), eps=1e-5)
    update = []
    for uh in u.split(C // H, dim=1):
        A = (uh @ uh.T / (C // H) / temperature).softmax(-1)
        update.append((A - diffusion * torch.eye(9, dtype=torch.float64)) @ uh)
    x = x + eta * torch.cat(update, dim=1)
    expected = x + eta * F.layer_norm(x, (C,), eps=1e-5)
    torch.testing.assert_close(block(draw(1, 9, C).view(1, 9, C))[0], expected, rtol=1e-6, atol=1e-6)  # s and eta were rounded to float32


def test_the_unrolled_weights_are_gpt2s_plus_what_the_seed_does_not_move():
    kinds = {init: GPTConfig(block_size=12, vocab_size=19, weight_init=init, **SIZES | dict(bias=False)) for init in ("gpt2", "unrolled")}
    first, second = ({init: dict(GPT(config, seed=seed).named_parameters()) for init, config in kinds.items()} for seed in (1, 2))
    for name in first["gpt2"]:
        added, again = (found["unrolled"][name] - found["gpt2"][name] for found in (first, second))
        torch.testing.assert_close(added, again, rtol=0, atol=1e-6)
        assert bool(added.any()) == (".attn." in name or ".mlp." in name)


# ---------------------------------------------------------------------------------------------------------------------------------
# Through the programs


@pytest.mark.parametrize("key", ["weight_init", "head_combine", "attention_kernel"])
def test_a_misspelt_value_is_refused_with_the_known_ones(key):
    with pytest.raises(InputError, match=f"--{key}=Softmaxx must be .* or "):
        TrainConfig(**{key: "Softmaxx"}).check()


def test_the_weights_of_another_run_leave_no_room_for_an_initialisation():
    with pytest.raises(InputError, match="--weight_init=unrolled has no effect: the weights are those of out/best"):
        TrainConfig(init_from="out/best", weight_init="unrolled").check()


def test_a_default_model_does_not_import_the_variants():
    import subprocess

    code = "import sys, model; model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8)); sys.exit('variants' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=checkpoint.__file__.rpartition("/")[0]).returncode == 0


def older(directory):
    """Takes the keys of variants.py out of a checkpoint, as one of before them lacks them."""
    meta = checkpoint.read_meta(directory)
    for key in ("weight_init", "head_combine", "attention_kernel"):
        del meta["model"][key], meta["config"][key]
    meta["sha256"] = checkpoint._checksum(meta)
    (directory / "checkpoint.json").write_text(json.dumps(meta))


def test_a_checkpoint_from_before_these_keys_loads_and_resumes(tokens_dir, tmp_path):
    whole = run(tiny(tokens_dir, tmp_path / "whole", max_iters=8, decay_lr=False))
    half = tiny(tokens_dir, tmp_path / "half", max_iters=4, decay_lr=False)
    run(half)
    for name in ("last", "best"):
        older(tmp_path / "half" / name)
    assert checkpoint.load_model(tmp_path / "half")[0].config.attention_kernel == "softmax"
    with pytest.raises(InputError, match="was trained with attention_kernel=softmax, this run has attention_kernel=rbf"):
        run(dataclasses.replace(half, max_iters=8, init_from="resume", attention_kernel="rbf"))
    rows = run(dataclasses.replace(half, max_iters=8, init_from="resume"))
    assert {step: loss for step, loss in losses(whole).items()} == losses(rows)
    assert equal(tensors(tmp_path / "whole" / "last"), tensors(tmp_path / "half" / "last"))


def test_a_variant_trains_resumes_and_cannot_be_exported(tokens_dir, tmp_path):
    keys = dict(attention_kernel="student_t", head_combine="product", weight_init="unrolled", diffusion=True, dropout=0.1, decay_lr=False)
    whole = run(tiny(tokens_dir, tmp_path / "whole", max_iters=8, **keys))
    half = tiny(tokens_dir, tmp_path / "half", max_iters=4, **keys)
    run(half)
    rows = run(dataclasses.replace(half, max_iters=8, init_from="resume"))
    assert losses(whole) == losses(rows)
    with pytest.raises(InputError, match="was trained with head_combine=product, which the exported model cannot express"):
        export(ExportConfig(out_dir=str(tmp_path / "half"), to=str(tmp_path / "hf")))
    assert not (tmp_path / "hf").exists()


def test_a_variant_learns(tokens_dir, tmp_path):
    for keys in ALL[1:]:
        program = build(tiny(tokens_dir, tmp_path, **keys, diffusion=True))
        seen = [float(program.step(1, i)[0]) for i in range(30)]
        assert seen[-1] < seen[0] - 0.5


def test_layer_norm_block_and_reference_are_those_of_the_model():
    attn = Block(ViTConfig(n_layer=1, n_head=2, n_embd=8, attention_kernel="softmax", diffusion=True), 0).attn
    assert type(attn) is CausalSelfAttention and LayerNorm(4, False).bias is None
    q = draw(1, 2, 5, 4)
    torch.testing.assert_close(attn.per_head(q, q, q, q, None, False), attention_reference(q, q, q, causal=False, diffusion=True), **TIGHT)


# ---------------------------------------------------------------------------------------------------------------------------------
# diffusion_learned


@pytest.mark.parametrize("heads", [(), (2,), (0, 3)])
@pytest.mark.parametrize("make", [gpt, vit])
def test_a_learned_alpha_starts_as_the_constant_and_has_its_gradient(make, heads):
    keys = dict(diffusion=True, diffusion_alpha=0.6, diffusion_lambda=1.2, diffusion_heads=heads)
    constant, learned = make(**keys), make(**keys, diffusion_learned=True)
    with torch.no_grad():
        for name, parameter in learned.named_parameters():
            parameter.fill_(0.6) if name.endswith("alpha") else parameter.copy_(dict(constant.named_parameters())[name])
    inputs = (torch.arange(12)[None] % 19,) * 2 if make is gpt else (draw(2, 3, 8, 8), torch.tensor([1, 4]))
    torch.testing.assert_close(learned(*inputs)[0], constant(*inputs)[0], **TIGHT)

    def loss():  # the model's own is in float32
        logits = learned(*inputs)[0]
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), inputs[1].reshape(-1))

    loss().backward()
    attn, step = learned.transformer.h[1].attn, 1e-6
    assert attn.alpha.shape == ((heads or (4,))[-1],)
    for head in range(len(attn.alpha)):  # central differences
        losses_around = []
        for sign in (1, -1):
            with torch.no_grad():
                attn.alpha[head] += sign * step
                losses_around.append(float(loss()))
                attn.alpha[head] -= sign * step
        assert float(attn.alpha.grad[head]) == pytest.approx((losses_around[0] - losses_around[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_learned_alphas_move_and_are_reported(tokens_dir, tmp_path):
    import probe

    program = build(tiny(tokens_dir, tmp_path, max_iters=8, diffusion=True, diffusion_learned=True, diffusion_alpha=0.5, learning_rate=0.05))
    attn = program.model.transformer.h[0].attn
    assert [p is attn.alpha for group in program.optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]].count(True) == 1
    fresh = GPT(program.model.config, 3)
    assert all(float(a) == 0.5 for block in fresh.transformer.h for a in block.attn.alpha)
    run(program.config)
    model = checkpoint.load_model(tmp_path, "last")[0]
    found = dict(probe.probe(model, [(torch.arange(16)[None] % 10,)], 1))
    alphas = [float(a) for a in model.transformer.h[0].attn.alpha]
    assert [found[f"layer 0 head {head} alpha"] for head in range(len(alphas))] == alphas and all(a != 0.5 for a in alphas)
    with pytest.raises(InputError, match="diffusion_learned=True, which the exported model cannot express"):
        export(ExportConfig(out_dir=str(tmp_path), which="last", to=str(tmp_path / "hf")))


def test_a_learned_alpha_needs_diffusion():
    with pytest.raises(InputError, match="--diffusion_learned has no effect without --diffusion=True"):
        TrainConfig(diffusion_learned=True).check()
