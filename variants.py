"""What the theory suggests beyond the paper's model: other kernels of the graph, heads as a product of experts, and the theory's initial weights.

    attention_kernel   softmax | softmax1 | rbf | student_t    what the weights of the graph are made of
    head_combine       concat | product                        how the heads' updates become one
    weight_init        gpt2 | unrolled                         where training starts
    diffusion_learned  False | True                            alpha of A - alpha I is a parameter of each diffusing head

model.py imports this file only when one of the keys asks for it. All work in both arms, in GPT and ViT, and together. Graph diffusion stays where
it is, in model.diffuse. Shapes: B sequences, H heads, T queries, S keys, d = C / H.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CausalSelfAttention, InOrder, attention_matrix, diffuse


def fused(q, k, v, scale: float, mask, causal: bool, dropout: float):
    """softmax(scale q k^T) v by the fused kernel; v may have another width: (B, H, T, a), (B, H, S, a), (B, H, S, c) -> (B, H, T, c).

    The widths are filled up with zeros, which change no product, to a common multiple of 8: what the fast kernels ask for.
    """
    width = -(-max(q.size(-1), v.size(-1)) // 8) * 8
    padded = (F.pad(part, (0, width - part.size(-1))) for part in (q, k, v))
    y = InOrder.apply(F.scaled_dot_product_attention(*padded, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale))
    return y[..., : v.size(-1)]


# ---------------------------------------------------------------------------------------------------------------------------------
# Kernels of the graph


def with_key_norms(q, k):
    """(B, H, T, d), (B, H, S, d) -> the same with two channels more, such that q' k'^T = q k^T - |k|^2 / 2 in every row.

    The Gaussian kernel exp(-|q - k|^2 / (2 sqrt d)) = exp(-|q|^2 / (2 sqrt d)) exp((q k - |k|^2 / 2) / sqrt d). Its first factor is the same in
    a whole row, and goes when rows are normalised: so rbf attention is softmax attention with the key-norm bias -|k|^2 / (2 sqrt d), and that is
    a product with one more channel, (q, 1) (k, -|k|^2 / 2). The second channel holds what the first has lost by rounding, up to 0.4 % in bfloat16.
    """
    norm = -0.5 * k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(dim=-1, keepdim=True)
    rounded = norm.to(k.dtype)
    ones = q.new_ones(*q.shape[:-1], 2)
    return torch.cat((q, ones), dim=-1), torch.cat((k, rounded, (norm - rounded).to(k.dtype)), dim=-1)


def with_null(q, k, v, mask):
    """(B, H, T, a), (B, H, S, a), (B, H, S, c) -> the same with a token in front whose query, key and value are 0, and the mask for it.

    Every query sees its key, with logit 0, so a row of softmax becomes exp(z_s) / (1 + sum exp(z)) on the others (softmax1), and its value adds
    nothing. Its own query is there so that the causal mask of a square matrix stays the kernel's own; row 0 of the result is to be dropped.
    """
    front = (0, 0, 1, 0)
    if mask is not None:  # (T, S), boolean or additive
        mask = F.pad(mask, (1, 0, 1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return F.pad(q, front), F.pad(k, front), F.pad(v, front), mask


def student_t_matrix(q, k, mask=None, causal: bool = False):
    """A with rows proportional to 1 / (1 + |q - k|^2 / sqrt d), in float32 or float64: (B, H, T, d), (B, H, S, d) -> (B, H, T, S).

    A Student-t kernel of one degree of freedom, that of t-SNE. Its tails are heavy: the weights of far tokens fall by a power, not exponentially.
    """
    with torch.autocast(q.device.type, enabled=False):  # the distance is a difference of large numbers
        q, k = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (q, k))
        squares = q.square().sum(-1, keepdim=True) + k.square().sum(-1, keepdim=True).mT - 2 * (q @ k.mT)
        weights = 1 / (1 + squares.clamp(min=0) / math.sqrt(q.size(-1)))
        if causal:
            mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            weights = weights.masked_fill(~mask if mask.dtype == torch.bool else mask < 0, 0)
        return weights / weights.sum(dim=-1, keepdim=True)


def kernel_matrix(q, k, causal: bool, kernel: str):
    """A, stored, for one of the kernels: (B, H, T, d) twice -> (B, H, T, T). For tests, the probe and figures. Raises ValueError."""
    if kernel == "softmax":
        return attention_matrix(q, k, causal)
    if kernel == "softmax1":
        q, k, *_ = with_null(q, k, k, None)
        return attention_matrix(q, k, causal)[..., 1:, 1:]
    if kernel == "rbf":
        q_more, k_more = with_key_norms(q, k)
        return attention_matrix(q_more * math.sqrt(q_more.size(-1) / q.size(-1)), k_more, causal)  # it divides by the root of the wider d
    if kernel == "student_t":
        return student_t_matrix(q, k, causal=causal)
    raise ValueError(f"attention_kernel {kernel!r} is not softmax, softmax1, rbf or student_t")


# ---------------------------------------------------------------------------------------------------------------------------------
# Attention


class VariantAttention(CausalSelfAttention):
    """CausalSelfAttention with another kernel, with its heads combined as a product of experts, or with a learned alpha (heads,) for A - alpha I.

    Kernels: softmax exp(q k / sqrt d), rbf exp(-|q - k|^2 / (2 sqrt d)), student_t 1 / (1 + |q - k|^2 / sqrt d), rows normalised, causal where
    the model is. softmax1 divides the exponentials by their sum plus 1, so that a row may be as small as it likes: a head can be silent, which a
    row that sums to 1 allows only by a token whose value is near 0, and A - I by a look at the own token alone. Its A - I has no rows that sum to
    0. It runs in the fused kernel with a token more, rbf with 2 channels more (8, with the padding). student_t stores the B x H x T x S matrix in
    float32, and in training several of them for the backward pass: 4 B H T S bytes each, 0.6 GB a layer at GPT-2's 12 heads, T = 1024 and 12
    sequences.

    head_combine="product" reads the heads as experts. Assumptions: head h says of the same token's new latent z that it is Gaussian,

        p_h(z) = N(z; x + mu_h, s_h^2 I),    mu_h = H W_o^h y^h,    1 / s_h^2 = pi_h,

    and the experts are independent, so their densities multiply. The product of Gaussians is a Gaussian, with

        mean  x + sum_h pi_h mu_h / sum_h pi_h  =  x + sum_h W_o^h (w_h y^h),    w_h = H pi_h / sum_g pi_g,    precision  sum_h pi_h

    (log-densities add, quadratic terms add; W_o's bias, if any, is common to all). y^h is what the head of the ordinary block hands to c_proj, A v
    or lambda (A v - alpha v). The factor H in mu_h is a choice of unit: with equal precisions, so for one head exactly, this is the ordinary block.

    The precision is computed from the attention row. Read as a distribution over its tokens' values, row i of A has mean (A v)_i and per channel the
    variance var_i = sum_s a_is |v_s|^2 / d - |(A v)_i|^2 / d; the Gaussian with these moments is the head's factor, plus a noise of its own:

        pi_h,i = 1 / (var_i + exp(log_noise_h))

    So a head whose neighbours agree is believed more. log_noise (H,) is the one parameter more, and starts near 0 (drawn like a weight, 0.02). A
    precision learned per head alone would change nothing: W_o absorbs constant weights. The second moment is one more channel of the values in the
    same fused call. Subtracting alpha v shifts a head's mean by something known, which leaves the variance alone; lambda is a step size, outside
    the factor. Under dropout both moments see the same dropped row.
    """

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.kernel, self.product = config.attention_kernel, config.head_combine == "product" and config.n_head > 1
        if config.attention_kernel not in ("softmax", "softmax1", "rbf", "student_t"):
            raise ValueError(f"attention_kernel {config.attention_kernel!r} is not softmax, softmax1, rbf or student_t")
        if config.head_combine not in ("concat", "product"):
            raise ValueError(f"head_combine {config.head_combine!r} is not concat or product")
        if self.product:
            self.log_noise = nn.Parameter(torch.zeros(config.n_head))
        if config.diffusion_learned and self.diffusing_heads:
            del self.alpha
            self.alpha = nn.Parameter(torch.zeros(self.diffusing_heads))  # init_weights fills in diffusion_alpha; no weight decay on vectors

    def attend(self, q, keys, values, mask, causal: bool):
        """A v for this kernel; the values may be wider than queries and keys."""
        if self.kernel == "softmax" and not self.product:
            return super().attend(q, keys, values, mask, causal)
        dropout, scale = self.dropout if self.training else 0.0, 1 / math.sqrt(q.size(-1))
        if self.kernel == "student_t":
            A = F.dropout(student_t_matrix(q, keys, mask, causal), dropout)
            return A.to(values.dtype) @ values
        if self.kernel == "softmax1":
            q, keys, values, mask = with_null(q, keys, values, mask)
            return fused(q, keys, values, scale, mask, causal, dropout)[..., 1:, :]
        if self.kernel == "rbf":
            q, keys = with_key_norms(q, keys)
        return fused(q, keys, values, scale, mask, causal, dropout)

    def per_head(self, q, v, keys, values, mask, causal: bool):
        """What each head hands to c_proj, weighted by its precision when head_combine is product: (B, H, T, d)."""
        alpha = self.alpha[:, None, None] if isinstance(self.alpha, torch.Tensor) else self.alpha
        if not self.product:
            return diffuse(self.attend(q, keys, values, mask, causal), v, alpha, self.lam, self.diffusing_heads)
        d = v.size(-1)
        wide = torch.promote_types(v.dtype, torch.float32)
        square = values.to(wide).square().mean(dim=-1, keepdim=True)
        moments = self.attend(q, keys, torch.cat((values, square.to(values.dtype)), dim=-1), mask, causal)
        y = moments[..., :d]
        precision = self.precisions(y.to(wide), moments[..., d:].to(wide))
        weights = self.n_head * precision / precision.sum(dim=1, keepdim=True)
        return weights.to(y.dtype) * diffuse(y, v, alpha, self.lam, self.diffusing_heads)

    def precisions(self, mean, square):
        """Mean (B, H, T, d) and mean square over channels (B, H, T, 1) of the rows -> precisions pi (B, H, T, 1), at most exp(-log_noise)."""
        variance = (square - mean.square().mean(dim=-1, keepdim=True)).clamp(min=0)  # rounding may make it negative
        return 1 / (variance + self.log_noise.exp()[None, :, None, None].to(variance.dtype))


# ---------------------------------------------------------------------------------------------------------------------------------
# Initial weights

COSINE_TEMPERATURE = 1.0  # A = softmax(cosine / this) at the start, without the noise
STEP = 0.25  # eta n_layer: all blocks together move a token by this times LayerNorm's unit


@torch.no_grad()
def add_theory_to_block(block, temperature: float, eta: float, regulariser: float):
    """Adds the theory's weights to those of a model.Block, in place; on top of zeros it is one step of the theory (unroll.py). With u = LN(x):

        W_q, W_k += s I,  s^2 = 1 / (sqrt(d) temperature):  head h compares its own d channels: q k / sqrt d = cosine / temperature for |u_h|^2 = d
        W_v += I,  W_o += eta I:                            attention adds eta A u (arm A) or eta (A - I) u, head by head on its channels
        feed-forward += regulariser u:                      M = regulariser I, which nu X (X^T X + beta I)^-1 is for whitened latents, X^T X = n I,
                                                            with regulariser = nu eta / (n + beta)

    GELU(z) - GELU(-z) = z makes the feed-forward exactly linear: C hidden channels get I, the next C get -I, c_proj gets regulariser times I and -I.

    Source: arXiv 2507.21040, THEORY section 1: X <- X + eta (A - I) LN(X), then X <- X + LN(X) M.
    """
    C, d = block.attn.c_proj.weight.size(0), block.attn.c_proj.weight.size(0) // block.attn.n_head
    identity = torch.eye(C, dtype=block.attn.c_proj.weight.dtype, device=block.attn.c_proj.weight.device)
    scale = 1 / math.sqrt(math.sqrt(d) * temperature)
    block.attn.c_attn.weight += torch.cat((scale * identity, scale * identity, identity))
    block.attn.c_proj.weight += eta * identity
    block.mlp.c_fc.weight[: 2 * C] += torch.cat((identity, -identity))
    block.mlp.c_proj.weight[:, : 2 * C] += regulariser * torch.cat((identity, -identity), dim=1)


def add_theory(model, temperature: float = COSINE_TEMPERATURE, step: float = STEP):
    """weight_init="unrolled": adds the theory's weights to GPT-2's random ones in place, which thereby become the noise around them.

    Both the diffusion and the regulariser step are eta = step / n_layer, so that depth does not change how far all blocks together go. Embeddings,
    LayerNorm and biases stay GPT-2's.
    """
    for block in model.transformer.h:
        add_theory_to_block(block, temperature, step / model.config.n_layer, step / model.config.n_layer)
