"""The passes between a transformer's matrix products, in Triton, for half precision on CUDA. Elsewhere the model's own modules do the work.

torch.compile fuses element-wise passes well, but leaves these to be won (times in LOG.md):

    residual, dropout, LayerNorm   one pass in each direction, which also writes the branch's gradient in half precision and sums the gain's; the
                                   first one takes the embeddings, where they have dropout; a ViT's last one gives the mean over tokens; on Hopper
                                   GPUs, for rows of 384 channels, the way there is the end of the product before it; all in fused_norm.py
    dropout                        eight decisions from one Philox call, computed again for the way back: no mask is ever stored (dropout.py)
    linear layers                  weights are cast once per step, all together; their gradients leave the product in float32
    GELU                           exact up to 2.2e-7 with one exp2 and one rsqrt instead of the long erf; kept, not computed again; on Hopper GPUs it
                                   and its gradient are the ends of the products before them, its derivative kept in eight bits (fused_products.py)
    attention                      packed queries, keys and values in, their gradient out, graph diffusion's subtraction inside (fused_attention.py)
    queries, keys, values          around the framework's attention: on Hopper GPUs the products of the projection's gradient take dq, dk and dv as
                                   they are; else one pass gathers them
    graph diffusion                elsewhere y - v is kept; v's second gradient is subtracted in the pass that gathers, or in one over dv alone
    token table                    its gradient by a sort instead of atomics
    cross-entropy                  the output layer in pieces of CHUNK rows; the pass that computes the loss turns the logits into its gradient in
                                   place, so that neither the 65,536 x 50,304 logits of a GPT-2 step nor their gradient are ever whole

Sums and exponentials are in float32, the residual stream too. tests/test_fused.py compares each with float64.
"""

import torch
import torch.nn as nn
import triton
import triton.language as tl
from torch.nn import functional as F

import fused_attention
import fused_norm
import fused_products
import model
from dropout import dropout_seed
from fused_norm import AddNorm, AddNormMean, StartNorm, add_norm_backward, add_norm_of, product_of, tile_of
from fused_products import gelu, linear_gelu, linear_gelu_backward, product_of_three
from model import GPT, CausalSelfAttention, ViT
from operators import operator
from place import processors

CHUNK = 32768  # rows of logits at a time: 3.1 GiB of GPT-2's
LANES, PROGRAMS = 1024, 2  # of the cross-entropy: groups of eight logits in a program's tile, and programs per multiprocessor where rows are longer


def _half(x) -> torch.dtype:
    """The dtype of products: autocast's, or that of x without it."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


# ---------------------------------------------------------------------------------------------------------------------------------
# Token table


@triton.jit
def _sum_places(dx_ptr, order_ptr, start_ptr, out_ptr, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A token's row: the gradients of the places where it stands, summed in their order."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(start_ptr + token), tl.load(start_ptr + token + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, last, ROWS):
        i = start + tl.arange(0, ROWS)
        place = tl.load(order_ptr + i, mask=i < last, other=0)
        total += tl.load(dx_ptr + place[:, None] * C + column[None, :], mask=(i < last)[:, None] & (column < C)[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + token * C + column, tl.sum(total, axis=0), mask=column < C)


@operator
def table_gradient(dx: torch.Tensor, idx: torch.Tensor, rows: int) -> torch.Tensor:
    """Gradient (rows, C) in float32 of a table whose rows idx (…) gave an output with gradient dx (…, C). Without atomics: it repeats to the bit."""
    dx, C = dx.contiguous(), dx.size(-1)
    tokens, order = idx.flatten().to(torch.int32).sort(stable=True)
    starts = torch.searchsorted(tokens, torch.arange(rows + 1, dtype=torch.int32, device=dx.device))
    out = torch.empty(rows, C, dtype=torch.float32, device=dx.device)
    block = 128 if rows > 4096 else 32  # few tokens stand in many places each: more programs share them
    _sum_places[(rows, triton.cdiv(C, block))](dx, order, starts, out, C, ROWS=4096 // block, BLOCK=block)
    return out


table_gradient.register_fake(lambda dx, idx, rows: dx.new_empty(rows, dx.size(-1), dtype=torch.float32))


class _Lookup(torch.autograd.Function):
    """Rows idx of a table."""

    @staticmethod
    def forward(ctx, table, idx):
        ctx.save_for_backward(idx)
        ctx.rows = len(table)
        return F.embedding(idx, table)

    @staticmethod
    def backward(ctx, dx):
        return table_gradient(dx, *ctx.saved_tensors, ctx.rows), None


# ---------------------------------------------------------------------------------------------------------------------------------
# Linear layers


@operator
def weight_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy^T x in float32 from matrices in half precision: (N, out), (N, in) -> (out, in)."""
    total = torch.empty(dy.size(1), x.size(1), dtype=torch.float32, device=x.device)
    _accumulate(total, dy, x, add=False)
    return total


weight_gradient.register_fake(lambda dy, x: x.new_empty(dy.size(1), x.size(1), dtype=torch.float32))


def _accumulate(total, a, b, add: bool):
    """total (+)= a^T b, the sum in float32; where the device has no such product of half-precision matrices (a CPU), of float32 ones."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(total, a.t(), b, beta=float(add), out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.t().float(), b.float(), beta=float(add), out=total)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, half):  # (N, in), (out, in) float32 and its cast
        ctx.save_for_backward(x, half)
        return x @ half.t()

    @staticmethod
    def backward(ctx, dy):
        x, half = ctx.saved_tensors
        return dy @ half, weight_gradient(dy, x), None


class Linear(nn.Linear):
    """nn.Linear whose product reads `half`, the weight in half precision, which `cast_weights` refreshes."""

    @property
    def reads_half(self) -> bool:
        """Under autocast, or where `half` is no less precise."""
        return torch.is_autocast_enabled("cuda") or self.half.dtype == torch.float32

    def forward(self, x):
        if self.reads_half:
            y = _Linear.apply(x.flatten(0, -2).to(self.half.dtype), self.weight, self.half).unflatten(0, x.shape[:-1])
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return super().forward(x)


def cast_weights(network: nn.Module):
    """Refreshes every `half` from its weight, in one pass; for the start of a step or of an evaluation."""
    layers = [module for module in network.modules() if isinstance(module, Linear)]
    if layers:
        torch._foreach_copy_([layer.half for layer in layers], [layer.weight.detach() for layer in layers])


# ---------------------------------------------------------------------------------------------------------------------------------
# MLP


class GELU(nn.GELU):
    """nn.GELU by the kernel."""

    def forward(self, x):
        return gelu(x)


class _MLP(torch.autograd.Function):
    """(N, C) -> (N, C) with GELU inside the products; weights in float32 and their casts, (4 C, C) and (C, 4 C). Without `train` no slope is kept."""

    @staticmethod
    def forward(ctx, x, up, up_half, down, down_half, train):
        g, slope = linear_gelu(x, up_half, train)
        ctx.save_for_backward(x, slope, g, up_half, down_half)
        return g @ down_half.t()

    @staticmethod
    def backward(ctx, dy):
        x, slope, g, up_half, down_half = ctx.saved_tensors
        dh = linear_gelu_backward(dy, down_half, slope)
        return dh @ up_half, weight_gradient(dh, x), None, weight_gradient(dy, g), None, None


class MLP(model.MLP):
    """The model's MLP; `branch` is what it adds to the residual stream, before dropout."""

    inside = False  # GELU inside the products: `accelerate` decides

    def branch(self, x):
        """(B, T, C) -> (B, T, C)."""
        if self.inside and self.c_fc.reads_half:
            flat = x.flatten(0, -2).to(self.c_fc.half.dtype)
            y = _MLP.apply(flat, self.c_fc.weight, self.c_fc.half, self.c_proj.weight, self.c_proj.half, torch.is_grad_enabled())
            return y.unflatten(0, x.shape[:-1])
        return self.c_proj(self.gelu(self.c_fc(x)))


# ---------------------------------------------------------------------------------------------------------------------------------
# Attention and graph diffusion


@triton.jit
def _subtract(y_ptr, v_ptr, out_ptr, n, T, alpha, lam, YB, YH, YT, VB, VH, VT, FIRST: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Two (B, H, T, d) with their strides -> (B, T, H, d) contiguous: lam (y - alpha v) for heads from FIRST on, y before."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]  # (b, t) and (head, channel)
    b, t, head, e, mask = (row // T).to(tl.int64), row % T, column // D, column % D, (row < n) & (column < C)
    y = tl.load(y_ptr + (b * YB + t * YT) + (head * YH + e), mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + (b * VB + t * VT) + (head * VH + e), mask=mask & (head >= FIRST), other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * C + column, tl.where(head >= FIRST, lam * (y - alpha * v), y), mask=mask)


@operator
def subtract(y: torch.Tensor, v: torch.Tensor, alpha: float, lam: float, heads: int) -> torch.Tensor:
    """model.diffuse, (B, H, T, d) twice -> the same shape with memory in the order (B, T, H, d), which the output projection reads."""
    B, H, T, d = y.shape
    y, v = (part if part.stride(3) == 1 else part.contiguous() for part in (y, v))
    out, tile = torch.empty(B, T, H, d, dtype=y.dtype, device=y.device), tile_of(H * d, 4096)
    _subtract[(triton.cdiv(B * T, tile["ROWS"]),)](y, v, out, B * T, T, alpha, lam, *y.stride()[:3], *v.stride()[:3], FIRST=H - heads, D=d, **tile)
    return out.transpose(1, 2)


@subtract.register_fake
def _(y, v, alpha, lam, heads):
    B, H, T, d = y.shape
    return y.new_empty(B, T, H, d).transpose(1, 2)


@triton.jit
def _gather(dq_ptr, dk_ptr, dv_ptr, dw_ptr, tq_ptr, tk_ptr, tv_ptr, out_ptr, n, T, coefficient, B_STRIDE, H_STRIDE, T_STRIDE, TAP_B, TAP_H, TAP_T,
            FIRST: tl.constexpr, TAPPED: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(B, H, T, d) gradients with common strides -> (B, T, 3, H, d); heads from FIRST on give dv - coefficient dw. Those of taps are added."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]  # (b, t) and (head, channel)
    b, t, head, e, mask = (row // T).to(tl.int64), row % T, column // D, column % D, (row < n) & (column < C)
    source = (b * B_STRIDE + t * T_STRIDE) + (head * H_STRIDE + e)
    target = row.to(tl.int64) * (3 * C) + column
    dq, dk, dv = tl.load(dq_ptr + source, mask=mask), tl.load(dk_ptr + source, mask=mask), tl.load(dv_ptr + source, mask=mask)
    if FIRST * D < C:
        dw = tl.load(dw_ptr + source, mask=mask & (head >= FIRST), other=0.0)
        dv = dv.to(tl.float32) - coefficient * dw.to(tl.float32)
    if TAPPED:
        tap = (b * TAP_B + t * TAP_T) + (head * TAP_H + e)
        dq = dq.to(tl.float32) + tl.load(tq_ptr + tap, mask=mask).to(tl.float32)
        dk = dk.to(tl.float32) + tl.load(tk_ptr + tap, mask=mask).to(tl.float32)
        dv = dv.to(tl.float32) + tl.load(tv_ptr + tap, mask=mask).to(tl.float32)
    tl.store(out_ptr + target, dq, mask=mask)
    tl.store(out_ptr + target + C, dk, mask=mask)
    tl.store(out_ptr + target + 2 * C, dv, mask=mask)


def _alike(parts) -> list:
    """(B, H, T, d) tensors with common strides and contiguous rows."""
    if any(part.stride() != parts[0].stride() or part.stride(3) != 1 for part in parts):
        return [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    return parts


@operator
def gather(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dw: torch.Tensor | None, coefficient: float, heads: int,
    tq: torch.Tensor | None = None, tk: torch.Tensor | None = None, tv: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gradients of queries, keys and values, (B, H, T, d) each -> that of their projection, (B, T, 3 C); the last heads give dv - coefficient dw.

    tq, tk, tv: those from elsewhere, which are added.
    """
    B, H, T, d = dq.shape
    parts = _alike([dq, dk, dv, dv if dw is None else dw])
    taps = parts[:3] if tq is None else _alike([tq, tk, tv])
    out, tile = torch.empty(B, T, 3 * H * d, dtype=dq.dtype, device=dq.device), tile_of(H * d, 4096)
    _gather[(triton.cdiv(B * T, tile["ROWS"]),)](
        *parts, *taps, out, B * T, T, coefficient, *parts[0].stride()[:3], *taps[0].stride()[:3],
        FIRST=H if dw is None else H - heads, TAPPED=tq is not None, D=d, **tile,
    )  # fmt: skip
    return out


@gather.register_fake
def _(dq, dk, dv, dw, coefficient, heads, tq=None, tk=None, tv=None):
    B, H, T, d = dq.shape
    return dq.new_empty(B, T, 3 * H * d)


def _heads(qkv, n_head: int):
    """(B, T, 3 C) -> q, k, v, views (B, H, T, d)."""
    B, T, C3 = qkv.shape
    return tuple(part.view(B, T, n_head, C3 // 3 // n_head).transpose(1, 2) for part in qkv.split(C3 // 3, dim=2))


def _again(*parts):
    """Views of the same, so that what is done with them has a gradient of its own."""
    return tuple(part.view_as(part) for part in parts)


class _Split(torch.autograd.Function):
    """(B, T, 3 C) -> q, k, v, and with `tapped` once more for the taps; one pass gathers their gradients."""

    @staticmethod
    def forward(ctx, qkv, n_head, tapped):
        parts = _heads(qkv, n_head)
        return parts + _again(*parts) if tapped else parts

    @staticmethod
    def backward(ctx, dq, dk, dv, *taps):
        return gather(dq, dk, dv, None, 0.0, 0, *taps), None, None


class _SplitForDiffusion(torch.autograd.Function):
    """The same with v once more, for `_Subtract` alone, whose gradient the pass subtracts."""

    @staticmethod
    def forward(ctx, qkv, n_head, coefficient, heads, tapped):
        ctx.coefficient, ctx.heads = coefficient, heads
        parts = _heads(qkv, n_head)
        return parts + _again(parts[2]) + (_again(*parts) if tapped else ())

    @staticmethod
    def backward(ctx, dq, dk, dv, dw, *taps):
        return gather(dq, dk, dv, dw, ctx.coefficient, ctx.heads, *taps), None, None, None, None


@operator
def weight_gradient_of_three(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight_gradient of three (N, C) side by side: (3 C, in)."""
    C = dq.size(1)
    total = torch.empty(3 * C, x.size(1), dtype=torch.float32, device=x.device)
    for i, part in enumerate((dq, dk, dv)):
        _accumulate(total[i * C : (i + 1) * C], part, x, add=False)
    return total


weight_gradient_of_three.register_fake(lambda dq, dk, dv, x: x.new_empty(3 * dq.size(1), x.size(1), dtype=torch.float32))


class _Project(torch.autograd.Function):
    """(B, T, C), the projection's weight (3 C, C) in float32 and its cast -> q, k, v (B, H, T, d), with diffusing `heads` v once more for `_Subtract`
    alone. No pass gathers their gradients."""

    @staticmethod
    def forward(ctx, x, weight, half, n_head, coefficient, heads):
        ctx.save_for_backward(x, half)
        ctx.coefficient, ctx.heads = coefficient, heads
        parts = _heads(x @ half.t(), n_head)
        return parts + _again(parts[2]) if heads else parts

    @staticmethod
    def backward(ctx, dq, dk, dv, dw=None):
        x, half = ctx.saved_tensors
        if dw is not None:
            dv = subtract(dv, dw, ctx.coefficient, 1.0, ctx.heads)
        parts = [part.transpose(1, 2).reshape(-1, x.size(-1)) for part in (dq, dk, dv)]
        dx = product_of_three(*parts, half).view_as(x)
        return dx, weight_gradient_of_three(*parts, x.flatten(0, 1)), None, None, None, None


class _Subtract(torch.autograd.Function):
    """`subtract`. v's gradient is returned without its factor -alpha lambda, which is applied on the diffusing heads where v's gradients meet."""

    @staticmethod
    def forward(ctx, y, v, alpha, lam, heads):
        ctx.lam, ctx.heads = lam, heads
        return subtract(y, v, alpha, lam, heads)

    @staticmethod
    def backward(ctx, dy):
        if ctx.lam == 1:
            return dy, dy, None, None, None
        diffuses = torch.arange(dy.size(1), device=dy.device)[:, None, None] >= dy.size(1) - ctx.heads
        return torch.where(diffuses, ctx.lam * dy, dy), dy, None, None, None  # in dy's order of memory, as model.InOrder would have it


class Attention(CausalSelfAttention):
    """The model's attention; `branch` is what it adds to the residual stream, before dropout."""

    # `accelerate` decides: long sequences by fused_attention too, and where it does not apply the projection's gradients by products of three
    long = ungathered = False

    def heads(self, x, tapped: bool):
        """(B, T, C) -> q, k, v (B, H, T, d), where heads diffuse v once more, and with `tapped` all three for the taps."""
        layer, form = self.c_attn, (self.n_head, self.alpha * self.lam, self.diffusing_heads)
        if self.ungathered and not tapped and layer.reads_half:
            return _Project.apply(x.to(layer.half.dtype), layer.weight, layer.half, *form)
        qkv = layer(x)
        return _SplitForDiffusion.apply(qkv, *form, tapped) if self.diffusing_heads else _Split.apply(qkv, self.n_head, tapped)

    def packs(self, x) -> bool:
        """Whether x (B, T, C) is for fused_attention."""
        long = self.long and _half(x) in (torch.bfloat16, torch.float16)  # without autocast the projection may be in float32
        p = self.dropout if self.training else 0.0
        return fused_attention.applies(x.size(1), x.size(2) // self.n_head, self.causal, p, long)

    def packed(self, qkv, seed):
        """(B, T, 3 C) -> (B, T, C), by fused_attention."""
        form = self.n_head, self.alpha, self.lam, self.diffusing_heads, self.causal
        site = 0 if seed is None else sites(self.layer)[0]
        return fused_attention.PackedAttention.apply(qkv, seed, site, self.dropout if self.training else 0.0, *form)

    def branch(self, x, taps=None, seed=None):
        """(B, T, C) -> (B, T, C), by fused_attention where it applies, else by the passes above around the framework's kernel. `taps` as in
        GPT.forward; `seed` of dropout as in `_Body.blocks`."""
        tapped, p = taps is not None, self.dropout if self.training else 0.0
        if self.packs(x) and not tapped:
            return self.c_proj(self.packed(self.c_attn(x), seed))
        q, k, v, *more = self.heads(x, tapped)
        if tapped:
            taps.append(tuple(more[-3:]))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        if self.diffusing_heads:
            y = _Subtract.apply(y, more[0], self.alpha, self.lam, self.diffusing_heads)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


# ---------------------------------------------------------------------------------------------------------------------------------
# Where a branch ends and the next one begins


class _Joint(torch.autograd.Function):
    """The linear layer that ends a branch, with the addition and LayerNorm inside, and the one that begins the next branch.

    Of x (N, C), the branch's a (N, K), and the two weights in float32 and their casts -> the stream, the next layer's result, with `begins_mlp` GELU
    of it, and GELU's slope (empty without). A result that has gone through GELU has the gradient of what went into it, since the next joint, which
    `slope` tells of it, multiplies by the slope inside a product.
    """

    @staticmethod
    def forward(ctx, x, a, slope, last, last_half, seed, site, p, gain, first, first_half, begins_mlp, train):
        out, y, mean, rstd = add_norm_of(a, last_half, x, gain, seed, site, p)
        z, next_slope = linear_gelu(y, first_half, train) if begins_mlp else (y @ first_half.t(), y.new_empty(0, dtype=torch.uint8))
        ctx.save_for_backward(a, slope, last_half, out, mean, rstd, seed, gain, y, first_half)
        ctx.dropout = site, p
        ctx.mark_non_differentiable(next_slope)
        return out, z, next_slope

    @staticmethod
    def backward(ctx, dout, dz, _):
        a, slope, last_half, out, mean, rstd, seed, gain, y, first_half = ctx.saved_tensors
        dfirst = weight_gradient(dz, y)
        dy = product_of(dz, first_half)
        dx, dbranch, dgain, _ = add_norm_backward(dout, dy, out, y, seed, *ctx.dropout, gain, False, mean, rstd)
        da, dlast = _end_backward(dbranch, a, slope, last_half)
        return dx, da, None, dlast, None, None, None, None, dgain, dfirst, None, None, None


class _End(torch.autograd.Function):
    """The linear layer that ends the last branch: a (N, K) and its slope as above -> (N, C)."""

    @staticmethod
    def forward(ctx, a, slope, last, last_half):
        ctx.save_for_backward(a, slope, last_half)
        return product_of(a, last_half, True)

    @staticmethod
    def backward(ctx, dbranch):
        da, dlast = _end_backward(dbranch, *ctx.saved_tensors)
        return da, None, dlast, None


def _end_backward(dbranch, a, slope, last_half):
    """Gradients of a, or of what GELU had from it, and of the weight."""
    da = product_of(dbranch, last_half) if slope is None else linear_gelu_backward(dbranch, last_half, slope)
    return da, weight_gradient(dbranch, a)


# ---------------------------------------------------------------------------------------------------------------------------------
# Blocks


START = 0  # where the embeddings have dropout, for the generator


def sites(layer: int) -> tuple[int, int, int]:
    """Where a layer has dropout, for the generator: A, attention's branch, the MLP's branch."""
    return 3 * layer + 1, 3 * layer + 2, 3 * layer + 3


class Block(model.Block):
    """A block that leaves its last addition to the next one, where it is one pass with the LayerNorm that follows."""

    def enter(self, x, positions, seed, p):
        """The stream and LN of it for the first block."""
        if seed is None:
            return x.float(), self.ln_1(x)
        return StartNorm.apply(x, positions, seed, START, p, self.ln_1.weight, self.ln_1.bias, _half(x))

    def forward(self, x, branch, seed, p, taps=None, positions=None):
        """x + branch after dropout is the stream that enters; returns such a pair. Into the first block go the embeddings x, without a branch, with
        dropout (`seed` as in `_Body.blocks`) plus any positions before it."""
        # Called by itself a block is compiled once for all layers of a kind: what differs from layer to layer is looked up for dropout alone.
        layer = 0 if seed is None else self.attn.layer
        if branch is None:
            x, y = self.enter(x, positions, seed, p)
        else:
            x, y = AddNorm.apply(x, branch, seed, sites(layer - 1)[2], p, self.ln_1.weight, self.ln_1.bias, False)
        if isinstance(self.attn, Attention):
            branch = self.attn.branch(y, taps, seed)
        else:  # a variant does its own dropout
            branch, seed, p = self.attn(y, None, taps), None, 0.0
        x, y = AddNorm.apply(x, branch, seed, sites(layer)[1], p, self.ln_2.weight, self.ln_2.bias, False)
        return x, self.mlp.branch(y)


class _Body:
    """Network.body by those blocks."""

    joins = False  # branches end and begin in one function, across the blocks: `accelerate` decides

    def blocks(self, x, positions, taps):
        """What the last addition and LayerNorm take: the stream, the last branch, its dropout, gain and bias."""
        blocks, p, ln = self.transformer.h, self.config.dropout if self.training else 0.0, self.transformer.ln_f
        seed = dropout_seed(x.detach()) if p else None  # one for all of a pass; each place has its decisions from it
        if not p and positions is not None:
            x, positions = x + positions, None
        if self.joins and taps is None and blocks[0].attn.c_attn.reads_half and all(block.attn.packs(x) for block in blocks):
            x, branch = self.joined(x, positions, seed, p)
        else:
            branch = None
            for block in blocks:
                x, branch = block(x, branch, seed, p, taps, positions)
                positions = None
        return x, branch, seed, sites(len(blocks) - 1)[2], p, ln.weight, ln.bias

    def joined(self, x, positions, seed, p):
        """The blocks, given what the first one is given; returns what the last one does."""
        blocks, shape, train = self.transformer.h, x.shape, torch.is_grad_enabled()
        x, y = blocks[0].enter(x, positions, seed, p)
        x, z, slope = x.flatten(0, 1), blocks[0].attn.c_attn(y).flatten(0, 1), None
        for layer, block in enumerate(blocks):
            a = block.attn.packed(z.view(*shape[:2], -1), seed).flatten(0, 1)
            last, first, ln = block.attn.c_proj, block.mlp.c_fc, block.ln_2
            form = seed, sites(layer)[1], p, ln.weight, first.weight, first.half, True, train
            x, a, slope = _Joint.apply(x, a, None, last.weight, last.half, *form)
            last = block.mlp.c_proj
            if layer < len(blocks) - 1:
                first, ln = blocks[layer + 1].attn.c_attn, blocks[layer + 1].ln_1
                form = seed, sites(layer)[2], p, ln.weight, first.weight, first.half, False, train
                x, z, _ = _Joint.apply(x, a, slope, last.weight, last.half, *form)
        return x.view(shape), _End.apply(a, slope, last.weight, last.half).view(shape)

    def body(self, x, positions=None, cache=None, taps=None):
        if cache is None:
            return AddNorm.apply(*self.blocks(x, positions, taps), True)[1]
        x = self.transformer.drop(x if positions is None else x + positions)
        for block in self.transformer.h:  # decoding, one token at a time: the model's own way
            x = model.Block.forward(block, x, cache, taps)
        return self.transformer.ln_f(x)


# ---------------------------------------------------------------------------------------------------------------------------------
# Output layer and cross-entropy


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _fold(largest, total, z):
    """Running maximum and sum of 2^(log2(e) (z - maximum)) of every lane, with a tile of (lanes, 8) logits more."""
    new = tl.maximum(largest, tl.max(z, axis=1))
    return new, total * tl.exp2((largest - new) * LOG2E) + tl.sum(tl.exp2(z * LOG2E - (new * LOG2E)[:, None]), axis=1)


@triton.jit
def _cross_entropy(logits_ptr, targets_ptr, losses_ptr, n, stride, V: tl.constexpr, GRADIENT: tl.constexpr, LANES: tl.constexpr):
    """Rows in turn: log sum exp - logit of the target, 0 for target -1; the logits become softmax - one-hot (0 for target -1) in place, 0 beyond V.

    There are so few programs that a row is still in the cache when it is read for the second time.
    """
    column = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]  # a lane's eight logits are one wide load
    whole: tl.constexpr = V // (8 * LANES) * (8 * LANES)
    first = tl.program_id(0).to(tl.int64)
    for turn in range(tl.cdiv(n - tl.program_id(0), tl.num_programs(0))):
        row = first + turn * tl.num_programs(0)
        place = logits_ptr + row * stride
        target = tl.load(targets_ptr + row)
        logit = tl.load(place + tl.maximum(target, 0)).to(tl.float32)
        largest, total = tl.full((LANES,), -1e30, tl.float32), tl.zeros((LANES,), tl.float32)
        for start in range(0, whole, 8 * LANES):
            largest, total = _fold(largest, total, tl.load(place + start + column).to(tl.float32))
        if whole < V:
            z = tl.load(place + whole + column, mask=whole + column < stride, other=0.0).to(tl.float32)
            largest, total = _fold(largest, total, tl.where(whole + column < V, z, float("-inf")))
        top = tl.max(largest, axis=0)
        log_sum = top * LOG2E + tl.log2(tl.sum(total * tl.exp2((largest - top) * LOG2E), axis=0))  # to base 2
        counts = target >= 0
        tl.store(losses_ptr + row, tl.where(counts, log_sum / LOG2E - logit, 0.0))
        if GRADIENT:
            shift = tl.where(counts, log_sum, float("inf"))
            tl.debug_barrier()  # the target's logit is read before it is overwritten
            for start in range(0, whole, 8 * LANES):
                z = tl.load(place + start + column).to(tl.float32)
                tl.store(place + start + column, tl.exp2(z * LOG2E - shift))
            if whole < V:
                z = tl.load(place + whole + column, mask=whole + column < stride, other=0.0).to(tl.float32)
                tl.store(place + whole + column, tl.where(whole + column < V, tl.exp2(z * LOG2E - shift), 0.0), mask=whole + column < stride)
            tl.debug_barrier()
            tl.store(place + target, tl.exp2(logit * LOG2E - log_sum) - 1, mask=counts)


@operator
def output_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, C) in half precision, weight (V, C) float32, targets (N,), -1 ignored -> mean loss, and with `gradient` (else empty) that of the sum
    over the targets that count: (N, C) in x's dtype and (V, C) in float32."""
    V = len(weight)
    half = weight.to(x.dtype)
    if V % 16:
        half = F.pad(half, (0, 0, 0, -V % 16))  # rows of an odd length have slow products and loads
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if gradient else x.new_empty(0)
    dweight = torch.empty(half.shape, dtype=torch.float32, device=x.device) if gradient else weight.new_empty(0)
    lanes = min(LANES, triton.next_power_of_2(triton.cdiv(V, 8)))
    programs = PROGRAMS * processors(x.device) if V > 8 * lanes else len(x)  # a row of one tile stays in the cache anyway
    for first in range(0, len(x), CHUNK):
        rows = slice(first, first + CHUNK)
        logits = x[rows] @ half.t()
        _cross_entropy[(min(len(logits), programs),)](
            logits, targets[rows], losses[rows], len(logits), logits.stride(0), V, gradient, LANES=lanes, num_warps=max(1, lanes // 32)
        )
        if gradient:
            torch.mm(logits, half, out=dx[rows])
            _accumulate(dweight, logits, x[rows], add=first > 0)
        del logits  # before the next piece is allocated
    return losses.sum() / (targets >= 0).sum(), dx, dweight[:V].contiguous() if gradient else dweight


@output_loss.register_fake
def _(x, weight, targets, gradient):
    empty = x.new_empty(0), weight.new_empty(0)
    return x.new_empty((), dtype=torch.float32), *((torch.empty_like(x), torch.empty_like(weight)) if gradient else empty)


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, gradient):
        loss, dx, dweight = output_loss(x, weight, targets, gradient)
        ctx.save_for_backward(dx, dweight, (targets >= 0).sum())
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight, count = ctx.saved_tensors
        scale = dloss / count
        return (dx * scale).to(dx.dtype), dweight * scale, None, None


class FusedGPT(_Body, GPT):
    """A GPT whose loss comes without whole logits (None in their place)."""

    def parts(self, idx, cache=None):
        if cache is not None:
            return super().parts(idx, cache)
        return _Lookup.apply(self.transformer.wte.weight, idx), self.transformer.wpe.weight[: idx.size(1)]

    def output(self, x, targets=None):
        if targets is None:
            return super().output(x, targets)
        x = x.flatten(0, 1).to(_half(x))
        return None, _OutputLoss.apply(x, self.lm_head.weight, targets.flatten(), torch.is_grad_enabled())


class FusedViT(_Body, ViT):
    """A ViT by the fused blocks, whose last LayerNorm is not kept beside its mean."""

    def pooled(self, x, positions=None, taps=None):
        return AddNormMean.apply(*self.blocks(x, positions, taps))


# ---------------------------------------------------------------------------------------------------------------------------------


def accelerate(network: nn.Module, dtype: torch.dtype, shadows: bool = True, whole: bool = True):
    """Turns the modules of `network` into those above, in place, for products in `dtype`; parameters and their names stay.

    `shadows` keeps each linear layer's weight in `dtype` beside it, which then needs `cast_weights`; without it autocast casts at every use. Not
    `whole` is a network of which each block is called and compiled by itself.
    """
    swaps = {nn.GELU: GELU, CausalSelfAttention: Attention, model.MLP: MLP, model.Block: Block, GPT: FusedGPT, ViT: FusedViT}
    for module in network.modules():
        module.__class__ = swaps.get(type(module), module.__class__)
    for block in network.transformer.h if shadows else ():
        for module in block.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear
                module.half = module.weight.detach().to(dtype, copy=True)
        block.mlp.inside = all(fused_products.applies(layer.half, layer.bias) for layer in (block.mlp.c_fc, block.mlp.c_proj))
        if isinstance(block.attn, Attention):
            block.attn.ungathered = fused_products.applies(block.attn.c_attn.half, block.attn.c_attn.bias)
    network.joins = (
        shadows
        and whole
        and all(
            block.mlp.inside
            and isinstance(block.attn, Attention)
            and fused_norm.applies(block.attn.c_proj.half, block.attn.c_proj.bias, block.ln_1.bias, block.ln_2.bias)
            and fused_norm.applies(block.mlp.c_proj.half)
            for block in network.transformer.h
        )
    )
    c = network.config
    if c.block_size > fused_attention.LONGEST and fused_attention.applies(c.block_size, c.n_embd // c.n_head, c.causal, c.dropout, True):
        for block in network.transformer.h:
            if isinstance(block.attn, Attention):
                block.attn.long = fused_attention.takes_long(network.lm_head.weight.device, dtype, block.attn.diffusing_heads > 0)
