"""The blocks of a transformer on CPUs with AVX-512: each branch, x + attention(LN x) and x + MLP(LN x), is one function of fused_cpu.c.

torch's way is two dozen calls a block, each of which reads and writes memory that has left the cache in between; here rows of the activations go
through a branch while they are in it, and only what the way back needs is kept. Products are in float32, or under autocast in bfloat16 with float32
sums; all else is float32 in both, also the residual stream and what is kept. Sums have one order, whatever the number of threads.

The C file is compiled once, in three seconds, by `cc` or what $CC names, into __pycache__ beside it. Without a compiler blocks stay as they are, and
a note says so.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

import onednn
from model import MLP, Block, CausalSelfAttention
from place import say

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O3", "-fno-math-errno", "-fopenmp", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
L, I, F, P = ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
SIGNATURES = {
    "attention_forward": [L] * 4 + [I, L, F, F, I] + [P] * 10,
    "attention_backward": [L] * 4 + [I, L, F, F, I] + [P] * 14,
    "mlp_forward": [L] * 3 + [I] + [P] * 8,
    "mlp_backward": [L] * 3 + [I] + [P] * 12,
}


def compiled(half: bool) -> ctypes.PyDLL:
    """The library made from SOURCE, compiled now if that has not been done or its file is damaged.

    Raises OSError or CalledProcessError where it cannot be. A PyDLL holds Python's lock, and so its memory pool has one user at a time.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = FLAGS + ["-mavx512bf16"] * half
    key = hashlib.sha256(" ".join([*compiler, *flags]).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    target = SOURCE.parent / "__pycache__" / f"{SOURCE.stem}.{key}.so"
    try:
        return ctypes.PyDLL(str(target))
    except OSError:
        if shutil.which(compiler[0]) is None:
            raise OSError(f"no C compiler {compiler[0]} (the system's package gcc has cc; $CC names another)") from None
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # linked with nothing: OpenMP, the mathematics and malloc are those that torch has loaded, so that one pool of threads serves both
        made = Path(folder) / target.name
        subprocess.run([*compiler, *flags, "-shared", "-nostdlib", str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
        found = ctypes.PyDLL(str(made))
        made.replace(target)
    return found


@functools.cache
def library() -> ctypes.PyDLL | None:
    """The functions of fused_cpu.c, or None: on other processors and systems, and, after a note, where they cannot be compiled or loaded."""
    if not (sys.platform == "linux" and platform.machine() == "x86_64" and torch.cpu._is_avx512_supported()):
        return None
    try:
        found = compiled(has_bfloat16())
    except (OSError, subprocess.CalledProcessError) as e:
        lines = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0] if lines else type(e).__name__)
        say(f"note: training on this CPU is slower than it could be, since fused_cpu.c cannot be used: {why}")
        return None
    for name, arguments in SIGNATURES.items():
        getattr(found, name).argtypes = arguments
    return found


@functools.cache
def has_bfloat16() -> bool:
    """Whether bfloat16 is worth while here: the processor multiplies it (AVX512_BF16), and has no tiles (AMX), which torch uses and this does not."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def call(name: str, *arguments):
    """A function of the library on numbers and on contiguous float32 tensors, or None where nothing is wanted. Raises MemoryError."""
    if not getattr(library(), name)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)):
        raise MemoryError(f"fused_cpu.c's {name} found no memory for its scratch")


def wanted(ctx, *weights) -> list[torch.Tensor | None]:
    """Room for the gradients of those of a branch's weights, which follow x among its inputs, that need one."""
    return [torch.empty_like(weight) if needed else None for weight, needed in zip(weights, ctx.needs_input_grad[1:])]


class _AttentionBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, w_qkv, w_out, heads: tuple, half: bool):  # (B, T, C), (C), (3 C, C), (C, C) -> (B, T, C)
        B, T, C = x.shape
        x, n, y, out = x.contiguous(), *(x.new_empty(B, T, C) for _ in range(3))
        qkv, stats, soft = x.new_empty(B, T, 3 * C), x.new_empty(B, T, 2), x.new_empty(B, heads[0], T, 2)
        call("attention_forward", B, T, C, *heads, half, x, gain, w_qkv, w_out, n, stats, qkv, soft, y, out)
        ctx.save_for_backward(x, gain, w_qkv, w_out, n, stats, qkv, soft, y)
        ctx.heads, ctx.half = heads, half
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gain, w_qkv, w_out, *_ = saved = ctx.saved_tensors
        results = [torch.empty_like(x), *wanted(ctx, gain, w_qkv, w_out)]
        call("attention_backward", *x.shape, *ctx.heads, ctx.half, *saved, dout.contiguous(), *results)
        return *results, None, None


class _MLPBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, w_in, w_out, half: bool):  # (B, T, C), (C), (F, C), (C, F) -> (B, T, C)
        x = x.contiguous()
        R, (F, C) = x.numel() // x.size(-1), w_in.shape
        n, stats, u, out = x.new_empty(R, C), x.new_empty(R, 2), x.new_empty(R, F), torch.empty_like(x)
        call("mlp_forward", R, C, F, half, x, gain, w_in, w_out, n, stats, u, out)
        ctx.save_for_backward(x, gain, w_in, w_out, n, stats, u)
        ctx.half = half
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gain, w_in, w_out, *_ = saved = ctx.saved_tensors
        F, C = w_in.shape
        results = [torch.empty_like(x), *wanted(ctx, gain, w_in, w_out)]
        call("mlp_backward", x.numel() // C, C, F, ctx.half, *saved, dout.contiguous(), *results)
        return *results, None


class FusedBlock(Block):
    """The model's block by the two functions above wherever they apply: on the CPU in float32, without dropout, cache and taps.

    Its submodules are not called then, and so hooks on them are not either.
    """

    def applies(self, x) -> bool:
        """Whether x and the weights are what fused_cpu.c takes, nothing is dropped, and autocast, if any, has a dtype that it knows."""
        attention, mlp, C, F = self.attn, self.mlp, x.size(-1), self.mlp.c_fc.out_features
        shapes = {self.ln_1: (C,), attention.c_attn: (3 * C, C), attention.c_proj: (C, C), self.ln_2: (C,), mlp.c_fc: (F, C), mlp.c_proj: (C, F)}
        known = not torch.is_autocast_enabled("cpu") or (torch.get_autocast_dtype("cpu") == torch.bfloat16 and has_bfloat16())
        drops = self.training and max(attention.dropout, attention.resid_dropout.p, mlp.dropout.p) > 0
        plain = x.dim() == 3 and x.numel() > 0 and all(t.dtype == torch.float32 and t.is_cpu for t in (x, *(m.weight for m in shapes)))
        return known and not drops and plain and all(m.weight.shape == shape and m.weight.is_contiguous() for m, shape in shapes.items())

    def forward(self, x, cache=None, taps=None):
        if cache is not None or taps is not None or not self.applies(x):
            return super().forward(x, cache, taps)
        attention, mlp, half = self.attn, self.mlp, torch.is_autocast_enabled("cpu")
        heads = (attention.n_head, attention.causal, attention.diffusing_heads, attention.alpha, attention.lam)
        x = _AttentionBranch.apply(x, self.ln_1.weight, attention.c_attn.weight, attention.c_proj.weight, heads, half)
        return _MLPBranch.apply(x, self.ln_2.weight, mlp.c_fc.weight, mlp.c_proj.weight, half)


def fusible(block: torch.nn.Module) -> bool:
    """Whether a module is the model's block with ordinary attention, the exact GELU and no biases."""
    if not (type(block) is Block and type(block.attn) is CausalSelfAttention and type(block.mlp) is MLP and block.mlp.gelu.approximate == "none"):
        return False
    return not any(name.endswith("bias") for name, _ in block.named_parameters())


def accelerate(model: torch.nn.Module):
    """Turns the blocks of `model` that are `fusible` into those above, and all else into onednn.py's, in place.

    Parameters and their names stay, and what a block computes when the functions do not apply to it.
    """
    for block in [module for module in model.modules() if fusible(module)]:
        if library() is not None:
            block.__class__ = FusedBlock
    onednn.accelerate(model)
