"""heads.py against the slow way of writing each formula, torch.distributions, torchbnn and
scipy.
"""

import math
import os

import pytest
import scipy.optimize
import torch
import torchbnn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from engine.base.errors import UserError
from heads import LIKELIHOODS, WEIGHTS, Head, HeadConfig
from heads.linear_loss import plain_loss
from tests.helpers import HEADS, compiling, tiny_head

V, C = 67, 16  # of tiny_head; at C = 8 torch.compile 2.13 happens to avoid its trap (see below)
BAYES = [weights for weights in WEIGHTS if weights != "point"]
EPS = 0.1  # the default label_smoothing
POSTERIORS = ["row", "full"]
every_posterior = pytest.mark.parametrize(
    ("weights", "posterior"), [(w, p) for w in BAYES for p in POSTERIORS]
)
every_head = pytest.mark.parametrize(("weights", "likelihood"), HEADS)
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)


def batch(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (*shape, C) and targets (shape)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, C, generator=generator), torch.randint(V, shape, generator=generator)


def dense_target(likelihood: str, targets: torch.Tensor) -> torch.Tensor:
    """The (..., V) target that the heads never build."""
    onehot = F.one_hot(targets, V).double()
    return (1 - EPS) * onehot + EPS / (V - 1) * (1 - onehot) if likelihood == "smooth" else onehot


def slow_nll(likelihood: str, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """nats per token, mean over the positions, in float64 with a dense target."""
    target, logits = dense_target(likelihood, targets), logits.double()
    if likelihood == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1).mean()
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def slow_bound(
    likelihood: str, mean: torch.Tensor, variance: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Jensen: the normaliser of mean + variance / 2, less the expected logits of the target."""
    shifted = mean + variance / 2
    normaliser = F.softplus(shifted).sum(-1) if likelihood == "sigmoid" else shifted.logsumexp(-1)
    return (normaliser - (dense_target(likelihood, targets) * mean).sum(-1)).mean()


def slow_loss(head: Head, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The whole loss of a head with a prior_std of 0.5, in float64, from its parameters' values."""
    parameters = {name: p.double() for name, p in head.named_parameters()}
    x, mean = x.double(), parameters["weights.weight"]
    logits = x @ mean.T + parameters.get("bias", 0.0)
    if head.config.weights == "point":
        return slow_nll(head.config.likelihood, logits, targets)
    std = parameters["weights.log_std"].exp().expand_as(mean)
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 0.5)).sum()
    bound = slow_bound(head.config.likelihood, logits, x.square() @ std.square().T, targets)
    return bound + head.config.kl_weight * kl / head.config.n_data


def draws(head: Head, n: int) -> torch.Tensor:
    """n whole weight matrices from the posterior, (n, V, C)."""
    mean, std = head.weights.weight, head.weights.log_std.exp()
    return Normal(mean, std.expand_as(mean)).sample((n,))


@every_head
@pytest.mark.parametrize("logit_bias", ["auto", "none", "uniform"])
def test_loss_and_its_gradients_are_those_of_the_slow_float64_formula(
    weights, likelihood, logit_bias
):
    head = tiny_head(weights, likelihood, logit_bias=logit_bias, prior_std=0.5, kl_weight=0.3)
    x, targets = batch(3, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    ours, slow = head.loss(x, targets), slow_loss(head, x, targets)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(slow.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True
    ):
        assert (a - b).norm() < 1e-5 * b.norm()


@every_likelihood
@every_posterior
def test_the_bound_lies_above_the_expected_nll_and_meets_it_for_narrow_posteriors(
    weights, posterior, likelihood
):
    head = tiny_head(weights, likelihood, posterior=posterior)
    x, targets = batch(3, 5)
    for log_std, relative_gap in ((-1.5, 0.2), (-3.5, 2e-3)):
        torch.nn.init.constant_(head.weights.log_std, log_std)
        bias = 0.0 if head.bias is None else head.bias
        losses = [slow_nll(likelihood, x @ w.T + bias, targets).item() for w in draws(head, 500)]
        expected, error = (
            torch.tensor(losses).mean().item(),
            torch.tensor(losses).std().item() / math.sqrt(500),
        )
        bound = head.data_loss(x, targets).item()
        assert expected - 4 * error < bound < expected * (1 + relative_gap) + 4 * error
        if log_std == -1.5:
            assert bound > expected + 4 * error


@pytest.mark.parametrize("prior_std", [0.02, 0.7, "empirical"])
@every_posterior
def test_kl_is_that_of_torch_distributions_and_of_torchbnns_weights(weights, posterior, prior_std):
    head = tiny_head(weights, posterior=posterior, prior_std=prior_std)
    mean, std = head.weights.weight, head.weights.log_std.exp().expand_as(head.weights.weight)
    prior = (
        (mean.square().mean() + std.square().mean()).sqrt().item()
        if prior_std == "empirical"
        else prior_std
    )
    kl = head.weights.kl().item()
    assert kl == pytest.approx(
        kl_divergence(Normal(mean, std), Normal(0.0, prior)).sum().item(), rel=1e-5
    )
    theirs = torchbnn.BayesLinear(0.0, prior, C, V, bias=False)
    with torch.no_grad():
        theirs.weight_mu.copy_(mean)
        theirs.weight_log_sigma.copy_(std.log())
    assert kl == pytest.approx(torchbnn.BKLLoss(reduction="sum")(theirs).item(), rel=1e-5)


@every_posterior
def test_the_empirical_prior_minimises_the_kl_over_prior_std(weights, posterior):
    empirical = tiny_head(weights, posterior=posterior).double()

    def kl(prior_std: float) -> float:
        return (
            tiny_head(weights, posterior=posterior, prior_std=prior_std)
            .double()
            .weights.kl()
            .item()
        )

    best = scipy.optimize.minimize_scalar(
        kl, bounds=(1e-3, 10), method="bounded", options={"xatol": 1e-9}
    )
    assert best.x**2 == pytest.approx(empirical.weights.second_moment().item(), rel=1e-3)
    assert best.fun == pytest.approx(empirical.weights.kl().item(), rel=1e-6)


@every_head
def test_loss_is_data_loss_plus_kl_by_weight_ramp_and_tokens(weights, likelihood):
    x, targets = batch(2, 3)
    head = tiny_head(weights, likelihood, kl_weight=0.25, n_data=500)
    for ramp in (0.0, 0.5, 1.0):
        head.kl_ramp.fill_(ramp)
        share = 0.25 / 500 * ramp * torch.as_tensor(head.weights.kl()).item()
        assert (head.loss(x, targets) - head.data_loss(x, targets)).item() == pytest.approx(
            share, abs=1e-5
        )
    assert (share > 0) == (weights in BAYES)
    assert "kl_ramp" not in head.state_dict()


@every_head
@pytest.mark.parametrize("n_samples", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_normalised_fp32_of_any_shape(weights, likelihood, n_samples, dtype):
    head, x = tiny_head(weights, likelihood), batch(2, 3)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        log_probs = head.log_probs((20 * x).to(dtype), n_samples)  # logits far apart
    assert log_probs.shape == (2, 3, V) and log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(2, 3), atol=2e-6, rtol=0)
    assert head.log_probs(x[0, 0]).shape == (V,)


def test_sigmoid_normalises_its_probabilities_and_not_their_odds():
    head, x = tiny_head(likelihood="sigmoid"), 5 * batch(2, 3)[0]
    logits = head.logits(x).double()
    sigma = logits.sigmoid()
    expected = (sigma / sigma.sum(-1, keepdim=True)).log()
    torch.testing.assert_close(head.log_probs(x).double(), expected, atol=1e-5, rtol=0)
    assert (expected - logits.log_softmax(-1)).abs().max() > 1
    torch.testing.assert_close(
        head.likelihood.log_sum_sigma(logits).double(), sigma.sum(-1).log(), atol=1e-5, rtol=0
    )


def test_given_exactly_one_acceptable_token_the_sigmoid_head_is_softmax():
    """V independent coins of which exactly one shows heads: which one is distributed as the softmax
    of the logits.
    """
    logits = 3 * torch.randn(V, generator=torch.Generator().manual_seed(0))
    sigmoid = LIKELIHOODS["sigmoid"](HeadConfig(likelihood="sigmoid"), V)
    alone = plain_loss(sigmoid, logits.expand(V, V), torch.arange(V).unsqueeze(-1))
    torch.testing.assert_close((-alone).log_softmax(0), logits.log_softmax(0), atol=1e-5, rtol=0)


def test_sigmoid_and_softmax_predict_the_same_where_every_probability_is_small():
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0)) - 20
    heads = {
        name: LIKELIHOODS[name](HeadConfig(likelihood=name), V)
        for name in ("categorical", "sigmoid")
    }
    predicted = {name: head.log_probs(logits) for name, head in heads.items()}
    torch.testing.assert_close(predicted["sigmoid"], predicted["categorical"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab_size", [V, 50257])
def test_a_uniform_sigmoid_head_starts_at_ln_V_plus_1(vocab_size):
    head = Head(HeadConfig(likelihood="sigmoid", logit_bias="uniform"), vocab_size, 1)
    loss = head.loss(torch.zeros(1, 3, 1), torch.tensor([[0, 1, vocab_size - 1]])).item()
    # sum softplus(-ln(V - 1)) = V ln(V / (V - 1)) = 1 + 1 / (2 V) + ..., less the logit, + ln(V -
    # 1)
    assert loss == pytest.approx(math.log(vocab_size) + 1, abs=1 / vocab_size)
    if vocab_size == 50257:
        assert round(loss, 3) == 11.825


@every_head
def test_a_unigram_start_predicts_the_unigram(weights, likelihood):
    head = tiny_head(weights, likelihood, logit_bias="unigram")
    frequencies = torch.rand(V, generator=torch.Generator().manual_seed(0)).pow(3) + 1e-4
    frequencies /= frequencies.sum()
    head.init_from_frequencies(frequencies)
    log_probs = head.log_probs(torch.zeros(C))
    torch.testing.assert_close(log_probs.exp(), frequencies, rtol=1e-5, atol=0)
    total, epistemic = head.predict(torch.zeros(C))[1:]
    assert total.item() == pytest.approx(-(frequencies * frequencies.log()).sum().item(), rel=1e-5)
    assert epistemic.item() == 0


@every_head
def test_a_bias_is_kept_only_where_the_options_ask_for_one(weights, likelihood):
    for logit_bias in ("auto", "unigram", "uniform", "none"):
        wanted = LIKELIHOODS[likelihood].default_bias if logit_bias == "auto" else logit_bias
        head = Head(HeadConfig(weights, likelihood, logit_bias=logit_bias, n_data=10), V, C)
        assert (head.bias is not None) == (wanted != "none")
        head.init_from_frequencies(torch.arange(1.0, V + 1) / torch.arange(1.0, V + 1).sum())
        assert head.bias is None or (len(head.bias.unique()) == 1) == (wanted == "uniform")


@pytest.mark.parametrize("weights", BAYES)
def test_a_posterior_starts_narrow_for_frequent_tokens_and_near_the_prior_for_absent_ones(weights):
    head = tiny_head(weights, prior_std=0.3, n_data=10**6, kl_weight=0.1)
    frequencies = torch.zeros(V)
    frequencies[:2] = torch.tensor([0.9, 0.1])
    head.init_from_frequencies(frequencies)
    std = head.weights.log_std.exp().squeeze(1)
    precision = 1 / 0.3**2 + 10**6 * torch.tensor([0.9, 0.1, 0.0]) / 0.1
    torch.testing.assert_close(std[:3], precision.rsqrt())
    assert std[-1].item() == pytest.approx(0.3)


def fitted_logits(likelihood: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """A distribution p (V,) and the free logits that minimise the loss on it, both float64."""
    counts = torch.arange(V) % 11 + 1
    targets = torch.arange(V).repeat_interleave(counts)
    parts = LIKELIHOODS[likelihood](HeadConfig(likelihood=likelihood, **options), V)
    logits = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], lr=0.5, max_iter=200, tolerance_grad=0, tolerance_change=0
    )

    def closure():
        optimizer.zero_grad()
        loss = plain_loss(parts, logits.expand(len(targets), V), targets.unsqueeze(-1)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (counts / counts.sum()).double(), logits.detach()


def test_at_the_optimum_the_sigmoids_are_the_probabilities_and_sum_to_1():
    p, logits = fitted_logits("sigmoid")
    torch.testing.assert_close(logits.sigmoid(), p, rtol=1e-3, atol=0)
    assert logits.sigmoid().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("likelihood", ["categorical", "smooth"])
def test_at_the_optimum_softmax_predicts_p_and_smooth_its_smoothed_form(likelihood):
    p, logits = fitted_logits(likelihood)
    expected = (1 - EPS) * p + EPS * (1 - p) / (V - 1) if likelihood == "smooth" else p
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=1e-3, atol=0)


@every_likelihood
def test_gradient_of_the_logits_is_prediction_minus_target_at_each_position(likelihood):
    logits, targets = torch.randn(5, V).requires_grad_(), batch(5)[1]
    parts = LIKELIHOODS[likelihood](HeadConfig(likelihood=likelihood), V)
    loss = plain_loss(parts, logits, targets.unsqueeze(-1)).mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    predicted = logits.sigmoid() if likelihood == "sigmoid" else logits.softmax(-1)
    expected = (predicted - dense_target(likelihood, targets)) / 5
    torch.testing.assert_close(gradient, expected.float(), atol=1e-7, rtol=1e-4)


@every_head
def test_padding_for_tensor_cores_changes_nothing(weights, likelihood):
    class OnCuda(torch.Tensor):
        is_cuda = True

    head, (x, targets) = tiny_head(weights, likelihood), batch(2, 3)
    assert V % 64 and not x.is_cuda
    padded = x.clone().as_subclass(OnCuda)
    assert (
        head.weights.logits(padded).shape == (2, 3, V)
        and head.weights.logits(padded).stride(-2) == 128
    )
    for value in (head.logits, head.log_probs, lambda x: head.loss(x, targets)):
        torch.testing.assert_close(value(padded).as_subclass(torch.Tensor), value(x))
    losses = [head.loss(x, targets), head.loss(padded, targets).as_subclass(torch.Tensor)]
    ours, theirs = (torch.autograd.grad(loss, list(head.parameters())) for loss in losses)
    torch.testing.assert_close(ours, theirs)


@every_likelihood
@every_posterior
def test_samples_of_the_logits_average_the_probabilities_of_sampled_weights(
    weights, posterior, likelihood
):
    head, x = tiny_head(weights, likelihood, posterior=posterior), batch(1)[0]
    bias = 0.0 if head.bias is None else head.bias
    with torch.no_grad():
        probs = head.log_probs(x, 4000).exp().squeeze()
        each = head.likelihood.log_probs(draws(head, 4000) @ x[0] + bias).exp()
        mean_weights = head.log_probs(x).exp().squeeze()
    error = each.std(0) * math.sqrt(2 / 4000)
    assert ((probs - each.mean(0)).abs() < 5 * error + 1e-6).all()
    assert ((mean_weights - each.mean(0)).abs() > 5 * error).any()


@every_likelihood
@every_posterior
def test_epistemic_uncertainty_is_the_mutual_information_of_token_and_weights(
    weights, posterior, likelihood
):
    head, x = tiny_head(weights, likelihood, posterior=posterior), batch(1)[0]
    with torch.no_grad():
        head.weights.log_std.sub_(2)
        bias = 0.0 if head.bias is None else head.bias
        log_probs = head.likelihood.log_probs(draws(head, 10_000) @ x[0] + bias).double()
        mean = log_probs.exp().mean(0)
        sampled = -(mean * mean.log()).sum() + (log_probs.exp() * log_probs).sum(-1).mean()
        _, total, epistemic = head.predict(x)
        predicted = head.log_probs(x)
    assert epistemic.item() == pytest.approx(sampled.item(), rel=0.04)
    assert total.item() == pytest.approx(
        torch.distributions.Categorical(logits=predicted).entropy().item(), rel=1e-5
    )


@every_likelihood
def test_point_weights_know_no_epistemic_uncertainty_and_need_no_samples(likelihood):
    head, x = tiny_head("point", likelihood), batch(2, 3)[0]
    assert head.predict(x).epistemic.tolist() == torch.zeros(2, 3).tolist()
    assert torch.equal(head.log_probs(x, 7), head.log_probs(x)) and head.weights.kl() == 0


@every_head
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_loss_has_the_gradients_of_the_eager_one(weights, likelihood, dtype):
    """torch.compile 2.13 loses the true token's part where it is gathered from other than the
    normaliser's logits.
    """
    if dtype == "bfloat16" and os.environ.get("SLOW_TESTS") != "1":
        pytest.skip("each compilation takes seconds; SLOW_TESTS=1 runs this one too")
    head, (x, targets) = tiny_head(weights, likelihood, prior_std=0.5), batch(2, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    with compiling(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        losses = torch.compile(head.loss)(x, targets), head.loss(x, targets)
        compiled, eager = (torch.autograd.grad(loss, inputs) for loss in losses)
    tolerance = 1e-5 if dtype == "float32" else 0.02
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance)
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "laplace"},
        {"likelihood": "softmax"},
        {"logit_bias": "bigram"},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"prior_std": 0},
        {"prior_std": -1.0},
        {"prior_std": "foo"},
        {"prior_std": math.nan},
        {"kl_weight": -1.0},
        {"posterior": "diagonal"},
        {"estimator": "exact"},
        {"pos_weight": 0.0},
        {"pos_weight": 1e-300},
        {"sum_penalty": -1.0},
        {"sum_penalty": math.inf},
        {"prior_std": 1e-200},
        {"prior_std": math.inf},
        {"prior_mean": math.nan},
        {"kl_weight": math.inf},
        {"posterior": "torchbnn", "estimator": "local"},
        {"weights": "bayes", "n_data": 0},
        {"weights": "bayes", "n_data": -5},
    ],
    ids=str,
)
def test_an_impossible_option_is_refused_in_one_line_that_names_it(options):
    with pytest.raises(UserError) as refusal:
        Head(HeadConfig(**options), V, C)
    assert "\n" not in str(refusal.value) and list(options)[-1] in str(refusal.value)
