"""A GPT-2 and a vision transformer whose attention can be graph diffusion, in one flat file that imports nothing of the project
(but variants.py, when a key asks for it).

    y = A v                        the ordinary transformer (diffusion = False)
    y = lambda (A v - alpha v)     graph diffusion (diffusion = True); alpha = lambda = 1 is the A - I of arXiv 2507.21040

A is the row-stochastic attention matrix of a head, the identity is subtracted after the softmax (and after dropout of A). A v comes from the
fused kernel and v is subtracted from it, so A is never stored and both arms run the same kernel. W_o absorbs the sign: I - A is the same model.

Module and parameter names are GPT-2's, by way of nanoGPT, so that weights load by equal keys. Shapes in trailing comments: B sequences,
T tokens, C channels, H heads, d = C / H.
"""

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a GPT. The keys are described in configurator.TrainConfig; `vocab_size` counts the rows of the token table."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    diffusion: bool = False
    diffusion_alpha: float = 1.0
    diffusion_lambda: float = 1.0
    diffusion_heads: tuple[int, ...] = ()  # trailing heads that diffuse: () all, (h,) in every layer, or one number per layer
    weight_init: str = "gpt2"  # this and the next three: see variants.py, which is imported for other values alone
    diffusion_learned: bool = False
    head_combine: str = "concat"
    attention_kernel: str = "softmax"
    causal = True  # no annotation, hence no field: a GPT attends to the past


# ---------------------------------------------------------------------------------------------------------------------------------
# Attention


def diffusing_heads(config, layer: int) -> int:
    """How many trailing heads of a layer diffuse, by `config`'s diffusion, diffusion_heads and n_head."""
    heads = config.diffusion_heads or (config.n_head,)
    return heads[layer if len(heads) > 1 else 0] if config.diffusion else 0


def diffuse(y, v, alpha: float, lam: float, heads: int):
    """Graph diffusion from attention's output: lambda (A v - alpha v) on the last `heads` heads, A v on the others.

    y = A v and v are (B, H, T, d); returns the same shape. alpha may be a tensor of one number per diffusing head, (heads, 1, 1).
    THEORY: arXiv 2507.21040, the gradient step (A - I) X of Laplacian Eigenmaps.
    """
    if heads == 0:
        return y
    if heads < y.size(1):
        kept, diffusing = y[:, :-heads], diffuse(y[:, -heads:], v[:, -heads:], alpha, lam, heads)
        return torch.cat((kept, diffusing), dim=1)
    if isinstance(alpha, torch.Tensor):
        y = y - alpha.to(v.dtype) * v
    else:
        y = y - v if alpha == 1 else torch.sub(y, v, alpha=alpha)
    return y if lam == 1 else lam * y


class InOrder(torch.autograd.Function):
    """y as it is; its gradient comes in y's order of memory.

    To be put around every fused attention call: cuDNN's backward kernel, the default on Hopper in half precision, returns wrong gradients without a
    word when the output is a (B, T, H, d) in memory and its gradient a (B, H, T, d), as behind a slice or a cat (torch 2.11).
    """

    @staticmethod
    def forward(ctx, y):
        ctx.strides = y.stride()
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy if dy.stride() == ctx.strides else torch.empty_strided(dy.shape, ctx.strides, dtype=dy.dtype, device=dy.device).copy_(dy)


def attention_matrix(q, k, causal: bool = True):
    """A = softmax(q k^T / sqrt(d)), stored: (B, H, T, d) twice -> (B, H, T, S). For tests and figures; training never forms it."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    if causal:
        T, S = logits.shape[-2:]
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)
        logits = logits.masked_fill(future, -math.inf)
    return logits.softmax(dim=-1)


def attention_reference(q, k, v, causal=True, diffusion=False, alpha=1.0, lam=1.0, heads=None):
    """The plain form of both arms, with the matrix G = lambda (A - alpha I) stored for each diffusing head: (B, H, T, d) x 3 -> (B, H, T, d)."""
    A = attention_matrix(q, k, causal)
    if diffusion:
        first = A.size(1) - (A.size(1) if heads is None else heads)
        identity = torch.eye(A.size(-1), dtype=A.dtype, device=A.device)
        A = torch.cat((A[:, :first], lam * (A[:, first:] - alpha * identity)), dim=1)
    return A @ v


class KVCache:
    """Keys and values of the tokens read so far, for decoding one token at a time. `length` counts them; GPT.forward moves it."""

    def __init__(self, config: GPTConfig, batch_size: int, device, dtype):
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.entries = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def positions(self, T: int):
        """Positions of the next T tokens, (T,) int64."""
        return torch.arange(self.length, self.length + T, device=self.entries.device)

    def extend(self, layer: int, k, v):
        """Appends (B, H, T, d) keys and values of one layer. Returns all of them, (B, H, length + T, d), and SDPA's attn_mask and is_causal."""
        T, end = k.size(2), self.length + k.size(2)
        self.entries[layer, 0, :, :, self.length : end] = k
        self.entries[layer, 1, :, :, self.length : end] = v
        mask = None
        if self.length > 0 and T > 1:  # SDPA's own causal mask assumes that the first query is the first key
            mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(self.length)
        return self.entries[layer, 0, :, :, :end], self.entries[layer, 1, :, :, :end], mask, self.length == 0


def plain_attention(config) -> bool:
    """Whether a config asks for the attention below, and nothing of variants.py."""
    return (config.head_combine, config.attention_kernel, config.diffusion_learned) == ("concat", "softmax", False)


class CausalSelfAttention(nn.Module):
    """Multi-head attention, or graph diffusion when config.diffusion. Full instead of causal when config.causal is False."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.layer, self.n_head, self.dropout, self.causal = layer, config.n_head, config.dropout, config.causal
        self.alpha, self.lam = config.diffusion_alpha, config.diffusion_lambda
        self.diffusing_heads = diffusing_heads(config, layer)

    def attend(self, q, keys, values, mask, causal: bool):
        """A v: queries (B, H, T, d), keys and values (B, H, S, d) -> (B, H, T, d). `mask` (T, S) is SDPA's: None, boolean or additive."""
        dropout = self.dropout if self.training else 0.0
        return InOrder.apply(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=causal))

    def per_head(self, q, v, keys, values, mask, causal: bool):
        """What each head hands to c_proj, (B, H, T, d); v are the values of the queries' own tokens."""
        return diffuse(self.attend(q, keys, values, mask, causal), v, self.alpha, self.lam, self.diffusing_heads)

    def forward(self, x, cache: KVCache | None = None, taps: list | None = None):
        B, T, C = x.size()
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))  # (B, H, T, d)
        if taps is not None:
            taps.append((q, k, v))
        keys, values, mask, causal = (k, v, None, self.causal) if cache is None else cache.extend(self.layer, k, v)
        y = self.per_head(q, v, keys, values, mask, causal)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


# ---------------------------------------------------------------------------------------------------------------------------------
# Block


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, which nn.LayerNorm could not switch off when GPT-2's parameter names were fixed."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class MLP(nn.Module):
    """Feed-forward branch: C -> 4 C -> C with the exact GELU."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Pre-LayerNorm transformer block: x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        attention = CausalSelfAttention
        if not plain_attention(config):
            from variants import VariantAttention as attention
        self.attn = attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache: KVCache | None = None, taps: list | None = None):
        x = x + self.attn(self.ln_1(x), cache, taps)
        return x + self.mlp(self.ln_2(x))


# ---------------------------------------------------------------------------------------------------------------------------------
# GPT


class Network(nn.Module):
    """What GPT and ViT share: blocks, initialisation and counting.

    The constructor draws nothing from torch's global generator: it calls `init_weights(seed)`, which has its own.
    """

    def __init__(self, config, embedding: dict[str, nn.Module], output: int):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
        heads = config.diffusion_heads
        if len(heads) not in (0, 1, config.n_layer) or any(not 0 <= h <= config.n_head for h in heads):
            raise ValueError(f"diffusion_heads {heads} must be empty, one number, or one per layer, each in 0..n_head")
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                **embedding,
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=LayerNorm(config.n_embd, config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, output, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """GPT-2's initialisation in place: normal(0.02), residual projections 0.02 / sqrt(2 n_layer), biases 0, LayerNorm gains 1.

        Each parameter has a generator of its own, from the seed and its name, on the CPU: the same weights on every device, and a parameter that
        only one arm has leaves the others' weights alone.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1)
            elif name.endswith(".alpha"):
                parameter.fill_(self.config.diffusion_alpha)
            else:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                key = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)[0]
                generator = torch.Generator().manual_seed(int(key >> 1))
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
        if self.config.weight_init != "gpt2":
            from variants import add_theory

            add_theory(self)

    def embed(self, *inputs):
        """What enters, before dropout: the sum of `parts`, (B, T, C)."""
        x, positions = self.parts(*inputs)
        return x + positions

    def body(self, x, positions=None, cache: KVCache | None = None, taps: list | None = None):
        """Dropout of x, (B, T, C), plus any positions, (T, C); blocks and the last LayerNorm: (B, T, C)."""
        x = self.transformer.drop(x if positions is None else x + positions)
        for block in self.transformer.h:
            x = block(x, cache, taps)
        return self.transformer.ln_f(x)

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, a tied table counted once; without the position table by default, as nanoGPT counts."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward per token: 6 N + 12 L C T (PaLM, arXiv 2204.02311, appendix B).

        The causal half of the attention matrix is counted in full, as nanoGPT counts, so that MFU figures compare.
        """
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_embd * c.block_size


class GPT(Network):
    """GPT-2: learned positions, pre-LayerNorm blocks, output layer tied to the token table. GPT(config)(idx, targets) -> (logits, loss)."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        with torch.device("meta"):  # no time and no random numbers spent on weights that init_weights overwrites
            super().__init__(config, {"wte": nn.Embedding(config.vocab_size, config.n_embd)}, config.vocab_size)
        self.to_empty(device="cpu")
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights(seed)

    def parts(self, idx, cache: KVCache | None = None):
        """Token and position embeddings of (B, T) ids, after those in the cache: (B, T, C) and (T, C)."""
        wpe, T = self.transformer.wpe, idx.size(1)
        return self.transformer.wte(idx), wpe.weight[:T] if cache is None else wpe(cache.positions(T))

    def forward(self, idx, targets=None, cache: KVCache | None = None, embeddings=None, taps: list | None = None):
        """idx, targets: (B, T) int64; a target of -1 is ignored. Returns logits and the mean cross-entropy in nats.

        Without targets the logits are those of the last position, (B, 1, vocab_size), and the loss is None. With a cache, idx continues the
        tokens in it. `embeddings` (B, T, C) take the place of embed(idx). Each layer's q, k and v, (B, H, T, d), are appended to `taps`.
        Raises ValueError when the context is longer than block_size.
        """
        past = 0 if cache is None else cache.length
        T = idx.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f"context of {past + T} tokens is longer than block_size {self.config.block_size}")
        parts = self.parts(idx, cache) if embeddings is None else (embeddings, None)
        x = self.body(*parts, cache, taps)  # (B, T, C)
        if cache is not None:
            cache.length += T
        return self.output(x, targets)

    def output(self, x, targets=None):
        """Output layer and loss: (B, T, C) -> what `forward` returns."""
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)  # (B, T, vocab_size)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)


# ---------------------------------------------------------------------------------------------------------------------------------
# ViT


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of a vision transformer for square pictures of 3 channels; a token is a patch of patch_size x patch_size pixels."""

    image_size: int = 16
    patch_size: int = 2
    n_classes: int = 1000
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    bias: bool = False
    diffusion: bool = False
    diffusion_alpha: float = 1.0
    diffusion_lambda: float = 1.0
    diffusion_heads: tuple[int, ...] = ()
    weight_init: str = "gpt2"
    diffusion_learned: bool = False
    head_combine: str = "concat"
    attention_kernel: str = "softmax"
    causal = False  # no annotation, hence no field: every patch attends to every patch

    @property
    def block_size(self) -> int:
        """Tokens per picture."""
        return (self.image_size // self.patch_size) ** 2


class ViT(Network):
    """Vision transformer (arXiv 2010.11929) on the GPT's blocks: linear patches, learned positions, mean over patches, linear classifier.

    ViT(config)(pictures, labels) -> (logits, loss).
    """

    def __init__(self, config: ViTConfig, seed: int = 0):
        if config.image_size % config.patch_size:
            raise ValueError(f"image_size {config.image_size} is not divisible by patch_size {config.patch_size}")
        with torch.device("meta"):
            super().__init__(config, {"patch": nn.Linear(3 * config.patch_size**2, config.n_embd)}, config.n_classes)
        self.to_empty(device="cpu")
        self.init_weights(seed)

    def parts(self, pictures):
        """Patch and position embeddings of (B, 3, S, S) pictures: (B, T, C) and (T, C)."""
        B, p, n = pictures.size(0), self.config.patch_size, self.config.image_size // self.config.patch_size
        patches = pictures.view(B, 3, n, p, n, p).permute(0, 2, 4, 1, 3, 5).reshape(B, n * n, 3 * p * p)  # (B, T, 3 p p)
        return self.transformer.patch(patches), self.transformer.wpe.weight

    def pooled(self, x, positions=None, taps: list | None = None):
        """The mean of `body` over patches: (B, C)."""
        return self.body(x, positions, taps=taps).mean(dim=1)

    def forward(self, pictures, labels=None, embeddings=None, taps: list | None = None):
        """pictures: (B, 3, S, S), normalised per channel; labels: (B,) int64, -1 is ignored. Returns (B, n_classes) logits and the loss in nats.

        `embeddings` and `taps` are as in GPT.forward.
        """
        parts = self.parts(pictures) if embeddings is None else (embeddings, None)
        logits = self.lm_head(self.pooled(*parts, taps))
        return logits, None if labels is None else F.cross_entropy(logits.float(), labels, ignore_index=-1)
