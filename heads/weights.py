"""What the weights of a layer are: a matrix, or a Gaussian over matrices with its prior and KL.

PointLinear and BayesLinear are the output weights of a head. BayesLayer is a hidden layer with the
same posterior (model.py, bayes_mlp). Options: the Bayesian ones of HeadConfig. Shapes: x (..., C),
weight (V, C).
"""

import math

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from engine.base.errors import UserError
from heads.config import HeadConfig
from heads.linear_loss import LowRankLogits, mean_square, pad_rows, to_float32

# x, the weight (V, C) to multiply it with, and the shift of Jensen's bound: see linear_loss
LossTerms = tuple[Tensor, Tensor, LowRankLogits | None]


class PointLinear(nn.Module):
    """One weight matrix (V, C); also the interface of all output weights."""

    samples_logits = False  # whether the loss takes noisy_logits(x) (..., V) instead of loss_terms

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd).normal_(std=0.02))

    def logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., V), the mean of the logits."""
        vocab_size, n_embd = self.weight.shape
        if x.numel() == n_embd and not torch.is_grad_enabled():
            # one position: in bf16 a matrix-vector product takes 2/3 of the time
            return (self.weight @ x.flatten()).view(*x.shape[:-1], vocab_size)
        logits = F.linear(x, pad_rows(self.weight, x))
        return logits if logits.size(-1) == vocab_size else logits[..., :vocab_size]

    def variance(self, x: Tensor) -> Tensor | None:
        """x (..., C) -> variance of the logits (..., V), independent given x; None for a point."""
        return None

    def loss_terms(self, x: Tensor) -> LossTerms:
        return x, self.weight, None

    def kl(self, known_mean_square: Tensor | None = None) -> Tensor | float:
        """KL(posterior || prior) of all weights, in nats; known_mean_square: if at hand."""
        return 0.0

    def init_from_frequencies(self, frequencies: Tensor) -> None:
        """Initialise what depends on how often each output is needed, frequencies (V,) up to 1."""


class BayesLinear(PointLinear):
    """A factorised Gaussian posterior N(weight, std^2) (Blundell et al. 2015).

    The prior is N(prior_mean, prior_std^2). Since the head is linear, the logits of a position are
    independent Gaussians: logit v has mean x . weight_v and variance sum_c std_vc^2 x_c^2. log_std
    is (V, C) for a full posterior, (V, 1) for one std per token.
    """

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        super().__init__(config, vocab_size, n_embd)
        if config.n_data < 1:
            raise UserError("Bayesian weights need n_data, the number of training tokens")
        self.config = config
        self.samples_logits = config.estimator == "local"
        n_stds = 1 if config.posterior == "row" else n_embd
        self.log_std = nn.Parameter(torch.empty(vocab_size, n_stds))
        self.init_from_frequencies(torch.full((vocab_size,), 1 / vocab_size))

    def variance(self, x: Tensor) -> Tensor:
        squares, variances = self._variance_factors(x)
        if variances.size(1) == 1:
            return squares * variances.squeeze(1)
        with torch.autocast(x.device.type, enabled=False):  # in float16 a variance below 6e-8 is 0
            return F.linear(squares, variances)

    def weighted_variance(self, x: Tensor, shares: Tensor) -> Tensor:
        """x (..., C), shares (..., V) -> sum_v shares_v variance_v, (...)."""
        squares, variances = self._variance_factors(x)
        with torch.autocast(x.device.type, enabled=False):
            return (squares * (shares.float() @ variances)).sum(-1)

    def noise(self, x: Tensor) -> Tensor:
        """A draw of each logit's deviation from its mean, (..., V): local reparameterisation
        (Kingma et al. 2015)."""
        std = self.variance(x).clamp(min=1e-20).sqrt()  # the root of 0 has no gradient
        return std * torch.randn(*x.shape[:-1], len(self.weight), device=x.device)

    def loss_terms(self, x: Tensor) -> LossTerms:
        """bound: logits raised by half their variance. sample: a draw of the whole matrix.

        The gradient of log_std under the bound is exact to 3e-7 in fp32 and to 2e-3 in bf16
        (row; full 2e-2), at initial weights too: tests/test_linear_loss.py.
        """
        if self.config.estimator == "bound":
            squares, variances = self._variance_factors(x)
            return x, self.weight, LowRankLogits(squares / 2, variances)
        noise = self.draw()
        if not torch.is_autocast_enabled(x.device.type):
            return x, self.weight + noise, None
        # x @ weight.T + x @ noise.T: weight + noise would lose the noise in bf16
        return torch.cat([x, x], -1), torch.cat([self.weight, noise], 1), None

    def noisy_logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., V) with a draw for each logit."""
        return self.logits(x) + self.noise(x)

    def draw(self) -> Tensor:
        """A draw of the weights' deviation from their mean, (V, C) (Bayes by Backprop)."""
        return _draw(self.weight, self.log_std)

    def second_moment(self, known_mean_square: Tensor | None = None) -> Tensor:
        """E_q[(w - prior_mean)^2], averaged over all weights."""
        of_means = known_mean_square
        if of_means is None:
            of_means = mean_square(self.weight, self.config.prior_mean)
        return of_means + torch.exp(2 * self.log_std).mean()

    def kl(self, known_mean_square: Tensor | None = None) -> Tensor:
        """1/2 sum [E_q[(w - prior_mean)^2] / prior_variance - 1 - ln(std^2 / prior_variance)].

        An empirical prior has the variance that minimises this, the second moment itself.
        """
        second_moment, n = self.second_moment(known_mean_square), self.weight.numel()
        log_variance = 2 * self.log_std.mean()
        if self.config.prior_std == "empirical":
            return 0.5 * n * (second_moment.log() - log_variance)
        prior_variance = self.config.prior_std**2
        log_ratio = log_variance - math.log(prior_variance)
        return 0.5 * n * (second_moment / prior_variance - 1 - log_ratio)

    @torch.no_grad()
    def init_from_frequencies(self, frequencies: Tensor) -> None:
        """Laplace's guess: std^2 = 1 / (1 / prior_variance + N f_v E|x_c|^2 / kl_weight).

        E|x_c|^2 = 1 after the last norm. Frequent tokens start narrow, rare ones near the prior.
        """
        prior_variance = mean_square(self.weight, self.config.prior_mean)
        if self.config.prior_std != "empirical":
            prior_variance = self.config.prior_std**2
        data_precision = self.config.n_data * frequencies / max(self.config.kl_weight, 1e-6)
        precision = 1 / prior_variance + data_precision.to(self.log_std)
        self.log_std.copy_(-0.5 * precision.log().unsqueeze(1).expand_as(self.log_std))

    def to_torchbnn(self) -> dict[str, Tensor]:
        """The state_dict of the torchbnn.BayesLinear(..., bias=False) with this posterior."""
        log_std = self.log_std.detach().expand_as(self.weight)
        return {"weight_mu": self.weight.detach(), "weight_log_sigma": log_std}

    @torch.no_grad()
    def from_torchbnn(self, state: dict[str, Tensor]) -> None:
        """Load a torchbnn.BayesLinear's state_dict; needs posterior = full, and no bias there."""
        ours = {"weight_mu": self.weight, "weight_log_sigma": self.log_std}
        shapes = {name: tuple(t.shape) for name, t in ours.items()}
        found = {name: tuple(t.shape) for name, t in state.items()}
        if found != shapes:
            raise UserError(
                f"this takes an unfrozen torchbnn.BayesLinear(..., bias=False) with {shapes}, "
                f"not one with {found}"
            )
        for name, parameter in ours.items():
            parameter.copy_(state[name])

    def _variance_factors(self, x) -> tuple[Tensor, Tensor]:
        """fp32 (..., K) and (V, K), whose product is the variance of the logits.

        K = C: the squares of x. K = 1 for one std per token: their mean, since in float16 the sum
        overflows.
        """
        squares, variances = to_float32(x).square(), torch.exp(2 * self.log_std)
        if self.log_std.size(1) > 1:
            return squares, variances
        return squares.mean(-1, keepdim=True), self.weight.size(1) * variances


class _Draw(torch.autograd.Function):
    """std * eps with one (V, C) tensor kept: it is its own derivative by log_std."""

    @staticmethod
    def forward(ctx, weight, log_std):
        noise = torch.randn_like(weight).mul_(torch.exp(log_std))
        ctx.save_for_backward(noise)
        ctx.shape = log_std.shape
        return noise

    @staticmethod
    def backward(ctx, gradient):
        return None, (gradient * ctx.saved_tensors[0]).sum_to_size(ctx.shape)


# the library's normal numbers are faster than compiled code's, and the same as eager's
@torch._disable_dynamo
def _draw(weight, log_std) -> Tensor:
    return _Draw.apply(weight, log_std)


class TorchBNNLinear(BayesLinear):
    """torchbnn's own layer, to compare with: a draw of the matrix for each loss, and its own KL.

    The parameters are those of a full posterior; the library's layer works on them.
    """

    def __init__(self, config: HeadConfig, vocab_size: int, n_embd: int):
        import torchbnn

        prior_std = config.prior_std
        if prior_std == "empirical":
            raise UserError(
                'posterior = torchbnn needs a number as prior_std; "empirical" is for row and full'
            )
        super().__init__(config, vocab_size, n_embd)
        self.samples_logits = True
        with torch.device("meta"):  # its own parameters are never used
            layer = torchbnn.BayesLinear(
                config.prior_mean, prior_std, n_embd, vocab_size, bias=False
            )
        # not a submodule, whose parameters would be listed too
        object.__setattr__(self, "_layer", layer)

    def noisy_logits(self, x: Tensor) -> Tensor:
        parameters = {"weight_mu": self.weight, "weight_log_sigma": self.log_std}
        # in fp32: the layer adds the noise to the weight, and bf16 would lose it
        with torch.autocast(x.device.type, enabled=False):
            return torch.func.functional_call(self._layer, parameters, (x.float(),))

    def kl(self, known_mean_square: Tensor | None = None) -> Tensor:
        from torchbnn.functional import _kl_loss  # what bayesian_kl_loss(reduction="sum") adds up

        prior = self._layer.prior_mu, self._layer.prior_log_sigma
        return _kl_loss(self.weight, self.log_std, *prior)


def bayes_linear(config: HeadConfig, vocab_size: int, n_embd: int) -> BayesLinear:
    """Bayesian output weights with the posterior that the options name."""
    layer = TorchBNNLinear if config.posterior == "torchbnn" else BayesLinear
    return layer(config, vocab_size, n_embd)


WEIGHTS = {"point": PointLinear, "bayes": bayes_linear}


class BayesLayer(BayesLinear):
    """A hidden linear layer with the same posterior: noisy in training and while `sampling`.

    Otherwise it uses its mean weights. The bound needs a linear path to the loss, which a hidden
    layer does not have: with estimator = bound it draws as local. Local noise is independent
    between positions where that of a matrix is shared, and attention averages it out: as an
    estimate of E_q[loss] it is approximate here. Predictions draw whole matrices.
    """

    def __init__(self, config: HeadConfig, n_in: int, n_out: int, bias: bool):
        super().__init__(config, n_out, n_in)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.sampling = False

    def forward(self, x: Tensor) -> Tensor:
        mean = F.linear(x, self.weight, self.bias)
        if not (self.training or self.sampling):
            return mean
        draws_matrix = self.sampling or self.config.estimator == "sample"
        # a product of its own: in bf16 the noise would vanish in weight + noise
        noise = F.linear(x, self.draw()) if draws_matrix else self.noise(x)
        return mean + noise.to(mean.dtype)
