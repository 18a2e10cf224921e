"""The passes between a transformer's matrix products, in Triton, for half precision on CUDA; the model's own modules elsewhere.

torch.compile fuses element-wise passes well, but not these, which take 25 of the 122 ms of a GPT-2 124M step on an H200 (LOG.md):

    cross-entropy   the output layer in pieces of CHUNK rows; one pass over the logits computes the loss and turns them, in place, into its gradient,
                    so that neither 65,536 x 50,304 logits nor their gradient are ever whole
    GELU            exact up to 1.5e-7, with one exponential and one division instead of the long erf; its value is kept, not computed again
    graph diffusion y - v is kept for the backward pass; v's second gradient is subtracted where dq, dk and dv are gathered, which reads dv anyway
    dropout         eight decisions from one Philox call, kept as one byte each, instead of a call for each decision in both directions

Sums and exponentials are in float32. tests/test_fused.py compares each with float64.
"""

import torch
import torch.nn as nn
import triton
import triton.language as tl
from torch.library import custom_op
from torch.nn import functional as F

from model import GPT, CausalSelfAttention, diffuse

CHUNK = 16384  # rows of logits at a time: 1.5 GiB of GPT-2's, and enough for the products to run at full speed


# ---------------------------------------------------------------------------------------------------------------------------------
# GELU


@triton.jit
def _normal(x):
    """Distribution function and density of the standard normal: erfc by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7."""
    s = tl.abs(x) * 0.7071067811865476
    t = 1 / (1 + 0.3275911 * s)
    e = tl.exp(-s * s)
    tail = 0.5 * e * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return tl.where(x < 0, tail, 1 - tail), e * 0.3989422804014327


@triton.jit
def _gelu(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    cdf, _ = _normal(x)
    tl.store(y_ptr + i, x * cdf, mask=i < n)


@triton.jit
def _gelu_backward(dy_ptr, x_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    cdf, density = _normal(x)
    tl.store(dx_ptr + i, dy * (cdf + x * density), mask=i < n)


@custom_op("diffusion::gelu", mutates_args=())
def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x) of a tensor of any shape, in its dtype."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _gelu[(triton.cdiv(x.numel(), 2048),)](x, y, x.numel(), BLOCK=2048)
    return y


@custom_op("diffusion::gelu_backward", mutates_args=())
def gelu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy (Phi(x) + x phi(x))."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _gelu_backward[(triton.cdiv(x.numel(), 2048),)](dy, x, dx, x.numel(), BLOCK=2048)
    return dx


gelu.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
gelu_backward.register_fake(lambda dy, x: torch.empty_like(x, memory_format=torch.contiguous_format))
gelu.register_autograd(
    lambda ctx, dy: gelu_backward(dy, *ctx.saved_tensors), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0])
)


class GELU(nn.GELU):
    """nn.GELU by the kernel."""

    def forward(self, x):
        return gelu(x)


# ---------------------------------------------------------------------------------------------------------------------------------
# Dropout


@triton.jit
def _keep(keep_ptr, seed_ptr, threshold, n, BLOCK: tl.constexpr):
    """One byte per element, 1 with probability 1 - threshold / 65536: the sixteen-bit halves of four words of Philox."""
    program = tl.program_id(0)
    call = program * BLOCK + tl.arange(0, BLOCK)
    i = program.to(tl.int64) * (8 * BLOCK) + tl.arange(0, BLOCK)
    words = tl.randint4x(tl.load(seed_ptr), call)
    for j in tl.static_range(4):
        word = words[j].to(tl.uint32, bitcast=True)
        tl.store(keep_ptr + i + 2 * j * BLOCK, (word & 0xFFFF) >= threshold, mask=i + 2 * j * BLOCK < n)
        tl.store(keep_ptr + i + (2 * j + 1) * BLOCK, (word >> 16) >= threshold, mask=i + (2 * j + 1) * BLOCK < n)


@custom_op("diffusion::keep", mutates_args=())
def keep(x: torch.Tensor, p: float) -> torch.Tensor:
    """Which elements dropout keeps: bool of x's shape, True with probability 1 - p (p in steps of 2^-16), from torch's generator of x's device."""
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    seed = torch.randint(2**62, (1,), device=x.device)  # on the device, so that a CUDA graph draws anew at every replay
    _keep[(triton.cdiv(x.numel(), 8 * 512),)](mask.view(torch.uint8), seed, round(p * 65536), x.numel(), BLOCK=512)
    return mask


keep.register_fake(lambda x, p: torch.empty(x.shape, dtype=torch.bool, device=x.device))


class Dropout(nn.Dropout):
    """nn.Dropout with the mask from `keep`; the multiplication is left to the compiler, which fuses it with its neighbours."""

    def forward(self, x):
        return x * keep(x.detach(), self.p) * (1 / (1 - self.p)) if self.training and self.p > 0 else x


# ---------------------------------------------------------------------------------------------------------------------------------
# Graph diffusion


@triton.jit
def _gather(dq_ptr, dk_ptr, dv_ptr, dw_ptr, out_ptr, n, T, coefficient, B_STRIDE, H_STRIDE, T_STRIDE, FIRST: tl.constexpr, H: tl.constexpr,
            D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(B, H, T, d) gradients with common strides -> (B, T, 3, H, d); heads from FIRST on give dv - coefficient dw."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # place in (B, T, H, d)
    row, column = i // (H * D), i % (H * D)
    head, mask = column // D, i < n
    source = (row // T) * B_STRIDE + head * H_STRIDE + (row % T) * T_STRIDE + column % D
    target = row * (3 * H * D) + column
    tl.store(out_ptr + target, tl.load(dq_ptr + source, mask=mask), mask=mask)
    tl.store(out_ptr + target + H * D, tl.load(dk_ptr + source, mask=mask), mask=mask)
    dv = tl.load(dv_ptr + source, mask=mask)
    if FIRST < H:
        dw = tl.load(dw_ptr + source, mask=mask & (head >= FIRST), other=0.0)
        dv = (dv.to(tl.float32) - coefficient * dw.to(tl.float32)).to(dv.dtype)
    tl.store(out_ptr + target + 2 * H * D, dv, mask=mask)


@custom_op("diffusion::gather", mutates_args=())
def gather(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dw: torch.Tensor, coefficient: float, heads: int) -> torch.Tensor:
    """Gradients of queries, keys and values, (B, H, T, d) each -> that of their projection, (B, T, 3 C); the last heads give dv - coefficient dw."""
    B, H, T, d = dq.shape
    parts = [dq, dk, dv, dw if heads else dv]  # an arm without diffusion has no dw to read
    if any(part.stride() != dq.stride() or part.stride(3) != 1 for part in parts):
        parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    out = torch.empty(B, T, 3 * H * d, dtype=dq.dtype, device=dq.device)
    strides = parts[0].stride()[:1] + parts[0].stride()[1:3]
    _gather[(triton.cdiv(dq.numel(), 1024),)](*parts, out, dq.numel(), T, coefficient, *strides, FIRST=H - heads, H=H, D=d, BLOCK=1024)
    return out


@gather.register_fake
def _(dq, dk, dv, dw, coefficient, heads):
    B, H, T, d = dq.shape
    return dq.new_empty(B, T, 3 * H * d)


@custom_op("diffusion::subtract", mutates_args=())
def subtract(y: torch.Tensor, v: torch.Tensor, alpha: float, lam: float, heads: int) -> torch.Tensor:
    """model.diffuse, (B, H, T, d) twice -> the same shape with memory in the order (B, T, H, d), which the output projection reads."""
    return diffuse(y, v, alpha, lam, heads).transpose(1, 2).contiguous().transpose(1, 2)


subtract.register_fake(lambda y, v, alpha, lam, heads: y.transpose(1, 2).contiguous().transpose(1, 2).clone())


class _Split(torch.autograd.Function):
    """(B, T, 3 C) -> q, k, v and v once more, for `_Subtract` alone; one pass gathers the four gradients."""

    @staticmethod
    def forward(ctx, qkv, n_head, coefficient, heads):
        ctx.coefficient, ctx.heads = coefficient, heads
        B, T, C3 = qkv.shape
        q, k, v = (part.view(B, T, n_head, C3 // 3 // n_head).transpose(1, 2) for part in qkv.split(C3 // 3, dim=2))
        return q, k, v, v.view_as(v)

    @staticmethod
    def backward(ctx, dq, dk, dv, dw):
        return gather(dq, dk, dv, dv if dw is None else dw, ctx.coefficient, ctx.heads), None, None, None


class _Subtract(torch.autograd.Function):
    """`subtract`. v's cotangent is returned without its factor -alpha lambda, which `gather` applies on the diffusing heads."""

    @staticmethod
    def forward(ctx, y, v, alpha, lam, heads):
        ctx.lam, ctx.heads = lam, heads
        return subtract(y, v, alpha, lam, heads)

    @staticmethod
    def backward(ctx, dy):
        scaled = dy
        if ctx.lam != 1:
            scaled = torch.cat((dy[:, : dy.size(1) - ctx.heads], ctx.lam * dy[:, dy.size(1) - ctx.heads :]), dim=1)
        return scaled, dy, None, None, None


class Attention(CausalSelfAttention):
    """The model's attention with the two passes above around the framework's fused kernel. Decoding with a cache takes the model's own way."""

    def forward(self, x, cache=None):
        if cache is not None:
            return super().forward(x, cache)
        q, k, v, w = _Split.apply(self.c_attn(x), self.n_head, self.alpha * self.lam, self.diffusing_heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal)
        if self.diffusing_heads:
            y = _Subtract.apply(y, w, self.alpha, self.lam, self.diffusing_heads)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)))


# ---------------------------------------------------------------------------------------------------------------------------------
# Output layer and cross-entropy


@triton.jit
def _cross_entropy(logits_ptr, targets_ptr, losses_ptr, stride, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One row: log sum exp - logit of the target, 0 for target -1; the logits become softmax - one-hot (0 for target -1) in place."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    largest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), axis=0)
        largest = new
    log_sum = largest + tl.log(total)
    counts = target >= 0
    logit = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(counts, log_sum - logit, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(z - log_sum) - tl.where(column == target, 1.0, 0.0)
            tl.store(logits_ptr + column, tl.where(counts, gradient, 0.0), mask=column < V)


@custom_op("diffusion::output_loss", mutates_args=())
def output_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, C) in half precision, weight (V, C) float32, targets (N,), -1 ignored -> mean loss, and its gradients if `gradient` (else empty).

    The gradients are of the sum over the targets that count, divided by their number: (N, C) in x's dtype and (V, C) in float32.
    """
    half = weight.to(x.dtype)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if gradient else x.new_empty(0)
    dweight = torch.empty_like(weight) if gradient else weight.new_empty(0)
    for first in range(0, len(x), CHUNK):
        rows = slice(first, first + CHUNK)
        logits = x[rows] @ half.t()
        _cross_entropy[(len(logits),)](logits, targets[rows], losses[rows], logits.stride(0), logits.size(1), gradient, BLOCK=4096, num_warps=8)
        if gradient:
            torch.mm(logits, half, out=dx[rows])
            _accumulate(dweight, logits, x[rows], first > 0)
        del logits  # before the next piece is allocated
    count = (targets >= 0).sum()
    loss = losses.sum() / count
    return loss, dx, dweight


def _accumulate(total, a, b, add: bool):
    """total (+)= a^T b in float32 from half-precision matrices; where the device has no such product (a CPU), from float32 ones."""
    if a.device.type == "cuda":
        torch.addmm(total, a.t(), b, beta=float(add), out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.t().float(), b.float(), beta=float(add), out=total)


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


class FusedGPT(GPT):
    """A GPT whose loss comes without whole logits (None in their place)."""

    def output(self, x, targets=None):
        if targets is None:
            return super().output(x, targets)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        x = x.flatten(0, 1).to(dtype)
        return None, _OutputLoss.apply(x, self.lm_head.weight, targets.flatten(), torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------------------------------------------


def accelerate(model: nn.Module):
    """Turns the modules of `model` into those above, in place; parameters and their names stay. For half precision (autocast) on CUDA."""
    swaps = {nn.GELU: GELU, nn.Dropout: Dropout, CausalSelfAttention: Attention, GPT: FusedGPT}
    for module in model.modules():
        module.__class__ = swaps.get(type(module), module.__class__)
