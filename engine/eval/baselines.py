"""What a head's uncertainty must beat, for every head: a temperature, and a distance.

The temperature (Guo et al. 2017) minimises the nll of a part of the validation split. The
Mahalanobis distance is that of a hidden state from those of the training text (Lee et al. 2018).
"""

from collections.abc import Callable
from functools import partial

import torch

from engine.data.tokens import TokenFile
from engine.eval.evaluation import Chunk, brier, score_tokens
from engine.eval.metrics import TEMPERED, Scores
from engine.runs.fit import moments
from heads import token_scores

N_PER_DIMENSION = 100  # of the training text, for the covariance of hidden states


class Baselines:
    """Scores tokens by the baselines too. temperature: None if there is no validation split."""

    def __init__(self, model, train: TokenFile, processes, cast, temperature: float | None):
        n_positions = N_PER_DIMENSION * model.config.n_embd
        mean, second_moment, _ = moments(model, train, processes, cast, n_positions)
        covariance = second_moment - mean.outer(mean)
        # a LayerNorm's output does not vary in one direction
        covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(len(mean))
        root = torch.linalg.cholesky(torch.linalg.inv(covariance))
        self.mean = mean.float().to(processes.device)
        self.root = root.float().to(processes.device)
        self.temperature = temperature

    def __call__(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """name -> (n,): see score_tokens."""
        values = score_tokens(chunk)
        hidden = chunk.hiddens[0].float()
        with torch.autocast(hidden.device.type, enabled=False):
            scaled = (hidden - self.mean) @ self.root
        values["mahalanobis"] = scaled.square().sum(-1)
        if self.temperature:
            log_p = (chunk.prediction.log_probs / self.temperature).log_softmax(-1)
            nll, confidence, _ = token_scores(log_p, chunk.targets)
            scores = {"nll": nll, "confidence": confidence, "brier": brier(log_p, nll)}
            values |= {name + TEMPERED: score for name, score in scores.items()}
        return values


def fit_temperature(evaluate_with: Callable[[Callable], Scores]) -> float:
    """The temperature with the lowest nll, by Newton's method; the nll is convex in 1 / T.

    evaluate_with(score): evaluates the validation text with this function of a Chunk.
    """
    inverse = 1.0
    for _ in range(20):
        scores = evaluate_with(partial(slopes, inverse=inverse))
        step = scores.mean("slope") / max(scores.mean("curvature"), 1e-12)
        inverse = max(inverse - step, inverse / 2)
        if abs(step) < 1e-4 * inverse:
            break
    return 1 / inverse


def slopes(chunk: Chunk, inverse: float) -> dict[str, torch.Tensor]:
    """The nll at the temperature 1 / inverse, and its derivatives by `inverse`."""
    log_p = chunk.prediction.log_probs.clamp(min=-1e4)  # 0 * -inf is not a number
    tempered = (inverse * log_p).log_softmax(-1)
    p = tempered.exp()
    mean = (p * log_p).sum(-1)
    return {
        "nll": token_scores(tempered, chunk.targets).nll,
        "slope": mean + token_scores(log_p, chunk.targets).nll,
        "curvature": (p * (log_p - mean.unsqueeze(-1)).square()).sum(-1),
    }
