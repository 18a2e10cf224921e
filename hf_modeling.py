"""GPT-2 with graph diffusion for transformers: export_hf.py copies this file beside the weights of a checkpoint with diffusion=True.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Only the attention differs from transformers' GPT2LMHeadModel: y = lambda (A v - alpha v) instead of y = A v, on the trailing heads of a layer
that config.json counts, y = A v on the others. Masks, caches and attention kernels are those of transformers (written for 5.17).
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, eager_attention_forward


class GraphDiffusionConfig(GPT2Config):
    """GPT2Config and the keys of graph diffusion. diffusion_heads has one number per layer: how many trailing heads diffuse; None: all."""

    model_type = "gpt2_graph_diffusion"
    diffusion_alpha: float = 1.0
    diffusion_lambda: float = 1.0
    diffusion_heads: list[int] | None = None


class GraphDiffusionAttention(GPT2Attention):
    """Self-attention whose last heads subtract alpha v after the softmax. It has the parameters of GPT2Attention, so weights load by name."""

    def __init__(self, config: GraphDiffusionConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.alpha, self.lam = config.diffusion_alpha, config.diffusion_lambda
        self.kept = 0 if config.diffusion_heads is None else self.num_heads - config.diffusion_heads[layer_idx]  # heads without diffusion

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        """(B, T, C) -> ((B, T, C), A or None): output_attentions shows A, from which alpha I is not subtracted."""
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in self.c_attn(hidden_states).split(self.split_size, dim=-1))
        q, keys, values = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, d); v stays (B, T, H, d), as the kernels' output is
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attn_dropout.p if self.training else 0.0
        y, weights = attend(self, q, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        diffused = self.lam * torch.sub(y[:, :, self.kept :], v[:, :, self.kept :], alpha=self.alpha)
        y = torch.cat((y[:, :, : self.kept], diffused), dim=2)
        return self.resid_dropout(self.c_proj(y.flatten(-2))), weights


class GraphDiffusionLMHeadModel(GPT2LMHeadModel):
    """GPT2LMHeadModel with GraphDiffusionAttention in every block."""

    config_class = GraphDiffusionConfig

    def __init__(self, config: GraphDiffusionConfig):
        super().__init__(config)
        for layer, block in enumerate(self.transformer.h):
            block.attn = GraphDiffusionAttention(config, layer)
        self.post_init()  # once more, for the new modules
