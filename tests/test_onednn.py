"""onednn.Linear against float64 and against nn.Linear."""

import pytest
import torch

import onednn
from model import GPT, GPTConfig, attention_reference

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this processor or torch build has no use for onednn.py")


@pytest.mark.parametrize("shape", [(3, 5, 7), (12, 64, 128), (2, 1, 16), (40, 33)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_forward_and_gradients_equal_float64(monkeypatch, shape, bias, wide):
    monkeypatch.setattr(onednn, "FULL_WIDTH", wide)
    torch.manual_seed(0)
    layer = onednn.Linear(shape[-1], 65, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 65)
    (layer(x) * upstream).sum().backward()

    x64, w64 = x.detach().double(), layer.weight.detach().double()
    y64 = x64 @ w64.t() + (layer.bias.detach().double() if bias else 0)
    grad_x = upstream.double() @ w64
    grad_w = torch.einsum("...n,...k->nk", upstream.double(), x64)
    scale = shape[-1] ** 0.5 * 1e-6  # float32 rounding of a sum of K products
    assert (layer(x).double() - y64).abs().max() < 10 * scale
    assert (x.grad.double() - grad_x).abs().max() < 65**0.5 * 1e-5
    assert (layer.weight.grad.double() - grad_w).abs().max() < x[..., 0].numel() ** 0.5 * 1e-5
    if bias:
        torch.testing.assert_close(layer.bias.grad, upstream.flatten(0, -2).sum(0))


@pytest.mark.parametrize(
    ("vendor", "family", "wide"), [("AuthenticAMD", 25, False), ("AuthenticAMD", 26, True), ("GenuineIntel", 26, False), ("GenuineIntel", 6, False)]
)
def test_processors_of_full_width_are_known_by_name(vendor, family, wide):
    described = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\nmodel name\t: some family : 99\n"
    assert onednn.full_width(described) == wide
    assert not onednn.full_width("") and not onednn.full_width("AuthenticAMD")


def test_accelerate_keeps_parameters_and_names_and_other_dtypes_fall_through():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 2, bias=False))
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    onednn.accelerate(model)
    assert [type(module) for module in model] == [onednn.Linear, torch.nn.GELU, onednn.Linear]
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    model, x = model.double(), x.double()
    hidden = torch.nn.functional.gelu(x @ model[0].weight.t() + model[0].bias)
    torch.testing.assert_close(model(x), hidden @ model[2].weight.t(), rtol=1e-12, atol=1e-12)  # float64 stays float64


@pytest.mark.parametrize("diffusion", [False, True])
def test_attention_in_bfloat16_is_that_of_float32_rounded(diffusion):
    config = GPTConfig(block_size=12, vocab_size=20, n_layer=1, n_head=2, n_embd=16, diffusion=diffusion)
    attention = GPT(config).transformer.h[0].attn
    parts = [torch.randn(2, 2, 12, 8).bfloat16().requires_grad_() for _ in range(3)]
    attention.__class__ = onednn.Attention
    y = attention.per_head(parts[0], parts[2], parts[1], parts[2], None, True)
    exact = [part.detach().double().requires_grad_() for part in parts]
    reference = attention_reference(*exact, True, diffusion, heads=attention.diffusing_heads)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), reference, rtol=2**-7, atol=2**-7)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    reference.backward(upstream.double())
    for ours, theirs in zip(parts, exact):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2**-7, atol=2**-7 * float(theirs.grad.abs().max()))


def test_a_model_in_float64_stays_in_float64():
    model, plain = (GPT(GPTConfig(block_size=12, vocab_size=20, n_layer=1, n_head=2, n_embd=16)).double() for _ in range(2))
    onednn.accelerate(model)
    idx = torch.arange(10)[None]
    torch.testing.assert_close(model(idx, idx)[0], plain(idx, idx)[0], rtol=0, atol=1e-13)
