"""model.py against plain float64 code written here, and against the laws of THEORY section 1."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from model import GPT, CausalSelfAttention, GPTConfig, InOrder, KVCache, attention_matrix, attention_reference, diffuse

TINY = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=4, n_embd=16, bias=True)
ARMS = {
    "A": {},
    "A-I": {"diffusion": True},
    "scaled": {"diffusion": True, "diffusion_alpha": 0.7, "diffusion_lambda": 1.3},
    "no head": {"diffusion": True, "diffusion_heads": (0,)},
    "one head": {"diffusion": True, "diffusion_heads": (1,)},
    "by layer": {"diffusion": True, "diffusion_heads": (0, 3), "diffusion_lambda": 0.5},
}
EACH_ARM = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
EACH_ALPHA = pytest.mark.parametrize("alpha, lam", [(1.0, 1.0), (0.3, 1.0), (1.0, 1.7), (0.6, -0.4)])


def arm_of(arm: dict, **changes) -> GPTConfig:
    return dataclasses.replace(TINY, **arm, **changes)


def noisy(model, seed: int = 0):
    """The model in float64 with every parameter, biases and gains too, moved off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def attention(config, layer: int = 0) -> CausalSelfAttention:
    """One attention layer in float64; equal weights at every call."""
    torch.manual_seed(3)
    return noisy(CausalSelfAttention(config, layer))


def random_qkv(seed: int = 0, B=2, H=4, T=6, d=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, T, d, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def diffused_by_loops(q, k, v, causal: bool, alpha: float, lam: float, heads: int):
    """One number of A at a time: y_t = sum_s a_ts v_s, and lambda (y_t - alpha v_t) on the last `heads` heads."""
    B, H, T, d = q.shape
    result = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                past = range(t + 1 if causal else T)
                weights = [torch.exp((q[b, h, t] * k[b, h, s]).sum() / d**0.5) for s in past]
                y = sum(weight * v[b, h, s] for weight, s in zip(weights, past)) / sum(weights)
                result.append(lam * (y - alpha * v[b, h, t]) if h >= H - heads else y)
    return torch.stack(result).view(B, H, T, d)


def heads_of(config: GPTConfig, layer: int) -> int:
    """The number of diffusing heads of a layer, from the description of the key."""
    if not config.diffusion:
        return 0
    if config.diffusion_heads == ():
        return config.n_head
    return config.diffusion_heads[0] if len(config.diffusion_heads) == 1 else config.diffusion_heads[layer]


def logits_by_loops(model: GPT, idx):
    """GPT-2's forward pass from the parameters by name: (B, T) -> (B, T, vocab_size)."""
    p, c = dict(model.named_parameters()), model.config
    B, T = idx.shape

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    x = torch.stack([p["transformer.wte.weight"][idx[b]] + p["transformer.wpe.weight"][:T] for b in range(B)])
    for layer in range(c.n_layer):
        h = f"transformer.h.{layer}."
        qkv = linear(norm(x, h + "ln_1"), h + "attn.c_attn").view(B, T, 3, c.n_head, c.n_embd // c.n_head)
        q, k, v = (qkv[:, :, i].permute(0, 2, 1, 3) for i in range(3))
        y = diffused_by_loops(q, k, v, True, c.diffusion_alpha, c.diffusion_lambda, heads_of(c, layer))
        x = x + linear(y.permute(0, 2, 1, 3).reshape(B, T, c.n_embd), h + "attn.c_proj")
        wide = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        x = x + linear(0.5 * wide * (1 + torch.erf(wide / 2**0.5)), h + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].T


def some_tokens(config: GPTConfig, B: int = 2, T: int | None = None, seed: int = 1):
    return torch.randint(config.vocab_size, (B, T or config.block_size), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------------------
# Attention and diffusion


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [0, 1, 3, 4])
@EACH_ALPHA
def test_diffusion_and_its_gradients_equal_the_loops(causal, heads, alpha, lam):
    q, k, v = random_qkv()
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    plain = diffused_by_loops(q, k, v, causal, alpha, lam, heads)
    fused = diffuse(F.scaled_dot_product_attention(q, k, v, is_causal=causal), v, alpha, lam, heads)
    stored = attention_reference(q, k, v, causal, True, alpha, lam, heads)
    gradients = [torch.autograd.grad((y * upstream).sum(), (q, k, v)) for y in (plain, fused, stored)]
    for y, gradient in ((fused, gradients[1]), (stored, gradients[2])):
        torch.testing.assert_close(y, plain, rtol=0, atol=1e-13)
        for ours, reference in zip(gradient, gradients[0]):
            torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


def test_reference_defaults_are_the_two_arms():
    q, k, v = random_qkv(3)
    torch.testing.assert_close(attention_reference(q, k, v), diffused_by_loops(q, k, v, True, 1, 1, 0), rtol=0, atol=1e-13)
    torch.testing.assert_close(attention_reference(q, k, v, diffusion=True), diffused_by_loops(q, k, v, True, 1, 1, 4), rtol=0, atol=1e-13)


def test_attention_matrix_is_row_stochastic_and_blind_to_the_future():
    q, k, _ = random_qkv(4)
    full, causal = attention_matrix(q, k, causal=False), attention_matrix(q, k)
    for A in (full, causal):
        torch.testing.assert_close(A.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (full > 0).all()
    assert torch.equal(causal > 0, torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 4, 6, 6))


def test_attention_matrix_of_the_last_queries_is_the_last_rows():
    q, k, _ = random_qkv(5)
    torch.testing.assert_close(attention_matrix(q[:, :, 4:], k), attention_matrix(q, k)[:, :, 4:], rtol=0, atol=1e-15)


@EACH_ARM
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
def test_module_and_its_gradients_equal_the_loops(arm, causal, layer):
    config = SimpleNamespace(**dataclasses.asdict(arm_of(arm)), causal=causal)
    module = attention(config, layer)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    weight, bias = module.c_attn.weight, module.c_attn.bias
    q, k, v = ((x @ weight[i * 16 : i * 16 + 16].T + bias[i * 16 : i * 16 + 16]).view(2, 5, 4, 4).permute(0, 2, 1, 3) for i in range(3))
    y = diffused_by_loops(q, k, v, causal, config.diffusion_alpha, config.diffusion_lambda, heads_of(config, layer))
    plain = y.permute(0, 2, 1, 3).reshape(2, 5, 16) @ module.c_proj.weight.T + module.c_proj.bias
    ours = module(x)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    inputs = (x, weight, bias, module.c_proj.weight, module.c_proj.bias)  # the rows of `weight` are those of q, k and v
    for a, b in zip(torch.autograd.grad(ours.square().sum(), inputs), torch.autograd.grad(plain.square().sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_constant_values_give_zero(causal):
    q, k, _ = random_qkv(6)
    v = torch.randn(2, 4, 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).expand(2, 4, 6, 5)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert y.abs().min() > 1e-3  # A v = v, not 0
    assert diffuse(y, v, 1.0, 1.0, 4).abs().max() < 1e-14
    torch.testing.assert_close(diffuse(y, v, 0.25, 2.0, 4), 1.5 * v, rtol=0, atol=1e-14)
    halves = diffuse(y, v, 1.0, 1.0, 2)
    assert halves[:, 2:].abs().max() < 1e-14 and torch.equal(halves[:, :2], y[:, :2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_position_one_gets_exactly_zero(dtype):
    module = attention(arm_of({"diffusion": True}, bias=False)).to(dtype)
    with torch.no_grad():
        y = module(torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(8)).to(dtype))
    assert torch.equal(y[:, 0], torch.zeros(3, 16, dtype=dtype))
    assert (y[:, 1:].abs().amax(-1) > 1e-3).all()


def test_the_gradient_of_fused_attention_comes_in_the_order_of_its_output():
    """Behind a slice or a cat it comes in another, which cuDNN's backward kernel misreads."""
    seen = []
    y = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    turned = y.transpose(1, 2)  # (B, H, T, d), in memory (B, T, H, d)
    turned.register_hook(lambda g: seen.append(g.stride()))
    direction = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    InOrder.apply(turned).backward(direction)
    assert seen == [turned.stride()] != [direction.stride()]
    assert torch.equal(y.grad, direction.transpose(1, 2))


def test_diffusion_leaves_its_arguments_alone():
    y, v = (torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    before = y.clone(), v.clone()
    for heads in (0, 2, 4):
        diffuse(y, v, 0.5, 2.0, heads)
    assert torch.equal(y, before[0]) and torch.equal(v, before[1])


def test_identity_is_subtracted_after_dropout_of_the_weights():
    outputs, v = {}, None
    for diffusion in (False, True):
        module = attention(arm_of({"diffusion": diffusion}, dropout=0.5)).train()
        module.resid_dropout.p = 0.0
        with torch.no_grad():
            module.c_proj.weight.copy_(torch.eye(16))
            module.c_proj.bias.zero_()
            x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            v = module.c_attn(x)[..., 32:]
            torch.manual_seed(11)
            outputs[diffusion] = module(x)
    module.eval()
    assert (module(x) - outputs[True]).abs().max() > 0.1  # dropout was on
    torch.testing.assert_close(outputs[True], outputs[False] - v, rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------------------
# The whole model


@EACH_ARM
def test_logits_equal_the_plain_forward_pass(arm):
    model = noisy(GPT(arm_of(arm)))
    idx = some_tokens(model.config)
    with torch.no_grad():
        plain = logits_by_loops(model, idx)
        torch.testing.assert_close(model(idx, idx)[0], plain, rtol=0, atol=1e-11)
        torch.testing.assert_close(model(idx)[0], plain[:, -1:], rtol=0, atol=1e-11)
        torch.testing.assert_close(model(idx[:, :5], idx[:, :5])[0], plain[:, :5], rtol=0, atol=1e-11)
    assert model(idx)[1] is None


@EACH_ARM
def test_loss_is_the_mean_over_the_targets_that_are_not_minus_one(arm):
    model = noisy(GPT(arm_of(arm)))
    idx, targets = some_tokens(model.config), some_tokens(model.config, seed=2)
    targets[0, 3:] = -1
    targets[1, ::2] = -1
    with torch.no_grad():
        logits, loss = model(idx, targets)
        terms = []
        for b, t in (targets >= 0).nonzero().tolist():
            row = logits[b, t].tolist()
            terms.append(math.log(sum(math.exp(z - max(row)) for z in row)) + max(row) - row[targets[b, t]])
    assert len(terms) == 3 + 6
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-6)  # the loss is float32


def test_ignored_targets_send_no_gradient():
    model = noisy(GPT(TINY))
    idx = some_tokens(TINY)
    targets = torch.full_like(idx, -1)
    targets[:, 4] = 7
    gradient = torch.autograd.grad(model(idx, targets)[1], model.transformer.wpe.weight)[0]
    assert gradient[:5].abs().sum(1).min() > 0
    assert torch.equal(gradient[5:], torch.zeros_like(gradient[5:]))


def test_alpha_zero_lambda_one_is_attention_bit_for_bit():
    runs = []
    for arm in ({}, {"diffusion": True, "diffusion_alpha": 0.0}):
        model = GPT(arm_of(arm))
        idx = some_tokens(TINY)
        logits, loss = model(idx, idx)
        runs.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_arms_have_equal_parameters_and_different_outputs():
    plain = GPT(TINY)
    weights = dict(plain.named_parameters())
    idx = some_tokens(TINY)
    for name, arm in ARMS.items():
        model = GPT(arm_of(arm))
        assert model.num_params() == plain.num_params()
        others = dict(model.named_parameters())
        assert others.keys() == weights.keys()
        assert all(torch.equal(others[key], weights[key]) for key in weights)
        assert torch.equal(model(idx)[0], plain(idx)[0]) == (name in ("A", "no head"))


def test_the_past_does_not_see_the_future():
    model = noisy(GPT(arm_of(ARMS["by layer"])))
    idx = some_tokens(TINY)
    changed = idx.clone()
    changed[:, 7] = (idx[:, 7] + 1) % TINY.vocab_size
    with torch.no_grad():
        difference = (model(idx, idx)[0] - model(changed, idx)[0]).abs().amax((0, 2))
    assert difference[:7].max() < 1e-13
    assert difference[7:].min() > 1e-6


@pytest.mark.parametrize("T", [13, 20])
def test_context_too_long_raises(T):
    with pytest.raises(ValueError, match=f"{T}.*12"):
        GPT(TINY)(torch.zeros(1, T, dtype=torch.int64))


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="n_embd 16.*n_head 3"):
        GPT(dataclasses.replace(TINY, n_head=3))


def test_names_and_shapes_are_those_of_nanogpt():
    h = "transformer.h.0."
    expected = {
        "transformer.wte.weight": (23, 16), "transformer.wpe.weight": (12, 16), "transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,),
        h + "ln_1.weight": (16,), h + "ln_1.bias": (16,), h + "ln_2.weight": (16,), h + "ln_2.bias": (16,),
        h + "attn.c_attn.weight": (48, 16), h + "attn.c_attn.bias": (48,), h + "attn.c_proj.weight": (16, 16), h + "attn.c_proj.bias": (16,),
        h + "mlp.c_fc.weight": (64, 16), h + "mlp.c_fc.bias": (64,), h + "mlp.c_proj.weight": (16, 64), h + "mlp.c_proj.bias": (16,),
    }  # fmt: skip
    model = GPT(arm_of({"diffusion": True}, n_layer=1))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert set(model.state_dict()) == expected.keys() | {"lm_head.weight"}
    without = GPT(arm_of({}, n_layer=1, bias=False))
    assert {name for name, _ in without.named_parameters()} == {name for name in expected if not name.endswith("bias")}


def test_counts_of_parameters_and_operations():
    c = dataclasses.replace(TINY, bias=False)
    C = c.n_embd
    counted = c.vocab_size * C + c.n_layer * (3 * C * C + C * C + 4 * C * C + 4 * C * C + 2 * C) + C
    model = GPT(c)
    assert model.num_params() == counted
    assert model.num_params(non_embedding=False) == counted + c.block_size * C
    assert model.flops_per_token() == 6 * counted + 12 * c.n_layer * C * c.block_size


# ---------------------------------------------------------------------------------------------------------------------------------
# Initial weights

WIDE = GPTConfig(block_size=64, vocab_size=400, n_layer=3, n_head=4, n_embd=64, bias=True)


@pytest.mark.parametrize("seed", [0, 1337])
def test_initial_weights_have_gpt2s_distribution(seed):
    model = GPT(WIDE)
    model.init_weights(seed)
    matrices = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        matrices += 1
        std = 0.02 / 6**0.5 if name.endswith("c_proj.weight") else 0.02
        z, n = parameter.detach().double().flatten() / std, parameter.numel()
        assert abs(float(z.mean())) < 4 / n**0.5, name  # four standard errors of a normal sample; the seed is fixed
        assert abs(float(z.square().mean()) - 1) < 4 * (2 / n) ** 0.5, name
        assert abs(float((z.abs() < 1).double().mean()) - math.erf(0.5**0.5)) < 4 * (0.2166 / n) ** 0.5, name
    assert matrices == 2 + 4 * 3


def test_every_parameter_is_initialised_from_the_seed():
    model = GPT(WIDE)
    fresh = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights(0)
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in model.named_parameters())
    model.init_weights(1)
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    now = dict(model.named_parameters())
    assert not any(torch.equal(now[name], fresh[name]) for name in matrices)
    starts = [tuple((now[name].flatten()[:8] / now[name].std()).tolist()) for name in matrices]
    assert len(set(starts)) == len(matrices)  # no two parameters share a draw


def test_a_parameter_more_leaves_the_others_weights_alone():
    with_bias, without = (dict(GPT(dataclasses.replace(WIDE, bias=bias)).named_parameters()) for bias in (True, False))
    assert without.keys() < with_bias.keys()
    assert all(torch.equal(with_bias[name], without[name]) for name in without)


def test_table_is_tied():
    model = GPT(TINY)
    assert model.lm_head.weight is model.transformer.wte.weight
    model = model.double()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_construction_and_initialisation_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = GPT(TINY)
    model.init_weights(7)
    first = model.transformer.wpe.weight.detach().clone()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    model.init_weights(7)
    assert torch.equal(model.transformer.wpe.weight, first)


# ---------------------------------------------------------------------------------------------------------------------------------
# Decoding with a cache


@EACH_ARM
@pytest.mark.parametrize("chunks", [(1,) * 12, (5,) + (1,) * 7, (4, 3, 1, 4), (3, 2, 2, 5), (12,), (1, 11)], ids=str)
def test_cached_decoding_equals_the_full_pass(arm, chunks):
    model = noisy(GPT(arm_of(arm))).eval()
    idx = some_tokens(TINY, B=3)
    cache = KVCache(model.config, 3, "cpu", torch.float64)
    with torch.no_grad():
        full = model(idx, idx)[0]
        for chunk in chunks:
            begin = cache.length
            with_targets = model(idx[:, begin : begin + chunk], idx[:, begin : begin + chunk], cache)[0]
            assert cache.length == begin + chunk
            torch.testing.assert_close(with_targets, full[:, begin : cache.length], rtol=0, atol=1e-12)
            cache.length = begin  # the same tokens once more, now without targets
            torch.testing.assert_close(model(idx[:, begin : begin + chunk], cache=cache)[0], full[:, cache.length - 1, None], rtol=0, atol=1e-12)
    assert cache.length == 12


def test_cache_full_raises_and_stays_as_it_was():
    model = GPT(TINY).eval()
    cache = KVCache(TINY, 1, "cpu", torch.float32)
    model(torch.zeros(1, 10, dtype=torch.int64), cache=cache)
    entries = cache.entries.clone()
    with pytest.raises(ValueError, match="13.*12"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    assert cache.length == 10 and torch.equal(cache.entries, entries)
