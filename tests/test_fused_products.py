"""The MLP with GELU inside its products: the kernels against float64 on a Hopper GPU, what calls them also where there is none."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

CUDA = torch.cuda.is_available()
from test_fused import DEVICE, close  # noqa: E402

import fused  # noqa: E402
import fused_attention  # noqa: E402
import fused_products  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: Triton's interpreter knows no Gluon")
on_both = pytest.mark.parametrize(
    "on_gpu", [pytest.param(False, marks=pytest.mark.skipif(HOPPER, reason="for elsewhere")), pytest.param(True, marks=needs_hopper)]
)
dtypes = pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
# whole tiles; many for a multiprocessor; edges in rows, columns and the inner dimension; fewer rows than a tile, one row
shapes = pytest.mark.parametrize("N, C, M", [(256, 64, 256), (9000, 384, 1536), (200, 72, 264), (71, 40, 136), (5, 16, 64), (1, 8, 8)])


def draw(N, C, M, dtype=torch.float32):
    torch.manual_seed(0)
    x, up, down = 2 * torch.randn(N, C), torch.randn(M, C) / C**0.5, torch.randn(C, M) / M**0.5
    return x.to(DEVICE, dtype), up.to(DEVICE, dtype), down.to(DEVICE, dtype)


def slope(h):
    """Derivative of the exact GELU in float64."""
    with torch.enable_grad():
        h = h.detach().double().requires_grad_()
        return torch.autograd.grad(F.gelu(h).sum(), h)[0]


def plain_product(x, right):
    """x right, rounded to x's dtype, by the same kernel without an end."""
    from fused_products_hopper import product

    out = torch.empty(len(x), right.size(1), dtype=x.dtype, device=x.device)
    product([x], right.contiguous(), out)
    return out


@needs_hopper
@dtypes
@shapes
def test_product_and_gelu(N, C, M, dtype, rounding):
    x, up, _ = draw(N, C, M, dtype)
    g, kept = fused_products.linear_gelu(x, up, True)
    assert kept.shape == g.shape == (N, M) and g.dtype == dtype and kept.dtype == torch.uint8
    h = plain_product(x, up.t())
    close(h, x.double() @ up.double().t(), rounding, 2e-5)  # beside the rounding of the result, that of a sum in float32
    assert torch.equal(g, fused_products.gelu(h))
    close(fused_products.slope_of(kept), slope(h), 0, 0.0025 + 1e-6)  # half a step, and the formula's error
    alone, nothing = fused_products.linear_gelu(x, up, False)
    assert torch.equal(alone, g) and nothing.numel() == 0


@needs_hopper
@dtypes
@shapes
def test_product_times_the_derivative(N, C, M, dtype, rounding):
    dy, _, down = draw(N, C, M, dtype)
    kept = torch.randint(253, (N, M), device=DEVICE, dtype=torch.uint8)
    known = (kept.double() - 26) / 200
    ours = fused_products.linear_gelu_backward(dy, down, kept)
    assert ours.shape == kept.shape and ours.dtype == dtype
    close(ours, dy.double() @ down.double() * known, 2 * rounding, 2e-5)  # rounded as a product, and once more
    assert torch.equal(ours, (plain_product(dy, down).float() * fused_products.slope_of(kept)).to(dtype))


@triton.jit
def _there_and_back(x_ptr, byte_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, slope = fused_products.value_and_slope(tl.load(x_ptr + i, mask=i < n, other=0.0))
    byte = fused_products.to_byte(slope)
    tl.store(byte_ptr + i, byte, mask=i < n)
    tl.store(y_ptr + i, fused_products.from_byte(byte), mask=i < n)


def test_the_derivative_as_a_byte():
    """Nearest of the steps; all of the derivative's range is there, and 0 and 1 exactly."""
    h = torch.cat((torch.linspace(-6, 6, 20001), torch.tensor([-30.0, 30.0]))).to(DEVICE)
    byte, back = torch.empty_like(h, dtype=torch.uint8), torch.empty_like(h)
    _there_and_back[(triton.cdiv(len(h), 1024),)](h, byte, back, len(h), BLOCK=1024)
    close(back, slope(h), 0, 0.0025 + 1e-6)
    assert torch.equal(back, fused_products.slope_of(byte)) and back[-2:].tolist() == [0.0, 1.0]
    assert byte.min() == 0 and byte.max() == 252


@pytest.fixture
def plain(monkeypatch):
    """The two operators by plain torch, in the dtype of their arguments."""
    monkeypatch.setattr(fused, "linear_gelu", lambda x, weight, keep: (F.gelu(x @ weight.t()), slope(x @ weight.t()).to(x.dtype)))
    monkeypatch.setattr(fused, "linear_gelu_backward", lambda dy, weight, kept: (dy @ weight) * kept)


def test_gradients_go_where_they_belong(plain):
    x, up, down = (t.requires_grad_() for t in draw(30, 24, 96))
    dy = torch.randn_like(x)
    fused._MLP.apply(x, up, up.detach().clone(), down, down.detach().clone(), True).backward(dy)
    exact = [t.detach().double().requires_grad_() for t in (x, up, down)]
    (F.gelu(exact[0] @ exact[1].t()) @ exact[2].t()).backward(dy.double())
    for ours, reference in zip((x, up, down), exact):
        close(ours.grad, reference.grad, 1e-4, 1e-5)


@needs_hopper
@dtypes
def test_gradients_on_the_gpu(dtype, rounding):
    """Those that float64 has with a rounded h, up to the rounding of the results and of what they are made of."""
    x, up, down = draw(700, 48, 192)
    dy = torch.randn(700, 48, device=DEVICE).to(dtype)
    flat, up_half, down_half = x.to(dtype).requires_grad_(), up.to(dtype), down.to(dtype)
    y = fused._MLP.apply(flat, up.requires_grad_(), up_half, down.requires_grad_(), down_half, True)
    y.backward(dy)
    h = (flat.detach().double() @ up_half.double().t()).to(dtype).double()
    g, dh = F.gelu(h), (dy.double() @ down_half.double()) * (slope(h) * 200).round() / 200
    pairs = [
        (y, g @ down_half.double().t()),
        (flat.grad, dh @ up_half.double()),
        (up.grad, dh.t() @ flat.detach().double()),
        (down.grad, dy.double().t() @ g),
    ]
    for ours, reference in pairs:
        close(ours, reference, 2 * rounding, 2 * rounding * float(reference.abs().max()))


@needs_hopper
@dtypes
@shapes
def test_product_of_three(N, C, M, dtype, rounding):
    parts = [draw(N, C, M, dtype)[0] * scale for scale in (1, 0.5, -2)]
    weight = torch.randn(3 * C, M, device=DEVICE).to(dtype)
    ours = fused_products.product_of_three(*parts, weight)
    assert ours.shape == (N, M) and ours.dtype == dtype
    reference = torch.cat(parts, dim=1).double() @ weight.double()
    close(ours, reference, rounding, 2e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("alpha, lam, heads", [(1.0, 1.0, 0), (1.0, 1.0, 3), (0.5, 1.5, 2)])
@on_both
def test_a_projection_whose_gradients_are_not_gathered(monkeypatch, alpha, lam, heads, on_gpu):
    """Queries, keys and values of both ways into the same attention and diffusion, and the gradients of float64."""
    if not on_gpu:
        monkeypatch.setattr(fused, "product_of_three", lambda a, b, c, weight: torch.cat((a, b, c), dim=1) @ weight)
    torch.manual_seed(1)
    dtype, B, T, H, C = (torch.bfloat16, 2, 70, 3, 96) if on_gpu else (torch.float32, 2, 7, 3, 12)
    weight, given = torch.randn(3 * C, C, device=DEVICE) / C**0.5, torch.randn(B, T, C, device=DEVICE)
    half, x, dy = weight.to(dtype), given.to(dtype), torch.randn(B, H, T, C // H, device=DEVICE).to(dtype)

    def attention(q, k, v, w):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.cat((y[:, : H - heads], lam * (y - alpha * w)[:, H - heads :]), dim=1)

    x.requires_grad_()
    weight.requires_grad_()
    q, k, v, *again = fused._Project.apply(x, weight, half, H, alpha * lam, heads)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = fused._Subtract.apply(y, *again, alpha, lam, heads) if heads else y
    y.backward(dy)
    exact = [t.detach().double().requires_grad_() for t in (x, half)]
    q, k, v = fused._heads(exact[0] @ exact[1].t(), H)
    reference = attention(q, k, v, v)
    reference.backward(dy.double())
    tolerance = 0.03 if on_gpu else 1e-5
    for ours, theirs in ((y, reference), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        close(ours, theirs, tolerance, tolerance * float(theirs.detach().abs().max()))


def small(**changes):
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 16} | changes))


@pytest.mark.parametrize("changes, dtype", [({}, torch.float32), ({"bias": True}, torch.bfloat16), ({"n_embd": 12}, torch.bfloat16)])
def test_other_layers_keep_gelu_apart(changes, dtype):
    """No float32, no bias, no row that TMA does not take; on any device."""
    network = small(**changes).to(DEVICE)
    fused.accelerate(network, dtype)
    assert network.transformer.h[0].mlp.inside is False


@pytest.mark.skipif(HOPPER, reason="this GPU has it")
def test_only_hopper_has_it():
    network = small().to(DEVICE)
    fused.accelerate(network, torch.bfloat16)
    assert network.transformer.h[0].mlp.inside is False


@pytest.mark.parametrize(
    "capability, wrong, wrong_of_three, expected, note",
    [
        ((9, 0), None, 1, True, None),
        ((8, 0), None, 1, False, None),
        ((9, 0), 1.5, 1, False, "its results are wrong"),
        ((9, 0), None, 1.5, False, "its results are wrong"),
        ((9, 0), "new Gluon", 1, False, "new Gluon"),
    ],
)
def test_products_that_fail_or_are_wrong_are_not_used(plain, monkeypatch, capsys, capability, wrong, wrong_of_three, expected, note):
    """A Hopper GPU is pretended, on which the products are right, wrong, or not compiled."""

    def product(x, weight, keep):
        if isinstance(wrong, str):
            raise RuntimeError(wrong)
        h = x @ weight.t() * (wrong or 1)
        return fused_products.gelu(h), (slope(h) * 200 + 26).round().to(torch.uint8)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fused_products, "linear_gelu", product)
    monkeypatch.setattr(fused_products, "linear_gelu_backward", lambda dy, weight, kept: (dy @ weight) * fused_products.slope_of(kept).to(dy.dtype))
    monkeypatch.setattr(fused_products, "product_of_three", lambda a, b, c, weight: torch.cat((a, b, c), dim=1) @ weight * wrong_of_three)
    assert fused_products._works.__wrapped__(torch.device(DEVICE), torch.bfloat16) is expected
    out = capsys.readouterr().out
    assert out == "" if note is None else note in out and "the products with more in them are not used" in out


@needs_hopper
def test_a_network_has_gelu_inside_its_products(monkeypatch):
    network, calls = small().to(DEVICE), []
    fused.accelerate(network, torch.bfloat16)
    kept = fused.linear_gelu
    monkeypatch.setattr(fused, "linear_gelu", lambda x, weight, keep: calls.append(keep) or kept(x, weight, keep))
    idx = torch.zeros(1, 8, dtype=torch.int64, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        network(idx, idx)[1].backward()
        with torch.no_grad():
            network(idx, idx)
    assert calls == [True, False]


@pytest.mark.parametrize("arm, heads", [({}, 0), ({"diffusion": True}, 2), ({"diffusion": True, "diffusion_heads": (1,), "diffusion_alpha": 0.5}, 1)])
@on_both
def test_a_network_takes_gradients_ungathered(monkeypatch, arm, heads, on_gpu):
    """Where attention is the framework's, in A, A - I and half of the heads; the gradients are those of the gathering passes up to the rounding."""
    torch.manual_seed(2)
    monkeypatch.setattr(fused_attention, "LONGEST", 0)
    network, calls = small(block_size=24, n_embd=32, **arm).to(DEVICE), []
    fused.accelerate(network, torch.bfloat16 if on_gpu else torch.float32)
    if not on_gpu:
        monkeypatch.setattr(fused, "product_of_three", lambda a, b, c, weight: torch.cat((a, b, c), dim=1) @ weight)
    assert network.transformer.h[0].attn.diffusing_heads == heads and network.transformer.h[0].attn.ungathered is on_gpu
    kept = fused.product_of_three
    monkeypatch.setattr(fused, "product_of_three", lambda *parts: calls.append(len(parts)) or kept(*parts))
    idx, gradients = torch.randint(11, (3, 24), device=DEVICE), []
    for ungathered in (True, False):
        network.transformer.h[0].attn.ungathered = ungathered
        network.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=on_gpu):
            network(idx, idx)[1].backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert calls == [4]
    network.transformer.h[0].attn.ungathered, taps = True, []
    with torch.autocast(DEVICE, torch.bfloat16, enabled=on_gpu):
        network(idx, idx, taps=taps)[1].backward()
    assert calls == [4] and [part.shape for part in taps[0]] == [(3, 2, 24, 16)] * 3, "with taps, whose gradients a pass adds, they are gathered"
    for ours, gathered in zip(*gradients):
        close(ours, gathered, 2**-6, 2**-6 * float(gathered.abs().max()))


@needs_hopper
def test_the_compiler_is_told_the_truth_about_shapes_and_strides():
    x, up, down = draw(6, 16, 64, torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    for keep in (True, False):
        torch.library.opcheck(fused_products.linear_gelu, (x, up, keep), test_utils=checks)
    torch.library.opcheck(fused_products.linear_gelu_backward, (x, down, torch.zeros(6, 64, device=DEVICE, dtype=torch.uint8)), test_utils=checks)
    torch.library.opcheck(fused_products.product_of_three, (x, x, x, torch.randn(48, 24, device=DEVICE).to(x.dtype)), test_utils=checks)
