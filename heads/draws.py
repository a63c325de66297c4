"""The mean prediction of Gaussian logits and its entropies, from draws that all positions share.

A linear head's logits at a position are independent Gaussians, whatever the posterior, and a prediction depends on
their law there alone. So a draw is one noise vector (V,) that all positions of a call share: exact at each; only the
Monte Carlo errors of positions go together. It saves most of the time, and what a position is told depends on the
generator, not on how many positions there are. Shapes: mean, std, log-probabilities (..., V), entropies (...).
"""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from heads.likelihoods import Categorical, Sigmoid

N_AT_ONCE = 16  # draws whose noise (N_AT_ONCE, V) exists at a time
BLOCK = {
    "cpu": 1 << 18
}  # logits of a draw that are worked on at a time: the half dozen of such arrays fit a CPU's L2
# of a logarithm whose number is added up as it is: fp32 ends at -87, and ln(2 V) must lie between
LOWEST = -70.0

Part = tuple[
    torch.Tensor, torch.Tensor | None, float
]  # log mean p, mean entropy, the share of all draws


def in_parts(
    likelihood: "Categorical | Sigmoid",
    mean: torch.Tensor,
    std: torch.Tensor | None,
    n: int,
    entropies: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, int]]:
    """n draws: yields the log of their mean probability, their mean entropy and their number, some draws at a time.

    std = None: nothing is random, and one prediction is all of them."""
    if std is None:
        log_probs = likelihood.log_probs(mean)
        yield log_probs, entropy(log_probs) if entropies else None, n
        return
    for start in range(0, n, N_AT_ONCE):
        noise = torch.randn(
            min(N_AT_ONCE, n - start), mean.size(-1), dtype=mean.dtype, device=mean.device
        )
        rows = max(1, BLOCK.get(mean.device.type, mean.numel()) // mean.size(-1))
        blocks = zip(*(t.reshape(-1, t.size(-1)).split(rows) for t in (mean, std)), strict=True)
        log_probs, of_draws = zip(
            *(_average(likelihood, *block, noise, entropies) for block in blocks), strict=True
        )
        of_draws = torch.cat(of_draws).view(mean.shape[:-1]) if entropies else None
        yield torch.cat(log_probs).view_as(mean), of_draws, len(noise)


def _average(
    likelihood, mean, std, noise, entropies: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """mean, std (N, V), noise (S, V) -> log mean p (N, V), the draws' mean entropy (N,)."""
    centred = likelihood.centred(mean)
    # a logit moves by `reach` at most, and so does the normaliser
    reach = std.amax() * noise.abs().amax()
    if len(noise) > 1 and centred.amin() - 2 * reach > LOWEST:
        return _average_of_numbers(likelihood, centred, std, noise, entropies)
    drawn = (likelihood.log_probs(torch.addcmul(mean, std, eps)) for eps in noise)
    return mixture((draw, entropy(draw) if entropies else None, 1 / len(noise)) for draw in drawn)


def _average_of_numbers(
    likelihood, centred, std, noise, entropies: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """_average with one exp per logit, for probabilities that are all well above the least fp32 number."""
    of_tokens, of_draws = torch.zeros_like(centred), 0.0
    for eps in noise:
        p, log_p = likelihood.unnormalised(torch.addcmul(centred, std, eps))
        total = p.sum(-1, keepdim=True)
        of_tokens.addcmul_(p, 1 / total)
        if entropies:
            of_draws = of_draws + total.log() - (p * log_p).sum(-1, keepdim=True) / total
    return (of_tokens / len(noise)).log(), of_draws.squeeze(-1) / len(noise) if entropies else None


def mixture(parts: Iterable[Part]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The mean of predictions that come one by one, each with its entropy (or None) and its share of the whole: its
    log-probabilities (..., V), and the mean of the entropies (...)."""
    log_sum, mean_entropy = None, None
    for log_probs, of_draws, share in parts:
        log_probs = log_probs + math.log(share) if share < 1 else log_probs
        log_sum = log_probs if log_sum is None else torch.logaddexp(log_sum, log_probs)
        if of_draws is not None:
            mean_entropy = (
                share * of_draws if mean_entropy is None else mean_entropy + share * of_draws
            )
    return log_sum, mean_entropy


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """log_probs (..., V) -> (...), nats; a token of probability 0 adds nothing."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite).sum(-1)
