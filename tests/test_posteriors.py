"""weights.py against torch.distributions, scipy and torchbnn's own layer; bayes_mlp against whole
sampled matrices.
"""

import math
import os
import shutil

import pytest
import scipy.optimize
import torch
import torchbnn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call

from engine.base.errors import UserError
from engine.base.optim import adamw
from engine.gpt2.loading import load_state
from engine.runs.checkpoint import load_model
from heads import LIKELIHOODS, Head, HeadConfig
from heads.weights import BayesLayer, BayesLinear
from model import GPT, GPTConfig
from tests.helpers import (
    HEADS,
    compiling,
    records,
    run,
    same_weights,
    tiny_gpt,
    tiny_head,
    write_words,
)
from tests.test_heads import C, V, batch, slow_nll

every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
every_posterior = pytest.mark.parametrize("posterior", ["row", "full", "torchbnn"])
own_posterior = pytest.mark.parametrize("posterior", ["row", "full"])
every_estimator = pytest.mark.parametrize("estimator", ["bound", "local", "sample"])


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def slow_kl(
    layer: BayesLinear, prior_std: float | torch.Tensor, prior_mean: float | None = None
) -> torch.Tensor:
    """By torch.distributions, in float64."""
    mean, std = layer.weight.double(), layer.log_std.double().exp().expand_as(layer.weight)
    centre = layer.config.prior_mean if prior_mean is None else prior_mean
    return kl_divergence(Normal(mean, std), Normal(centre, prior_std)).sum()


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def same_gradients(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> bool:
    return a.keys() == b.keys() and all(
        (a[name] - b[name]).norm() <= tolerance * b[name].norm() for name in a
    )


# the posterior, its prior and its KL


@every_posterior
@pytest.mark.parametrize(("prior_mean", "prior_std"), [(0.0, 0.05), (-0.3, 0.7), (1.5, 0.1)])
def test_kl_and_its_gradients_are_those_of_torch_distributions(posterior, prior_mean, prior_std):
    head = tiny_head("bayes", posterior=posterior, prior_mean=prior_mean, prior_std=prior_std)
    ours, slow = head.weights.kl(), slow_kl(head.weights, prior_std, prior_mean)
    assert ours.shape == () and ours.item() == pytest.approx(slow.item(), rel=1e-5)
    assert same_gradients(gradients(ours, head), gradients(slow, head))


@own_posterior
@pytest.mark.parametrize("prior_mean", [0.0, 0.05])
def test_the_kl_is_float64s_at_gpt2s_size_eager_and_compiled(posterior, prior_mean):
    """A single fp32 norm of all weights makes it 91,000 nats too small, on a CPU."""
    torch.manual_seed(0)
    n, width = 50304, 768
    options = {"posterior": posterior, "prior_mean": prior_mean, "n_data": 10**6}
    head = Head(HeadConfig("bayes", **options, prior_std=0.03), n, width)
    with torch.no_grad():
        head.weights.log_std += 0.3 * torch.randn_like(head.weights.log_std)
        eager, mean_square = head.weights.kl().item(), head.weights.mean_square()
        with compiling():
            compiled = torch.compile(head.weights.kl)().item()
        squares = (head.weights.weight.double() - prior_mean).square().mean()
        log_std = head.weights.log_std.double()
        second_moment = squares + torch.exp(2 * log_std).mean()
        log_ratio = 2 * log_std.mean() - 2 * math.log(0.03)
        kl = 0.5 * n * width * (second_moment / 0.03**2 - 1 - log_ratio).item()
    assert mean_square.item() == pytest.approx(squares.item(), rel=1e-6)
    assert eager == pytest.approx(kl, rel=3e-6)
    assert compiled == pytest.approx(kl, rel=3e-6)


@own_posterior
@pytest.mark.parametrize("prior_mean", [0.0, 0.4])
def test_the_empirical_prior_is_the_one_of_least_kl_around_prior_mean(posterior, prior_mean):
    head = tiny_head("bayes", posterior=posterior, prior_mean=prior_mean)
    best = scipy.optimize.minimize_scalar(
        lambda log_std: slow_kl(head.weights, math.exp(log_std), prior_mean).item(),
        bounds=(-5, 3),
        method="bounded",
    )
    ours, std = head.weights.kl(), head.weights.second_moment().sqrt().item()
    assert std == pytest.approx(math.exp(best.x), rel=1e-3)
    assert ours.item() == pytest.approx(best.fun, rel=1e-5)
    # at its minimum a KL has the gradient that it has for a prior that stays there
    assert same_gradients(
        gradients(ours, head), gradients(slow_kl(head.weights, std, prior_mean), head), 1e-4
    )


@every_posterior
def test_posteriors_differ_in_the_shape_of_log_std_alone(posterior):
    heads = {p: tiny_head("bayes", posterior=p, prior_std=0.1) for p in (posterior, "full")}
    shapes = [
        {name: tuple(t.shape) for name, t in head.state_dict().items()} for head in heads.values()
    ]
    assert shapes[0].keys() == shapes[-1].keys() == {"weights.weight", "weights.log_std"}
    assert shapes[0]["weights.log_std"] == ((V, 1) if posterior == "row" else (V, C))


def test_a_new_models_posteriors_start_from_its_own_weights():
    model = tiny_gpt("bayes", bayes_mlp=True, n_data=100)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.init_posteriors(torch.full((V,), 1 / V))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            before[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


# torchbnn: its layer's state, and the layer itself as a posterior


def torchbnn_layer(
    head: Head, prior_mean: float = 0.0, prior_std: float = 0.1
) -> torchbnn.BayesLinear:
    layer = torchbnn.BayesLinear(prior_mean, prior_std, C, V, bias=False)
    layer.load_state_dict(head.weights.to_torchbnn())
    return layer


@every_posterior
def test_a_torchbnn_layer_with_our_state_has_our_logits_for_the_same_noise_and_our_kl(posterior):
    options = {"prior_mean": 0.2, "prior_std": 0.3}
    head, x = tiny_head("bayes", posterior=posterior, estimator="sample", **options), batch(2, 3)[0]
    layer = torchbnn_layer(head, *options.values())
    layer.freeze()
    weight = head.weights.weight + head.weights.log_std.exp() * layer.weight_eps
    torch.testing.assert_close(layer(x), x @ weight.T)
    layer.unfreeze()
    logits = []
    ours = head.weights
    for noisy_logits in (
        layer,
        ours.noisy_logits if ours.samples_logits else lambda x: x @ ours.loss_terms(x)[1].T,
    ):
        torch.manual_seed(3)
        logits.append(noisy_logits(x))
    torch.testing.assert_close(*logits)
    theirs = torchbnn.functional.bayesian_kl_loss(layer, reduction="sum").item()
    assert head.weights.kl().item() == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("posterior", ["full", "torchbnn"])
def test_a_round_trip_by_torchbnn_is_exact(posterior):
    head = tiny_head("bayes", posterior=posterior, prior_std=0.1)
    other = Head(HeadConfig("bayes", posterior="full", n_data=10), V, C)
    other.weights.from_torchbnn(torchbnn_layer(head).state_dict())
    assert torch.equal(other.weights.weight, head.weights.weight)
    assert torch.equal(other.weights.log_std, head.weights.log_std)
    assert (
        isinstance(other.weights.weight, torch.nn.Parameter) and other.weights.weight.requires_grad
    )


def foreign_state(kind: str) -> dict[str, torch.Tensor]:
    """The state_dict of a layer that is not the one of a full posterior with V tokens and C
    channels.
    """
    shape = {"taller": (C, V + 1), "wider": (C + 1, V)}.get(kind, (C, V))
    layer = torchbnn.BayesLinear(0.0, 0.1, *shape, bias=kind == "bias")
    if kind == "frozen":
        layer.freeze()
    return layer.state_dict() if kind != "half" else {"weight_mu": layer.weight_mu}


@pytest.mark.parametrize("kind", ["bias", "frozen", "half", "taller", "wider", "row"])
def test_a_state_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(kind):
    head = tiny_head("bayes", posterior="row" if kind == "row" else "full")
    before = {name: t.clone() for name, t in head.state_dict().items()}
    with pytest.raises(UserError, match="torchbnn") as refusal:
        head.weights.from_torchbnn(foreign_state(kind))
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(t, before[name]) for name, t in head.state_dict().items())


@every_likelihood
def test_the_torchbnn_posteriors_loss_and_gradients_are_the_librarys(likelihood):
    options = {"prior_mean": 0.1, "prior_std": 0.2, "kl_weight": 0.3}
    head, (x, targets) = (
        tiny_head("bayes", likelihood, posterior="torchbnn", **options),
        batch(3, 5),
    )
    layer = torchbnn_layer(head, 0.1, 0.2)
    torch.manual_seed(7)
    logits = layer(x) if head.bias is None else layer(x) + head.bias
    theirs = (
        slow_nll(likelihood, logits, targets)
        + 0.3 / 1000 * torchbnn.BKLLoss(reduction="sum")(layer).squeeze()
    )
    torch.manual_seed(7)
    ours = head.loss(x, targets)
    assert ours.shape == () and ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    found, expected = gradients(ours, head), gradients(theirs, layer)
    names = {"weights.weight": "weight_mu", "weights.log_std": "weight_log_sigma"}
    assert same_gradients({names[n]: g for n, g in found.items() if n in names}, expected)


@every_likelihood
def test_a_torchbnn_posterior_predicts_as_a_full_one_with_its_weights(likelihood):
    ours, full = (
        tiny_head("bayes", likelihood, posterior=p, prior_std=0.1) for p in ("torchbnn", "full")
    )
    x = batch(2, 3)[0]
    full.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.logits(x), full.logits(x))
    torch.testing.assert_close(ours.weights.variance(x), full.weights.variance(x))
    assert not torch.equal(
        *(ours.weights.noisy_logits(x) for _ in range(2))
    )  # a draw for each loss
    for n_samples in (-1, 0, 4):
        predictions = []
        for head in (ours, full):
            torch.manual_seed(0)
            predictions.append(tuple(head.predict(x, n_samples)))
        torch.testing.assert_close(*predictions)


def test_a_torchbnn_head_stays_tied_to_the_embedding_through_a_step():
    model, full = (
        tiny_gpt("bayes", posterior=p, prior_std=0.1).train() for p in ("torchbnn", "full")
    )
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in full.named_parameters()]
    assert model.state_dict().keys() == full.state_dict().keys()
    before = [p.clone() for p in (model.transformer.wte.weight, model.lm_head.weights.log_std)]
    optimizer = adamw(model, 1e-2, (0.9, 0.95), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens(2, 16), tokens(2, 16, seed=2)).backward()
        optimizer.step()
    weights = model.lm_head.weights
    assert weights.weight is model.transformer.wte.weight
    for was, now in zip(before, (model.transformer.wte.weight, weights.log_std), strict=True):
        assert (was - now).abs().max() > 1e-3


def test_a_torchbnn_posterior_needs_a_prior_std_that_is_a_number():
    with pytest.raises(UserError, match="prior_std") as refusal:
        Head(HeadConfig("bayes", posterior="torchbnn", n_data=10), V, C)
    assert "\n" not in str(refusal.value)


# KL weight, ramp, weight decay


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
@pytest.mark.parametrize("bayes_mlp", [False, True])
def test_a_models_loss_is_its_data_loss_plus_ramp_times_kl_weight_times_kl_per_token(
    weights, likelihood, bayes_mlp
):
    options = {"prior_mean": 0.1, "prior_std": 0.2, "kl_weight": 0.25, "n_data": 500}
    model, idx, targets = (
        tiny_gpt(weights, likelihood, bayes_mlp=bayes_mlp, **options),
        tokens(2, 9),
        tokens(2, 9),
    )
    layers = [m for m in model.modules() if hasattr(m, "log_std")]
    assert len(layers) == 4 * bayes_mlp + (weights == "bayes")
    kl = sum(slow_kl(layer, 0.2, 0.1).item() for layer in layers)
    data_loss = model.lm_head.data_loss(model.hidden(idx), targets).item()
    for ramp in (0.0, 0.4, 1.0):
        model.lm_head.kl_ramp.fill_(ramp)
        assert model(idx, targets).item() == pytest.approx(
            data_loss + ramp * 0.25 * kl / 500, rel=1e-6
        )
        assert model.kl_loss().item() == pytest.approx(ramp * 0.25 * kl / 500, rel=1e-5)
    if not bayes_mlp:
        x = model.hidden(idx)
        assert model.lm_head.loss(x, targets).item() == pytest.approx(
            model(idx, targets).item(), rel=1e-6
        )


@pytest.mark.parametrize(
    ("posterior", "bayes_mlp"),
    [("row", False), ("row", True), ("full", False), ("full", True), ("torchbnn", False)],
)
def test_no_log_std_is_decayed_and_every_matrix_is(posterior, bayes_mlp):
    model = tiny_gpt("bayes", bias=True, prior_std=0.1, posterior=posterior, bayes_mlp=bayes_mlp)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = (
        {names[id(p)] for p in g["params"]}
        for g in adamw(model, 1e-3, (0.9, 0.95), 0.1).param_groups
    )
    stds = {name for name in names.values() if name.endswith("log_std")}
    assert len(stds) == (5 if bayes_mlp else 1) and stds <= kept
    assert decayed == {n for n, p in model.named_parameters() if p.dim() == 2} - stds


# bayes_mlp


def plain_twin(model: GPT) -> GPT:
    """A GPT without bayes_mlp and with the same means."""
    config = model.config
    twin = GPT(GPTConfig(**{**vars(config), "bayes_mlp": False})).eval()
    assert all(
        name.endswith("log_std")
        for name in twin.load_state_dict(model.state_dict(), strict=False)[1]
    )
    return twin


@pytest.mark.parametrize("bias", [False, True])
@every_estimator
def test_bayesian_mlps_are_noisy_in_training_and_a_plain_gpts_in_evaluation(estimator, bias):
    model = tiny_gpt("bayes", std=0.3, bayes_mlp=True, estimator=estimator, bias=bias)
    idx, twin = tokens(2, 9), plain_twin(model)
    torch.testing.assert_close(model.hidden(idx), twin.hidden(idx))
    torch.testing.assert_close(model.log_probs(idx), twin.log_probs(idx))
    assert torch.equal(model.hidden(idx), model.hidden(idx))
    model.train(), twin.train()
    assert torch.equal(twin.hidden(idx), twin.hidden(idx))
    assert (model.hidden(idx) - model.hidden(idx)).abs().max() > 1e-3
    assert torch.equal(model.eval().hidden(idx), model.hidden(idx))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", ["point", "bayes"])
def test_a_softmax_checkpoint_loads_into_bayesian_mlps_and_predicts_the_same(weights, bias):
    softmax = tiny_gpt(std=0.3, bias=bias)
    model = tiny_gpt(weights, bayes_mlp=True, bias=bias)
    missing = load_state(model, softmax.state_dict())
    linear = {
        f"transformer.h.{layer}.mlp.{part}" for layer in range(2) for part in ("c_fc", "c_proj")
    }
    assert set(missing) == {
        f"{n}.log_std" for n in linear | ({"lm_head.weights"} if weights == "bayes" else set())
    }
    ours, theirs = (
        {n: p.shape for n, p in m.state_dict().items() if not n.endswith("log_std")}
        for m in (model, softmax)
    )
    assert ours == theirs and (f"{min(linear)}.bias" in ours) == bias
    torch.testing.assert_close(model.log_probs(tokens(2, 9)), softmax.log_probs(tokens(2, 9)))


def test_a_bayesian_c_proj_keeps_its_scaled_initial_spread_and_biases_start_at_0():
    model = tiny_gpt(n_layer=3, n_embd=64, bayes_mlp=True, bias=True)
    for block in model.transformer.h:
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(
            0.02 / math.sqrt(2 * 3), rel=0.05
        )
        assert not block.mlp.c_fc.bias.any() and not block.mlp.c_proj.bias.any()


@own_posterior
@pytest.mark.parametrize("prior_std", [0.1, "empirical"])
@pytest.mark.parametrize("weights", ["point", "bayes"])
def test_a_models_kl_is_the_sum_over_its_layers(weights, posterior, prior_std):
    model = tiny_gpt(
        weights, std=0.3, bayes_mlp=True, posterior=posterior, prior_std=prior_std, prior_mean=0.05
    )
    layers = [part for block in model.transformer.h for part in (block.mlp.c_fc, block.mlp.c_proj)]
    layers += [model.lm_head.weights] if weights == "bayes" else []
    # each layer has an empirical prior of its own
    stds = [
        layer.second_moment().sqrt().item() if prior_std == "empirical" else prior_std
        for layer in layers
    ]
    expected = sum(slow_kl(layer, std).item() for layer, std in zip(layers, stds, strict=True))
    assert model.kl().item() == pytest.approx(expected, rel=1e-5)
    assert tiny_gpt().kl() == 0.0


@own_posterior
@every_estimator
def test_a_hidden_layers_noise_has_mean_0_and_variance_x2_by_std2(posterior, estimator):
    torch.manual_seed(0)
    layer = BayesLayer(
        HeadConfig("bayes", posterior=posterior, estimator=estimator, n_data=10), 6, 7, bias=True
    ).train()
    torch.nn.init.normal_(layer.log_std, mean=-1.0, std=0.5)
    torch.nn.init.normal_(layer.bias)
    x, n = torch.randn(2, 6), 20_000
    with torch.no_grad():
        # of "sample" a call has one matrix for all that is in it
        out = (
            torch.stack([layer(x) for _ in range(n // 4)])
            if estimator == "sample"
            else layer(x.expand(n, 2, 6))
        )
        variance = x.square() @ layer.log_std.exp().expand_as(layer.weight).square().T
        mean = x @ layer.weight.T + layer.bias
    assert ((out.mean(0) - mean).abs() < 5 * (variance / len(out)).sqrt()).all()
    assert ((out.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / len(out))).all()
    assert torch.allclose(layer.eval()(x), mean)
    # local: each position its own noise; sample: positions share the matrix
    covariance = ((out - mean)[:, 0] * (out - mean)[:, 1]).mean(0)
    shared = (
        (x[0] * x[1]) @ layer.log_std.exp().expand_as(layer.weight).square().T
        if estimator == "sample"
        else 0.0
    )
    assert ((covariance - shared).abs() < 6 * (variance.prod(0) / len(out)).sqrt()).all()


class LogProbs(torch.nn.Module):
    """functional_call wants a forward."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.model.log_probs(idx)


@torch.no_grad()
def draws_of_all_matrices(model: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    """The probabilities (n, B, T, V) under n draws of every Bayesian matrix of a model whose head
    is not tied.
    """
    parameters, draws = dict(model.named_parameters()), []
    names = [name.removesuffix("log_std") for name in parameters if name.endswith("log_std")]
    for _ in range(n):
        matrices = {}
        for name in names:
            mean, std = parameters[f"{name}weight"], parameters[f"{name}log_std"].exp()
            matrices[f"model.{name}weight"] = Normal(mean, std.expand_as(mean)).sample()
        draws.append(functional_call(LogProbs(model), matrices, (idx,)).exp())
    return torch.stack(draws)


def noisy_gpt(weights: str, std: float = 0.3, **options) -> GPT:
    model = tiny_gpt(weights, std=std, bayes_mlp=True, tie_head=False, n_embd=16, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("log_std"):
            torch.nn.init.constant_(parameter, -1.3)
    return model


def assert_same_mean(ours: torch.Tensor, draws: torch.Tensor, n: int) -> None:
    """ours: the mean of n independent draws, of the distribution of which draws are some more."""
    error = draws.std(0) * math.sqrt(1 / n + 1 / len(draws))
    z = (ours - draws.mean(0)) / error
    assert z.abs().max() < 5.5


@pytest.mark.parametrize(
    ("weights", "posterior", "estimator"), [("bayes", "row", "bound"), ("point", "full", "sample")]
)
def test_a_prediction_with_samples_averages_over_draws_of_all_weights(
    weights, posterior, estimator
):
    model, idx, n = noisy_gpt(weights, posterior=posterior, estimator=estimator), tokens(1, 4), 600
    torch.manual_seed(0)
    draws = draws_of_all_matrices(model, idx, n)
    with torch.no_grad():
        ours, mean_weights = model.log_probs(idx, n).exp(), model.log_probs(idx).exp()
    assert_same_mean(ours, draws, n)
    assert ((mean_weights - draws.mean(0)).abs() > 5 * draws.std(0) / math.sqrt(n)).any()


@every_estimator
def test_all_positions_of_a_prediction_share_the_drawn_matrices(estimator):
    """Noise that is drawn for each position is averaged away by attention; that of a matrix is
    not.
    """
    model, n = noisy_gpt("point", estimator=estimator), 600
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.h[1].attn.c_proj.weight.mul_(10)
        for part in (model.transformer.h[1].mlp.c_fc, model.transformer.h[1].mlp.c_proj):
            part.log_std.fill_(-4)
    idx = torch.full((1, 8), 5)
    torch.manual_seed(0)
    draws = draws_of_all_matrices(model, idx, n)
    with torch.no_grad():
        ours = model.log_probs(idx, n).exp()
    assert_same_mean(ours, draws, n)


def test_each_draw_of_a_prediction_has_hidden_states_of_its_own_and_the_mean_needs_one():
    model, plain, idx = noisy_gpt("bayes"), tiny_gpt("bayes"), tokens(2, 5)
    hiddens = model.hiddens(idx, 3)
    assert len(hiddens) == 3 and not torch.equal(hiddens[0], hiddens[1])
    for n_samples in (-1, 0):
        (hidden,) = model.hiddens(idx, n_samples)
        assert torch.equal(hidden, model.hidden(idx))
    assert len(plain.hiddens(idx, 3)) == 1


def test_sampling_ends_with_its_block_also_by_an_exception():
    model, idx = noisy_gpt("point"), tokens(1, 5)
    before = model.hidden(idx)
    with pytest.raises(ZeroDivisionError), model.sampling():
        assert not torch.equal(model.hidden(idx), before)
        raise ZeroDivisionError
    assert torch.equal(model.hidden(idx), before)
    with pytest.raises(ValueError):
        model.log_probs(tokens(1, 17), n_samples=2)
    assert torch.equal(model.hidden(idx), before)


@every_estimator
def test_gradient_checkpointing_draws_the_same_noise_again(estimator):
    results = []
    for gradient_checkpointing in (False, True):
        options = {
            "estimator": estimator,
            "gradient_checkpointing": gradient_checkpointing,
            "dropout": 0.2,
        }
        model = tiny_gpt("bayes", bayes_mlp=True, **options).train()
        torch.manual_seed(3)
        loss = model(tokens(2, 16), tokens(2, 16, seed=2))
        results.append([loss.detach(), *gradients(loss, model).values()])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_bayesian_mlps_need_n_data_under_any_head_and_have_no_torchbnn_layers():
    for weights in ("point", "bayes"):
        with pytest.raises(UserError, match="n_data") as refusal:
            tiny_gpt(weights, bayes_mlp=True, n_data=0)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="torchbnn") as refusal:
        GPTConfig(bayes_mlp=True, head=HeadConfig(posterior="torchbnn", prior_std=0.1))
    assert "\n" not in str(refusal.value)


# training end to end


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


END_TO_END = {
    "torchbnn": {"weights": "bayes", "posterior": "torchbnn", "prior_std": 0.1},
    "torchbnn x sigmoid": {
        "weights": "bayes",
        "likelihood": "sigmoid",
        "posterior": "torchbnn",
        "prior_std": 0.1,
    },
    "mlp": {"bayes_mlp": True},
    "mlp and head": {
        "bayes_mlp": True,
        "weights": "bayes",
        "posterior": "full",
        "estimator": "sample",
        "bias": True,
    },
}


@pytest.mark.parametrize("options", END_TO_END.values(), ids=END_TO_END)
def test_training_lowers_the_nll_and_resumes_bit_for_bit(data, tmp_path, options):
    options = options | {
        "kl_weight": 0.1,
        "warmup_iters": 10,
        "lr_decay_iters": 30,
        "eval_interval": 15,
    }
    whole = run(data, tmp_path / "whole", **options)
    nlls = [record["val_nll"] for record in records(tmp_path / "whole", "val_nll")]
    assert nlls[-1] < 0.8 * nlls[0]
    run(data, tmp_path / "parts", **options | {"max_iters": 15})
    assert same_weights(whole, run(data, tmp_path / "parts", **options, init_from="resume"))
    loaded = load_model(tmp_path / "whole")
    assert same_weights(whole, loaded) and torch.isfinite(torch.as_tensor(loaded.kl()))


def test_from_a_softmax_run_the_mlps_posteriors_start_around_its_weights(data, tmp_path):
    softmax = run(data, tmp_path / "softmax")
    options = {"bayes_mlp": True, "kl_weight": 0.5, "n_data": 300}
    model = run(
        data,
        tmp_path / "bayes",
        init_from=tmp_path / "softmax",
        max_iters=1,
        learning_rate=0,
        min_lr=0,
        **options,
    )
    for ours, theirs in zip(model.transformer.h, softmax.transformer.h, strict=True):
        for name in ("c_fc", "c_proj"):
            layer, weight = getattr(ours.mlp, name), getattr(theirs.mlp, name).weight
            assert torch.equal(layer.weight, weight)
            precision = 1 / weight.square().mean() + 300 / 0.5
            torch.testing.assert_close(
                layer.log_std.exp(), precision.rsqrt().expand_as(layer.log_std)
            )


def test_bayesian_mlps_on_a_bayesian_run_leave_the_heads_posterior_as_it_learned_to_be(
    data, tmp_path
):
    bayes = run(data, tmp_path / "bayes", weights="bayes")
    options = {
        "weights": "bayes",
        "bayes_mlp": True,
        "max_iters": 1,
        "learning_rate": 0,
        "min_lr": 0,
    }
    model = run(data, tmp_path / "mlp", init_from=tmp_path / "bayes", **options)
    assert torch.equal(model.lm_head.weights.log_std, bayes.lm_head.weights.log_std)


COMPILED = {
    "torchbnn": {"weights": "bayes", "posterior": "torchbnn", "prior_std": 0.1},
    "mlp": {"weights": "bayes", "likelihood": "sigmoid", "bayes_mlp": True},
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_has_the_gradients_of_the_eager_one(options, backend):
    if backend == "inductor":
        if os.environ.get("SLOW_TESTS") != "1":
            pytest.skip(
                "a whole model takes inductor half a minute; SLOW_TESTS=1 runs this one too"
            )
        if not shutil.which(os.environ.get("CXX", "g++")):
            pytest.skip("torch.compile on CPU needs a C++ compiler")
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    model = tiny_gpt(std=0.2, n_layer=1, n_embd=16, **options).train()
    results = []
    with inductor.patch(compile_threads=1, fallback_random=True):  # the noise of the eager model
        for forward in (torch.compile(model, backend=backend), model):
            torch.manual_seed(3)
            loss = forward(tokens(2, 8), tokens(2, 8, seed=2))
            results.append((loss.item(), gradients(loss, model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert same_gradients(results[0][1], results[1][1], 1e-4)


@pytest.mark.parametrize("posterior", ["row", "full"])
def test_float16_autocast_does_not_lose_the_variance_of_narrow_posteriors(posterior):
    head, x = tiny_head("bayes", posterior=posterior), torch.randn(3, 16)
    with torch.no_grad():
        head.weights.log_std.fill_(math.log(1e-4))
        slow = x.double().square() @ head.weights.log_std.double().exp().expand(67, 16).square().T
        with torch.autocast("cpu", torch.float16):
            variance, epistemic = head.weights.variance(x), head.predict(x).epistemic
    torch.testing.assert_close(variance.double(), slow, rtol=1e-4, atol=0)
    assert (epistemic > 0).all()
