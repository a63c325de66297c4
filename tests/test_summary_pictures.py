"""study/plots.py: a study's figures hold the numbers of its runs."""

import json
import math

import pytest

from study.logs import LABELS, read
from study.plots import DRAWN, curves_figure, figures, summary_figure
from tests.test_summary import NLL, write

FALL = (0.5, 0.25, 0.375)  # of write()'s curves at 100, 200 and 300 tokens


def lines_of(panel) -> dict[str, tuple[list, list]]:
    """Tokens and values by label."""
    points = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in panel.lines}
    return {label: ([round(1e6 * x) for x in xs], list(ys)) for label, (xs, ys) in points.items()}


def test_curves_are_means_over_seeds_beside_their_difference_to_softmax(tmp_path):
    nlls = NLL | {
        "sigmoid": {1: 4.8, 2: 5.15},
        "bayes": {1: 5.3, 2: 5.5, 3: 5.1},
        "smooth_05": {1: 4.0},
    }
    rows = read(write(tmp_path / "study", nlls))
    left, right = curves_figure(rows).axes
    gaps = {"softmax": 0.0, "Bayes": 0.2, "sigmoid": -0.125}
    assert (
        left.get_lines()[0].get_label() == "softmax"
        and lines_of(left).keys() == lines_of(right).keys() == gaps.keys()
    )
    for name, label in LABELS.items():
        if label in gaps:
            mean = sum(nlls[name].values()) / len(nlls[name])
            assert lines_of(left)[label] == (
                [100, 200, 300],
                pytest.approx([mean + above for above in FALL]),
            )
            assert lines_of(right)[label] == ([100, 200, 300], pytest.approx([gaps[label]] * 3))
    bands = [band.get_paths()[0].vertices[:, 1] for band in right.collections]
    assert [(min(band), max(band)) for band in bands] == [
        pytest.approx(ends) for ends in ((0, 0), (0, 0.3), (-0.2, -0.05))
    ]


def test_curves_are_compared_where_both_have_a_point_and_a_run_without_any_is_left_out(tmp_path):
    study = write(
        tmp_path / "study",
        {"softmax": {1: 5.0, 2: 5.2}, "smooth": {1: 5.1, 2: 5.3}, "sigmoid": {1: 5.0}},
    )
    (study / "smooth-seed2/metrics.jsonl").unlink()
    for row, tokens in (("smooth", 200), ("sigmoid", 150)):
        lines = [{"step": at, "tokens": at, "val_nll": 6.0} for at in (tokens, 999)]
        (study / f"{row}-seed1/metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    left, right = curves_figure(read(study)).axes
    assert lines_of(left).keys() == {"softmax", "smooth, ε = 0.1"}
    assert lines_of(right)["smooth, ε = 0.1"] == ([200], [pytest.approx(6.0 - 5.25)])
    for path in study.glob("*/metrics.jsonl"):
        path.unlink()
    assert curves_figure(read(study)) is None and set(figures(study)) == {"summary"}


def test_the_summary_has_a_mark_for_each_seed_and_a_bar_for_their_mean(tmp_path):
    rows = read(write(tmp_path / "study"))
    left, right = summary_figure(rows).axes
    assert [text.get_text() for text in left.get_yticklabels()] == [
        "softmax",
        "sigmoid",
        "sigmoid, taught",
    ]
    marks, mean = left.lines[2:4]
    ratios = [math.exp(NLL["sigmoid"][seed] - NLL["softmax"][seed]) for seed in (1, 2, 3)]
    assert list(marks.get_xdata()) == pytest.approx(ratios) and list(marks.get_ydata()) == [1, 1, 1]
    assert list(mean.get_xdata()) == pytest.approx([sum(ratios) / 3])
    assert list(right.lines[2].get_xdata()) == [0.01, 0.02, 0.03]


def test_the_rows_that_are_drawn_are_rows(tmp_path):
    assert set(DRAWN) < set(LABELS)
    assert (
        figures(write(tmp_path / "study", {"sigmoid": {1: 5.0}})) == {}
    )  # nothing to compare with
