"""Predictions from draws against the slow float64 formula with the same noise, and the noise that
positions share.
"""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal

from heads import LIKELIHOODS, Head, draws
from tests.helpers import HEADS, tiny_head
from tests.test_heads import C, V, batch
from tests.test_predicting import slow_log_probs

CASES = [(weights, likelihood, {}) for weights, likelihood in HEADS]
CASES += [("bayes", likelihood, {"posterior": "full"}) for likelihood in LIKELIHOODS]
CASES += [
    ("bayes", likelihood, {"posterior": "torchbnn", "prior_std": 0.1}) for likelihood in LIKELIHOODS
]
CASES += [("bayes", "sigmoid", {"pos_weight": 5.0})]
every_case = pytest.mark.parametrize(("weights", "likelihood", "options"), CASES, ids=str)
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)


def slow(head: Head, x: torch.Tensor, n: int) -> torch.Tensor:
    """log p (n, ..., V) under each of n draws, float64, with the noise of the next prediction; x
    (..., C).
    """
    parameters = {name: p.double() for name, p in head.named_parameters()}
    weight, x, noise = parameters["weights.weight"], x.double(), torch.zeros(n, V)
    mean, std = x @ weight.T + parameters.get("bias", 0.0), torch.zeros(V).double()
    if head.config.weights == "bayes":
        noise = torch.cat([torch.randn(len(part), V) for part in noise.split(draws.DRAWS_AT_ONCE)])
        std = (x.square() @ (2 * parameters["weights.log_std"]).exp().expand_as(weight).T).sqrt()
    each_draw = (n, *[1] * (x.dim() - 1), V)
    return slow_log_probs(head, mean + std * noise.view(each_draw))


def check(head: Head, x: torch.Tensor, n: int, tolerance: float = 2e-5) -> torch.Tensor:
    """Compare predict and log_probs with slow(); returns its log of the mean probability (...,
    V).
    """
    torch.manual_seed(1)
    each = slow(head, x, n).detach()
    expected = each.logsumexp(0) - math.log(n)
    torch.manual_seed(1)
    prediction = head.predict(x, n)
    torch.testing.assert_close(prediction.log_probs.double(), expected, atol=tolerance, rtol=1e-5)
    aleatoric = Categorical(logits=each).entropy().mean(0)
    torch.testing.assert_close(
        prediction.total.double(), Categorical(logits=expected).entropy(), atol=2e-5, rtol=1e-5
    )
    torch.testing.assert_close(prediction.aleatoric.double(), aleatoric, atol=2e-5, rtol=1e-5)
    torch.manual_seed(1)
    assert torch.equal(head.log_probs(x, n), prediction.log_probs)
    return expected


@every_case
@pytest.mark.parametrize("n_samples", [1, 2, draws.DRAWS_AT_ONCE + 4])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_draws_are_averaged_as_the_slow_formula_does_with_the_same_noise(
    weights, likelihood, options, n_samples, shape, monkeypatch
):
    monkeypatch.setitem(draws.LOGITS_AT_ONCE, "cpu", 2 * V)  # two positions at a time
    head = tiny_head(weights, likelihood, **options).requires_grad_(False)
    check(head, batch(*shape)[0], n_samples)


@every_likelihood
@pytest.mark.parametrize("log_std", [-9.0, -2.0, 1.0, 4.0])
@pytest.mark.parametrize("spread", [3.0, 12.0, 25.0, 60.0, 150.0])
def test_probabilities_far_below_the_least_number_of_fp32_have_their_logarithms(
    likelihood, log_std, spread
):
    """Logits `spread` apart on both sides of their mean, and posteriors from narrow to absurd."""
    head = tiny_head("bayes", likelihood, logit_bias="uniform").requires_grad_(False)
    head.weights.log_std.fill_(log_std)
    x = torch.eye(C)[:3] + 0.01 * batch(3)[0]
    head.weights.weight[:, :3] = spread * (
        2 * torch.rand(V, 3, generator=torch.Generator().manual_seed(3)) - 1
    )
    head.bias.sub_(head.bias.mean() + (spread if likelihood == "sigmoid" else 0))  # none saturates
    expected = check(head, x, 4, tolerance=1e-4)
    if spread == 150:
        assert expected.min() < -150


@every_likelihood
def test_both_ways_to_average_are_taken_and_agree(likelihood, monkeypatch):
    head, x = tiny_head("bayes", likelihood).requires_grad_(False), batch(2, 3)[0]
    head.weights.log_std.fill_(-3.0)
    found, taken, of_numbers = [], [], draws._average_of_numbers
    monkeypatch.setattr(
        draws, "_average_of_numbers", lambda *given: taken.append(1) or of_numbers(*given)
    )
    for lowest in (draws.LOWEST_LOG_P, math.inf):
        monkeypatch.setattr(draws, "LOWEST_LOG_P", lowest)
        torch.manual_seed(0)
        found.append(tuple(head.predict(x, 5)))
    assert taken == [1]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@every_case
@pytest.mark.parametrize("n_samples", [1, 5, draws.DRAWS_AT_ONCE + 1])
def test_what_a_position_is_told_depends_on_the_generator_not_on_the_number_of_positions(
    weights, likelihood, options, n_samples
):
    head, x = tiny_head(weights, likelihood, **options).requires_grad_(False), batch(12)[0]
    torch.manual_seed(0)
    whole, state = head.predict(x, n_samples), torch.get_rng_state()
    for part in (slice(0, 10), slice(11, 12)):
        torch.manual_seed(0)
        for a, b in zip(head.predict(x[part], n_samples), whole, strict=True):
            torch.testing.assert_close(a, b[part], atol=2e-6, rtol=1e-5)
        assert torch.equal(torch.get_rng_state(), state)


@every_likelihood
def test_the_mean_over_seeds_is_the_expectation_at_every_position_although_they_share_their_noise(
    likelihood,
):
    head, x, n, n_seeds = tiny_head("bayes", likelihood).requires_grad_(False), batch(4)[0], 2, 2000
    ours = []
    for seed in range(n_seeds):
        torch.manual_seed(seed)
        ours.append(head.log_probs(x, n).exp().double())
    ours = torch.stack(ours)  # (n_seeds, 4, V)
    logits = Normal(head.logits(x), head.weights.variance(x).sqrt()).sample((20_000,))
    expected = slow_log_probs(head, logits).exp()
    error = (ours.var(0) / n_seeds + expected.var(0) / len(expected)).sqrt()
    assert ((ours.mean(0) - expected.mean(0)).abs() < 5 * error + 1e-9).all()
    assert (ours[0] - ours[1]).abs().max() > 1e-3  # each seed has noise of its own


@every_likelihood
def test_epistemic_uncertainty_of_few_draws_is_too_low_by_a_share_of_one_in_their_number(
    likelihood,
):
    head, x = tiny_head("bayes", likelihood).requires_grad_(False), batch(20)[0]
    head.weights.log_std.fill_(-3.0)
    torch.manual_seed(0)
    exact = head.predict(x, 4000).epistemic.mean().item()
    for n in (2, 5):
        found = torch.stack([head.predict(x, n).epistemic.mean() for _ in range(400)])
        assert found.mean().item() == pytest.approx(exact * (1 - 1 / n), rel=0.05)


@every_case
def test_uncertainties_lie_between_nothing_and_the_total(weights, likelihood, options):
    head, x = tiny_head(weights, likelihood, **options).requires_grad_(False), 3 * batch(50)[0]
    for n_samples in (1, 2, 16, 33):
        _, total, epistemic = head.predict(x, n_samples)
        assert (
            (epistemic > -1e-5).all()
            and (epistemic < total + 1e-5).all()
            and (total < math.log(V) + 1e-5).all()
        )


@every_likelihood
@pytest.mark.parametrize("n_samples", [1, 3, draws.DRAWS_AT_ONCE + 1])
def test_log_probs_of_draws_have_the_gradients_of_the_slow_formula(likelihood, n_samples):
    head, x = tiny_head("bayes", likelihood), batch(2, 3)[0].requires_grad_()
    inputs, found = [x, *head.parameters()], []
    for log_probs in (head.log_probs, lambda x, n: slow(head, x, n).logsumexp(0) - math.log(n)):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(log_probs(x, n_samples)[..., ::7].sum(), inputs))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()
