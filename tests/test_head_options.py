"""The options of a head: estimators, pos_weight, sum_penalty, and which values are refused."""

import math

import pytest
import torch

from heads import Head, HeadConfig
from tests.helpers import assert_same_loss, refusal, tiny_head
from tests.test_heads import C, V, batch, draws, every_likelihood, slow_nll


def slow_noise(layer, x, draws_matrix):
    """The noise (..., V) that a layer draws next, float64: of one matrix, or of each logit."""
    std = layer.log_std.double().exp().expand_as(layer.weight)
    if draws_matrix:
        return x.double() @ (std * torch.randn(std.shape)).T
    variance = x.double().square() @ std.square().T
    return variance.sqrt() * torch.randn(variance.shape)


def drawn_logits(head, x):
    """The logits (..., V) under the noise that the estimator draws next, float64."""
    noise = slow_noise(head.weights, x, head.config.estimator == "sample")
    mean = x.double() @ head.weights.weight.double().T
    return mean + noise if head.bias is None else mean + noise + head.bias


@every_likelihood
@pytest.mark.parametrize("posterior", ["row", "full"])
@pytest.mark.parametrize("estimator", ["local", "sample"])
def test_an_estimator_that_draws_has_the_loss_and_gradients_of_the_formula_with_its_noise(
    likelihood, posterior, estimator
):
    head = tiny_head("bayes", likelihood, posterior=posterior, estimator=estimator)
    x, targets = batch(3, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    torch.manual_seed(0)
    loss = head.data_loss(x, targets)
    torch.manual_seed(0)
    slow = slow_nll(likelihood, drawn_logits(head, x), targets)
    assert_same_loss(loss, slow, inputs)


@every_likelihood
def test_the_bound_lies_a_little_above_the_expected_loss(likelihood):
    head = tiny_head("bayes", likelihood).requires_grad_(False)
    head.weights.log_std.fill_(-1.5)
    x, targets = batch(3, 5)
    bias = 0.0 if head.bias is None else head.bias
    logits = [x @ weight.T + bias for weight in draws(head, 500)]
    losses = torch.stack([slow_nll(likelihood, z, targets) for z in logits])
    error = losses.std().item() / math.sqrt(500)
    expected = losses.mean().item()
    assert expected + 4 * error < head.data_loss(x, targets).item() < 1.2 * expected


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "laplace"},
        {"label_smoothing": 1.0},
        {"prior_std": 0},
        {"prior_std": "foo"},
        {"prior_mean": math.nan},
        {"pos_weight": 0.0},
        {"sum_penalty": math.inf},
        {"posterior": "torchbnn", "estimator": "local"},
        {"weights": "bayes", "posterior": "torchbnn", "n_data": 10, "prior_std": "empirical"},
        {"weights": "bayes", "n_data": 0},
    ],
    ids=str,
)
def test_an_impossible_option_is_refused_in_one_line_that_names_it(options):
    assert list(options)[-1] in refusal(lambda: Head(HeadConfig(**options), V, C))
