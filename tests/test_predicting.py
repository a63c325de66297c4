"""Predictions and their uncertainty against many draws, soft labels against dense float64 targets,
and evaluate.py.
"""

import math
import runpy
import sys

import numpy as np
import pytest
import scipy.integrate
import torch
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

from engine.data.tokens import TokenFile
from engine.data.windows import windows
from heads import LIKELIHOODS, Head, HeadConfig
from heads.draws import entropy
from heads.likelihoods import expected_log_sigmoid
from tests.helpers import (
    HEADS,
    ROOT,
    compiling,
    run,
    scores,
    tiny_gpt,
    tiny_head,
    write_nanogpt,
    write_words,
)
from tests.test_heads import EPS, C, V, batch, draws

T = 16
every_head = pytest.mark.parametrize(("weights", "likelihood"), HEADS)
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
BAYESIAN = [  # likelihood, its options, posterior
    *((likelihood, {}, posterior) for likelihood in LIKELIHOODS for posterior in ("row", "full")),
    ("sigmoid", {"pos_weight": 5.0}, "row"),
    ("sigmoid", {"pos_weight": 0.3}, "full"),
]
every_bayesian = pytest.mark.parametrize(("likelihood", "options", "posterior"), BAYESIAN, ids=str)


def bayesian_head(likelihood: str, options: dict, posterior: str, log_std: float = -2.0) -> Head:
    """Its log_std spread around the given one."""
    head = tiny_head("bayes", likelihood, posterior=posterior, **options)
    with torch.no_grad():
        head.weights.log_std += log_std + 2
    return head.requires_grad_(False)


def slow_log_probs(head: Head, logits: torch.Tensor) -> torch.Tensor:
    """logits (..., V) of the likelihood as it was trained -> log p, float64."""
    logits = logits.double()
    if head.config.likelihood != "sigmoid":
        return logits.log_softmax(-1)
    p = (logits - math.log(head.config.pos_weight)).sigmoid()
    return (p / p.sum(-1, keepdim=True)).log()


# Head.log_probs and Head.predict


@every_head
@pytest.mark.parametrize("n_samples", [-1, 0, 1, 5])
def test_predict_has_the_log_probs_of_log_probs_and_entropies_that_add_up(
    weights, likelihood, n_samples
):
    head, x, found = tiny_head(weights, likelihood), batch(2, 3)[0], []
    for predict in (head.log_probs, head.predict):
        torch.manual_seed(0)
        found.append(predict(x, n_samples))
    log_probs, prediction = found
    assert torch.equal(prediction.log_probs, log_probs)
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(2, 3), atol=2e-6, rtol=0)
    torch.testing.assert_close(prediction.total, Categorical(logits=log_probs).entropy())
    torch.testing.assert_close(prediction.aleatoric + prediction.epistemic, prediction.total)
    assert (
        prediction.total.shape == prediction.epistemic.shape == prediction.aleatoric.shape == (2, 3)
    )
    nothing = weights == "point" or n_samples == 1  # one draw knows nothing of other ones
    assert (
        (prediction.epistemic.abs().max() < 1e-6)
        if nothing
        else (prediction.epistemic > 1e-3).all()
    )


@every_bayesian
def test_draws_give_the_entropies_of_sampled_matrices(likelihood, options, posterior):
    head, x, n_repeats, n = bayesian_head(likelihood, options, posterior, -1.2), batch(3)[0], 30, 40
    torch.manual_seed(0)
    bias = 0.0 if head.bias is None else head.bias
    ours, slow = [], []
    for _ in range(n_repeats):
        prediction = head.predict(x, n)
        ours.append(torch.stack([prediction.total, prediction.aleatoric, prediction.epistemic]))
        log_probs = slow_log_probs(head, x @ draws(head, n).mT + bias)  # (n, 3, V)
        total = Categorical(probs=log_probs.exp().mean(0)).entropy()
        aleatoric = Categorical(logits=log_probs).entropy().mean(0)
        slow.append(torch.stack([total, aleatoric, total - aleatoric]))
    ours, slow = torch.stack(ours).double(), torch.stack(slow)
    error = ((ours.var(0) + slow.var(0)) / n_repeats).sqrt()
    assert ((ours.mean(0) - slow.mean(0)).abs() < 4.5 * error).all()
    assert (slow.mean(0)[2] > 20 * error[2]).all()  # what there is to find is far above the noise


def errors(
    head: Head, x: torch.Tensor, n: int = 20_000
) -> tuple[dict[int, float], dict[int, float]]:
    """Of the sampling-free average (-1) and of the mean weights (0), against n draws of the logits:
    sum_v |p - p_v| and max_v |p / p_v - 1|, of the worst position.
    """
    torch.manual_seed(0)
    logits = Normal(head.logits(x), head.weights.variance(x).sqrt()).sample((n,))
    expected = slow_log_probs(head, logits).exp().mean(0)
    found = {n_samples: head.log_probs(x, n_samples).exp().double() for n_samples in (-1, 0)}
    absolute = {k: (p - expected).abs().sum(-1).max().item() for k, p in found.items()}
    return absolute, {k: (p / expected - 1).abs().max().item() for k, p in found.items()}


@every_bayesian
def test_the_average_without_sampling_is_within_2_percent_of_20000_draws_for_narrow_posteriors(
    likelihood, options, posterior
):
    """Narrow: logits with a std of 0.3 on average, 0.9 at most. 2 % of each token's probability."""
    head, x = bayesian_head(likelihood, options, posterior, -2.5), batch(4)[0]
    assert 0.2 < head.weights.variance(x).sqrt().mean() < 0.4
    absolute, relative = errors(head, x)
    assert relative[-1] < 0.02 < 0.05 < relative[0]
    assert absolute[-1] < 0.01 and absolute[-1] < absolute[0] / 3


@every_bayesian
def test_the_average_without_sampling_moves_under_4_percent_of_probability_for_wide_posteriors(
    likelihood, options, posterior
):
    """Wide: logits with a std of 0.85 on average; a token may then be off by 20 %, of the mean
    weights by half.
    """
    head, x = bayesian_head(likelihood, options, posterior, -1.5), batch(4)[0]
    assert 0.6 < head.weights.variance(x).sqrt().mean() < 1.0
    absolute, relative = errors(head, x)
    assert absolute[-1] < 0.04 and absolute[-1] < absolute[0] / 3
    assert relative[-1] < 0.2 < 0.4 < relative[0]


@every_bayesian
def test_the_average_without_sampling_is_the_mean_prediction_where_nothing_is_uncertain(
    likelihood, options, posterior
):
    head, x = bayesian_head(likelihood, options, posterior, -30.0), 3 * batch(2, 3)[0]
    torch.testing.assert_close(head.log_probs(x, -1), head.log_probs(x, 0), atol=1e-5, rtol=1e-5)
    expected = slow_log_probs(head, head.logits(x))
    torch.testing.assert_close(head.log_probs(x, -1).double(), expected, atol=1e-5, rtol=1e-5)
    for value in head.predict(x, -1)[1:], head.predict(x, 0)[1:]:
        torch.testing.assert_close(value[1], torch.zeros(2, 3), atol=1e-6, rtol=0)


@every_bayesian
def test_the_uncertainties_without_sampling_are_those_of_many_draws_for_narrow_posteriors(
    likelihood, options, posterior
):
    head, x = bayesian_head(likelihood, options, posterior, -2.5), batch(4)[0]
    torch.manual_seed(0)
    logits = Normal(head.logits(x), head.weights.variance(x).sqrt()).sample((20_000,))
    log_probs = slow_log_probs(head, logits)
    total = Categorical(probs=log_probs.exp().mean(0)).entropy()
    aleatoric = Categorical(logits=log_probs).entropy().mean(0)
    prediction = head.predict(x, -1)
    torch.testing.assert_close(prediction.total.double(), total, atol=0.01, rtol=0)
    torch.testing.assert_close(prediction.aleatoric.double(), aleatoric, atol=0.015, rtol=0)
    torch.testing.assert_close(
        prediction.epistemic.double(), total - aleatoric, atol=1e-3, rtol=0.12
    )


@every_likelihood
def test_point_heads_predict_the_same_with_any_number_of_samples(likelihood):
    head, x = tiny_head("point", likelihood), batch(2, 3)[0]
    expected = head.predict(x)
    for n_samples in (-1, 1, 3):
        assert torch.equal(head.log_probs(x, n_samples), expected.log_probs)
        for a, b in zip(head.predict(x, n_samples), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@every_head
def test_of_hidden_states_for_each_draw_the_probabilities_are_averaged(weights, likelihood):
    head = tiny_head(weights, likelihood).requires_grad_(False)
    if weights == "bayes":
        head.weights.log_std.fill_(-20)  # what varies is the hidden states
    xs = torch.randn(4, 2, 3, C, generator=torch.Generator().manual_seed(2))
    each = slow_log_probs(head, head.logits(xs))
    expected = each.exp().mean(0)
    torch.manual_seed(0)
    prediction = head.predict(list(xs), 4)
    torch.testing.assert_close(prediction.log_probs.exp().double(), expected, atol=1e-6, rtol=1e-4)
    total, aleatoric = (
        Categorical(probs=expected).entropy(),
        Categorical(logits=each).entropy().mean(0),
    )
    torch.testing.assert_close(prediction.total.double(), total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.aleatoric.double(), aleatoric, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    assert torch.equal(head.log_probs(list(xs), 4), prediction.log_probs)
    assert torch.equal(head.log_probs(tuple(xs[:1]), 0), head.log_probs(xs[0], 0))


@every_likelihood
def test_each_draw_adds_its_own_noise_to_its_own_hidden_states(likelihood):
    head = bayesian_head(likelihood, {}, "row", -1.5)
    xs, n = torch.randn(2, C, generator=torch.Generator().manual_seed(2)), 4000
    torch.manual_seed(0)
    ours = head.log_probs([xs[i % 2] for i in range(n)], n).exp().double()
    bias = 0.0 if head.bias is None else head.bias
    logits = torch.cat([draws(head, n // 2) @ x + bias for x in xs])
    each = slow_log_probs(head, logits).exp()
    assert ((ours - each.mean(0)).abs() < 5 * each.std(0) * math.sqrt(2 / n) + 1e-7).all()


@pytest.mark.parametrize(("std", "tolerance"), [(0.0, 1e-6), (0.3, 1e-4), (1.0, 0.03), (1.5, 0.12)])
def test_expected_log_sigmoid_is_the_integral(std, tolerance):
    """Three nodes: the relative error of E[sigmoid] grows with the std, most where the sigmoid is
    an exponential.
    """
    for mean in (-30.0, -8.0, -2.0, -0.5, 0.0, 1.0, 7.0):
        ours = expected_log_sigmoid(torch.tensor(mean), torch.tensor(std)).item()
        if std:

            def integrand(z, mean=mean):
                return torch.sigmoid(torch.tensor(z, dtype=torch.float64)).item() * math.exp(
                    -(((z - mean) / std) ** 2) / 2
                )

            around = (mean - 12 * std, mean + 12 * std)
            expected = scipy.integrate.quad(integrand, *around, epsabs=0)[0] / (
                std * math.sqrt(2 * math.pi)
            )
        else:
            expected = 1 / (1 + math.exp(-mean))
        assert abs(math.exp(ours - math.log(expected)) - 1) < tolerance, mean


def test_entropy_of_impossible_tokens_is_finite_and_right():
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    expected = torch.tensor([math.log(2), 0.0, math.log(4)])
    torch.testing.assert_close(entropy(p.log()), expected)
    torch.testing.assert_close(entropy(torch.tensor([0.0, -500.0, -1e30])), torch.zeros(()))


@every_likelihood
def test_entropies_are_fp32_under_autocast_as_log_probs_are(likelihood):
    head, x = tiny_head("bayes", likelihood), batch(2, 3)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        log_probs, total, epistemic = head.predict(x, 3)
    expected = Categorical(logits=log_probs).entropy()
    assert total.dtype == epistemic.dtype == torch.float32
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=0)


# likelihoods


def soft_batch(k: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (*shape, C), targets (*shape, K) with an id twice in each row where K > 2,
    weights of sum 1.
    """
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(V, (*shape, k), generator=generator)
    if k > 2:
        targets[..., 1] = targets[..., 0]
    weights = torch.rand(*shape, k, generator=generator)
    return (
        torch.randn(*shape, C, generator=generator),
        targets,
        weights / weights.sum(-1, keepdim=True),
    )


def dense(targets: torch.Tensor, label_weights: torch.Tensor) -> torch.Tensor:
    """(..., K) -> the (..., V) target, float64."""
    return (
        torch.zeros(*targets.shape[:-1], V)
        .double()
        .scatter_add(-1, targets, label_weights.double())
    )


def slow_soft_loss(head: Head, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The likelihood's part of the loss on a dense target (..., V), in float64; for a posterior
    Jensen's bound (and the penalty on its logits).
    """
    config, parameters = head.config, {name: p.double() for name, p in head.named_parameters()}
    x, weight = x.double(), parameters["weights.weight"]
    mean, half = x @ weight.T + parameters.get("bias", 0.0), torch.zeros(())
    if config.weights == "bayes":
        half = x.square() @ (2 * parameters["weights.log_std"]).exp().expand_as(weight).T / 2
    if config.likelihood != "sigmoid":
        if config.likelihood == "smooth":
            target = (1 - EPS) * target + EPS / (V - 1) * (1 - target)
        return ((mean + half).logsumexp(-1) - (target * mean).sum(-1)).mean()
    of_labels = (config.pos_weight - 1) * target * (F.softplus(mean + half) - mean)
    penalty = (
        config.sum_penalty
        * ((mean + half - math.log(config.pos_weight)).sigmoid().sum(-1) - 1).square()
    )
    return ((F.softplus(mean + half) - target * mean + of_labels).sum(-1) + penalty).mean()


SOFT = [(w, likelihood, {}) for w, likelihood in HEADS]
SOFT += [
    (w, "sigmoid", o)
    for w in ("point", "bayes")
    for o in ({"pos_weight": 4.0}, {"sum_penalty": 0.3})
]
SOFT += [("bayes", likelihood, {"posterior": "full"}) for likelihood in LIKELIHOODS]
SOFT += [("point", "sigmoid", {"pos_weight": 0.2, "sum_penalty": 0.1})]
every_soft = pytest.mark.parametrize(("weights", "likelihood", "options"), SOFT, ids=str)


@every_soft
@pytest.mark.parametrize("k", [1, 4])
def test_loss_and_gradients_of_soft_labels_are_those_of_the_dense_target(
    weights, likelihood, options, k
):
    head, (x, targets, label_weights) = (
        tiny_head(weights, likelihood, **options),
        soft_batch(k, 3, 5),
    )
    inputs = [x.requires_grad_(), *head.parameters()]
    ours = head.data_loss(x, targets, label_weights)
    slow = slow_soft_loss(head, x, dense(targets, label_weights))
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(slow.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True
    ):
        assert (a - b).norm() < 1e-5 * b.norm()


@every_soft
def test_one_label_of_weight_1_is_the_plain_loss(weights, likelihood, options):
    head, (x, targets) = tiny_head(weights, likelihood, **options), batch(3, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    soft = head.loss(x, targets.unsqueeze(-1), torch.ones(3, 5, 1))
    plain = head.loss(x, targets)
    assert soft.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(soft, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("pos_weight", [0.3, 1.0, 5.0])
def test_the_sigmoids_loss_of_a_set_is_torchs_binary_cross_entropy_with_the_multi_hot_target(
    pos_weight,
):
    head, x = tiny_head("point", "sigmoid", pos_weight=pos_weight), batch(3, 5)[0]
    order = torch.rand(3, 5, V, generator=torch.Generator().manual_seed(3)).argsort(-1)
    targets = order[..., :4]
    multi_hot = torch.zeros(3, 5, V).double().scatter(-1, targets, 1.0)
    weight = torch.tensor(pos_weight).double()
    slow = F.binary_cross_entropy_with_logits(
        head.logits(x).double(), multi_hot, pos_weight=weight, reduction="none"
    )
    ours = head.loss(x, targets, torch.ones(3, 5, 4))
    assert ours.item() == pytest.approx(slow.sum(-1).mean().item(), rel=1e-6)


@pytest.mark.parametrize("posterior", ["row", "full"])
def test_under_the_bound_the_penalty_is_on_the_sum_of_the_sigmoids_of_the_bound(posterior):
    x, targets = batch(3, 5)
    plain, penalised = (
        tiny_head("bayes", "sigmoid", posterior=posterior, sum_penalty=p) for p in (0.0, 0.3)
    )
    raised = (plain.logits(x) + plain.weights.variance(x) / 2).double()
    excess = (raised.sigmoid().sum(-1) - 1).square().mean().item()
    assert excess > 1
    difference = penalised.data_loss(x, targets).item() - plain.data_loss(x, targets).item()
    assert difference == pytest.approx(0.3 * excess, rel=1e-4)


@pytest.mark.parametrize("pos_weight", [0.2, 1.0, 5.0])
def test_the_bound_is_one_at_every_pos_weight_also_where_the_true_tokens_logit_alone_is_uncertain(
    pos_weight,
):
    head, x = (
        bayesian_head("sigmoid", {"pos_weight": pos_weight, "logit_bias": "none"}, "row", -9.0),
        batch(1)[0],
    )
    weight = torch.tensor(pos_weight).double()
    for target, log_std in (
        (t, s) for t in (head.logits(x).argmin(), head.logits(x).argmax()) for s in (-2.0, -1.0)
    ):
        head.weights.log_std[target] = log_std
        torch.manual_seed(0)
        logits = Normal(head.logits(x), head.weights.variance(x).sqrt()).sample((20_000,)).double()
        onehot = F.one_hot(target.expand(1), V).double().expand_as(logits)
        losses = F.binary_cross_entropy_with_logits(
            logits, onehot, pos_weight=weight, reduction="none"
        ).sum(-1)
        error = losses.std().item() / math.sqrt(len(losses))
        assert head.data_loss(x, target.expand(1)).item() > losses.mean().item() - 4 * error
        head.weights.log_std[target] = -9.0


@pytest.mark.parametrize("label_smoothing", [0.05, 0.3])
def test_desmoothed_inverts_smoothing_and_stays_finite_below_the_floor(label_smoothing):
    smooth = LIKELIHOODS["smooth"](
        HeadConfig(likelihood="smooth", label_smoothing=label_smoothing), V
    )
    generator = torch.Generator().manual_seed(0)
    p = (
        (2 * torch.randn(20, V, generator=generator)).softmax(-1).double().clamp(min=5e-3)
    )  # well above the kept half of the floor
    p = p / p.sum(-1, keepdim=True)
    q = (1 - label_smoothing) * p + label_smoothing * (1 - p) / (V - 1)
    torch.testing.assert_close(q.sum(-1), torch.ones(20).double())
    torch.testing.assert_close(smooth.desmoothed(q.log()).exp(), p, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        smooth.desmoothed(q.log().float()).exp().double(), p, rtol=2e-3, atol=0
    )
    below = (10 * torch.randn(20, V, generator=generator)).log_softmax(
        -1
    )  # as an untrained model may predict
    assert below.exp().min() < label_smoothing / (V - 1) / 1000
    found = smooth.desmoothed(below)
    assert (
        torch.isfinite(found).all() and torch.isfinite(smooth.desmoothed(torch.eye(V).log())).all()
    )
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(20), atol=1e-5, rtol=0)


def test_without_smoothing_there_is_nothing_to_undo_even_where_p_has_no_number():
    smooth, log_probs = (
        LIKELIHOODS["smooth"](HeadConfig(label_smoothing=0.0), V),
        torch.full((1, V), -200.0),
    )
    log_probs[0, 0] = 0.0
    assert torch.equal(smooth.desmoothed(log_probs), log_probs)


@pytest.mark.parametrize("scale", [2.0, 6.0])
def test_desmoothed_gives_the_perplexity_before_smoothing_at_gpt2s_vocabulary(scale):
    eps, n = 0.1, 50257
    smooth = LIKELIHOODS["smooth"](HeadConfig(likelihood="smooth", label_smoothing=eps), n)
    p = (scale * torch.randn(4, n, generator=torch.Generator().manual_seed(0))).double().softmax(-1)
    q = (1 - eps) * p + eps * (1 - p) / (n - 1)
    nll, found, plain = (
        -(p * x.log()).nan_to_num().sum(-1).mean().item()
        for x in (p, smooth.desmoothed(q.log()).exp(), q)
    )
    assert nll <= found < nll + 0.002 and plain > nll + (0.04 if scale > 2 else 0.01)


@pytest.mark.parametrize(
    "likelihood", ["smooth", "sigmoid"]
)  # categorical is smooth with an epsilon of 0
def test_compiled_gradients_of_soft_labels_are_those_of_the_eager_loss(likelihood):
    """Bayesian weights under the bound: where torch.compile 2.13 has its trap (see
    test_heads.py).
    """
    options = {"pos_weight": 2.0} if likelihood == "sigmoid" else {}
    head, (x, *labels) = (
        tiny_head("bayes", likelihood, prior_std=0.5, **options),
        soft_batch(4, 2, 5),
    )
    inputs = [x.requires_grad_(), *head.parameters()]
    with compiling():
        losses = torch.compile(head.loss)(x, *labels), head.loss(x, *labels)
        compiled, eager = (torch.autograd.grad(loss, inputs) for loss in losses)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


# engine.eval.evaluation


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A point run, a Bayesian one and one whose MLPs alone are Bayesian, on words."""
    root = tmp_path_factory.mktemp("runs")
    data = write_words(root / "data")
    run(data, root / "point", likelihood="smooth")
    run(data, root / "bayes", weights="bayes", n_data=3000)
    run(data, root / "mlp", bayes_mlp=True, n_data=3000)
    return root


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    ("weights", "n_samples"), [("point", 0), ("bayes", 0), ("bayes", -1), ("bayes", 3)]
)
def test_evaluate_reports_the_uncertainties_and_the_desmoothed_nll_where_they_exist(
    weights, likelihood, n_samples
):
    model, idx = tiny_gpt(weights, likelihood, std=0.3), torch.randint(V, (2, 17))
    if weights == "bayes":
        torch.nn.init.constant_(model.lm_head.weights.log_std, -2)
    x, y = idx[:, :-1], idx[:, 1:]
    found = scores(model, (x, y), n_samples=n_samples)
    bayesian = {"aleatoric", "mutual_information"}
    assert bayesian & found.keys() == (bayesian if weights == "bayes" else set())
    smooth = {"nll_desmoothed", "perplexity_desmoothed"}
    assert smooth & found.keys() == (smooth if likelihood == "smooth" else set())
    if weights == "bayes":
        assert found["aleatoric"] + found["mutual_information"] == pytest.approx(
            found["entropy"], rel=1e-5
        )
        assert found["mutual_information"] > 0.01
        if n_samples <= 0:  # without noise of its own
            with torch.no_grad():
                expected = model.lm_head.predict(model.hidden(x), n_samples)
            assert found["mutual_information"] == pytest.approx(
                expected.epistemic.mean().item(), rel=1e-4
            )
            assert found["aleatoric"] == pytest.approx(expected.aleatoric.mean().item(), rel=1e-4)
    if likelihood == "smooth" and n_samples <= 0:
        with torch.no_grad():
            q = model.log_probs(x, n_samples).exp().double()
        floor = EPS / (V - 1)
        p = (q - floor).clamp(min=0.01 * floor)
        p /= p.sum(-1, keepdim=True)
        nll = -p.gather(-1, y.unsqueeze(-1)).log().mean().item()
        assert found["nll_desmoothed"] == pytest.approx(nll, rel=1e-4)
        assert found["perplexity_desmoothed"] == pytest.approx(math.exp(nll), rel=1e-3)
        assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))


def test_evaluate_finds_what_bayesian_mlps_do_not_know_in_draws_of_them():
    model = tiny_gpt("point", std=0.3, bayes_mlp=True)
    for layer in model.bayes_layers():
        torch.nn.init.constant_(layer.log_std, -2)
    x = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(0))
    found = scores(model, (x, x), n_samples=16)
    with torch.no_grad(), model.sampling():
        torch.manual_seed(0)
        log_probs = torch.stack([model.log_probs(x) for _ in range(16)]).double()
    total = Categorical(probs=log_probs.exp().mean(0)).entropy().mean().item()
    aleatoric = Categorical(logits=log_probs).entropy().mean().item()
    assert (
        found["mutual_information"] == pytest.approx(total - aleatoric, rel=0.1)
        and total - aleatoric > 0.01
    )
    assert found["entropy"] == pytest.approx(total, rel=0.03)


def test_evaluates_figures_are_fp32_under_autocast():
    model, x = (
        tiny_gpt(std=0.3),
        torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(0)),
    )
    found = scores(model, (x, x), cast=torch.autocast("cpu", torch.bfloat16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        log_probs = model.log_probs(x).double()
    of_target = log_probs.gather(-1, x.unsqueeze(-1)).exp().mean().item()
    brier = log_probs.exp().square().sum(-1).mean().item() - 2 * of_target + 1
    assert found["brier"] == pytest.approx(brier, rel=1e-5)
    assert found["entropy"] == pytest.approx(
        Categorical(logits=log_probs).entropy().mean().item(), rel=1e-5
    )


def test_briers_sum_of_squares_is_exact_over_a_vocabulary_of_a_real_size():
    """An fp32 norm of 50,304 probabilities by Zipf's law has a square that is 3e-5 too small."""
    model = tiny_gpt(vocab_size=50304, n_layer=1, n_embd=4, logit_bias="uniform")
    with torch.no_grad():
        model.lm_head.weights.weight.zero_()
        model.lm_head.bias.copy_(-torch.arange(1, 50305.0).log())
    probs = (1 / torch.arange(1, 50305.0).double()).numpy()
    probs /= probs.sum()
    x = torch.full((1, 16), 40000)
    brier = (probs**2).sum() - 2 * probs[40000] + 1
    assert scores(model, (x, x))["brier"] - 1 == pytest.approx(brier - 1, rel=1e-5)


@pytest.mark.parametrize("n_full", [1, 10, 17])
def test_a_limited_split_is_that_many_blocks_evenly_spaced(tmp_path, n_full):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": np.arange(n_full * T + 5)}), "val")
    for limit in {min(limit, n_full) for limit in (1, 3, 10, 17)}:
        blocks = [
            pair
            for batch in windows(file, T, 4, limit)
            for pair in zip(batch.x, batch.y, strict=True)
        ]
        starts = [x[0].item() for x, _ in blocks]
        assert len(blocks) == limit and starts[0] == 0 and all(start % T == 0 for start in starts)
        gaps = {
            after - before for before, after in zip(starts, [*starts[1:], n_full * T], strict=True)
        }
        assert min(gaps) > 0 and max(gaps) - min(gaps) <= T
        assert all(
            x.tolist() == list(range(s, s + T)) for (x, _), s in zip(blocks, starts, strict=True)
        )
        assert all(torch.equal(y, x + 1) for x, y in blocks)


@pytest.mark.parametrize("n_tokens", [2, 9, 16])
def test_a_limit_above_what_is_there_leaves_a_short_split_as_it_is(tmp_path, n_tokens):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": np.arange(n_tokens)}), "val")
    blocks = [[batch.x.tolist() for batch in windows(file, T, 4, limit)] for limit in (0, 5)]
    assert blocks[0] == blocks[1] == [[list(range(n_tokens - 1))]]


# evaluate.py


@pytest.mark.parametrize(
    "option", ["--n_samples=-2", "--temperature=-0.1", "--temperature=nan", "--limit=-1"]
)
def test_evaluate_py_refuses_an_impossible_option_in_one_line_that_names_it(
    runs, monkeypatch, capsys, option
):
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", f"--out_dir={runs / 'bayes'}", "--device=cpu", option]
    )
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    error = capsys.readouterr().err.strip()
    assert (
        exit_.value.code == 2
        and option.split("=")[0].strip("-") in error
        and len(error.splitlines()) == 1
    )
