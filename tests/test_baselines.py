"""Temperature, Mahalanobis distance and reducible loss, against scipy, scikit-learn and torch."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from engine.base.distributed import Processes
from engine.data.tokens import TokenFile
from engine.data.windows import windows
from engine.eval import baselines, evaluator
from engine.eval.evaluator import EvaluationConfig, Evaluator

covariance = pytest.importorskip("sklearn.covariance")
optimize = pytest.importorskip("scipy.optimize")
stats = pytest.importorskip("scipy.stats")


@pytest.fixture(scope="module")
def evaluated(trained):
    """An evaluation of a Bayesian run, compared with a softmax run: (evaluator, row, scores)."""
    better = str(trained("point", "categorical"))
    config = EvaluationConfig(better=better)
    run = Evaluator(str(trained("bayes", "categorical")), config, Processes(torch.device("cpu")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "N_PER_DIMENSION", 10**6)  # all of the training text
        return run, *run.scores()


def read(model, file: TokenFile, n_windows: int = 0):
    """Hidden states (n, C) and targets (n,) of a split in windows."""
    parts = list(windows(file, model.config.block_size, 8, n_windows))
    with torch.no_grad():
        hidden = torch.cat([model.hidden(part.x).flatten(0, 1) for part in parts])
    return hidden, torch.cat([part.y.flatten() for part in parts])


def test_the_temperature_minimises_the_nll_of_validation_text(evaluated, words_data):
    run, row, _ = evaluated
    n_windows = evaluator.VAL_TOKENS // run.block_size
    hidden, targets = read(run.model, TokenFile(words_data, "val"), n_windows)
    logits = run.model.lm_head.logits(hidden).detach().double()

    def nll(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits / temperature, targets).item()

    best = optimize.minimize_scalar(nll, bounds=(0.2, 5), method="bounded").x
    assert row["temperature"] == pytest.approx(best, rel=1e-3)


def test_tempered_scores_are_those_of_logits_divided_by_the_temperature(evaluated):
    run, row, scores = evaluated
    hidden, targets = read(run.model, run.file)
    p = (run.model.lm_head.logits(hidden) / row["temperature"]).softmax(-1).detach()
    onehot = torch.nn.functional.one_hot(targets, p.size(1))
    brier = (p - onehot).square().sum(1)
    assert torch.allclose(scores.columns["brier_tempered"], brier.double(), atol=1e-5)
    assert torch.allclose(scores.columns["confidence_tempered"], p.amax(1).double(), atol=1e-5)
    nll = -Categorical(p).log_prob(targets).mean().item()
    assert row["nll_tempered"] == pytest.approx(nll, rel=1e-4)


def test_mahalanobis_distance_is_scikit_learns(evaluated, words_data):
    run, _, scores = evaluated
    states, _ = read(run.model, TokenFile(words_data, "train"))
    hidden, _ = read(run.model, run.file)
    expected = covariance.EmpiricalCovariance().fit(states.double()).mahalanobis(hidden.double())
    found = scores.columns["mahalanobis"]
    # training text is read in blocks that leave the last tokens out
    assert stats.spearmanr(found, expected).statistic > 0.999
    assert found.mean() == pytest.approx(expected.mean(), rel=0.02)


def test_reducible_loss_is_the_kl_to_the_better_run_and_ranked_by_scipy(evaluated):
    run, row, scores = evaluated
    predictions = []
    for model in (run.better, run.model):
        hidden, _ = read(model, run.file)
        predictions.append(Categorical(logits=model.lm_head.logits(hidden).detach()))
    expected = kl_divergence(*predictions).double()
    assert torch.allclose(scores.columns["reducible"], expected, atol=1e-5)
    assert row["better"]["nats"] == pytest.approx(expected.mean().item(), rel=1e-4)
    for name, found in row["better"]["spearman"].items():
        uncertainty = scores.uncertainties()[name]
        assert found == pytest.approx(stats.spearmanr(uncertainty, expected).statistic, abs=1e-3)
    assert row["better"]["spearman"].keys() >= {"mutual_information", "mahalanobis"}
