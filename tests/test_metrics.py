"""Scores against scikit-learn, scipy and resampled documents; counts of TextStats."""

import numpy as np
import pytest
import torch

from engine.data.tokenizer import ByteTokenizer
from engine.eval.metrics import (
    Scores,
    bootstrap_weights,
    out_of_domain,
    spearman,
)
from engine.eval.table import ratio_se
from engine.eval.texts import TextStats
from engine.eval.validation import N_BINS

metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")
rng = np.random.default_rng(0)


def random_scores(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The scores of n tokens whose uncertainty is related to their errors."""
    g = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, generator=g).clamp(min=0.01)
    return {
        "nll": torch.rand(n, generator=g) * 10,
        "accuracy": (torch.rand(n, generator=g) < confidence.square()).float(),  # too confident
        "entropy": (1 - confidence) * 8 + torch.rand(n, generator=g),
        "confidence": confidence,
        "mutual_information": torch.rand(n, generator=g).pow(4),
    }


def scores_of(values, units, n_blocks: int = 1) -> Scores:
    columns = {name: value.double() for name, value in values.items()}
    blocks = torch.arange(n_blocks).repeat_interleave(len(units) // n_blocks)
    return Scores(columns, units, blocks)


def uncertainty(values, name: str) -> torch.Tensor:
    return 1 - values[name] if name == "confidence" else values[name]


@pytest.fixture(scope="module")
def few():
    """3,000 tokens, and the document of each: 26 documents of different lengths."""
    units = torch.from_numpy(rng.integers(0, 26, 3000) ** 2 // 26).sort().values
    _, numbers = units.unique(return_inverse=True)
    return random_scores(3000), numbers


@pytest.mark.parametrize("ties", [False, True])
def test_areas_under_risk_curves_are_those_of_sorted_tokens(few, ties):
    values, units = few
    if ties:
        values = values | {"entropy": values["entropy"].round()}
    _, group, n = values["entropy"].unique(return_inverse=True, return_counts=True)
    # among ties the order is random: each of them is wrong as often as they are on average
    wrong = 1 - values["accuracy"].double()
    rates = (torch.bincount(group, wrong) / n).repeat_interleave(n)
    k = torch.arange(1, len(units) + 1)
    aurc = (rates.cumsum(0) / k).mean()
    best = (wrong.sort().values.cumsum(0) / k).mean()
    found = scores_of(values, units).result()
    assert found["aurc"]["entropy"] == pytest.approx(aurc.item())
    assert found["augrc"]["entropy"] == pytest.approx((rates.cumsum(0) / len(k)).mean().item())
    prr = (wrong.mean() - aurc) / (wrong.mean() - best)
    assert found["prr"]["entropy"] == pytest.approx(prr.item())


def test_spearmans_correlation_is_scipys_with_ties():
    a, b = torch.rand(500).mul(20).round(), torch.rand(500)
    b += a / 30
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


@pytest.mark.parametrize("name", ["confidence", "entropy", "mutual_information", "nll"])
def test_auroc_of_ood_text_is_scikit_learns_for_tokens_and_blocks(name):
    domains = [random_scores(3000), random_scores(1000, seed=1)]
    scores = []
    for factor, values in zip((1, 0.9), domains, strict=True):
        values[name] *= factor
        values["entropy"] = values["entropy"].round()  # many ties
        n = len(values["nll"])
        scores.append(scores_of(values, torch.zeros(n).long(), n_blocks=n // 10))
    found = out_of_domain(*scores)["auroc"][name]
    for level in ("token", "block"):
        parts = [uncertainty(values, name) for values in domains]
        if level == "block":
            parts = [part.view(-1, 10).mean(1) for part in parts]
        labels = np.repeat([0, 1], [len(part) for part in parts])
        expected = metrics.roc_auc_score(labels, torch.cat(parts).numpy())
        assert found[level] == pytest.approx(expected, abs=1e-9)


def test_standard_errors_are_those_of_resampled_documents(few):
    values, units = few
    noise = torch.randn(len(units), generator=torch.Generator().manual_seed(1))
    other = scores_of(values | {"nll": values["nll"] + noise + 0.7}, units)
    scores = scores_of(values, units)
    result = scores.result()
    documents = [np.flatnonzero(units.numpy() == unit) for unit in range(result["n_units"])]
    n = len(documents)
    draws = {"nll": [], "ece": [], "ratio": []}
    for _ in range(2000):
        at = np.concatenate([documents[k] for k in rng.integers(0, n, n)])
        confidence = values["confidence"][at].double()
        bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
        gaps = torch.bincount(bins, confidence - values["accuracy"][at])
        draws["nll"].append(values["nll"][at].double().mean().item())
        draws["ece"].append(gaps.abs().sum().item() / len(at))
        draws["ratio"].append((noise[at].mean() + 0.7).exp().item())
    assert result["nll_se"] == pytest.approx(np.std(draws["nll"]), rel=0.12)
    assert result["ece_se"] == pytest.approx(np.std(draws["ece"]), rel=0.12)
    assert ratio_se(other, scores) == pytest.approx(np.std(draws["ratio"]), rel=0.12)


def test_bootstrap_weights_are_poisson_and_depend_on_the_unit_alone():
    weights = torch.stack([bootstrap_weights(unit) for unit in range(300)])
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    assert weights.var().item() == pytest.approx(1, abs=0.03)
    assert weights.sum(0).var().item() == pytest.approx(300, rel=0.2)  # units are independent
    assert torch.equal(weights[17], bootstrap_weights(17))


@pytest.mark.parametrize("size", [1, 100])
def test_words_bytes_and_documents_are_those_of_the_text_in_batches_of_any_size(size):
    tokenizer = ByteTokenizer()
    texts = ["Ein Bär  geht\nheim. ", "", "zwei", " \n drei vier", "fünf\u00a0sechs"]
    ids, expected = [], []
    for number, text in enumerate(texts):
        ids += [*tokenizer.encode(text).tolist(), tokenizer.eot]
        expected += [number] * (len(text.encode()) + 1)
    stats = TextStats(tokenizer, torch.full((300,), 1 / 300), n_documents=20)
    found = []
    for batch in torch.tensor(ids).split(size):
        found += stats.read(torch.zeros(1, len(batch)), batch[None])[0].tolist()
    assert found == expected
    assert stats.n_documents == len(texts)
    assert stats.n_words == sum(len(text.split()) for text in texts)
    assert stats.n_bytes == sum(len(text.encode()) for text in texts)
