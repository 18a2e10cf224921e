"""Matrix products with more in them, for half precision on CUDA, and GELU in passes of its own, in Triton.

Apart, GELU reads the result of the product before it from memory again, and its gradient that of the product behind it. On Hopper GPUs
fused_products_hopper.py applies GELU to a tile of that product while the next tile is being multiplied, and keeps its derivative, in eight bits: some
instructions more there, one multiplication on the way back, inside another product, and half of the bytes that the product would be. It also takes a
factor in three pieces, so that the gradients of queries, keys and values need not be put together first. Times in LOG.md. tests/test_fused.py and
tests/test_fused_products.py compare with float64, and the values of GELU inside and apart to the bit.
"""

import functools

import torch
import triton
import triton.language as tl

from operators import operator, trusted


@triton.jit
def _tail(x):
    """Upper tail of the standard normal at |x| and exp(-x^2 / 2), by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7).

    These functions are bound by arithmetic, not by memory: exp2 and the inverse by rsqrt are one instruction each, exp and a division five and nine.
    """
    r = tl.rsqrt(1 + 0.23164189 * tl.abs(x))  # 0.3275911 / sqrt(2)
    t = r * r
    e = tl.exp2(x * x * -0.7213475204444817)  # log2(e) / 2
    return e * (t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))), e


@triton.jit
def value_and_slope(x):
    """x Phi(x) of float32 and its derivative, Phi(x) + x phi(x)."""
    tail, e = _tail(x)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail, tl.where(x < 0, tail, 1 - tail) + x * e * 0.3989422804014327


@triton.jit
def to_byte(slope):
    """A derivative, -0.13 to 1.13, in steps of 1 / 200 from -26 on: an error of at most 0.0025, where bfloat16's is 0.002 below 1 and 0.004 above;
    none at 0 and at 1. Added to 2^23, whose last bit counts 1, the steps are the last bits of a float."""
    return ((slope * 200.0 + 8388634.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def from_byte(byte):
    """The derivative in float32, the nearest of its steps."""
    return ((byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388634.0) * 0.005


def slope_of(bytes_):
    """`from_byte` in torch."""
    return (bytes_.float() - 26) * 0.005


# ---------------------------------------------------------------------------------------------------------------------------------
# Passes


@triton.jit
def _gelu(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y, _ = value_and_slope(tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32))
    tl.store(y_ptr + i, y, mask=i < n)


@triton.jit
def _gelu_backward(dy_ptr, x_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, slope = value_and_slope(tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32))
    tl.store(dx_ptr + i, tl.load(dy_ptr + i, mask=i < n, other=0.0).to(tl.float32) * slope, mask=i < n)


@operator
def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x) of a tensor of any shape, in its dtype."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _gelu[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), BLOCK=4096)
    return y


@operator
def gelu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy (Phi(x) + x phi(x))."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _gelu_backward[(triton.cdiv(x.numel(), 1024),)](dy, x, dx, x.numel(), BLOCK=1024)
    return dx


gelu.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
gelu_backward.register_fake(lambda dy, x: torch.empty_like(x, memory_format=torch.contiguous_format))
gelu.register_autograd(
    lambda ctx, dy: gelu_backward(dy, *ctx.saved_tensors), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0])
)


# ---------------------------------------------------------------------------------------------------------------------------------
# Products with more in them


def applies(half: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the products below take a linear layer with this cast of its weight: on Hopper GPUs, with rows of a multiple of 16 bytes, no bias."""
    if half.device.type != "cuda" or half.dtype == torch.float32 or bias is not None or any(size % 8 for size in half.shape):
        return False
    return _works(half.device, half.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the products run there, tried on small ones; says why not on a Hopper GPU."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    # more than one tile, and a ring of slots that turns; no random numbers, which are the training's
    x, weight = (torch.linspace(-1, 1, rows * 264, device=device).sin().view(rows, 264).to(dtype) for rows in (136, 272))
    three = [(x * scale).to(dtype) for scale in (1, 0.5, -0.7)]

    def pairs():
        h, (g, slope) = x @ weight.t(), linear_gelu(x, weight, True)
        known, dh = gelu_backward(torch.ones_like(h), h), linear_gelu_backward(x, weight.t().contiguous(), slope)
        beside = weight.t().repeat(3, 1)
        three_by_hand = torch.cat(three, dim=1) @ beside
        return (g, gelu(h)), (slope_of(slope).to(dtype), known), (dh, gelu_backward(h, h)), (product_of_three(*three, beside), three_by_hand)

    return trusted(pairs, "the products with more in them are not used")


@operator
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, K), weight (M, K) -> GELU of h, x weight^T rounded to x's dtype, (N, M), and with `keep` (else empty) its derivative at h, as bytes."""
    from fused_products_hopper import product

    g = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    slope = torch.empty_like(g, dtype=torch.uint8) if keep else g.new_empty(0, dtype=torch.uint8)
    product([x.contiguous()], weight.contiguous(), g, "gelu", slope)
    return g, slope


@operator
def linear_gelu_backward(dy: torch.Tensor, weight: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """dy (N, C), weight (C, M), slope (N, M), bytes -> gradient of h, dy weight rounded to dy's dtype times the slope, (N, M)."""
    from fused_products_hopper import product

    dh, slope = torch.empty_like(slope, dtype=dy.dtype, memory_format=torch.contiguous_format), slope.contiguous()
    product([dy.contiguous()], weight.contiguous(), dh, "slope", slope)
    return dh


@operator
def product_of_three(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """a, b, c (N, K) side by side times weight (3 K, M) -> (N, M), without being put together in memory."""
    from fused_products_hopper import product

    out = torch.empty(len(a), weight.size(1), dtype=a.dtype, device=a.device)
    product([part.contiguous() for part in (a, b, c)], weight.contiguous(), out)
    return out


product_of_three.register_fake(lambda a, b, c, weight: a.new_empty(len(a), weight.size(1)))


@linear_gelu.register_fake
def _(x, weight, keep):
    g = x.new_empty(len(x), len(weight))
    return g, torch.empty_like(g, dtype=torch.uint8) if keep else g.new_empty(0, dtype=torch.uint8)


linear_gelu_backward.register_fake(lambda dy, weight, slope: torch.empty_like(slope, dtype=dy.dtype, memory_format=torch.contiguous_format))
