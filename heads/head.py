"""Output heads. A head is two choices: what the output weights are, and what a logit means.

    weights       point: one matrix       bayes: a Gaussian over every entry, learned by variational inference
    likelihood    categorical: softmax    smooth: softmax on smoothed targets    sigmoid: a Bernoulli per token

Any pair works, and all answer the same two questions: `loss` (a scalar, minimised by training; its unit differs
between likelihoods) and `log_probs` (a normalised distribution over the next token, with the same meaning for all).
Shapes: x (B, T, C) hidden states, logits (B, T, V), targets (B, T). Soft labels are targets (B, T, K) with
label_weights (B, T, K), the share of each of the K ids; all other ids have none.

A further head is one class in weights.py or likelihoods.py, its options and one entry in WEIGHTS or LIKELIHOODS here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn

from engine.base.errors import UserError, check_ranges
from heads.draws import Part, entropy, in_parts, mixture
from heads.likelihoods import (
    Categorical,
    Sigmoid,
    SmoothCategorical,
    linear_fit,
    token_scores,
    weighted_sum,
)
from heads.linear_loss import LOGITS_BYTES_PRODUCT, linear_loss, plain_loss, rows_per_chunk
from heads.weights import BayesLinear, PointLinear, bayes_linear


@dataclass(frozen=True)
class HeadConfig:
    """The two choices and their options."""

    weights: str = "point"  # point | bayes
    likelihood: str = "categorical"  # categorical | smooth | sigmoid
    # the output weights (for bayes: their means) are the token embedding, as in GPT-2
    tie_head: bool = True
    # unigram | uniform | none | auto: sigmoid unigram (on a model without bias uniform), else none
    logit_bias: str = "auto"
    label_smoothing: float = 0.1  # smooth: probability spread over the V - 1 other tokens
    # sigmoid: weight of the true token's term; undone in predictions, which use z - ln pos_weight
    pos_weight: float = 1.0
    sum_penalty: float = 0.0  # sigmoid: weight of (sum_v sigmoid(z_v) - 1)^2, nats per token
    # bayes: row (a std per token, almost free) | full (per weight) | torchbnn (its own layer)
    posterior: str = "row"
    # bayes: bound (no sampling) | local (noise on each logit) | sample (a matrix per micro-batch)
    estimator: str = "bound"
    prior_mean: float = 0.0  # bayes: of the prior N(prior_mean, prior_std^2) of every weight
    # bayes: a number, or "empirical": fit to the posterior as that moves
    prior_std: float | str = "empirical"
    # bayes: 1 is the ELBO; less is a tempered ("cold") posterior, for data below 1e9 tokens
    kl_weight: float = 1.0
    # bayes: training tokens in the data set, the N of KL / N; train.py reads it from the data
    n_data: int = 0

    def __post_init__(self):
        choices = {
            "weights": WEIGHTS,
            "likelihood": LIKELIHOODS,
            "logit_bias": ("auto", "unigram", "uniform", "none"),
            "posterior": ("row", "full", "torchbnn"),
            "estimator": ("bound", "local", "sample"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} = {getattr(self, name)!r} is not one of: {', '.join(known)}"
                )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing = {self.label_smoothing} must lie in [0, 1)")
        if not 1e-6 <= self.pos_weight <= 1e6:
            raise UserError(f"pos_weight = {self.pos_weight} must be above 0, within 1e-6 .. 1e6")
        for name in ("sum_penalty", "kl_weight"):
            if not 0 <= getattr(self, name) <= 1e6:
                raise UserError(
                    f"{name} = {getattr(self, name)} must not be negative, nor above 1e6"
                )
        if self.prior_std != "empirical" and (
            isinstance(self.prior_std, str) or not 1e-6 <= self.prior_std <= 1e6
        ):
            raise UserError(
                f"prior_std = {self.prior_std!r} must be a number above 0 (1e-6 .. 1e6), or 'empirical'"
            )
        if not abs(self.prior_mean) <= 1e6:
            raise UserError(f"prior_mean = {self.prior_mean} must lie within -1e6 .. 1e6")
        check_ranges(self, {"n_data": (0, 10**15)})
        if self.posterior == "torchbnn" and self.estimator == "local":
            raise UserError(
                "posterior = 'torchbnn' draws whole matrices; estimator = 'local' needs --posterior=full"
            )


class Prediction(NamedTuple):
    """The next token at each position, and what is not known about it; nats."""

    log_probs: torch.Tensor  # (..., V), normalised
    total: torch.Tensor  # (...), entropy of the prediction
    epistemic: (
        torch.Tensor
    )  # (...), mutual information of token and weights: what the weights do not know

    @property
    def aleatoric(self) -> torch.Tensor:
        """(...), what the text leaves open: the entropy that is left when the weights are known."""
        return self.total - self.epistemic


WEIGHTS = {"point": PointLinear, "bayes": bayes_linear}
LIKELIHOODS = {"categorical": Categorical, "smooth": SmoothCategorical, "sigmoid": Sigmoid}
CACHED = {
    "cpu": 1 << 20
}  # bytes of log-probabilities that exist at a time in scores(): what a cache holds


class Head(nn.Module):
    """Output weights and a likelihood, with a bias per token where the options ask for one."""

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__()
        self.config = config
        self.weights = WEIGHTS[config.weights](config, vocab_size, n_embd)
        self.likelihood = LIKELIHOODS[config.likelihood](config, vocab_size)
        bias = self.likelihood.default_bias if config.logit_bias == "auto" else config.logit_bias
        uniform = self.likelihood.base_rate_logits(torch.full((vocab_size,), 1 / vocab_size))
        self.bias = nn.Parameter(uniform) if bias != "none" else None
        self.wants_unigram = bias == "unigram"
        # beta(t) of the ELBO, 0 .. 1 over the warm-up; set by the training loop
        self.register_buffer("kl_ramp", torch.ones(()), persistent=False)

    def init_from_frequencies(self, frequencies: torch.Tensor) -> None:
        """Start the bias and the posterior at the training text's token frequencies (V,), all above 0, of sum 1."""
        self.weights.init_from_frequencies(frequencies)
        if self.wants_unigram:
            with torch.no_grad():
                self.bias.copy_(self.likelihood.base_rate_logits(frequencies))

    @torch.no_grad()
    def convert_likelihood(
        self, old: HeadConfig, hidden: Callable[[], torch.Tensor]
    ) -> torch.Tensor | float:
        """Have weights and bias that come from a head with the options `old` predict here what they did there.

        A sigmoid's logits are log-probabilities, softmax's are so but for their log-normaliser. That is close to linear
        in x: fitted to hidden(), (n, C) states of the training text, it is taken off weights and bias. Returns what the
        weights (C,) of every token have lost, or 0.
        """
        theirs, ours = (
            LIKELIHOODS[old.likelihood](old, len(self.weights.weight)).logit_offset,
            self.likelihood.logit_offset,
        )
        if ours is None or theirs == ours:
            return 0.0
        if self.bias is None:
            raise UserError(
                "a sigmoid head on these weights needs a bias; leave logit_bias = 'none' out"
            )
        slope = 0.0
        if theirs is None:
            x = hidden()
            slope, theirs = linear_fit(
                x, torch.cat([self.logits(part).logsumexp(-1) for part in x.split(64)])
            )
        self.weights.weight -= slope
        self.bias -= theirs - ours
        return slope

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., V), under the mean of the weights."""
        logits = self.weights.logits(x)
        return logits if self.bias is None else logits + self.bias

    def loss(
        self, x: torch.Tensor, targets: torch.Tensor, label_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (B, T, C), targets (B, T), or (B, T, K) with label_weights (B, T, K) -> scalar, what training minimises:
        nats per token + kl_weight * KL / n_data."""
        data_loss, mean_square = self._data_loss(x, targets, label_weights)
        return data_loss + self.kl_loss(self.weights.kl(mean_square))

    def data_loss(
        self, x: torch.Tensor, targets: torch.Tensor, label_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The likelihood's part of the loss: E_q[nats per token], by the estimator that the options name."""
        return self._data_loss(x, targets, label_weights)[0]

    def _data_loss(self, x, targets, label_weights) -> tuple[torch.Tensor, torch.Tensor | None]:
        """And, where it is at hand then, the mean square of the weights that their KL takes."""
        if label_weights is None:
            targets = targets.unsqueeze(-1)
        if self.weights.samples_logits:
            logits = self.weights.noisy_logits(x).float()
            logits = logits if self.bias is None else logits + self.bias
            return plain_loss(self.likelihood, logits, targets, label_weights).mean(), None
        weight, added, shift = self.weights.loss_terms(x)
        center = None if shift is None else self.config.prior_mean
        loss, mean_square = linear_loss(
            self.likelihood, x, weight, self.bias, added, targets, label_weights, center=center
        )
        if shift is None:
            return loss, None
        # raised in the normaliser alone, not at the labels, logits make the loss Jensen's upper bound of its mean
        raised = weighted_sum(shift.of(targets), label_weights)
        of_shift = (
            self.likelihood.label_coefficient * raised
            + self.likelihood.mean_coefficient * shift.mean()
        )
        return loss + of_shift.mean(), mean_square

    def scores(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """x (B, T, C), targets (B, T) -> (3, B * T), see token_scores; under the mean weights."""
        n, n_cached = (
            rows_per_chunk(budget, x, len(self.weights.weight))
            for budget in (LOGITS_BYTES_PRODUCT, CACHED)
        )
        found = []  # a product is fast with many rows, what follows with few
        for piece, of_piece in zip(
            x.flatten(0, 1).split(n), targets.flatten().split(n), strict=True
        ):
            blocks = zip(self.logits(piece).split(n_cached), of_piece.split(n_cached), strict=True)
            found += [
                token_scores(self.likelihood.log_probs(logits), ids) for logits, ids in blocks
            ]
        return torch.cat(found, dim=1)

    def kl_loss(self, kl: torch.Tensor | float) -> torch.Tensor:
        """The prior's part, nats per token: kl_weight * kl_ramp * KL / n_data, of a KL in nats."""
        return self.kl_ramp * kl * (self.config.kl_weight / max(1, self.config.n_data))

    def log_probs(
        self, x: torch.Tensor | Sequence[torch.Tensor], n_samples: int = 0
    ) -> torch.Tensor:
        """x (..., C) -> log p(next token) (..., V), normalised over V, fp32.

        n_samples = 0 uses the mean weights; S > 0 averages the probabilities of S draws of the logits; -1 averages
        over all of them without sampling (an approximation: see Categorical.average). x may be a sequence of hidden
        states, one for each draw. All positions share the noise of a draw: see heads/draws.py.
        """
        xs = [x] if isinstance(x, torch.Tensor) else x
        return (
            self._sampled(xs, n_samples, False)[0]
            if n_samples > 0
            else self._without_draws(xs[0], n_samples)[0]
        )

    def predict(self, x: torch.Tensor | Sequence[torch.Tensor], n_samples: int = 0) -> Prediction:
        """log_probs(x, n_samples) with its uncertainty.

        With draws, epistemic is the mutual information of the next token and the weights, H[mean p] - mean H[p].
        Without, it is that to second order, 1/2 sum_v var(z_v) E_y[(d log p_y / d z_v)^2], of the output weights alone:
        good while the logits' standard deviations stay below 1. For point weights it is 0. The mean weights' total
        (n_samples = 0) lacks what averaging over weights adds, so aleatoric is as much too low; -1 has it.
        """
        xs = [x] if isinstance(x, torch.Tensor) else x
        if n_samples > 0:
            log_probs, aleatoric = self._sampled(xs, n_samples, True)
            total = entropy(log_probs)
            return Prediction(log_probs, total, total - aleatoric)
        log_probs, logits = self._without_draws(xs[0], n_samples)
        total = entropy(log_probs)
        if not isinstance(self.weights, BayesLinear):
            return Prediction(log_probs, total, torch.zeros_like(total))
        probs = log_probs.exp() if n_samples == 0 else self.likelihood.log_probs(logits).exp()
        fisher = self.likelihood.fisher_diagonal(logits, probs)
        return Prediction(log_probs, total, self.weights.weighted_variance(xs[0], fisher) / 2)

    def _without_draws(self, x: torch.Tensor, n_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction of the mean weights (0) or the sampling-free average (-1), and the logits' mean (..., V)."""
        logits, variance = (
            self.logits(x).float(),
            self.weights.variance(x) if n_samples < 0 else None,
        )
        if variance is None:
            return self.likelihood.log_probs(logits), logits
        return self.likelihood.average(logits, variance), logits

    def _sampled(
        self, xs: Sequence[torch.Tensor], n_samples: int, entropies: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """log of the mean p (..., V) under n_samples draws of the logits, and the draws' mean entropy (...)."""

        def parts() -> Iterator[Part]:
            for i, x in enumerate(xs[:n_samples]):
                n = (
                    1 if i < len(xs) - 1 else n_samples - i
                )  # the last hidden states serve all draws that are left
                logits, variance = self.logits(x).float(), self.weights.variance(x)
                std = None if variance is None else variance.sqrt()
                for log_probs, of_draws, n_drawn in in_parts(
                    self.likelihood, logits, std, n, entropies
                ):
                    yield log_probs, of_draws, n_drawn / n_samples

        return mixture(parts())
