"""The options of a head: estimators, pos_weight, sum_penalty, and which values are refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from engine.base.errors import UserError
from heads import Head, HeadConfig
from tests.helpers import assert_close_in_norm, tiny_head, value_and_gradients
from tests.test_heads import C, V, batch, draws, every_likelihood, slow_nll


def drawn_logits(head: Head, x: torch.Tensor) -> torch.Tensor:
    """The logits (..., V) under the noise that the estimator draws next, float64."""
    std = head.weights.log_std.double().exp().expand(V, C)
    weight = head.weights.weight.double()
    bias = 0.0 if head.bias is None else head.bias.double()
    x = x.double()
    if head.config.estimator == "sample":
        return x @ (weight + std * torch.randn(V, C)).T + bias
    variance = x.square() @ std.square().T
    noise = torch.randn(*x.shape[:-1], V)
    return x @ weight.T + variance.sqrt() * noise + bias


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
    found = value_and_gradients(head.data_loss(x, targets), inputs)
    torch.manual_seed(0)
    slow = slow_nll(likelihood, drawn_logits(head, x), targets)
    assert_close_in_norm(found, value_and_gradients(slow, inputs))


@every_likelihood
def test_the_bound_lies_a_little_above_the_expected_loss(likelihood):
    head = tiny_head("bayes", likelihood).requires_grad_(False)
    head.weights.log_std.fill_(-1.5)
    x, targets = batch(3, 5)
    bias = 0.0 if head.bias is None else head.bias
    losses = [slow_nll(likelihood, x @ weight.T + bias, targets) for weight in draws(head, 500)]
    losses = torch.stack(losses)
    error = losses.std().item() / math.sqrt(500)
    expected = losses.mean().item()
    assert expected + 4 * error < head.data_loss(x, targets).item() < 1.2 * expected


@pytest.mark.parametrize(("pos_weight", "sum_penalty"), [(0.2, 0.0), (5.0, 0.0), (5.0, 0.3)])
def test_the_sigmoid_loss_is_weighted_binary_cross_entropy_and_a_penalty_on_the_sum(
    pos_weight, sum_penalty
):
    head = tiny_head("point", "sigmoid", pos_weight=pos_weight, sum_penalty=sum_penalty)
    x, targets = batch(3, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    logits = head.logits(x).double()
    cross_entropy = F.binary_cross_entropy_with_logits(
        logits,
        F.one_hot(targets, V).double(),
        pos_weight=torch.tensor(pos_weight),
        reduction="none",
    )
    sums = torch.sigmoid(logits - math.log(pos_weight)).sum(-1)
    slow = cross_entropy.sum(-1) + sum_penalty * (sums - 1).square()
    found = value_and_gradients(head.loss(x, targets), inputs)
    assert_close_in_norm(found, value_and_gradients(slow.mean(), inputs))


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
    with pytest.raises(UserError) as refusal:
        Head(HeadConfig(**options), V, C)
    message = str(refusal.value)
    assert "\n" not in message and list(options)[-1] in message
