"""Matrix products whose factor is in three pieces or whose end is GELU, in Gluon, Triton's lower level, with the warps of a Hopper multiprocessor at
three different tasks; for fused.py and fused_products.py.

    1 warp       loads tiles of the factors by TMA, as far ahead as there are slots
    8 warps      multiply, and leave each finished tile in shared memory in half precision
    8 warps      store it, as it is, or GELU of it and its derivative, or multiplied by that, while the next tile is being multiplied

So the arithmetic costs the tensor cores little, and a tile can be as large as registers allow. Without GELU this product is as fast as cuBLAS's. What
is left is mostly memory's: a second matrix of bytes, stored forward and read backward. Triton's interpreter knows no Gluon.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fused_products import from_byte, to_byte, value_and_slope
from place import processors

# the newer names first: Gluon is an experimental part of Triton, which this was compiled with from 3.6 to 3.9
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
ROWS, COLUMNS, INNER = 128, 256, 64
# Slots of the load queue, all that fit beside the finished tile; warps that finish, and their registers a thread: of the 96 that a thread of 20 warps
# starts with, those who multiply get 160. An instruction for all 256 columns would need 154 at the start, so two make the tile.
SLOTS, FINISHERS, REGISTERS = 3, 8, 64
PIECE = 32  # rows of a tile finished at a time, the most that leaves those registers enough


@gluon.jit
def _load(a, a1, a2, b, lefts, rights, full, free, rows, columns, inner, PARTS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
          INNER: gl.constexpr, SLOTS: gl.constexpr, TRANSPOSED: gl.constexpr):  # fmt: skip
    """Fills the slots in turn with ROWS x INNER of a and the part of b that belongs to it; with three PARTS, of a, a1 and a2 side by side."""
    across = gl.cdiv(columns, COLUMNS)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(rows, ROWS) * across, gl.num_programs(0)):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        for part in gl.static_range(PARTS):
            for k in range(0, inner, INNER):
                slot = step % SLOTS
                mbarrier.wait(free.index(slot), (step // SLOTS + 1) & 1)  # of a new barrier the phase before the first counts as over
                mbarrier.expect(full.index(slot), (ROWS + COLUMNS) * INNER * 2)
                if part == 0:
                    load(a, [row, k], full.index(slot), lefts.index(slot))
                elif part == 1:
                    load(a1, [row, k], full.index(slot), lefts.index(slot))
                else:
                    load(a2, [row, k], full.index(slot), lefts.index(slot))
                if TRANSPOSED:
                    load(b, [column, part * inner + k], full.index(slot), rights.index(slot))
                else:
                    load(b, [part * inner + k, column], full.index(slot), rights.index(slot))
                step += 1


@gluon.jit
def _multiply(lefts, rights, whole, full, free, made, taken, rows, columns, steps, ROWS: gl.constexpr, COLUMNS: gl.constexpr, INNER: gl.constexpr,
              SLOTS: gl.constexpr, TRANSPOSED: gl.constexpr):  # fmt: skip
    """Sums over the slots; a slot is free once the product after the one that reads it has begun. The finished tile goes to `whole`."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 16])
    tiles = gl.cdiv(rows, ROWS) * gl.cdiv(columns, COLUMNS)
    total = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    step = 0
    turn = 0
    for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for k in range(steps):
            slot = step % SLOTS
            mbarrier.wait(full.index(slot), step // SLOTS & 1)
            if TRANSPOSED:
                right = rights.index(slot).permute((1, 0))
            else:
                right = rights.index(slot)
            total = warpgroup_mma(lefts.index(slot), right, total, use_acc=k > 0, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            barrier()  # both groups of four warps are done with the slot before
            mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1, pred=k > 0)
            step += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        barrier()
        mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1)
        mbarrier.wait(taken, (turn + 1) & 1)
        whole.store(total.to(whole.dtype))
        barrier()
        mbarrier.arrive(made, count=1)
        turn += 1


@gluon.jit
def _finish(whole, made, taken, slope_ptr, out_ptr, rows, columns, ROWS: gl.constexpr, COLUMNS: gl.constexpr, PIECE: gl.constexpr,
            END: gl.constexpr, KEEP: gl.constexpr):  # fmt: skip
    """Stores the tile, or GELU of it and (with KEEP) the slope, or the tile times such slopes; PIECE rows at a time, each by one warp at once."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    across = gl.cdiv(columns, COLUMNS)
    turn = 0
    for tile in range(gl.program_id(0), gl.cdiv(rows, ROWS) * across, gl.num_programs(0)):
        row = tile // across * ROWS + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))[:, None]
        column = tile % across * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))[None, :]
        for piece in gl.static_range(ROWS // PIECE):
            i = (row + piece * PIECE).to(gl.int64) * columns + column
            mask = (row + piece * PIECE < rows) & (column < columns)
            if END == "slope":
                slope = gl.load(slope_ptr + i, mask=mask, other=0)  # before the wait, beside which it arrives
            if piece == 0:
                mbarrier.wait(made, turn & 1)
            half = whole.slice(piece * PIECE, PIECE, dim=0).load(layout)
            if piece == ROWS // PIECE - 1:
                barrier()
                mbarrier.arrive(taken, count=1)
            if END == "slope":
                gl.store(out_ptr + i, (half.to(gl.float32) * from_byte(slope)).to(half.dtype), mask=mask)
            elif END == "plain":
                gl.store(out_ptr + i, half, mask=mask)
            else:
                value, slope = value_and_slope(half.to(gl.float32))
                gl.store(out_ptr + i, value.to(half.dtype), mask=mask)
                if KEEP:
                    gl.store(slope_ptr + i, to_byte(slope), mask=mask)
        turn += 1


@gluon.jit
def _product(a, a1, a2, b, slope_ptr, out_ptr, rows, columns, inner, PARTS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
             INNER: gl.constexpr, PIECE: gl.constexpr, SLOTS: gl.constexpr, FINISHERS: gl.constexpr, REGISTERS: gl.constexpr,
             END: gl.constexpr, KEEP: gl.constexpr):  # fmt: skip
    """a (rows, inner) times b, for the END "gelu" (columns, inner), else (inner, columns), TMA descriptors; tile by tile, finished as above. With
    three PARTS a, a1 and a2 stand side by side, and b has three times as many rows.

    Tiles of the same rows follow each other: their rows of a are in the cache then, and all of b, a weight, always is.
    """
    lefts = gl.allocate_shared_memory(a.dtype, [SLOTS] + a.block_type.shape, a.layout)
    rights = gl.allocate_shared_memory(b.dtype, [SLOTS] + b.block_type.shape, b.layout)
    whole = gl.allocate_shared_memory(a.dtype, [ROWS, COLUMNS], gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], a.dtype))
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    made = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    mbarrier.init(made, count=1)
    mbarrier.init(taken, count=1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    lefts,
                    rights,
                    whole,
                    full,
                    free,
                    made,
                    taken,
                    rows,
                    columns,
                    PARTS * gl.cdiv(inner, INNER),
                    ROWS,
                    COLUMNS,
                    INNER,
                    SLOTS,
                    END == "gelu",
                ),
            ),
            (_finish, (whole, made, taken, slope_ptr, out_ptr, rows, columns, ROWS, COLUMNS, PIECE, END, KEEP)),
            (_load, (a, a1, a2, b, lefts, rights, full, free, rows, columns, inner, PARTS, ROWS, COLUMNS, INNER, SLOTS, END == "gelu")),
        ],
        [FINISHERS, 1],
        [REGISTERS, 24],
    )


def product(parts, b, out, end: str = "plain", slope=None):
    """Matrices (N, K) side by side, one or three, times b with a row for every column of them, for the end "gelu" b (M, K): fills out (N, M).

    The end "gelu" stores GELU of the product and fills slope, unless it is empty, with its derivative; "slope" stores the product times slope.
    """
    rows, columns = out.shape
    shape = [COLUMNS, INNER] if end == "gelu" else [INNER, COLUMNS]
    form = gl.NVMMASharedLayout.get_default_for([ROWS, INNER], gl.bfloat16)  # of float16 too: the size of an element counts
    left = [TensorDescriptor.from_tensor(part, [ROWS, INNER], form) for part in parts]
    right, slope = TensorDescriptor.from_tensor(b, shape, form), out.new_empty(0) if slope is None else slope
    tiles = -(-rows // ROWS) * -(-columns // COLUMNS)
    sizes = ROWS, COLUMNS, INNER, PIECE, SLOTS, FINISHERS, REGISTERS
    grid = (min(tiles, processors(out.device)),)
    left = (left * 3)[:3]  # pointers of one factor alone are not followed
    _product[grid](*left, right, slope, out, rows, columns, parts[0].size(1), len(parts), *sizes, end, slope.numel() > 0, num_warps=8)
