"""Matrix products that end in the residual stream's addition and LayerNorm, and such without that end, in Gluon, Triton's lower level; for Hopper
GPUs, 384 columns and fused_norm.py.

A multiprocessor holds whole rows of the result, 128 x 384 numbers in registers:

    1 warp       loads by TMA tiles of the factors, then of the residual stream, as far ahead as there are slots
    8 warps      multiply, then drop out, add and normalise what they hold, in pieces of 32 columns

A piece goes to and from memory by TMA alone, by way of shared memory: by loads and stores of what each thread has all of it took 84 us instead of 58.
Where registers are short the compiler keeps some in memory without a word, which here costs more than it wins. Times, and the way back with an end of
its own, in LOG.md; tests/test_fused_norm.py compares with float64. Triton's interpreter knows no Gluon.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.random import philox

from fused_attention_hopper import store
from fused_products_hopper import barrier, load
from place import processors

CHANNELS, ROWS, THIRD, WIDTH = gl.constexpr(384), gl.constexpr(128), gl.constexpr(128), gl.constexpr(32)
PIECES, PER = gl.constexpr(12), gl.constexpr(2)  # of the columns; in a slot
# Columns of the left factor in a slot; slots, as many as fit; places for finished pieces in half precision.
INNER, SLOTS, PLACES = gl.constexpr(32), gl.constexpr(6), gl.constexpr(4)
FORM = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 16]))
# Where a thread of FORM has a piece of 32 of its columns; the same in four dimensions; calls of Philox, each for eight columns.
LANES, WARPS = [[1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [64, 0]]
PIECE = gl.constexpr(gl.DistributedLinearLayout([[0, 1], [8, 0], [0, 8], [0, 16]], [[0, 2], [0, 4], *LANES], WARPS, [], [128, 32]))
QUADS = gl.constexpr(  # (rows, blocks of eight columns, pairs, 2)
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [8, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0]],
        [[0, 0, 1, 0], [0, 0, 2, 0], *([row, 0, 0, 0] for row in (1, 2, 4))],
        [[row, 0, 0, 0] for row in (16, 32, 64)],
        [],
        [128, 4, 4, 2],
    )
)
CALLS = gl.constexpr(gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], *LANES], WARPS, [], [128, 4]))
ROW, COLUMN = gl.constexpr(gl.SliceLayout(1, PIECE.value)), gl.constexpr(gl.SliceLayout(0, PIECE.value))


# ---------------------------------------------------------------------------------------------------------------------------------
# Slots: of one size, for both factors of a step, or for pieces of the stream


@gluon.jit
def _left(slots, slot, a):
    return slots.index(slot)._reinterpret(a.dtype, [4] + a.block_type.shape, a.layout).index(0)


@gluon.jit
def _right(slots, slot, third: gl.constexpr, b):
    return slots.index(slot)._reinterpret(b.dtype, [4] + b.block_type.shape, b.layout).index(1 + third)


@gluon.jit
def _piece(slots, slot, n: gl.constexpr, x):
    return slots.index(slot)._reinterpret(x.dtype, [PER] + x.block_type.shape, x.layout).index(n)


@gluon.jit
def _load_factors(a, b, slots, full, free, row, step, inner, TRANSPOSED: gl.constexpr):
    for k in range(0, inner, INNER):
        slot = step % SLOTS
        mbarrier.wait(free.index(slot), (step // SLOTS + 1) & 1)  # of a new barrier the phase before the first counts as over
        mbarrier.expect(full.index(slot), (ROWS + CHANNELS) * INNER * 2)
        load(a, [row, k], full.index(slot), _left(slots, slot, a))
        for third in gl.static_range(3):
            if TRANSPOSED:
                load(b, [third * THIRD, k], full.index(slot), _right(slots, slot, third, b))
            else:
                load(b, [k, third * THIRD], full.index(slot), _right(slots, slot, third, b))
        step += 1


@gluon.jit
def _load_pieces(x, slots, full, free, row, step):
    """All pieces of x, two to a slot."""
    for column in range(0, CHANNELS, PER * WIDTH):
        slot = step % SLOTS
        mbarrier.wait(free.index(slot), (step // SLOTS + 1) & 1)
        mbarrier.expect(full.index(slot), PER * x.block_type.nbytes)
        load(x, [row, column], full.index(slot), _piece(slots, slot, 0, x))
        load(x, [row, column + WIDTH], full.index(slot), _piece(slots, slot, 1, x))
        step += 1


@gluon.jit
def _multiply(a, b, slots, full, free, step, steps, TRANSPOSED: gl.constexpr):
    """Sums over the slots, three thirds of the columns."""
    t0 = gl.zeros((ROWS, THIRD), gl.float32, FORM)
    t1 = gl.zeros((ROWS, THIRD), gl.float32, FORM)
    t2 = gl.zeros((ROWS, THIRD), gl.float32, FORM)
    for k in range(steps):
        slot = step % SLOTS
        mbarrier.wait(full.index(slot), step // SLOTS & 1)
        left = _left(slots, slot, a)
        r0, r1, r2 = _right(slots, slot, 0, b), _right(slots, slot, 1, b), _right(slots, slot, 2, b)
        if TRANSPOSED:
            r0, r1, r2 = r0.permute((1, 0)), r1.permute((1, 0)), r2.permute((1, 0))
        t0 = warpgroup_mma(left, r0, t0, use_acc=k > 0, is_async=True)
        t1 = warpgroup_mma(left, r1, t1, use_acc=k > 0, is_async=True)
        t2 = warpgroup_mma(left, r2, t2, use_acc=k > 0, is_async=True)
        t0, t1, t2 = warpgroup_mma_wait(num_outstanding=3, deps=(t0, t1, t2))
        barrier()  # both groups of four warps are done with the slot before
        mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1, pred=k > 0)
        step += 1
    t0, t1, t2 = warpgroup_mma_wait(num_outstanding=0, deps=(t0, t1, t2))
    barrier()
    mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1)
    return t0, t1, t2


@gluon.jit
def _halves(t):
    """(rows, n) -> the first and the last n / 2 columns, without moving a number."""
    return gl.split(gl.permute(gl.reshape(t, [ROWS, 2, t.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _pieces(t):
    """A third of the columns -> its four pieces."""
    left, right = _halves(t)
    a, b = _halves(left)
    c, d = _halves(right)
    return gl.convert_layout(a, PIECE), gl.convert_layout(b, PIECE), gl.convert_layout(c, PIECE), gl.convert_layout(d, PIECE)


# ---------------------------------------------------------------------------------------------------------------------------------
# Dropout


SHUFFLES = gl.constexpr({lane: f"shfl.sync.bfly.b32 $0, $1, {lane}, 0x1f, 0xffffffff;" for lane in (1, 2)})


@gluon.jit
def _from_lane(t, ACROSS: gl.constexpr):
    """What the lane has whose number differs in the bit ACROSS."""
    return gl.inline_asm_elementwise(SHUFFLES[ACROSS], "=r,r", [t], dtype=t.dtype, is_pure=False, pack=1)


@gluon.jit
def _exchange(x, y, odd, ACROSS: gl.constexpr):
    """Of two lanes whose numbers differ in the bit ACROSS the even one gets the other's x for its own y."""
    taken = _from_lane(gl.where(odd, x, y), ACROSS)
    return gl.where(odd, taken, x), gl.where(odd, y, taken)


@gluon.jit
def _decide(seed, site, row, piece, threshold):
    """Dropout's decisions for a piece, as dropout.py has them, eight bits for the columns of each lane: four lanes make a call of Philox each, for
    eight columns, and hand each other the words for theirs."""
    block = gl.arange(0, 4, gl.SliceLayout(0, CALLS))[None, :]
    call = (row + gl.arange(0, ROWS, gl.SliceLayout(1, CALLS)))[:, None] * (CHANNELS // 8) + (piece * 4 + block)
    a, b, c, d = philox(seed, call, call * 0 + site, call * 0, call * 0, n_rounds=7)
    a, b, c, d = a.to(gl.int32, bitcast=True), b.to(gl.int32, bitcast=True), c.to(gl.int32, bitcast=True), d.to(gl.int32, bitcast=True)
    odd = (call * 0 + block & 1) != 0
    a, b = _exchange(a, b, odd, 1)
    c, d = _exchange(c, d, odd, 1)
    odd = (call * 0 + block & 2) != 0
    a, c = _exchange(a, c, odd, 2)
    b, d = _exchange(b, d, odd, 2)
    return _bits(a, threshold) | _bits(b, threshold) << 2 | _bits(c, threshold) << 4 | _bits(d, threshold) << 6


@gluon.jit
def _bits(word, threshold):
    """Of the two halves of a word."""
    return ((word & 0xFFFF) >= threshold).to(gl.int32) | ((word >> 16 & 0xFFFF) >= threshold).to(gl.int32) << 1


@gluon.jit
def _drop(t, decisions, scale):
    """Dropout of a piece."""
    decisions = gl.convert_layout(decisions, gl.SliceLayout(1, gl.SliceLayout(3, QUADS)))[:, None, :, None]
    block = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, QUADS))))[None, :, None, None]
    second = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, QUADS))))[None, None, None, :]
    kept = (decisions >> block * 2 + second & 1) != 0
    return gl.where(gl.convert_layout(gl.reshape(kept, [ROWS, WIDTH]), PIECE), t * scale, 0.0)


# ---------------------------------------------------------------------------------------------------------------------------------
# With the addition and LayerNorm


@gluon.jit
def _load_forward(a, b, x, slots, full, free, rows, inner):
    step = 0
    for row in range(gl.program_id(0) * ROWS, rows, gl.num_programs(0) * ROWS):
        _load_factors(a, b, slots, full, free, row, step, inner, True)
        step += gl.cdiv(inner, INNER)
        _load_pieces(x, slots, full, free, row, step)
        step += PIECES // PER


@gluon.jit
def _add(t, x, out, slots, full, free, seed, site, row, step, p: gl.constexpr, scale, threshold, dtype: gl.constexpr, DROPOUT: gl.constexpr):
    """Piece p of the sum, which replaces that of x in its slot and goes to memory from there."""
    slot = (step + p // PER) % SLOTS
    branch = t.to(dtype).to(gl.float32)
    if DROPOUT:
        branch = _drop(branch, _decide(seed, site, row, p, threshold), scale)
    if p % PER == 0:
        mbarrier.wait(full.index(slot), (step + p // PER) // SLOTS & 1)
    place = _piece(slots, slot, p % PER, x)
    t = place.load(PIECE) + branch
    place.store(t)
    fence_async_shared()
    tma.store_wait(1)  # piece p - 2 has left its slot
    barrier()
    if p > 1 and (p - 1) % PER == 0:
        mbarrier.arrive(free.index((step + (p - 2) // PER) % SLOTS), count=1)
    store(out, [row, p * WIDTH], place)
    return t


@gluon.jit
def _add_third(t, x, out, slots, full, free, seed, site, row, step, third: gl.constexpr, scale, threshold, dtype: gl.constexpr,
               DROPOUT: gl.constexpr):  # fmt: skip
    a, b, c, d = _pieces(t)
    a = _add(a, x, out, slots, full, free, seed, site, row, step, 4 * third, scale, threshold, dtype, DROPOUT)
    b = _add(b, x, out, slots, full, free, seed, site, row, step, 4 * third + 1, scale, threshold, dtype, DROPOUT)
    c = _add(c, x, out, slots, full, free, seed, site, row, step, 4 * third + 2, scale, threshold, dtype, DROPOUT)
    d = _add(d, x, out, slots, full, free, seed, site, row, step, 4 * third + 3, scale, threshold, dtype, DROPOUT)
    return a, b, c, d


@gluon.jit
def _squares(a, b, c, d, mean):
    a, b, c, d = a - mean, b - mean, c - mean, d - mean
    return a * a + b * b + c * c + d * d


@gluon.jit
def _put(t, y, places, row, p: gl.constexpr):
    """Sends piece p off to memory in half precision."""
    place = places.index(p % PLACES)
    place.store(t.to(y.dtype))
    fence_async_shared()
    tma.store_wait(PLACES - 2)  # the place of the next piece is free
    barrier()
    store(y, [row, p * WIDTH], place)


@gluon.jit
def _forward(a, b, x, out, y, slots, places, full, free, weight_ptr, seed_ptr, mean_ptr, rstd_ptr, rows, inner, site, scale, threshold,
             DROPOUT: gl.constexpr):  # fmt: skip
    dtype: gl.constexpr = a.dtype
    seed = seed_ptr
    if DROPOUT:
        seed = gl.load(seed_ptr)
    step = 0
    steps = gl.cdiv(inner, INNER)
    for row in range(gl.program_id(0) * ROWS, rows, gl.num_programs(0) * ROWS):
        t0, t1, t2 = _multiply(a, b, slots, full, free, step, steps, True)
        step += steps
        a0, b0, c0, d0 = _add_third(t0, x, out, slots, full, free, seed, site, row, step, 0, scale, threshold, dtype, DROPOUT)
        a1, b1, c1, d1 = _add_third(t1, x, out, slots, full, free, seed, site, row, step, 1, scale, threshold, dtype, DROPOUT)
        a2, b2, c2, d2 = _add_third(t2, x, out, slots, full, free, seed, site, row, step, 2, scale, threshold, dtype, DROPOUT)
        mean = gl.sum(a0 + b0 + c0 + d0 + a1 + b1 + c1 + d1 + a2 + b2 + c2 + d2, axis=1) / CHANNELS
        m = mean[:, None]
        squares = _squares(a0, b0, c0, d0, m) + _squares(a1, b1, c1, d1, m) + _squares(a2, b2, c2, d2, m)
        rstd = 1 / gl.sqrt(gl.sum(squares, axis=1) / CHANNELS + 1e-5)
        r = rstd[:, None]
        i = row + gl.arange(0, ROWS, ROW)
        gl.store(mean_ptr + i, mean, mask=i < rows)
        gl.store(rstd_ptr + i, rstd, mask=i < rows)
        for p in gl.static_range(PIECES):
            weight = gl.load(weight_ptr + p * WIDTH + gl.arange(0, WIDTH, COLUMN))[None, :]
            _put(((a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2)[p] - m) * r * weight, y, places, row, p)
            if p == PLACES - 2:  # the last slot of the sum has been stored
                mbarrier.arrive(free.index((step + PIECES // PER - 1) % SLOTS), count=1)
        step += PIECES // PER
    tma.store_wait(0)


@gluon.jit
def _shared(y):
    slots = gl.allocate_shared_memory(gl.int32, [SLOTS, 512 * INNER // 2], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    places = gl.allocate_shared_memory(y.dtype, [PLACES] + y.block_type.shape, y.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    return slots, places, full, free


@gluon.jit(do_not_specialize=["rows", "site"])
def _product_add_norm(a, b, x, out, y, weight_ptr, seed_ptr, mean_ptr, rstd_ptr, rows, inner, site, scale, threshold,
                      DROPOUT: gl.constexpr):  # fmt: skip
    slots, places, full, free = _shared(y)
    gl.warp_specialize(
        [
            (_forward, (a, b, x, out, y, slots, places, full, free, weight_ptr, seed_ptr, mean_ptr, rstd_ptr, rows, inner, site, scale, threshold,
                        DROPOUT)),
            (_load_forward, (a, b, x, slots, full, free, rows, inner)),
        ],
        [1],
        [24],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------------
# Alone


@gluon.jit
def _load_alone(a, b, slots, full, free, rows, inner, TRANSPOSED: gl.constexpr):
    step = 0
    for row in range(gl.program_id(0) * ROWS, rows, gl.num_programs(0) * ROWS):
        _load_factors(a, b, slots, full, free, row, step, inner, TRANSPOSED)
        step += gl.cdiv(inner, INNER)


@gluon.jit
def _alone(a, b, y, slots, places, full, free, rows, inner, TRANSPOSED: gl.constexpr):
    step = 0
    steps = gl.cdiv(inner, INNER)
    for row in range(gl.program_id(0) * ROWS, rows, gl.num_programs(0) * ROWS):
        t0, t1, t2 = _multiply(a, b, slots, full, free, step, steps, TRANSPOSED)
        step += steps
        a0, b0, c0, d0 = _pieces(t0)
        a1, b1, c1, d1 = _pieces(t1)
        a2, b2, c2, d2 = _pieces(t2)
        for p in gl.static_range(PIECES):
            _put((a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2)[p], y, places, row, p)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows"])
def _product_alone(a, b, y, rows, inner, TRANSPOSED: gl.constexpr):
    slots, places, full, free = _shared(y)
    gl.warp_specialize(
        [
            (_alone, (a, b, y, slots, places, full, free, rows, inner, TRANSPOSED)),
            (_load_alone, (a, b, slots, full, free, rows, inner, TRANSPOSED)),
        ],
        [1],
        [24],
    )


# ---------------------------------------------------------------------------------------------------------------------------------


def _describe(x, columns, rows=ROWS):
    form = gl.float32 if x.element_size() == 4 else gl.bfloat16  # of float16 too: the size of an element counts
    block = [rows.value, columns.value]
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, form))


def _grid(rows: int, device, most: int) -> tuple[int]:
    return (min(-(-rows // ROWS.value), most or processors(device)),)


def add_norm(a, b, x, weight, seed, site: int, least: int, scale: float, out, y, mean, rstd, most: int = 0):
    """Fills out (N, 384) with x + dropout(a b^T), a (N, K), b (384, K), y with LayerNorm of it, and mean and 1 / std of its rows.

    Dropout, unless seed is None, keeps what reaches `least`, times scale, as dropout.py has it. `most` is of programs, 0 for as many as there are
    multiprocessors.
    """
    rows, inner = a.shape
    tiles = _describe(a, INNER), _describe(b, INNER, THIRD), _describe(x, WIDTH), _describe(out, WIDTH), _describe(y, WIDTH)
    given = weight, x if seed is None else seed, mean, rstd, rows, inner, site, scale, least
    _product_add_norm[_grid(rows, a.device, most)](*tiles, *given, seed is not None, num_warps=8)


def product(a, b, y, transposed: bool, most: int = 0):
    """Fills y (N, 384) with a b, a (N, K), b (K, 384) or, `transposed`, with a b^T, b (384, K)."""
    rows, inner = a.shape
    right = _describe(b, INNER, THIRD) if transposed else _describe(b, THIRD, INNER)
    _product_alone[_grid(rows, a.device, most)](_describe(a, INNER), right, _describe(y, WIDTH), rows, inner, transposed, num_warps=8)
