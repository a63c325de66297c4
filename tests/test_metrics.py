"""MetricAccumulator against scikit-learn, numpy and resampled documents; counts of TextStats."""

import numpy as np
import pytest
import torch

from engine.data.tokenizer import ByteTokenizer
from engine.eval.metrics import (
    EDGES,
    MetricAccumulator,
    bootstrap_weights,
    out_of_domain,
)
from engine.eval.table import flat, ratio_se
from engine.eval.texts import TextStats
from engine.eval.validation import N_BINS

metrics = pytest.importorskip("sklearn.metrics")
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


def accumulate(values, units, size: int = 0, n_blocks: int = 1) -> MetricAccumulator:
    """Add the scores in batches of `size` tokens, which are n_blocks blocks each."""
    scores = MetricAccumulator()
    size = size or len(units)
    for i in range(0, len(units), size):
        batch = {name: value[i : i + size] for name, value in values.items()}
        scores.add(batch, units[i : i + size].view(n_blocks, -1))
    scores.n_units = len(units.unique())
    return scores


def uncertainty(values, name: str) -> torch.Tensor:
    return 1 - values[name] if name == "confidence" else values[name]


@pytest.fixture(scope="module")
def few():
    """3,000 tokens, and the document of each: 26 documents of different lengths."""
    units = torch.from_numpy(rng.integers(0, 26, 3000) ** 2 // 26).sort().values
    _, numbers = units.unique(return_inverse=True)
    return random_scores(3000), numbers


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("ties", [False, True])
def test_the_area_under_risk_and_coverage_is_that_of_sorted_tokens(few, name, ties):
    values, units = few
    if ties:
        values = values | {name: values[name].round(decimals=1)}
    _, group, n = uncertainty(values, name).unique(return_inverse=True, return_counts=True)
    # among ties the order is random: each of them is wrong as often as they are on average
    rates = torch.bincount(group, 1 - values["accuracy"].double()) / n
    risk = rates.repeat_interleave(n).cumsum(0) / torch.arange(1, len(units) + 1)
    found = accumulate(values, units).result()["aurc"][name]
    assert found == pytest.approx(risk.mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", [*EDGES, "nll"])
def test_auroc_of_ood_text_is_scikit_learns_for_tokens_and_blocks(name):
    domains = [random_scores(3000), random_scores(1000, seed=1)]
    scores = []
    for factor, values in zip((1, 0.9), domains, strict=True):
        values[name] *= factor
        values["entropy"] = values["entropy"].round()  # many ties
        units = torch.zeros(len(values["nll"])).long()
        scores.append(accumulate(values, units, size=100, n_blocks=10))
    found = out_of_domain(*scores)["auroc"][name]
    for level in ("token", "block"):
        parts = [uncertainty(values, name) for values in domains]
        if level == "block":
            parts = [part.view(-1, 10).mean(1) for part in parts]
        labels = np.repeat([0, 1], [len(part) for part in parts])
        expected = metrics.roc_auc_score(labels, torch.cat(parts).numpy())
        assert found[level] == pytest.approx(expected, abs=5e-4)


def test_the_size_of_the_batches_does_not_change_the_result(few):
    whole = accumulate(*few, n_blocks=30).result()
    in_batches = accumulate(*few, size=100).result()
    assert flat(whole) == pytest.approx(flat(in_batches), rel=1e-9)


def test_standard_errors_are_those_of_resampled_documents(few):
    values, units = few
    noise = torch.randn(len(units), generator=torch.Generator().manual_seed(1))
    other = accumulate(values | {"nll": values["nll"] + noise + 0.7}, units)
    scores = accumulate(values, units)
    result = scores.result()
    documents = [np.flatnonzero(units.numpy() == unit) for unit in range(scores.n_units)]
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
    weights = bootstrap_weights(list(range(300)))
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    assert weights.var().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(weights[17:18], bootstrap_weights([17]))


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
