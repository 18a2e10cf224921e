"""One token more for a plain GPT on CUDA, in Triton: five kernels a layer. sample.py makes one CUDA graph of it; elsewhere the model itself does it.

A product with one row is bound by the reading of its weights, microseconds each, and what the model does around it by the launching of kernels. So
LayerNorm, GELU and the residual are computed in the products that stand beside them (the LayerNorm once in every program, which costs less than a
launch), and all of a head's attention is one program that reads no further than the token's position.

Sums and exponentials are in float32, the residual stream too. tests/test_decode.py compares with float64.
"""

import math

import torch
import torch.nn as nn
import triton
import triton.language as tl

from model import GPT, CausalSelfAttention, plain_attention


@triton.jit
def _linear(x_ptr, weight_ptr, bias_ptr, gain_ptr, shift_ptr, stream_ptr, out_ptr, N, K: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
            SHIFT: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """ROWS numbers of one of B rows. With NORM, one block is all of x."""
    row, b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        weight = tl.load(weight_ptr + row[:, None] * K + column[None, :], mask=(row[:, None] < N) & inside[None, :], other=0.0)  # first: it is far
        x = tl.load(x_ptr + b * K + column, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            x = tl.where(inside, x - tl.sum(x, axis=0) / K, 0.0)
            x *= tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32) / tl.sqrt(tl.sum(x * x, axis=0) / K + 1e-5)
            if SHIFT:
                x += tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
        products += weight.to(tl.float32) * x[None, :]
    y = tl.sum(products, axis=1)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    if GELU:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    if ADD:
        y += tl.load(stream_ptr + b * N + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + b * N + row, y, mask=row < N)


def linear(x, layer: nn.Linear, norm: nn.Module | None = None, gelu: bool = False, stream=None):
    """layer(norm(x)), with its GELU, or added to `stream` (B, N) in float32: (B, K) -> (B, N), else in the weight's dtype."""
    N, K = layer.weight.shape
    out = torch.empty(len(x), N, dtype=layer.weight.dtype if stream is None else torch.float32, device=x.device)
    block = triton.next_power_of_2(K) if norm is not None else min(1024, triton.next_power_of_2(K))
    rows = 1 << max(1, min(8, 8192 // block, N // 256)).bit_length() - 1  # enough programs for all multiprocessors
    gain, shift = (None, None) if norm is None else (norm.weight, norm.bias)
    _linear[(triton.cdiv(N, rows), len(x))](
        x, layer.weight, layer.bias, gain, shift, stream, out, N, K, BIAS=layer.bias is not None, NORM=norm is not None, SHIFT=shift is not None,
        GELU=gelu, ADD=stream is not None, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit
def _attend(qkv_ptr, keys_ptr, values_ptr, position_ptr, y_ptr, S, scale, alpha, lam, FIRST: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
            KEYS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One head of one sequence. Each of KEYS lanes has a maximum, a sum and values of its own; they meet once, after the last key."""
    b, head = tl.program_id(0) // H, tl.program_id(0) % H
    position = tl.load(position_ptr)
    lane, column = tl.arange(0, KEYS), tl.arange(0, BLOCK)
    inside = column < D
    own = qkv_ptr + b * (3 * H * D) + head * D + column
    q = tl.load(own, mask=inside, other=0.0).to(tl.float32) * scale
    k = tl.load(own + H * D, mask=inside, other=0.0)
    v = tl.load(own + 2 * H * D, mask=inside, other=0.0)
    entries = tl.program_id(0).to(tl.int64) * S * D
    tl.store(keys_ptr + entries + position * D + column, k, mask=inside)
    tl.store(values_ptr + entries + position * D + column, v, mask=inside)
    v = v.to(tl.float32)
    largest = tl.zeros((KEYS,), tl.float32) + tl.sum(q * k.to(tl.float32), axis=0)  # the token itself is in lane 0, and read from nowhere
    total = tl.where(lane == 0, 1.0, 0.0)
    y = tl.where(lane == 0, 1.0, 0.0)[:, None] * v[None, :]
    for start in tl.range(0, position, KEYS, num_stages=3):
        past = start + lane < position
        i = entries + (start + lane)[:, None] * D + column[None, :]
        keys = tl.load(keys_ptr + i, mask=past[:, None] & inside[None, :], other=0.0).to(tl.float32)
        values = tl.load(values_ptr + i, mask=past[:, None] & inside[None, :], other=0.0).to(tl.float32)
        score = tl.where(past, tl.sum(keys * q[None, :], axis=1), float("-inf"))
        new = tl.maximum(largest, score)
        shrink, weight = tl.exp(largest - new), tl.exp(score - new)
        total = total * shrink + weight
        y = y * shrink[:, None] + weight[:, None] * values
        largest = new
    weight = tl.exp(largest - tl.max(largest, axis=0))
    y = tl.sum(y * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    y = tl.where(head >= FIRST, lam * (y - alpha * v), y)
    tl.store(y_ptr + b * (H * D) + head * D + column, y, mask=inside)


def attend(qkv, entries, position, layer: CausalSelfAttention):
    """What layer's heads hand to c_proj, (B, C), for queries, keys and values (B, 3 C) of the token at `position` (1,).

    Its key and value are written into `entries` (2, B, H, S, d), whose later positions are not read.
    """
    _, B, H, S, d = entries.shape
    y, block = qkv.new_empty(B, H * d), triton.next_power_of_2(d)
    _attend[(B * H,)](
        qkv, entries[0], entries[1], position, y, S, 1 / math.sqrt(d), layer.alpha, layer.lam, H - layer.diffusing_heads, H, d,
        KEYS=max(16, 16384 // (block * qkv.element_size())), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return y


def suits(model: GPT) -> bool:
    """Whether read_token can take the model's place."""
    return plain_attention(model.config) and model.transformer.wte.weight.dtype != torch.float64


def read_token(model: GPT, token, cache):
    """model(token, cache=cache)[0][:, 0] for (B, 1) ids at `cache.position`, which stays, as does cache.length: logits (B, vocab_size)."""
    modules = model.transformer
    x = modules.wte(token[:, 0]) + modules.wpe(cache.position)  # (B, C)
    for block, entries in zip(modules.h, cache.entries):
        qkv = linear(x, block.attn.c_attn, block.ln_1)
        y = attend(qkv, entries, cache.position, block.attn)
        x = linear(y, block.attn.c_proj, stream=x)
        hidden = linear(x, block.mlp.c_fc, block.ln_2, gelu=True)
        x = linear(hidden, block.mlp.c_proj, stream=x)
    return linear(x, model.lm_head, modules.ln_f)
