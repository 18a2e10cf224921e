"""decode.py against float64 and against the model: on a GPU where there is one, else in Triton's interpreter on the CPU (conftest.py)."""

import math
import sys

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
CUDA = torch.cuda.is_available()
import decode  # noqa: E402
import sample  # noqa: E402
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, LayerNorm, attention_reference  # noqa: E402
from sample import StaticCache  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
HALF, ROUNDING = (torch.bfloat16, 2**-8) if CUDA else (torch.float16, 2**-10)  # the interpreter truncates to bfloat16, a GPU rounds
ARMS = [
    {},
    {"diffusion": True},
    {"diffusion": True, "diffusion_alpha": 0.5, "diffusion_lambda": 1.5},
    {"diffusion": True, "diffusion_heads": (1,), "diffusion_lambda": 0.5},
    {"diffusion": True, "diffusion_heads": (0, 2), "diffusion_alpha": 2.0},
]


def close(ours, reference, relative: float, absolute: float):
    error = (ours.double() - reference.double()).abs()
    assert (error <= relative * reference.double().abs() + absolute).all(), float(error.max())


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("B", "d", "dtype"), [(1, 64, HALF), (3, 64, torch.float32), (1, 16, HALF), (2, 48, torch.float32)])
@torch.no_grad()
def test_attention_is_that_of_the_stored_matrix_and_the_cache_holds_the_token(arm, B, d, dtype):
    torch.manual_seed(0)
    H, S = 3, 520  # a block is 64, 128 or 512 keys here
    layer = CausalSelfAttention(GPTConfig(block_size=S, n_layer=2, n_head=H, n_embd=H * d, **arm), 1)
    past = torch.randn(2, B, H, S, d, device=DEVICE).to(dtype)
    for position in (0, 1, 63, 64, 65, 128, 129, 256, 257, 512, S - 1):
        qkv = torch.randn(B, 3 * H * d, device=DEVICE).to(dtype)
        qkv[:, : H * d] *= 1 if position % 2 else 8  # scores up to 8 and up to 60
        entries = past.clone()
        entries[:, :, :, position:] = math.nan  # neither the token's own place nor later ones are read
        y = decode.attend(qkv, entries, torch.tensor([position], device=DEVICE), layer)
        q, k, v = qkv.view(B, 3, H, 1, d).unbind(1)
        assert torch.equal(entries[0, :, :, position], k[:, :, 0]) and torch.equal(entries[1, :, :, position], v[:, :, 0])
        assert torch.equal(entries[:, :, :, :position], past[:, :, :, :position]) and entries[:, :, :, position + 1 :].isnan().all()
        keys, values = (torch.cat((old[:, :, :position], new), dim=2).double() for old, new in zip(past, (k, v), strict=True))
        queries = torch.cat((torch.zeros_like(keys[:, :, 1:]), q.double()), dim=2)  # the last row is the token's
        reference = attention_reference(queries, keys, values, True, "diffusion" in arm, layer.alpha, layer.lam, layer.diffusing_heads)[:, :, -1]
        close(y, reference.flatten(1), 1e-5 if dtype == torch.float32 else ROUNDING, 2e-5)


@pytest.mark.parametrize(("B", "K", "N"), [(1, 24, 2061), (3, 96, 7), (1, 768, 21), (2, 1500, 9)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("gelu", "added"), [(False, False), (True, False), (False, True)])
@torch.no_grad()
def test_linear_layers_with_what_stands_beside_them(B, K, N, bias, norm, gelu, added):
    torch.manual_seed(0)
    layer, before = torch.nn.Linear(K, N, bias, device=DEVICE), LayerNorm(K, bias).to(DEVICE)
    for parameter in before.parameters():
        torch.nn.init.normal_(parameter)
    x, stream = torch.randn(B, K, device=DEVICE) + 3, torch.randn(B, N, device=DEVICE) if added else None
    for dtype, relative in ((torch.float32, 1e-5), (HALF, ROUNDING)):
        x, layer, before = x.to(dtype), layer.to(dtype), before.to(dtype)
        y = decode.linear(x, layer, before if norm else None, gelu, stream)
        assert y.dtype == (torch.float32 if added else dtype)
        exact, weight, gain = x.double(), layer.weight.double(), before.weight.double()
        offset, shift = (layer.bias.double(), before.bias.double()) if bias else (None, None)
        exact = F.linear(F.layer_norm(exact, (K,), gain, shift, 1e-5) if norm else exact, weight, offset)
        exact = F.gelu(exact) if gelu else exact
        close(y, exact + stream.double() if added else exact, 1e-5 if added else relative, 2e-5)


def random_model(dtype=torch.float32, **changes) -> GPT:
    """Weights large enough that every token of the context matters."""
    model, generator = (
        GPT(GPTConfig(**{"block_size": 7, "vocab_size": 20, "n_layer": 2, "n_head": 3, "n_embd": 12} | changes)),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(DEVICE, dtype).eval()


def read_on(model, ids, prompt: int, step=decode.read_token):
    """Logits (B, T - prompt, vocab_size) of the tokens of ids (B, T) after the first `prompt`, read one by one, and the cache."""
    weight = model.transformer.wte.weight
    cache = StaticCache(model.config, len(ids), weight.device, weight.dtype)
    cache.entries.fill_(7.0)  # left by whatever was read before
    if prompt:
        model(ids[:, :prompt], cache=cache)
    rows = []
    for i in range(prompt, ids.size(1)):
        cache.position.fill_(i)
        rows.append(step(model, ids[:, i : i + 1], cache))
        assert (int(cache.position), cache.length) == (i, prompt), "the caller moves them"
    return torch.stack(rows, dim=1), cache


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("bias", "B", "prompt", "T"), [(True, 1, 4, 7), (False, 1, 4, 7), (True, 2, 0, 4)])
@torch.no_grad()
def test_a_token_read_by_the_kernels_is_the_models(arm, bias, B, prompt, T):
    torch.set_float32_matmul_precision("highest")
    model = random_model(bias=bias, **arm)
    ids = torch.randint(20, (B, T), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    ours, cache = read_on(model, ids, prompt)
    exact = random_model(torch.float64, bias=bias, **arm)
    for i in range(prompt, T):
        close(ours[:, i - prompt], exact(ids[:, : i + 1])[0][:, 0], 1e-5, 1e-5)
    plain = KVCache(model.config, B, ids.device, torch.float32)
    model(ids, cache=plain)
    close(cache.entries[..., :T, :], plain.entries[..., :T, :], 1e-5, 1e-5)


@pytest.mark.parametrize("arm", ARMS[:2])
@torch.no_grad()
def test_in_half_precision_the_kernels_are_nearer_to_the_exact_logits_than_the_model(arm):
    model, ids = random_model(HALF, bias=True, **arm), torch.arange(7, device=DEVICE)[None] * 2
    ours, _ = read_on(model, ids, 4)
    plain, _ = read_on(model, ids, 4, lambda model, token, cache: sample.one_token_of_model(model, token, cache))
    exact = torch.stack([model.double()(ids[:, : i + 1])[0][:, 0] for i in range(4, 7)], dim=1)  # the same rounded weights
    errors = [(logits.double() - exact).square().mean() for logits in (ours, plain)]
    assert errors[0] < errors[1] and ours.dtype == HALF


@torch.no_grad()
def test_only_models_that_the_kernels_know_are_read_by_them(monkeypatch):
    monkeypatch.setattr(decode, "read_token", lambda model, token, cache: None)

    def by_kernels(dtype=torch.float32, **changes):
        model = random_model(dtype, **changes)
        return read_one(model) is None

    def read_one(model):
        cache, token = StaticCache(model.config, 1, DEVICE, model.lm_head.weight.dtype), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        return sample.one_token(model)(model, token, cache)

    assert by_kernels() and by_kernels(diffusion=True, bias=True) and by_kernels(HALF)
    assert not by_kernels(torch.float64)
    for variant in ({"attention_kernel": "rbf"}, {"attention_kernel": "student_t"}, {"attention_kernel": "softmax1"}, {"head_combine": "product"}):
        assert not by_kernels(**variant)
    assert not by_kernels(diffusion=True, diffusion_learned=True)
    monkeypatch.setitem(sys.modules, "decode", None)  # no Triton
    assert not by_kernels()
