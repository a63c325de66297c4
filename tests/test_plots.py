"""engine/eval/plots.py: the figures show the numbers that they were given."""

import math

import pytest

from engine.eval.plots import (
    curves_figure,
    reliability_figure,
)


def make_row() -> dict:
    """A row as evaluate.py writes it; its last bin is empty."""
    return {
        "dataset": "books",
        "ece": 0.0123,
        "calibration": {
            "n": [100, 300, 600, 0],
            "confidence": [0.2, 0.4, 0.7, 0.0],
            "accuracy": [0.1, 0.5, 0.6, 0.0],
        },
    }


@pytest.fixture
def rows() -> dict[str, dict]:
    return {"softmax": make_row(), "bayes": make_row()}


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


def test_reliability_shows_accuracy_with_its_error_and_the_share_of_tokens(rows):
    figure = reliability_figure(rows)
    for panel in figure.axes:
        line = panel.lines[1]
        assert line.get_xdata()[:3].tolist() == [0.2, 0.4, 0.7]
        found = line.get_ydata().tolist()
        assert found == pytest.approx([0.1, 0.5, 0.6, math.nan], nan_ok=True)  # none if empty
        assert bars(panel)[0].values.tolist() == [0.1, 0.3, 0.6, 0.0]
        _, (_, high) = panel.collections[0].get_segments()[1]
        assert high == pytest.approx(0.5 + 1.96 * math.sqrt(0.5 * 0.5 / 300))
