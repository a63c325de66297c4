"""The kron posterior: a matrix normal, against torch.distributions; its fit, against formulas."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MultivariateNormal, kl_divergence

from engine.base.options import load_config
from engine.data.tokens import TokenFile
from engine.runs.checkpoint import load_model
from engine.runs.fit import moments
from heads import Head, HeadConfig
from tests.helpers import (
    ONE,
    assert_close_in_norm,
    difference,
    flags,
    refusal,
    run,
    run_script,
    same_weights,
    scores_of,
    write_nanogpt,
)
from train import TrainConfig

V, C = 7, 5


def kron_head(likelihood: str = "categorical", **options) -> Head:
    """A head with a covariance of the columns far from the identity, its trace C."""
    torch.manual_seed(0)
    options = {"posterior": "kron", "n_data": 1000} | options
    head = Head(HeadConfig("bayes", likelihood, **options), V, C)
    with torch.no_grad():
        head.weights.weight.normal_()
        head.weights.log_std.normal_(-1, 0.3)
        root = torch.randn(C, C, dtype=torch.float64)
        covariance = root @ root.T + 0.1 * torch.eye(C)
        covariance *= C / covariance.trace()
        head.weights.column_factor.copy_(torch.linalg.cholesky(covariance))
    return head


def as_normal(head: Head) -> MultivariateNormal:
    """The posterior of all V * C weights, row by row."""
    weights = head.weights
    factor = weights.column_factor.double()
    variances = torch.exp(2 * weights.log_std.double()).squeeze(1)
    covariance = torch.kron(variances.diag(), factor @ factor.T)
    return MultivariateNormal(weights.weight.double().flatten(), covariance)


def test_variance_of_the_logits_is_that_of_the_matrix_normal():
    head, x = kron_head(), torch.randn(4, C)
    covariance = as_normal(head).covariance_matrix
    for i in range(4):
        rows = torch.kron(torch.eye(V), x[i : i + 1]).double()
        expected = (rows @ covariance @ rows.T).diagonal()
        assert torch.allclose(head.weights.variance(x[i]).double(), expected, rtol=1e-5)
    shares = torch.rand(4, V)
    by_hand = (shares * head.weights.variance(x)).sum(-1)
    assert torch.allclose(head.weights.weighted_variance(x, shares), by_hand, rtol=1e-5)


@pytest.mark.parametrize("prior_std", [0.7, "empirical"])
def test_kl_is_that_of_torch_distributions(prior_std):
    head = kron_head(prior_std=prior_std)
    posterior = as_normal(head)
    second_moment = posterior.mean.square().mean() + posterior.variance.mean()
    variance = second_moment if prior_std == "empirical" else torch.tensor(prior_std**2)
    prior = MultivariateNormal(torch.zeros(V * C).double(), variance * torch.eye(V * C).double())
    expected = kl_divergence(posterior, prior).item()
    assert head.weights.kl().item() == pytest.approx(expected, rel=1e-5)


def test_draws_have_the_covariance_of_the_matrix_normal():
    head = kron_head()
    draws = torch.stack([head.weights.draw().flatten() for _ in range(20000)]).double()
    expected = as_normal(head).covariance_matrix
    assert (draws.T @ draws / len(draws) - expected).abs().max() < 0.03 * expected.max()


@pytest.mark.parametrize("likelihood", ["categorical", "sigmoid"])
def test_the_bound_is_the_loss_at_logits_raised_by_half_their_variance(likelihood):
    head, x = kron_head(likelihood, kl_weight=0.0), torch.randn(1, 6, C, requires_grad=True)
    targets = torch.randint(V, (1, 6))
    loss = head.loss(x, targets)
    raised = head.logits(x) + head.weights.variance(x) / 2
    at_labels = head.logits(x).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = (head.likelihood.normaliser(raised) - at_labels).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, x)
    (by_hand,) = torch.autograd.grad(expected, x)
    assert torch.allclose(gradient, by_hand, atol=1e-6)


@pytest.mark.parametrize("n_samples", [-1, 400])
def test_averages_agree_with_draws_of_whole_matrices(n_samples):
    head, x = kron_head(), torch.randn(3, C)
    head.weights.log_std.data -= 1.5
    posterior = as_normal(head)
    torch.manual_seed(1)
    logits = posterior.sample((20000,)).view(-1, V, C) @ x.double().T
    expected = logits.softmax(1).mean(0).T
    found = head.log_probs(x, n_samples).exp().double()
    assert (found - expected).abs().max() < 0.03


def test_epistemic_uncertainty_is_the_mutual_information_under_the_exact_posterior():
    head, x = kron_head(), torch.randn(3, C)
    head.weights.log_std.data -= 2.5
    torch.manual_seed(1)
    logits = as_normal(head).sample((20000,)).view(-1, V, C) @ x.double().T
    draws = Categorical(probs=logits.softmax(1).transpose(1, 2))
    expected = Categorical(draws.probs.mean(0)).entropy() - draws.entropy().mean(0)
    assert_close_in_norm(head.predict(x).epistemic.double(), expected, 0.1)


@pytest.mark.parametrize("n_embd", [C, 1600])
def test_fitted_columns_are_the_inverse_second_moment_and_rows_laplaces(n_embd):
    options = {"posterior": "kron", "n_data": 1000, "kl_weight": 0.5, "prior_std": 0.3}
    weights = Head(HeadConfig("bayes", **options), V, n_embd).weights
    x = torch.randn(4000, n_embd, dtype=torch.float64) * torch.logspace(-2, 1, n_embd)
    second_moment = x.T @ x / len(x)
    frequencies = torch.rand(V)
    weights.fit_columns(second_moment, frequencies, damping=1e-3)
    damped = second_moment + 1e-3 * second_moment.trace() / n_embd * torch.eye(n_embd)
    factor = weights.column_factor.double()
    product = factor @ (factor.T @ damped)
    c = product.trace() / n_embd
    assert_close_in_norm(product / c, torch.eye(n_embd), 1e-3)
    variances = 1 / (1 / 0.3**2 + 1000 * frequencies * c / 0.5)
    assert_close_in_norm([torch.exp(2 * weights.log_std).squeeze(1)], [variances], 1e-3)


@pytest.fixture(scope="module")
def fitted(trained, tmp_path_factory):
    """likelihood -> the folder of a kron posterior fitted to a run with point weights."""
    folders = {}
    for likelihood in ("categorical", "sigmoid"):
        folders[likelihood] = tmp_path_factory.mktemp(likelihood)
        options = {"weights": "bayes", "likelihood": likelihood, "posterior": "kron"}
        options |= {"init_from": trained("point", likelihood), "max_iters": 0, "dtype": "float32"}
        # no dataset: the run's own
        run_script("train.py", *flags(**options, out_dir=folders[likelihood], device="cpu"))
    return folders


@pytest.mark.parametrize("likelihood", ["categorical", "sigmoid"])
def test_a_posterior_fitted_to_a_run_predicts_what_the_run_does(
    likelihood, fitted, trained, words_data
):
    test = TokenFile(str(words_data), "test")
    before = scores_of(load_model(trained("point", likelihood)), test)
    model = load_model(fitted[likelihood])
    after = scores_of(model, test)
    assert after["nll"] == pytest.approx(before["nll"], abs=1e-6)
    assert after["mutual_information"] > 0
    factor = model.lm_head.weights.column_factor
    assert (factor @ factor.T).trace().item() == pytest.approx(32, rel=1e-5)
    assert not torch.allclose(factor, torch.eye(32), atol=0.1)


def test_a_bayesian_training_ends_with_the_fit(words_data, tmp_path):
    options = {"weights": "bayes", "max_iters": 5, "kl_weight": 0.1}
    options["always_save_checkpoint"] = False  # the fit is saved nevertheless
    row = run(words_data, tmp_path / "row", **options)
    kron = run(words_data, tmp_path / "kron", **options, posterior="kron")
    assert difference(row.transformer, kron.transformer) < 1e-5
    factor = load_model(tmp_path / "kron").lm_head.weights.column_factor
    assert torch.equal(factor, kron.lm_head.weights.column_factor)
    assert not torch.equal(factor, torch.eye(32))


def test_a_fit_with_shards_is_refused():
    assert "--sharding=none" in refusal(
        load_config, TrainConfig, ["--weights=bayes", "--posterior=kron", "--sharding=fsdp"]
    )


def test_a_fit_in_bf16_is_near_that_in_fp32(fitted, trained, words_data, tmp_path):
    options = {"weights": "bayes", "posterior": "kron", "max_iters": 0, "dtype": "bfloat16"}
    model = run(words_data, tmp_path, **options, init_from=trained())
    factors = [m.lm_head.weights.column_factor for m in (model, load_model(fitted["categorical"]))]
    covariances = [factor @ factor.T for factor in factors]
    assert_close_in_norm(*covariances, 0.05)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_hidden_states_without_a_second_moment_are_refused(words_data, trained, value):
    model = load_model(trained())
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(value)
    train_file = TokenFile(words_data, "train")
    assert "hidden states" in refusal(moments, model, train_file, ONE, nullcontext(), 100)


def test_another_posterior_does_not_keep_the_fitted_stds(fitted, trained, words_data, tmp_path):
    row = {"weights": "bayes", "max_iters": 0}
    of_fitted = run(words_data, tmp_path / "a", **row, init_from=fitted["categorical"])
    of_trained = run(words_data, tmp_path / "b", **row, init_from=trained())
    assert same_weights(of_fitted, of_trained)


def test_too_little_text_for_a_fit_is_refused(tmp_path):
    ids = np.arange(200) % 20
    folder = write_nanogpt(tmp_path / "few", {"train": ids, "val": ids})
    assert str(20 * 32) in refusal(
        run, folder, tmp_path / "out", weights="bayes", posterior="kron", max_iters=0
    )
