"""Output heads. A head is two choices: what the output weights are, and what a logit means.

    weights       point: one matrix
                  bayes: a Gaussian over every entry, learned by variational inference
    likelihood    categorical: softmax
                  smooth: softmax on smoothed targets
                  sigmoid: a Bernoulli per token

Any pair works, and all have the same two methods. Training minimises `loss`, a scalar whose unit
differs between likelihoods. `log_probs` is a normalised distribution over the next token, which
means the same for all. Shapes: x (B, T, C) hidden states, logits (B, T, V), targets (B, T). Soft
labels are targets (B, T, K) with label_weights (B, T, K).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from engine.base.errors import UserError
from heads.config import HeadConfig
from heads.draws import draw_batches, entropy, mixture
from heads.likelihoods import LIKELIHOODS, linear_fit
from heads.linear_loss import LOGITS_BYTES_PRODUCT, linear_loss, plain_loss, rows_per_chunk
from heads.weights import WEIGHTS, BayesLinear

# bytes of log-probabilities per block in scores(): what a CPU's cache holds
LOG_PROBS_BYTES = {"cpu": 1 << 20}
N_DEFAULT_DRAWS = 256  # used if a likelihood has no formula for an average


class Prediction(NamedTuple):
    """A distribution over the next token at each position, and its uncertainty in nats."""

    log_probs: Tensor  # (..., V), normalised
    total: Tensor  # (...), entropy of the prediction
    epistemic: Tensor  # (...), mutual information of token and weights

    @property
    def aleatoric(self) -> Tensor:
        """(...), the entropy that would remain if the weights were known."""
        return self.total - self.epistemic


class TokenScores(NamedTuple):
    """Scores of a prediction for the true token, (...) each."""

    nll: Tensor  # nats
    confidence: Tensor  # probability of the likeliest token
    correct: Tensor  # whether that is the true token


def token_scores(log_probs: Tensor, targets: Tensor) -> TokenScores:
    """log p (..., V), targets (...) -> the scores of the true tokens."""
    log_p = log_probs.gather(-1, targets.unsqueeze(-1))
    top, likeliest = log_probs.max(-1)
    return TokenScores(
        nll=-log_p.squeeze(-1),
        confidence=top.exp(),
        correct=likeliest == targets,
    )


class Head(nn.Module):
    """Output weights and a likelihood, with a bias per token if the options ask for one."""

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__()
        self.config = config
        self.weights = WEIGHTS[config.weights](config, vocab_size, n_embd)
        self.likelihood = LIKELIHOODS[config.likelihood](config, vocab_size)
        uses_bound = config.weights == "bayes" and config.estimator == "bound"
        if uses_bound and not self.likelihood.linear_in_logits:
            raise UserError(
                f"likelihood = {config.likelihood!r} has no Jensen bound (linear_in_logits is "
                "False); use --estimator=local"
            )
        start = config.logit_bias
        if start == "auto":
            start = self.likelihood.default_bias
        self.starts_unigram = start == "unigram"
        uniform = torch.full((vocab_size,), 1 / vocab_size)
        bias = self.likelihood.base_rate_logits(uniform)
        if bias is None and self.starts_unigram:
            raise UserError(
                f"likelihood = {config.likelihood!r} has no formula for logit_bias = 'unigram'; "
                "use --logit_bias=uniform or none"
            )
        if bias is None:
            bias = torch.zeros(vocab_size)
        self.bias = None if start == "none" else nn.Parameter(bias)
        # weight of the KL, from 0 to 1 during the warm-up; the training loop sets it
        self.register_buffer("kl_ramp", torch.ones(()), persistent=False)

    def init_from_frequencies(self, frequencies: Tensor) -> None:
        """Initialise the bias and the posterior from token frequencies (V,), all above 0."""
        self.weights.init_from_frequencies(frequencies)
        if self.starts_unigram:
            with torch.no_grad():
                self.bias.copy_(self.likelihood.base_rate_logits(frequencies))

    @torch.no_grad()
    def convert_likelihood(self, old: HeadConfig, hidden: Callable[[], Tensor]) -> Tensor | float:
        """Convert weights from a head trained with `old`'s likelihood to make the same predictions.

        A sigmoid's logits are log-probabilities, if these are small. So are a softmax's logits
        minus their log-normaliser, which is close to linear in x. A linear function of x is fitted
        to it on hidden(), (n, C) states of the training text, and subtracted from weights and bias.
        Returns the vector (C,) that was subtracted from every token's weights, or 0.
        """
        ours = self.likelihood
        vocab_size = len(self.weights.weight)
        theirs = LIKELIHOODS[old.likelihood](old, vocab_size)
        same_class = type(theirs) is type(ours)
        if same_class and vars(theirs) == vars(ours):
            return 0.0
        for likelihood in (theirs, ours):
            if not likelihood.is_softmax and likelihood.logit_offset is None:
                raise UserError(
                    f"weights of likelihood = {old.likelihood!r} cannot be converted to "
                    f"{self.config.likelihood!r}: no formula relates their logits"
                )
        if ours.is_softmax or theirs.logit_offset == ours.logit_offset:
            return 0.0  # a softmax of log-probabilities returns them unchanged
        if self.bias is None:
            raise UserError(
                "a sigmoid head needs a bias to convert these weights; omit --logit_bias=none"
            )
        slope = 0.0
        offset = theirs.logit_offset
        if theirs.is_softmax:
            x = hidden()
            log_normalisers = [self.logits(part).logsumexp(-1) for part in x.split(64)]
            slope, offset = linear_fit(x, torch.cat(log_normalisers))
        self.weights.weight -= slope
        self.bias -= offset - ours.logit_offset
        return slope

    def logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., V), under the mean weights."""
        logits = self.weights.logits(x)
        return logits if self.bias is None else logits + self.bias

    def loss(self, x: Tensor, targets: Tensor, label_weights: Tensor | None = None) -> Tensor:
        """The loss of training, a scalar: nats per token + kl_weight * KL / n_data."""
        data_loss = self.data_loss(x, targets, label_weights)
        return data_loss + self.kl_loss(self.weights.kl())

    def data_loss(self, x: Tensor, targets: Tensor, label_weights: Tensor | None = None) -> Tensor:
        """The likelihood's term of the loss, in nats per token: E_q[loss] by the estimator."""
        if label_weights is None:
            targets = targets.unsqueeze(-1)
        if self.weights.samples_logits:
            logits = self.weights.noisy_logits(x).float()
            if self.bias is not None:
                logits = logits + self.bias
            losses = plain_loss(self.likelihood, logits, targets, label_weights)
            return losses.mean()
        x, weight, shift = self.weights.loss_terms(x)
        loss = linear_loss(self.likelihood, x, weight, self.bias, shift, targets, label_weights)
        coefficient = self.likelihood.mean_coefficient
        if shift is not None and coefficient:
            # a linear term needs no bound: undo the shift in -mean_coefficient * mean logit
            loss = loss + coefficient * shift.mean().mean()
        return loss

    def kl_loss(self, kl: Tensor | float) -> Tensor:
        """The KL term of the loss, nats per token: kl_ramp * kl_weight * KL / n_data."""
        n_data = max(1, self.config.n_data)
        weight = self.config.kl_weight / n_data
        return self.kl_ramp * kl * weight

    def scores(self, x: Tensor, targets: Tensor) -> TokenScores:
        """x (B, T, C), targets (B, T) -> scores (B * T,) each, under the mean weights."""
        vocab_size = len(self.weights.weight)
        # a matrix product is fast with many rows, functions of the logits with few
        n_product = rows_per_chunk(LOGITS_BYTES_PRODUCT, x.device, vocab_size, x.dtype)
        n_cached = rows_per_chunk(LOG_PROBS_BYTES, x.device, vocab_size, x.dtype)
        found = []
        x_chunks = x.flatten(0, 1).split(n_product)
        target_chunks = targets.flatten().split(n_product)
        for chunk, chunk_ids in zip(x_chunks, target_chunks, strict=True):
            logits_blocks = self.logits(chunk).split(n_cached)
            target_blocks = chunk_ids.split(n_cached)
            for logits, ids in zip(logits_blocks, target_blocks, strict=True):
                log_probs = self.likelihood.log_probs(logits)
                found.append(token_scores(log_probs, ids))
        columns = zip(*found, strict=True)
        return TokenScores(*map(torch.cat, columns))

    def log_probs(self, x: Tensor | Sequence[Tensor], n_samples: int = 0) -> Tensor:
        """x (..., C) -> log p(next token) (..., V), normalised over V, fp32.

        n_samples = 0 uses the mean weights. S > 0 averages the probabilities of S draws of the
        logits; all positions share the noise of a draw (heads/draws.py). -1 averages over all
        draws without sampling: an approximation, see Categorical.average. x may be a sequence of
        hidden states, one for each draw.
        """
        xs = [x] if isinstance(x, Tensor) else x
        if n_samples > 0:
            log_probs, _ = self._from_draws(xs, n_samples, entropies=False)
        else:
            log_probs, _ = self._without_draws(xs[0], n_samples)
        return log_probs

    def predict(self, x: Tensor | Sequence[Tensor], n_samples: int = 0) -> Prediction:
        """log_probs(x, n_samples) and its uncertainty.

        With draws, epistemic is the mutual information of the next token and the weights,
        H[mean p] - mean H[p]. Without draws, it is the second-order approximation of that, for the
        output weights alone: 1/2 sum_v var(z_v) E_y[(d log p_y / d z_v)^2]. It is good while the
        logits' standard deviations are below 1. With n_samples = 0, total and aleatoric leave out
        what averaging over the weights adds; -1 includes it.
        """
        xs = [x] if isinstance(x, Tensor) else x
        if n_samples > 0:
            log_probs, aleatoric = self._from_draws(xs, n_samples, entropies=True)
            total = entropy(log_probs)
            return Prediction(log_probs, total, total - aleatoric)
        log_probs, logits = self._without_draws(xs[0], n_samples)
        total = entropy(log_probs)
        if not isinstance(self.weights, BayesLinear):
            return Prediction(log_probs, total, torch.zeros_like(total))
        of_mean = log_probs
        if n_samples != 0:
            of_mean = self.likelihood.log_probs(logits)
        fisher = self.likelihood.fisher_diagonal(logits, of_mean.exp())
        if fisher is None:
            average, aleatoric = self._from_default_draws(xs[0], entropies=True)
            epistemic = entropy(average) - aleatoric
        else:
            weighted_variance = self.weights.weighted_variance(xs[0], fisher)
            epistemic = weighted_variance / 2
        return Prediction(log_probs, total, epistemic)

    def _without_draws(self, x, n_samples):
        """The prediction of the mean weights (0) or the average over draws (-1); mean logits."""
        logits = self.logits(x).float()
        variance = None
        if n_samples < 0:
            variance = self.weights.variance(x)
        if variance is None:
            return self.likelihood.log_probs(logits), logits
        average = self.likelihood.average(logits, variance)
        if average is None:
            average, _ = self._from_default_draws(x, entropies=False)
        return average, logits

    def _from_default_draws(self, x, entropies):
        """Draws in place of a formula, the same ones in each call."""
        generator = torch.Generator(x.device).manual_seed(0)
        return self._from_draws([x], N_DEFAULT_DRAWS, entropies, generator)

    def _from_draws(
        self,
        xs,
        n_samples,
        entropies,
        generator=None,
    ):
        """log of the mean p (..., V) of n_samples draws, and their mean entropy (...)."""

        def components():
            for i, x in enumerate(xs[:n_samples]):
                # the last hidden states serve all remaining draws
                is_last = i == len(xs) - 1
                n = n_samples - i if is_last else 1
                logits = self.logits(x).float()
                variance = self.weights.variance(x)
                std = None if variance is None else variance.sqrt()
                yield from draw_batches(
                    self.likelihood,
                    logits,
                    std,
                    n,
                    n_samples,
                    entropies,
                    generator,
                )

        return mixture(components())
