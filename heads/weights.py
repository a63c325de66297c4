"""What the weights of a layer are: a matrix, or a Gaussian over matrices with its prior and KL.

PointLinear and BayesLinear are output weights of a head. BayesLayer is a hidden layer with the same
posterior (bayes_mlp in model.py). The options are the Bayesian ones of HeadConfig. Shapes:
x (..., C), weight (V, C).
"""

import math
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from engine.base.errors import UserError
from heads.config import HeadConfig
from heads.linear_loss import LowRankLogits, pad_rows, to_float32


class PointLinear(nn.Module):
    """One weight matrix (V, C); also the interface of all output weights."""

    samples_logits = False  # whether the loss uses noisy_logits(x) (..., V), not loss_terms(x)

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__()
        weight = torch.empty(vocab_size, n_embd)
        self.weight = nn.Parameter(weight.normal_(std=0.02))

    def logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., V), the mean of the logits."""
        vocab_size, n_embd = self.weight.shape
        is_one_position = x.numel() == n_embd
        if is_one_position and not torch.is_grad_enabled():
            # in bf16, a matrix-vector product takes 2/3 of the time
            logits = self.weight @ x.flatten()
            return logits.view(*x.shape[:-1], vocab_size)
        weight = pad_rows(self.weight, x)
        padded = F.linear(x, weight)
        return padded[..., :vocab_size]

    def variance(self, x: Tensor) -> Tensor | None:
        """x (..., C) -> variance of the logits (..., V), independent given x; None for a point."""
        return None

    def loss_terms(self, x: Tensor) -> tuple[Tensor, Tensor, LowRankLogits | None]:
        """Inputs of linear_loss: x, the weight (V, C), and the shift of Jensen's bound or None."""
        return x, self.weight, None

    def kl(self) -> Tensor | float:
        """KL(posterior || prior) of all weights, in nats."""
        return 0.0

    def init_from_frequencies(self, frequencies: Tensor) -> None:
        """Initialise whatever depends on how often each output is used: frequencies (V,) <= 1."""


class BayesLinear(PointLinear):
    """A factorised Gaussian posterior N(weight, std^2) (Blundell et al. 2015).

    The prior is N(prior_mean, prior_std^2). The head is linear, so the logits of a position are
    independent Gaussians: logit v has mean x . weight_v and variance sum_c std_vc^2 x_c^2. log_std
    is (V, C) for a full posterior, (V, 1) for one std per token. A kron posterior also has a
    covariance U of the columns: row v is N(weight_v, std_v^2 U).
    """

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__(config, vocab_size, n_embd)
        if config.n_data < 1:
            raise UserError("Bayesian weights need n_data, the number of training tokens")
        self.config = config
        self.samples_logits = config.estimator == "local"
        n_stds = 1 if config.posterior in ("row", "kron") else n_embd
        self.log_std = nn.Parameter(torch.empty(vocab_size, n_stds))
        # L of the columns' covariance U = L @ L.T, whose trace is C; None: U is the identity
        factor = torch.eye(n_embd) if config.posterior == "kron" else None
        self.register_buffer("column_factor", factor)
        uniform = torch.full((vocab_size,), 1 / vocab_size)
        self.init_from_frequencies(uniform)

    def variance(self, x: Tensor) -> Tensor:
        squares, variances = self._variance_factors(x)
        if variances.size(1) == 1:
            return squares * variances.squeeze(1)
        # autocast to float16 would round a variance below 6e-8 to 0
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(squares, variances)

    def weighted_variance(self, x: Tensor, shares: Tensor) -> Tensor:
        """x (..., C), shares (..., V) -> sum_v shares_v variance_v, (...)."""
        squares, variances = self._variance_factors(x)
        with torch.autocast(x.device.type, enabled=False):
            by_square = shares.float() @ variances
            return (squares * by_square).sum(-1)

    def noise(self, x: Tensor) -> Tensor:
        """A draw of each logit's deviation from its mean, (..., V) (Kingma et al. 2015)."""
        variance = self.variance(x).clamp(min=1e-20)  # sqrt has no finite gradient at 0
        return variance.sqrt() * torch.randn_like(variance)

    def loss_terms(self, x: Tensor) -> tuple[Tensor, Tensor, LowRankLogits | None]:
        """bound: logits raised by half their variance. sample: a draw of the whole matrix.

        The relative error of log_std's gradient under the bound is 3e-7 in fp32; in bf16 it is 2e-3
        (row) or 2e-2 (full), at initial weights too.
        """
        if self.config.estimator == "bound":
            squares, variances = self._variance_factors(x)
            return x, self.weight, LowRankLogits(squares / 2, variances)
        noise = self.draw()
        if not torch.is_autocast_enabled(x.device.type):
            return x, self.weight + noise, None
        # x @ weight.T + x @ noise.T: in bf16, weight + noise would lose the noise
        twice = torch.cat([x, x], -1)
        weight_and_noise = torch.cat([self.weight, noise], 1)
        return twice, weight_and_noise, None

    def noisy_logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> logits (..., V), each with its own draw."""
        return self.logits(x) + self.noise(x)

    # torch.randn is faster than its compiled form, and gives the same numbers as in eager mode
    @torch._disable_dynamo
    def draw(self) -> Tensor:
        """A draw of the weights' deviation from their mean, (V, C) (Bayes by Backprop)."""
        noise = torch.randn_like(self.weight)
        if self.column_factor is not None:
            with torch.autocast(noise.device.type, enabled=False):
                noise = noise @ self.column_factor.T
        return torch.exp(self.log_std) * noise

    def mean_square(self) -> Tensor:
        """The mean of (weight - prior_mean)^2.

        Computed from the norms of the rows: one fp32 norm of 50,304 x 768 numbers is 0.3 % too
        small on a CPU, and square().mean() takes ten times as long.
        """
        deviation = self.weight
        if self.config.prior_mean:
            deviation = deviation - self.config.prior_mean
        norms = torch.linalg.vector_norm(deviation, dim=1)
        n_embd = deviation.size(1)
        return norms.square().mean() / n_embd

    def second_moment(self) -> Tensor:
        """E_q[(w - prior_mean)^2], averaged over all weights."""
        mean_variance = torch.exp(2 * self.log_std).mean()
        return self.mean_square() + mean_variance

    def kl(self) -> Tensor:
        """1/2 sum [E_q[(w - prior_mean)^2] / prior_variance - 1 - ln(std^2 / prior_variance)].

        An empirical prior has the variance that minimises this: the second moment.
        """
        n = self.weight.numel()
        second_moment = self.second_moment()
        log_variance = 2 * self.log_std.mean()
        if self.column_factor is not None:  # ln det U, for each weight
            log_variance = log_variance + 2 * self.column_factor.diagonal().log().mean()
        if self.config.prior_std == "empirical":
            log_ratio = second_moment.log() - log_variance
            return 0.5 * n * log_ratio
        prior_variance = self.config.prior_std**2
        ratio = second_moment / prior_variance
        log_ratio = log_variance - math.log(prior_variance)
        return 0.5 * n * (ratio - 1 - log_ratio)

    @torch.no_grad()
    def init_from_frequencies(self, frequencies: Tensor) -> None:
        """Laplace approximation: std^2 = 1 / (1 / prior_variance + N f_v E|x_c|^2 / kl_weight).

        E|x_c|^2 = 1 after the last norm. So frequent tokens start with a small std, and rare ones
        with nearly the prior's.
        """
        config = self.config
        if config.prior_std == "empirical":
            prior_variance = self.mean_square()
        else:
            prior_variance = config.prior_std**2
        kl_weight = max(config.kl_weight, 1e-6)
        data_precision = config.n_data * frequencies / kl_weight
        precision = 1 / prior_variance + data_precision.to(self.log_std)
        log_std = -0.5 * precision.log()
        self.log_std.copy_(log_std.unsqueeze(1))

    @torch.no_grad()
    def fit_columns(self, second_moment: Tensor, frequencies: Tensor, damping: float) -> None:
        """Laplace approximation of a kron posterior around the current weights, from the hidden
        states of the training text (Ritter et al. 2018, with one variance per token).

        second_moment (C, C): E[x x^T], float64. U is c (second_moment + damping)^-1 with trace C;
        damping is relative to the mean eigenvalue. Then std_v^2 = 1 / (1 / prior_variance + N f_v c
        / kl_weight).
        """
        n_embd = len(second_moment)
        identity = torch.eye(n_embd, dtype=second_moment.dtype)
        mean_eigenvalue = second_moment.diagonal().mean()
        inverse = torch.linalg.inv(second_moment + damping * mean_eigenvalue * identity)
        c = n_embd / inverse.trace()
        self.column_factor.copy_(torch.linalg.cholesky(c * inverse))
        self.init_from_frequencies(frequencies * c.item())

    def _variance_factors(self, x):
        """fp32 (..., K) and (V, K), whose product is the variance of the logits.

        K = C for a full posterior: the squares of x. K = 1 for one std per token: their mean,
        because their sum would overflow in float16. Kron takes the squares of L.T x.
        """
        x = to_float32(x)
        if self.column_factor is not None:
            with torch.autocast(x.device.type, enabled=False):
                x = x @ self.column_factor
        squares = x.square()
        variances = torch.exp(2 * self.log_std)
        if self.log_std.size(1) > 1:
            return squares, variances
        n_embd = self.weight.size(1)
        return squares.mean(-1, keepdim=True), n_embd * variances


class TorchBNNLinear(BayesLinear):
    """torchbnn's own layer, for comparison: it draws a matrix for each loss and has its own KL.

    The parameters are those of a full posterior; the library's layer computes with them.
    """

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        import torchbnn

        prior_std = config.prior_std
        if prior_std == "empirical":
            raise UserError("posterior = 'torchbnn' needs a number for prior_std, not 'empirical'")
        super().__init__(config, vocab_size, n_embd)
        self.samples_logits = True
        with torch.device("meta"):  # its own parameters are never used
            layer = torchbnn.BayesLinear(
                config.prior_mean, prior_std, n_embd, vocab_size, bias=False
            )
        # not a submodule: its parameters would be listed too
        object.__setattr__(self, "_layer", layer)

    def noisy_logits(self, x: Tensor) -> Tensor:
        parameters = {
            "weight_mu": self.weight,
            "weight_log_sigma": self.log_std,
        }
        # in fp32: the layer adds the noise to the weight, where bf16 would lose it
        with torch.autocast(x.device.type, enabled=False):
            return torch.func.functional_call(self._layer, parameters, (x.float(),))

    def kl(self) -> Tensor:
        from torchbnn.functional import _kl_loss  # what bayesian_kl_loss(reduction="sum") adds up

        layer = self._layer
        return _kl_loss(self.weight, self.log_std, layer.prior_mu, layer.prior_log_sigma)


class BayesLayer(BayesLinear):
    """A hidden linear layer with the same posterior: noisy in training and while `sampling`.

    Otherwise it uses its mean weights. Jensen's bound holds for output weights alone, so here
    estimator = bound draws as local does. Local noise is independent between positions, whereas all
    positions share a drawn matrix. Attention averages independent noise out, so local estimates
    E_q[loss] only approximately. Predictions draw whole matrices.
    """

    def __init__(self, config: HeadConfig, n_in: int, n_out: int, bias: bool):
        if config.posterior == "kron":  # its covariance is fitted to the inputs of the head
            config = replace(config, posterior="row")
        super().__init__(config, n_out, n_in)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.sampling = False

    def forward(self, x: Tensor) -> Tensor:
        mean = F.linear(x, self.weight, self.bias)
        if not (self.training or self.sampling):
            return mean
        if self.sampling or self.config.estimator == "sample":
            # a separate product: in bf16, weight + noise would lose the noise
            noise = F.linear(x, self.draw())
        else:
            noise = self.noise(x)
        return mean + noise.to(mean.dtype)


def bayes_linear(config: HeadConfig, vocab_size: int, n_embd: int) -> BayesLinear:
    """Bayesian output weights with the posterior that the options name."""
    layer = TorchBNNLinear if config.posterior == "torchbnn" else BayesLinear
    return layer(config, vocab_size, n_embd)


WEIGHTS = {"point": PointLinear, "bayes": bayes_linear}
