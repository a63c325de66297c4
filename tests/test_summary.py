"""study/summary.py: the study's tables are what the logs say, and the pages hold them."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from engine.base.errors import UserError
from study import summary
from tests.helpers import ROOT

PAGES = {str(page.relative_to(ROOT)): page for page in summary.PAGES}
NLL = {  # row -> seed -> nll
    "softmax": {1: 5.0, 2: 5.2, 3: 5.1},
    "sigmoid": {1: 4.9, 2: 5.15, 3: 5.06},
    "sigmoid_taught": {1: 4.8},
}


def write(study, nll=NLL):
    for row, seeds in nll.items():
        for seed, value in seeds.items():
            folder = study / f"{row}-seed{seed}"
            folder.mkdir(parents=True)
            numbers = {
                "nll": value,
                "perplexity": math.exp(value),
                "ece": seed / 100,
                "nll_se": 0.03 * seed,
            }
            (folder / "eval_test.json").write_text(json.dumps(numbers))
            nlls = (
                value + above for above in (0, 0.5, 0.25, 0.375)
            )  # lowest before the first step, which is no result
            steps = [
                {"step": step, "tokens": 100 * step, "val_nll": nll}
                for step, nll in enumerate(nlls)
            ]
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(step) + "\n" for step in steps)
            )
    return study


def cells(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_a_table_has_means_and_standard_deviations_over_seeds_and_ratios_of_the_same_seed(tmp_path):
    found = cells(summary.table(write(tmp_path / "study"), "prediction"))
    assert found["head"] == ["seeds", "nll", "± documents", "perplexity", "vs softmax", "ECE"]
    for row, label in (("softmax", "softmax"), ("sigmoid", "sigmoid")):
        nll = np.array(list(NLL[row].values()))
        ratio = np.exp(nll - np.array(list(NLL["softmax"].values())))
        expected = [
            "3",
            f"{nll.mean():.3f} ± {nll.std(ddof=1):.3f}",
            "0.060",
            f"{np.exp(nll).mean():.2f}",
        ]
        of_ratio = "1.000" if row == "softmax" else f"{ratio.mean():.3f} ± {ratio.std(ddof=1):.3f}"
        expected += [of_ratio, "0.0200 ± 0.0100"]
        assert found[label] == expected
    taught = ["1", "4.800", "0.030", f"{math.exp(4.8):.2f}", f"{math.exp(-0.2):.3f}", "0.0100"]
    assert found["sigmoid, taught"] == taught


def test_a_brief_table_has_no_more_than_perplexity_ratio_calibration_and_training_time(tmp_path):
    study = write(tmp_path / "study", {"softmax": {1: 5.0}, "bayes": {1: 4.9}})
    config = {"weights": "bayes", "likelihood": "categorical", "kl_weight": 0.1}
    (study / "bayes-seed1/config.json").write_text(json.dumps(config))
    evaluation = {"nll": 4.9, "perplexity": 134.29, "ece": 0.01, "unigram_nll": 7.0}
    (study / "bayes-seed1/eval_test.json").write_text(json.dumps(evaluation))
    with (study / "bayes-seed1/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "tokens": 400, "val_nll": 4.9, "seconds": 53.7}) + "\n")
    found = cells(summary.table(study, "brief"))
    assert found["head"] == ["perplexity", "vs softmax", "ECE", "training (s)"]
    assert list(found)[2:] == ["softmax", "Bayes"]
    assert found["softmax"] == ["148.41", "1.000", "0.0100", ""]
    assert found["Bayes"] == ["134.29", f"{math.exp(-0.1):.3f}", "0.0100", "54"]


def test_an_ensemble_is_compared_with_softmaxs_mean_and_other_kinds_with_their_seed(tmp_path):
    study = write(tmp_path / "study")
    for kind in ("_averaged", "_ensemble_of_4"):
        (study / f"softmax-seed2/eval_test{kind}.json").write_text(json.dumps({"nll": 4.7}))
    found = cells(summary.table(study, "prediction"))
    assert list(found)[2:5] == ["softmax", "softmax, averaged", "softmax, ensemble of 4"]
    assert found["softmax, averaged"] == ["1", "4.700", "", "", f"{math.exp(4.7 - 5.2):.3f}", ""]
    ensemble = ["", "4.700", "", "", f"{math.exp(4.7 - 5.1):.3f}", ""]  # no seeds of its own
    assert found["softmax, ensemble of 4"] == ensemble


def test_every_seed_of_a_row_is_in_its_mean_and_ratios_are_of_the_seeds_that_softmax_has(tmp_path):
    more = {"softmax": NLL["softmax"] | {4: 9.0}, "mine": {1: 5.0, 7: 5.2}, "yours": {8: 5.2}}
    found = cells(summary.table(write(tmp_path / "study", more), "prediction"))
    assert found["softmax"][0] == "4" and found["mine"][:2] == ["2", "5.100 ± 0.141"]
    assert (found["mine"][4], found["yours"][4]) == (f"{math.exp(5.0 - NLL['softmax'][1]):.3f}", "")


def test_what_the_frequencies_of_the_training_text_reach_stands_first(tmp_path):
    study = write(tmp_path / "study")
    (study / "sigmoid-seed1/eval_test.json").write_text(
        json.dumps({"nll": 4.9, "unigram_nll": 7.0})
    )
    found = cells(summary.table(study, "prediction"))
    unigram = ["", "7.000", "", f"{math.exp(7.0):.2f}", f"{math.exp(7.0 - 5.1):.3f}", ""]
    assert list(found)[2] == "unigram frequencies" and found["unigram frequencies"] == unigram
    assert "unigram" not in summary.table(study, "uncertainty")


def test_studies_beside_each_other_show_the_rows_that_two_have_without_their_options(tmp_path):
    write(tmp_path / "once")
    write(tmp_path / "again", {"sigmoid": {1: 5.0}, "softmax": {1: 5.5}, "mine": {1: 4.0}})
    (tmp_path / "again/sigmoid-seed1/eval_test_averaged.json").write_text(json.dumps({"nll": 4.9}))
    (tmp_path / "once/sigmoid-seed1/eval_test_averaged.json").write_text(json.dumps({"nll": 4.8}))
    options = {"weights": "point", "likelihood": "sigmoid", "pos_weight": 3.0}
    (tmp_path / "once/sigmoid-seed1/config.json").write_text(json.dumps(options))
    found = cells(summary.table(tmp_path / "once+again", "beside"))
    assert found["head"] == ["once: vs softmax", "once: ECE", "again: vs softmax", "again: ECE"]
    assert list(found)[2:] == ["softmax", "sigmoid", "sigmoid, averaged"]
    once = summary.read(tmp_path / "once")
    (ratios,) = summary.cells(once["sigmoid"], {"ratio": "vs softmax: .3f ±"})
    assert found["sigmoid"] == [ratios, "0.0200 ± 0.0100", f"{math.exp(-0.5):.3f}", "0.0100"]
    assert found["sigmoid, averaged"] == [f"{math.exp(-0.2):.3f}", "", f"{math.exp(-0.6):.3f}", ""]


def test_rows_and_columns_without_a_number_are_left_out(tmp_path):
    study = write(tmp_path / "study")
    assert summary.table(study, "uncertainty") == ""
    (study / "sigmoid-seed1/eval_test.json").write_text(json.dumps({"nll": 4.9, "entropy": 7.5}))
    assert summary.table(study, "uncertainty").splitlines()[2:] == ["| sigmoid | 7.500 |"]


SHAPE = {"n_layer": 3, "n_embd": 192, "block_size": 256, "vocab_size": 8192}


def write_bench(path, monkeypatch, *records):
    """Records of bench/step.py: case, time ratio, and what else is not as usual."""
    usual = {
        "bench": "step",
        "baseline": "softmax",
        "machine": "A",
        "memory_ratio": 1.0,
        "shapes": SHAPE,
    }
    lines = (usual | {"case": case, "time_ratio": ratio} | other for case, ratio, other in records)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(summary, "BENCH", path)


def costs(study) -> dict[str, str]:
    found = cells(summary.table(study, "summary"))
    at = found["head"].index("time of a step") if "time of a step" in found["head"] else None
    return {
        row: line[at]
        for row, line in found.items()
        if at and line[at] not in ("", "---", "time of a step")
    }


def test_costs_are_the_latest_of_one_machine_and_of_the_studys_size(tmp_path, monkeypatch):
    rows = ("softmax", "bayes", "smooth", "sigmoid", "bayes_sigmoid", "dropout")
    study = write(tmp_path / "study", dict.fromkeys(rows, {1: 5.0}))
    (study / "softmax-seed1/config.json").write_text(json.dumps(SHAPE | {"vocab_size": 8190}))
    other = [("bayes", 9.0, {"shapes": SHAPE | {name: SHAPE[name] * 2}}) for name in SHAPE]
    other += [("bayes", 9.0, {"bench": "heads"}), ("bayes", 9.0, {"baseline": "plain"})]
    measured = [("smooth", 3.0, {"machine": "B"}), ("sigmoid", 3.0, {"machine": "B"})]
    measured += [("bayes", 1.5, {}), ("sigmoid", 1.2, {}), ("bayes", 1.25, {})]
    write_bench(tmp_path / "bench.jsonl", monkeypatch, *measured, *other)
    assert costs(study) == {"softmax": "1.00", "Bayes": "1.25", "sigmoid": "1.20"}
    (study / "softmax-seed1/config.json").write_text(json.dumps(SHAPE | {"vocab_size": 8193}))
    assert costs(study) == {}  # of no record: the next multiple of 64 is another


def test_rows_that_cost_what_another_does_have_its_measurement(tmp_path, monkeypatch):
    study = write(
        tmp_path / "study", dict.fromkeys(("softmax", "smooth_05", "sigmoid_weighted"), {1: 5.0})
    )
    (study / "softmax-seed1/config.json").write_text(json.dumps(SHAPE))
    write_bench(tmp_path / "bench.jsonl", monkeypatch, ("smooth", 1.1, {}), ("sigmoid", 1.3, {}))
    assert costs(study) == {
        "softmax": "1.00",
        "smooth, ε = 0.05": "1.10",
        "sigmoid weighted": "1.30",
    }


def test_all_trials_are_listed_and_the_lowest_stands_out(tmp_path):
    trials = [("softmax", "--learning_rate=0.1", 5.0), ("softmax", "--learning_rate=0.2", 4.5)]
    lines = [
        json.dumps({"row": row, "flags": [flag], "val_nll": nll}) + "\n"
        for row, flag, nll in trials
    ]
    (tmp_path / "tuning.jsonl").write_text("".join(lines))
    found = cells(summary.table(tmp_path, "tuning"))
    assert found["softmax"] == ["learning_rate 0.1: 5.000", "**learning_rate 0.2: 4.500**"]


@pytest.mark.parametrize(
    ("file", "text", "kind", "says"),
    [
        (
            "softmax-seed1/eval_test.json",
            "{",
            "prediction",
            "softmax-seed1/eval_test.json is damaged",
        ),
        (
            "softmax-seed1/eval_test.json",
            "[]",
            "prediction",
            "softmax-seed1/eval_test.json is damaged",
        ),
        ("softmax-seed1/config.json", "{", "prediction", "softmax-seed1/config.json is damaged"),
        ("tuning.jsonl", '{"row": "softmax", "fl', "tuning", "tuning.jsonl, line 1, is damaged"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, file, text, kind, says):
    path = write(tmp_path / "study") / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(UserError) as error:
        summary.table(tmp_path / "study", kind)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_run_without_curve_or_evaluation_costs_no_more_than_its_cell(tmp_path):
    study = write(tmp_path / "study", {"softmax": {1: 5.0, 2: 5.2}, "sigmoid": {1: 5.0, 2: 5.2}})
    (study / "softmax-seed1/metrics.jsonl").unlink()
    for seed in (1, 2):
        (study / f"sigmoid-seed{seed}/metrics.jsonl").write_text(
            '{"step": 1, "tokens": 100, "loss": 5.0}\n{"st'
        )
    (study / "softmax-seed3").mkdir()
    (study / "softmax-seedx.zip").write_text("")
    assert [row[:2] for row in cells(summary.table(study, "prediction")).values()][2:] == [
        ["2", "5.100 ± 0.141"]
    ] * 2
    curves = [row.curves for row in summary.read(study).values()]
    assert list(curves[0]) == [2] and len(curves[0][2]) == 3 and curves[1] == {}


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_tables_are_what_the_logs_say(name):
    page = PAGES[name].read_text(encoding="utf-8")
    assert summary.fill(page) == page, "make results"


def test_a_number_changed_by_hand_is_seen(tmp_path, monkeypatch):
    write(tmp_path / "study")
    monkeypatch.setattr(summary, "LOGS", tmp_path)
    page = summary.fill("before\n<!-- table: study prediction -->\n<!-- end -->\nafter\n")
    assert page.startswith("before\n") and page.endswith("\nafter\n") and summary.fill(page) == page
    assert summary.fill(page.replace("5.037", "4.037", 1)) == page


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (
            "<!-- table: of-mine prediction -->\nprose\n"
            "<!-- table: of-mine uncertainty -->\n<!-- end -->\n",
            "has no <!-- end -->",
        ),
        ("<!-- table: of-mine prediction -->\nprose\n", "has no <!-- end -->"),
        ("<!-- table: of_mine prediction -->\n<!-- end -->", "there is no study 'of_mine'"),
        ("<!-- table: prediction -->\n<!-- end -->", "there is no study ''"),
        ("<!-- table: of-mine tuning -->\n<!-- end -->", "the logs have nothing for this table"),
        ("<!-- table: of-mine beside -->\n<!-- end -->", "the logs have nothing for this table"),
        (
            "<!-- table: of-mine+of-mine prediction -->\n<!-- end -->",
            "the logs have nothing for this table",
        ),
        ("<!-- table: of-mine+of_mine beside -->\n<!-- end -->", "there is no study 'of_mine'"),
        (
            "<!-- table: of-mine predictions -->\n<!-- end -->",
            "kind 'predictions' is none of: summary, prediction, uncertainty",
        ),
    ],
)
def test_a_slip_in_a_pages_marker_is_said_and_no_page_written(tmp_path, monkeypatch, page, says):
    write(tmp_path / "of-mine")
    (good := tmp_path / "good.md").write_text(
        "<!-- table: of-mine prediction -->\nold\n<!-- end -->\nprose"
    )
    (bad := tmp_path / "bad.md").write_text(page)
    monkeypatch.setattr(summary, "LOGS", tmp_path)
    monkeypatch.setattr(summary, "PAGES", [good, bad])
    with pytest.raises(UserError) as error:
        summary.main()
    assert says in str(error.value)
    assert "old" in good.read_text() and bad.read_text() == page
    assert "| softmax | 3 |" in summary.fill(good.read_text()) and summary.fill(
        good.read_text()
    ).endswith("prose")


def test_every_study_of_the_logs_has_a_table_in_a_page():
    pages = "".join(page.read_text() for page in PAGES.values())
    asked = set(re.findall(r"<!-- table: (\S+) (?:brief|summary|prediction) ", pages))
    studies = {path.parts[-3] for path in summary.LOGS.glob("*/*/eval_test.json")}
    assert studies == asked


def test_make_results_draws_the_pictures_that_pages_show(tmp_path, monkeypatch):
    study = write(tmp_path / "study")
    shutil.copy(summary.LOGS / "quickstart/softmax-seed1337/config.json", study / "softmax-seed1")
    (page := tmp_path / "page.md").write_text(
        "![](study/summary.png) <!-- table: study prediction -->\n<!-- end -->\n"
    )
    monkeypatch.setattr(summary, "LOGS", tmp_path)
    monkeypatch.setattr(summary, "PAGES", [page])
    summary.main()
    assert "| softmax | 3 |" in page.read_text()
    assert [path.name for path in study.glob("*.png")] == ["summary.png"]


def decimals(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"(?<![\w.])\d*\.\d+(?![\w.]*\w)", text)}


def tables_and_prose(text: str) -> tuple[str, str]:
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    return tuple(
        "\n".join(line for line in text.splitlines() if (line[:1] == "|") == is_)
        for is_ in (True, False)
    )


def test_a_decimal_in_the_studys_prose_stands_in_the_tables_beside_it():
    """Of the same section, or of the page of its text and regime; pages without tables of logs, and
    the README's results, speak of all tables."""
    texts = {name: page.read_text(encoding="utf-8") for name, page in PAGES.items()}
    everywhere = decimals(
        "\n".join(made[0] for text in texts.values() for made in summary.MARKED.finditer(text))
    )
    studies = [
        text
        for name, text in texts.items()
        if re.fullmatch(r"training_logs/\w+_8k\w*/README.md", name)
    ]
    assert len(studies) == 3
    for part in [*texts["training_logs/README.md"].split("\n## "), *studies]:
        tables, prose = map(decimals, tables_and_prose(part))
        assert prose - (tables if "<!-- table:" in part else everywhere) == set(), part.partition(
            "\n"
        )[0]
    results = texts["README.md"].partition("## What you see")[2].partition("## What now?")[0]
    errors = [
        json.loads(path.read_text())["nll_se"]
        for path in summary.LOGS.glob("quickstart/*/eval_test.json")
    ]
    assert (
        decimals(tables_and_prose(results)[1]) - everywhere - {round(error, 3) for error in errors}
        == set()
    )
    assert decimals("of 1.25, .5 or -0.031 nats, not 2.10.3") == {1.25, 0.5, 0.031}


def test_no_tuned_run_over_fits_in_nll():
    """As the study's page says: each ends at the lowest nll of its validation curve."""
    rows = [
        row
        for study in summary.LOGS.glob("*_8k*")
        for row in summary.read(study).values()
        if row.curves
    ]
    curves = [list(curve.values()) for row in rows for curve in row.curves.values()]
    assert curves and all(curve[-1] == min(curve) for curve in curves)
