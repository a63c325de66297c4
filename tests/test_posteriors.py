"""Bayesian weights against torch.distributions, scipy and torchbnn; Bayesian MLPs (bayes_mlp)
against copies of the model with drawn weights."""

import copy
import math

import pytest
import scipy.optimize
import torch
import torchbnn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from engine.runs.checkpoint import load_model
from heads import HeadConfig
from heads.weights import BayesLayer, BayesLinear
from tests.helpers import (
    assert_close_in_norm,
    assert_near,
    assert_same_loss,
    compiling,
    run,
    tiny_gpt,
    tiny_head,
    value_and_gradients,
)
from tests.test_head_options import slow_noise
from tests.test_heads import C, V, batch, every_likelihood, slow_nll
from tests.test_model import tokens


def slow_kl(layer, prior_std):
    """By torch.distributions, in float64."""
    mean = layer.weight.double()
    std = layer.log_std.double().exp().expand_as(mean)
    prior = Normal(layer.config.prior_mean, prior_std)
    return kl_divergence(Normal(mean, std), prior).sum()


# the posterior, its prior and its KL


@pytest.mark.parametrize(
    "posterior, prior_mean, prior_std",
    [
        ("row", 0.0, 0.05),
        ("full", -0.3, 0.7),
        ("torchbnn", 1.5, 0.1),
    ],
)
def test_kl_and_its_gradients_are_those_of_torch_distributions(posterior, prior_mean, prior_std):
    head = tiny_head("bayes", posterior=posterior, prior_mean=prior_mean, prior_std=prior_std)
    slow = slow_kl(head.weights, prior_std)
    assert_same_loss(head.weights.kl(), slow, head.parameters())


@pytest.mark.parametrize(
    "posterior, compiled",
    [
        ("row", False),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_the_kl_is_float64s_at_gpt2s_size(posterior, compiled):
    """A single fp32 norm of all weights makes it 91,000 nats too small, on a CPU."""
    torch.manual_seed(0)
    config = HeadConfig("bayes", posterior=posterior, prior_std=0.03, n_data=10**6)
    layer = BayesLinear(config, 50304, 768).requires_grad_(False)
    layer.log_std += 0.3 * torch.randn_like(layer.log_std)
    log_std = layer.log_std.double()
    mean_square = layer.weight.double().square().mean()
    second_moment = mean_square + torch.exp(2 * log_std).mean()
    log_ratio = 2 * (log_std.mean() - math.log(0.03))
    expected = 0.5 * layer.weight.numel() * (second_moment / 0.03**2 - 1 - log_ratio)
    if compiled:
        with compiling():
            kl = torch.compile(layer.kl)()
    else:
        kl = layer.kl()
    assert kl.item() == pytest.approx(expected.item(), rel=3e-6)


@pytest.mark.parametrize("posterior, prior_mean", [("row", 0.0), ("full", 0.4)])
def test_the_empirical_prior_is_the_one_of_least_kl_around_prior_mean(posterior, prior_mean):
    head = tiny_head("bayes", posterior=posterior, prior_mean=prior_mean)
    best = scipy.optimize.minimize_scalar(
        lambda log_std: slow_kl(head.weights, math.exp(log_std)).item(),
        bounds=(-5, 3),
        method="bounded",
    )
    std = head.weights.second_moment().sqrt().item()
    assert std == pytest.approx(math.exp(best.x), rel=1e-3)
    # at its minimum a KL has the gradient that it has for a fixed prior
    slow = slow_kl(head.weights, std)
    assert slow.item() == pytest.approx(best.fun, rel=1e-5)
    assert_same_loss(head.weights.kl(), slow, head.parameters(), 1e-4)


@pytest.mark.parametrize("posterior", ["row", "full"])
def test_float16_autocast_does_not_lose_the_variance_of_narrow_posteriors(posterior):
    head = tiny_head("bayes", posterior=posterior).requires_grad_(False)
    head.weights.log_std.fill_(math.log(1e-4))
    x = torch.randn(3, C)
    variances = (2 * head.weights.log_std.double()).exp().expand(V, C)
    with torch.autocast("cpu", torch.float16):
        found = head.weights.variance(x).double()
        epistemic = head.predict(x).epistemic
    expected = x.double().square() @ variances.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert (epistemic > 0).all()


# torchbnn: its layer as a posterior


@every_likelihood
def test_the_torchbnn_posteriors_loss_and_gradients_are_the_librarys(likelihood):
    options = {"prior_mean": 0.1, "prior_std": 0.2, "kl_weight": 0.3}
    head = tiny_head("bayes", likelihood, posterior="torchbnn", **options)
    x, targets = batch(3, 5)
    layer = torchbnn.BayesLinear(0.1, 0.2, C, V, bias=False)
    parameters = [head.weights.weight, head.weights.log_std]
    layer.weight_mu.data, layer.weight_log_sigma.data = parameters
    torch.manual_seed(7)
    logits = layer(x) if head.bias is None else layer(x) + head.bias
    kl = torchbnn.BKLLoss(reduction="sum")(layer).squeeze()
    theirs = slow_nll(likelihood, logits, targets) + 0.3 / 1000 * kl
    torch.manual_seed(7)
    ours = head.loss(x, targets)
    found = value_and_gradients(ours, parameters)
    expected = value_and_gradients(theirs, [layer.weight_mu, layer.weight_log_sigma])
    assert_close_in_norm(found, expected)


# the loss of a model, and its optimizer


@pytest.mark.parametrize(
    "weights, likelihood, bayes_mlp, prior_std",
    [
        ("point", "sigmoid", False, 0.2),
        ("point", "categorical", True, 0.2),
        ("bayes", "sigmoid", False, "empirical"),
        ("bayes", "smooth", True, "empirical"),
    ],
)
def test_a_models_loss_is_its_data_loss_plus_ramp_times_kl_weight_times_kl_per_token(
    weights, likelihood, bayes_mlp, prior_std
):
    options = {"prior_mean": 0.1, "prior_std": prior_std, "kl_weight": 0.25, "n_data": 500}
    model = tiny_gpt(weights, likelihood, bayes_mlp=bayes_mlp, **options)
    idx = tokens(2, 9)
    layers = model.bayes_layers()
    assert len(layers) == 4 * bayes_mlp + (weights == "bayes")
    kl = 0.0
    for layer in layers:
        # each layer has an empirical prior of its own
        std = layer.second_moment().sqrt().item() if prior_std == "empirical" else prior_std
        kl += slow_kl(layer, std).item()
    assert torch.as_tensor(model.kl()).item() == pytest.approx(kl, rel=1e-5)
    data_loss = model.lm_head.data_loss(model.hidden(idx), idx).item()
    for ramp in (0.0, 0.4):
        model.lm_head.kl_ramp.fill_(ramp)
        expected = pytest.approx(data_loss + ramp * 0.25 * kl / 500, rel=1e-6)
        loss, _ = model.scores(idx, idx)
        assert model(idx, idx).item() == expected and loss.item() == expected
    assert "lm_head.kl_ramp" not in model.state_dict()


# bayes_mlp


@pytest.mark.parametrize("estimator", ["bound", "local", "sample"])
@pytest.mark.parametrize("posterior", ["row", "full"])
def test_a_hidden_layer_adds_its_estimators_noise_in_training_alone(posterior, estimator):
    config = HeadConfig("bayes", posterior=posterior, estimator=estimator, n_data=10)
    torch.manual_seed(0)
    layer = BayesLayer(config, 6, 7, bias=True)
    torch.nn.init.normal_(layer.log_std, mean=-1.0, std=0.5)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 6)
    mean = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.eval()(x), mean)
    torch.manual_seed(1)
    found = layer.train()(x)
    torch.manual_seed(1)
    noise = slow_noise(layer, x, estimator == "sample").float()
    torch.testing.assert_close(found, mean + noise)


def with_drawn_mlps(model):
    """A copy whose MLPs' weights are a draw from their posteriors."""
    drawn = copy.deepcopy(model)
    for layer in drawn.bayes_layers():
        if isinstance(layer, BayesLayer):
            layer.weight += layer.log_std.exp() * torch.randn_like(layer.weight)
    return drawn


@pytest.mark.parametrize(
    "weights, posterior, estimator",
    [
        ("bayes", "row", "bound"),
        ("point", "full", "sample"),
    ],
)
def test_each_draw_of_a_prediction_has_matrices_that_all_its_positions_share(
    weights, posterior, estimator
):
    options = {"posterior": posterior, "estimator": estimator}
    model = tiny_gpt(weights, std=0.3, bayes_mlp=True, **options).requires_grad_(False)
    for layer in model.bayes_layers():
        layer.log_std.fill_(-1.3)  # so that the noise matters
    head = model.lm_head
    idx = tokens(2, 5)
    torch.manual_seed(0)
    found = model.log_probs(idx, 3)
    torch.manual_seed(0)
    log_probs = []
    for hidden in [with_drawn_mlps(model).hidden(idx) for _ in range(3)]:
        logits = head.logits(hidden)
        if weights == "bayes":
            std = head.weights.variance(hidden).sqrt()
            logits = logits + std * torch.randn(1, V)
        log_probs.append(head.likelihood.log_probs(logits))
    expected = torch.stack(log_probs).logsumexp(0) - math.log(3)
    assert_near(found, expected, 1e-4)
    assert (found - model.log_probs(idx)).abs().max() > 0.1
    assert len(model.hiddens(idx, 0)) == 1


# training end to end


def test_mlps_made_bayesian_start_around_their_weights_and_leave_the_heads_posterior(
    words_data, trained, tmp_path
):
    start = trained("bayes", "categorical")
    old = load_model(start)
    options = {"weights": "bayes", "bayes_mlp": True, "kl_weight": 0.5, "n_data": 300}
    no_step = {"max_iters": 1, "learning_rate": 0, "min_lr": 0}
    model = run(words_data, tmp_path, init_from=start, **options, **no_step)
    assert torch.equal(model.lm_head.weights.log_std, old.lm_head.weights.log_std)
    for ours, theirs in zip(model.transformer.h, old.transformer.h, strict=True):
        layer = ours.mlp.c_fc
        assert torch.equal(layer.weight, theirs.mlp.c_fc.weight)
        precision = 1 / layer.weight.square().mean() + 300 / 0.5
        std = precision.rsqrt().expand_as(layer.log_std)
        torch.testing.assert_close(layer.log_std.exp(), std)


@pytest.mark.parametrize(
    "options",
    [
        {"posterior": "torchbnn", "prior_std": 0.1},
        {"likelihood": "sigmoid", "bayes_mlp": True},
    ],
    ids=str,
)
def test_a_compiled_model_has_the_gradients_of_the_eager_one(options):
    model = tiny_gpt("bayes", std=0.2, n_layer=1, n_embd=16, **options).train()
    results = []
    with compiling():
        for forward in (torch.compile(model, backend="aot_eager"), model):
            torch.manual_seed(3)
            loss = forward(tokens(2, 8), tokens(2, 8))
            results.append(value_and_gradients(loss, model.parameters()))
    assert_close_in_norm(*results, 1e-4)
