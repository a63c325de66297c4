"""The checks of tests/test_adding_a_head.py, for the soft-capped softmax of docs/heads.md.

They run in a copy of the repository that has this head: z -> c tanh(z / c), then softmax.
"""

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.nn import functional as F

from engine.base.errors import UserError
from engine.gpt2.exporting import unsupported_features
from engine.runs.checkpoint import load_model
from heads import LIKELIHOODS, Head, HeadConfig
from heads.head import N_DEFAULT_DRAWS
from tests.helpers import compiling, records, run, scores, tiny_gpt, tiny_head, write_words

V, C, CAP = 67, 16, 2.0  # a cap that bends most logits
SOFT = {"likelihood": "softcap", "logit_cap": CAP}
LOCAL = SOFT | {"weights": "bayes", "estimator": "local"}
SAMPLE = SOFT | {"weights": "bayes", "estimator": "sample"}


def batch(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, C, generator=generator), torch.randint(V, shape, generator=generator)


def slow_log_probs(logits: torch.Tensor) -> torch.Tensor:
    """float64."""
    return (CAP * torch.tanh(logits.double() / CAP)).log_softmax(-1)


def slow_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -slow_log_probs(logits).gather(-1, targets.unsqueeze(-1)).mean()


def sampled_log_probs(head: Head, x: torch.Tensor, n: int) -> torch.Tensor:
    """log p (n, ..., V) under n draws of the whole matrix, float64."""
    noise = torch.randn(n, V, C, dtype=torch.float64)
    weight = head.weights.weight.double() + head.weights.log_std.double().exp() * noise
    return slow_log_probs(torch.einsum("...c,nvc->n...v", x.double(), weight))


def bayes_head(**options) -> Head:
    """Widths at which averaging matters."""
    head = tiny_head(**LOCAL | options).requires_grad_(False)
    head.weights.log_std.fill_(-1.5)
    return head


@pytest.mark.parametrize("soft_labels", [False, True])
def test_loss_and_gradients_with_point_weights(soft_labels):
    head, (x, targets) = tiny_head(**SOFT, logit_bias="uniform"), batch(3, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    logits = x.double() @ head.weights.weight.double().T + head.bias.double()
    if soft_labels:
        ids, weights = torch.stack([targets, (targets + 1) % V], -1), torch.rand(3, 5, 2)
        weights /= weights.sum(-1, keepdim=True)
        ours = head.loss(x, ids, weights)
        slow = -(slow_log_probs(logits).gather(-1, ids) * weights).sum(-1).mean()
    else:
        ours, slow = head.loss(x, targets), slow_nll(logits, targets)
    assert ours.item() == pytest.approx(slow.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True
    ):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_the_bound_is_refused_and_names_the_estimator_to_use():
    with pytest.raises(UserError, match="estimator=local") as refusal:
        tiny_head(**SOFT, weights="bayes")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("options", [LOCAL, SAMPLE], ids=["local", "sample"])
@pytest.mark.parametrize("posterior", ["row", "full"])
def test_estimators_have_the_expected_loss_of_sampled_matrices(options, posterior):
    head, (x, targets) = (
        tiny_head(**options, posterior=posterior).requires_grad_(False),
        batch(3, 5),
    )
    found = torch.tensor([head.data_loss(x, targets).item() for _ in range(2000)])
    log_probs = sampled_log_probs(head, x, 2000)
    slow = -log_probs.gather(-1, targets.expand(2000, 3, 5).unsqueeze(-1)).mean((1, 2, 3))
    error = math.sqrt((found.var() + slow.var()).item() / 2000)
    assert abs(found.mean().item() - slow.mean().item()) < 5 * error


@pytest.mark.parametrize("options", [LOCAL, SAMPLE], ids=["local", "sample"])
def test_a_drawn_losss_gradients_are_those_of_the_formula_with_the_same_noise(options):
    head, (x, targets) = tiny_head(**options, prior_std=0.5), batch(3, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    torch.manual_seed(0)
    ours = head.data_loss(x, targets)
    torch.manual_seed(0)
    std = head.weights.log_std.double().exp()
    weight, x64 = head.weights.weight.double(), x.double()
    if options is SAMPLE:
        logits = x64 @ (weight + std * torch.randn(V, C)).T
    else:
        spread = (std.squeeze(1) * x64.norm(dim=-1, keepdim=True)) * torch.randn(3, 5, V)
        logits = x64 @ weight.T + spread
    slow = slow_nll(logits, targets)
    assert ours.item() == pytest.approx(slow.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True
    ):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("posterior", ["row", "full"])
@pytest.mark.parametrize(("n_samples", "n_draws"), [(400, 400), (-1, N_DEFAULT_DRAWS)])
def test_averages_are_those_of_sampled_matrices(posterior, n_samples, n_draws):
    head, (x, _) = bayes_head(posterior=posterior), batch(4)
    draws = sampled_log_probs(head, x, 5000).exp()
    expected, mean_weights = draws.mean(0), slow_log_probs(x @ head.weights.weight.T).exp()
    found = head.log_probs(x, n_samples).exp().double()
    error = draws.std(0) * math.sqrt(1 / n_draws + 1 / len(draws))
    assert ((found - expected).abs() < 5.5 * error + 1e-6).all()
    assert ((mean_weights - expected).abs() > 5.5 * error).any()
    torch.testing.assert_close(found.sum(-1), torch.ones(4).double(), atol=1e-5, rtol=0)


def test_the_mean_weights_predict_by_the_formula():
    head, (x, _) = bayes_head(), batch(4)
    expected = slow_log_probs(x @ head.weights.weight.T)
    torch.testing.assert_close(head.log_probs(x).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_samples", [0, 400, -1])
def test_epistemic_uncertainty_is_the_mutual_information_of_token_and_weights(n_samples):
    head, (x, _) = bayes_head(), batch(4)
    log_probs = sampled_log_probs(head, x, 5000)
    total = Categorical(logits=log_probs.logsumexp(0)).entropy()
    expected = total - Categorical(logits=log_probs).entropy().mean(0)
    found = head.predict(x, n_samples)
    torch.testing.assert_close(found.epistemic.double(), expected, rtol=0.1, atol=0)
    if n_samples:
        torch.testing.assert_close(found.total.double(), total, rtol=0.01, atol=0)


def test_formulas_are_replaced_by_the_same_draws_in_each_call():
    head, (x, _) = bayes_head(), batch(4)
    state = torch.get_rng_state()
    for n_samples in (0, -1):
        for a, b in zip(head.predict(x, n_samples), head.predict(x, n_samples), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


def test_biases_start_uniform_or_not_at_all_and_a_unigram_start_is_refused():
    for logit_bias in ("auto", "none", "uniform"):
        head = Head(HeadConfig(**SOFT, logit_bias=logit_bias), V, C)
        log_probs = head.log_probs(torch.zeros(C))
        torch.testing.assert_close(log_probs, torch.full((V,), -math.log(V)))
    with pytest.raises(UserError, match="logit_bias=uniform"):
        Head(HeadConfig(**SOFT, logit_bias="unigram"), V, C)


def test_export_is_refused():
    with pytest.raises(UserError, match="softcap"):
        unsupported_features(tiny_gpt(**SOFT))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


def test_it_trains_and_other_heads_neither_start_from_it_nor_it_from_them(data, tmp_path):
    for name, options in (("point", SOFT), ("bayes", LOCAL | {"kl_weight": 0.1})):
        run(data, tmp_path / name, **options)
        first, last = records(tmp_path / name, "val_nll")
        assert last["val_nll"] < 0.75 * first["val_nll"]
    softmax = run(data, tmp_path / "softmax", max_iters=1)
    once = {"max_iters": 1, "learning_rate": 0, "min_lr": 0}
    model = run(data, tmp_path / "on_own", **LOCAL, init_from=tmp_path / "point", **once)
    idx = torch.arange(10).unsqueeze(0)
    expected = load_model(tmp_path / "point").log_probs(idx)
    torch.testing.assert_close(model.eval().log_probs(idx), expected)
    assert softmax is not None
    for other in (
        {},
        {"likelihood": "smooth"},
        {"likelihood": "sigmoid"},
        SOFT | {"logit_cap": 9.0},
    ):
        with pytest.raises(UserError, match="softcap"):
            run(data, tmp_path / "no", **other, init_from=tmp_path / "point", **once)
    with pytest.raises(UserError, match="softcap"):
        run(data, tmp_path / "no", **SOFT, init_from=tmp_path / "softmax", **once)


@pytest.mark.parametrize("weights", ["point", "bayes"])
def test_evaluation_has_no_figures_of_other_likelihoods(weights):
    model = tiny_gpt(**LOCAL | {"weights": weights}, std=0.3)
    idx = torch.randint(V, (2, 17))
    found = scores(model, (idx[:, :-1], idx[:, 1:]))
    assert not {"nll_desmoothed", "perplexity_desmoothed", "log_sum_sigma"} & found.keys()
    assert ("mutual_information" in found) == (weights == "bayes")
    assert not hasattr(LIKELIHOODS["softcap"], "pos_weight")
    nll = slow_nll(model.lm_head.logits(model.hidden(idx[:, :-1])), idx[:, 1:])
    assert found["nll"] == pytest.approx(nll.item(), rel=1e-5)


@pytest.mark.parametrize("options", [SOFT, SAMPLE], ids=["point", "sample"])
def test_a_compiled_loss_has_the_gradients_of_the_eager_one(options):
    head, (x, targets) = tiny_head(**options, prior_std=0.5), batch(2, 5)
    inputs, found = [x.requires_grad_(), *head.parameters()], []
    with compiling():
        for loss in (torch.compile(head.loss), head.loss):
            torch.manual_seed(0)
            value = loss(x, targets)
            found.append([value, *torch.autograd.grad(value, inputs)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_no_logit_moves_the_prediction_beyond_the_cap():
    log_probs = LIKELIHOODS["softcap"](HeadConfig(**SOFT), V).log_probs(1e4 * torch.eye(V)[0])
    torch.testing.assert_close(log_probs, F.log_softmax(CAP * torch.eye(V)[0], -1))


def test_a_formula_of_ones_own_inherits_no_shortcut_of_another_one():
    own = {"log_probs": lambda self, logits: (logits / 2).log_softmax(-1)}
    with pytest.raises(TypeError, match="derive from Likelihood"):
        type("Own", (LIKELIHOODS["categorical"],), own)
