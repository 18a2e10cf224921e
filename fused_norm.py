"""Linear layers that end in the residual stream's addition and LayerNorm, for half precision on Hopper GPUs and rows of 384 channels.

A branch of a transformer ends in a linear layer, whose result dropout, the addition and the next LayerNorm read from memory again. Inside the product
(fused_norm_hopper.py) it stays where it is. The way back has the passes of fused.py, after products of the same kind without such an end: for 384
columns they are faster than cuBLAS's. Times, and the way back inside, which was not faster, in LOG.md. tests/test_fused_norm.py compares with
float64.
"""

import functools

import torch

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

    # two tiles for a program, the last one not whole, a ring of slots that turns; no random numbers, which are the training's
    waves = (torch.arange(rows * columns, device=device).mul(0.7 + n).sin().view(rows, columns) for n, (rows, columns) in enumerate(SHAPES))
    a, weight, x, gain, seed = *waves, torch.linspace(0.5, 1.5, CHANNELS, device=device), torch.tensor([5], device=device)
    a, weight = a.to(dtype), (weight / 30).to(dtype)
    right = 16 * weight.t().contiguous()

    def pairs():
        alike = [(_product_of(a, right, most=2), a @ right)]
        for given, p in ((seed, 0.25), (None, 0.0)):
            ours, apart = _add_norm_of(a, weight, x, gain, given, 1, p, most=2), fused.add_norm(x, a @ weight.t(), given, 1, p, gain, None)
            alike += zip(ours[:2], apart)
        return [(one.to(dtype), other.to(dtype)) for one, other in alike]  # the branch was rounded, so float32 is no nearer

    return trusted(pairs, "linear layers that end in LayerNorm are not used")


def _add_norm_of(a, weight, x, gain, seed, site: int, p: float, most: int = 0):
    """With at most so many programs, unless 0, for all tiles."""
    from fused_norm_hopper import add_norm

    out, y = torch.empty(x.shape, dtype=torch.float32, device=x.device), torch.empty(x.shape, dtype=a.dtype, device=x.device)
    mean, rstd = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    given = seed, site, threshold(p), 1 / (1 - p)
    add_norm(a.contiguous(), weight.contiguous(), x.contiguous(), gain, *given, out, y, mean, rstd, most)
    return out, y, mean, rstd


def _product_of(a, weight, most: int = 0):
    from fused_norm_hopper import product

    y = a.new_empty(len(a), CHANNELS)
    product(a.contiguous(), weight.contiguous(), y, most)
    return y


@operator
def add_norm_of(
    a: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, seed: torch.Tensor | None, site: int, p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """a (N, K), weight (384, K), x (N, 384) float32 -> what fused.add_norm has of x and the branch a weight^T, rounded to a's dtype."""
    return _add_norm_of(a, weight, x, gain, seed, site, p)


@add_norm_of.register_fake
def _(a, weight, x, gain, seed, site, p):
    statistics = x.new_empty(len(x), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32), a.new_empty(x.shape), statistics, torch.empty_like(statistics)


@operator
def product_of(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """a (N, K) times weight (K, 384) -> (N, 384), all of one dtype."""
    return _product_of(a, weight)


product_of.register_fake(lambda a, weight: a.new_empty(len(a), CHANNELS))
