"""The heads against the slow way to write each formula."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional as F

from heads import LIKELIHOODS, Head, HeadConfig
from heads.linear_loss import plain_loss
from tests.helpers import BOUNDED, HEADS, assert_near, assert_same_loss, tiny_head

V, C = 67, 16  # of tiny_head
EPS = 0.1  # the default label_smoothing
every_head = pytest.mark.parametrize("weights, likelihood", HEADS)
every_likelihood = pytest.mark.parametrize("likelihood", BOUNDED)


class OnCuda(Tensor):
    is_cuda = True


def batch(*shape):
    """Hidden states (*shape, C) and targets (shape)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, C, generator=generator)
    return x, torch.randint(V, shape, generator=generator)


def smoothed(likelihood, target):
    """The dense target (..., V) that the likelihood trains for."""
    if likelihood == "smooth":
        return (1 - EPS) * target + EPS / (V - 1) * (1 - target)
    return target


def slow_nll(likelihood, logits, targets):
    """Nats per token, mean over the positions, in float64 with a dense target."""
    target = smoothed(likelihood, F.one_hot(targets, V).double())
    logits = logits.double()
    if likelihood == "sigmoid":
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    else:
        losses = -target * logits.log_softmax(-1)
    return losses.sum(-1).mean()


def draws(head, n):
    """n weight matrices from the posterior, (n, V, C)."""
    mean = head.weights.weight
    std = head.weights.log_std.exp().expand_as(mean)
    return Normal(mean, std).sample((n,))


@every_head
def test_log_probs_are_normalised_and_fp32_under_autocast_too(weights, likelihood):
    head = tiny_head(weights, likelihood)
    x, _ = batch(2, 3)
    for n_samples in (0, 3):
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                log_probs = head.log_probs(20 * x, n_samples)  # logits far apart
            assert log_probs.shape == (2, 3, V) and log_probs.dtype == torch.float32
            sums = log_probs.logsumexp(-1)
            assert_near(sums, torch.zeros(2, 3), 2e-6)
    assert head.log_probs(x[0, 0]).shape == (V,)
    if weights == "point":
        assert not head.predict(x).epistemic.any()


def test_sigmoid_normalises_its_probabilities_and_not_their_odds():
    head = tiny_head(likelihood="sigmoid")
    x = 5 * batch(2, 3)[0]
    logits = head.logits(x).double()
    sigma = logits.sigmoid()
    expected = (sigma / sigma.sum(-1, keepdim=True)).log()
    assert_near(head.log_probs(x), expected)
    assert (expected - logits.log_softmax(-1)).abs().max() > 1
    assert_near(head.likelihood.log_sum_sigma(logits), sigma.sum(-1).log())


def test_given_exactly_one_acceptable_token_the_sigmoid_head_is_softmax():
    """Of V independent coins exactly one shows heads: the softmax of the logits says which."""
    logits = 3 * torch.randn(V, generator=torch.Generator().manual_seed(0))
    sigmoid = LIKELIHOODS["sigmoid"](HeadConfig(likelihood="sigmoid"), V)
    targets = torch.arange(V).unsqueeze(-1)
    alone = plain_loss(sigmoid, logits.expand(V, V), targets)
    assert_near((-alone).log_softmax(0), logits.log_softmax(0))


@every_head
def test_a_unigram_start_predicts_the_unigram(weights, likelihood):
    head = tiny_head(weights, likelihood, logit_bias="unigram")
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.rand(V, generator=generator).pow(3) + 1e-4
    frequencies /= frequencies.sum()
    head.init_from_frequencies(frequencies)
    probs = head.log_probs(torch.zeros(C)).exp()
    torch.testing.assert_close(probs, frequencies, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "likelihood, logit_bias, n_values",
    [
        ("categorical", "auto", 0),
        ("categorical", "uniform", 1),
        ("sigmoid", "auto", V),
        ("sigmoid", "none", 0),
    ],
)
def test_a_head_has_the_bias_that_its_options_name(likelihood, logit_bias, n_values):
    head = Head(HeadConfig(likelihood=likelihood, logit_bias=logit_bias), V, C)
    head.init_from_frequencies(torch.arange(1.0, V + 1) / 10_000)
    assert n_values == (0 if head.bias is None else len(head.bias.unique()))


def test_a_posterior_starts_narrow_for_frequent_tokens_and_near_the_prior_for_absent_ones():
    head = tiny_head("bayes", prior_std=0.3, n_data=10**6, kl_weight=0.1)
    frequencies = torch.zeros(V)
    frequencies[:2] = torch.tensor([0.9, 0.1])
    head.init_from_frequencies(frequencies)
    precision = 1 / 0.3**2 + 10**6 * frequencies / 0.1
    std = head.weights.log_std.exp().squeeze(1)
    torch.testing.assert_close(std, precision.rsqrt())


@pytest.mark.parametrize(
    "likelihood, options",
    [
        ("categorical", {}),
        ("smooth", {}),
        ("sigmoid", {}),
        ("sigmoid", {"pos_weight": 0.2}),
        ("sigmoid", {"pos_weight": 5.0}),
    ],
)
def test_the_loss_is_least_where_the_prediction_is_the_distribution_or_its_smoothed_form(
    likelihood, options
):
    ours = LIKELIHOODS[likelihood](HeadConfig(likelihood=likelihood, **options), V)
    p = torch.arange(1.0, V + 1).double()
    p /= p.sum()
    predicted = p
    if likelihood == "smooth":
        predicted = smoothed(likelihood, p)
    logits = ours.base_rate_logits(predicted).requires_grad_()
    torch.testing.assert_close(ours.log_probs(logits).exp(), predicted)
    loss = plain_loss(ours, logits, torch.arange(V), p)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-6
    if likelihood == "sigmoid":
        assert ours.log_sum_sigma(logits).abs() < 1e-6


@every_head
def test_padding_for_tensor_cores_changes_nothing(weights, likelihood):
    head = tiny_head(weights, likelihood)
    x, targets = batch(2, 3)
    padded = x.clone().as_subclass(OnCuda)
    assert head.weights.logits(padded).stride(-2) == 128  # V = 67
    logits = head.logits(padded).as_subclass(Tensor)
    assert_near(logits, head.logits(x))
    loss = head.loss(padded, targets).as_subclass(Tensor)
    assert_same_loss(loss, head.loss(x, targets), head.parameters())


@every_likelihood
def test_epistemic_uncertainty_without_draws_is_that_of_the_mean_weights(likelihood):
    head = tiny_head("bayes", likelihood)
    x, _ = batch(2, 3)
    assert_near(head.predict(x, -1).epistemic, head.predict(x, 0).epistemic)
