"""fused_mlp.py's two products once more, in Gluon, Triton's lower level, with the warps of a Hopper multiprocessor at three different tasks.

    1 warp       loads tiles of the factors by TMA, as far ahead as there are slots
    8 warps      multiply, and leave each finished tile in shared memory in half precision
    8 warps      store it, with GELU or multiplied by GELU's derivative, while the next tile is being multiplied

So the arithmetic costs the tensor cores next to nothing, and a tile can be as large as registers allow, 128 x 256, where two programs on a
multiprocessor with smaller tiles would read the factors from the cache a third more often. No bias. Triton's interpreter knows no Gluon.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fused import _processors
from fused_mlp import _gelu_of, _slope

ROWS, COLUMNS, INNER, PIECE = 128, 256, 64, 64
# Slots of the load queue, all that fit beside the finished tile; warps that finish, and their registers a thread: of the 96 that a thread of 20 warps
# starts with, those who multiply get 160. An instruction for all 256 columns would need 154 at the start, so two make the tile.
SLOTS, FINISHERS, REGISTERS = 3, 8, 64


@gluon.jit
def _load(a, b, lefts, rights, full, free, rows, columns, inner, ROWS: gl.constexpr, COLUMNS: gl.constexpr, INNER: gl.constexpr,
          SLOTS: gl.constexpr, TRANSPOSED: gl.constexpr):  # fmt: skip
    """Fills the slots in turn with ROWS x INNER of a and the part of b that belongs to it."""
    across = gl.cdiv(columns, COLUMNS)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(rows, ROWS) * across, gl.num_programs(0)):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        for k in range(0, inner, INNER):
            slot = step % SLOTS
            mbarrier.wait(free.index(slot), (step // SLOTS + 1) & 1)  # of a new barrier the phase before the first counts as over
            mbarrier.expect(full.index(slot), (ROWS + COLUMNS) * INNER * 2)
            tma.async_copy_global_to_shared(a, [row, k], full.index(slot), lefts.index(slot))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(b, [column, k], full.index(slot), rights.index(slot))
            else:
                tma.async_copy_global_to_shared(b, [k, column], full.index(slot), rights.index(slot))
            step += 1


@gluon.jit
def _multiply(lefts, rights, whole, full, free, made, taken, rows, columns, inner, ROWS: gl.constexpr, COLUMNS: gl.constexpr, INNER: gl.constexpr,
              SLOTS: gl.constexpr, TRANSPOSED: gl.constexpr):  # fmt: skip
    """Sums over the slots; a slot is free once the product after the one that reads it has begun. The finished tile goes to `whole`."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 16])
    tiles = gl.cdiv(rows, ROWS) * gl.cdiv(columns, COLUMNS)
    total = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    step = 0
    turn = 0
    for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for k in range(0, inner, INNER):
            slot = step % SLOTS
            mbarrier.wait(full.index(slot), step // SLOTS & 1)
            if TRANSPOSED:
                right = rights.index(slot).permute((1, 0))
            else:
                right = rights.index(slot)
            total = warpgroup_mma(lefts.index(slot), right, total, use_acc=k > 0, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            gl.thread_barrier()  # both groups of four warps are done with the slot before
            mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1, pred=k > 0)
            step += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        gl.thread_barrier()
        mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1)
        mbarrier.wait(taken, (turn + 1) & 1)
        whole.store(total.to(whole.dtype))
        gl.thread_barrier()
        mbarrier.arrive(made, count=1)
        turn += 1


@gluon.jit
def _finish(whole, made, taken, h_ptr, out_ptr, rows, columns, ROWS: gl.constexpr, COLUMNS: gl.constexpr, PIECE: gl.constexpr,
            GRADIENT: gl.constexpr, GELU: gl.constexpr):  # fmt: skip
    """As fused_mlp's function of that name, PIECE columns at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PIECE, PIECE // 8], [gl.num_warps(), 1], [1, 0])
    across = gl.cdiv(columns, COLUMNS)
    turn = 0
    for tile in range(gl.program_id(0), gl.cdiv(rows, ROWS) * across, gl.num_programs(0)):
        row = tile // across * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
        first = tile % across * COLUMNS + gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))[None, :]
        start = row.to(gl.int64) * columns + first
        for piece in gl.static_range(COLUMNS // PIECE):
            i = start + piece * PIECE
            mask = (row < rows) & (first + piece * PIECE < columns)
            if GRADIENT and GELU:
                x = gl.load(h_ptr + i, mask=mask, other=0.0).to(gl.float32)  # before the wait, beside which it arrives
            if piece == 0:
                mbarrier.wait(made, turn & 1)
            half = whole.slice(piece * PIECE, PIECE, dim=1).load(layout)
            if piece == COLUMNS // PIECE - 1:
                gl.thread_barrier()
                mbarrier.arrive(taken, count=1)
            if GRADIENT:
                product = half.to(gl.float32)
                if GELU:
                    product *= _slope(x)
                gl.store(out_ptr + i, product.to(half.dtype), mask=mask)
            else:
                gl.store(h_ptr + i, half, mask=mask)
                if GELU:
                    gl.store(out_ptr + i, _gelu_of(half.to(gl.float32)).to(half.dtype), mask=mask)
        turn += 1


@gluon.jit
def _product(a, b, h_ptr, out_ptr, rows, columns, inner, ROWS: gl.constexpr, COLUMNS: gl.constexpr, INNER: gl.constexpr, PIECE: gl.constexpr,
             SLOTS: gl.constexpr, FINISHERS: gl.constexpr, REGISTERS: gl.constexpr, GRADIENT: gl.constexpr, GELU: gl.constexpr):  # fmt: skip
    """As fused_mlp's kernel of that name, a and b by TMA descriptors, h and out by pointers."""
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
            (_multiply, (lefts, rights, whole, full, free, made, taken, rows, columns, inner, ROWS, COLUMNS, INNER, SLOTS, not GRADIENT)),
            (_finish, (whole, made, taken, h_ptr, out_ptr, rows, columns, ROWS, COLUMNS, PIECE, GRADIENT, GELU)),
            (_load, (a, b, lefts, rights, full, free, rows, columns, inner, ROWS, COLUMNS, INNER, SLOTS, not GRADIENT)),
        ],
        [FINISHERS, 1],
        [REGISTERS, 24],
    )


def run(a, b, h, out, gradient: bool, gelu: bool = True, slots: int = SLOTS, finishers: int = FINISHERS, registers: int = REGISTERS):
    """a (N, K) times b, (M, K) or with `gradient` (K, M): fills h and out (N, M), or reads h and fills out."""
    rows, columns = h.shape
    shapes = [ROWS, INNER], [INNER, COLUMNS] if gradient else [COLUMNS, INNER]
    form = gl.NVMMASharedLayout.get_default_for([ROWS, INNER], gl.bfloat16 if a.element_size() == 2 else gl.float32)
    a, b = (TensorDescriptor.from_tensor(t, shape, form) for t, shape in zip((a, b), shapes))
    tiles = -(-rows // ROWS) * -(-columns // COLUMNS)
    _product[(min(tiles, _processors(h.device)),)](
        a, b, h, out, rows, columns, a.shape[1], ROWS, COLUMNS, INNER, PIECE, slots, finishers, registers, gradient, gelu, num_warps=8
    )  # fmt: skip
