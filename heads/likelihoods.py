"""What a logit means: likelihoods over logits (..., V), each with its loss, its prediction and what they depend on.

A likelihood has no parameters; its options are those of heads.HeadConfig. Its loss, in nats per token, has two parts:

    loss = normaliser(all logits) + of_labels(the labels' logits)         labels: 1 for each id, or their label_weights

heads/linear_loss.py differentiates them and never builds all logits. The loss must be linear in the logits wherever a
Bayesian head's bound wants their mean: it takes off
`label_coefficient` times each label's logit, `mean_coefficient` times the mean one.
"""

import math
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.base.errors import UserError
from heads.linear_loss import to_float32

if TYPE_CHECKING:
    from heads import HeadConfig

KEPT_OF_FLOOR = 0.01  # see SmoothCategorical.desmoothed


class Categorical:
    """Softmax: loss = logsumexp(z) - z_y, in nats per token."""

    default_bias = "none"
    label_coefficient, mean_coefficient = 1.0, 0.0
    # by how much a logit stands above log p: any amount, if it is the same for all logits of a
    # position
    logit_offset = None

    def __init__(self, config: "HeadConfig", vocab_size: int):
        pass

    def normaliser(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> (...)."""
        normaliser = logits.logsumexp(-1)
        return (
            normaliser - self.mean_coefficient * logits.mean(-1)
            if self.mean_coefficient
            else normaliser
        )

    def of_labels(self, logits: Tensor, label_weights: Tensor | None) -> Tensor:
        """logits (..., K) of the labels, label_weights (..., K) of sum 1 -> (...)."""
        return -self.label_coefficient * weighted_sum(logits, label_weights)

    def log_probs(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> log p (..., V), normalised, fp32."""
        return F.log_softmax(to_float32(logits), dim=-1)

    def centred(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> those that predict the same and that `unnormalised` takes, fp32."""
        return self.log_probs(logits)

    def unnormalised(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """centred logits (..., V) -> p and log p but for their normaliser, (..., V)."""
        return centred.exp(), centred

    def average(self, logits: Tensor, variance: Tensor) -> Tensor:
        """Gaussian logits, mean and variance (..., V) -> log E[p] (..., V), fp32, without sampling.

        p_v = sigmoid(z_v - ln R_v), R_v the sum of the other tokens' exp(z): so many terms that it hardly varies, and
        its expectation takes its place. What is left is an integral over one logit. Good while the standard deviations
        stay below 1; far above, single terms rule R_v, and only draws tell.
        """
        own = logits.float() + variance / 2  # ln E[exp(z_v)]
        log_all = own.logsumexp(-1, keepdim=True)
        log_others = log_all + torch.log1p(-torch.exp((own - log_all).clamp(max=-1e-6)))
        return F.log_softmax(
            expected_log_sigmoid(logits.float() - log_others, variance.sqrt()), dim=-1
        )

    def base_rate_logits(self, frequencies: Tensor) -> Tensor:
        """The logits that predict these frequencies (V,)."""
        return frequencies.log()

    def fisher_diagonal(self, logits: Tensor, probs: Tensor) -> Tensor:
        """E_y[(d log p_y / d z_v)^2], (..., V): how much the prediction depends on each logit."""
        return torch.addcmul(probs, probs, probs, value=-1)  # p - p^2


class SmoothCategorical(Categorical):
    """Softmax trained on 1 - label_smoothing for the true token and label_smoothing / (V - 1) for each other one.

    PyTorch spreads its label_smoothing over all V tokens, the true one too, hence the factor V / (V - 1).
    """

    def __init__(self, config: "HeadConfig", vocab_size: int):
        self.mean_coefficient = config.label_smoothing * vocab_size / (vocab_size - 1)
        self.label_coefficient = 1 - self.mean_coefficient
        if self.label_coefficient < 0:
            raise UserError(
                f"label_smoothing = {config.label_smoothing} leaves the true token less than a random one"
            )
        self.floor = config.label_smoothing / (vocab_size - 1)

    def desmoothed(self, log_probs: Tensor) -> Tensor:
        """log q (..., V) -> log p of the p that is smoothed to q = (1 - eps) p + eps (1 - p) / (V - 1).

        Where q falls to the floor eps / (V - 1) that smoothing gives to all, p keeps a hundredth of that: 0 would make
        the perplexity infinite. The kept mass is below eps / 100.
        """
        if not self.floor:  # nothing to undo, and a p that exp() takes for 0 has a logarithm
            return log_probs
        above = log_probs.exp() - self.floor
        return F.normalize(above.clamp(min=KEPT_OF_FLOOR * self.floor), p=1, dim=-1).log()


class Sigmoid:
    """A Bernoulli per token: loss = sum_v softplus(z_v) - z_y, summed over the vocabulary (a mean would starve Adam).

    The loss is a proper score: at the optimum sigmoid(z_v) = p(v | x), and the V of them sum to 1 by themselves.
    """

    default_bias = "unigram"  # without it, training first spends its steps on pushing V logits down
    mean_coefficient = 0.0

    def __init__(self, config: "HeadConfig", vocab_size: int):
        self.pos_weight = self.label_coefficient = config.pos_weight
        self.sum_penalty = config.sum_penalty
        self.logit_offset = math.log(config.pos_weight)  # as in Categorical, where p is small

    def normaliser(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> (...). Under a Bayesian head's bound, logits raised by half their variance, the sum that
        the penalty wants to be 1 is about E_q[sum_v sigmoid(z_v)], as that of exp(z) is."""
        normaliser = sum_softplus(logits)
        if not self.sum_penalty:
            return normaliser
        excess = torch.sigmoid(self._unweighted(logits)).sum(-1) - 1
        return normaliser + self.sum_penalty * excess.square()

    def of_labels(self, logits: Tensor, label_weights: Tensor | None) -> Tensor:
        """logits (..., K) of the labels, label_weights (..., K) in [0, 1]: of sum 1, or 1 for each member of a set ->
        (...). pos_weight w multiplies a label's softplus(-z), and so the odds at the optimum by w."""
        of_labels = -self.label_coefficient * logits
        if self.pos_weight != 1:
            of_labels = of_labels + (self.pos_weight - 1) * F.softplus(logits)
        return weighted_sum(of_labels, label_weights)

    def log_probs(self, logits: Tensor) -> Tensor:
        """As Categorical.log_probs: p is the sigmoids, normalised (a softmax would normalise their odds)."""
        return F.log_softmax(F.logsigmoid(self._unweighted(logits)), dim=-1)

    def centred(self, logits: Tensor) -> Tensor:
        """As Categorical.centred: without pos_weight."""
        return self._unweighted(logits)

    def unnormalised(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """As Categorical.unnormalised. A log costs a sixth of logsigmoid's time."""
        p = torch.sigmoid(centred)
        return p, p.log()

    def average(self, logits: Tensor, variance: Tensor) -> Tensor:
        """As Categorical.average: each sigmoid's expectation, normalised."""
        return F.log_softmax(
            expected_log_sigmoid(self._unweighted(logits), variance.sqrt()), dim=-1
        )

    def base_rate_logits(self, frequencies: Tensor) -> Tensor:
        return torch.logit(frequencies) + math.log(self.pos_weight)

    def fisher_diagonal(self, logits: Tensor, probs: Tensor) -> Tensor:
        return (
            torch.addcmul(probs, probs, probs, value=-1)
            * torch.sigmoid(-self._unweighted(logits)).square()
        )

    def log_sum_sigma(self, logits: Tensor) -> Tensor:
        """ln sum_v sigmoid(z_v), (...), of the logits without pos_weight: 0 where the model is normalised by itself."""
        return F.logsigmoid(self._unweighted(logits)).logsumexp(-1)

    def _unweighted(self, logits: Tensor) -> Tensor:
        return to_float32(logits) - math.log(self.pos_weight)


def token_scores(log_probs: Tensor, targets: Tensor) -> Tensor:
    """log p (n, V), targets (n,) -> (3, n): nats of the true token; probability of the likeliest one, and whether that
    is the true one."""
    of_target = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    top, likeliest = log_probs.max(-1)
    return torch.stack([-of_target, top.exp(), likeliest == targets])


def weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """values (..., K), weights (..., K) or all 1 -> (...)."""
    return (values if weights is None else weights * values).sum(-1)


def sum_softplus(logits: Tensor) -> Tensor:
    """sum_v ln(1 + exp(z_v)), (..., V) -> (...)."""
    if torch.compiler.is_compiling() and logits.dtype == torch.float32:
        return _SumSoftplus.apply(logits)[0]
    return F.softplus(logits).sum(-1)


class _SumSoftplus(torch.autograd.Function):
    """For torch.compile: sum and derivative from one pass with one exp, and no log, which takes as long as all else.

    ln(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3, by its series, here to float32's precision.
    """

    @staticmethod
    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        e = torch.exp(-logits.abs())
        s = e / (2 + e)
        series = reduce(lambda rest, k: 1 / k + s * s * rest, range(11, 0, -2), 1 / 13)
        return (logits.clamp(min=0) + 2 * s * series).sum(-1), torch.where(logits > 0, 1.0, e) / (
            1 + e
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, gradient: Tensor, _) -> Tensor:
        return gradient.unsqueeze(-1) * ctx.saved_tensors[0]


def expected_log_sigmoid(mean: Tensor, std: Tensor) -> Tensor:
    """ln E[sigmoid(z)] for z ~ N(mean, std^2), by Gauss-Hermite quadrature with three nodes."""
    nodes = ((0.0, 2 / 3), (math.sqrt(3), 1 / 6), (-math.sqrt(3), 1 / 6))
    return reduce(
        torch.logaddexp,
        (F.logsigmoid(mean + node * std) + math.log(share) for node, share in nodes),
    )


def linear_fit(
    x: torch.Tensor, y: torch.Tensor, ridge: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (n, C), y (n,) -> slope (C,) and constant: least squares, with a penalty of `ridge` on the slope of x at unit
    variance, so that a few positions are enough."""
    x, y = x.double(), y.double()
    centred = x - x.mean(0)
    squares = centred.T @ centred
    squares.diagonal().mul_(1 + ridge).add_(1e-9)
    slope = torch.linalg.solve(squares, centred.T @ (y - y.mean()))
    return slope.float(), (y.mean() - x.mean(0) @ slope).float()
