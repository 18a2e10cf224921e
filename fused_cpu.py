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
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

import onednn
from model import Block, CausalSelfAttention
from place import say

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O2", "-fno-math-errno", "-fopenmp", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
L, I, F, P = ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
SIGNATURES = {
    "attention_forward": [L] * 4 + [I, L, F, F, I] + [P] * 10,
    "attention_backward": [L] * 4 + [I, L, F, F, I] + [P] * 14,
    "mlp_forward": [L] * 3 + [I] + [P] * 8,
    "mlp_backward": [L] * 3 + [I] + [P] * 12,
}


def compiled(half: bool) -> Path:
    """The library made from SOURCE, compiled now if that has not been done. Raises OSError or CalledProcessError where it cannot be."""
    compiler = os.environ.get("CC", "cc")
    flags = FLAGS + ["-mavx512bf16"] * half
    key = hashlib.sha256(" ".join([compiler, *flags]).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    target = SOURCE.parent / "__pycache__" / f"{SOURCE.stem}.{key}.so"
    if not target.exists():
        if shutil.which(compiler) is None:
            raise OSError(f"no C compiler {compiler} (the system's package gcc has cc; $CC names another)")
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # linked with nothing: OpenMP, the mathematics and malloc are those that torch has loaded, so that one pool of threads serves both
            made = Path(folder) / target.name
            subprocess.run([compiler, *flags, "-shared", "-nostdlib", str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
            made.replace(target)
    return target


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of fused_cpu.c, or None: on other processors and systems, and, after a note, where they cannot be compiled."""
    if not (sys.platform == "linux" and platform.machine() == "x86_64" and torch.cpu._is_avx512_supported()):
        return None
    try:
        found = ctypes.PyDLL(str(compiled(has_bfloat16())))  # PyDLL holds Python's lock, and so its memory pool has one user at a time
    except (OSError, subprocess.CalledProcessError) as e:
        why = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
        say(f"note: training on this CPU is slower than it could be, since fused_cpu.c cannot be compiled: {why[0] if why else e}")
        return None
    for name, arguments in SIGNATURES.items():
        getattr(found, name).argtypes = arguments
    return found


@functools.cache
def has_bfloat16() -> bool:
    """Whether bfloat16 is worth while here: the processor multiplies it (AVX512_BF16), and has no tiles (AMX), which torch uses and this does not."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def call(name: str, *arguments):
    """A function of the library on numbers and on contiguous float32 tensors. Raises MemoryError."""
    if not getattr(library(), name)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)):
        raise MemoryError(f"fused_cpu.c's {name} found no memory for its scratch")


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
        results = [torch.empty_like(t) for t in (x, gain, w_qkv, w_out)]
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
        results = [torch.empty_like(t) for t in (x, gain, w_in, w_out)]
        call("mlp_backward", x.numel() // C, C, F, ctx.half, *saved, dout.contiguous(), *results)
        return *results, None


class FusedBlock(Block):
    """The model's block by the two functions above wherever they apply: on the CPU in float32, without dropout, cache and taps."""

    def applies(self, x) -> bool:
        """Whether x and the weights are what fused_cpu.c takes, nothing is dropped, and autocast, if any, has a dtype that it knows."""
        drops = self.training and self.attn.dropout > 0
        plain = x.device.type == "cpu" and x.dtype == self.ln_1.weight.dtype == torch.float32 and x.numel() > 0
        known = not torch.is_autocast_enabled("cpu") or (torch.get_autocast_dtype("cpu") == torch.bfloat16 and has_bfloat16())
        return plain and known and not drops

    def forward(self, x, cache=None, taps=None):
        if cache is not None or taps is not None or not self.applies(x):
            return super().forward(x, cache, taps)
        attention, mlp, half = self.attn, self.mlp, torch.is_autocast_enabled("cpu")
        heads = (attention.n_head, attention.causal, attention.diffusing_heads, attention.alpha, attention.lam)
        x = _AttentionBranch.apply(x, self.ln_1.weight, attention.c_attn.weight, attention.c_proj.weight, heads, half)
        return _MLPBranch.apply(x, self.ln_2.weight, mlp.c_fc.weight, mlp.c_proj.weight, half)


def accelerate(model: torch.nn.Module):
    """Turns the blocks of `model` into those above where they have ordinary attention and no biases, and all else into onednn.py's, in place.

    Parameters and their names stay, and what a block computes when the functions do not apply to it.
    """
    for block in [module for module in model.modules() if type(module) is Block]:
        if type(block.attn) is CausalSelfAttention and block.ln_1.bias is None and library() is not None:
            block.__class__ = FusedBlock
    onednn.accelerate(model)
