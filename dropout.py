"""Dropout's decisions as a pure function of (seed, site, index), in Triton: computed where they are needed, forward and backward, and never stored.

The masks of a step of config/imagenet16.py would be 12.6 MB for each dropout of each layer, written once and read twice by passes that do little but
move bytes. A call of Philox decides for eight elements side by side and costs fewer instructions than such a pass has to spare.

The mapping is fixed, since several kernels must agree on it: element (row, column) of the (N, C) matrix of a site belongs to the call

    call = row cdiv(C, 8) + column // 8,    Philox4x32-7 of counter (call, site, 0, 0) under the seed's two words

and is its decision column % 8: the halves of its four words, low before high, each kept where half >= round(65536 p).
"""

import torch
import triton
import triton.language as tl

from operators import operator


def threshold(p: float) -> int:
    """What a half must reach to be kept, for dropout with probability p, which thereby comes in steps of 2^-16."""
    return round(p * 65536)


@triton.jit
def _words(seed, site, row, call, C):
    """The four words of each call of rows `row` (R,), for columns 8 call to 8 call + 7 of a matrix of width C, `call` (K,): (R, K) each."""
    which = row[:, None] * tl.cdiv(C, 8) + call[None, :]
    return tl.philox(seed, which, site, 0, 0, n_rounds=7)  # as many as pass BigCrush (Salmon et al. 2011)


@triton.jit
def decisions(seed, site, row, call, C, least, ROWS: tl.constexpr, CALLS: tl.constexpr):
    """What is kept of rows `row` (ROWS,), columns 8 call to 8 call + 7 for each of `call` (CALLS,), of a matrix of width C: bool (ROWS, 8 CALLS).

    `least` is the threshold. For tiles with eight columns side by side in a thread, as loads of rows have them: there each call is made once.
    """
    a, b, c, d = _words(seed, site, row, call, C)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # (…, 2, 2): the last index is the less significant bit of a word's number
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16) >= least, (ROWS, 8 * CALLS))


@triton.jit
def _two(word, least, low):
    """The decisions of a word's halves as the bits low and 2 low."""
    return tl.where((word & 0xFFFF) >= least, low, 0) | tl.where((word >> 16) >= least, 2 * low, 0)


@triton.jit
def decisions_of_product(seed, site, row, call, C, least, ROWS: tl.constexpr, CALLS: tl.constexpr):
    """The same for a tile that a matrix product leaves, where four threads share the eight columns of a call.

    One of them makes the call and the others get its decisions as the bits of one number. The sum over an axis of length one is there because the
    compiler does not move a change of layout across it: else each of the four would make the call for itself.
    """
    a, b, c, d = _words(seed, site, row, call, C)
    bits = tl.sum((_two(a, least, 1) | _two(b, least, 4) | _two(c, least, 16) | _two(d, least, 64))[None, :, :], axis=0)
    bits = tl.broadcast_to(bits[:, :, None], (ROWS, CALLS, 8)) & (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape(bits, (ROWS, 8 * CALLS)) != 0


@triton.jit(do_not_specialize=["site"])
def _kept(seed_ptr, out_ptr, site, n, C, least, PRODUCT: tl.constexpr, ROWS: tl.constexpr, CALLS: tl.constexpr):
    row, call = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * CALLS + tl.arange(0, CALLS)
    column = tl.program_id(1) * 8 * CALLS + tl.arange(0, 8 * CALLS)
    if PRODUCT:
        keep = decisions_of_product(tl.load(seed_ptr), site, row, call, C, least, ROWS, CALLS)
    else:
        keep = decisions(tl.load(seed_ptr), site, row, call, C, least, ROWS, CALLS)
    tl.store(out_ptr + row[:, None].to(tl.int64) * C + column[None, :], keep, mask=(row < n)[:, None] & (column < C)[None, :])


def kept(seed: torch.Tensor, site: int, p: float, rows: int, columns: int, product: bool = False) -> torch.Tensor:
    """The decisions of a site, bool (rows, columns), True where an element is kept, by one of the two ways: for tests. Training never forms them."""
    out = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    grid = triton.cdiv(rows, 16), triton.cdiv(columns, 64)
    _kept[grid](seed, out.view(torch.uint8), site, rows, columns, threshold(p), product, ROWS=16, CALLS=8)
    return out


@operator
def dropout_seed(x: torch.Tensor) -> torch.Tensor:
    """The seed of a forward pass, int64 (1,), by torch's generator of x's device.

    x, what enters the network, tells the passes of one step apart: of two calls with equal arguments the compiler would make one.
    """
    return torch.randint(2**62, (1,), device=x.device)  # drawn on the device, so that a CUDA graph draws anew at every replay


dropout_seed.register_fake(lambda x: torch.empty(1, dtype=torch.int64, device=x.device))
