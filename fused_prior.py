"""The log-barrier of prior.py in Triton: many small determinants, and the blocks of the model's own attention, for CUDA. Elsewhere prior.py does it.

    determinants   Gauss-Jordan elimination in registers, one matrix per program, by panels from 64 columns on
    moments        one pass over the keys that a (position, head) pair sees gives Cov(v, k), the mean of v and a_i, straight from the projection's
                   strided output; the same program goes on to I - M_h W_o^h, so that Cov(v, k) is all that is stored for the gradient
    gradients      one program per (layer, head, group of sequences) carries d log |det| to the covariances and sums what the products of weights
                   get; one per (sequence, head) then writes dq, dk and dv, whole rows, without atomics: two runs agree to the last bit

Sums, exponentials and determinants have float32's digits. Products are TF32 for half-precision queries, keys and values, which have no more digits.
tests/test_fused_prior.py compares each with float64. Notation as in prior.own_blocks; a pair's e is a channel of v, f one of k, m one of u.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from operators import operator

FORMS = {  # of launches; fewer registers than the compiler would take, for a few spills: all programs of a step's launch are there at once
    **{f"elimination of {D}": {"num_warps": 1} for D in (2, 4, 8, 16, 32)},
    "elimination of 64": {"WIDTH": 16, "num_warps": 1},
    "elimination of 128": {"WIDTH": 16, "num_warps": 8},
    "blocks": {"BLOCK": 32, "num_warps": 4, "maxnreg": 128},
    "margins_backward": {"num_warps": 8},
    "moments_backward": {"BLOCK": 32, "num_warps": 4, "maxnreg": 168},
}
PANELS = 64  # columns from which the elimination goes by panels
GROUPS = 8  # of sequences, in the gradient of the products of weights
VECTORS = tl.constexpr(5)  # of a pair: mean of v, mean of k, q_i P_k, q_i, v_i - mean of v
SCALARS = tl.constexpr(4)  # log-sum-exp, a_i, a_i - alpha, lambda; the last two without diffusion a_i and 1

# ---------------------------------------------------------------------------------------------------------------------------------
# Determinants


@triton.jit
def _pivot(below, free, i, floor):
    """The row of the largest |entry| among those that are free, and that entry, not below `floor`: one reduction, as floats > 0 order as bits do."""
    key = (tl.abs(below).to(tl.int32, bitcast=True).to(tl.int64) << 8) | ((127 - i) * 2 + (below < 0).to(tl.int32))
    best = tl.max(tl.where(free, key, -1), axis=0)
    size = (best >> 8).to(tl.int32).to(tl.float32, bitcast=True)
    size = tl.where(size < floor, floor, size)
    return 127 - ((best & 255) >> 1).to(tl.int32), tl.where((best & 1) == 1, -size, size)


@triton.jit
def _finish(a, column_of_row, row_of_column, pivots, inverse_ptr, log_ptr, sign_ptr, p, D: tl.constexpr):
    """Stores the inverse with its rows and columns in their places, log |det| and the sign, that of the permutation by counting inversions."""
    i = tl.arange(0, D)
    row, column = i[:, None], i[None, :]
    tl.store(inverse_ptr + column_of_row[:, None] * p + row_of_column[None, :], a, mask=(row < p) & (column < p))
    tl.store(log_ptr, tl.sum(tl.log(tl.abs(pivots)), axis=0))
    crossed = tl.sum(tl.sum(((row < column) & (column_of_row[:, None] > column_of_row[None, :])).to(tl.int32), axis=1), axis=0)
    tl.store(sign_ptr, tl.where((crossed + tl.sum((pivots < 0).to(tl.int32), axis=0)) % 2 == 1, -1.0, 1.0))


@triton.jit
def _gauss_jordan(matrices, inverses, logs, signs, p, floor, D: tl.constexpr):
    """One p x p matrix per program, in registers: inverse in place with column pivots, log |det| and the determinant's sign. D = 2^k >= p, <= 128."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, D)
    row, column = i[:, None], i[None, :]
    a = tl.load(matrices + n * p * p + row * p + column, mask=(row < p) & (column < p), other=0.0)
    column_of_row = tl.where(i < p, -1, i)  # where row r of the working matrix belongs in the inverse, -1 until it has been a pivot's, and
    row_of_column = i  # where column k does: rows are not moved
    pivots = tl.where(i < p, 0.0, 1.0)
    for k in range(p):
        below = tl.sum(tl.where(column == k, a, 0.0), axis=1)  # column k
        r, pivot = _pivot(below, column_of_row < 0, i, floor)
        scale = 1 / pivot
        beside = tl.sum(tl.where(row == r, a, 0.0), axis=0)  # row r
        beside = tl.where(i == k, 1.0, beside)
        below = tl.where(i == r, scale, -below * scale)
        a = tl.where((column == k) | (row == r), 0.0, a) + below[:, None] * beside[None, :]
        pivots = tl.where(i == k, pivot, pivots)
        column_of_row = tl.where(i == r, k, column_of_row)
        row_of_column = tl.where(i == k, r, row_of_column)
    _finish(a, column_of_row, row_of_column, pivots, inverses + n * p * p, logs + n, signs + n, p, D)


@triton.jit
def _gauss_jordan_by_panels(matrices, inverses, logs, signs, p, floor, D: tl.constexpr, WIDTH: tl.constexpr):
    """The same, WIDTH columns at a time: their steps on those columns alone, then one product carries them to the others.

    A column in place is what its pivot's row has become, so the panel's steps together are a_rest + panel a_rest[pivot rows], with those rows 0 in
    a_rest. Three products of TF32 parts keep float32's digits, at a third of the instructions of the steps on the whole matrix.
    """
    n = tl.program_id(0).to(tl.int64)
    i, c = tl.arange(0, D), tl.arange(0, WIDTH)
    row, column = i[:, None], i[None, :]
    a = tl.load(matrices + n * p * p + row * p + column, mask=(row < p) & (column < p), other=0.0)
    column_of_row, row_of_column, pivots = tl.where(i < p, -1, i), i, tl.where(i < p, 0.0, 1.0)
    for base in range(0, p, WIDTH):
        mine = (tl.arange(0, D // WIDTH) == base // WIDTH)[None, :, None]
        panel = tl.sum(tl.where(mine, tl.reshape(a, (D, D // WIDTH, WIDTH)), 0.0), axis=1)
        rows = tl.zeros((WIDTH,), tl.int32)
        for turn in range(0, tl.minimum(WIDTH, p - base)):
            below = tl.sum(tl.where(c[None, :] == turn, panel, 0.0), axis=1)
            r, pivot = _pivot(below, column_of_row < 0, i, floor)
            scale = 1 / pivot
            beside = tl.sum(tl.where(row == r, panel, 0.0), axis=0)
            beside = tl.where(c == turn, 1.0, beside)
            below = tl.where(i == r, scale, -below * scale)
            panel = tl.where((c[None, :] == turn) | (row == r), 0.0, panel) + below[:, None] * beside[None, :]
            pivots = tl.where(i == base + turn, pivot, pivots)
            column_of_row = tl.where(i == r, base + turn, column_of_row)
            row_of_column = tl.where(i == base + turn, r, row_of_column)
            rows = tl.where(c == turn, r, rows)
        taken = tl.gather(a, tl.broadcast_to(rows[:, None], (WIDTH, D)), 0)
        used = (column_of_row >= base) & (column_of_row < base + WIDTH)
        a = tl.dot(panel, taken, acc=tl.where(used[:, None], 0.0, a), input_precision="tf32x3")
        wide = tl.reshape(tl.broadcast_to(panel[:, None, :], (D, D // WIDTH, WIDTH)), (D, D))
        a = tl.where(column // WIDTH == base // WIDTH, wide, a)
    _finish(a, column_of_row, row_of_column, pivots, inverses + n * p * p, logs + n, signs + n, p, D)


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
def _blocks(q_ptr, k_ptr, v_ptr, products_ptr, positions_ptr, heads_ptr, matrices_ptr, covariances_ptr, vectors_ptr, scalars_ptr,
            T, n, first, alpha, lam, scale, QB, QH, QT, KB, KH, KT, VB, VH, VT,
            CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One pair: online softmax over the keys it sees -> I - M_h W_o^h, Cov(v, k), VECTORS and SCALARS. Heads from `first` on diffuse."""
    pair = tl.program_id(0).to(tl.int64)
    sequence, position, head = pair // n, tl.load(positions_ptr + pair), tl.load(heads_ptr + pair)
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

    products_ptr += head * (3 * D * D) + row * D + column
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
    return FORMS[kernel] | {"PRECISION": "tf32" if half else "ieee"}


def _rows(*parts):
    """(B, H, T, d) tensors of which each row is contiguous, and all their other strides."""
    parts = [part if part.stride(3) == 1 else part.contiguous() for part in parts]
    return parts, [stride for part in parts for stride in part.stride()[:3]]


def blocks(q, k, v, products, positions, heads, firsts, alpha: float, lam: float, causal: bool):
    """What `margins` eliminates, I - M_h W_o^h (L, B, n, d, d), from its arguments, and the last three of its results."""
    (B, _, T, D), n = q[0].shape, positions.size(2)
    products, positions, heads = products.contiguous(), positions.contiguous(), heads.contiguous()
    matrices, covariances = (products.new_empty(*heads.shape, D, D) for _ in range(2))
    vectors, scalars = products.new_empty(*heads.shape, VECTORS.value, D), products.new_empty(*heads.shape, SCALARS.value)
    for layer, (parts, first) in enumerate(zip(zip(q, k, v), firsts)):
        parts, strides = _rows(*parts)
        given, made = (products, positions, heads), (matrices, covariances, vectors, scalars)
        _blocks[(B * n,)](
            *parts, *(part[layer] for part in given + made), T, n, first, alpha, lam, 1 / math.sqrt(D), *strides,
            CAUSAL=causal, D=D, **_form("blocks", parts[0].dtype != torch.float32),
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
def _margins_backward(dlogs_ptr, inverses_ptr, covariances_ptr, vectors_ptr, scalars_ptr, products_ptr, heads_ptr, dcovariances_ptr, dvectors_ptr,
                     dscalars_ptr, dproducts_ptr, n, per, H, scale, D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A group of pairs of one layer, those of one head: d log |det| -> what `_moments_backward` reads, and the sum for the products, transposed.

    With w = -lambda dlog, the gradient of M_h W_o^h is w inverse^T, (e, m).
    """
    group, head = tl.program_id(0), tl.program_id(1) % H
    layer = (tl.program_id(1) // H).to(tl.int64)
    i = tl.arange(0, D)
    row, column = i[:, None], i[None, :]
    products_ptr += (layer * H + head) * (3 * D * D)
    down, across = row * D + column, column * D + row
    dp_q, dp_k, dp_v = tl.zeros((D, D), tl.float32), tl.zeros((D, D), tl.float32), tl.zeros((D, D), tl.float32)
    for turn in range(group * per, tl.minimum(group * per + per, n)):
        pair = layer * n + turn
        if tl.load(heads_ptr + pair) == head:
            inverse, covariance = tl.load(inverses_ptr + pair * D * D + down), tl.load(covariances_ptr + pair * D * D + down)  # (m, e), (e, f)
            at = vectors_ptr + pair * (VECTORS * D) + i
            y, u, q, centred = tl.load(at), tl.load(at + 2 * D), tl.load(at + 3 * D), tl.load(at + 4 * D)
            own, coefficient = tl.load(scalars_ptr + pair * SCALARS + 1), tl.load(scalars_ptr + pair * SCALARS + 2)
            w = -tl.load(scalars_ptr + pair * SCALARS + 3) * tl.load(dlogs_ptr + pair)
            dcovariance = w * tl.dot(tl.load(products_ptr + down) * scale, inverse, input_precision=PRECISION)  # (f, e), transposed
            tl.store(dcovariances_ptr + pair * D * D + down, dcovariance)
            both = w * scale * tl.dot(inverse, covariance, input_precision=PRECISION)  # (m, f)
            inner = tl.sum(tl.sum(both * tl.load(products_ptr + across), axis=1), axis=0)  # <dCov, Cov>
            dp_q += both
            dp_v += w * coefficient * inverse
            by_u = w * tl.sum(inverse * u[:, None], axis=0)  # (e)
            du = w * own * tl.sum(inverse * centred[None, :], axis=1)  # (m)
            dp_k += scale * du[:, None] * q[None, :]
            dq = scale * tl.sum(tl.load(products_ptr + D * D + down) * du[None, :], axis=1)  # (f)
            down_own = tl.sum(by_u * centred, axis=0) + w * tl.sum(tl.sum(inverse * tl.load(products_ptr + 2 * D * D + across), axis=1), axis=0)
            dv = own * by_u  # of v_i; of y its negative
            tl.store(dvectors_ptr + pair * (2 * D) + i, dv)
            tl.store(dvectors_ptr + pair * (2 * D) + D + i, dq)
            tl.store(dscalars_ptr + pair * 2, down_own)
            tl.store(dscalars_ptr + pair * 2 + 1, inner - tl.sum(dv * y, axis=0) + own * down_own)  # sum_j a_j da_j
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
    groups = min(GROUPS, pairs)
    dcovariances, dvectors = torch.empty_like(covariances), vectors.new_empty(*heads.shape, 2, D)
    dscalars, dproducts = scalars.new_empty(*heads.shape, 2), products.new_empty(L, H, groups, 3, D, D)
    _margins_backward[(groups, L * H)](
        dlogs, inverses, covariances, vectors, scalars, products, heads, dcovariances, dvectors, dscalars, dproducts,
        pairs, triton.cdiv(pairs, groups), H, 1 / math.sqrt(D), D=D, **_form("margins_backward", half),
    )  # fmt: skip
    return dproducts.sum(dim=2).mT.contiguous(), dcovariances, dvectors, dscalars


@margins_backward.register_fake
def _(dlogs, inverses, covariances, vectors, scalars, products, heads, half):
    form = {"memory_format": torch.contiguous_format}
    per_pair = (scalars.new_empty(*heads.shape, *rest) for rest in ((2, products.size(-1)), (2,)))
    return torch.empty_like(products, **form), torch.empty_like(covariances), *per_pair


@triton.jit
def _moments_backward(k_ptr, v_ptr, positions_ptr, heads_ptr, vectors_ptr, scalars_ptr, dcovariances_ptr, dvectors_ptr, dscalars_ptr, dq_ptr, dk_ptr,
                      dv_ptr, sums_ptr, T, n, H, scale, KB, KH, KT, VB, VH, VT,
                      CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One (sequence, head): its rows of dq, dk and dv, (B, T, H, d) each, from all pairs that are there. sums (B, n, d) are those of dq."""
    sequence, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    e, j = tl.arange(0, D), tl.arange(0, BLOCK)
    column = e[None, :]
    k_ptr += sequence * KB + head * KH
    v_ptr += sequence * VB + head * VH
    out = (sequence * T * H + head) * D
    for start in range(0, T, BLOCK):
        at = start + j
        live = at[:, None] < T
        k_half = tl.load(k_ptr + at[:, None] * KT + column, mask=live, other=0.0)
        v_half = tl.load(v_ptr + at[:, None] * VT + column, mask=live, other=0.0)
        dk, dv = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
        for pair in range(sequence * n, sequence * n + n):
            position = tl.load(positions_ptr + pair).to(tl.int32)
            end = T
            if CAUSAL:
                end = position + 1
            if (tl.load(heads_ptr + pair) == head) & (start < end):
                vectors = vectors_ptr + pair * (VECTORS * D) + e
                y, mean_k, q = tl.load(vectors), tl.load(vectors + D), tl.load(vectors + 3 * D)
                of_v = tl.load(dvectors_ptr + pair * (2 * D) + e)
                dcovariance = tl.load(dcovariances_ptr + pair * (D * D) + e[:, None] * D + column)  # (f, e)
                k, v = k_half.to(tl.float32), v_half.to(tl.float32)
                a = tl.exp(tl.sum(k * q[None, :], axis=1) * scale - tl.load(scalars_ptr + pair * SCALARS))
                a = tl.where(at < end, a, 0.0)
                own = at == position
                by_v = tl.dot(v - y[None, :], tl.trans(dcovariance), input_precision=PRECISION)  # (j, f)
                da = tl.sum(by_v * (k - mean_k[None, :]) - v * of_v[None, :], axis=1) + tl.where(own, tl.load(dscalars_ptr + pair * 2), 0.0)
                dlogits = a * (da - tl.load(dscalars_ptr + pair * 2 + 1)) * scale
                dk += a[:, None] * by_v + dlogits[:, None] * q[None, :]
                before = tl.load(dvectors_ptr + pair * (2 * D) + D + e) if start == 0 else tl.load(sums_ptr + pair * D + e)
                tl.store(sums_ptr + pair * D + e, before + tl.sum(dlogits[:, None] * k, axis=0))
                tl.debug_barrier()  # the next block's threads read it
                by_k = tl.dot(k - mean_k[None, :], dcovariance, input_precision=PRECISION)  # (j, e)
                dv += a[:, None] * by_k + (tl.where(own, 1.0, 0.0) - a)[:, None] * of_v[None, :]
        place = out + at[:, None] * (H * D) + column
        tl.store(dk_ptr + place, dk, mask=live)
        tl.store(dv_ptr + place, dv, mask=live)
        tl.store(dq_ptr + place, tl.zeros((BLOCK, D), tl.float32), mask=live)
    tl.debug_barrier()
    for pair in range(sequence * n, sequence * n + n):
        if tl.load(heads_ptr + pair) == head:
            position, dq = tl.load(positions_ptr + pair), tl.zeros((D,), tl.float32)
            for other in range(sequence * n, sequence * n + n):  # a pair may be there twice
                if (tl.load(heads_ptr + other) == head) & (tl.load(positions_ptr + other) == position):
                    dq += tl.load(sums_ptr + other * D + e)
            tl.store(dq_ptr + out + position * (H * D) + e, dq)


@operator
def moments_backward(
    k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], positions: torch.Tensor, heads: torch.Tensor, vectors: torch.Tensor, scalars: torch.Tensor,
    dcovariances: torch.Tensor, dvectors: torch.Tensor, dscalars: torch.Tensor, causal: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of all q, of all k and of all v, (B, H, T, d) each, in memory (B, T, H, d) and in their dtype, from what `margins_backward` gives."""
    (B, H, T, D), n = k[0].shape, positions.size(2)
    positions, heads = positions.contiguous(), heads.contiguous()
    gradients, sums = [], vectors.new_empty(B, n, D)
    for layer, parts in enumerate(zip(k, v)):
        parts, strides = _rows(*parts)
        made = [torch.empty(B, T, H, D, dtype=parts[0].dtype, device=parts[0].device) for _ in range(3)]
        given = (part[layer] for part in (positions, heads, vectors, scalars, dcovariances, dvectors, dscalars))
        _moments_backward[(B * H,)](
            *parts, *given, *made, sums, T, n, H, 1 / math.sqrt(D), *strides,
            CAUSAL=causal, D=D, **_form("moments_backward", parts[0].dtype != torch.float32),
        )  # fmt: skip
        gradients.append([part.transpose(1, 2) for part in made])
    return [part for kind in zip(*gradients) for part in kind]


@moments_backward.register_fake
def _(k, v, positions, heads, vectors, scalars, dcovariances, dvectors, dscalars, causal):
    B, H, T, D = k[0].shape
    return [part.new_empty(B, T, H, D).transpose(1, 2) for _ in range(3) for part in k]


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
