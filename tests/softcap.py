"""The checks of test_adding_a_head.py, run in a copy of the repository that has the docs' head.

Its prediction is the softmax of c tanh(z / c).
"""

import math

import pytest
import torch
from torch.distributions import Categorical

from engine.gpt2.exporting import unsupported_features
from engine.runs.checkpoint import load_model
from heads import LIKELIHOODS, Head, HeadConfig
from heads.draws import DRAWS_AT_ONCE, NOISE_STEP
from heads.head import N_DEFAULT_DRAWS
from tests.helpers import (
    assert_near,
    assert_same_loss,
    records,
    refusal,
    run,
    scores,
    tiny_gpt,
    tiny_head,
)
from tests.test_head_options import drawn_logits
from tests.test_heads import C, OnCuda, V, batch

CAP = 2.0  # bends most logits
SOFT = {"likelihood": "softcap", "logit_cap": CAP}
LOCAL = SOFT | {"weights": "bayes", "estimator": "local"}
SAMPLE = SOFT | {"weights": "bayes", "estimator": "sample"}


def slow_log_probs(logits):
    return (CAP * torch.tanh(logits.double() / CAP)).log_softmax(-1)


def slow_nll(logits, targets):
    return -slow_log_probs(logits).gather(-1, targets.unsqueeze(-1)).mean()


@pytest.mark.parametrize("soft_labels", [False, True])
def test_loss_and_gradients_with_point_weights(soft_labels):
    head = tiny_head(**SOFT, logit_bias="uniform")
    x, targets = batch(3, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    logits = x.double() @ head.weights.weight.double().T + head.bias.double()
    if soft_labels:
        ids = torch.stack([targets, (targets + 1) % V], -1)
        weights = torch.rand(3, 5, 2).softmax(-1)
        ours = head.loss(x, ids, weights)
        slow = -(slow_log_probs(logits).gather(-1, ids) * weights).sum(-1).mean()
    else:
        ours = head.loss(x, targets)
        slow = slow_nll(logits, targets)
    assert_same_loss(ours, slow, inputs)


@pytest.mark.parametrize("options", [LOCAL, SAMPLE], ids=["local", "sample"])
def test_a_drawn_loss_has_the_gradients_of_the_formula_with_the_same_noise(options):
    head = tiny_head(**options)
    x, targets = batch(3, 5)
    inputs = [x.requires_grad_(), *head.parameters()]
    torch.manual_seed(0)
    ours = head.data_loss(x, targets)
    torch.manual_seed(0)
    slow = slow_nll(drawn_logits(head, x), targets)
    assert_same_loss(ours, slow, inputs)


@pytest.mark.parametrize("posterior", ["row", "full"])
@pytest.mark.parametrize("n_samples", [2 * DRAWS_AT_ONCE, -1, 0])
def test_predictions_and_uncertainties_are_those_of_draws(posterior, n_samples):
    head = tiny_head(**LOCAL, posterior=posterior).requires_grad_(False)
    x, _ = batch(4)
    n_draws = n_samples if n_samples > 0 else N_DEFAULT_DRAWS
    generator = torch.Generator().manual_seed(0)  # of the draws in place of a formula
    n_batches = n_draws // DRAWS_AT_ONCE
    n_numbers = V + NOISE_STEP * (DRAWS_AT_ONCE // 2 - 1)
    rows = [torch.randn(n_numbers, generator=generator) for _ in range(n_batches)]
    halves = [row.unfold(0, V, NOISE_STEP).unsqueeze(1) for row in rows]
    noise = [sign * half for half in halves for sign in (1, -1)]
    mean = x @ head.weights.weight.T
    std = head.weights.variance(x).sqrt()
    log_probs = slow_log_probs(mean + std * torch.cat(noise))
    average = log_probs.logsumexp(0) - math.log(n_draws)
    epistemic = Categorical(logits=average).entropy() - Categorical(
        logits=log_probs
    ).entropy().mean(0)
    expected = average if n_samples else slow_log_probs(mean)
    torch.manual_seed(0)
    found = head.predict(x, n_samples)
    assert_near(found.log_probs, expected)
    assert_near(found.epistemic, epistemic)
    assert (average - slow_log_probs(mean)).abs().max() > 0.1


def test_a_bias_starts_uniform_or_not_at_all():
    for logit_bias in ("auto", "none", "uniform"):
        head = Head(HeadConfig(**SOFT, logit_bias=logit_bias), V, C)
        log_probs = head.log_probs(torch.zeros(C))
        assert_near(log_probs, torch.full((V,), -math.log(V)))


def test_modes_that_need_a_formula_are_refused_and_an_alternative_is_named():
    assert "estimator=local" in refusal(tiny_head, **SOFT, weights="bayes")
    assert "logit_bias=uniform" in refusal(tiny_head, **SOFT, logit_bias="unigram")
    assert "softcap" in refusal(unsupported_features, tiny_gpt(**SOFT))


def test_it_trains_and_only_starts_from_its_own_weights(words_data, trained, tmp_path):
    for name, options in (("point", SOFT), ("bayes", LOCAL | {"kl_weight": 0.1})):
        run(words_data, tmp_path / name, **options)
        first, last = records(tmp_path / name, "val_nll")
        assert last["val_nll"] < 0.75 * first["val_nll"]
    own = tmp_path / "point"
    once = {"max_iters": 1, "learning_rate": 0, "min_lr": 0}
    model = run(words_data, tmp_path / "own", **LOCAL, **once, init_from=own)
    idx = torch.arange(10).unsqueeze(0)
    assert_near(model.eval().log_probs(idx), load_model(own).log_probs(idx))
    softmax = trained("point", "categorical")
    for start, options in (
        (own, {}),
        (own, {"likelihood": "sigmoid"}),
        (own, SOFT | {"logit_cap": 9.0}),
        (softmax, SOFT),
    ):
        assert "softcap" in refusal(
            run, words_data, tmp_path / "refused", **options, **once, init_from=start
        )


@pytest.mark.parametrize("weights", ["point", "bayes"])
def test_evaluation_has_no_figures_of_other_likelihoods(weights):
    model = tiny_gpt(**LOCAL | {"weights": weights}, std=0.3)
    idx = torch.randint(V, (2, 17))
    x, y = idx[:, :-1], idx[:, 1:]
    found = scores(model, (x, y))
    assert not {"nll_desmoothed", "perplexity_desmoothed", "log_sum_sigma"} & found.keys()
    assert ("mutual_information" in found) == (weights == "bayes")
    nll = slow_nll(model.lm_head.logits(model.hidden(x)), y)
    assert found["nll"] == pytest.approx(nll.item(), rel=1e-5)


def test_another_formula_inherits_no_shortcuts():
    with pytest.raises(TypeError, match="Likelihood"):
        type("Own", (LIKELIHOODS["categorical"],), {"log_probs": lambda self, logits: logits})


def test_padding_is_cut_off_because_minus_infinity_would_count():
    head = tiny_head("point", "softcap", logit_cap=CAP)
    x, targets = batch(2, 3)
    loss = head.loss(x.clone().as_subclass(OnCuda), targets).as_subclass(torch.Tensor)
    assert_same_loss(loss, head.loss(x, targets), head.parameters())
