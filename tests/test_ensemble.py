"""Ensembles and Monte Carlo dropout average probabilities over more than the head's weights."""

import pytest
import torch

from engine.eval.ensemble import Ensemble
from tests.helpers import refusal, tiny_gpt

IDS = torch.arange(24).view(3, 8)


@pytest.mark.parametrize(
    "weights, likelihood, n_samples",
    [
        ("point", "categorical", 0),
        ("bayes", "smooth", 0),
        ("bayes", "sigmoid", 5),
        ("bayes", "categorical", -1),
    ],
)
@torch.no_grad()
def test_an_ensemble_predicts_the_mean_of_its_members_probabilities(weights, likelihood, n_samples):
    members = [tiny_gpt(weights, likelihood, std=0.1) for _ in range(3)]
    for i, member in enumerate(members):
        member.transformer.wte.weight *= 1 + i
    torch.manual_seed(7)
    each = [member.lm_head.predict(member.hiddens(IDS, n_samples), n_samples) for member in members]
    torch.manual_seed(7)
    ensemble = Ensemble(members)
    found = ensemble.predict(ensemble.hiddens(IDS, n_samples), n_samples)
    probs = torch.stack([one.log_probs.exp() for one in each]).mean(0)
    total = -(probs * probs.log()).sum(-1)
    aleatoric = torch.stack([one.aleatoric for one in each]).mean(0)
    torch.testing.assert_close(found.log_probs, probs.log(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.total, total, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.aleatoric, aleatoric, atol=1e-4, rtol=1e-4)
    assert (found.epistemic > 0).all()


@pytest.mark.parametrize("options", [{"block_size": 8}, {"vocab_size": 65}, {"bayes_mlp": True}])
def test_members_must_read_and_predict_the_same_tokens(options):
    assert next(iter(options)) in refusal(Ensemble, [tiny_gpt(), tiny_gpt(**options)])


def test_monte_carlo_dropout_averages_passes_with_dropout_on_and_then_turns_it_off():
    model = tiny_gpt(dropout=0.4)
    model.mc_dropout = True
    torch.manual_seed(3)
    found = model.lm_head.predict(model.hiddens(IDS, 6), 6)
    assert not any(module.training for module in model.modules())
    model.train()
    torch.manual_seed(3)
    passes = [model.lm_head.log_probs(model.hidden(IDS)).exp() for _ in range(6)]
    expected = torch.stack(passes).mean(0)
    torch.testing.assert_close(found.log_probs.exp(), expected, atol=1e-6, rtol=1e-4)
    assert (found.epistemic > 0).all()
