"""Linear layers that end in the residual stream's addition and LayerNorm, for half precision on Hopper GPUs and rows of 384 channels.

A branch of a transformer ends in a linear layer, whose result dropout, the addition and the next LayerNorm read from memory again. Inside the product
(fused_norm_hopper.py) it stays where it is. The way back has the passes of fused.py, after products of the same kind without such an end: for 384
columns they are faster than cuBLAS's. Times, and the way back inside, which was not faster, in LOG.md. tests/test_fused_norm.py compares with
float64.
"""

import functools

import torch
import triton
import triton.language as tl

from dropout import threshold
from operators import operator, trusted

CHANNELS = 384
SHAPES = (264, 200), (CHANNELS, 200), (264, CHANNELS)  # of what the kernels are tried on


def applies(half: torch.Tensor, *biases: torch.Tensor | None) -> bool:
    """Whether a linear layer with this cast of its weight (384, K) ends so: on a Hopper GPU, without biases, its own or LayerNorm's."""
    if half.device.type != "cuda" or half.dtype == torch.float32 or any(bias is not None for bias in biases):
        return False
    return half.size(0) == CHANNELS and half.size(1) % 8 == 0 and _works(half.device, half.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there, tried on small matrices against fused.py's passes; says why not on a Hopper GPU."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    import fused

    # more tiles than one, the last one not whole, a ring of slots that turns; no random numbers, which are the training's
    waves = (torch.arange(rows * columns, device=device).mul(0.7 + n).sin().view(rows, columns) for n, (rows, columns) in enumerate(SHAPES))
    a, weight, x, gain, seed = *waves, torch.linspace(0.5, 1.5, CHANNELS, device=device), torch.tensor([5], device=device)
    a, weight = a.to(dtype), (weight / 30).to(dtype)
    right = 16 * weight.t().contiguous()

    def pairs():
        ours, apart = add_norm_of(a, weight, x, gain, seed, 1, 0.25), fused.add_norm(x, a @ weight.t(), seed, 1, 0.25, gain, None)
        # the branch was rounded, so float32 is no nearer
        return [(one.to(dtype), other.to(dtype)) for one, other in zip(ours[:2], apart)] + [(product_of(a, right), a @ right)]

    return trusted(pairs, "linear layers that end in LayerNorm are not used")


@operator
def add_norm_of(
    a: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, seed: torch.Tensor | None, site: int, p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """a (N, K), weight (384, K), x (N, 384) float32 -> what fused.add_norm has of x and the branch a weight^T, rounded to a's dtype."""
    from fused_norm_hopper import add_norm

    out, y = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(x.shape, dtype=a.dtype, device=x.device)
    mean, rstd = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    add_norm(a.contiguous(), weight.contiguous(), x.contiguous(), gain, seed, site, threshold(p), 1 / (1 - p), out, y, mean, rstd)
    return out, y, mean, rstd


@add_norm_of.register_fake
def _(a, weight, x, gain, seed, site, p):
    statistics = x.new_empty(len(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), a.new_empty(x.shape), statistics, torch.empty_like(statistics)


@operator
def product_of(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """a (N, K) times weight (K, 384) -> (N, 384), all of one dtype."""
    from fused_norm_hopper import product

    y = a.new_empty(len(a), CHANNELS)
    product(a.contiguous(), weight.contiguous(), y)
    return y


product_of.register_fake(lambda a, weight: a.new_empty(len(a), CHANNELS))


@triton.jit
def _sum_rows(x_ptr, out_ptr, n, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(n, C) -> (C,), BLOCK columns by one program."""
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, n, ROWS):
        total += tl.load(x_ptr + (start + row) * C + column[None, :], mask=(start + row < n) & (column[None, :] < C), other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0), mask=column < C)


def sum_of_rows(partial):
    """Sum over the rows of a float32 matrix of some hundreds or thousands, several times as fast as torch's."""
    n, C = partial.shape
    out = partial.new_empty(C)
    _sum_rows[(triton.cdiv(C, 8),)](partial, out, n, C, ROWS=512, BLOCK=8, num_warps=8)
    return out
