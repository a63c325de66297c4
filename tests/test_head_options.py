"""The options of a head: estimators, full posteriors, the sigmoid's pos_weight and sum_penalty."""

import math

import pytest
import torch
from torch.nn import functional as F

from heads import LIKELIHOODS, HeadConfig
from tests.helpers import tiny_head
from tests.test_heads import (
    BAYES,
    POSTERIORS,
    C,
    V,
    batch,
    draws,
    every_likelihood,
    fitted_logits,
    slow_nll,
)

every_bayes = pytest.mark.parametrize(
    ("weights", "posterior"), [(w, p) for w in BAYES for p in POSTERIORS]
)


@every_likelihood
@every_bayes
def test_local_and_sample_have_the_expectation_of_sampled_weights_and_bound_lies_a_little_above(
    weights, posterior, likelihood
):
    x, targets = batch(3, 5)
    means, errors = {}, {}
    for estimator in ("local", "sample", "bound"):
        head = tiny_head(weights, likelihood, posterior=posterior, estimator=estimator)
        with torch.no_grad():
            losses = torch.tensor([head.data_loss(x, targets).item() for _ in range(2000)])
        means[estimator], errors[estimator] = (
            losses.mean().item(),
            losses.std().item() / math.sqrt(len(losses)),
        )
    bias = 0.0 if head.bias is None else head.bias
    losses = torch.tensor(
        [slow_nll(likelihood, x @ w.T + bias, targets).item() for w in draws(head, 2000)]
    )
    exact, error = losses.mean().item(), losses.std().item() / math.sqrt(len(losses))
    for estimator in ("local", "sample"):
        assert abs(means[estimator] - exact) < 5 * math.hypot(error, errors[estimator])
    assert errors["bound"] < 1e-7  # it draws nothing
    assert exact - 5 * error < means["bound"] < 1.2 * exact


@every_bayes
def test_a_posterior_has_one_std_for_each_token_or_each_weight(weights, posterior):
    head = tiny_head(weights, posterior=posterior)
    assert head.weights.log_std.shape == ((V, C) if posterior == "full" else (V, 1))
    x = batch(2, 3)[0]
    std = head.weights.log_std.exp().expand(V, C)
    torch.testing.assert_close(head.weights.variance(x), x.square() @ std.square().T)


@every_bayes
def test_local_noise_differs_between_positions_and_a_sampled_matrix_is_shared_by_all(
    weights, posterior
):
    x = batch(1)[0].expand(1, 2, C)  # the same hidden state at two positions
    for estimator, same in (("local", False), ("sample", True)):
        head = tiny_head(weights, posterior=posterior, estimator=estimator)
        if estimator == "local":
            logits = head.weights.noisy_logits(x)
        else:
            _, weight, shift = head.weights.loss_terms(x)
            assert shift is None and not torch.equal(weight, head.weights.weight)
            logits = x @ weight.T
        assert torch.equal(logits[0, 0], logits[0, 1]) == same


@pytest.mark.parametrize("pos_weight", [0.2, 5.0])
def test_pos_weight_is_undone_exactly_in_predictions(pos_weight):
    p, logits = fitted_logits("sigmoid", pos_weight=pos_weight)
    parts = LIKELIHOODS["sigmoid"](HeadConfig(likelihood="sigmoid", pos_weight=pos_weight), V)
    torch.testing.assert_close(torch.logit(p) + math.log(pos_weight), logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parts.log_probs(logits).exp().double(), p, rtol=2e-3, atol=0)
    assert parts.log_sum_sigma(logits).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("pos_weight", [0.2, 1.0, 5.0])
def test_the_weighted_loss_is_torchs_binary_cross_entropy_with_pos_weight(pos_weight):
    head, (x, targets) = tiny_head("point", "sigmoid", pos_weight=pos_weight), batch(3, 5)
    onehot, logits = F.one_hot(targets, V).double(), head.logits(x).double()
    weight = torch.tensor(pos_weight, dtype=torch.float64)
    slow = (
        F.binary_cross_entropy_with_logits(logits, onehot, pos_weight=weight, reduction="none")
        .sum(-1)
        .mean()
    )
    assert head.loss(x, targets).item() == pytest.approx(slow.item(), rel=1e-6)


def test_the_penalty_is_on_the_sum_of_probabilities():
    x, targets = batch(3, 5)
    plain, penalised = (tiny_head("point", "sigmoid", sum_penalty=weight) for weight in (0.0, 0.3))
    excess = (plain.logits(x).double().sigmoid().sum(-1) - 1).square().mean().item()
    assert (penalised.loss(x, targets) - plain.loss(x, targets)).item() == pytest.approx(
        0.3 * excess, rel=1e-4
    )


def test_weighted_epistemic_uncertainty_is_that_of_the_same_predictions_unweighted():
    x = batch(2, 3)[0]
    plain, weighted = (tiny_head("bayes", "sigmoid", pos_weight=w) for w in (1.0, 5.0))
    with torch.no_grad():
        weighted.bias += math.log(5) - (weighted.bias - plain.bias)
    torch.testing.assert_close(weighted.log_probs(x), plain.log_probs(x))
    torch.testing.assert_close(weighted.predict(x), plain.predict(x))
