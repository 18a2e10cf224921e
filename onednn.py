"""What torch does slowly on x86 CPUs: float32 linear layers by MKL, and attention in bfloat16.

torch sends float32 matrix products on a CPU to MKL, which does not use AVX-512 on processors that are not Intel's; oneDNN, in the same torch, does:
at the shapes of config/quick.py it is twice as fast for the forward product and the input's gradient, 1.2 to 1.9 times for the weight's, where
AVX-512 has units of its full width. AMD's before family 26 have not: there it wins a tenth, and for the weight's gradient MKL is faster (LOG.md).
Precision is float32 in both; the order of the sums differs, as between any two BLAS.

The backward pass of attention takes four times as long in bfloat16 as in float32 (LOG.md), so attention stays in float32 under autocast.
"""

import re
from pathlib import Path

import torch
import torch.nn as nn

from model import CausalSelfAttention


def full_width(cpuinfo: str) -> bool:
    """Whether the processor that /proc/cpuinfo describes is known to have 512 bits in its units: AMD's from family 26 (Zen 5) on.

    By name and not by a trial, whose outcome would change from run to run, and with it the order of sums. On Intel's, where MKL uses AVX-512, oneDNN
    for the other two products wins nothing: a step of config/quick.py took 1.03 of nanoGPT's way on one (LOG.md).
    """
    family = re.search(r"^cpu family\s*:\s*(\d+)$", cpuinfo, re.MULTILINE)
    return "AuthenticAMD" in cpuinfo and family is not None and int(family[1]) >= 26


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return ""


FULL_WIDTH = full_width(_cpuinfo())


def available() -> bool:
    """Whether this torch has the operator (x86 builds with oneDNN) and the processor has the instructions that make it worth while."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()


def _product(a, b):
    """a b^T for matrices a (M, K) and b (N, K), any strides -> (M, N)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # (M, K), (N, K) -> (M, N)
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return _product(grad, weight.t()), _product(grad.t(), x.t()) if FULL_WIDTH else grad.t() @ x


class Linear(nn.Linear):
    """nn.Linear whose float32 products on the CPU go through oneDNN; anything else takes nn.Linear's own way."""

    def forward(self, x):
        if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y = _Linear.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class Attention(CausalSelfAttention):
    """The model's attention, with A v in float32 also for q, k and v in bfloat16; the result is in bfloat16."""

    def attend(self, q, keys, values, mask, causal: bool):
        if q.dtype != torch.bfloat16 or q.device.type != "cpu":
            return super().attend(q, keys, values, mask, causal)
        with torch.autocast("cpu", enabled=False):
            return super().attend(q.float(), keys.float(), values.float(), mask, causal).to(q.dtype)


def accelerate(model: nn.Module):
    """Turns linear layers and attention of `model` into those above, in place; parameters and their names stay. Not where it would be slower."""
    if available():
        swaps = {nn.Linear: Linear, CausalSelfAttention: Attention}
        for module in model.modules():
            module.__class__ = swaps.get(type(module), module.__class__)
