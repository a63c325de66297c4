"""Predictions from draws against the slow float64 formula with the same noise."""

import math

import pytest
import torch
from torch.distributions import Categorical

from heads import draws
from tests.helpers import assert_near, tiny_head
from tests.test_heads import V, batch, every_likelihood

CASES = [
    ("point", "sigmoid", {}),
    ("bayes", "categorical", {}),
    ("bayes", "smooth", {"posterior": "full"}),
    ("bayes", "sigmoid", {}),
    ("bayes", "sigmoid", {"pos_weight": 5.0}),
    ("bayes", "categorical", {"posterior": "torchbnn", "prior_std": 0.1}),
]


def slow_log_probs(head, logits):
    """log p (..., V) in float64 from logits as the likelihood trains them."""
    logits = logits.double()
    if head.config.likelihood != "sigmoid":
        return logits.log_softmax(-1)
    log_sigmoids = torch.nn.functional.logsigmoid(logits - math.log(head.config.pos_weight))
    return log_sigmoids.log_softmax(-1)


def slow_draws(head, x, n):
    """log p (n, ..., V) under the noise of the next n draws; x (..., C)."""
    parameters = {name: p.double() for name, p in head.named_parameters()}
    weight = parameters["weights.weight"]
    x = x.double()
    mean = x @ weight.T + parameters.get("bias", 0.0)
    if head.config.weights == "point":
        return slow_log_probs(head, mean.expand(n, *mean.shape))
    variances = (2 * parameters["weights.log_std"]).exp().expand_as(weight)
    std = (x.square() @ variances.T).sqrt()
    batches = torch.empty(n).split(draws.DRAWS_AT_ONCE)
    noise = torch.cat([pairs(len(batch)) for batch in batches])
    positions = [1] * (x.dim() - 1)
    return slow_log_probs(head, mean + std * noise.view(n, *positions, V))


def pairs(n):
    """Noise (n, V), the second half with the opposite sign of the first."""
    step = draws.NOISE_STEP
    numbers = torch.randn(V + step * (math.ceil(n / 2) - 1))
    noise = torch.stack([numbers[i : i + V] for i in range(0, step * math.ceil(n / 2), step)])
    return torch.cat([noise, -noise])[:n]


def check(head, x, n, tolerance=2e-5):
    """Compare predict and log_probs with slow_draws; returns the log of the mean probability."""
    torch.manual_seed(1)
    each = slow_draws(head, x, n).detach()
    expected = each.logsumexp(0) - math.log(n)
    aleatoric = Categorical(logits=each).entropy().mean(0)
    total = Categorical(logits=expected).entropy()
    torch.manual_seed(1)
    found = head.predict(x, n)
    assert_near(found.log_probs, expected, tolerance)
    assert_near(found.total, total, 2e-5)
    assert_near(found.aleatoric, aleatoric, 2e-5)
    torch.manual_seed(1)
    assert torch.equal(head.log_probs(x, n), found.log_probs)
    return expected


@pytest.mark.parametrize("weights, likelihood, options", CASES, ids=str)
@pytest.mark.parametrize(
    "shape, n_samples",
    [
        ((), 1),
        ((5,), 2),
        ((2, 3), draws.DRAWS_AT_ONCE + 4),
    ],
    ids=str,
)
def test_draws_are_averaged_as_the_slow_formula_does_with_the_same_noise(
    weights, likelihood, options, shape, n_samples, monkeypatch
):
    monkeypatch.setitem(draws.LOGITS_AT_ONCE, "cpu", 2 * V)  # two positions at a time
    monkeypatch.setattr(draws, "NOISE_STEP", 5)  # windows overlap, as in a large vocabulary
    head = tiny_head(weights, likelihood, **options).requires_grad_(False)
    check(head, batch(*shape)[0], n_samples)


@every_likelihood
@pytest.mark.parametrize(
    "log_std, spread",
    [
        (-9.0, 60.0),
        (-9.0, 150.0),
        (-2.0, 25.0),
        (4.0, 3.0),
        (4.0, 150.0),
    ],
)
def test_probabilities_far_below_the_least_number_of_fp32_have_their_logarithms(
    likelihood, log_std, spread
):
    """Logits `spread` apart on both sides of their mean, and posteriors from narrow to absurd."""
    head = tiny_head("bayes", likelihood, logit_bias="uniform").requires_grad_(False)
    head.weights.log_std.fill_(log_std)
    generator = torch.Generator().manual_seed(3)
    uniform = 2 * torch.rand(V, 3, generator=generator) - 1
    head.weights.weight[:, :3] = spread * uniform
    head.bias.sub_(head.bias.mean())
    if likelihood == "sigmoid":
        head.bias.sub_(spread)  # none saturates
    x = torch.eye(16)[:3] + 0.01 * batch(3)[0]
    expected = check(head, x, 4, tolerance=1e-4)
    if spread == 150:
        assert expected.min() < -150


@every_likelihood
def test_in_two_draws_the_errors_of_first_order_cancel(likelihood):
    head = tiny_head("bayes", likelihood).requires_grad_(False)
    head.weights.log_std.fill_(-9.0)
    x, _ = batch(4)
    exact = head.log_probs(x)
    one, two = ((head.log_probs(x, n) - exact).abs().max() for n in (1, 2))
    assert two < 0.01 * one


@every_likelihood
def test_pairs_in_overlapping_windows_are_as_exact_as_separate_ones(likelihood, monkeypatch):
    head = tiny_head("bayes", likelihood).requires_grad_(False)
    head.weights.log_std.fill_(-1.0)
    x, _ = batch(4)
    torch.manual_seed(0)
    exact = torch.stack([head.log_probs(x, 512).exp() for _ in range(50)]).mean(0)
    errors = []
    for step in (5, V):
        monkeypatch.setattr(draws, "NOISE_STEP", step)
        errors.append(torch.stack([head.log_probs(x, 16).exp() - exact for _ in range(400)]))
    overlapping, separate = (error.square().mean() for error in errors)
    assert overlapping < 1.1 * separate
    assert_near(errors[0].mean(0), torch.zeros_like(exact), 0.005)
