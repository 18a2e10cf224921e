"""Attention for half precision on CUDA: the projection's packed output in, its packed gradient out, a diffusing head's subtraction inside.

Over 64 to 256 tokens most of the time of the framework's kernels goes into what lies around the products: gradients copied between layouts, an
accumulator of dq in float32, a pass for dO O. Here, in Triton, a program reads its queries, keys and values from (B, T, 3, H, d) and writes dq, dk
and dv there; dropout's decisions are computed in both directions (dropout.py) and never stored; a diffusing head gives lambda (y - alpha v) in the
pass that has v at hand. Where one block holds the whole sequence, the way back has all of a row of A at hand and needs no y. Longer sequences take
the same way on Hopper GPUs, by fused_attention_hopper.py; elsewhere the framework's kernels are ahead. Nothing is summed by atomics, so that two
runs agree to the last bit.

Softmax and sums are in float32, products of half-precision matrices in float32 as well. tests/test_fused_attention.py compares with float64.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from dropout import decisions_of_product, threshold
from operators import operator, trusted
from place import processors

FORWARD, BACKWARD = (64, 4, 2), (64, 4, 2)  # queries, and keys, at a time; warps; loads in flight
LONGEST = 256  # tokens of a sequence for the kernels in Triton
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(i, T, e, width):
    """Offsets (rows, d) of rows i of a (T, width) matrix, and which rows there are."""
    return i[:, None].to(tl.int64) * width + e[None, :], (i < T)[:, None]


@triton.jit
def _allowed(i, j, T, CAUSAL: tl.constexpr):
    """Which keys j a query i sees."""
    if CAUSAL:
        return (j < T)[None, :] & (j[None, :] <= i[:, None])
    return tl.broadcast_to((j < T)[None, :], (i.shape[0], j.shape[0]))


@triton.jit
def _kept(seed_ptr, site, which, i, start, T, least, BLOCK: tl.constexpr):
    """Dropout's decisions for queries i and the keys from `start` on, of sequence and head `which`."""
    return decisions_of_product(tl.load(seed_ptr), site, which * T + i, start // 8 + tl.arange(0, BLOCK // 8), T, least, BLOCK, BLOCK // 8)


@triton.jit(do_not_specialize=["site"])
def _attend(qkv_ptr, seed_ptr, site, least, y_ptr, out_ptr, lse_ptr, T, H, alpha, lam, factor, scale, FIRST: tl.constexpr, DIFFUSES: tl.constexpr,
            CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block of queries of one (sequence, head). With WHOLE, where there is one block, y itself is not kept where another takes its place."""
    blocks = tl.cdiv(T, BLOCK)
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sequence, head = (which // H).to(tl.int64), which % H
    width = H * D
    i, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    qkv_ptr += sequence * T * (3 * width) + head * D
    place, live = _rows(i, T, e, 3 * width)
    q = tl.load(qkv_ptr + place, mask=live, other=0.0)
    largest, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK, D), tl.float32)
    end = T
    if WHOLE:
        end = BLOCK
    elif CAUSAL:
        end = tl.minimum((block + 1) * BLOCK, T)
    for start in range(0, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there, present = _rows(j, T, e, 3 * width)
        k, v = tl.load(qkv_ptr + width + there, mask=present, other=0.0), tl.load(qkv_ptr + 2 * width + there, mask=present, other=0.0)
        logits = tl.where(_allowed(i, j, T, CAUSAL), tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E), float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=1))
        p, fade = tl.exp2(logits - new[:, None]), tl.exp2(largest - new)
        largest, total = new, total * fade + tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(_kept(seed_ptr, site, which, i, start, T, least, BLOCK), p, 0.0)
        y = tl.dot(p.to(v.dtype), v, acc=y * fade[:, None], input_precision="ieee")
    y = y * (factor / total)[:, None]
    at, _ = _rows(i, T, e, width)
    at += sequence * T * width + head * D
    if not (DIFFUSES and WHOLE):
        tl.store(y_ptr + at, y, mask=live)
    tl.store(lse_ptr + which.to(tl.int64) * T + i, largest + tl.log2(total), mask=i < T)
    if DIFFUSES:
        if head >= FIRST:
            y = lam * (y - alpha * tl.load(qkv_ptr + 2 * width + place, mask=live, other=0.0).to(tl.float32))
        tl.store(out_ptr + at, y, mask=live)


@triton.jit
def _pair(q, k, v, dy, lse, seed_ptr, site, least, which, i, start, T, factor, scale, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Queries i and the block of keys from `start` on: (A, A after dropout in the dtype of q, gradient of A), each (queries, keys)."""
    j = start + tl.arange(0, BLOCK)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    p = tl.where(_allowed(i, j, T, CAUSAL), tl.exp2(logits - lse[:, None]), 0.0)
    da = tl.dot(dy, tl.trans(v), input_precision="ieee")
    a = p
    if DROPOUT:
        kept = _kept(seed_ptr, site, which, i, start, T, least, BLOCK)
        a, da = tl.where(kept, p * factor, 0.0), tl.where(kept, da * factor, 0.0)
    return p, a.to(q.dtype), da


@triton.jit
def _queries(qkv_ptr, dout_ptr, sequence, head, i, T, H, lam, FIRST: tl.constexpr, D: tl.constexpr):
    """q and the gradient of y of rows i."""
    e, width = tl.arange(0, D), H * D
    place, live = _rows(i, T, e, 3 * width)
    at, _ = _rows(i, T, e, width)
    at += sequence * T * width + head * D
    q = tl.load(qkv_ptr + place, mask=live, other=0.0)
    dy = tl.load(dout_ptr + at, mask=live, other=0.0)
    if head >= FIRST:
        dy = (dy.to(tl.float32) * lam).to(dy.dtype)
    return q, dy


@triton.jit(do_not_specialize=["site"])
def _attend_whole_backward(qkv_ptr, seed_ptr, site, least, dout_ptr, lse_ptr, dqkv_ptr, n, T, H, alpha, lam, factor, scale, FIRST: tl.constexpr,
                           CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dq, dk and dv where one block holds a sequence, for some of the n heads of all sequences; with more stages than one the next are on their way
    meanwhile. What delta = dy y is comes from the rows of A: no y is read."""
    i, e, width = tl.arange(0, BLOCK), tl.arange(0, D), H * D
    for turn in range(tl.cdiv(n - tl.program_id(0), tl.num_programs(0))):
        which = tl.program_id(0) + turn * tl.num_programs(0)
        sequence, head = (which // H).to(tl.int64), which % H
        place, live = _rows(i, T, e, 3 * width)
        place += sequence * T * (3 * width) + head * D
        q, dy = _queries(qkv_ptr + sequence * T * (3 * width) + head * D, dout_ptr, sequence, head, i, T, H, lam, FIRST, D)
        k, v = tl.load(qkv_ptr + width + place, mask=live, other=0.0), tl.load(qkv_ptr + 2 * width + place, mask=live, other=0.0)
        lse = tl.load(lse_ptr + which.to(tl.int64) * T + i, mask=i < T, other=0.0)
        p, a, da = _pair(q, k, v, dy, lse, seed_ptr, site, least, which, i, 0, T, factor, scale, CAUSAL, DROPOUT, BLOCK)
        ds = (p * (da - tl.sum(p * da, axis=1)[:, None]) * scale).to(q.dtype)
        dq, dk = tl.dot(ds, k, input_precision="ieee"), tl.dot(tl.trans(ds), q, input_precision="ieee")
        dv = tl.dot(tl.trans(a), dy, input_precision="ieee")
        if head >= FIRST:
            dv -= alpha * dy.to(tl.float32)
        tl.store(dqkv_ptr + place, dq, mask=live)
        tl.store(dqkv_ptr + width + place, dk, mask=live)
        tl.store(dqkv_ptr + 2 * width + place, dv, mask=live)


@triton.jit(do_not_specialize=["site"])
def _attend_queries_backward(qkv_ptr, seed_ptr, site, least, y_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, T, H, alpha, lam, factor, scale,
                             FIRST: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dq of a block of queries, and delta = dy y."""
    blocks = tl.cdiv(T, BLOCK)
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sequence, head = (which // H).to(tl.int64), which % H
    width = H * D
    i, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    qkv_ptr += sequence * T * (3 * width) + head * D
    dqkv_ptr += sequence * T * (3 * width) + head * D
    place, live = _rows(i, T, e, 3 * width)
    q, dy = _queries(qkv_ptr, dout_ptr, sequence, head, i, T, H, lam, FIRST, D)
    lse = tl.load(lse_ptr + which.to(tl.int64) * T + i, mask=i < T, other=0.0)
    at, _ = _rows(i, T, e, width)
    y = tl.load(y_ptr + sequence * T * width + head * D + at, mask=live, other=0.0).to(tl.float32)
    delta = tl.sum(dy.to(tl.float32) * y, axis=1)
    tl.store(delta_ptr + which.to(tl.int64) * T + i, delta, mask=i < T)
    dq = tl.zeros((BLOCK, D), tl.float32)
    end = T
    if CAUSAL:
        end = tl.minimum((block + 1) * BLOCK, T)
    for start in range(0, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there, present = _rows(j, T, e, 3 * width)
        k, v = tl.load(qkv_ptr + width + there, mask=present, other=0.0), tl.load(qkv_ptr + 2 * width + there, mask=present, other=0.0)
        p, a, da = _pair(q, k, v, dy, lse, seed_ptr, site, least, which, i, start, T, factor, scale, CAUSAL, DROPOUT, BLOCK)
        ds = (p * (da - delta[:, None]) * scale).to(q.dtype)
        dq = tl.dot(ds, k, acc=dq, input_precision="ieee")
    tl.store(dqkv_ptr + place, dq, mask=live)


@triton.jit(do_not_specialize=["site"])
def _attend_keys_backward(qkv_ptr, seed_ptr, site, least, y_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, T, H, alpha, lam, factor, scale,
                          FIRST: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dk and dv of a block of keys."""
    blocks = tl.cdiv(T, BLOCK)
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sequence, head = (which // H).to(tl.int64), which % H
    width = H * D
    j, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    qkv_ptr += sequence * T * (3 * width) + head * D
    dqkv_ptr += sequence * T * (3 * width) + head * D
    place, live = _rows(j, T, e, 3 * width)
    k, v = tl.load(qkv_ptr + width + place, mask=live, other=0.0), tl.load(qkv_ptr + 2 * width + place, mask=live, other=0.0)
    dk, dv = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    first = 0
    if CAUSAL:
        first = block * BLOCK
    for start in range(first, T, BLOCK):
        i = start + tl.arange(0, BLOCK)
        q, dy = _queries(qkv_ptr, dout_ptr, sequence, head, i, T, H, lam, FIRST, D)
        lse = tl.load(lse_ptr + which.to(tl.int64) * T + i, mask=i < T, other=0.0)
        delta = tl.load(delta_ptr + which.to(tl.int64) * T + i, mask=i < T, other=0.0)
        p, a, da = _pair(q, k, v, dy, lse, seed_ptr, site, least, which, i, block * BLOCK, T, factor, scale, CAUSAL, DROPOUT, BLOCK)
        ds = (p * (da - delta[:, None]) * scale).to(q.dtype)
        dv = tl.dot(tl.trans(a), dy, acc=dv, input_precision="ieee")
        dk = tl.dot(tl.trans(ds), q, acc=dk, input_precision="ieee")
    if head >= FIRST:
        _, dy = _queries(qkv_ptr, dout_ptr, sequence, head, j, T, H, lam, FIRST, D)
        dv -= alpha * dy.to(tl.float32)
    tl.store(dqkv_ptr + width + place, dk, mask=live)
    tl.store(dqkv_ptr + 2 * width + place, dv, mask=live)


def applies(T: int, d: int, causal: bool, dropout: float, long: bool) -> bool:
    """Whether these kernels take such sequences and heads. `long`: what `takes_long` says of the device."""
    return T <= LONGEST and d in (16, 32, 64, 128) or long and causal and not dropout and d == 64 and T % 128 == 0


@functools.cache
def takes_long(device: torch.device, dtype: torch.dtype, diffuses: bool) -> bool:
    """Whether sequences longer than LONGEST run there, with diffusing heads or without: tried on a small one, with two programs for all tiles; says
    why not on a Hopper GPU."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    # several tiles for each program, several blocks, a head of each kind; no random numbers, which are the training's
    qkv, dout = (torch.arange(384 * width, device=device).mul(0.7).sin().mul(2).to(dtype).view(1, 384, width) for width in (384, 128))
    form = 2, 0.7, 1.3, int(diffuses)

    def pairs():
        y, out, lse = _forward_long(qkv, *form, most=2)
        gradients = _backward_long(dout, qkv, y, lse, *form, most=2), _backward(dout, qkv, y, lse, None, 0, 0.0, *form, True)
        return *zip((y, out, lse), _forward(qkv, None, 0, 0.0, *form, True)), gradients

    return trusted(pairs, "attention over long sequences is the framework's")


def _whole(T: int) -> bool:
    """Whether one block holds the whole sequence."""
    return T <= BACKWARD[0]


def _ahead(device: torch.device, d: int) -> bool:
    """Whether a multiprocessor has room for two programs with what they need for two heads more, 105 KB each (on a CPU the loop is what counts)."""
    return d <= 64 and (device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0))


def _form(qkv, p: float, n_head: int, heads: int, causal: bool, tile: tuple[int, int, int]) -> tuple[tuple[int], dict]:
    """Grid, of one axis since only the first may be longer than 65,535, and constants of the launches."""
    (B, T, C3), (block, warps, stages) = qkv.shape, tile
    form = {"FIRST": n_head - heads, "CAUSAL": causal, "DROPOUT": p > 0, "D": C3 // 3 // n_head, "BLOCK": block}
    return (B * n_head * triton.cdiv(T, block),), form | {"num_warps": warps, "num_stages": stages}


def _long(qkv, p: float, n_head: int, heads: int, causal: bool) -> bool:
    """Whether it is for Hopper's kernels."""
    T, d = qkv.size(1), qkv.size(2) // 3 // n_head
    return T > LONGEST and applies(T, d, causal, p, True) and takes_long(qkv.device, qkv.dtype, heads > 0)


def _results(qkv, n_head: int, heads: int):
    """Where `attend` leaves its results."""
    B, T, C3 = qkv.shape
    shape, nothing = (B, T, C3 // 3), (0,)
    y, out = qkv.new_empty(nothing if heads and _whole(T) else shape), qkv.new_empty(shape if heads else nothing)
    return y, out, torch.empty(B, n_head, T, dtype=torch.float32, device=qkv.device)


def _forward(qkv, seed, site: int, p: float, n_head: int, alpha: float, lam: float, heads: int, causal: bool):
    y, out, lse = _results(qkv, n_head, heads)
    grid, form = _form(qkv, p, n_head, heads, causal, FORWARD)
    T, numbers = qkv.size(1), (alpha, lam, 1 / (1 - p), 1 / math.sqrt(form["D"]))
    _attend[grid](qkv, seed, site, threshold(p), y, out, lse, T, n_head, *numbers, DIFFUSES=heads > 0, WHOLE=_whole(T), **form)
    return y, out, lse


def _backward(dout, qkv, y, lse, seed, site: int, p: float, n_head: int, alpha: float, lam: float, heads: int, causal: bool):
    grid, form = _form(qkv, p, n_head, heads, causal, BACKWARD)
    T, numbers = qkv.size(1), (alpha, lam, 1 / (1 - p), 1 / math.sqrt(form["D"]))
    dqkv, drop = torch.empty_like(qkv), (seed, site, threshold(p))
    fewer = {"maxnreg": 168} if form["D"] <= 64 else {}  # three programs on a multiprocessor; with dropout it would take registers until two fit
    if _whole(T):
        ahead = _ahead(qkv.device, form["D"])
        programs = (min(grid[0], 2 * processors(qkv.device)),) if ahead else grid
        form |= {"num_stages": 3} if ahead else {"num_stages": 1} | fewer
        _attend_whole_backward[programs](qkv, *drop, dout, lse, dqkv, grid[0], T, n_head, *numbers, **form)
        return dqkv
    given = (qkv, *drop, y, dout, lse, torch.empty_like(lse), dqkv, T, n_head, *numbers)
    _attend_queries_backward[grid](*given, **form, **fewer)
    _attend_keys_backward[grid](*given, **form)
    return dqkv


def _forward_long(qkv, n_head: int, alpha: float, lam: float, heads: int, most: int = 0):
    import fused_attention_hopper

    results = _results(qkv, n_head, heads)
    fused_attention_hopper.forward(qkv, *results, n_head, alpha, lam, heads, most)
    return results


def _backward_long(dout, qkv, y, lse, n_head: int, alpha: float, lam: float, heads: int, most: int = 0):
    import fused_attention_hopper

    dqkv = torch.empty_like(qkv)
    fused_attention_hopper.backward(dout, qkv, y, lse, torch.empty_like(lse), dqkv, n_head, alpha, lam, heads, most)
    return dqkv


@operator
def attend(
    qkv: torch.Tensor, seed: torch.Tensor | None, site: int, p: float, n_head: int, alpha: float, lam: float, heads: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, T, 3 C) -> y (B, T, C); what the last `heads` heads turn it into, lambda (y - alpha v) (empty without such heads); log-sum-exp (B, H, T),
    to base 2. With such heads y is empty where one block holds the sequence, whose way back does not read it.

    A has dropout with probability p by the decisions of `site` under the seed, int64 (1,), for a matrix (B H T, T); None where p is 0."""
    qkv = qkv.contiguous()
    if _long(qkv, p, n_head, heads, causal):
        return _forward_long(qkv, n_head, alpha, lam, heads)
    return _forward(qkv, seed, site, p, n_head, alpha, lam, heads, causal)


attend.register_fake(lambda qkv, seed, site, p, n_head, alpha, lam, heads, causal: _results(qkv, n_head, heads))


@operator
def attend_backward(
    dout: torch.Tensor, qkv: torch.Tensor, y: torch.Tensor | None, lse: torch.Tensor, seed: torch.Tensor | None, site: int, p: float, n_head: int,
    alpha: float, lam: float, heads: int, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """The gradient of `qkv` from that of what `attend` gives, (B, T, C). y may be None where one block holds the sequence."""
    dout, qkv = dout.contiguous(), qkv.contiguous()
    if _long(qkv, p, n_head, heads, causal):
        return _backward_long(dout, qkv, y, lse, n_head, alpha, lam, heads)
    return _backward(dout, qkv, y, lse, seed, site, p, n_head, alpha, lam, heads, causal)


@attend_backward.register_fake
def _(dout, qkv, y, lse, seed, site, p, n_head, alpha, lam, heads, causal):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


class PackedAttention(torch.autograd.Function):
    """(B, T, 3 C) -> (B, T, C): attention of all heads, the last `heads` of them lambda (A - alpha I) v; seed, site and p as in `attend`."""

    @staticmethod
    def forward(ctx, qkv, seed, site, p, *form):
        y, out, lse = attend(qkv, seed, site, p, *form)
        ctx.save_for_backward(qkv, None if _whole(qkv.size(1)) else y, lse, seed)
        ctx.form = site, p, *form
        return out if form[3] else y

    @staticmethod
    def backward(ctx, dout):
        return attend_backward(dout, *ctx.saved_tensors, *ctx.form), *[None] * 8
