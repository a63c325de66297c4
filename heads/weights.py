"""What the weights of a layer are: a matrix, or a Gaussian over matrices with its prior, KL and noise.

PointLinear and BayesLinear are the output weights of a head (heads.py); BayesLayer is a hidden layer with the same
posterior (model.py, bayes_mlp). Options: the Bayesian ones of heads.HeadConfig. Shapes: x (..., C), weight (V, C).
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch.nn import functional as F

from engine.base.errors import UserError
from heads.linear_loss import LowRankLogits, to_float32

if TYPE_CHECKING:
    from heads import HeadConfig


def padded_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., C), weight (V, C) -> (..., V).

    On CUDA V is padded to a multiple of 64, which the tensor cores want, and the padding cut off again: no padded row
    ever gets probability, and no other code knows of them.
    """
    vocab_size, padding = len(weight), -len(weight) % 64
    if (
        x.numel() == weight.size(1) and not torch.is_grad_enabled()
    ):  # one token: in bf16, mv takes 2/3 of mm's time
        return (weight @ x.flatten()).view(*x.shape[:-1], vocab_size)
    if not (x.is_cuda and padding):
        return F.linear(x, weight)
    return F.linear(x, F.pad(weight, (0, 0, 0, padding)))[..., :vocab_size]


class PointLinear(nn.Module):
    """One weight matrix (V, C); also the interface of all output weights."""

    # whether noisy_logits(x) -> (..., V), not loss_terms, says what the loss is taken of
    samples_logits = False

    def __init__(self, config: "HeadConfig", vocab_size: int, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd).normal_(std=0.02))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., V), the mean of the logits."""
        return padded_linear(x, self.weight)

    def variance(self, x: torch.Tensor) -> torch.Tensor | None:
        """x (..., C) -> (..., V), the variance of the logits (independent given x); None for a point."""
        return None

    def loss_terms(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, LowRankLogits | None, LowRankLogits | None]:
        """x (..., C) -> the weight (V, C) whose logits to take the loss of, what to add to these, and how far they then
        stand above their mean."""
        return self.weight, None, None

    def kl(self, mean_square: torch.Tensor | None = None) -> torch.Tensor | float:
        """KL(posterior || prior) in nats, of all weights together; mean_square: that of their means, if at hand."""
        return 0.0

    def init_from_frequencies(self, frequencies: torch.Tensor) -> None:
        """Initialise what depends on how often each output is asked for, frequencies (V,), at most 1."""


class BayesLinear(PointLinear):
    """A factorised Gaussian posterior N(weight, std^2) under a prior N(prior_mean, prior_std^2) (Blundell et al. 2015).

    Since the head is linear, the logits of a position are independent Gaussians: logit v has mean x . weight_v and
    variance sum_c std_vc^2 x_c^2. log_std is (V, C) for a full posterior, (V, 1) where a token's weights share theirs.
    """

    def __init__(self, config: "HeadConfig", vocab_size: int, n_embd: int):
        super().__init__(config, vocab_size, n_embd)
        if config.n_data < 1:
            raise UserError("Bayesian weights need n_data, the number of training tokens")
        self.config, self.samples_logits = config, config.estimator == "local"
        self.log_std = nn.Parameter(
            torch.empty(vocab_size, 1 if config.posterior == "row" else n_embd)
        )
        self.init_from_frequencies(torch.full((vocab_size,), 1 / vocab_size))

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        squares, variances = self._factors(x)
        if variances.size(1) == 1:
            return squares * variances.squeeze(1)
        with torch.autocast(x.device.type, enabled=False):  # in float16 a variance below 6e-8 is 0
            return F.linear(squares, variances)

    def weighted_variance(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """x (..., C), shares (..., V) -> sum_v shares_v variance_v, (...)."""
        squares, variances = self._factors(x)
        with torch.autocast(x.device.type, enabled=False):
            return (squares * (shares.float() @ variances)).sum(-1)

    def noise(self, x: torch.Tensor, whole: bool) -> torch.Tensor:
        """A draw of the logits' deviation from their mean, (..., V).

        whole: from one draw of the whole matrix (Bayes by Backprop); as a sum, since bf16 weights would swallow the
        noise. Else a draw for each logit (local reparameterisation, Kingma et al. 2015).
        """
        if whole:
            return F.linear(x, self.draw())
        std = self.variance(x).clamp(min=1e-20).sqrt()  # the root of 0 has no gradient
        return std * torch.randn(*x.shape[:-1], len(self.weight), device=x.device)

    def loss_terms(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, LowRankLogits | None, LowRankLogits | None]:
        """bound: logits raised by half their variance. sample: a draw of the whole matrix (Bayes by Backprop)."""
        if self.config.estimator == "bound":
            squares, variances = self._factors(x)
            shift = LowRankLogits(squares / 2, variances)
            return self.weight, shift, shift
        noise = self.draw()
        if torch.is_autocast_enabled(x.device.type):  # added to the weight, bf16 would swallow it
            return self.weight, LowRankLogits(x, noise), None
        return self.weight + noise, None, None

    def noisy_logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., V) with a draw for each logit (local reparameterisation, Kingma et al. 2015)."""
        return self.logits(x) + self.noise(x, whole=False)

    def draw(self) -> torch.Tensor:
        """A draw of the weights' deviation from their mean, (V, C)."""
        return _draw(self.weight, self.log_std)

    def second_moment(self, mean_square: torch.Tensor | None = None) -> torch.Tensor:
        """E_q[(w - prior_mean)^2], averaged over all weights; mean_square: the part of their means, if at hand."""
        if mean_square is None:
            mean_square = (self.weight - self.config.prior_mean).square().mean()
        return mean_square + torch.exp(2 * self.log_std).mean()

    def kl(self, mean_square: torch.Tensor | None = None) -> torch.Tensor:
        """1/2 sum [E_q[(w - prior_mean)^2] / prior_variance - 1 - ln(std^2 / prior_variance)], a scalar in nats.

        An empirical prior has the variance that minimises this, the second moment itself.
        """
        second_moment, n = self.second_moment(mean_square), self.weight.numel()
        log_variance = 2 * self.log_std.mean()
        if self.config.prior_std == "empirical":
            return 0.5 * n * (second_moment.log() - log_variance)
        prior_variance = self.config.prior_std**2
        return (
            0.5 * n * (second_moment / prior_variance - 1 - log_variance + math.log(prior_variance))
        )

    @torch.no_grad()
    def init_from_frequencies(self, frequencies: torch.Tensor) -> None:
        """Laplace's guess at std^2, 1 / (1 / prior_variance + N f_v E|x_c|^2 / kl_weight), where E|x_c|^2 = 1 behind
        the last norm: tokens that the data determines start narrow, rare ones near the prior. (Every token uses every
        output of a hidden layer: f = 1.)"""
        empirical = self.config.prior_std == "empirical"
        squares = (self.weight - self.config.prior_mean).square()
        prior_variance = squares.mean() if empirical else self.config.prior_std**2
        data_precision = self.config.n_data * frequencies / max(self.config.kl_weight, 1e-6)
        precision = 1 / prior_variance + data_precision.to(self.log_std)
        self.log_std.copy_(-0.5 * precision.log().unsqueeze(1).expand_as(self.log_std))

    def to_torchbnn(self) -> dict[str, torch.Tensor]:
        """The state_dict of the torchbnn.BayesLinear(..., bias=False) with this posterior."""
        return {
            "weight_mu": self.weight.detach(),
            "weight_log_sigma": self.log_std.detach().expand_as(self.weight),
        }

    @torch.no_grad()
    def from_torchbnn(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the posterior in a torchbnn.BayesLinear's state_dict; needs posterior = full, and no bias there."""
        if odd := state.keys() ^ {"weight_mu", "weight_log_sigma"}:
            raise UserError(
                f"{', '.join(sorted(odd))}: ours is a torchbnn.BayesLinear(..., bias=False), unfrozen"
            )
        pairs = [(self.weight, state["weight_mu"]), (self.log_std, state["weight_log_sigma"])]
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                raise UserError(
                    f"torchbnn has a shape of {tuple(theirs.shape)}, posterior = full {tuple(ours.shape)}"
                )
        for ours, theirs in pairs:
            ours.copy_(theirs)

    def _factors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squares of x (..., K) and variances (V, K), fp32, whose product is the variance of the logits.

        K = C, or 1 where the weights of a token share a std: then the mean square, since the sum overflows float16.
        """
        squares, variances, n_embd = (
            to_float32(x).square(),
            torch.exp(2 * self.log_std),
            self.weight.size(1),
        )
        return (
            (squares, variances)
            if self.log_std.size(1) > 1
            else (squares.mean(-1, keepdim=True), n_embd * variances)
        )


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


# the libraries' normal numbers are faster than compiled code's, and the same as eager's
@torch._disable_dynamo
def _draw(weight: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    return _Draw.apply(weight, log_std)


class TorchBNNLinear(BayesLinear):
    """torchbnn's own layer, to compare with: a draw of the whole matrix for each loss, and its own KL.

    The parameters are ours (those of a full posterior); the library's layer works on them.
    """

    def __init__(self, config: "HeadConfig", vocab_size: int, n_embd: int):
        import torchbnn

        if config.prior_std == "empirical":
            raise UserError(
                'posterior = torchbnn needs a prior_std that is a number; "empirical" is ours'
            )
        super().__init__(config, vocab_size, n_embd)
        self.samples_logits = True
        with torch.device("meta"):  # its own parameters are never used
            layer = torchbnn.BayesLinear(
                config.prior_mean, config.prior_std, n_embd, vocab_size, bias=False
            )
        object.__setattr__(
            self, "_layer", layer
        )  # not a submodule: its parameters would be a second pair

    def noisy_logits(self, x: torch.Tensor) -> torch.Tensor:
        parameters = {"weight_mu": self.weight, "weight_log_sigma": self.log_std}
        with torch.autocast(
            x.device.type, enabled=False
        ):  # it adds the noise to the weight, where bf16 swallows it
            return torch.func.functional_call(self._layer, parameters, (x.float(),))

    def kl(self, mean_square: torch.Tensor | None = None) -> torch.Tensor:
        from torchbnn.functional import _kl_loss  # what bayesian_kl_loss(reduction="sum") adds up

        return _kl_loss(
            self.weight, self.log_std, self._layer.prior_mu, self._layer.prior_log_sigma
        )


def bayes_linear(config: "HeadConfig", vocab_size: int, n_embd: int) -> BayesLinear:
    """Bayesian output weights with the posterior that the options name."""
    return (TorchBNNLinear if config.posterior == "torchbnn" else BayesLinear)(
        config, vocab_size, n_embd
    )


class BayesLayer(BayesLinear):
    """A hidden linear layer with the same posterior: noisy in training and while `sampling`, else its mean weights.

    The bound needs a linear path to the loss, which a hidden layer has not: with estimator = bound it draws as local.
    Local noise is independent between positions where that of a matrix is shared, and attention averages it: as an
    estimate of E_q[loss] it is approximate here. Predictions (`sampling`) draw whole matrices, as estimator = sample.
    """

    def __init__(self, config: "HeadConfig", n_in: int, n_out: int, bias: bool):
        super().__init__(config, n_out, n_in)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.sampling = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = F.linear(x, self.weight, self.bias)
        if not (self.training or self.sampling):
            return mean
        return mean + self.noise(x, whole=self.sampling or self.config.estimator == "sample").to(
            mean.dtype
        )
