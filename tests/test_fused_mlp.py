"""trials/fused_mlp.py against float64: on a GPU where there is one, else in Triton's interpreter on the CPU (conftest.py)."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
CUDA = torch.cuda.is_available()
from test_fused import DEVICE, close  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[1] / "trials"))

import fused  # noqa: E402
import fused_mlp  # noqa: E402

# the interpreter truncates to bfloat16, a GPU rounds; a result between two numbers is off by half their distance, and h may round the other way
DTYPE, ROUNDING = (torch.bfloat16, 2**-8) if CUDA else (torch.float16, 2**-10)
SMALL = {"ROWS": 32, "COLUMNS": 64, "INNER": 16, "num_warps": 4, "num_stages": 3}
FORMS = {
    "whole tiles": {**SMALL, "PIECES": 1, "PER": 0},
    "halves": {**SMALL, "PIECES": 2, "PER": 0},
    "quarters, several tiles a program": {**SMALL, "PIECES": 4, "PER": 1},
    "128 x 128": fused_mlp.FORWARD,
    "flattened": {**fused_mlp.FORWARD, "PER": 2, "FLATTEN": True},
    "pointers": SMALL,
    "warps apart": {"WARPS": "apart"},
}
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
only = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: the interpreter knows no Gluon")
forms = pytest.mark.parametrize("form", [pytest.param(form, id=name, marks=only if "WARPS" in form else ()) for name, form in FORMS.items()])
# whole tiles; edges in rows, columns and the inner dimension; rows too odd for TMA; fewer rows than a tile
shapes = pytest.mark.parametrize("N, C, M", [(256, 64, 256), (200, 72, 264), (71, 40, 136), (37, 27, 101), (5, 16, 64)])


def draw(N, C, M):
    torch.manual_seed(0)
    x, up, down = torch.randn(N, C), torch.randn(M, C) / C**0.5, torch.randn(C, M) / M**0.5
    return (2 * x).to(DEVICE, DTYPE), up.to(DEVICE, DTYPE), down.to(DEVICE, DTYPE), torch.randn(M, device=DEVICE)


def slope(h):
    """Derivative of the exact GELU in float64."""
    h = h.detach().double().requires_grad_()
    return torch.autograd.grad(F.gelu(h).sum(), h)[0]


@forms
@shapes
@pytest.mark.parametrize("biased", [False, True])
def test_product_and_gelu(monkeypatch, form, N, C, M, biased):
    monkeypatch.setattr(fused_mlp, "FORWARD", form)
    x, up, _, bias = draw(N, C, M)
    if "WARPS" in form and (biased or C % 8):
        pytest.skip("by the other kernels")
    h, g = fused_mlp.linear_gelu(x, up, bias if biased else None)
    exact = x.double() @ up.double().t() + (bias.double() if biased else 0)
    assert h.shape == g.shape == (N, M) and h.dtype == g.dtype == DTYPE
    close(h, exact, ROUNDING, 2e-5)  # beside the rounding of the result, that of a sum in float32
    assert torch.equal(g, fused.gelu(h))


@forms
@shapes
def test_product_times_the_derivative(monkeypatch, form, N, C, M):
    monkeypatch.setattr(fused_mlp, "BACKWARD", form)
    dy, _, down, _ = draw(N, C, M)
    if "WARPS" in form and C % 8:
        pytest.skip("by the other kernels")
    h = (2 * torch.randn(N, M, device=DEVICE)).to(DTYPE)
    product = dy.double() @ down.double()
    exact = product * slope(h)
    rounding = 2 * ROUNDING if "WARPS" in form else ROUNDING  # where warps hand the product on, it is rounded on the way
    close(fused_mlp.linear_gelu_backward(dy, down, h), exact, rounding, 2e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_the_mlp(bias):
    """Those that float64 has with a rounded h, up to the rounding of the results and of what they are made of."""
    torch.manual_seed(0)
    N, C, M = 70, 48, 192
    c_fc, c_proj = fused.Linear(C, M, bias), fused.Linear(M, C, bias)
    for layer in (c_fc.to(DEVICE), c_proj.to(DEVICE)):
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        layer.half = layer.weight.detach().to(DTYPE)
    x, dy = (torch.randn(2, N // 2, C, device=DEVICE).to(DTYPE) for _ in range(2))
    y = fused_mlp.mlp(x.requires_grad_(), c_fc, c_proj)
    y.backward(dy)
    flat, dy, up, down = (t.detach().double() for t in (x.flatten(0, 1), dy.flatten(0, 1), c_fc.half, c_proj.half))
    h = (flat @ up.t() + (c_fc.bias.detach().double() if bias else 0)).to(DTYPE).double()
    g = F.gelu(h)
    dh = (dy @ down) * slope(h)
    exact = [(y, g @ down.t() + (c_proj.bias.detach().double() if bias else 0)), (x.grad, dh @ up), (c_fc.weight.grad, dh.t() @ flat)]
    exact += [(c_proj.weight.grad, dy.t() @ g)] + ([(c_fc.bias.grad, dh.sum(0)), (c_proj.bias.grad, dy.sum(0))] if bias else [])
    for ours, theirs in exact:
        assert ours.dtype == (DTYPE if ours is y or ours is x.grad else torch.float32)
        close(ours.flatten(0, -2) if ours.dim() == 3 else ours, theirs, 2 * ROUNDING, 2 * ROUNDING * float(theirs.abs().max()))


def test_the_compiler_is_told_the_truth_about_shapes_and_strides():
    x, up, down, bias = draw(6, 16, 64)
    checks = ("test_schema", "test_faketensor")
    for b in (None, bias):
        torch.library.opcheck(fused_mlp.linear_gelu, (x, up, b), test_utils=checks)
    torch.library.opcheck(fused_mlp.linear_gelu_backward, (x, down, torch.randn(6, 64, device=DEVICE).to(DTYPE)), test_utils=checks)
