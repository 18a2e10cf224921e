"""Causal attention over long sequences in Gluon, Triton's lower level, with the warps of a Hopper multiprocessor at two different tasks; for heads of
64 channels, for fused_attention.py, which says what goes in and out.

    1 warp          loads tiles by TMA, as far ahead as there are slots, those of the next task too
    4 or 8 warps    multiply, weigh and sum

Two programs share a multiprocessor: while one weighs, the other multiplies. Each takes one tile after another, so that its loads never pause, in an
order that gives it short rows and long ones (evenly for 1024 tokens, some programs up to a third more for 4096). The way back is two passes, one for
the gradient of queries and one for those of keys and values: all weights are computed twice, but nothing is summed by atomics or in memory, so two
runs agree to the last bit. A diffusing head costs one more store on the way, and on the way back a tile more to load. Times, and what else was tried,
in LOG.md; tests/test_fused_attention.py compares with float64. Triton's interpreter knows no Gluon.

On the way back a product that is under way when a loop begins anew is so before the first turn and after the last as well, and its registers are
nothing else's: else the compiler (ptxas 12.8, of Triton 3.6) lets every product wait for the one before, without a word. On the way forward it does
so for want of registers, and two groups of four warps are still ahead of one with registers enough.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fused_products_hopper import barrier, load
from place import processors

store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
LOG2E = gl.constexpr(1.4426950408889634)
# Rows that a program works on at a time, for queries in two halves; for keys, and of the other side that is read at a time.
TILE, BLOCK = gl.constexpr(128), gl.constexpr(64)
SLOTS = {"forward": 3, "queries": 3, "keys": 3}  # of the load queue
TOGETHER = 2  # programs that share a multiprocessor
# A thread's registers at the start, which its share of the multiprocessor allows. The warps that load hand most of theirs on; forward, where both
# halves have four warps each, the second half has so many at work and the first what is left, 104.
FORWARD, BACKWARD, AT_WORK = 80, 128, 112
SIZES = ["T", "H", "items", "FIRST", "C"]  # one program for all of them


@gluon.jit
def _place(item, rows: gl.constexpr, T, H, D: gl.constexpr):
    """Of a tile of so many rows: first row of the sequence, first row of the tile in it, first column of the head, and which (sequence, head)."""
    tiles = T // rows
    which = item // tiles
    return which // H * T, (item + which) % tiles * rows, which % H * D, which


@gluon.jit
def _barriers(SLOTS: gl.constexpr, count: gl.constexpr):
    """One for each slot; a phase of it ends with the count-th arrival."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=count)
    return barriers


@gluon.jit
def _load_pair(x, left, y, right, row, left_column, right_column, left_full, right_full, free, step, SLOTS: gl.constexpr):
    """Fills the slot of `step` with a block of x and one of y, once it is free: of a new barrier the phase before the first counts as over."""
    slot = step % SLOTS
    mbarrier.wait(free.index(slot), (step // SLOTS + 1) & 1)
    mbarrier.expect(left_full.index(slot), x.block_type.nbytes)
    load(x, [row, left_column], left_full.index(slot), left.index(slot))
    mbarrier.expect(right_full.index(slot), y.block_type.nbytes)
    load(y, [row, right_column], right_full.index(slot), right.index(slot))


# ---------------------------------------------------------------------------------------------------------------------------------
# Forward


@gluon.jit
def _load_forward(qkv, qs, ks, vs, q_full, q_free, k_full, v_full, free, T, H, items, C, D: gl.constexpr, SLOTS: gl.constexpr):
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first, time, column, which = _place(item, TILE, T, H, D)
        mbarrier.wait(q_free, (turn + 1) & 1)
        mbarrier.expect(q_full, TILE // BLOCK * qkv.block_type.nbytes)
        for group in gl.static_range(TILE // BLOCK):
            load(qkv, [first + time + group * BLOCK, column], q_full, qs.index(group))
        for start in range(0, time + TILE, BLOCK):
            _load_pair(qkv, ks, qkv, vs, first + start, C + column, 2 * C + column, k_full, v_full, free, step, SLOTS)
            step += 1
        turn += 1


@gluon.jit
def _weigh(s, o, largest, total, factor, left: gl.constexpr, dtype: gl.constexpr):
    """exp(logits - the largest so far) as a left factor; the sums so far, rescaled to it."""
    new = gl.maximum(largest, gl.max(s, axis=1))
    p = gl.exp2(s * factor - (new * factor)[:, None])
    fade = gl.exp2((largest - new) * factor)
    return gl.convert_layout(p.to(dtype), left), o * fade[:, None], new, total * fade + gl.sum(p, axis=1)


@gluon.jit
def _block(group: gl.constexpr, sums, largest, total, seen, qs, ks, vs, q_free, k_full, v_full, free, step, later, factor, left: gl.constexpr,
           MASKED: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    """Adds a block to the sums of half `group`; that product is under way before and after. The `MASKED` block is the last that reads the queries."""
    form: gl.constexpr = left.parent
    nothing = gl.zeros((BLOCK, BLOCK), gl.float32, form)
    slot = step % SLOTS
    mbarrier.wait(k_full.index(slot), step // SLOTS & 1)
    logits = warpgroup_mma(qs.index(group), ks.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s, o = warpgroup_mma_wait(num_outstanding=0, deps=(logits, sums))
    barrier()
    mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1, pred=later)
    if MASKED:
        mbarrier.arrive(q_free, count=1)
        s = gl.where(seen, s, -float("inf"))
    p, o, largest, total = _weigh(s, o, largest, total, factor, left, qs.dtype)
    mbarrier.wait(v_full.index(slot), step // SLOTS & 1)
    return warpgroup_mma(p, vs.index(slot), o, is_async=True), largest, total


@gluon.jit
def _half_tiles(group: gl.constexpr, qs, ks, vs, ys, outs, q_full, q_free, k_full, v_full, free, y, out, lse_ptr, T, H, items, scale, alpha, lam,
                FIRST, D: gl.constexpr, DIFFUSES: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    """Half `group` of each tile."""
    form: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=form, k_width=2)
    dtype: gl.constexpr = qs.dtype
    factor = scale * LOG2E
    i = gl.arange(0, BLOCK, gl.SliceLayout(1, form))
    seen = gl.arange(0, BLOCK, gl.SliceLayout(0, form))[None, :] <= i[:, None]
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first, time, column, which = _place(item, TILE, T, H, D)
        time += group * BLOCK
        largest = gl.full((BLOCK,), -float("inf"), gl.float32, gl.SliceLayout(1, form))
        total = gl.zeros((BLOCK,), gl.float32, gl.SliceLayout(1, form))
        sums = warpgroup_mma_init(gl.zeros((BLOCK, D), gl.float32, form))
        mbarrier.wait(q_full, turn & 1)
        for start in range(0, time, BLOCK):
            sums, largest, total = _block(group, sums, largest, total, seen, qs, ks, vs, q_free, k_full, v_full, free, step, start > 0, factor, left,
                                          False, SLOTS)  # fmt: skip
            step += 1
        sums, largest, total = _block(
            group, sums, largest, total, seen, qs, ks, vs, q_free, k_full, v_full, free, step, time > 0, factor, left, True, SLOTS
        )
        slot = step % SLOTS
        o = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        gl.store(lse_ptr + which * T + time + i, largest * factor + gl.log2(total))
        tma.store_wait(0)  # of the tile before, from the same place
        barrier()
        half = (o * (1 / total)[:, None]).to(dtype)
        ys.index(group).store(half)
        if DIFFUSES:  # the last block of values is that of the queries' own tokens
            whole = half.to(gl.float32)
            difference = lam * (whole - alpha * vs.index(slot).load(form).to(gl.float32))
            outs.index(group).store(gl.where(column >= FIRST * D, difference, whole).to(dtype))
        fence_async_shared()
        barrier()
        mbarrier.arrive(free.index(slot), count=1)
        store(y, [first + time, column], ys.index(group))
        if DIFFUSES:
            store(out, [first + time, column], outs.index(group))
        step += 1
        for _ in gl.static_range(TILE // BLOCK - 1 - group):  # blocks of the tile that this half does not see
            mbarrier.wait(k_full.index(step % SLOTS), step // SLOTS & 1)
            mbarrier.wait(v_full.index(step % SLOTS), step // SLOTS & 1)
            mbarrier.arrive(free.index(step % SLOTS), count=1)
            step += 1
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def _attend_long(qkv, y, out, lse_ptr, T, H, items, scale, alpha, lam, FIRST, C, D: gl.constexpr, DIFFUSES: gl.constexpr,
                 SLOTS: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    qs = gl.allocate_shared_memory(qkv.dtype, [TILE // BLOCK, BLOCK, D], qkv.layout)
    ks = gl.allocate_shared_memory(qkv.dtype, [SLOTS, BLOCK, D], qkv.layout)
    vs = gl.allocate_shared_memory(qkv.dtype, [SLOTS, BLOCK, D], qkv.layout)
    ys = gl.allocate_shared_memory(qkv.dtype, [TILE // BLOCK, BLOCK, D], qkv.layout)
    outs = gl.allocate_shared_memory(qkv.dtype, [TILE // BLOCK if DIFFUSES else 1, BLOCK, D], qkv.layout)
    q_full, q_free = _barriers(1, 1).index(0), _barriers(1, TILE // BLOCK).index(0)
    k_full, v_full, free = _barriers(SLOTS, 1), _barriers(SLOTS, 1), _barriers(SLOTS, TILE // BLOCK)
    gl.warp_specialize(
        [
            (_half_tiles, (0, qs, ks, vs, ys, outs, q_full, q_free, k_full, v_full, free, y, out, lse_ptr, T, H, items, scale, alpha, lam, FIRST, D,
                           DIFFUSES, SLOTS)),
            (_half_tiles, (1, qs, ks, vs, ys, outs, q_full, q_free, k_full, v_full, free, y, out, lse_ptr, T, H, items, scale, alpha, lam, FIRST, D,
                           DIFFUSES, SLOTS)),
            (_load_forward, (qkv, qs, ks, vs, q_full, q_free, k_full, v_full, free, T, H, items, C, D, SLOTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------------
# Gradient of queries


@gluon.jit
def _load_queries(tile, block, dout, y, qs, gs, ys, ks, vs, full, spent, k_full, v_full, free, T, H, items, C, D: gl.constexpr,
                  SLOTS: gl.constexpr):  # fmt: skip
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first, time, column, which = _place(item, TILE, T, H, D)
        mbarrier.wait(spent, (turn + 1) & 1)
        mbarrier.expect(full, 3 * tile.block_type.nbytes)
        load(tile, [first + time, column], full, qs)
        load(dout, [first + time, column], full, gs)
        load(y, [first + time, column], full, ys)
        for back in range(BLOCK, time + TILE + BLOCK, BLOCK):  # from the diagonal on
            _load_pair(block, ks, block, vs, first + time + TILE - back, C + column, 2 * C + column, k_full, v_full, free, step, SLOTS)
            step += 1
        turn += 1


@gluon.jit
def _queries_half(half: gl.constexpr, s, d, dq, other, lse, delta, seen, qs, gs, ks, vs, k_full, v_full, step, factor, left: gl.constexpr,
                  MASKED: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    """Adds what a block gives to the dq of half a tile; that sum is under way afterwards, the other half's `other` was before. s and d are registers
    for logits and dout v^T."""
    slot = step % SLOTS
    mbarrier.wait(k_full.index(slot), step // SLOTS & 1)
    logits = warpgroup_mma(qs.slice(half * BLOCK, BLOCK, dim=0), ks.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), step // SLOTS & 1)
    products = warpgroup_mma(gs.slice(half * BLOCK, BLOCK, dim=0), vs.index(slot).permute((1, 0)), d, use_acc=False, is_async=True)
    s, d, done = warpgroup_mma_wait(num_outstanding=0, deps=(logits, products, other))
    p = gl.exp2(s * factor - lse)
    if MASKED:
        p = gl.where(seen, p, 0.0)
    ds = gl.convert_layout((p * (d - delta)).to(ks.dtype), left)
    return s, d, warpgroup_mma(ds, ks.index(slot), dq, is_async=True), done


@gluon.jit
def _queries_tiles(qs, gs, ys, ks, vs, whole, full, spent, k_full, v_full, free, dqkv, lse_ptr, delta_ptr, T, H, items, scale, lam,
                   FIRST, D: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    form: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=form, k_width=2)
    factor = scale * LOG2E
    i = gl.arange(0, BLOCK, gl.SliceLayout(1, form))
    seen = gl.arange(0, BLOCK, gl.SliceLayout(0, form))[None, :] <= i[:, None]
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first, time, column, which = _place(item, TILE, T, H, D)
        place = which * T + time + i
        lse_a, lse_b = gl.load(lse_ptr + place)[:, None], gl.load(lse_ptr + place + BLOCK)[:, None]
        mbarrier.wait(full, turn & 1)
        delta_a = gl.sum(gs.slice(0, BLOCK, dim=0).load(form).to(gl.float32) * ys.slice(0, BLOCK, dim=0).load(form).to(gl.float32), axis=1)
        delta_b = gl.sum(gs.slice(BLOCK, BLOCK, dim=0).load(form).to(gl.float32) * ys.slice(BLOCK, BLOCK, dim=0).load(form).to(gl.float32), axis=1)
        gl.store(delta_ptr + place, delta_a)
        gl.store(delta_ptr + place + BLOCK, delta_b)
        delta_a, delta_b = delta_a[:, None], delta_b[:, None]
        a, b = gl.zeros((BLOCK, D), gl.float32, form), warpgroup_mma_init(gl.zeros((BLOCK, D), gl.float32, form))
        s, d = gl.zeros((BLOCK, BLOCK), gl.float32, form), gl.zeros((BLOCK, BLOCK), gl.float32, form)
        # from the diagonal on, so that a sum is under way from each block to the next; the first half does not see the tile's last block
        s, d, more, b = _queries_half(
            1, s, d, gl.zeros((BLOCK, D), gl.float32, form), b, lse_b, delta_b, seen, qs, gs, ks, vs, k_full, v_full, step, factor, left, True, SLOTS
        )
        step += 1
        s, d, more, b = _queries_half(0, s, d, a, more, lse_a, delta_a, seen, qs, gs, ks, vs, k_full, v_full, step, factor, left, True, SLOTS)
        barrier()
        mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1)
        s, d, more, a = _queries_half(1, s, d, b, more, lse_b, delta_b, seen, qs, gs, ks, vs, k_full, v_full, step, factor, left, False, SLOTS)
        step += 1
        for _ in range(0, time, BLOCK):
            s, d, going, b = _queries_half(0, s, d, a, more, lse_a, delta_a, seen, qs, gs, ks, vs, k_full, v_full, step, factor, left, False, SLOTS)
            barrier()
            mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1)
            s, d, more, a = _queries_half(1, s, d, b, going, lse_b, delta_b, seen, qs, gs, ks, vs, k_full, v_full, step, factor, left, False, SLOTS)
            step += 1
        tma.store_wait(0)
        b = warpgroup_mma_wait(num_outstanding=0, deps=(more,))
        barrier()
        mbarrier.arrive(spent, count=1)
        mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1)
        strength = gl.where(column >= FIRST * D, scale * lam, scale)
        whole.slice(0, BLOCK, dim=0).store((a * strength).to(ks.dtype))
        whole.slice(BLOCK, BLOCK, dim=0).store((b * strength).to(ks.dtype))
        fence_async_shared()
        barrier()
        store(dqkv, [first + time, column], whole)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def _attend_long_queries(tile, block, dout, y, dqkv, lse_ptr, delta_ptr, T, H, items, scale, lam, FIRST, C, D: gl.constexpr,
                         SLOTS: gl.constexpr):  # fmt: skip
    """dq, and the sums over channels of dout y, which the pass for keys needs too."""
    qs = gl.allocate_shared_memory(tile.dtype, [TILE, D], tile.layout)
    gs = gl.allocate_shared_memory(tile.dtype, [TILE, D], tile.layout)
    ys = gl.allocate_shared_memory(tile.dtype, [TILE, D], tile.layout)
    whole = gl.allocate_shared_memory(tile.dtype, [TILE, D], tile.layout)
    ks = gl.allocate_shared_memory(tile.dtype, [SLOTS, BLOCK, D], block.layout)
    vs = gl.allocate_shared_memory(tile.dtype, [SLOTS, BLOCK, D], block.layout)
    full, spent = _barriers(1, 1).index(0), _barriers(1, 1).index(0)
    k_full, v_full, free = _barriers(SLOTS, 1), _barriers(SLOTS, 1), _barriers(SLOTS, 1)
    gl.warp_specialize(
        [
            (_queries_tiles, (qs, gs, ys, ks, vs, whole, full, spent, k_full, v_full, free, dqkv, lse_ptr, delta_ptr, T, H, items, scale, lam, FIRST,
                              D, SLOTS)),
            (_load_queries, (tile, block, dout, y, qs, gs, ys, ks, vs, full, spent, k_full, v_full, free, T, H, items, C, D, SLOTS)),
        ],
        [1],
        [24],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------------
# Gradients of keys and values


@gluon.jit
def _load_keys(qkv, dout, ks, vs, owns, qs, gs, lses, deltas, full, spent, own_full, own_free, q_full, g_full, sums_full, free, lse_ptr, delta_ptr,
               T, H, items, C, D: gl.constexpr, DIFFUSES: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    line: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first, time, column, which = _place(item, BLOCK, T, H, D)
        place = turn % 2
        mbarrier.wait(spent.index(place), (turn // 2 + 1) & 1)
        mbarrier.expect(full.index(place), 2 * qkv.block_type.nbytes)
        load(qkv, [first + time, C + column], full.index(place), ks.index(place))
        load(qkv, [first + time, 2 * C + column], full.index(place), vs.index(place))
        for start in range(time, T, BLOCK):
            i = which * T + start + gl.arange(0, BLOCK, line)
            lse, delta = gl.load(lse_ptr + i), gl.load(delta_ptr + i)
            _load_pair(qkv, qs, dout, gs, first + start, column, column, q_full, g_full, free, step, SLOTS)
            lses.index(step % SLOTS).store(lse)
            deltas.index(step % SLOTS).store(delta)
            barrier()
            mbarrier.arrive(sums_full.index(step % SLOTS), count=1)
            step += 1
        if DIFFUSES:
            mbarrier.wait(own_free, turn & 1)
            mbarrier.expect(own_full, dout.block_type.nbytes)
            load(dout, [first + time, column], own_full, owns)
        turn += 1


@gluon.jit
def _keys_block(s, d, summing_k, summing_v, ks, vs, qs, gs, lses, deltas, q_full, g_full, sums_full, step, factor, left: gl.constexpr,
                MASKED: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    """Adds what a block of queries gives to the sums for dk and dv, which are under way before and after; the block before is done with. s and d are
    registers for the transposed logits and v dout^T."""
    form: gl.constexpr = s.type.layout
    across: gl.constexpr = gl.SliceLayout(0, form)
    slot = step % SLOTS
    q, g = qs.index(slot), gs.index(slot)
    mbarrier.wait(q_full.index(slot), step // SLOTS & 1)
    logits = warpgroup_mma(ks, q.permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(g_full.index(slot), step // SLOTS & 1)
    products = warpgroup_mma(vs, g.permute((1, 0)), d, use_acc=False, is_async=True)
    mbarrier.wait(sums_full.index(slot), step // SLOTS & 1)
    s, d, dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=(logits, products, summing_k, summing_v))
    p = gl.exp2(s * factor - lses.index(slot).load(across)[None, :])
    if MASKED:
        p = gl.where(gl.arange(0, BLOCK, gl.SliceLayout(1, form))[:, None] <= gl.arange(0, BLOCK, across)[None, :], p, 0.0)
    summing_v = warpgroup_mma(gl.convert_layout(p.to(qs.dtype), left), g, dv, is_async=True)
    ds = p * (d - deltas.index(slot).load(across)[None, :])
    return s, d, warpgroup_mma(gl.convert_layout(ds.to(qs.dtype), left), q, dk, is_async=True), summing_v


@gluon.jit
def _keys_tiles(ks, vs, owns, qs, gs, lses, deltas, whole, full, spent, own_full, own_free, q_full, g_full, sums_full, free, dqkv, T, H, items,
                scale, alpha, lam, FIRST, C, D: gl.constexpr, DIFFUSES: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    form: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=form, k_width=2)
    factor = scale * LOG2E
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first, time, column, which = _place(item, BLOCK, T, H, D)
        s, d = gl.zeros((BLOCK, BLOCK), gl.float32, form), gl.zeros((BLOCK, BLOCK), gl.float32, form)
        dk, dv = warpgroup_mma_init(gl.zeros((BLOCK, D), gl.float32, form)), warpgroup_mma_init(gl.zeros((BLOCK, D), gl.float32, form))
        k, v = ks.index(turn % 2), vs.index(turn % 2)
        mbarrier.wait(full.index(turn % 2), turn // 2 & 1)
        s, d, dk, dv = _keys_block(s, d, dk, dv, k, v, qs, gs, lses, deltas, q_full, g_full, sums_full, step, factor, left, True, SLOTS)
        step += 1
        tma.store_wait(0)  # of the tile before, from the same places
        barrier()
        mbarrier.arrive(own_free, count=1)
        for _ in range(time + BLOCK, T, BLOCK):
            s, d, dk, dv = _keys_block(s, d, dk, dv, k, v, qs, gs, lses, deltas, q_full, g_full, sums_full, step, factor, left, False, SLOTS)
            barrier()
            mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1)
            step += 1
        sum_k, sum_v = warpgroup_mma_wait(num_outstanding=0, deps=(dk, dv))
        barrier()
        mbarrier.arrive(spent.index(turn % 2), count=1)
        mbarrier.arrive(free.index((step + SLOTS - 1) % SLOTS), count=1)
        diffuses = column >= FIRST * D
        strength = gl.where(diffuses, lam, 1.0)
        if DIFFUSES:
            mbarrier.wait(own_full, turn & 1)
            sum_v -= gl.where(diffuses, alpha, 0.0) * owns.load(form).to(gl.float32)
        whole.store((sum_k * (scale * strength)).to(qs.dtype))
        owns.store((sum_v * strength).to(qs.dtype))
        fence_async_shared()
        barrier()
        store(dqkv, [first + time, C + column], whole)
        store(dqkv, [first + time, 2 * C + column], owns)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def _attend_long_keys(qkv, dout, dqkv, lse_ptr, delta_ptr, T, H, items, scale, alpha, lam, FIRST, C, D: gl.constexpr, DIFFUSES: gl.constexpr,
                      SLOTS: gl.constexpr):  # fmt: skip
    """dk and dv."""
    ks = gl.allocate_shared_memory(qkv.dtype, [2, BLOCK, D], qkv.layout)
    vs = gl.allocate_shared_memory(qkv.dtype, [2, BLOCK, D], qkv.layout)
    owns = gl.allocate_shared_memory(qkv.dtype, [BLOCK, D], qkv.layout)  # the keys' own rows of dout, and dv afterwards
    whole = gl.allocate_shared_memory(qkv.dtype, [BLOCK, D], qkv.layout)
    qs = gl.allocate_shared_memory(qkv.dtype, [SLOTS, BLOCK, D], qkv.layout)
    gs = gl.allocate_shared_memory(qkv.dtype, [SLOTS, BLOCK, D], qkv.layout)
    lses = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    deltas = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, spent = _barriers(2, 1), _barriers(2, 1)
    own_full, own_free = _barriers(1, 1).index(0), _barriers(1, 1).index(0)
    q_full, g_full, sums_full, free = _barriers(SLOTS, 1), _barriers(SLOTS, 1), _barriers(SLOTS, 1), _barriers(SLOTS, 1)
    gl.warp_specialize(
        [
            (_keys_tiles, (ks, vs, owns, qs, gs, lses, deltas, whole, full, spent, own_full, own_free, q_full, g_full, sums_full, free, dqkv, T, H,
                           items, scale, alpha, lam, FIRST, C, D, DIFFUSES, SLOTS)),
            (_load_keys, (qkv, dout, ks, vs, owns, qs, gs, lses, deltas, full, spent, own_full, own_free, q_full, g_full, sums_full, free, lse_ptr,
                          delta_ptr, T, H, items, C, D, DIFFUSES, SLOTS)),
        ],
        [1],
        [24],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------------


def _describe(x, rows: gl.constexpr):
    """(B, T, …) as a matrix of B T rows, read and written by so many rows of 64 columns. Needs a current CUDA context: in a thread of its own, as
    autograd's is, something else must have run before."""
    form = gl.NVMMASharedLayout.get_default_for([rows.value, 64], gl.bfloat16)  # of float16 too: the size of an element counts
    return TensorDescriptor.from_tensor(x.view(-1, x.size(-1)), [rows.value, 64], form)


def _launch(kernel, rows: gl.constexpr, qkv, n_head: int, given, form, registers: int, most: int):
    """Runs a pass by tiles of so many rows, with at most so many programs, if not 0."""
    B, T, _ = qkv.shape
    tiles = B * n_head * (T // rows.value)
    kernel[(min(tiles, most or TOGETHER * processors(qkv.device)),)](
        *given, T, n_head, tiles, 1 / math.sqrt(64), *form, num_warps=4, maxnreg=registers
    )


def forward(qkv, y, out, lse, n_head: int, alpha: float, lam: float, heads: int, most: int = 0):
    """Fills y (B, T, C), with `heads` out (B, T, C), and lse (B, H, T), to base 2, from qkv (B, T, 3 C)."""
    given = *(_describe(x, BLOCK) for x in (qkv, y, out if heads else y)), lse
    form = alpha, lam, n_head - heads, y.size(-1), 64, heads > 0, SLOTS["forward"], AT_WORK
    _launch(_attend_long, TILE, qkv, n_head, given, form, FORWARD, most)


def backward(dout, qkv, y, lse, delta, dqkv, n_head: int, alpha: float, lam: float, heads: int, most: int = 0):
    """Fills dqkv (B, T, 3 C), and delta (B, H, T) on the way, from dout (B, T, C) and what `forward` was given and has filled."""
    first, C = n_head - heads, y.size(-1)
    given = _describe(qkv, TILE), _describe(qkv, BLOCK), *(_describe(x, TILE) for x in (dout, y, dqkv)), lse, delta
    _launch(_attend_long_queries, TILE, qkv, n_head, given, (lam, first, C, 64, SLOTS["queries"]), BACKWARD, most)
    given = *(_describe(x, BLOCK) for x in (qkv, dout, dqkv)), lse, delta
    _launch(_attend_long_keys, BLOCK, qkv, n_head, given, (alpha, lam, first, C, 64, heads > 0, SLOTS["keys"]), BACKWARD, most)
