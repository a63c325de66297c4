"""Parameter groups, the optimizer and the learning-rate schedule."""

import math

import torch


class Joint(torch.optim.Optimizer):
    """Several optimizers as one: each has its own parameters; param_groups and state are joint."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})

    def step(self, closure=None) -> None:
        first = 0
        for optimizer in self.optimizers:
            end = first + len(optimizer.param_groups)
            # in each step, because loading a checkpoint replaces groups and state
            optimizer.param_groups = self.param_groups[first:end]
            optimizer.state = self.state
            optimizer.step()
            first = end


def make_optimizer(
    model: torch.nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW, or with name = "muon" Muon for the matrices in the blocks and AdamW for the rest.

    Weight decay acts on matrices and embeddings only: no bias, no norm, no log_std (decay pulls std
    to 1). Muon (Jordan et al. 2024) scales its updates to the size of AdamW's (Liu et al. 2025), so
    that one learning rate serves both.
    """
    matrices, decayed, others = [], [], []
    for parameter, p in model.named_parameters():
        if p.dim() < 2 or parameter.endswith("log_std"):
            others.append(p)
        elif name == "muon" and parameter.startswith("transformer.h."):
            matrices.append(p)
        else:
            decayed.append(p)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    if not matrices:
        return adamw
    scale = {"weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return Joint(torch.optim.Muon(matrices, lr=learning_rate, **scale), adamw)


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
    """Set the learning rate of this step, and return it."""
    lr = learning_rate_at(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
