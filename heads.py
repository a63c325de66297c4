"""Output heads. A head is two choices: what the output weights are, and what a logit means.

    weights       point: one matrix       bayes: a Gaussian over every entry, learned by variational inference
    likelihood    categorical: softmax    smooth: softmax on smoothed targets    sigmoid: a Bernoulli per token

Any pair works, and all answer the same two questions: `loss` (a scalar, minimised by training; its unit differs
between likelihoods) and `log_probs` (a normalised distribution over the next token, with the same meaning for all).
Shapes: x (B, T, C) hidden states, weight (V, C), logits (B, T, V), targets (B, T).

A further head is one class here and one entry in WEIGHTS or LIKELIHOODS.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from engine.errors import UserError


@dataclass(frozen=True)
class HeadConfig:
    """The two choices and their options."""

    weights: str = "point"  # point | bayes
    likelihood: str = "categorical"  # categorical | smooth | sigmoid
    tie_head: bool = True  # the output weights (for bayes: their means) are the token embedding, as in GPT-2
    logit_bias: str = (
        "auto"  # unigram (start at token frequencies) | uniform | none | auto: unigram for sigmoid, else none
    )
    label_smoothing: float = 0.1  # smooth: probability spread over the V - 1 other tokens
    pos_weight: float = (
        1.0  # sigmoid: weight of the true token's term; undone in predictions, which use z - ln pos_weight
    )
    sum_penalty: float = 0.0  # sigmoid: weight of (sum_v sigmoid(z_v) - 1)^2, nats per token
    posterior: str = "row"  # bayes: row (a std for each token, almost free) | full (a std for each weight)
    estimator: str = (
        "bound"  # bayes: bound (no sampling) | local (noise on each logit) | sample (a matrix per micro-batch)
    )
    prior_std: float | str = "empirical"  # bayes: of the prior N(0, prior_std^2); "empirical" fits it to the posterior
    kl_weight: float = (
        1.0  # bayes: 1 is the ELBO; less is a tempered ("cold") posterior, as data below 1e9 tokens wants
    )
    n_data: int = 0  # bayes: training tokens in the data set, the N of KL / N; train.py reads it from the data

    def __post_init__(self):
        choices = {
            "weights": WEIGHTS,
            "likelihood": LIKELIHOODS,
            "logit_bias": ("auto", "unigram", "uniform", "none"),
            "posterior": ("row", "full"),
            "estimator": ("bound", "local", "sample"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r} is not one of: {', '.join(known)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing = {self.label_smoothing} must lie in [0, 1)")
        if not 0 < self.pos_weight < math.inf:
            raise UserError(f"pos_weight = {self.pos_weight} must be above 0")
        if not self.sum_penalty >= 0:
            raise UserError(f"sum_penalty = {self.sum_penalty} must not be negative")
        if not (self.prior_std == "empirical" or (not isinstance(self.prior_std, str) and self.prior_std > 0)):
            raise UserError(f"prior_std = {self.prior_std!r} must be a number above 0, or 'empirical'")
        if not self.kl_weight >= 0:
            raise UserError(f"kl_weight = {self.kl_weight} must not be negative")


class Shift(NamedTuple):
    """How far logits lie above their mean, x . weight_v, kept as its factors: no (..., V) tensor of it exists."""

    x: torch.Tensor  # (..., K)
    weight: torch.Tensor  # (V, K)

    def of(self, targets: torch.Tensor) -> torch.Tensor:
        """targets (...) -> the shift of their logits (...)."""
        return (self.x * self.weight[targets]).sum(-1)

    def mean(self) -> torch.Tensor:
        """Averaged over all V, (...)."""
        return self.x @ self.weight.mean(0)


def padded_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., C), weight (V, C) -> (..., V).

    On CUDA V is padded to a multiple of 64, which the tensor cores want, and the padding cut off again: no padded row
    ever gets probability, and no other code knows of them.
    """
    vocab_size, padding = len(weight), -len(weight) % 64
    if not (x.is_cuda and padding):
        return F.linear(x, weight)
    return F.linear(x, F.pad(weight, (0, 0, 0, padding)))[..., :vocab_size]


class PointLinear(nn.Module):
    """One weight matrix (V, C); also the interface of all output weights."""

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd).normal_(std=0.02))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., V), the mean of the logits."""
        return padded_linear(x, self.weight)

    def variance(self, x: torch.Tensor) -> torch.Tensor | None:
        """x (..., C) -> (..., V), the variance of the logits (independent given x); None for a point."""
        return None

    def weighted_variance(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """x (..., C), shares (..., V) -> sum_v shares_v variance_v, (...); 0 for a point."""
        return torch.zeros(x.shape[:-1], device=x.device)

    def for_loss(self, x: torch.Tensor) -> tuple[torch.Tensor, Shift | None]:
        """x (..., C) -> the logits (..., V) to take the loss of, and how far they are shifted from their mean."""
        return self.logits(x), None

    def kl(self) -> torch.Tensor | float:
        """KL(posterior || prior) in nats, of all weights together."""
        return 0.0

    def start_from(self, frequencies: torch.Tensor) -> None:
        """Initialise what depends on the token frequencies (V,), which sum to 1."""


class BayesLinear(PointLinear):
    """A factorised Gaussian posterior N(weight, std^2) under a prior N(0, prior_std^2) (Blundell et al. 2015).

    Since the head is linear, the logits of a position are independent Gaussians: logit v has mean x . weight_v and
    variance sum_c std_vc^2 x_c^2. log_std is (V, C) for a full posterior, (V, 1) where a token's weights share theirs.
    """

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__(config, vocab_size, n_embd)
        if config.n_data < 1:
            raise UserError("Bayesian weights need n_data, the number of training tokens")
        self.config = config
        self.log_std = nn.Parameter(torch.empty(vocab_size, n_embd if config.posterior == "full" else 1))
        self.start_from(torch.full((vocab_size,), 1 / vocab_size))

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        squares, variances = self._factors(x)
        return squares * variances.squeeze(1) if variances.size(1) == 1 else F.linear(squares, variances)

    def weighted_variance(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        squares, variances = self._factors(x)
        return (squares * (shares @ variances)).sum(-1)

    def for_loss(self, x: torch.Tensor) -> tuple[torch.Tensor, Shift | None]:
        """bound: no noise, logits shifted by half their variance. local: noise on every logit (Kingma et al. 2015).
        sample: one draw of the whole matrix (Bayes by Backprop); as a sum, since bf16 weights would swallow the noise.
        """
        if self.config.estimator == "bound":
            squares, variances = self._factors(x)
            shift = Shift(squares / 2, variances)
            # further columns of one product cost less than a (..., V) tensor of shifts
            return padded_linear(torch.cat([x, shift.x], -1), torch.cat([self.weight, shift.weight], 1)), shift
        if self.config.estimator == "local":
            noise = self.variance(x).sqrt() * torch.randn(*x.shape[:-1], len(self.weight), device=x.device)
        else:
            noise = F.linear(x, torch.exp(self.log_std) * torch.randn_like(self.weight))
        return self.logits(x) + noise, None

    def second_moment(self) -> torch.Tensor:
        """E_q[w^2], averaged over all weights."""
        return self.weight.square().mean() + torch.exp(2 * self.log_std).mean()

    def kl(self) -> torch.Tensor:
        """1/2 sum [E_q[w^2] / prior_variance - 1 - ln(std^2 / prior_variance)], a scalar in nats.

        An empirical prior has the variance that minimises this, the second moment itself.
        """
        second_moment, n = self.second_moment(), self.weight.numel()
        log_variance = 2 * self.log_std.mean()
        if self.config.prior_std == "empirical":
            return 0.5 * n * (second_moment.log() - log_variance)
        prior_variance = self.config.prior_std**2
        return 0.5 * n * (second_moment / prior_variance - 1 - log_variance + math.log(prior_variance))

    @torch.no_grad()
    def start_from(self, frequencies: torch.Tensor) -> None:
        """Laplace's guess at std^2, 1 / (1 / prior_variance + N f_v E|x_c|^2 / kl_weight), where E|x_c|^2 = 1 behind
        the last norm: tokens that the data determines start narrow, rare ones near the prior."""
        empirical = self.config.prior_std == "empirical"
        prior_variance = self.weight.square().mean() if empirical else self.config.prior_std**2
        data_precision = self.config.n_data * frequencies / max(self.config.kl_weight, 1e-6)
        precision = 1 / prior_variance + data_precision.to(self.log_std)
        self.log_std.copy_(-0.5 * precision.log().unsqueeze(1).expand_as(self.log_std))

    def _factors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squares of x (..., K) and variances (V, K), fp32, whose product is the variance of the logits.

        K = C, or 1 where the weights of a token share a std: then the mean square, since the sum overflows float16.
        """
        squares, variances, n_embd = x.float().square(), torch.exp(2 * self.log_std), self.weight.size(1)
        return (
            (squares, variances) if self.log_std.size(1) > 1 else (squares.mean(-1, keepdim=True), n_embd * variances)
        )


class Categorical:
    """Softmax: loss = logsumexp(z) - z_y, in nats per token."""

    default_bias = "none"
    epsilon = 0.0  # probability that the target spreads evenly over all V tokens

    def __init__(self, config: HeadConfig, vocab_size: int):
        pass

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, shift: Shift | None) -> torch.Tensor:
        """logits (..., V), targets (...) -> scalar mean.

        shift: the logits stand above their mean by half their variance. Kept in the normaliser and taken off the
        target, that makes the loss Jensen's upper bound of its expectation over Gaussian logits. (Gather from the
        shifted logits and take the shift off behind: torch.compile 2.13 gives wrong gradients for unshifted ones.)
        """
        loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), label_smoothing=self.epsilon)
        if shift is not None:
            loss = loss + ((1 - self.epsilon) * shift.of(targets) + self.epsilon * shift.mean()).mean()
        return loss

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (..., V) -> log p (..., V), normalised, in fp32."""
        return F.log_softmax(logits.float(), dim=-1)

    def base_rate_logits(self, frequencies: torch.Tensor) -> torch.Tensor:
        """The logits that predict these frequencies (V,)."""
        return frequencies.log()

    def fisher_diagonal(self, logits: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """E_y[(d log p_y / d z_v)^2], (..., V): how much the prediction depends on each logit."""
        return probs * (1 - probs)


class SmoothCategorical(Categorical):
    """Softmax trained on 1 - label_smoothing for the true token and label_smoothing / (V - 1) for each other one.

    PyTorch spreads its label_smoothing over all V tokens, the true one too, hence the factor V / (V - 1).
    """

    def __init__(self, config: HeadConfig, vocab_size: int):
        self.epsilon = config.label_smoothing * vocab_size / (vocab_size - 1)
        if self.epsilon > 1:
            raise UserError(f"label_smoothing = {config.label_smoothing} leaves the true token less than a random one")


class Sigmoid:
    """A Bernoulli per token: loss = sum_v softplus(z_v) - z_y, summed over the vocabulary (a mean would starve Adam).

    The loss is a proper score: at the optimum sigmoid(z_v) = p(v | x), and the V of them sum to 1 by themselves.
    """

    default_bias = "unigram"  # without it, training first spends its steps on pushing V logits down

    def __init__(self, config: HeadConfig, vocab_size: int):
        self.pos_weight, self.sum_penalty = config.pos_weight, config.sum_penalty

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, shift: Shift | None) -> torch.Tensor:
        """logits (..., V), targets (...) -> scalar mean. shift: as in Categorical.loss.

        pos_weight w multiplies the true token's softplus(-z_y), and so the odds at the optimum by w.
        """
        logits, shift_of_target = logits.float(), 0.0 if shift is None else shift.of(targets)
        of_target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - shift_of_target
        loss = (F.softplus(logits).sum(-1) - of_target).mean()
        if self.pos_weight != 1:
            loss = loss + (self.pos_weight - 1) * F.softplus(shift_of_target - of_target).mean()
        if self.sum_penalty:
            loss = loss + self.sum_penalty * (torch.sigmoid(logits).sum(-1) - 1).square().mean()
        return loss

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (..., V) -> log p (..., V), fp32: the sigmoids, normalised (a softmax would normalise their odds)."""
        return F.log_softmax(F.logsigmoid(self._unweighted(logits)), dim=-1)

    def base_rate_logits(self, frequencies: torch.Tensor) -> torch.Tensor:
        return torch.logit(frequencies) + math.log(self.pos_weight)

    def fisher_diagonal(self, logits: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        return probs * (1 - probs) * torch.sigmoid(-self._unweighted(logits)).square()

    def log_sum_sigma(self, logits: torch.Tensor) -> torch.Tensor:
        """ln sum_v sigmoid(z_v), (...), of the logits without pos_weight: 0 where the model is normalised by itself."""
        return F.logsigmoid(self._unweighted(logits)).logsumexp(-1)

    def _unweighted(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float() - math.log(self.pos_weight)


WEIGHTS = {"point": PointLinear, "bayes": BayesLinear}
LIKELIHOODS = {"categorical": Categorical, "smooth": SmoothCategorical, "sigmoid": Sigmoid}


class Head(nn.Module):
    """Output weights and a likelihood, with a bias per token where the options ask for one."""

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__()
        self.config = config
        self.weights = WEIGHTS[config.weights](config, vocab_size, n_embd)
        self.likelihood = LIKELIHOODS[config.likelihood](config, vocab_size)
        bias = self.likelihood.default_bias if config.logit_bias == "auto" else config.logit_bias
        uniform = torch.full((vocab_size,), -math.log(vocab_size - 1))
        self.bias = nn.Parameter(uniform) if bias != "none" else None
        self.wants_unigram = bias == "unigram"
        # beta(t) of the ELBO, 0 .. 1 over the warm-up; set by the training loop
        self.register_buffer("kl_ramp", torch.ones(()), persistent=False)

    def start_from(self, frequencies: torch.Tensor) -> None:
        """Start the bias and the posterior at the training text's token frequencies (V,), all above 0, of sum 1."""
        self.weights.start_from(frequencies)
        if self.wants_unigram:
            with torch.no_grad():
                self.bias.copy_(self.likelihood.base_rate_logits(frequencies))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., V), under the mean of the weights."""
        logits = self.weights.logits(x)
        return logits if self.bias is None else logits + self.bias

    def loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """x (B, T, C), targets (B, T) -> scalar, what training minimises: nats per token + kl_weight * KL / n_data."""
        return self.data_loss(x, targets) + self.kl_loss()

    def data_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The likelihood's part of the loss: E_q[nats per token], by the estimator that the options name."""
        logits, shift = self.weights.for_loss(x)
        return self.likelihood.loss(logits if self.bias is None else logits + self.bias, targets, shift)

    def kl_loss(self) -> torch.Tensor:
        """The prior's part: kl_weight * kl_ramp * KL / n_data, nats per token; 0 for point weights."""
        return self.kl_ramp * self.weights.kl() * (self.config.kl_weight / max(1, self.config.n_data))

    def log_probs(self, x: torch.Tensor, n_samples: int = 0) -> torch.Tensor:
        """x (..., C) -> log p(next token) (..., V), normalised over V, fp32.

        n_samples = 0 uses the mean weights; S > 0 averages the probabilities of S draws of the logits.
        """
        logits, variance = self.logits(x).float(), self.weights.variance(x)
        if variance is None or n_samples == 0:
            return self.likelihood.log_probs(logits)
        std, total = variance.sqrt(), torch.full_like(logits, -math.inf)
        for _ in range(n_samples):
            draw = self.likelihood.log_probs(logits + std * torch.randn_like(logits))
            total = torch.logaddexp(total, draw)
        return total - math.log(n_samples)

    def uncertainty(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (..., C) -> total and epistemic uncertainty of the next token, both (...), in nats; no sampling.

        Total is the entropy of the prediction. Epistemic is the mutual information of the next token and the weights,
        to second order: 1/2 sum_v var(z_v) E_y[(d log p_y / d z_v)^2]; for point weights it is 0.
        """
        logits = self.logits(x)
        log_probs = self.likelihood.log_probs(logits)
        probs = log_probs.exp()
        information = self.weights.weighted_variance(x, self.likelihood.fisher_diagonal(logits, probs)) / 2
        return -(probs * log_probs).sum(-1), information
