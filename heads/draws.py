"""The mean prediction and the mean entropy of Gaussian logits, from draws that positions share.

Given x, the logits of a linear head are independent Gaussians, and a prediction depends only on
their distribution at its own position. So a draw is one noise vector (V,) for all positions of a
call. It is unbiased at every position; positions share their Monte Carlo error. One vector for all
saves most of the time, and a position's result does not depend on the number of positions. Draws
come in pairs of opposite noise: half as many random numbers, and errors of first order cancel. The
pairs are windows of one row of random numbers, which overlap if the vocabulary is large.
Shapes: mean, std and log-probabilities (..., V), entropies (...).
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from heads.likelihoods import Likelihood

DRAWS_AT_ONCE = 16  # draws per batch; their noise (DRAWS_AT_ONCE, V) is in memory together
# the window of the next pair begins so many numbers later. Separate random numbers for each pair
# would take half of the time of a token of GPT-2's vocabulary on a CPU. Predictions are as exact;
# the epistemic uncertainty of a nearly flat prediction has up to 2.8 times the error, 1 % of it
NOISE_STEP = 512
# logits per block of positions: half a dozen such arrays fit into a CPU's L2 cache
LOGITS_AT_ONCE = {"cpu": 1 << 18}
# below this log p, probabilities are added as logarithms: the smallest normal fp32 number is e^-87,
# and a sum over the vocabulary needs a margin of ln(2 V)
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
    """The mean predictions and mean entropies of n draws, a batch of draws at a time.

    n_total: the number of draws in the mixture, for the weights. std = None: nothing is random.
    """
    if std is None:
        log_probs = likelihood.log_probs(mean)
        mean_entropy = entropy(log_probs) if entropies else None
        yield WeightedPrediction(log_probs, mean_entropy, n / n_total)
        return
    V = mean.size(-1)
    n_logits = LOGITS_AT_ONCE.get(mean.device.type, mean.numel())
    n_rows = max(1, n_logits // V)
    mean_blocks = mean.reshape(-1, V).split(n_rows)
    std_blocks = std.reshape(-1, V).split(n_rows)
    for start in range(0, n, DRAWS_AT_ONCE):
        n_draws = min(DRAWS_AT_ONCE, n - start)
        n_numbers = V + NOISE_STEP * ((n_draws - 1) // 2)
        numbers = torch.randn(n_numbers, device=mean.device, generator=generator)
        noise = numbers.unfold(0, V, NOISE_STEP)
        noise = torch.cat([noise, -noise])[:n_draws]
        log_probs, entropies_found = [], []
        for block in zip(mean_blocks, std_blocks, strict=True):
            log_mean, mean_entropy = _average(likelihood, *block, noise, entropies)
            log_probs.append(log_mean)
            entropies_found.append(mean_entropy)
        mean_entropy = torch.cat(entropies_found).view(mean.shape[:-1]) if entropies else None
        log_probs = torch.cat(log_probs).view_as(mean)
        yield WeightedPrediction(log_probs, mean_entropy, n_draws / n_total)


def _average(likelihood, mean, std, noise, entropies):
    """mean, std (N, V), noise (S, V) -> log mean p (N, V), mean entropy of the draws (N,)."""
    centred = likelihood.centred(mean) if len(noise) > 1 else None
    if centred is not None:
        # no logit moves by more than `reach`, nor does the normaliser
        reach = std.amax() * noise.abs().amax()
        if centred.amin() - 2 * reach > LOWEST_LOG_P:
            return _average_of_numbers(likelihood, centred, std, noise, entropies)

    def components():
        for eps in noise:
            logits = torch.addcmul(mean, std, eps)
            log_probs = likelihood.log_probs(logits)
            of_draw = entropy(log_probs) if entropies else None
            yield WeightedPrediction(log_probs, of_draw, 1 / len(noise))

    return mixture(components())


def _average_of_numbers(likelihood, centred, std, noise, entropies):
    """_average with one exp per logit, far above the smallest fp32 number."""
    sum_p = torch.zeros_like(centred)
    sum_entropies = torch.zeros_like(centred[:, :1])
    for eps in noise:
        logits = torch.addcmul(centred, std, eps)
        p, log_p = likelihood.unnormalised(logits)
        total = p.sum(-1, keepdim=True)
        sum_p.addcmul_(p, 1 / total)
        if entropies:
            cross = (p * log_p).sum(-1, keepdim=True) / total
            sum_entropies += total.log() - cross
    mean_entropy = sum_entropies.squeeze(-1) / len(noise) if entropies else None
    return (sum_p / len(noise)).log(), mean_entropy


def mixture(components: Iterable[WeightedPrediction]) -> tuple[Tensor, Tensor | None]:
    """The log-probabilities (..., V) of a mixture, and the weighted mean of the entropies (...)."""
    log_sum = None
    mean_entropy = None
    for log_probs, of_component, weight in components:
        if weight < 1:
            log_probs = log_probs + math.log(weight)
        log_sum = log_probs if log_sum is None else log_sum.logaddexp(log_probs)
        if of_component is not None:
            term = weight * of_component
            mean_entropy = term if mean_entropy is None else mean_entropy + term
    return log_sum, mean_entropy


def entropy(log_probs: Tensor) -> Tensor:
    """log_probs (..., V) -> (...), nats; a token of probability 0 adds nothing."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite).sum(-1)
