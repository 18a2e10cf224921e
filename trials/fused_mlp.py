"""A block's MLP, C -> 4 C -> GELU -> C, with GELU and its gradient inside the products, in Triton, for half precision on Hopper GPUs.

On trial and used by nothing: see README.md beside it.

Apart, GELU reads the product's result from memory again, and both passes are bound by arithmetic as much as by memory (fused.py). Here the product
that makes h applies GELU to its tile, and the product that makes GELU's gradient multiplies its tile by the derivative, so that this gradient is
never stored. That pays only where one tile's arithmetic runs beside another tile's products: several programs share a multiprocessor, or
fused_mlp_hopper.py divides the warps of one.

tests/test_fused_mlp.py compares both with float64, and GELU to the bit with the pass that it replaces.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fused import _processors, _tail, weight_gradient
from operators import operator

# ROWS x COLUMNS of the result by one program, INNER of the sum at a time, PIECES of a tile finished one after the other. PER programs on a
# multiprocessor take tiles in turn; with 0 every tile has a program of its own. {"WARPS": "apart"}: by fused_mlp_hopper.py, with its sizes.
FORWARD = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "PIECES": 2, "PER": 0, "num_warps": 8, "num_stages": 3}
BACKWARD = FORWARD
POINTERS = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _halves(x):
    """(m, n) -> its left and right (m, n / 2), without an exchange between threads."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _gelu_of(x):
    """x Phi(x), as fused._gelu has it."""
    tail, _ = _tail(x)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail


@triton.jit
def _slope(x):
    """Derivative of GELU, as fused._gelu_backward has it."""
    tail, e = _tail(x)
    return tl.where(x < 0, tail, 1 - tail) + x * e * 0.3989422804014327


@triton.jit
def _finish(product, bias_ptr, h, out, row, column, columns, BIAS: tl.constexpr, GRADIENT: tl.constexpr, GELU: tl.constexpr):
    """Stores h and GELU of its rounded value, or with GRADIENT the product times GELU's derivative at h. Without GELU: the product alone."""
    if BIAS:
        i = column + tl.arange(0, product.shape[1])
        product += tl.load(bias_ptr + i, mask=i < columns, other=0.0).to(tl.float32)[None, :]
    if GRADIENT:
        if GELU:
            product *= _slope(h.load([row, column]).to(tl.float32))
        out.store([row, column], product.to(out.dtype))
    else:
        half = product.to(h.dtype)
        h.store([row, column], half)
        if GELU:
            out.store([row, column], _gelu_of(half.to(tl.float32)).to(out.dtype))


@triton.jit
def _product(a, b, bias_ptr, h, out, rows, columns, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PIECES: tl.constexpr,
             BIAS: tl.constexpr, GRADIENT: tl.constexpr, GELU: tl.constexpr, FLATTEN: tl.constexpr):  # fmt: skip
    """a (rows, inner) times b, (columns, inner) or with GRADIENT (inner, columns), tile by tile and finished as above; all are TMA descriptors.

    Tiles of the same rows follow each other: their rows of a are in the cache then, and all of b, a weight, always is.
    """
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile // across * ROWS, tile % across * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, inner, INNER):
            left = a.load([row, k])
            if GRADIENT:
                total = tl.dot(left, b.load([k, column]), total, input_precision="ieee")
            else:
                total = tl.dot(left, b.load([column, k]).T, total, input_precision="ieee")
        if PIECES == 1:
            _finish(total, bias_ptr, h, out, row, column, columns, BIAS, GRADIENT, GELU)
        else:
            one, other = _halves(total)
            if PIECES == 2:
                _finish(one, bias_ptr, h, out, row, column, columns, BIAS, GRADIENT, GELU)
                _finish(other, bias_ptr, h, out, row, column + COLUMNS // 2, columns, BIAS, GRADIENT, GELU)
            else:
                first, second = _halves(one)
                third, fourth = _halves(other)
                _finish(first, bias_ptr, h, out, row, column, columns, BIAS, GRADIENT, GELU)
                _finish(second, bias_ptr, h, out, row, column + COLUMNS // 4, columns, BIAS, GRADIENT, GELU)
                _finish(third, bias_ptr, h, out, row, column + COLUMNS // 2, columns, BIAS, GRADIENT, GELU)
                _finish(fourth, bias_ptr, h, out, row, column + COLUMNS // 4 * 3, columns, BIAS, GRADIENT, GELU)


@triton.jit
def _product_by_pointers(a_ptr, b_ptr, bias_ptr, h_ptr, out_ptr, rows, columns, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         INNER: tl.constexpr, BIAS: tl.constexpr, GRADIENT: tl.constexpr, GELU: tl.constexpr):  # fmt: skip
    """The same without descriptors, for rows that TMA does not take: those whose length in bytes is no multiple of 16."""
    across = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    down, along = tl.arange(0, INNER)[:, None], tl.arange(0, INNER)[None, :]
    left = a_ptr + row.to(tl.int64) * inner + along
    right = b_ptr + (down.to(tl.int64) * columns + column if GRADIENT else column.to(tl.int64) * inner + down)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, inner, INNER):
        one = tl.load(left + k, mask=(row < rows) & (k + along < inner), other=0.0)
        other = tl.load(right + k * (columns if GRADIENT else 1), mask=(column < columns) & (k + down < inner), other=0.0)
        total = tl.dot(one, other, total, input_precision="ieee")
    i, mask = row.to(tl.int64) * columns + column, (row < rows) & (column < columns)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if GRADIENT:
        if GELU:
            total *= _slope(tl.load(h_ptr + i, mask=mask, other=0.0).to(tl.float32))
        tl.store(out_ptr + i, total, mask=mask)
    else:
        half = total.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + i, half, mask=mask)
        if GELU:
            tl.store(out_ptr + i, _gelu_of(half.to(tl.float32)), mask=mask)


def _run(a, b, bias, h, out, gradient: bool, form: dict, gelu: bool = True):
    """a (N, K) times b, (M, K) or with `gradient` (K, M), all contiguous: fills h and out (N, M), or reads h and fills out. `form` as above."""
    (rows, columns), inner = h.shape, a.size(1)
    even = all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (a, b, h))
    if "WARPS" in form:
        if even and bias is None:
            import fused_mlp_hopper

            return fused_mlp_hopper.run(a, b, h, out, gradient, gelu)
        form = POINTERS
    form, BIAS, bias = dict(form), bias is not None, a if bias is None else bias
    if "PIECES" not in form or not even:
        form = {key: value for key, value in form.items() if key in POINTERS}
        tiles = triton.cdiv(rows, form["ROWS"]) * triton.cdiv(columns, form["COLUMNS"])
        _product_by_pointers[(tiles,)](a, b, bias, h, out, rows, columns, inner, BIAS=BIAS, GRADIENT=gradient, GELU=gelu, **form)
        return
    per, flatten = form.pop("PER"), form.pop("FLATTEN", False)
    tiles = triton.cdiv(rows, form["ROWS"]) * triton.cdiv(columns, form["COLUMNS"])
    piece = [form["ROWS"], form["COLUMNS"] // form["PIECES"]]
    factors = [form["ROWS"], form["INNER"]], [form["INNER"], form["COLUMNS"]] if gradient else [form["COLUMNS"], form["INNER"]]
    a, b, h, out = (TensorDescriptor.from_tensor(t, block) for t, block in zip((a, b, h, out), (*factors, piece, piece)))
    programs = min(tiles, per * _processors(bias.device)) if per else tiles
    _product[(programs,)](a, b, bias, h, out, rows, columns, inner, BIAS=BIAS, GRADIENT=gradient, GELU=gelu, FLATTEN=flatten, **form)


@operator
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, K), weight (M, K), bias (M,) or None -> h = x weight^T + bias and GELU of h, (N, M) each, in x's dtype."""
    x, weight = x.contiguous(), weight.contiguous()
    h, g = (torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device) for _ in range(2))
    _run(x, weight, bias, h, g, False, FORWARD)
    return h, g


@operator
def linear_gelu_backward(dy: torch.Tensor, weight: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """dy (N, C), weight (C, M), h (N, M) -> gradient of h, (dy weight) times GELU's derivative at h, (N, M), the product not rounded before."""
    dy, weight, h = dy.contiguous(), weight.contiguous(), h.contiguous()
    dh = torch.empty_like(h)
    _run(dy, weight, None, h, dh, True, BACKWARD)
    return dh


@linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))


linear_gelu_backward.register_fake(lambda dy, weight, h: torch.empty_like(h, memory_format=torch.contiguous_format))


class _MLP(torch.autograd.Function):
    """(N, C) -> (N, C). Weights in float32 and their casts, biases or None; weight gradients in float32."""

    @staticmethod
    def forward(ctx, x, up, up_half, up_bias, down, down_half):
        h, g = linear_gelu(x, up_half, up_bias)
        ctx.save_for_backward(x, h, g, up_half, down_half)
        return g @ down_half.t()

    @staticmethod
    def backward(ctx, dy):
        x, h, g, up_half, down_half = ctx.saved_tensors
        dh = linear_gelu_backward(dy, down_half, h)
        dbias = dh.sum(0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        return dh @ up_half, weight_gradient(dh, x), None, dbias, weight_gradient(dy, g), None


def mlp(x, c_fc, c_proj):
    """c_proj(GELU(c_fc(x))), (…, C) -> (…, C), of two fused.Linear."""
    flat = x.flatten(0, -2).to(c_fc.half.dtype)
    y = _MLP.apply(flat, c_fc.weight, c_fc.half, c_fc.bias, c_proj.weight, c_proj.half).unflatten(0, x.shape[:-1])
    return y if c_proj.bias is None else y + c_proj.bias.to(y.dtype)
