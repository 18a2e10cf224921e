"""AdamW with nanoGPT's two groups, and its learning-rate schedule."""

import math

import torch

from configurator import TrainConfig


def make_optimizer(config: TrainConfig, model, graphed: bool) -> torch.optim.AdamW:
    """AdamW, fused, with weight decay on matrices alone. Its state exists from the start, so that it is loaded and reset in place.

    `graphed` keeps the learning rate in a tensor, which a CUDA graph reads: a number would stay what it was at capture.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    lr = torch.tensor(0.0, device=parameters[0].device) if graphed else 0.0
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), fused=True, capturable=graphed)
    for p in parameters:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


@torch.no_grad()
def reset(optimizer: torch.optim.Optimizer):
    """The state before the first step, in place."""
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float):
    """Sets the rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, half a cosine down to min_lr, constant after that."""
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    low = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    progress = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))
