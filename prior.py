"""Attention as a latent-variable model and its log-barrier (arXiv 2602.22271): what training minimises besides the cross-entropy.

Token embeddings are latent variables, u_i = mu_i(u) + e_i with mu_i an attention average of the past. The change of variables e -> u brings
log |det(de_i/du_i)| into the density of u, position by position: its *margin*, the distance from the *degeneracy boundary* where the determinant is
0. Training towards the maximum of the posterior (MAP) adds prior_lambda x mean barrier(margin), and e's energy, to the cross-entropy:

    logdet     -log |det|              the paper's; not bounded below: a large determinant is rewarded without limit
    softplus   log(1 + 1 / |det|)      the same near the boundary, no reward far from it
    square     (log |det|)^2           as steep at the boundary, and a determinant far above 1 is penalised too

The margins are those of a small strict causal attention on the model's embeddings (EmbeddingPrior), or those of the model's own heads
(own_margins), at positions drawn at random in training. Everything here is float32 at least, outside autocast; larger products may be TF32 on CUDA,
as torch is told to (place.py), determinants keep float32's digits.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from operators import operator

try:
    import fused_prior
except ModuleNotFoundError as error:  # CPU builds of torch come without Triton
    if error.name != "triton":
        raise
    fused_prior = None

FLOOR = 1e-6  # smallest pivot: a matrix at the boundary has log |det| around -14 and a finite inverse, so penalty and gradient stay finite

# ---------------------------------------------------------------------------------------------------------------------------------
# Many small determinants


def inverse_by_lu(matrices):
    """(N, p, p) -> the same by LAPACK's or cuBLAS's LU decomposition, in the dtype given."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrices)
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(diagonal.abs() < FLOOR, torch.where(diagonal < 0, -FLOOR, FLOOR).to(diagonal), diagonal))
    swaps = (pivots != torch.arange(1, 1 + pivots.size(-1), device=pivots.device)).sum(dim=-1)
    signs = diagonal.sign().prod(dim=-1) * (1 - 2 * (swaps % 2))
    identity = torch.eye(lu.size(-1), dtype=lu.dtype, device=lu.device).expand_as(lu)
    return torch.linalg.lu_solve(lu, pivots, identity).contiguous(), diagonal.abs().log().sum(dim=-1), signs


@operator
def inverse(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, p, p) -> inverses, log |det| (N,), sign of det (N,), with no pivot smaller than FLOOR. Nothing waits for the device."""
    matrices = matrices.contiguous()
    if fused_prior and matrices.is_cuda and matrices.dtype == torch.float32 and matrices.size(-1) <= 128:
        return fused_prior.inverse(matrices, FLOOR)
    return inverse_by_lu(matrices)


@inverse.register_fake
def _(matrices):
    return torch.empty_like(matrices, memory_format=torch.contiguous_format), *(matrices.new_empty(matrices.size(0)) for _ in range(2))


def log_abs_det(matrices):
    """(..., p, p) -> log |det| (...) and where the determinant is negative (...), bool. The gradient is the inverse's transpose."""
    flat = matrices.flatten(0, -3)
    inverses, logs, signs = inverse(flat.detach())
    logs = logs + ((flat - flat.detach()) * inverses.mT).sum(dim=(-2, -1))  # adds nothing but the gradient
    return logs.view(matrices.shape[:-2]), (signs < 0).view(matrices.shape[:-2])


def barrier(margins, form: str):
    """The penalty of every margin log |det|; see the top of the file."""
    return {"logdet": lambda m: -m, "softplus": lambda m: F.softplus(-m), "square": torch.square}[form](margins)


# ---------------------------------------------------------------------------------------------------------------------------------
# The latent-variable model on the embeddings


def _pairs(p: int, device):
    """i and j of the p (p + 1) / 2 distinct entries of a symmetric matrix, and (p, p) where each entry is among them."""
    i, j = torch.triu_indices(p, p, device=device)
    place = torch.zeros(p, p, dtype=torch.long, device=device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=device)
    return i, j, place


class _Products(torch.autograd.Function):
    """u (..., p) -> u_i u_j (..., p (p + 1) / 2). The gradient is a matrix applied to u: the index_add of autograd's own is slow on a GPU."""

    @staticmethod
    def forward(ctx, u):
        i, j, place = _pairs(u.size(-1), u.device)
        ctx.save_for_backward(u, place)
        return u.index_select(-1, i) * u.index_select(-1, j)

    @staticmethod
    def backward(ctx, dy):
        u, place = ctx.saved_tensors
        p = len(place)
        d = dy.index_select(-1, place.flatten()).unflatten(-1, (p, p))
        return (d * u[..., None, :]).sum(dim=-1) + d.diagonal(dim1=-2, dim2=-1) * u  # twice on the diagonal


class _Symmetric(torch.autograd.Function):
    """Distinct entries (..., p (p + 1) / 2) -> the symmetric matrix (..., p, p), with no index_add behind it either."""

    @staticmethod
    def forward(ctx, distinct, p):
        i, j, place = _pairs(p, distinct.device)
        ctx.save_for_backward(i, j)
        return distinct.index_select(-1, place.flatten()).unflatten(-1, (p, p))

    @staticmethod
    def backward(ctx, dy):
        i, j = ctx.saved_tensors
        p = dy.size(-1)
        flat = dy.flatten(-2)
        return flat.index_select(-1, i * p + j) + flat.index_select(-1, j * p + i) * (i != j), None


def moments(q, k, u):
    """Mean and covariance of the past under strict causal attention, from one call of the fused kernel (THEORY section 2).

    q, k, u: (B, T, p); the logits are q k^T. Returns mu (B, T - 1, p) and Sigma (B, T - 1, p, p) of positions 2..T; the
    first has no past. The values are u and the p (p + 1) / 2 distinct products of its entries.
    """
    p = u.size(-1)
    values = torch.cat((u, _Products.apply(u)), dim=-1)
    width = values.size(-1)
    values = F.pad(values, (0, -width % 8))  # the fused kernels want such a width
    averages = F.scaled_dot_product_attention(q[:, None, 1:], k[:, None, :-1], values[:, None, :-1], is_causal=True, scale=1.0)[:, 0]
    mean, second = averages[..., :p], averages[..., p:width]
    return mean, _Symmetric.apply(second, p) - mean[..., :, None] * mean[..., None, :]


class EmbeddingPrior(nn.Module):
    """The model's token + position embeddings, projected to p channels, as latent variables of a strict causal attention of one head.

    `tied` makes W_q = W_k, so that B is positive semi-definite and det(I - Sigma B) can be large only beyond the boundary. `normalise` gives the
    projection embeddings of mean 0 and variance 1 over channels, so that their scale cannot trade for the barrier.
    """

    def __init__(self, channels: int, dim: int = 8, tied: bool = False, normalise: bool = False, seed: int = 0):
        super().__init__()
        self.tied, self.normalise = tied, normalise
        self.project = nn.Linear(channels, dim, bias=False)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = None if tied else nn.Linear(dim, dim, bias=False)
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Normal weights in place, of variance 1 / inputs, a quarter of it for W_q and W_k; each parameter has a generator of its own, from the seed
        and its name, on the CPU.

        So a prior that normalises starts inside the boundary, where a barrier can hold it.
        """
        for name, parameter in self.named_parameters():
            key = np.random.SeedSequence([seed, zlib.crc32(f"prior.{name}".encode())]).generate_state(1, np.uint64)[0]
            generator, scale = torch.Generator().manual_seed(int(key >> 1)), 1.0 if name.startswith("project") else 0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0, scale * parameter.size(1) ** -0.5, generator=generator))

    def forward(self, embeddings):
        """(B, T, C) -> margins log |det(I - Sigma_i B)| (B, T), where the determinant is negative (B, T), and |e_i|^2 / p (B, T).

        B = W_k^T W_q / sqrt(p). The first position's margin is 0 and its e is its u.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(self.project.weight.dtype)
            if self.normalise:
                embeddings = F.layer_norm(embeddings, embeddings.shape[-1:])
            u = self.project(embeddings)
            w_q, w_k = self.query.weight, (self.query if self.tied else self.key).weight
            p = u.size(-1)
            b = w_k.T @ w_q / math.sqrt(p)
            mean, covariance = moments(u @ b.T, u, u)  # u_i^T B^T u_j = q_i k_j / sqrt(p), with one projection instead of two
            blocks = torch.eye(p, dtype=u.dtype, device=u.device) - (covariance[..., None] * b).sum(dim=-2)  # a product in full float32
            margins, negative = log_abs_det(blocks)
            residual = u - F.pad(mean, (0, 0, 1, 0))
            return F.pad(margins, (1, 0)), F.pad(negative, (1, 0)), residual.square().mean(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------------------
# The model's own attention


def own_blocks(attention, q, k, v, positions, heads, joint: bool = False):
    """M_h W_o^h of the residual map e = u - sum_h W_o^h y^h at chosen (position, head) pairs, exactly (THEORY section 2).

    `attention` is a model.CausalSelfAttention, q, k, v (B, H, T, d) what it computed; positions and heads (B, n) int64. Returns (B, n, d, d), so that
    head h alone has the block determinant det(I - M_h W_o^h). `joint` gives the rows M_h W_o, (B, n, d, C), of the heads stacked. Either arm, causal
    or not; attention without dropout.
    """
    B, H, T, d = q.shape
    n = positions.size(1)
    row = (torch.arange(B, device=q.device)[:, None] * H + heads).flatten()  # of (B H): one (sequence, head) per pair
    q, k, v = (part.flatten(0, 1).to(attention.c_attn.weight.dtype) for part in (q, k, v))
    k, v = k.index_select(0, row), v.index_select(0, row)  # (B n, T, d)
    here = positions.reshape(-1, 1)
    at = (row * T + here[:, 0])[:, None].expand(-1, d)
    q_i = q.reshape(-1, d).gather(0, at)  # (B n, d)
    v_i = v.gather(1, here[:, :, None].expand(-1, 1, d))[:, 0]
    logits = (k @ q_i[:, :, None])[..., 0] / math.sqrt(d)  # (B n, T)
    if attention.causal:
        logits = logits.masked_fill(torch.arange(T, device=q.device) > here, -math.inf)
    a = logits.softmax(dim=-1)
    y = (a[:, None, :] @ v)[:, 0]
    covariance = ((v - y[:, None, :]) * a[:, :, None]).mT @ k  # sum_s a_s (v_s - y) k_s^T, which is Cov(v, k)
    w_q, w_k, w_v = attention.c_attn.weight.view(3, H, d, H * d)
    w_o = attention.c_proj.weight if joint else attention.c_proj.weight.view(H * d, H, d).transpose(0, 1)
    which = heads.flatten()
    p_q, p_k, p_v = ((w @ w_o).index_select(0, which) for w in (w_q / math.sqrt(d), w_k / math.sqrt(d), w_v))  # W_q^h W_o / sqrt(d), ...
    a_i = a.gather(1, here)[:, :, None]
    diffuses = (which >= H - attention.diffusing_heads)[:, None, None]
    blocks = covariance @ p_q + a_i * (v_i - y)[:, :, None] * (q_i[:, None, :] @ p_k)
    blocks = blocks + torch.where(diffuses, a_i - attention.alpha, a_i) * p_v
    return torch.where(diffuses, attention.lam * blocks, blocks).unflatten(0, (B, n))


def own_margins(attention, q, k, v, positions, heads):
    """log |det(I - M_h W_o^h)| of chosen (position, head) pairs, (B, n), and where the determinant is negative. Arguments as for own_blocks."""
    return [part[0] for part in margins_of_layers([attention], [(q, k, v)], positions[None], heads[None])]


def margins_of_layers(attentions, taps, positions, heads):
    """The same for L layers of one model, each with its q, k, v, and pairs (L, B, n): (L, B, n) twice, by one elimination of all their blocks."""
    q = taps[0][0]
    with torch.autocast(q.device.type, enabled=False):
        if fused_prior and fused_prior.applies(q, attentions[0].c_attn.weight):
            return fused_prior.own_margins(attentions, taps, positions, heads, FLOOR)
        blocks = torch.stack([own_blocks(attention, *tap, *pairs) for attention, tap, *pairs in zip(attentions, taps, positions, heads)])
        return log_abs_det(torch.eye(blocks.size(-1), dtype=blocks.dtype, device=blocks.device) - blocks)


def draw_pairs(B: int, T: int, H: int, n: int, device):
    """n (position, head) pairs for each of B sequences, from torch's global generator: two (B, n) int64 tensors.

    One position from each of n equal parts of the sequence, heads in turn from a random first one. Every position and every head comes up equally
    often and independently, so the mean over the pairs estimates the mean over all of them without bias.
    """
    part = torch.arange(n, device=device)
    positions = ((part + torch.rand(B, n, device=device)) * (T / n)).long().clamp(max=T - 1)
    heads = (torch.randint(H, (B, 1), device=device) + part) % H
    return positions, heads


# ---------------------------------------------------------------------------------------------------------------------------------
# What training minimises


class Objective(nn.Module):
    """The model with its prior, and the controls: embedding noise and label smoothing. `prior` is None unless it has parameters of its own.

    Objective(model, config)(inputs, targets) -> (total loss, cross-entropy, barrier, margins, where the determinant is negative); all but the total
    are detached. Without a barrier the last three are left out. `weight` is lambda, a tensor that train.py may change from step to step.
    """

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config = model, config
        self.prior = None
        if config.prior_lambda and config.prior_where == "embedding":
            self.prior = EmbeddingPrior(model.config.n_embd, config.prior_dim, config.prior_tied, config.prior_normalise)
        self.weight = torch.tensor(config.prior_lambda, device=next(model.parameters()).device)  # no buffer: DDP would send it around

    @property
    def transformer(self):
        """The model's blocks, which parallel.distribute compiles one by one."""
        return self.model.transformer

    def set_step(self, step: int):
        """lambda of optimizer step `step`: constant, or half a cosine down to 0 at max_iters with prior_anneal."""
        if self.config.prior_anneal:
            self.weight.fill_(self.config.prior_lambda * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.config.max_iters))))

    def own_attention(self, taps):
        """Margins of drawn (position, head) pairs of each layer that carries the barrier: (layers, B, prior_positions) twice."""
        layers = self.config.prior_layers or range(len(taps))
        taps = [tuple(part.detach() for part in taps[layer]) if self.config.prior_detach else taps[layer] for layer in layers]
        B, H, T, _ = taps[0][0].shape
        pairs = draw_pairs(len(layers) * B, T, H, min(self.config.prior_positions, T), taps[0][0].device)
        attentions = [self.model.transformer.h[layer].attn for layer in layers]
        return margins_of_layers(attentions, taps, *(part.unflatten(0, (len(layers), B)) for part in pairs))

    def forward(self, inputs, targets):
        config = self.config
        embeddings = disturbed = self.model.embed(inputs)
        if config.embed_noise:
            rms = embeddings.detach().float().square().mean().sqrt()
            disturbed = embeddings + config.embed_noise * rms * torch.randn_like(embeddings)
        taps = [] if config.prior_lambda and config.prior_where == "attention" else None
        logits, loss = self.model(inputs, targets, embeddings=disturbed, taps=taps)
        total, cross_entropy = loss, loss.detach()
        if config.label_smoothing:
            total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-1, label_smoothing=config.label_smoothing)
        if not config.prior_lambda:
            return total, cross_entropy
        energy = None
        if self.prior is None:
            margins, negative = self.own_attention(taps)
        else:
            margins, negative, energy = self.prior(embeddings.detach() if config.prior_detach else embeddings)
        penalty = barrier(margins, config.prior_form).mean()
        total = total + self.weight * penalty
        if config.prior_energy and energy is not None:
            total = total + self.weight * energy.mean() / (2 * config.prior_energy**2)
        return total, cross_entropy, penalty.detach(), margins.detach(), negative


def statistics(penalty, margins, negative) -> dict[str, float]:
    """What the log says of a step: barrier, minimum, mean and 5th percentile of the margins, share of negative determinants. Waits for the device."""
    margins = margins.flatten().float()
    low = margins.kthvalue(1 + len(margins) // 20).values
    values = torch.stack((penalty, margins.min(), margins.mean(), low, negative.float().mean())).tolist()
    return dict(zip(("barrier", "margin_min", "margin_mean", "margin_p05", "negative_share"), values))
