"""engine/eval/plots.py: the figures hold the numbers that they were given."""

import itertools
import math
import struct
import subprocess
import sys

import numpy as np
import pytest

from engine.eval.plots import (
    LOOKS,
    curves_figure,
    draw,
    reliability_figure,
    uncertainty_figure,
    validation_curve,
)
from tests.helpers import ROOT

NAMES = ["val_nll", "reliability", "uncertainty"]


def make_row(bayes: bool = False, ood: bool = True, seed: int = 0, **fields) -> dict:
    """A row as evaluate.py writes it, of random numbers; its last two bins are empty."""
    random = np.random.default_rng(seed)
    scores = ["confidence", "entropy"] + ["mutual_information"] * bayes

    def histograms() -> dict:
        edges = {score: np.linspace(0, 1, 11).tolist() for score in scores}
        edges |= {"mutual_information": np.geomspace(1e-4, 1, 11).tolist()} if bayes else {}
        return {
            score: {"edges": edges[score], "share": random.dirichlet(np.ones(10)).tolist()}
            for score in scores
        }

    n = [*random.integers(1, 1000, 13).tolist(), 0, 0]
    middle, right = ([*((np.arange(13) + at) / 15).tolist(), None, None] for at in (0.5, 0.9))
    row = {
        "dataset": "books",
        "split": "test",
        "n_tokens": sum(n),
        "nll": 4.0 + seed / 10,
        "ece": 0.0123,
    }
    row |= {
        "calibration": {"n": n, "confidence": middle, "accuracy": right},
        "histograms": histograms(),
    }
    if bayes:
        row["kl_weight"] = 0.1
    if ood:
        auroc = {score: {"token": 0.61, "block": 0.93} for score in scores}
        row["ood"] = {
            "dataset": "plays",
            "auroc": auroc,
            "histograms": histograms(),
        }
    return row | fields


def make_curve(offset: float = 0.0, seconds: float = 3.0) -> list[dict]:
    """Training records and evaluations of 20 steps, from step 0 on."""
    at = [{"step": step, "tokens": step * 2048, "seconds": step * seconds} for step in range(21)]
    scores = [{"val_nll": 9.0 if step == 0 else 4 + offset + 1 / step} for step in range(21)]
    return [
        {**at[1], "loss": 5.0},
        *({**about, **score} for about, score in zip(at, scores, strict=True)),
    ]


@pytest.fixture
def rows() -> dict[str, dict]:
    return {"softmax": make_row(), "bayes": make_row(bayes=True, seed=1)}


def texts(figure) -> str:
    """All words in a figure."""
    return "\n".join(
        found.get_text() for found in figure.findobj(lambda artist: hasattr(artist, "get_text"))
    )


def test_curves_are_means_over_seeds_and_differences_with_the_same_seed():
    softmax = {1: {100: 5.0, 200: 4.0}, 2: {100: 6.0, 200: 5.0}}
    bayes = {1: {100: 5.5, 200: 4.25, 300: 4.0}, 3: {200: 7.0}}
    left, right = curves_figure({"softmax": softmax, "bayes": bayes}).axes
    assert [line.get_label() for line in left.lines] == ["softmax", "bayes"]
    assert list(left.lines[0].get_xdata() * 1e6) == [100, 200]
    assert list(left.lines[0].get_ydata()) == [5.5, 4.5]
    assert list(left.lines[1].get_ydata()) == [(4.25 + 7) / 2]  # where both seeds have a point
    assert list(right.lines[0].get_ydata()) == [0, 0]
    assert list(right.lines[1].get_ydata()) == [0.5, 0.25]
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == (4, 6)
    assert "difference to softmax" in right.get_ylabel()


def test_a_run_without_curve_keeps_the_looks_of_the_others():
    curve = {0: validation_curve(make_curve())}
    assert curves_figure({"a": {}}) is None and len(curves_figure({"a": curve}).axes) == 1
    alone, both = (curves_figure({"a": of_a, "b": curve}).axes[0] for of_a in ({}, curve))
    assert [line.get_label() for line in alone.lines if len(line.get_xdata())] == ["b"]
    assert alone.lines[1].get_color() == both.lines[1].get_color()


def test_a_curve_has_the_evaluations_without_step_0():
    curve = validation_curve(make_curve())
    assert list(curve) == [2048 * step for step in range(1, 21)] and max(curve.values()) == 5.0


def test_a_run_that_diverged_is_drawn_as_far_as_it_has_numbers():
    broken = validation_curve(make_curve()) | {2048 * step: math.nan for step in range(10, 21)}
    curves = {"broken": {0: broken}, "good": {0: validation_curve(make_curve())}}
    low, high = curves_figure(curves).axes[0].get_ylim()
    assert 3 < low < high < 6


def test_reliability_shows_every_bin_that_is_not_empty_and_the_share_of_tokens(rows):
    figure = reliability_figure(rows)
    assert len(figure.axes) == 2
    for panel, row in zip(figure.axes, rows.values(), strict=True):
        n, confidence, accuracy = (
            row["calibration"][key][:13] for key in ("n", "confidence", "accuracy")
        )
        diagonal, line = panel.lines
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
        assert line.get_xdata()[:13] == pytest.approx(confidence)
        assert line.get_ydata()[:13] == pytest.approx(accuracy)
        assert np.isnan(line.get_ydata()[13:]).all()  # an empty bin is not drawn
        (bars,) = [patch for patch in panel.patches if hasattr(patch, "get_data")]
        assert bars.get_data().values == pytest.approx([*(k / sum(n) for k in n), 0, 0])
        (_, low), (_, high) = panel.collections[0].get_segments()[3]
        error = 1.96 * math.sqrt(accuracy[3] * (1 - accuracy[3]) / n[3])
        assert (low, high) == pytest.approx((accuracy[3] - error, accuracy[3] + error))
    assert texts(figure).count("ECE 0.0123") == 2


def test_uncertainty_shows_both_domains_and_says_where_there_is_none(rows):
    figure = uncertainty_figure(rows)
    panels = np.array(figure.axes).reshape(2, 3)
    for of_run, row in zip(panels, rows.values(), strict=True):
        for panel, score in zip(
            of_run, ("confidence", "entropy", "mutual_information"), strict=True
        ):
            drawn = [patch.get_data() for patch in panel.patches if hasattr(patch, "get_data")]
            expected = [
                part["histograms"][score]
                for part in (row, row["ood"])
                if score in part["histograms"]
            ]
            assert len(drawn) == len(expected)
            for found, histogram in zip(drawn, expected, strict=True):
                at = list(histogram["edges"]).index(found.edges[0])
                share = histogram["share"][at : at + len(found.values)]
                assert found.values == pytest.approx(share)
                assert sum(share) > 0.95  # all but thin tails
    assert "none" in panels[0, 2].texts[0].get_text() and panels[1, 2].get_xscale() == "log"
    assert panels[1, 2].get_title() == "AUROC: token 0.61, block 0.93"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "in domain: books",
        "outside: plays",
    ]


def test_without_other_domains_the_own_one_is_shown():
    figure = uncertainty_figure({"softmax": make_row(ood=False)})
    assert [len(panel.patches) for panel in figure.axes] == [1, 1, 0]
    assert "AUROC" not in texts(figure) and "outside" not in texts(figure)


def test_84_runs_look_different_and_the_first_7_in_colour_alone():
    looks = [tuple(map(str, look.values())) for look in LOOKS]
    assert len(set(looks)) == 84 and len({look[0] for look in looks[:7]}) == 7
    assert all(a[1] != b[1] and a[2] != b[2] for a, b in itertools.pairwise(looks))


@pytest.mark.parametrize("n", [1, 9])
def test_no_number_of_runs_breaks_the_pictures(tmp_path, n):
    rows = {
        f"a_run_with_a_rather_long_name/{i}": make_row(bayes=i % 2 == 1, ood=i < 3, seed=i)
        for i in range(n)
    }
    written = draw(tmp_path, rows, {name: make_curve() for name in rows})
    for path in written.values():
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width in (830, 1660) and height <= 420 * (2 + n)  # at 200 pixels an inch


def test_plots_without_data_are_left_out(tmp_path, rows):
    assert draw(tmp_path, {}, {}) == {} and list(tmp_path.iterdir()) == []
    assert list(draw(tmp_path, rows, {"softmax": [{"step": 1, "loss": 3.0}]})) == NAMES[1:]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in NAMES[1:]}


def test_the_same_numbers_give_the_same_bytes_in_any_process(tmp_path, rows):
    written = draw(tmp_path, rows, {"softmax": make_curve()})
    assert list(written) == NAMES
    code = "import sys; from pathlib import Path; from tests.test_plots import *; "
    code += "draw(Path(sys.argv[1]), {'softmax': make_row(), "
    code += "'bayes': make_row(bayes=True, seed=1)}, {'softmax': make_curve()})"
    (again := tmp_path / "again").mkdir()
    subprocess.run([sys.executable, "-c", code, again], cwd=ROOT, check=True)
    for path in written.values():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
