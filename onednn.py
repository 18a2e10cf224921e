"""Float32 linear layers on x86 CPUs through oneDNN instead of MKL.

torch sends float32 matrix products on a CPU to MKL, which does not use AVX-512 on processors that are not Intel's; oneDNN, in the same torch, does:
at the shapes of config/quick.py it is twice as fast for the forward product and the input's gradient, 1.2 to 1.9 times for the weight's (LOG.md).
Precision is float32 in both; the order of the sums differs, as between any two BLAS.
"""

import torch
import torch.nn as nn


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
        return _product(grad, weight.t()), _product(grad.t(), x.t())


class Linear(nn.Linear):
    """nn.Linear whose float32 products on the CPU go through oneDNN; anything else takes nn.Linear's own way."""

    def forward(self, x):
        if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y = _Linear.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def accelerate(model: nn.Module):
    """Turns the nn.Linear layers of `model` into Linear, in place; parameters and their names stay. Does nothing where it would not be faster."""
    if available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear
