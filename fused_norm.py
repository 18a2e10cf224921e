"""The residual stream: dropout, addition and LayerNorm, for half precision on CUDA, in Triton's passes and, on Hopper GPUs, as the end of the product
before them.

A branch of a transformer ends in a linear layer, whose result these passes read from memory again. For rows of 384 channels it stays where it is,
inside the product (fused_norm_hopper.py). The way back has its passes, after products of the same kind without such an end, in which the last branch
ends, too: for 384 columns they are faster than cuBLAS's. Times, and the way back inside, which was not faster, in LOG.md. Sums are in float32, and so
is the stream; tests/test_fused.py and tests/test_fused_norm.py compare with float64.
"""

import functools

import torch
import triton
import triton.language as tl

from dropout import decisions, threshold
from operators import operator, trusted
from place import processors

CHANNELS = 384
SHAPES = (264, 200), (CHANNELS, 200), (264, CHANNELS)  # of what the kernels are tried on
LEAST_GAIN = tl.constexpr(2.0**-10)  # that LN in half precision is divided by: float16's least steps, 6e-8, are then 6e-5 standard deviations


# ---------------------------------------------------------------------------------------------------------------------------------
# Passes


@triton.jit
def _normal(x_ptr, branch_ptr, seed_ptr, site, least, scale, out_ptr, mean_ptr, rstd_ptr, row, n, T, START: tl.constexpr, C: tl.constexpr,
            DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows `row` (ROWS,) below n of x plus the branch after dropout, stored if out_ptr is given; returns them with mean 0 and variance 1, and 0
    elsewhere.

    With START no x, but at x_ptr, if anywhere, (T, C) to be added to every T rows of the branch before.
    """
    column = tl.arange(0, BLOCK)
    i, mask = row[:, None].to(tl.int64) * C + column[None, :], (row[:, None] < n) & (column[None, :] < C)
    branch = tl.load(branch_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if START:
        if x_ptr is not None:
            branch += tl.load(x_ptr + (row % T)[:, None] * C + column[None, :], mask=mask, other=0.0)
    if DROPOUT:
        kept = decisions(tl.load(seed_ptr), site, row, tl.arange(0, BLOCK // 8), C, least, ROWS, BLOCK // 8)
        branch = tl.where(kept, branch * scale, 0.0)
    x = branch
    if not START:
        x += tl.load(x_ptr + i, mask=mask, other=0.0)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + 1e-5)
    if out_ptr is not None:
        tl.store(out_ptr + i, x, mask=mask)
        tl.store(mean_ptr + row, mean, mask=row < n)
    tl.store(rstd_ptr + row, rstd, mask=row < n)
    return centred * rstd[:, None]


@triton.jit(do_not_specialize=["site"])
def _add_norm(x_ptr, branch_ptr, seed_ptr, site, least, scale, weight_ptr, bias_ptr, out_ptr, y_ptr, mean_ptr, rstd_ptr, n, T,
              START: tl.constexpr, C: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    y = _normal(x_ptr, branch_ptr, seed_ptr, site, least, scale, out_ptr, mean_ptr, rstd_ptr, row, n, T, START, C, DROPOUT, ROWS, BLOCK)
    y *= tl.load(weight_ptr + column, mask=column < C, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < C, other=0.0)[None, :]
    tl.store(y_ptr + row[:, None].to(tl.int64) * C + column[None, :], y, mask=(row[:, None] < n) & (column[None, :] < C))


@triton.jit(do_not_specialize=["site"])
def _add_norm_mean(x_ptr, branch_ptr, seed_ptr, site, least, scale, weight_ptr, bias_ptr, normal_ptr, y_ptr, rstd_ptr, T,
                   C: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """The T rows of a sequence: the mean of y, and for the way back y before its gain."""
    column, first = tl.arange(0, BLOCK), tl.program_id(0) * T
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, T, ROWS, num_stages=STAGES):
        row, n = first + start + tl.arange(0, ROWS), first + T
        normal = _normal(x_ptr, branch_ptr, seed_ptr, site, least, scale, None, None, rstd_ptr, row, n, T, False, C, DROPOUT, ROWS, BLOCK)
        tl.store(normal_ptr + row[:, None].to(tl.int64) * C + column[None, :], normal, mask=(row[:, None] < n) & (column[None, :] < C))
        total += normal
    y = tl.sum(total, axis=0) / T * tl.load(weight_ptr + column, mask=column < C, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < C, other=0.0)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * C + column, y, mask=column < C)


@triton.jit(do_not_specialize=["site"])
def _add_norm_backward(dout_ptr, dy_ptr, out_ptr, y_ptr, seed_ptr, site, least, scale, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dbranch_ptr,
                       dweight_ptr, dbias_ptr, n, T, tiles, MEAN: tl.constexpr, C: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr,
                       RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Each program takes `tiles` tiles of ROWS rows, so that the sums over rows for the gain and the bias stay in registers until its end, where it
    writes its own row of (programs, C) partial sums. Without a residual stream before the sum there is no dx to be written. With MEAN
    dy is that of means over T rows of y.

    The normalised rows are y, in half precision, over its gain, which is half of the sum's bytes; they come from the sum and its mean where y is not
    given or a gain is too small. Without a sum y has no gain, and is what they are."""
    column, share = tl.arange(0, BLOCK), 1.0 / T
    weight = tl.load(weight_ptr + column, mask=column < C, other=1.0)[None, :]
    least_gain = tl.min(tl.abs(weight), axis=1)
    dweight, dbias = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tiles, num_stages=STAGES):
        row = (tile * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        i, mask = row[:, None].to(tl.int64) * C + column[None, :], (row[:, None] < n) & (column[None, :] < C)
        if y_ptr is not None:  # again, from what is near, so that meanwhile other things have its registers
            weight = tl.load(weight_ptr + column, mask=column < C, other=1.0)[None, :]
        if MEAN:
            dy = tl.load(dy_ptr + (row // T)[:, None].to(tl.int64) * C + column[None, :], mask=mask, other=0.0).to(tl.float32) * share
        else:
            dy = tl.load(dy_ptr + i, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < n, other=0.0)
        if out_ptr is None:
            normal = tl.load(y_ptr + i, mask=mask, other=0.0).to(tl.float32)
        else:
            known = row < n
            if y_ptr is not None:
                known = known & (least_gain < LEAST_GAIN)
            mean = tl.load(mean_ptr + row, mask=known, other=0.0)
            x = tl.load(out_ptr + i, mask=mask & known[:, None], other=0.0)
            normal = tl.where(mask & known[:, None], (x - mean[:, None]) * rstd[:, None], 0.0)
            if y_ptr is not None:  # not in a branch, so that all loads of a tile are under way at once
                y = tl.load(y_ptr + i, mask=mask & (least_gain >= LEAST_GAIN)[:, None], other=0.0).to(tl.float32)
                normal += y / tl.where((least_gain >= LEAST_GAIN)[:, None], weight, 1.0)
        dweight += dy * normal
        if BIAS:
            dbias += dy
        g = dy * weight
        dx = (g - (tl.sum(g, axis=1) / C)[:, None] - normal * (tl.sum(g * normal, axis=1) / C)[:, None]) * rstd[:, None]
        if RESIDUAL:
            dx += tl.load(dout_ptr + i, mask=mask, other=0.0)
        if dx_ptr is not None:
            tl.store(dx_ptr + i, dx, mask=mask)
        if DROPOUT:
            kept = decisions(tl.load(seed_ptr), site, row, tl.arange(0, BLOCK // 8), C, least, ROWS, BLOCK // 8)
            dx = tl.where(kept, dx * scale, 0.0)
        tl.store(dbranch_ptr + i, dx, mask=mask)
    tl.store(dweight_ptr + tl.program_id(0) * C + column, tl.sum(dweight, axis=0), mask=column < C)
    if BIAS:
        tl.store(dbias_ptr + tl.program_id(0) * C + column, tl.sum(dbias, axis=0), mask=column < C)


@triton.jit
def _sum_rows(x_ptr, out_ptr, n, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(n, C) -> (C,), BLOCK columns by one program."""
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, n, ROWS):
        total += tl.load(x_ptr + (start + row) * C + column[None, :], mask=(start + row < n) & (column[None, :] < C), other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0), mask=column < C)


def _sum(partial):
    """Sum over the rows of a float32 matrix of some hundreds or thousands, several times as fast as torch's."""
    n, C = partial.shape
    out = partial.new_empty(C)
    _sum_rows[(triton.cdiv(C, 8),)](partial, out, n, C, ROWS=512, BLOCK=8, num_warps=8)
    return out


def tile_of(C: int, elements: int) -> dict:
    """Rows and columns of a tile of rows of C: about so many elements, one column block per row."""
    block = max(8, triton.next_power_of_2(C))  # one call of dropout's generator at least
    return {"C": C, "BLOCK": block, "ROWS": max(1, elements // block), "num_warps": 4 if block <= 2048 else 8}


def _add_norm_into(y, x, branch, seed, site: int, p: float, weight, bias, start: bool):
    """`add_norm` or, with `start`, `start_norm`, into y: (sum, y, mean, 1 / std)."""
    C = branch.size(-1)
    out, n = torch.empty(branch.shape, dtype=torch.float32, device=branch.device), branch.numel() // C
    mean, rstd = (torch.empty(n, dtype=torch.float32, device=branch.device) for _ in range(2))
    tile, T = tile_of(C, 2048), x.numel() // C if start and x is not None else 1
    _add_norm[(triton.cdiv(n, tile["ROWS"]),)](
        x, branch, seed, site, threshold(p), 1 / (1 - p), weight, bias, out, y, mean, rstd, n, T,
        START=start, DROPOUT=p > 0, BIAS=bias is not None, **tile,
    )  # fmt: skip
    return out, y, mean, rstd


def _like_add_norm(branch, dtype: torch.dtype):
    """The shapes of its results."""
    statistics = branch.new_empty(branch.numel() // branch.size(-1), dtype=torch.float32)
    return branch.new_empty(branch.shape, dtype=torch.float32), branch.new_empty(branch.shape, dtype=dtype), statistics, torch.empty_like(statistics)


def _add_norm_backward_into(dx, dbranch, dout, dy, out, y, seed, site: int, p: float, weight, bias: bool, mean, rstd):
    """The gradients of x (unless None) and of the branch into dx and dbranch; returns those of weight and bias (empty if not `bias`).

    dy is that of y or, with fewer rows, of its means over as many rows each. Without `out`, the sum, and its mean y is what it was before its gain.
    """
    C = weight.size(0)
    n, tile, T = dbranch.numel() // C, tile_of(C, 1024), dbranch.numel() // dy.numel()
    # A row of one warp has sums without barriers, longer ones would not fit its registers; shorter ones come by asynchronous copies (two stages), all
    # of a tile's at once, since they wait in shared memory.
    warps, stages = (2, 2) if tile["BLOCK"] < 1024 else (1, 1) if tile["BLOCK"] == 1024 else (tile["num_warps"], 1)
    tile |= {"num_warps": warps, "STAGES": stages}
    tiles = triton.cdiv(n, tile["ROWS"])
    programs = min(tiles, (16 if warps == 1 else 8) * processors(dy.device))  # about as many as an A100 or H100 has room for
    dweight = weight.new_empty(programs, C)
    dbias = torch.empty_like(dweight) if bias else weight.new_empty(0)
    _add_norm_backward[(programs,)](
        dout, dy, out, y, seed, site, threshold(p), 1 / (1 - p), weight, mean, rstd, dx, dbranch, dweight, dbias, n, T, triton.cdiv(tiles, programs),
        MEAN=T > 1, DROPOUT=p > 0, BIAS=bias, RESIDUAL=dout is not None, **tile,
    )  # fmt: skip
    return _sum(dweight), _sum(dbias) if bias else dbias


@operator
def add_norm(
    x: torch.Tensor, branch: torch.Tensor, seed: torch.Tensor | None, site: int, p: float, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (…, C) float32 plus `branch` after dropout -> the sum in float32, LN of it in branch's dtype, mean and 1 / std (N,).

    Dropout with probability p is by the decisions of `site` under the seed, int64 (1,), for a matrix (N, C); None where p is 0.
    """
    x, branch = x.contiguous(), branch.contiguous()
    return _add_norm_into(torch.empty_like(branch), x, branch, seed, site, p, weight, bias, False)


add_norm.register_fake(lambda x, branch, seed, site, p, weight, bias: _like_add_norm(branch, branch.dtype))


@operator
def add_norm_backward(
    dout: torch.Tensor | None, dy: torch.Tensor, out: torch.Tensor, y: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
    weight: torch.Tensor, bias: bool, mean: torch.Tensor, rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x (float32), branch (dy's dtype), weight and bias (empty if not `bias`). dout is None where the sum goes nowhere else.

    Of `add_norm`'s results y is LN, from `serves`; with it `out` is read only where a gain is too small.
    """
    dy, dout = dy.contiguous(), dout if dout is None else dout.contiguous()
    dx, dbranch = torch.empty_like(out), torch.empty_like(dy)
    return dx, dbranch, *_add_norm_backward_into(dx, dbranch, dout, dy, out, y, seed, site, p, weight, bias, mean, rstd)


@add_norm_backward.register_fake
def _(dout, dy, out, y, seed, site, p, weight, bias, mean, rstd):
    form = {"memory_format": torch.contiguous_format}
    nothing = weight.new_empty(0)
    return torch.empty_like(out), torch.empty_like(dy, **form), torch.empty_like(weight), torch.empty_like(weight) if bias else nothing


def serves(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """y, for the way back, if that is to be made from it: in half precision, without a bias, beside which too little of the rest may be left."""
    return y if bias is None and y.dtype != torch.float32 else None


class AddNorm(torch.autograd.Function):
    """`add_norm` -> the sum and LN of it. Nothing else takes the sum where `last`, which then has no gradient of its own."""

    @staticmethod
    def forward(ctx, x, branch, seed, site, p, weight, bias, last):
        out, y, mean, rstd = add_norm(x, branch, seed, site, p, weight, bias)
        ctx.save_for_backward(out, serves(y, bias), seed, weight, mean, rstd)
        ctx.dropout, ctx.bias, ctx.last = (site, p), bias is not None, last
        return out, y

    @staticmethod
    def backward(ctx, dout, dy):
        out, y, seed, weight, mean, rstd = ctx.saved_tensors
        dx, dbranch, dweight, dbias = add_norm_backward(None if ctx.last else dout, dy, out, y, seed, *ctx.dropout, weight, ctx.bias, mean, rstd)
        return dx, dbranch, None, None, None, dweight, dbias if ctx.bias else None, None


@operator
def add_norm_mean(
    x: torch.Tensor, branch: torch.Tensor, seed: torch.Tensor | None, site: int, p: float, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_norm` of (B, T, C) of whose LN the mean over T is kept, (B, C) float32, and for the way back what it was before its gain, in branch's
    dtype, and 1 / std."""
    x, branch, (B, T, C) = x.contiguous(), branch.contiguous(), x.shape
    normal, y = torch.empty_like(branch), torch.empty(B, C, dtype=torch.float32, device=x.device)
    rstd = torch.empty(B * T, dtype=torch.float32, device=x.device)
    given = x, branch, seed, site, threshold(p), 1 / (1 - p), weight, bias, normal, y, rstd, T
    _add_norm_mean[(B,)](*given, DROPOUT=p > 0, BIAS=bias is not None, STAGES=3 if C <= 2048 else 1, **tile_of(C, 2048))
    return y, normal, rstd


@add_norm_mean.register_fake
def _(x, branch, seed, site, p, weight, bias):
    B, T, C = x.shape
    normal = torch.empty_like(branch, memory_format=torch.contiguous_format)
    return x.new_empty(B, C, dtype=torch.float32), normal, x.new_empty(B * T, dtype=torch.float32)


@operator
def add_norm_mean_backward(
    dy: torch.Tensor, normal: torch.Tensor, seed: torch.Tensor | None, site: int, p: float, weight: torch.Tensor, bias: bool, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (float32), branch (normal's dtype), weight and bias (empty if not `bias`) from that of the means, (B, C); the sum goes nowhere
    else."""
    dx, dbranch = torch.empty_like(normal, dtype=torch.float32), torch.empty_like(normal)
    return dx, dbranch, *_add_norm_backward_into(dx, dbranch, None, dy.contiguous(), None, normal, seed, site, p, weight, bias, None, rstd)


@add_norm_mean_backward.register_fake
def _(dy, normal, seed, site, p, weight, bias, rstd):
    dbias = torch.empty_like(weight) if bias else weight.new_empty(0)
    return torch.empty_like(normal, dtype=torch.float32), torch.empty_like(normal), torch.empty_like(weight), dbias


class AddNormMean(torch.autograd.Function):
    """What is left of `AddNorm` where its y is wanted for the mean over T alone: (B, C) float32."""

    @staticmethod
    def forward(ctx, x, branch, seed, site, p, weight, bias):
        y, normal, rstd = add_norm_mean(x, branch, seed, site, p, weight, bias)
        ctx.save_for_backward(normal, seed, weight, rstd)
        ctx.dropout, ctx.bias = (site, p), bias is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        normal, seed, weight, rstd = ctx.saved_tensors
        dx, dbranch, dweight, dbias = add_norm_mean_backward(dy, normal, seed, *ctx.dropout, weight, ctx.bias, rstd)
        return dx, dbranch, None, None, None, dweight, dbias if ctx.bias else None


@operator
def start_norm(
    x: torch.Tensor, positions: torch.Tensor | None, seed: torch.Tensor, site: int, p: float, weight: torch.Tensor, bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x (B, T, C) plus any positions (T, C) float32, then dropout as in `add_norm` -> that in float32, LN of it in `dtype`, mean and 1 / std (N,)."""
    x, positions = x.contiguous(), positions if positions is None else positions.contiguous()
    return _add_norm_into(torch.empty_like(x, dtype=dtype), positions, x, seed, site, p, weight, bias, True)


start_norm.register_fake(lambda x, positions, seed, site, p, weight, bias, dtype: _like_add_norm(x, dtype))


@operator
def start_norm_backward(
    dout: torch.Tensor, dy: torch.Tensor, out: torch.Tensor, y: torch.Tensor | None, seed: torch.Tensor, site: int, p: float, weight: torch.Tensor,
    bias: bool, mean: torch.Tensor, rstd: torch.Tensor, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x + positions (B, T, C) in `dtype`, weight and bias (empty if not `bias`); y as in `add_norm_backward`."""
    dx = torch.empty_like(out, dtype=dtype)
    return dx, *_add_norm_backward_into(None, dx, dout.contiguous(), dy.contiguous(), out, y, seed, site, p, weight, bias, mean, rstd)


@start_norm_backward.register_fake
def _(dout, dy, out, y, seed, site, p, weight, bias, mean, rstd, dtype):
    return torch.empty_like(out, dtype=dtype), torch.empty_like(weight), torch.empty_like(weight) if bias else weight.new_empty(0)


class StartNorm(torch.autograd.Function):
    """x plus any positions after dropout, and LN of it in `dtype`. The positions' gradient is a sum over the batch of x's, which is in x's dtype."""

    @staticmethod
    def forward(ctx, x, positions, seed, site, p, weight, bias, dtype):
        out, y, mean, rstd = start_norm(x, positions, seed, site, p, weight, bias, dtype)
        ctx.save_for_backward(out, serves(y, bias), seed, weight, mean, rstd)
        ctx.dropout, ctx.bias, ctx.positions, ctx.dtype = (site, p), bias is not None, positions is not None, x.dtype
        return out, y

    @staticmethod
    def backward(ctx, dout, dy):
        out, y, seed, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = start_norm_backward(dout, dy, out, y, seed, *ctx.dropout, weight, ctx.bias, mean, rstd, ctx.dtype)
        dpositions = dx.sum(dim=0, dtype=torch.float32) if ctx.positions else None
        return dx, dpositions, None, None, None, dweight, dbias if ctx.bias else None, None


# ---------------------------------------------------------------------------------------------------------------------------------
# Inside a product


def applies(half: torch.Tensor, *biases: torch.Tensor | None) -> bool:
    """Whether a linear layer with this cast of its weight (384, K) ends so: on a Hopper GPU, without biases, its own or LayerNorm's."""
    if half.device.type != "cuda" or half.dtype == torch.float32 or any(bias is not None for bias in biases):
        return False
    return half.size(0) == CHANNELS and half.size(1) % 8 == 0 and _works(half.device, half.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there, tried on small matrices against the passes; says why not on a Hopper GPU."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    # two tiles for a program, the last one not whole, a ring of slots that turns; no random numbers, which are the training's
    waves = (torch.arange(rows * columns, device=device).mul(0.7 + n).sin().view(rows, columns) for n, (rows, columns) in enumerate(SHAPES))
    a, weight, x, gain, seed = *waves, torch.linspace(0.5, 1.5, CHANNELS, device=device), torch.tensor([5], device=device)
    a, weight = a.to(dtype), (weight / 30).to(dtype)
    left, right = 16 * weight, 16 * weight.t().contiguous()

    def pairs():
        alike = [(_product_of(a, right, False, most=2), a @ right), (_product_of(a, left, True, most=2), a @ right)]
        for given, p in ((seed, 0.25), (None, 0.0)):
            ours, apart = _add_norm_of(a, weight, x, gain, given, 1, p, most=2), add_norm(x, a @ weight.t(), given, 1, p, gain, None)
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


def _product_of(a, weight, transposed: bool, most: int = 0):
    from fused_norm_hopper import product

    y = a.new_empty(len(a), CHANNELS)
    product(a.contiguous(), weight.contiguous(), y, transposed, most)
    return y


@operator
def add_norm_of(
    a: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, seed: torch.Tensor | None, site: int, p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """a (N, K), weight (384, K), x (N, 384) float32 -> what add_norm has of x and the branch a weight^T, rounded to a's dtype."""
    return _add_norm_of(a, weight, x, gain, seed, site, p)


@add_norm_of.register_fake
def _(a, weight, x, gain, seed, site, p):
    statistics = x.new_empty(len(x), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32), a.new_empty(x.shape), statistics, torch.empty_like(statistics)


@operator
def product_of(a: torch.Tensor, weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """a (N, K) times weight (K, 384), or `transposed`, (384, K) -> (N, 384), all of one dtype."""
    return _product_of(a, weight, transposed)


product_of.register_fake(lambda a, weight, transposed=False: a.new_empty(len(a), CHANNELS))
