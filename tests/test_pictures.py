"""engine/eval/plots.py: the figures hold the numbers that they were given, and say what they show."""

import itertools
import math
import struct
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from scipy.stats import binomtest

from engine.eval.plots import (
    curves_figure,
    draw,
    label,
    line_style,
    reliability_figure,
    risk_coverage_figure,
    uncertainty_figure,
    wilson,
    wrap,
)
from tests.helpers import ROOT

NAMES = ["val_nll", "reliability", "risk_coverage", "uncertainty"]


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
    coverage = (np.arange(1, 101) / 100).tolist()
    risk = {score: np.sort(random.random(100)).tolist() for score in scores}
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
    row |= {"risk_coverage": {"coverage": coverage, "risk": risk}} | (
        {"kl_weight": 0.1} if bayes else {}
    )
    if ood:
        auroc = {score: {"token": 0.61, "block": 0.93} for score in scores}
        row["ood"] = {
            "dataset": "plays",
            "auroc": auroc,
            "fpr95": auroc,
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


def test_the_curves_are_the_evaluations_without_step_0(rows):
    curves = {"softmax": make_curve(), "bayes": make_curve(0.5)}
    by_tokens, by_time = curves_figure(curves, rows).axes
    for i, curve in enumerate(curves.values()):
        kept = [record for record in curve if "val_nll" in record and record["step"] > 0]
        for panel, key, unit in ((by_tokens, "tokens", 1e6), (by_time, "seconds", 60)):
            assert panel.lines[i].get_xdata() == pytest.approx(
                [record[key] / unit for record in kept]
            )
            assert panel.lines[i].get_ydata() == pytest.approx(
                [record["val_nll"] for record in kept]
            )
    assert by_tokens.lines[1].get_label() == "bayes (kl_weight 0.1): 4.550"
    assert "nats" in by_tokens.get_ylabel() and "minutes" in by_time.get_xlabel()
    assert (
        by_tokens.get_ylim()[0] < 4.05 and by_tokens.get_ylim()[1] > 5.0
    )  # from the second tenth on, all is seen


def test_step_0_is_drawn_where_it_is_all_there_is_and_else_a_run_that_has_only_it_is_not():
    started = [make_curve()[1]]
    assert len(curves_figure({"a": started}, {}).axes[0].lines) == 1
    damaged = [
        *started,
        {"step": 5, "val_nll": 4.0},
        {"step": 6, "tokens": 1, "seconds": 1.0, "val_nll": None},
    ]
    assert len(curves_figure({"a": damaged}, {}).axes[0].lines[0].get_xdata()) == 1
    lines = curves_figure({"a": started, "b": make_curve()}, {}).axes[0].lines
    assert [line.get_label() for line in lines] == ["b: 4.050"]


def test_a_run_that_diverged_is_drawn_as_far_as_it_has_numbers():
    broken = [
        record | ({"val_nll": math.nan} if record["step"] > 9 else {}) for record in make_curve()
    ]
    low, high = curves_figure({"broken": broken, "good": make_curve()}, {}).axes[0].get_ylim()
    assert 3 < low < high < 6


def test_records_that_lack_a_number_are_passed_over():
    damaged = [
        {"step": 3, "val_nll": 4.0},
        {"step": 4, "val_nll": "abc", "tokens": 1, "seconds": 1},
    ]
    assert curves_figure({"a": damaged}, {}) is None
    assert len(curves_figure({"a": damaged + make_curve()}, {}).axes[0].lines[0].get_xdata()) == 20


def test_hours_of_training_are_shown_in_hours():
    assert "hours" in curves_figure({"a": make_curve(seconds=3600.0)}, {}).axes[1].get_xlabel()


def test_reliability_shows_every_bin_that_is_not_empty_and_the_share_of_tokens(rows):
    figure = reliability_figure(rows)
    assert len(figure.axes) == 2
    for panel, row in zip(figure.axes, rows.values(), strict=True):
        n, confidence, accuracy = (
            row["calibration"][key][:13] for key in ("n", "confidence", "accuracy")
        )
        diagonal, line = panel.lines
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
        assert line.get_xdata() == pytest.approx(confidence) and line.get_ydata() == pytest.approx(
            accuracy
        )
        (bars,) = [patch for patch in panel.patches if hasattr(patch, "get_data")]
        assert bars.get_data().values == pytest.approx([*(k / sum(n) for k in n), 0, 0])
        for (_, low), (_, high) in [panel.collections[0].get_segments()[3]]:
            assert (low, high) == pytest.approx(wilson(accuracy[3], n[3]))
    assert (
        "bayes\n(kl_weight\N{NO-BREAK SPACE}0.1)" in texts(figure)
        and texts(figure).count("ECE 0.0123") == 2
    )


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (3, 10), (500, 1000), (1000, 1000)])
def test_the_interval_of_a_share_is_wilsons(right, n):
    expected = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_risk_and_coverage_have_a_panel_per_score_and_the_runs_that_have_it(rows):
    figure = risk_coverage_figure(rows)
    names = ["confidence", "total uncertainty", "epistemic uncertainty"]
    assert [panel.get_title() for panel in figure.axes] == [f"by {name}" for name in names]
    for panel, score in zip(
        figure.axes, ("confidence", "entropy", "mutual_information"), strict=True
    ):
        for line, row in zip(panel.lines, rows.values(), strict=True):
            risk = row["risk_coverage"]["risk"].get(score, [])
            assert line.get_ydata() == pytest.approx(risk)
            assert line.get_xdata() == pytest.approx(row["risk_coverage"]["coverage"][: len(risk)])
    assert len(risk_coverage_figure({"softmax": make_row()}).axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "softmax",
        "bayes (kl_weight 0.1)",
    ]


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
                assert found.values == pytest.approx(histogram["share"])
                assert found.edges == pytest.approx(histogram["edges"])
    assert "none" in panels[0, 2].texts[0].get_text() and panels[1, 2].get_xscale() == "log"
    assert panels[1, 2].get_title() == "AUROC: token 0.61, block 0.93"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "in domain: books",
        "outside: plays",
    ]


def test_without_other_domains_the_own_one_is_shown():
    figure = uncertainty_figure({"softmax": make_row(ood=False)})
    assert [len(panel.patches) for panel in figure.axes] == [1, 1]
    assert "AUROC" not in texts(figure) and "outside" not in texts(figure)


def test_a_tempered_posterior_says_so():
    assert label("bayes", {"kl_weight": 0.1}) == "bayes (kl_weight 0.1)"
    assert label("bayes (16 draws)", {"kl_weight": 0.1}) == "bayes (16 draws, kl_weight 0.1)"
    assert label("bayes (kl_weight 0.1)", {"kl_weight": 0.1}) == "bayes (kl_weight 0.1)"
    assert label("bayes", {"kl_weight": 1.0}) == label("bayes", {}) == "bayes"


def test_84_runs_look_different_and_the_first_7_in_colour_alone():
    looks = [
        tuple(str(line_style(i, 1)[key]) for key in ("color", "linestyle", "marker"))
        for i in range(84)
    ]
    assert len(set(looks)) == 84 and len({look[0] for look in looks[:7]}) == 7
    assert all(a[1] != b[1] and a[2] != b[2] for a, b in itertools.pairwise(looks))


@pytest.mark.parametrize("n", [1, 9])
def test_no_number_of_runs_breaks_the_pictures(tmp_path, n):
    rows = {
        f"a_run_with_a_rather_long_name/{i}": make_row(bayes=i % 2 == 1, ood=i < 3, seed=i)
        for i in range(n)
    }
    written = draw(tmp_path, rows, {name: make_curve() for name in rows})
    for png, svg in written.values():
        width, height = struct.unpack(">II", png.read_bytes()[16:24])
        assert width in (830, 1660) and height <= 420 * (
            2 + n
        )  # two pixels of the screen for one of the README
        assert xml.etree.ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_names_are_shown_as_they_are(tmp_path, rows):
    strange = {"_first": rows["softmax"], r"costs $\no$": rows["bayes"] | {"dataset": "a$b$"}}
    figure = risk_coverage_figure(strange)
    assert len(figure.legends[0].get_texts()) == 2
    assert len(draw(tmp_path, strange, {name: make_curve() for name in strange})) == 4


def test_a_long_name_is_cut_behind_an_underscore():
    expected = "bayes_sigmoid_\nweighted\n(kl_weight\N{NO-BREAK SPACE}0.1)"
    assert wrap("bayes_sigmoid_weighted (kl_weight 0.1)", 18) == expected
    lines = ["Bayes,", "kl_weight\xa00.03,", "sum_penalty\xa01,", "ensemble of\xa04"]
    assert wrap("Bayes, kl_weight 0.03, sum_penalty 1, ensemble of 4", 18).splitlines() == lines


def test_pictures_without_numbers_are_left_out(tmp_path, rows):
    assert draw(tmp_path, {}, {}) == {} and list(tmp_path.iterdir()) == []
    bare = {"gpt2": {"nll": 3.0, "dataset": "books", "calibration": {"n": [0] * 15}}}
    assert list(draw(tmp_path, bare, {"gpt2": [{"step": 1, "loss": 3.0}]})) == []
    assert list(draw(tmp_path, rows, {})) == NAMES[1:]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{kind}" for name in NAMES[1:] for kind in ("png", "svg")
    )


def test_the_same_numbers_give_the_same_bytes_in_any_process(tmp_path, rows):
    written = draw(tmp_path, rows, {"softmax": make_curve()})
    assert list(written) == NAMES
    code = "import sys; from pathlib import Path; from tests.test_pictures import *; "
    code += "draw(Path(sys.argv[1]), {'softmax': make_row(), "
    code += "'bayes': make_row(bayes=True, seed=1)}, {'softmax': make_curve()})"
    (again := tmp_path / "again").mkdir()
    subprocess.run([sys.executable, "-c", code, again], cwd=ROOT, check=True)
    for path in itertools.chain.from_iterable(written.values()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
        assert b"<dc:date>" not in path.read_bytes()
