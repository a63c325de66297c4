"""The mean prediction of Gaussian logits and its entropies, from draws that all positions share.

Given x, the logits of a linear head are independent Gaussians, and a prediction depends on their
distribution at its position alone. So a draw is one noise vector (V,) for all positions of a call:
unbiased at every position; positions share their Monte Carlo error. That saves most of the time,
and a position's result depends on the generator, not on the number of positions. Shapes: mean, std,
log-probabilities (..., V), entropies (...).
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from heads.likelihoods import Likelihood

DRAWS_AT_ONCE = 16  # draws whose noise (DRAWS_AT_ONCE, V) exists at a time
# logits of a draw that are worked on at a time: half a dozen such arrays fit into a CPU's L2
LOGITS_AT_ONCE = {"cpu": 1 << 18}
# below this log p, probabilities are not added up as fp32 numbers: fp32 ends at -87, and a sum over
# the vocabulary needs ln(2 V) of the difference
LOWEST_LOG_P = -70.0


class WeightedPrediction(NamedTuple):
    """A component of a mixture."""

    log_probs: Tensor
    entropy: Tensor | None
    weight: float


def draw_batches(
    likelihood: Likelihood,
    mean: Tensor,
    std: Tensor | None,
    n: int,
    n_total: int,
    entropies: bool,
    generator: torch.Generator | None = None,
) -> Iterator[WeightedPrediction]:
    """The mean predictions of n draws, some draws at a time, with their mean entropies.

    n_total: all draws of the mixture, for the weights. std = None: nothing is random.
    """
    if std is None:
        log_probs = likelihood.log_probs(mean)
        yield WeightedPrediction(log_probs, entropy(log_probs) if entropies else None, n / n_total)
        return
    V, device = mean.size(-1), mean.device
    n_rows = max(1, LOGITS_AT_ONCE.get(device.type, mean.numel()) // V)
    for start in range(0, n, DRAWS_AT_ONCE):
        shape = (min(DRAWS_AT_ONCE, n - start), V)
        noise = torch.randn(shape, dtype=mean.dtype, device=device, generator=generator)
        mean_rows, std_rows = (t.reshape(-1, V).split(n_rows) for t in (mean, std))
        blocks = [
            _average(likelihood, *block, noise, entropies)
            for block in zip(mean_rows, std_rows, strict=True)
        ]
        log_probs, of_draws = zip(*blocks, strict=True)
        mean_entropy = torch.cat(of_draws).view(mean.shape[:-1]) if entropies else None
        yield WeightedPrediction(
            torch.cat(log_probs).view_as(mean), mean_entropy, len(noise) / n_total
        )


def _average(likelihood, mean, std, noise, entropies) -> tuple[Tensor, Tensor | None]:
    """mean, std (N, V), noise (S, V) -> log mean p (N, V), mean entropy of the draws (N,)."""
    centred = likelihood.centred(mean) if len(noise) > 1 else None
    if centred is not None:
        # a logit moves by `reach` at most, and so does the normaliser
        reach = std.amax() * noise.abs().amax()
        if centred.amin() - 2 * reach > LOWEST_LOG_P:
            return _average_of_numbers(likelihood, centred, std, noise, entropies)
    drawn = (likelihood.log_probs(torch.addcmul(mean, std, eps)) for eps in noise)
    return mixture((draw, entropy(draw) if entropies else None, 1 / len(noise)) for draw in drawn)


def _average_of_numbers(likelihood, centred, std, noise, entropies) -> tuple[Tensor, Tensor | None]:
    """_average with one exp per logit, for probabilities well above the least fp32 number."""
    mean_p, mean_entropy = torch.zeros_like(centred), 0.0
    for eps in noise:
        p, log_p = likelihood.unnormalised(torch.addcmul(centred, std, eps))
        total = p.sum(-1, keepdim=True)
        mean_p.addcmul_(p, 1 / total)
        if entropies:
            cross = (p * log_p).sum(-1, keepdim=True) / total
            mean_entropy = mean_entropy + total.log() - cross
    log_mean = (mean_p / len(noise)).log()
    return log_mean, mean_entropy.squeeze(-1) / len(noise) if entropies else None


def mixture(components: Iterable[WeightedPrediction]) -> tuple[Tensor, Tensor | None]:
    """The log-probabilities (..., V) of a mixture, and the weighted mean of the entropies (...)."""
    log_sum, mean_entropy = None, None
    for log_probs, of_component, weight in components:
        if weight < 1:
            log_probs = log_probs + math.log(weight)
        log_sum = log_probs if log_sum is None else torch.logaddexp(log_sum, log_probs)
        if of_component is not None:
            term = weight * of_component
            mean_entropy = term if mean_entropy is None else mean_entropy + term
    return log_sum, mean_entropy


def entropy(log_probs: Tensor) -> Tensor:
    """log_probs (..., V) -> (...), nats; a token of probability 0 adds nothing."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite).sum(-1)
