"""study/plots.py: a study's figures hold the numbers of its runs."""

import json
import math

import pytest

from study.logs import LABELS, read
from study.plots import DRAWN, figures, summary_figure
from tests.test_plots import make_row
from tests.test_summary import NLL, write


def test_the_curves_of_a_study_are_those_of_its_seeds(tmp_path):
    nlls = NLL | {"bayes": {1: 5.3, 2: 5.5}, "smooth_05": {1: 4.0}}
    study = write(tmp_path / "study", nlls)
    (study / "bayes-seed2/metrics.jsonl").unlink()
    left, right = figures(study)["val_nll"].axes
    lines = {line.get_label(): line for line in left.lines if len(line.get_xdata())}
    assert list(lines) == ["softmax", "Bayes", "sigmoid"]
    assert list(lines["Bayes"].get_ydata()) == pytest.approx([5.8, 5.55, 5.675])
    assert list(right.lines[2].get_ydata()) == pytest.approx([0.3] * 3)  # smooth has no points
    for path in study.glob("*/metrics.jsonl"):
        path.unlink()
    assert set(figures(study)) == {"summary"}


def test_the_summary_has_a_mark_for_each_seed_and_a_bar_for_their_mean(tmp_path):
    rows = read(write(tmp_path / "study"))
    left, right = summary_figure(rows).axes
    assert [text.get_text() for text in left.get_yticklabels()] == [
        "softmax",
        "sigmoid",
        "sigmoid, taught",
    ]
    marks, mean = left.lines[3:5]
    ratios = [math.exp(NLL["sigmoid"][seed] - NLL["softmax"][seed]) for seed in (1, 2, 3)]
    assert list(marks.get_xdata()) == pytest.approx(ratios) and list(marks.get_ydata()) == [1, 1, 1]
    assert list(mean.get_xdata()) == pytest.approx([sum(ratios) / 3])
    assert list(right.lines[2].get_xdata()) == [0.01, 0.02, 0.03]


def test_the_rows_that_are_drawn_are_rows(tmp_path):
    assert set(DRAWN) < set(LABELS)
    assert (
        figures(write(tmp_path / "study", {"sigmoid": {1: 5.0}})) == {}
    )  # nothing to compare with


def test_calibration_and_uncertainty_are_of_the_first_seeds(tmp_path):
    study = write(tmp_path / "study")
    for name, row in (("softmax", make_row()), ("sigmoid", make_row(seed=1))):
        (study / f"{name}-seed1/eval_test.json").write_text(json.dumps(row))
    found = figures(study)
    assert len(found["reliability"].axes) == 2
    assert len(found["uncertainty"].axes) == 3  # of point weights, one run
