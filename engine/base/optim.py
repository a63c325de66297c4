"""Parameter groups, the optimizer and the learning-rate schedule."""

import math

import torch

from engine.base.distributed import autocast


class Joint(torch.optim.Optimizer):
    """Several optimizers as one: each has its own parameters; param_groups and state are joint."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})

    def step(self, closure=None) -> None:
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            # in each step, because loading a checkpoint replaces groups and state
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state
            optimizer.step()


class Muon(torch.optim.Muon):
    """torch.optim.Muon, but matrices of one shape share batched products, which take less time."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        (group,) = self.param_groups
        lr, decay = group["lr"], group["weight_decay"]
        same_shape = {}
        for p in group["params"]:
            same_shape.setdefault(p.shape, []).append(p)
        for shape, matrices in same_shape.items():
            rate = 0.2 * math.sqrt(max(shape)) * lr  # updates of the size of AdamW's
            directions = torch.stack([self._direction(p, group["momentum"]) for p in matrices])
            for p, update in zip(matrices, orthogonal(directions), strict=True):
                p.mul_(1 - lr * decay).add_(update, alpha=-rate)

    def _direction(self, p, momentum):
        """Nesterov's average of the gradients, in bfloat16 if the hardware is fast at it."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        direction = p.grad.lerp(average, momentum)
        _, dtype = autocast(p.device, "auto")
        return direction.bfloat16() if dtype == "bfloat16" else direction


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with all singular values near 1: five iterations of Newton-Schulz
    with Jordan's coefficients, on the smaller Gram matrix (Gram Newton-Schulz, Zhang et al. 2026).
    """
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    _, n_rows, n_columns = x.shape
    is_tall = n_rows > n_columns
    # In bfloat16, more than two iterations on one Gram matrix may diverge. For square matrices a
    # Gram matrix is as large as x, so each iteration makes its own.
    for n_iterations in (1,) * 5 if n_rows == n_columns else (2, 2, 1):
        gram = x.mT @ x if is_tall else x @ x.mT
        factor = newton_schulz(gram, n_iterations)
        x = x @ factor if is_tall else factor @ x
    return x


def newton_schulz(gram: torch.Tensor, n_iterations: int) -> torch.Tensor:
    """The matrices by which the iterations multiply those with these Gram matrices (N, n, n)."""
    factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
    if n_iterations == 1:
        return factor
    return factor @ newton_schulz(factor @ gram @ factor, n_iterations - 1)


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
    return Joint(Muon(matrices, learning_rate, weight_decay), adamw)


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
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - lowest)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config) -> float:
    """Set the learning rate of this step, and return it."""
    lr = learning_rate_at(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
