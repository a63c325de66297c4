"""study/plots.py: a study's figures hold the numbers of its runs."""

import math

import pytest

from study.logs import read
from study.plots import figures, summary_figure
from tests.test_summary import NLL, write


def test_the_curves_of_a_study_are_those_of_its_seeds(tmp_path):
    nll = NLL | {"bayes": {1: 5.3, 2: 5.5}, "smooth_05": {1: 4.0}}
    study = write(tmp_path / "study", nll)
    (study / "bayes-seed2/metrics.jsonl").unlink()
    left, right = figures(study)["val_nll"].axes
    curves = {}
    for line in left.lines:
        if len(line.get_xdata()):
            curves[line.get_label()] = line.get_ydata()
    assert list(curves) == ["softmax", "Bayes", "sigmoid"]
    assert list(curves["Bayes"]) == pytest.approx([5.8, 5.55, 5.675])
    assert list(right.lines[2].get_ydata()) == pytest.approx([0.3] * 3)  # smooth has no points


def test_the_summary_has_a_mark_for_each_seed_and_a_bar_for_their_mean(tmp_path):
    left, right = summary_figure(read(write(tmp_path / "study"))).axes
    labels = [text.get_text() for text in left.get_yticklabels()]
    assert labels == ["softmax", "sigmoid", "sigmoid, distilled"]
    marks, mean = left.lines[3:5]
    ratios = []
    for seed, nll in NLL["sigmoid"].items():
        ratios.append(math.exp(nll - NLL["softmax"][seed]))
    assert list(marks.get_xdata()) == pytest.approx(ratios)
    assert list(mean.get_xdata()) == pytest.approx([sum(ratios) / 3])
    assert list(right.lines[2].get_xdata()) == [0.01, 0.02, 0.03]
