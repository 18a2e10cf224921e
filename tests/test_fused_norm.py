"""Linear layers that end in the addition and LayerNorm: the kernels against float64 on a Hopper GPU, joined blocks also elsewhere."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
from test_fused import DEVICE, close, normalised  # noqa: E402
from test_fused_products import HOPPER, dtypes, needs_hopper, on_both, slope  # noqa: E402

import dropout  # noqa: E402
import fused  # noqa: E402
import fused_norm  # noqa: E402
from model import GPT, GPTConfig, ViT, ViTConfig  # noqa: E402

C = fused_norm.CHANNELS
# whole tiles; an inner dimension of less than a step, of a step and a bit, of fewer steps than pieces; several tiles a program; few rows, one row
shapes = pytest.mark.parametrize("N, K", [(256, 384), (130, 8), (300, 40), (20000, 200), (1000, 1152), (7, 1536), (1, 64)])
drops = pytest.mark.parametrize("p", [0.0, 0.3])


def draw(N, K, dtype, p):
    torch.manual_seed(0)
    a, weight = torch.randn(N, K, device=DEVICE).to(dtype), (torch.randn(C, K, device=DEVICE) / K**0.5).to(dtype)
    x, gain = torch.randn(N, C, device=DEVICE), 1 + torch.randn(C, device=DEVICE)
    seed = torch.tensor([2**40 + 3], device=DEVICE) if p else None
    kept = dropout.kept(seed, 5, p, N, C) if p else torch.ones(N, C, dtype=torch.bool, device=DEVICE)
    return a, weight, x, gain, seed, kept.double() / (1 - p)


@needs_hopper
@dtypes
@drops
@shapes
def test_addition_and_norm_inside(N, K, p, dtype, rounding):
    a, weight, x, gain, seed, kept = draw(N, K, dtype, p)
    out, y, mean, rstd = fused_norm.add_norm_of(a, weight, x, gain, seed, 5, p)
    assert out.dtype == torch.float32 and y.dtype == dtype and out.shape == y.shape == (N, C)
    branch = a.double() @ weight.double().t() * kept
    close(out, x.double() + branch, 2e-6, rounding * float(branch.abs().max()))  # the branch is rounded, the stream is not
    normal, scale = normalised(out.double())
    close(y, normal * gain.double(), rounding, 1e-5)
    close(mean, out.double().mean(dim=1), 1e-5, 1e-6)
    close(rstd, scale[:, 0], 1e-5, 1e-6)
    apart = fused_norm.add_norm(x, a @ weight.t(), seed, 5, p, gain, None)
    assert torch.equal(out == x, apart[0] == x), "the same decisions as in the pass"
    again = fused_norm.add_norm_of(a, weight, x, gain, seed, 5, p)
    assert all(torch.equal(one, other) for one, other in zip((out, y, mean, rstd), again))


@needs_hopper
@dtypes
@shapes
@pytest.mark.parametrize("transposed", [False, True])
def test_product_without_such_an_end(N, K, transposed, dtype, rounding):
    a, weight, *_ = draw(N, K, dtype, 0.0)
    given = weight if transposed else weight.t().contiguous()
    ours = fused_norm.product_of(a, given, transposed)
    assert ours.shape == (N, C) and ours.dtype == dtype
    close(ours, a.double() @ weight.double().t(), rounding, 2e-5)
    assert torch.equal(ours, fused_norm.product_of(a, given, transposed))


def product_of(a, weight, transposed=False):
    return a @ (weight.t() if transposed else weight)


def add_norm_of(a, weight, x, gain, seed, site, p):
    """By torch and fused.py's pass."""
    return fused_norm.add_norm(x, a @ weight.t(), seed, site, p, gain, None)


def linear_gelu(x, weight, keep):
    h = x @ weight.t()
    return F.gelu(h), slope(h).to(x.dtype) if keep else x.new_empty(0)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(fused, "add_norm_of", add_norm_of)
    monkeypatch.setattr(fused, "product_of", product_of)
    monkeypatch.setattr(fused, "linear_gelu", linear_gelu)
    monkeypatch.setattr(fused, "linear_gelu_backward", lambda dy, weight, kept: (dy @ weight) * kept)


def gpt(**changes):
    return GPT(GPTConfig(**{"block_size": 16, "vocab_size": 11, "n_layer": 3, "n_head": 6, "n_embd": C, "dropout": 0.2} | changes))


def vit(**changes):
    return ViT(ViTConfig(**{"image_size": 8, "patch_size": 2, "n_layer": 2, "n_head": 6, "n_embd": C, "n_classes": 5, "dropout": 0.2} | changes))


@pytest.mark.parametrize("make", [gpt, vit])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.0}, {"diffusion": True, "diffusion_heads": (2,)}])
@on_both
def test_joined_blocks_are_the_same_network(request, monkeypatch, make, changes, on_gpu):
    """Loss and gradients of every parameter, joined and one block after the other."""
    if not on_gpu:
        request.getfixturevalue("plain")
    torch.manual_seed(1)
    network, dtype = make(**changes).to(DEVICE), torch.bfloat16 if on_gpu else torch.float32
    inputs = torch.randint(11, (3, 16)) if make is gpt else torch.randn(3, 3, 8, 8)
    inputs, targets = inputs.to(DEVICE), torch.randint(5, (3, 16) if make is gpt else (3,), device=DEVICE)
    fused.accelerate(network, dtype)
    assert network.joins is on_gpu
    calls, ends, losses, gradients = [], [], [], []
    kept, product = fused.add_norm_of, fused.product_of
    monkeypatch.setattr(fused, "add_norm_of", lambda *given: calls.append(1) or kept(*given))
    monkeypatch.setattr(fused, "product_of", lambda *given: ends.extend(given[2:]) or product(*given))
    for joins in (True, False):
        network.joins = joins
        network.zero_grad()
        torch.manual_seed(2)  # the same decisions of dropout
        with torch.autocast(DEVICE, torch.bfloat16, enabled=on_gpu):
            loss = network(inputs, targets)[1]
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert len(calls) == 2 * len(network.transformer.h) - 1 and ends == [True], "the last block's end is a product without LayerNorm"
    tolerance = 2**-6 if on_gpu else 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for ours, other in zip(*gradients):
        close(ours, other, tolerance, tolerance * float(other.abs().max()))


@pytest.mark.parametrize("joins", [True, False])
@on_both
def test_without_gradients_and_with_taps(request, monkeypatch, joins, on_gpu):
    """An evaluation is the same either way; with taps the blocks go one after the other, as the taps stand between them."""
    if not on_gpu:
        request.getfixturevalue("plain")
    torch.manual_seed(1)
    network, idx = gpt(dropout=0.0).to(DEVICE), torch.randint(11, (2, 16), device=DEVICE)
    with torch.no_grad():
        expected = network(idx, idx)[1].item()
        fused.accelerate(network, torch.bfloat16 if on_gpu else torch.float32)
        network.joins, taps, kept = joins, [], []
        former = fused.linear_gelu
        monkeypatch.setattr(fused, "linear_gelu", lambda x, weight, keep: kept.append(keep) or former(x, weight, keep))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=on_gpu):
            assert network(idx, idx)[1].item() == pytest.approx(expected, rel=2e-2 if on_gpu else 1e-5)
            assert network(idx, idx, taps=taps)[1].item() == pytest.approx(expected, rel=2e-2 if on_gpu else 1e-5)
    assert len(taps) == 3 and not any(kept) and len(kept) == 3 * (joins + on_gpu * (2 - joins)), "nothing is kept for a way back"


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"n_embd": 192}])
@on_both
def test_who_joins(monkeypatch, changes, on_gpu):
    """No other width, no bias; not where each block is called by itself, nor where weights have no casts. Elsewhere than on a Hopper GPU one is
    pretended."""
    if not on_gpu:
        network = gpt(n_layer=1).to(DEVICE)
        fused.accelerate(network, torch.bfloat16)
        assert network.joins is False
        monkeypatch.setattr(fused_norm, "applies", lambda half, *biases: len(half) == C and all(bias is None for bias in biases))
        monkeypatch.setattr(fused.fused_products, "applies", lambda half, bias: bias is None)
    for options in ({}, {"whole": False}, {"shadows": False}):
        network = gpt(n_layer=1, **changes).to(DEVICE)
        fused.accelerate(network, torch.bfloat16, **options)
        assert network.joins is (not options and not changes)


@pytest.mark.skipif(HOPPER, reason="for elsewhere")
def test_the_compiler_takes_joined_blocks(plain, monkeypatch):
    """The slope as a byte, results without a gradient and one with that of another: equal to eager's to the bit."""

    def with_bytes(x, weight, keep):
        h = x @ weight.t()
        derivative = (1 + torch.erf(h / 2**0.5)) / 2 + h * torch.exp(-h * h / 2) / (2 * torch.pi) ** 0.5
        return F.gelu(h), (derivative * 200 + 26).round().byte()

    monkeypatch.setattr(fused, "linear_gelu", with_bytes)
    monkeypatch.setattr(fused, "linear_gelu_backward", lambda dy, weight, kept: (dy @ weight) * ((kept.to(dy.dtype) - 26) / 200))
    torch.manual_seed(1)
    network = gpt(n_layer=2)
    fused.accelerate(network, torch.float32)
    network.joins, idx, found = True, torch.randint(11, (2, 16)), []
    for run in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        network.zero_grad()
        loss = run(idx, idx)[1]
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in network.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_blocks_called_by_themselves_are_compiled_once_for_all_layers():
    """As with several GPUs: the first one, which has no branch to add, and the others."""
    torch._dynamo.reset()
    network, counter = gpt(n_layer=4, n_embd=48, n_head=3, dropout=0.0).to(DEVICE), torch._dynamo.testing.CompileCounter()
    fused.accelerate(network, torch.bfloat16, whole=False)
    for block in network.transformer.h:
        block.compile(backend=counter, dynamic=False)
    idx = torch.randint(11, (2, 16), device=DEVICE)
    network(idx, idx)[1].backward()
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "capability, wrong, expected, note",
    [((9, 0), 1, True, None), ((8, 0), 1, False, None), ((9, 0), 1.1, False, "its results are wrong"), ((9, 0), "no", False, "new Gluon")],
)
@pytest.mark.parametrize("which", ["_add_norm_of", "_product_of", "_product_of, transposed"])
def test_kernels_that_fail_or_are_wrong_are_not_used(monkeypatch, capsys, capability, wrong, expected, note, which):
    """A Hopper GPU is pretended, on which the kernels are right, wrong, or not compiled."""

    def spoiled(function, wrong, transposed=None):
        def call(*given, most):
            if wrong == "no" and transposed in (None, given[2]):
                raise RuntimeError("new Gluon")
            results = function(*given)
            if isinstance(results, tuple):
                return results[0], results[1] * wrong, *results[2:]
            return results * wrong if transposed == given[2] else results

        return call

    for name, function in {"_add_norm_of": add_norm_of, "_product_of": product_of}.items():
        factor = wrong if which.startswith(name) else 1
        monkeypatch.setattr(fused_norm, name, spoiled(function, factor, "transposed" in which if name == "_product_of" else None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fused_norm._works.__wrapped__(torch.device(DEVICE), torch.bfloat16) is expected
    out = capsys.readouterr().out
    assert out == "" if note is None else note in out and "linear layers that end in LayerNorm are not used" in out


@needs_hopper
@drops
def test_the_compiler_is_told_the_truth_about_shapes_and_strides(p):
    a, weight, x, gain, seed, _ = draw(24, 40, torch.bfloat16, p)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused_norm.add_norm_of, (a, weight, x, gain, seed, 1, p), test_utils=checks)
    for given in ((weight.t().contiguous(),), (weight, True)):
        torch.library.opcheck(fused_norm.product_of, (a, *given), test_utils=checks)
