"""Predictions and their uncertainty against draws; soft labels against a dense target."""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal

from heads import LIKELIHOODS, Head, HeadConfig
from heads.draws import entropy
from heads.likelihoods import expected_log_sigmoid
from tests.helpers import assert_near, tiny_head
from tests.test_draws import slow_log_probs
from tests.test_heads import C, V, batch, every_head

every_bayesian = pytest.mark.parametrize(
    "likelihood, options",
    [
        ("categorical", {"posterior": "full"}),
        ("smooth", {"posterior": "row"}),
        ("sigmoid", {"posterior": "row", "pos_weight": 5.0}),
        ("sigmoid", {"posterior": "full", "pos_weight": 0.3}),
    ],
    ids=str,
)


def bayesian_head(likelihood: str, options: dict, log_std: float) -> Head:
    """A head whose log_std is spread around the given one."""
    head = tiny_head("bayes", likelihood, **options).requires_grad_(False)
    head.weights.log_std += log_std + 2
    return head


def slow_uncertainty(log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each draw (n, ..., V) -> total and aleatoric uncertainty."""
    total = Categorical(probs=log_probs.exp().mean(0)).entropy()
    return total, Categorical(logits=log_probs).entropy().mean(0)


@every_bayesian
def test_the_prediction_without_sampling_is_that_of_20000_draws(likelihood, options):
    """Narrow posterior: logits with a std of 0.3."""
    head = bayesian_head(likelihood, options, -2.5)
    x, _ = batch(4)
    std = head.weights.variance(x).sqrt()
    torch.manual_seed(0)
    log_probs = slow_log_probs(head, Normal(head.logits(x), std).sample((20_000,)))
    expected = log_probs.exp().mean(0)
    total, aleatoric = slow_uncertainty(log_probs)
    found = head.predict(x, -1)
    average = found.log_probs.exp().double()
    assert (average / expected - 1).abs().max() < 0.02
    assert (average - expected).abs().sum(-1).max() < 0.01
    assert_near(found.total.double(), total, 0.01)
    assert_near(found.aleatoric.double(), aleatoric, 0.015)
    epistemic = total - aleatoric
    torch.testing.assert_close(found.epistemic.double(), epistemic, atol=1e-3, rtol=0.12)


@every_bayesian
def test_without_posterior_variance_the_average_is_the_mean_weights_prediction(likelihood, options):
    head = bayesian_head(likelihood, options, -30.0)
    x = 3 * batch(2, 3)[0]
    expected = slow_log_probs(head, head.logits(x)).float()
    for n_samples in (-1, 0):
        found = head.predict(x, n_samples)
        torch.testing.assert_close(found.log_probs, expected, atol=1e-5, rtol=1e-5)
        assert_near(found.epistemic, torch.zeros(2, 3), 1e-6)


@every_head
def test_each_draw_of_the_hidden_states_has_its_own_draw_of_the_output_weights(weights, likelihood):
    head = tiny_head(weights, likelihood).requires_grad_(False)
    xs = torch.randn(4, 3, C)
    logits = head.logits(xs)
    torch.manual_seed(1)
    if weights == "bayes":
        noise = torch.stack([torch.randn(1, V) for _ in xs])
        logits += head.weights.variance(xs).sqrt() * noise
    log_probs = slow_log_probs(head, logits)
    total, aleatoric = slow_uncertainty(log_probs)
    torch.manual_seed(1)
    found = head.predict(list(xs), 4)
    expected = log_probs.exp().mean(0).log()
    torch.testing.assert_close(found.log_probs.double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.total.double(), total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.aleatoric.double(), aleatoric, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "std, tolerance",
    [
        (0.0, 1e-6),
        (0.3, 1e-4),
        (1.0, 0.03),
        (1.5, 0.12),
    ],
)
def test_expected_log_sigmoid_is_the_integral(std, tolerance):
    """Three nodes: the error grows with the std."""
    mean = torch.tensor([-30.0, -8.0, -2.0, -0.5, 0.0, 1.0, 7.0]).double()
    z = torch.linspace(-12, 12, 10_001).double()
    density = Normal(0.0, 1.0).log_prob(z).exp()
    values = (mean[:, None] + std * z).sigmoid()
    expected = (values * density).sum(-1) / density.sum()
    found = expected_log_sigmoid(mean.float(), torch.tensor(std)).double().exp()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_the_entropy_is_finite_if_tokens_are_impossible():
    log_p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).log()
    torch.testing.assert_close(entropy(log_p), torch.tensor([math.log(2), 0.0]))


# soft labels


@pytest.mark.parametrize("label_smoothing", [0.05, 0.3])
def test_desmoothed_inverts_smoothing_and_is_finite_below_the_floor(label_smoothing):
    config = HeadConfig(likelihood="smooth", label_smoothing=label_smoothing)
    desmoothed = LIKELIHOODS["smooth"](config, V).desmoothed
    torch.manual_seed(0)
    p = torch.randn(20, V).double().softmax(-1)
    q = (1 - label_smoothing) * p + label_smoothing * (1 - p) / (V - 1)
    assert p.min() > 0.01 * label_smoothing / (V - 1)  # above what is kept of the floor
    torch.testing.assert_close(desmoothed(q.log()).exp(), p, rtol=1e-9, atol=0)
    below = desmoothed((10 * torch.randn(20, V)).log_softmax(-1))  # as an untrained model predicts
    assert_near(below.logsumexp(-1), torch.zeros(20))
    assert below.isfinite().all()
