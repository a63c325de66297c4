"""What a logit means: likelihoods over logits (..., V), without parameters of their own.

    loss, nats per token = normaliser(all logits) + of_labels(the labels' logits)

The labels are the true token, or several ids with label_weights. heads/linear_loss.py
differentiates both functions. docs/heads.md shows how to add a likelihood.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.config import HeadConfig
from heads.linear_loss import to_float32

# p of a token whose smoothed probability is at or below the floor, as a fraction of the floor
FLOOR_KEPT_FRACTION = 0.01


class Likelihood:
    """A subclass writes normaliser, of_labels and log_probs.

    They are enough: a mode without its formula averages over draws of the logits, or is refused.
    The attributes and the other methods are formulas that hold for one likelihood alone. So a
    class with another loss or prediction derives from Likelihood itself.
    """

    default_bias = "none"  # what logit_bias = "auto" means
    # Whether estimator = "bound" is an upper bound. The expectation of the normaliser must be at
    # most its value at logits raised by half their variance, except for a term -mean_coefficient *
    # mean logit. of_labels must be -label_coefficient * label logits, plus terms that have the same
    # property.
    linear_in_logits = False
    label_coefficient = 1.0
    mean_coefficient = 0.0
    # more logits of -inf do not change the normaliser: the fused loss may mask padding by them
    ignores_minus_inf = False
    is_softmax = False  # log_probs is a log_softmax of the logits
    # if not: logit - log p for small p, to convert weights to and from softmax; None: not constant
    logit_offset: float | None = None

    def __init_subclass__(cls):
        parent = cls.__bases__[0]
        if parent is Likelihood:
            return
        other_log_probs = cls.log_probs is not parent.log_probs
        other_normaliser = cls.normaliser is not parent.normaliser
        if other_log_probs or other_normaliser:
            raise TypeError(
                f"{cls.__name__} must derive from Likelihood: "
                f"the formulas of {parent.__name__} do not hold for another prediction or loss"
            )

    def __init__(self, config: HeadConfig, vocab_size: int):
        self.vocab_size = vocab_size

    def normaliser(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> (...)."""
        raise NotImplementedError

    def of_labels(self, logits: Tensor, label_weights: Tensor | None) -> Tensor:
        """logits (..., K) of the labels, label_weights (..., K), None for all 1 -> (...)."""
        raise NotImplementedError

    def log_probs(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> log p (..., V), normalised, fp32."""
        raise NotImplementedError

    def average(self, logits: Tensor, variance: Tensor) -> Tensor | None:
        """log E[p] (..., V), fp32, for Gaussian logits with this mean and variance (..., V)."""
        return None

    def fisher_diagonal(self, logits: Tensor, probs: Tensor) -> Tensor | None:
        """E_y[(d log p_y / d z_v)^2], (..., V): how strongly the prediction depends on z_v."""
        return None

    def centred(self, logits: Tensor) -> Tensor | None:
        """Logits (..., V) with the same prediction, fp32: the input of `unnormalised`."""
        return None

    def unnormalised(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """centred logits (..., V) -> p and log p without their normaliser, (..., V)."""
        raise NotImplementedError

    def base_rate_logits(self, frequencies: Tensor) -> Tensor | None:
        """The logits that predict these frequencies (V,)."""
        return None


class Categorical(Likelihood):
    """Softmax: loss = logsumexp(z) - z_y."""

    linear_in_logits = True
    ignores_minus_inf = True
    is_softmax = True

    def normaliser(self, logits: Tensor) -> Tensor:
        normaliser = log_sum_exp(logits)
        if not self.mean_coefficient:
            return normaliser
        if logits.size(-1) > self.vocab_size:  # padded
            logits = logits.where(logits > -math.inf, 0.0)
        mean = logits.sum(-1) / self.vocab_size
        return normaliser - self.mean_coefficient * mean

    def of_labels(self, logits: Tensor, label_weights: Tensor | None) -> Tensor:
        return -self.label_coefficient * weighted_sum(logits, label_weights)

    def log_probs(self, logits: Tensor) -> Tensor:
        return F.log_softmax(to_float32(logits), dim=-1)

    def average(self, logits: Tensor, variance: Tensor) -> Tensor:
        """p_v = sigmoid(z_v - ln R_v), where R_v is the sum of exp(z) over the other tokens.

        R_v has so many terms that it hardly varies. Its expectation replaces it, which leaves an
        integral over one logit. Good while the standard deviations are below 1; if they are far
        above, few terms dominate R_v, and only draws are right.
        """
        logits = logits.float()
        raised = logits + variance / 2  # ln E[exp(z_v)]
        log_all = raised.logsumexp(-1, keepdim=True)
        log_share = (raised - log_all).clamp(max=-1e-6)
        log_others = log_all + torch.log1p(-log_share.exp())
        std = variance.sqrt()
        log_p = expected_log_sigmoid(logits - log_others, std)
        return F.log_softmax(log_p, dim=-1)

    def fisher_diagonal(self, logits: Tensor, probs: Tensor) -> Tensor:
        return torch.addcmul(probs, probs, probs, value=-1)  # p - p^2

    def centred(self, logits: Tensor) -> Tensor:
        return self.log_probs(logits)

    def unnormalised(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        return centred.exp(), centred

    def base_rate_logits(self, frequencies: Tensor) -> Tensor:
        return frequencies.log()


class SmoothCategorical(Categorical):
    """Softmax on smoothed targets: label_smoothing / (V - 1) for each token but the true one.

    PyTorch spreads label_smoothing over all V tokens; hence the factor V / (V - 1).
    """

    def __init__(self, config: HeadConfig, vocab_size: int):
        super().__init__(config, vocab_size)
        eps = config.label_smoothing
        self.floor = eps / (vocab_size - 1)
        self.mean_coefficient = eps * vocab_size / (vocab_size - 1)
        self.label_coefficient = 1 - self.mean_coefficient

    def desmoothed(self, log_probs: Tensor) -> Tensor:
        """log q (..., V) -> log p of the p with q = (1 - eps) p + eps (1 - p) / (V - 1).

        A q at or below the floor eps / (V - 1) would give p = 0 and an infinite perplexity. Its p
        becomes a hundredth of the floor instead; the sum of these is below eps / 100.
        """
        if not self.floor:  # nothing to undo; log q is more exact than log(exp(log q))
            return log_probs
        above = log_probs.exp() - self.floor
        kept = above.clamp(min=FLOOR_KEPT_FRACTION * self.floor)
        probs = F.normalize(kept, p=1, dim=-1)
        return probs.log()


class Sigmoid(Likelihood):
    """A Bernoulli per token: loss = sum_v softplus(z_v) - z_y.

    The loss is a sum over the vocabulary: Adam's eps would dominate the gradients of a mean. It is
    a proper score: at the optimum sigmoid(z_v) = p(v | x), and these sum to 1.
    """

    # without a unigram start, the first steps only push V logits down
    default_bias = "unigram"
    linear_in_logits = True
    ignores_minus_inf = True

    def __init__(self, config: HeadConfig, vocab_size: int):
        self.pos_weight = self.label_coefficient = config.pos_weight
        self.sum_penalty = config.sum_penalty
        self.logit_offset = math.log(config.pos_weight)

    def normaliser(self, logits: Tensor) -> Tensor:
        """With the Bayesian bound the penalty uses the raised logits, whose sigmoids sum to about
        E_q[sum_v sigmoid(z_v)]."""
        normaliser = sum_softplus(logits)
        if not self.sum_penalty:
            return normaliser
        probs = torch.sigmoid(self.centred(logits))
        excess = probs.sum(-1) - 1
        return normaliser + self.sum_penalty * excess.square()

    def of_labels(self, logits: Tensor, label_weights: Tensor | None) -> Tensor:
        """label_weights: their sum is 1, or each is 1 (a set). pos_weight multiplies a label's term
        softplus(-z), and so the odds at the optimum."""
        of_labels = -self.label_coefficient * logits
        if self.pos_weight != 1:
            extra_weight = self.pos_weight - 1
            of_labels = of_labels + extra_weight * F.softplus(logits)
        return weighted_sum(of_labels, label_weights)

    def log_probs(self, logits: Tensor) -> Tensor:
        """p is the normalised sigmoids; a softmax would normalise their odds."""
        log_sigmoids = F.logsigmoid(self.centred(logits))
        return F.log_softmax(log_sigmoids, dim=-1)

    def average(self, logits: Tensor, variance: Tensor) -> Tensor:
        """The expectations of the sigmoids, normalised."""
        std = variance.sqrt()
        log_p = expected_log_sigmoid(self.centred(logits), std)
        return F.log_softmax(log_p, dim=-1)

    def fisher_diagonal(self, logits: Tensor, probs: Tensor) -> Tensor:
        of_softmax = torch.addcmul(probs, probs, probs, value=-1)
        complement = torch.sigmoid(-self.centred(logits))
        return of_softmax * complement.square()

    def centred(self, logits: Tensor) -> Tensor:
        """The logits without pos_weight."""
        return to_float32(logits) - self.logit_offset

    def unnormalised(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.sigmoid(centred)
        return p, p.log()  # a sixth of logsigmoid's time

    def base_rate_logits(self, frequencies: Tensor) -> Tensor:
        return torch.logit(frequencies) + self.logit_offset

    def log_sum_sigma(self, logits: Tensor) -> Tensor:
        """ln sum_v sigmoid(z_v), (...), without pos_weight: 0 if the sigmoids sum to 1."""
        log_sigmoids = F.logsigmoid(self.centred(logits))
        return log_sigmoids.logsumexp(-1)


def weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """values (..., K), weights (..., K) or None for all 1 -> (...)."""
    if weights is not None:
        values = weights * values
    return values.sum(-1)


def log_sum_exp(logits: Tensor) -> Tensor:
    """ln sum_v exp(z_v), (..., V) -> (...)."""
    if not (logits.is_cpu and torch.compiler.is_compiling()):
        return logits.logsumexp(-1)
    # the derivative uses these exp; that of logsumexp computes them again, which is right for GPUs
    largest = logits.detach().amax(-1, keepdim=True)
    total = torch.exp(logits - largest).sum(-1)
    return largest.squeeze(-1) + total.log()


def sum_softplus(logits: Tensor) -> Tensor:
    """sum_v ln(1 + exp(z_v)), (..., V) -> (...)."""
    if torch.compiler.is_compiling() and logits.dtype == torch.float32:
        return _SumSoftplus.apply(logits)[0]
    return F.softplus(logits).sum(-1)


class _SumSoftplus(torch.autograd.Function):
    """For torch.compile: sum and derivative in one pass with one exp and no log.

    ln(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3, as a series with a relative error below
    2e-6. A log would take as long as everything else.
    """

    @staticmethod
    def forward(logits):
        e = torch.exp(-logits.abs())
        s = e / (2 + e)
        series = 1 / 9
        for k in (7, 5, 3, 1):
            series = 1 / k + s * s * series
        softplus = logits.clamp(min=0) + 2 * s * series
        sigmoid = torch.where(logits > 0, 1.0, e) / (1 + e)
        return softplus.sum(-1), sigmoid

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, sigmoid = output
        ctx.save_for_backward(sigmoid)
        ctx.mark_non_differentiable(sigmoid)

    @staticmethod
    def backward(ctx, gradient, _):
        (sigmoid,) = ctx.saved_tensors
        return gradient.unsqueeze(-1) * sigmoid


def expected_log_sigmoid(mean: Tensor, std: Tensor) -> Tensor:
    """ln E[sigmoid(z)] for z ~ N(mean, std^2), by Gauss-Hermite quadrature with three nodes."""
    root = math.sqrt(3)
    at_mean = F.logsigmoid(mean)
    above = F.logsigmoid(mean + root * std)
    below = F.logsigmoid(mean - root * std)
    middle = at_mean + math.log(2 / 3)
    sides = torch.logaddexp(above, below) + math.log(1 / 6)
    return torch.logaddexp(middle, sides)


def linear_fit(x: Tensor, y: Tensor, ridge: float = 0.1) -> tuple[Tensor, Tensor]:
    """x (n, C), y (n,) -> slope (C,) and constant of a least-squares fit.

    `ridge` penalises the slope, in units of the variances of x, so that few positions are enough.
    """
    x, y = x.double(), y.double()
    centred = x - x.mean(0)
    squares = centred.T @ centred
    diagonal = squares.diagonal()
    diagonal.mul_(1 + ridge).add_(1e-9)
    products = centred.T @ (y - y.mean())
    slope = torch.linalg.solve(squares, products)
    constant = y.mean() - x.mean(0) @ slope
    return slope.float(), constant.float()


LIKELIHOODS = {
    "categorical": Categorical,
    "smooth": SmoothCategorical,
    "sigmoid": Sigmoid,
}
