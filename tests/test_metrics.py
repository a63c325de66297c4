"""engine/eval/metrics.py against scikit-learn, torchmetrics and slow formulas; what a text says of
itself.
"""

import math

import numpy as np
import pytest
import torch

from engine.data.tokenizer import ByteTokenizer
from engine.data.tokens import TokenFile
from engine.eval import metrics as metrics_module
from engine.eval.metrics import (
    EDGES,
    N_FINE,
    MetricAccumulator,
    auroc,
    bootstrap_weights,
    fine_bin,
    out_of_domain,
)
from engine.eval.table import flat, ratio_se, tables
from engine.eval.texts import TextStats, first_document
from engine.eval.validation import N_BINS
from tests.helpers import write_nanogpt

metrics = pytest.importorskip("sklearn.metrics")
rng = np.random.default_rng(0)


def tokens(n: int, seed: int = 0, units: int = 25) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The scores of n tokens whose uncertainty is related to their errors; their units."""
    g = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, generator=g).clamp(min=0.01)
    values = {
        "nll": torch.rand(n, generator=g) * 10,
        "accuracy": (torch.rand(n, generator=g) < confidence.square()).float(),  # too confident
        "brier": torch.rand(n, generator=g) * 2,
        "entropy": (1 - confidence) * 8 + torch.rand(n, generator=g),
        "confidence": confidence,
        "mutual_information": torch.rand(n, generator=g).pow(4),
        "aleatoric": torch.rand(n, generator=g) * 8,
    }
    sizes = torch.randint(1, 2 * n // units, (units,), generator=g)
    numbers = torch.repeat_interleave(torch.arange(units), sizes)[:n]
    numbers = torch.cat([numbers, torch.full((n - len(numbers),), units)])
    return values, numbers


def tally_of(values, units, size: int = 0, rows: int = 1) -> MetricAccumulator:
    """Scores added in pieces of a size, each of so many blocks."""
    scores, size = MetricAccumulator(), size or len(units)
    for i in range(0, len(units), size):
        piece = {name: value[i : i + size] for name, value in values.items()}
        scores.add(piece, units[i : i + size].view(rows, -1))
    scores.n_units = len(units.unique())
    return scores


@pytest.fixture(scope="module")
def few():
    return tokens(3000)


def test_the_calibration_error_is_torchmetrics(few):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    values, *of_tokens = few
    found = tally_of(values, *of_tokens, size=7).result()["ece"]
    confidence, correct = values["confidence"], values["accuracy"].long()
    # a two-class problem whose likeliest class has this confidence, at least 1/2: of n - 1 further
    # classes as likely
    probs = torch.zeros(len(correct), 200).scatter_(
        1, torch.zeros(len(correct), 1).long(), confidence[:, None]
    )
    probs[:, 1:] = ((1 - confidence) / 199)[:, None]
    target = torch.where(correct == 1, 0, 1)
    expected = functional.multiclass_calibration_error(
        probs, target, num_classes=200, n_bins=15, norm="l1"
    )
    assert (probs.argmax(1) == 0).all() and found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("doubt", ["confidence", "entropy", "mutual_information"])
def test_risk_coverage_and_its_area_are_the_slow_ones(few, doubt):
    values, *of_tokens = few
    result = tally_of(values, *of_tokens).result()
    doubts = 1 - values[doubt] if doubt == "confidence" else values[doubt]
    wrong = 1 - values["accuracy"][doubts.argsort()].double().numpy()
    risk = wrong.cumsum() / np.arange(1, len(wrong) + 1)
    assert result["aurc"][doubt] == pytest.approx(risk.mean(), rel=1e-4)
    assert result["risk_coverage"]["risk"][doubt] == pytest.approx(risk[29::30].tolist(), abs=8e-3)


def test_among_ties_the_risk_is_that_of_a_random_order():
    values, *of_tokens = tokens(60)
    values["entropy"] = torch.tensor([1.0, 3.0, 2.0]).repeat(20)
    areas = []
    for _ in range(4000):
        order = np.lexsort((rng.random(60), values["entropy"].numpy()))
        wrong = 1 - values["accuracy"].double().numpy()[order]
        areas.append((wrong.cumsum() / np.arange(1, 61)).mean())
    error = np.std(areas) / math.sqrt(len(areas))
    assert tally_of(values, *of_tokens).result()["aurc"]["entropy"] == pytest.approx(
        np.mean(areas), abs=5 * error
    )


@pytest.mark.parametrize("doubt", ["confidence", "entropy", "mutual_information", "nll"])
def test_foreign_text_is_told_apart_as_scikit_learn_does_it(few, doubt):
    own, foreign = few[0], dict(tokens(1000, seed=1)[0])
    foreign["entropy"], foreign["nll"] = foreign["entropy"] * 1.3, foreign["nll"] + 1
    foreign["confidence"] = foreign["confidence"].square().clamp(min=0.01)
    tallies = [tally_of(v, torch.zeros(len(v["nll"])).long(), 100, 10) for v in (own, foreign)]
    found = out_of_domain(*tallies)
    for level in ("token", "block"):
        doubts = [1 - v[doubt] if doubt == "confidence" else v[doubt] for v in (own, foreign)]
        if level == "block":
            doubts = [d.view(-1, 10).mean(1) for d in doubts]
        labels = np.repeat([0, 1], [len(d) for d in doubts])
        expected = metrics.roc_auc_score(labels, torch.cat(doubts).numpy())
        assert found["auroc"][doubt][level] == pytest.approx(expected, abs=5e-4)


def test_doubts_that_are_all_the_same_tell_nothing():
    same = torch.zeros(N_FINE).double()
    same[7] = 5
    assert auroc(same, same) == 0.5


def test_auroc_counts_a_tie_half():
    own, foreign = torch.zeros(2, N_FINE).double()
    own[100], own[300], foreign[200], foreign[400] = 19, 1, 5, 5
    assert auroc(own, foreign) == pytest.approx(0.975)
    own[100], own[200], own[300] = 0, 20, 0
    assert auroc(own, foreign) == pytest.approx(0.75)


def test_histograms_are_numpys_of_the_doubts_themselves(few):
    found = tally_of(*few).result()["histograms"]
    assert found.keys() == EDGES.keys()
    for name, edges in EDGES.items():
        expected = np.histogram(few[0][name].numpy().clip(edges[0], edges[-1]), edges)[0] / 3000
        assert found[name]["share"] == pytest.approx(expected.tolist(), abs=1e-9), name


def test_a_resampled_text_without_any_of_the_few_units_is_left_out():
    values, _ = tokens(10, units=4)
    units = next(
        u for k in range(10**6) if not bootstrap_weights(u := list(range(k, k + 10))).sum(0).all()
    )
    assert not bootstrap_weights(units).sum(0).all()
    result = tally_of(values, torch.tensor(units)).result()
    errors = [value for name, value in result.items() if name.endswith("_se")]
    assert len(errors) == 2 and all(0 < error < math.inf for error in errors)


def test_places_keep_the_order_and_tell_apart_what_differs_by_a_thousandth():
    doubts = (
        torch.cat([torch.logspace(-11, 2, 6000), torch.tensor([0.0, 1e-30, 300.0, 1e9])])
        .sort()
        .values
    )
    places = fine_bin(doubts)
    assert (places.diff() >= 0).all() and places[0] == 0 and places[-1] == N_FINE - 1
    assert (fine_bin(torch.tensor([1.0, 1.001])).diff() > 0).all()


def test_whatever_the_pieces_and_their_order_the_result_is_the_same(few):
    whole, pieces = (tally_of(*few, rows=30).result(), tally_of(*few, size=100).result())
    assert flat(whole) == pytest.approx(flat(pieces), rel=1e-9)
    for name, histogram in whole["histograms"].items():
        assert histogram["share"] == pytest.approx(pieces["histograms"][name]["share"], rel=1e-9)


def test_the_standard_error_is_that_of_resampled_documents(few):
    values, units = few
    result = tally_of(values, units).result()
    draws = {"nll": [], "ece": []}
    index = [np.flatnonzero(units.numpy() == unit) for unit in range(26)]
    for _ in range(2000):
        at = torch.from_numpy(np.concatenate([index[k] for k in rng.integers(0, 26, 26)]))
        confidence = values["confidence"][at].double()
        gaps = torch.zeros(N_BINS).double()
        bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
        gaps.index_add_(0, bins, confidence - values["accuracy"][at])
        draws["nll"].append(values["nll"][at].double().mean().item())
        draws["ece"].append(gaps.abs().sum().item() / len(at))
    for name, values in draws.items():
        assert result[f"{name}_se"] == pytest.approx(np.std(values), rel=0.12), name


def test_the_error_of_a_ratio_of_perplexities_is_that_of_pairs_of_resampled_documents(few):
    values, units = few
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    other = values | {"nll": values["nll"] + noise + 0.7}
    tallies = {"a": tally_of(values, units), "b": tally_of(other, units)}
    draws = []
    sums = torch.zeros(26, 3).double()
    for i, column in enumerate((values["nll"], other["nll"], torch.ones(3000))):
        sums[:, i].index_add_(0, units, column.double())
    for _ in range(4000):
        a, b, n = sums[rng.integers(0, 26, 26)].sum(0).tolist()
        draws.append(math.exp((b - a) / n))
    found = ratio_se(tallies["b"], tallies["a"])
    assert found == pytest.approx(np.std(draws), rel=0.12)
    text = {"sha256": "", "tokenizer": "", "unigram_nll": 9.0}
    rows = {name: tally.result() | text for name, tally in tallies.items()}
    assert found < rows["b"]["nll_se"]
    likelihood = tables(rows, tallies)[0]
    ratio = math.exp((other["nll"] - values["nll"]).mean().item())
    assert likelihood.lines[-1][-2:] == [f"{ratio:.3f}", f"{found:.3f}"]
    rows["b"]["n_units"] += 1  # windows of another length
    likelihood = tables(rows, tallies)[0]
    assert likelihood.lines[-1][-1] == f"{ratio:.3f}"


def test_resampling_each_document_once_is_the_text_itself(few, monkeypatch):
    once = lambda units: torch.ones(len(units), metrics_module.N_REPLICATES).double()  # noqa: E731
    monkeypatch.setattr(metrics_module, "bootstrap_weights", once)
    tally = tally_of(*few, size=100)
    result = tally.result()
    for name, values in tally.replicates().items():
        assert values.tolist() == pytest.approx([result[name]] * len(values), rel=1e-9), name


def test_weights_of_documents_are_poisson_and_their_own():
    weights = bootstrap_weights(list(range(300)))
    assert weights.mean().item() == pytest.approx(
        1, abs=0.02
    ) and weights.var().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(weights[17:18], bootstrap_weights([17])) and not torch.equal(
        weights[0], weights[1]
    )
    assert np.abs(np.corrcoef(weights[:50].numpy()) - np.eye(50)).max() < 0.2


def test_words_bytes_and_documents_are_those_of_the_text_however_it_is_cut():
    tokenizer, texts = (
        ByteTokenizer(),
        ["Ein Bär  geht\nheim. ", "", "zwei", " \n drei vier", "fünf\u00a0sechs"],
    )
    ids = torch.tensor(
        [i for text in texts for i in [*tokenizer.encode(text).tolist(), tokenizer.eot]]
    )
    for size in (1, 2, 3, 7, 100):
        text = TextStats(tokenizer, torch.full((300,), 1 / 300), n_documents=20)
        numbers = []
        for part in ids.split(size):
            numbers += text.read(torch.zeros(1, len(part)), part[None])[0].tolist()
        assert text.n_words == sum(len(t.split()) for t in texts) == 9
        expected = [k for k, t in enumerate(texts) for _ in range(len(t.encode()) + 1)]
        assert numbers == expected and text.n_documents == len(texts)
        assert text.n_bytes == sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize("n_ids", [300, 100])
def test_ids_that_a_tokenizer_has_not_are_no_text_and_a_model_may_have_fewer_than_its_tokenizer(
    n_ids,
):
    text = TextStats(ByteTokenizer(), torch.full((n_ids,), 1 / n_ids))
    ids = torch.tensor([[*b"a b", n_ids - 1, *b"c"]])
    text.read(torch.arange(5)[None], ids)
    assert text.n_words == 2 and text.n_bytes == 4 + (n_ids < 256)


@pytest.mark.parametrize(
    ("n_documents", "part", "unit"),
    [(20, False, "document"), (19, False, "stretch"), (99, True, "window")],
)
def test_the_unit_is_a_document_where_there_are_enough_of_them(n_documents, part, unit):
    text = TextStats(ByteTokenizer(), torch.full((300,), 1 / 300), n_documents, part)
    assert text.unit == unit
    at = torch.arange(2048).view(2, -1) + 1
    found = {"document": [0], "stretch": [0, 1, 2], "window": [1, 1025]}[unit]
    assert text.read(at, at % 256).unique().tolist() == found


@pytest.mark.parametrize("begin", [[], [9]])  # llm.c's documents begin with end-of-text
def test_a_document_is_what_stands_between_two_ends_of_text(tmp_path, begin):
    ids = [*begin, 1, 2, 3, 9, 4, 5, 9, 6, 7, 8, 7, 6]
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": ids}), "val")
    assert first_document(file, 9, 100).tolist() == [1, 2, 3]
    assert first_document(file, 9, 2).tolist() == [1, 2]
    assert first_document(file, None, 100).tolist() == ids
