"""Linear layers that end in the residual stream's addition and LayerNorm, and their way back, for half precision on Hopper GPUs.

A branch of a transformer ends in a linear layer, whose result dropout, the addition and the next LayerNorm read from memory again; on the way back
the gradient of LayerNorm's result comes from a product likewise. Inside the products (fused_norm_hopper.py) what passes between them stays where it
is. Times in LOG.md. tests/test_fused_norm.py compares with float64, and with fused.py's passes, which do the rest and all that is elsewhere.
"""

import functools

import torch
import triton
import triton.language as tl

from dropout import threshold
from operators import operator, trusted

CHANNELS, ROWS = 384, 128  # a row's; a tile's, of which every sixteen have a partial sum of the gain's gradient
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
    right = weight.t().contiguous()

    def pairs():
        ours = add_norm_of(a, weight, x, gain, seed, 1, 0.25)
        apart = fused.add_norm(x, a @ weight.t(), seed, 1, 0.25, gain, None)
        back = norm_of_backward(a, right, x, ours[0], gain, *ours[2:], seed, 1, 0.25)
        back_apart = fused.add_norm_backward(x, a @ right, apart[0], seed, 1, 0.25, gain, False, *apart[2:])
        alike = *zip(ours[:2], apart), *zip(back[:2], back_apart), (back[2] / 264, back_apart[2] / 264)
        return [(one.to(dtype), other.to(dtype)) for one, other in alike]  # the branch was rounded, so float32 is no nearer

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
def norm_of_backward(
    dz: torch.Tensor, weight: torch.Tensor, dout: torch.Tensor, out: torch.Tensor, gain: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
    seed: torch.Tensor | None, site: int, p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """What fused.add_norm_backward has, without a bias, of the gradient dz weight of y, rounded: dz (N, M), weight (M, 384)."""
    from fused_norm_hopper import norm_backward

    dx, dbranch = torch.empty_like(out), torch.empty(out.shape, dtype=dz.dtype, device=out.device)
    partial = torch.empty(-(-len(out) // ROWS) * 8, CHANNELS, dtype=torch.float32, device=out.device)
    given = dz.contiguous(), weight.contiguous(), out, dout.contiguous(), gain, mean, rstd, seed, site, threshold(p), 1 / (1 - p)
    norm_backward(*given, dx, dbranch, partial)
    return dx, dbranch, sum_of_rows(partial)


@norm_of_backward.register_fake
def _(dz, weight, dout, out, gain, mean, rstd, seed, site, p):
    return torch.empty_like(out), dz.new_empty(out.shape), torch.empty_like(gain)


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
    _sum_rows[(triton.cdiv(C, 16),)](partial, out, n, C, ROWS=256, BLOCK=16, num_warps=8)
    return out
