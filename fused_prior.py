"""The log-barrier of prior.py in Triton: many small determinants, and the blocks of the model's own attention, for CUDA. Elsewhere prior.py does it.

    determinants   Gauss-Jordan elimination in registers, one matrix per program, by panels from 64 columns on
    moments        one pass over the keys that a (position, head) pair sees gives Cov(v, k), the mean of v and a_i, straight from the projection's
                   strided output; the same program goes on to I - M_h W_o^h, so that Cov(v, k) is all that is stored for the gradient
    gradients      one program per pair carries d log |det| to the covariance, one per (layer, head, group of sequences) sums what the products of
                   weights get; one per (sequence, head, block of keys) then writes dk and dv, and its part of dq, which a last pass adds up

Each is one launch for all layers, without atomics: two runs agree to the last bit.
Sums, exponentials and determinants have float32's digits. Products are TF32 for half-precision queries, keys and values, which have no more digits.
tests/test_fused_prior.py compares each with float64. Notation as in prior.own_blocks; a pair's e is a channel of v, f one of k, m one of u.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from operators import operator

FORMS = {  # of launches; fewer registers than the compiler would take where more programs at once are worth a few spills
    **{f"elimination of {D}": {"num_warps": 1} for D in (2, 4, 8, 16, 32)},
    "elimination of 64": {"WIDTH": 16, "num_warps": 1},
    "elimination of 128": {"WIDTH": 16, "num_warps": 4},
    "blocks": {"BLOCK": 32, "num_warps": 4, "maxnreg": 128},
    "pairs_backward": {"num_warps": 4, "maxnreg": 128},
    "products_backward": {"num_warps": 8, "maxnreg": 128},
    "moments_backward": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "moments_backward in float32": {"BLOCK": 32, "num_warps": 4, "num_stages": 1},
    "queries_backward": {"num_warps": 1},
}
PANELS = 64  # columns from which the elimination goes by panels
GROUPS = 16  # of sequences, in the gradient of the products of weights
VECTORS = tl.constexpr(5)  # of a pair: mean of v, mean of k, q_i P_k, q_i, v_i - mean of v
SCALARS = tl.constexpr(4)  # log-sum-exp, a_i, a_i - alpha, lambda; the last two without diffusion a_i and 1

# ---------------------------------------------------------------------------------------------------------------------------------
# Determinants


@triton.jit
def _finish(column_of_row, pivots, log_ptr, sign_ptr, D: tl.constexpr):
    """log |det| and its sign, that of the permutation by counting inversions."""
    i = tl.arange(0, D)
    tl.store(log_ptr, tl.sum(tl.log(tl.abs(pivots)), axis=0))
    crossed = (i[:, None] < i[None, :]) & (column_of_row[:, None] > column_of_row[None, :])
    odd = tl.sum(tl.sum(crossed.to(tl.int32), axis=1) + (pivots < 0).to(tl.int32), axis=0) % 2
    tl.store(sign_ptr, 1.0 - 2.0 * odd)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _key(column, free, i):
    """Whose maximum names a free row of a largest |entry| but for 2^-15 of it, the first of equals, by its last byte: 255 - row."""
    return (_bits(column) & 0x7FFFFF00 | 255 - i) & free


@triton.jit
def _from_zero(pivot, floor):
    return tl.where(tl.abs(pivot) < floor, tl.where(pivot < 0, -floor, floor), pivot)


@triton.jit
def _gauss_jordan(matrices, inverses, logs, signs, p, floor, D: tl.constexpr):
    """One p x p matrix per program, in registers: inverse in place with column pivots, log |det| and the determinant's sign. D = 2^k >= p, <= 128."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, D)
    row, column = i[:, None], i[None, :]
    a = tl.load(matrices + n * p * p + row * p + column, mask=(row < p) & (column < p), other=0.0)
    column_of_row = tl.where(i < p, -1, i)  # where row r of the working matrix belongs in the inverse, -1 until it has been a pivot's, and
    row_of_column = i  # where column k does: rows are not moved
    pivots, free = tl.where(i < p, 0.0, 1.0), tl.where(i < p, -1, 0)
    for k in range(p):
        below = tl.sum(tl.where(column == k, a, 0.0), axis=1)  # column k
        r = 255 - (tl.max(_key(below, free, i), axis=0) & 255)
        beside = tl.sum(tl.where(row == r, a, 0.0), axis=0)  # row r
        pivot = _from_zero(tl.sum(tl.where(i == k, beside, 0.0), axis=0), floor)
        scale = 1 / pivot
        beside = tl.where(i == k, 1.0, beside)
        below = tl.where(i == r, scale, -below * scale)
        a = tl.where((column == k) | (row == r), 0.0, a) + below[:, None] * beside[None, :]
        pivots = tl.where(i == k, pivot, pivots)
        free = tl.where(i == r, 0, free)
        column_of_row = tl.where(i == r, k, column_of_row)
        row_of_column = tl.where(i == k, r, row_of_column)
    tl.store(inverses + n * p * p + column_of_row[:, None] * p + row_of_column[None, :], a, mask=(row < p) & (column < p))
    _finish(column_of_row, pivots, logs + n, signs + n, D)


@triton.jit
def _gauss_jordan_by_panels(matrices, inverses, logs, signs, p, floor, D: tl.constexpr, WIDTH: tl.constexpr):
    """The same of the transpose, WIDTH columns at a time: their steps on those columns alone, then products carry them to the other panels.

    A column in place is what its pivot's row has become. Such a row is divided by its pivot at the end only, and its 1 is added at the panel's, so
    that a panel's steps together are a + panel a[pivot rows]; three products of TF32 parts keep float32's digits. The panels go round, the first is
    the one in work, and p is filled up to D with 1s. A gather along rows has its tensor laid out by rows, whole ones per thread, so that a step is
    one reduction and one broadcast within the warp: the gather that changes nothing is there for that, and as the compiler knows `turn`, an entry of
    a row is a register.
    """
    n = tl.program_id(0).to(tl.int64)
    i, c = tl.arange(0, D), tl.arange(0, WIDTH)
    row, column = i[:, None], c[None, :]
    panels = ()
    for base in tl.static_range(0, D, WIDTH):
        to = base + column
        one = tl.where(row == to, 1.0, 0.0)
        panels = panels + (tl.load(matrices + n * p * p + to * p + row, mask=(row < p) & (to < p), other=one),)
    column_of_row, pivots, free = tl.zeros((D,), tl.int32), tl.zeros((D,), tl.float32), tl.full((D,), -1, tl.int32)
    for base in range(0, D, WIDTH):
        panel, rows = tl.gather(panels[0], tl.broadcast_to(row, (D, WIDTH)), 0), tl.zeros((1, WIDTH), tl.int32)
        for turn in tl.static_range(WIDTH):
            now = column == turn
            below = tl.sum(tl.where(now, _bits(panel), 0), axis=1).to(tl.float32, bitcast=True)  # column `turn`; sums of int have no rounding to obey
            r = 255 - (tl.max(_key(below, free, i), axis=0) & 255)
            beside = tl.gather(panel, tl.full((1, WIDTH), r, tl.int32), 0)  # row r
            pivot = _from_zero(tl.sum(tl.sum(tl.where(now, _bits(beside), 0), axis=1), axis=0).to(tl.float32, bitcast=True), floor)
            below = tl.where(i == r, 0.0, below * (-1 / pivot))
            panel = tl.where(now, 0.0, panel) + below[:, None] * tl.where(now, 1.0, beside)
            pivots = tl.where(i == r, pivot, pivots)
            free = tl.where(i == r, 0, free)
            rows = tl.where(now, r, rows)
        others, high = (), (_bits(panel) & -8192).to(tl.float32, bitcast=True)
        for other in tl.static_range(1, D // WIDTH):
            taken = tl.gather(panels[other], tl.broadcast_to(tl.reshape(rows, (WIDTH, 1)), (WIDTH, WIDTH)), 0)
            upper = (_bits(taken) & -8192).to(tl.float32, bitcast=True)
            small = tl.dot(high, taken - upper, acc=tl.dot(panel - high, upper, input_precision="tf32"), input_precision="tf32")
            others = others + (panels[other] + tl.dot(high, upper, acc=small, input_precision="tf32"),)
        mine = row == rows
        panels = others + (panel + tl.where(mine, 1.0, 0.0),)
        column_of_row += tl.sum(tl.where(mine, base + column, 0), axis=1)
    to, scale = column_of_row[:, None], 1 / pivots[:, None]
    for turn in tl.static_range(D // WIDTH):
        rows = tl.sum(tl.where(to == turn * WIDTH + column, row, 0), axis=0)[None, :]
        tl.store(inverses + n * p * p + rows * p + to, panels[turn] * scale, mask=(rows < p) & (to < p))
    _finish(column_of_row, pivots, logs + n, signs + n, D)


def inverse(matrices, floor: float):
    """(N, p, p) float32, p up to 128 -> inverses, log |det| (N,), signs (N,), with no pivot smaller than `floor`."""
    count, p = matrices.shape[:2]
    inverses, logs = torch.empty_like(matrices), matrices.new_empty(count)
    signs, D = torch.empty_like(logs), max(2, triton.next_power_of_2(p))
    kernel = _gauss_jordan_by_panels if D >= PANELS else _gauss_jordan
    kernel[(count,)](matrices, inverses, logs, signs, p, floor, D, **FORMS[f"elimination of {D}"])
    return inverses, logs, signs


# ---------------------------------------------------------------------------------------------------------------------------------
# Blocks of the model's own attention


def applies(q, weight) -> bool:
    """Whether the kernels below take such queries (B, H, T, d) and weights."""
    halves = torch.bfloat16, torch.float16, torch.float32
    return q.is_cuda and q.dtype in halves and weight.dtype == torch.float32 and q.size(-1) in (16, 32, 64)


@triton.jit
def _of(parts, layer):
    """The layer's of a tuple."""
    mine = parts[0]
    for other in tl.static_range(1, len(parts)):
        mine = tl.where(layer == other, parts[other], mine)
    return mine


@triton.jit
def _blocks(qs, ks, vs, products_ptr, positions_ptr, heads_ptr, matrices_ptr, covariances_ptr, vectors_ptr, scalars_ptr,
            B, H, T, n, firsts, alpha, lam, scale, QB, QH, QT, KB, KH, KT, VB, VH, VT,
            CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One pair: online softmax over the keys it sees -> I - M_h W_o^h, Cov(v, k), VECTORS and SCALARS. Heads from a layer's first on diffuse.

    A sequence's last pairs come first: where positions grow with the pairs, the longest programs do.
    """
    sequences = tl.num_programs(0) // n  # of all layers
    which = tl.program_id(0) % sequences
    pair = which.to(tl.int64) * n + n - 1 - tl.program_id(0) // sequences
    layer, sequence = which // B, (which % B).to(tl.int64)
    position, head = tl.load(positions_ptr + pair), tl.load(heads_ptr + pair)
    q_ptr, k_ptr, v_ptr, first = _of(qs, layer), _of(ks, layer), _of(vs, layer), _of(firsts, layer)
    e, j = tl.arange(0, D), tl.arange(0, BLOCK)
    row, column = e[:, None], e[None, :]
    k_ptr += sequence * KB + head * KH
    v_ptr += sequence * VB + head * VH
    q = tl.load(q_ptr + sequence * QB + head * QH + position * QT + e).to(tl.float32)
    end = T
    if CAUSAL:
        end = position.to(tl.int32) + 1
    largest, total = float("-inf"), 0.0
    second = tl.zeros((D, D), tl.float32)
    sum_v, sum_k = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    for start in range(0, end, BLOCK):
        at = start + j
        k = tl.load(k_ptr + at[:, None] * KT + column, mask=at[:, None] < end, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at[:, None] * VT + column, mask=at[:, None] < end, other=0.0).to(tl.float32)
        logits = tl.where(at < end, tl.sum(k * q[None, :], axis=1) * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=0))
        fade, weights = tl.exp(largest - new), tl.exp(logits - new)
        largest, total = new, total * fade + tl.sum(weights, axis=0)
        weighted = v * weights[:, None]
        sum_v, sum_k = sum_v * fade + weighted, sum_k * fade + k * weights[:, None]
        second = tl.dot(tl.trans(weighted), k, acc=second * fade, input_precision=PRECISION)
    y, mean_k = tl.sum(sum_v, axis=0) / total, tl.sum(sum_k, axis=0) / total
    covariance = second / total - y[:, None] * mean_k[None, :]  # (e, f)
    k = tl.load(k_ptr + position * KT + e).to(tl.float32)
    own = tl.exp(tl.sum(k * q, axis=0) * scale - largest) / total
    centred = tl.load(v_ptr + position * VT + e).to(tl.float32) - y

    products_ptr += (layer * H + head) * (3 * D * D) + row * D + column
    u = tl.sum(q[:, None] * tl.load(products_ptr + D * D), axis=0) * scale
    diffuses = head >= first
    coefficient, factor = tl.where(diffuses, own - alpha, own), tl.where(diffuses, lam, 1.0)
    block = tl.dot(covariance, tl.load(products_ptr) * scale, input_precision=PRECISION)
    block += own * centred[:, None] * u[None, :] + coefficient * tl.load(products_ptr + 2 * D * D)
    place = pair * D * D + row * D + column
    tl.store(covariances_ptr + place, covariance)
    tl.store(matrices_ptr + place, tl.where(row == column, 1.0, 0.0) - factor * block)
    vectors_ptr += pair * (VECTORS * D) + e
    tl.store(vectors_ptr, y)
    tl.store(vectors_ptr + D, mean_k)
    tl.store(vectors_ptr + 2 * D, u)
    tl.store(vectors_ptr + 3 * D, q)
    tl.store(vectors_ptr + 4 * D, centred)
    scalars_ptr += pair * SCALARS
    tl.store(scalars_ptr, largest + tl.log(total))
    tl.store(scalars_ptr + 1, own)
    tl.store(scalars_ptr + 2, coefficient)
    tl.store(scalars_ptr + 3, factor)


def _form(kernel: str, half: bool) -> dict:
    return FORMS.get(kernel if half else f"{kernel} in float32", FORMS[kernel]) | {"PRECISION": "tf32" if half else "ieee"}


def _rows(*kinds):
    """(B, H, T, d) tensors of all layers, tuples of those of a kind: with contiguous rows and the same strides in all layers, and these strides."""
    kinds = [tuple(kind) for kind in kinds]
    alike = (kind[0].stride(3) == 1 and len({part.stride() for part in kind}) == 1 for kind in kinds)
    kinds = [kind if good else tuple(part.clone(memory_format=torch.contiguous_format) for part in kind) for kind, good in zip(kinds, alike)]
    return kinds, [stride for kind in kinds for stride in kind[0].stride()[:3]]


def blocks(q, k, v, products, positions, heads, firsts, alpha: float, lam: float, causal: bool):
    """What `margins` eliminates, I - M_h W_o^h (L, B, n, d, d), from its arguments, and the last three of its results."""
    (B, H, T, D), n = q[0].shape, positions.size(2)
    products, positions, heads = products.contiguous(), positions.contiguous(), heads.contiguous()
    matrices, covariances = (products.new_empty(*heads.shape, D, D) for _ in range(2))
    vectors, scalars = products.new_empty(*heads.shape, VECTORS.value, D), products.new_empty(*heads.shape, SCALARS.value)
    parts, strides = _rows(q, k, v)
    _blocks[(heads.numel(),)](
        *parts, products, positions, heads, matrices, covariances, vectors, scalars,
        B, H, T, n, tuple(firsts), alpha, lam, 1 / math.sqrt(D), *strides,
        CAUSAL=causal, D=D, **_form("blocks", q[0].dtype != torch.float32),
    )  # fmt: skip
    return matrices, covariances, vectors, scalars


@operator
def margins(
    q: Sequence[torch.Tensor], k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], products: torch.Tensor, positions: torch.Tensor,
    heads: torch.Tensor, firsts: Sequence[int], alpha: float, lam: float, causal: bool, floor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """log |det(I - M_h W_o^h)| of the pairs of L layers, and the determinant's sign, (L, B, n) each.

    q, k, v: (B, H, T, d) of each layer; products (L, H, 3, d, d): W_q W_o, W_k W_o, W_v W_o of each head; positions, heads (L, B, n) int64; in each
    layer the heads from `firsts` on diffuse. For the gradient also the inverses and Cov(v, k), (L, B, n, d, d) each, and of every pair VECTORS
    (L, B, n, 5, d) and SCALARS (L, B, n, 4).
    """
    matrices, *rest = blocks(q, k, v, products, positions, heads, firsts, alpha, lam, causal)
    inverses, logs, signs = inverse(matrices.flatten(0, 2), floor)
    return logs.view(heads.shape), signs.view(heads.shape), inverses.view(matrices.shape), *rest


@margins.register_fake
def _(q, k, v, products, positions, heads, firsts, alpha, lam, causal, floor):
    d = products.size(-1)
    return tuple(products.new_empty(*heads.shape, *rest) for rest in ((), (), (d, d), (d, d), (VECTORS.value, d), (SCALARS.value,)))


@triton.jit
def _pairs_backward(dlogs_ptr, inverses_ptr, covariances_ptr, vectors_ptr, scalars_ptr, products_ptr, heads_ptr, dcovariances_ptr, dvectors_ptr,
                    dscalars_ptr, per_layer, H, scale, D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One pair: d log |det| -> what `_moments_backward` reads. With w = -lambda dlog, the gradient of M_h W_o^h is w inverse^T, (e, m)."""
    pair, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    down, across = i[:, None] * D + i[None, :], i[None, :] * D + i[:, None]
    products_ptr += (pair // per_layer * H + tl.load(heads_ptr + pair)) * (3 * D * D)
    inverse = tl.load(inverses_ptr + pair * D * D + down)  # (m, e)
    at = vectors_ptr + pair * (VECTORS * D) + i
    y, u, centred = tl.load(at), tl.load(at + 2 * D), tl.load(at + 4 * D)
    own, w = tl.load(scalars_ptr + pair * SCALARS + 1), -tl.load(scalars_ptr + pair * SCALARS + 3) * tl.load(dlogs_ptr + pair)
    dcovariance = w * tl.dot(tl.load(products_ptr + down) * scale, inverse, input_precision=PRECISION)  # (f, e), transposed
    tl.store(dcovariances_ptr + pair * D * D + down, dcovariance)
    inner = tl.sum(tl.sum(dcovariance * tl.load(covariances_ptr + pair * D * D + across), axis=1), axis=0)
    by_u = w * tl.sum(inverse * u[:, None], axis=0)  # (e)
    du = w * own * tl.sum(inverse * centred[None, :], axis=1)  # (m)
    dq = scale * tl.sum(tl.load(products_ptr + D * D + down) * du[None, :], axis=1)  # (f)
    down_own = tl.sum(by_u * centred, axis=0) + w * tl.sum(tl.sum(inverse * tl.load(products_ptr + 2 * D * D + across), axis=1), axis=0)
    dv = own * by_u  # of v_i; of y its negative
    tl.store(dvectors_ptr + pair * (2 * D) + i, dv)
    tl.store(dvectors_ptr + pair * (2 * D) + D + i, dq)
    tl.store(dscalars_ptr + pair * 2, down_own)
    tl.store(dscalars_ptr + pair * 2 + 1, inner - tl.sum(dv * y, axis=0) + own * down_own)  # sum_j a_j da_j


@triton.jit
def _products_backward(dlogs_ptr, inverses_ptr, covariances_ptr, vectors_ptr, scalars_ptr, heads_ptr, dproducts_ptr, per_layer, per, H, scale,
                       D: tl.constexpr, PER: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A group of pairs of one layer, those of one head: the sum for the products of weights, transposed."""
    group, head = tl.program_id(0), tl.program_id(1) % H
    layer = (tl.program_id(1) // H).to(tl.int64)
    i, j = tl.arange(0, D), tl.arange(0, PER)
    down = i[:, None] * D + i[None, :]
    first = layer * per_layer + group * per
    here = (tl.load(heads_ptr + first + j, mask=(j < per) & (group * per + j < per_layer), other=-1) == head).to(tl.int32)
    dp_q, dp_k, dp_v = tl.zeros((D, D), tl.float32), tl.zeros((D, D), tl.float32), tl.zeros((D, D), tl.float32)
    for _ in range(tl.sum(here, axis=0)):
        turn = PER - tl.max(here * (PER - j), axis=0)
        here = tl.where(j == turn, 0, here)
        pair = first + turn
        inverse, covariance = tl.load(inverses_ptr + pair * D * D + down), tl.load(covariances_ptr + pair * D * D + down)  # (m, e), (e, f)
        q, centred = tl.load(vectors_ptr + pair * (VECTORS * D) + 3 * D + i), tl.load(vectors_ptr + pair * (VECTORS * D) + 4 * D + i)
        own, coefficient = tl.load(scalars_ptr + pair * SCALARS + 1), tl.load(scalars_ptr + pair * SCALARS + 2)
        inverse *= -tl.load(scalars_ptr + pair * SCALARS + 3) * tl.load(dlogs_ptr + pair)
        dp_q = tl.dot(inverse * scale, covariance, acc=dp_q, input_precision=PRECISION)  # (m, f)
        dp_k += (scale * own * tl.sum(inverse * centred[None, :], axis=1))[:, None] * q[None, :]
        dp_v += coefficient * inverse
    dproducts_ptr += ((layer * H + head) * tl.num_programs(0) + group) * (3 * D * D) + down
    tl.store(dproducts_ptr, dp_q)
    tl.store(dproducts_ptr + D * D, dp_k)
    tl.store(dproducts_ptr + 2 * D * D, dp_v)


@operator
def margins_backward(
    dlogs: torch.Tensor, inverses: torch.Tensor, covariances: torch.Tensor, vectors: torch.Tensor, scalars: torch.Tensor, products: torch.Tensor,
    heads: torch.Tensor, half: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of log |det| (L, B, n) -> that of the products, and of each pair: dCov^T (L, B, n, d, d), dv_i and dq_i (L, B, n, 2, d), da_i and
    sum_j a_j da_j (L, B, n, 2)."""
    (L, H, _, D, _), pairs = products.shape, heads[0].numel()
    dlogs, products, heads = dlogs.contiguous(), products.contiguous(), heads.contiguous()
    groups, scale = min(GROUPS, pairs), 1 / math.sqrt(D)
    dcovariances, dvectors = torch.empty_like(covariances), vectors.new_empty(*heads.shape, 2, D)
    dscalars, dproducts = scalars.new_empty(*heads.shape, 2), products.new_empty(L, H, groups, 3, D, D)
    given, per = (dlogs, inverses, covariances, vectors, scalars), triton.cdiv(pairs, groups)
    _pairs_backward[(heads.numel(),)](
        *given, products, heads, dcovariances, dvectors, dscalars, pairs, H, scale, D=D, **_form("pairs_backward", half)
    )
    _products_backward[(groups, L * H)](
        *given, heads, dproducts, pairs, per, H, scale, D=D, PER=triton.next_power_of_2(per), **_form("products_backward", half)
    )
    return dproducts.sum(dim=2).mT.contiguous(), dcovariances, dvectors, dscalars


@margins_backward.register_fake
def _(dlogs, inverses, covariances, vectors, scalars, products, heads, half):
    form = {"memory_format": torch.contiguous_format}
    per_pair = (scalars.new_empty(*heads.shape, *rest) for rest in ((2, products.size(-1)), (2,)))
    return torch.empty_like(products, **form), torch.empty_like(covariances), *per_pair


@triton.jit
def _moments_backward(ks, vs, positions_ptr, heads_ptr, vectors_ptr, scalars_ptr, dcovariances_ptr, dvectors_ptr, dscalars_ptr, gradients_ptr,
                      sums_ptr, B, H, T, n, scale, KB, KH, KT, VB, VH, VT,
                      CAUSAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A block of keys of one (sequence, head): its rows of dk and dv from all pairs there, 0 for those of dq, and what each pair's dq gets."""
    which, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    layer, sequence = tl.program_id(0) // H // B, which % B
    e, t, j = tl.arange(0, D), tl.arange(0, N), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column, live = e[None, :], (j < T)[:, None]
    positions = tl.load(positions_ptr + which * n + t, mask=t < n, other=0).to(tl.int32)
    here = (tl.load(heads_ptr + which * n + t, mask=t < n, other=-1) == head).to(tl.int32)
    if CAUSAL:
        here = tl.where(positions >= tl.program_id(1) * BLOCK, here, 0)
    k_ptr, v_ptr = _of(ks, layer) + sequence * KB + head * KH, _of(vs, layer) + sequence * VB + head * VH
    dk, dv = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    for _ in range(tl.sum(here, axis=0)):
        turn = N - tl.max(here * (N - t), axis=0)
        here = tl.where(t == turn, 0, here)
        pair, position = which * n + turn, tl.sum(tl.where(t == turn, positions, 0), axis=0)
        vectors = vectors_ptr + pair * (VECTORS * D) + e
        y, mean_k, q = tl.load(vectors), tl.load(vectors + D), tl.load(vectors + 3 * D)
        of_v = tl.load(dvectors_ptr + pair * (2 * D) + e)
        dcovariance = tl.load(dcovariances_ptr + pair * (D * D) + e[:, None] * D + column)  # (f, e)
        k = tl.load(k_ptr + j[:, None] * KT + column, mask=live, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + j[:, None] * VT + column, mask=live, other=0.0).to(tl.float32)
        a = tl.exp(tl.sum(k * q[None, :], axis=1) * scale - tl.load(scalars_ptr + pair * SCALARS))
        a = tl.where((j <= position) if CAUSAL else (j < T), a, 0.0)
        own = j == position
        by_v = tl.dot(v - y[None, :], tl.trans(dcovariance), input_precision=PRECISION)  # (j, f)
        da = tl.sum(by_v * (k - mean_k[None, :]) - v * of_v[None, :], axis=1) + tl.where(own, tl.load(dscalars_ptr + pair * 2), 0.0)
        dlogits = a * (da - tl.load(dscalars_ptr + pair * 2 + 1)) * scale
        dk += a[:, None] * by_v + dlogits[:, None] * q[None, :]
        tl.store(sums_ptr + (pair * tl.num_programs(1) + tl.program_id(1)) * D + e, tl.sum(dlogits[:, None] * k, axis=0))
        by_k = tl.dot(k - mean_k[None, :], dcovariance, input_precision=PRECISION)  # (j, e)
        dv += a[:, None] * by_k + (tl.where(own, 1.0, 0.0) - a)[:, None] * of_v[None, :]
    kind = (tl.num_programs(0) * T).to(tl.int64) * D  # all of q's
    gradients_ptr += ((which * T + j[:, None]) * H + head) * D + column
    tl.store(gradients_ptr, tl.zeros((BLOCK, D), tl.float32), mask=live)
    tl.store(gradients_ptr + kind, dk, mask=live)
    tl.store(gradients_ptr + 2 * kind, dv, mask=live)


@triton.jit
def _queries_backward(positions_ptr, heads_ptr, dvectors_ptr, sums_ptr, gradients_ptr, H, T, n, parts,
                      CAUSAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One pair's row of dq, the sum over key blocks; a pair may be there twice, and both then write what both get."""
    pair, e, t = tl.program_id(0).to(tl.int64), tl.arange(0, D), tl.arange(0, N)
    which, position, head = pair // n, tl.load(positions_ptr + pair), tl.load(heads_ptr + pair)
    among = which * n + t
    same = (tl.load(positions_ptr + among, mask=t < n, other=-1) == position) & (tl.load(heads_ptr + among, mask=t < n, other=-1) == head)
    among, same = among[:, None], same[:, None]
    dq = tl.load(dvectors_ptr + among * (2 * D) + D + e[None, :], mask=same, other=0.0)
    for part in range((position.to(tl.int32) // BLOCK + 1) if CAUSAL else parts):
        dq += tl.load(sums_ptr + (among * parts + part) * D + e[None, :], mask=same, other=0.0)
    tl.store(gradients_ptr + ((which * T + position) * H + head) * D + e, tl.sum(dq, axis=0))


@operator
def moments_backward(
    k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], positions: torch.Tensor, heads: torch.Tensor, vectors: torch.Tensor, scalars: torch.Tensor,
    dcovariances: torch.Tensor, dvectors: torch.Tensor, dscalars: torch.Tensor, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Gradients of all q, of all k and of all v, (3, L, B, T, H, d) in their dtype, from what `margins_backward` gives."""
    (B, H, T, D), n, L = k[0].shape, positions.size(2), len(k)
    positions, heads = positions.contiguous(), heads.contiguous()
    parts, strides = _rows(k, v)
    form = _form("moments_backward", k[0].dtype != torch.float32)
    count, shape = triton.cdiv(T, form["BLOCK"]), {"CAUSAL": causal, "D": D, "N": triton.next_power_of_2(n)}
    gradients, sums = k[0].new_empty(3, L, B, T, H, D), vectors.new_empty(L, B, n, count, D)
    given = (positions, heads, vectors, scalars, dcovariances, dvectors, dscalars)
    _moments_backward[(L * B * H, count)](*parts, *given, gradients, sums, B, H, T, n, 1 / math.sqrt(D), *strides, **shape, **form)
    _queries_backward[(heads.numel(),)](
        positions, heads, dvectors, sums, gradients, H, T, n, count, **shape, BLOCK=form["BLOCK"], **FORMS["queries_backward"]
    )
    return gradients


@moments_backward.register_fake
def _(k, v, positions, heads, vectors, scalars, dcovariances, dvectors, dscalars, causal):
    B, H, T, D = k[0].shape
    return k[0].new_empty(3, len(k), B, T, H, D)


class _Margins(torch.autograd.Function):
    @staticmethod
    def forward(ctx, products, positions, heads, firsts, alpha, lam, causal, floor, *qkv):
        q, k, v = qkv[: len(firsts)], qkv[len(firsts) : 2 * len(firsts)], qkv[2 * len(firsts) :]
        logs, signs, *parts = margins(q, k, v, products, positions, heads, firsts, alpha, lam, causal, floor)
        negative = signs < 0
        ctx.save_for_backward(products, positions, heads, *parts, *k, *v)
        ctx.layers, ctx.causal = len(firsts), causal
        ctx.mark_non_differentiable(negative)
        return logs, negative

    @staticmethod
    def backward(ctx, dlogs, _):
        products, positions, heads, inverses, covariances, vectors, scalars, *kv = ctx.saved_tensors
        half = kv[0].dtype != torch.float32
        dproducts, *of_pairs = margins_backward(dlogs, inverses, covariances, vectors, scalars, products, heads, half)
        gradients = [None] * (3 * ctx.layers)
        if any(ctx.needs_input_grad[8:]):
            gradients = moments_backward(kv[: ctx.layers], kv[ctx.layers :], positions, heads, vectors, scalars, *of_pairs, ctx.causal)
            gradients = gradients.transpose(3, 4).flatten(0, 1).unbind()
        return dproducts, *[None] * 7, *gradients


def own_margins(attentions, taps, positions, heads, floor: float):
    """prior.own_margins of L layers at once: CausalSelfAttention modules, their (q, k, v), and (L, B, n) pairs. Outside autocast."""
    d, layers = taps[0][0].size(3), len(taps)
    H = taps[0][0].size(1)
    w = torch.stack([attention.c_attn.weight for attention in attentions]).view(layers, 3, H, d, H * d).transpose(1, 2).flatten(2, 3)
    w_o = torch.stack([attention.c_proj.weight for attention in attentions]).view(layers, H * d, H, d).transpose(1, 2)
    products = (w @ w_o).unflatten(2, (3, d))  # (L, H, 3, d, d)
    firsts, one = [H - attention.diffusing_heads for attention in attentions], attentions[0]  # of which all have alpha, lambda and causality
    qkv = (part for kind in zip(*taps) for part in kind)
    return _Margins.apply(products, positions, heads, firsts, float(one.alpha), float(one.lam), one.causal, floor, *qkv)
