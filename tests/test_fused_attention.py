"""Attention over short sequences against the stored matrix in float64: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
import fused_attention  # noqa: E402
from fused_attention import ShortAttention  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def exactly(qkv, kept, factor, H, alpha, lam, heads, causal):
    """The same by its formula, in the dtype given."""
    B, T, C3 = qkv.shape
    q, k, v = (part.view(B, T, H, -1).transpose(1, 2) for part in qkv.split(C3 // 3, dim=2))
    logits = q @ k.mT / q.size(-1) ** 0.5
    if causal:
        logits = logits.masked_fill(torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1), float("-inf"))
    a = logits.softmax(dim=-1)
    y = (a if kept is None else a * kept * factor) @ v
    y = torch.cat((y[:, : H - heads], lam * (y - alpha * v)[:, H - heads :]), dim=1)
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "T, d", [(1, 16), (5, 16), (64, 64), (70, 32), (129, 128), (256, 64)] if CUDA else [(1, 16), (5, 16), (64, 64), (70, 16), (130, 32)]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("heads, alpha, lam", [(0, 1.0, 1.0), (3, 1.0, 1.0), (2, 0.5, 1.5), (2, 1.0, 0.0)])
def test_values_and_gradients_are_those_of_the_stored_matrix(T, d, causal, p, heads, alpha, lam):
    torch.manual_seed(T)
    B, H = 2, 3
    dtype = torch.bfloat16 if CUDA else torch.float32  # the interpreter truncates to bfloat16; here its arithmetic is checked, on a GPU the rounding
    qkv = (1.5 * torch.randn(B, T, 3 * H * d, device=DEVICE)).to(dtype).requires_grad_()
    kept = torch.rand(B, H, T, T, device=DEVICE) >= p if p else None
    direction = torch.randn(B, T, H * d, device=DEVICE).to(dtype)
    form = kept, 1 / (1 - p), H, alpha, lam, heads, causal
    y = ShortAttention.apply(qkv, *form)
    y.backward(direction)
    exact = qkv.detach().double().requires_grad_()
    reference = exactly(exact, *form)
    reference.backward(direction.double())
    bound = 2**-6 if CUDA else 2e-6
    for ours, theirs in ((y, reference), (qkv.grad, exact.grad)):
        assert ours.dtype == dtype and ours.isfinite().all()
        error = float((ours.double() - theirs).abs().max())
        assert error <= bound * max(float(theirs.abs().max()), float(direction.abs().max()) if T == 1 else 0), error


def test_which_sequences_it_takes():
    """And a mask of any strides."""
    qkv, kept = torch.randn(2, 6, 96, device=DEVICE), torch.rand(6, 6, 2, 2, device=DEVICE) < 0.5
    masks = kept.permute(2, 3, 0, 1), kept.permute(2, 3, 0, 1).contiguous()
    one, other = (ShortAttention.apply(qkv, mask, 2.0, 2, 1.0, 1.0, 0, True) for mask in masks)
    assert torch.equal(one, other)
    assert fused_attention.applies(256, 64) and not fused_attention.applies(257, 64) and not fused_attention.applies(64, 8)
