"""Parameter groups, the optimiser and the learning-rate schedule."""

import math

import torch


def adamw(
    model: torch.nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only: no bias, no norm, no log_std (decay
    pulls std to 1).
    """
    decayed, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_decayed = p.dim() >= 2 and not name.endswith("log_std")
            group = decayed if is_decayed else others
            group.append(p)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def learning_rate_at(step: int, config) -> float:
    """nanoGPT's schedule: linear warm-up, cosine to min_lr at lr_decay_iters, then min_lr."""
    peak, lowest = config.learning_rate, config.min_lr
    warmup = config.warmup_iters
    end = config.lr_decay_iters or config.max_iters
    if not config.decay_lr:
        return peak
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > end:
        return lowest
    progress = (step - warmup) / max(1, end - warmup)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return lowest + share * (peak - lowest)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config) -> float:
    """Give the optimiser the learning rate of this step, and return it."""
    lr = learning_rate_at(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
