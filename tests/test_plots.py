"""engine/eval/plots.py: the figures show the numbers that they were given."""

import math

import numpy as np
import pytest

from engine.eval.plots import (
    curves_figure,
    draw,
    reliability_figure,
    uncertainty_figure,
    validation_curve,
)

SCORES = ("confidence", "entropy", "mutual_information")


def make_row(bayes: bool = False, ood: bool = True, seed: int = 0) -> dict:
    """A row as evaluate.py writes it, of random numbers; its last two bins are empty."""
    random = np.random.default_rng(seed)

    def histograms() -> dict:
        found = {}
        for score in SCORES if bayes else SCORES[:2]:
            edges = np.geomspace(1e-4, 1, 11) if score == SCORES[2] else np.linspace(0, 1, 11)
            share = random.dirichlet(np.ones(10))
            found[score] = {"edges": edges.tolist(), "share": share.tolist()}
        return found

    bins = (np.arange(13) + 0.5) / 15
    row = {
        "dataset": "books",
        "split": "test",
        "n_tokens": 1000,
        "nll": 4.0 + seed / 10,
        "ece": 0.0123,
        "calibration": {
            "n": [*random.integers(1, 1000, 13).tolist(), 0, 0],
            "confidence": [*bins.tolist(), None, None],
            "accuracy": [*(bins / 2).tolist(), None, None],
        },
        "histograms": histograms(),
    }
    if bayes:
        row["kl_weight"] = 0.1
    if ood:
        auroc = {score: {"token": 0.61, "block": 0.93} for score in SCORES}
        row["ood"] = {"dataset": "plays", "auroc": auroc, "histograms": histograms()}
    return row


def make_curve() -> list[dict]:
    """Training records and evaluations of 20 steps, from step 0 on."""
    records = [{"step": 1, "tokens": 2048, "loss": 5.0}]
    for step in range(21):
        nll = 4 + 1 / step if step else 9.0
        records.append({"step": step, "tokens": step * 2048, "val_nll": nll})
    return records


@pytest.fixture
def rows() -> dict[str, dict]:
    return {"softmax": make_row(), "bayes": make_row(bayes=True, seed=1)}


def bars(panel) -> list:
    return [patch.get_data() for patch in panel.patches if hasattr(patch, "get_data")]


def test_curves_are_means_over_seeds_and_differences_with_the_same_seed():
    softmax = {1: {100: 5.0, 200: 4.0}, 2: {100: 6.0, 200: 5.0}}
    bayes = {1: {100: 5.5, 200: 4.25, 300: 4.0}, 3: {200: 7.0}}
    left, right = curves_figure({"softmax": softmax, "bayes": bayes}).axes
    first, second = left.lines
    assert list(first.get_xdata() * 1e6) == [100, 200]
    assert list(first.get_ydata()) == [5.5, 4.5]
    assert list(second.get_ydata()) == [(4.25 + 7) / 2]  # where both seeds have a point
    assert [list(line.get_ydata()) for line in right.lines] == [[0, 0], [0.5, 0.25]]
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == (4, 6)


def test_a_curve_is_drawn_without_step_0_and_without_nan():
    curve = validation_curve(make_curve())
    assert list(curve) == [2048 * step for step in range(1, 21)]
    broken = curve | {2048 * step: math.nan for step in range(10, 21)}
    low, high = curves_figure({"broken": {0: broken}, "good": {0: curve}}).axes[0].get_ylim()
    assert 3 < low < high < 6


def test_reliability_shows_accuracy_with_its_error_and_the_share_of_tokens(rows):
    figure = reliability_figure(rows)
    for panel, row in zip(figure.axes, rows.values(), strict=True):
        n, confidence, accuracy = map(np.array, list(row["calibration"].values()))
        line = panel.lines[1]
        assert line.get_xdata()[:13].tolist() == confidence[:13].tolist()
        assert line.get_ydata()[:13].tolist() == accuracy[:13].tolist()
        assert np.isnan(line.get_ydata()[13:]).all()  # an empty bin is not drawn
        assert bars(panel)[0].values == pytest.approx(n / sum(n))
        _, (_, high) = panel.collections[0].get_segments()[3]
        error = 1.96 * math.sqrt(accuracy[3] * (1 - accuracy[3]) / n[3])
        assert high == pytest.approx(accuracy[3] + error)


def test_uncertainty_shows_the_histograms_in_domain_and_ood(rows):
    panels = uncertainty_figure(rows).axes
    for i, panel in enumerate(panels):
        row = list(rows.values())[i // 3]
        score = SCORES[i % 3]
        domains = [domain["histograms"] for domain in (row, row["ood"])]
        expected = [histograms[score] for histograms in domains if score in histograms]
        for found, histogram in zip(bars(panel), expected, strict=True):
            at = histogram["edges"].index(found.edges[0])
            share = histogram["share"][at : at + len(found.values)]
            assert found.values == pytest.approx(share)
            assert sum(share) > 0.95  # all but thin tails
    assert "0.61" in panels[5].get_title()
    assert "0.93" in panels[5].get_title()


def test_only_plots_with_data_are_drawn_and_the_same_data_give_the_same_bytes(tmp_path, rows):
    assert draw(tmp_path, {}, {}) == {}
    assert list(tmp_path.iterdir()) == []
    rows |= {f"a_run_with_a_rather_long_name/{i}": make_row(ood=False) for i in range(3)}
    written = draw(tmp_path, rows, {"softmax": make_curve()})
    assert list(written) == ["val_nll", "reliability", "uncertainty"]
    first = [path.read_bytes() for path in written.values()]
    assert list(draw(tmp_path, rows, {"softmax": [{"step": 1, "loss": 3.0}]})) == list(written)[1:]
    assert [path.read_bytes() for path in written.values()] == first
