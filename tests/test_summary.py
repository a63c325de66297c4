"""engine/summary.py: the study's tables are what the logs say, and the pages hold them."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from engine import summary
from engine.errors import UserError
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
            numbers = {"nll": value, "perplexity": math.exp(value), "ece": seed / 100, "kl_weight": 1}
            (folder / "eval_test.json").write_text(json.dumps(numbers))
            steps = [{"step": step, "tokens": 100 * step, "val_nll": value + 1 / (1 + step)} for step in (0, 1, 2)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return study


def cells(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_a_table_has_means_and_standard_deviations_over_seeds_and_ratios_of_the_same_seed(tmp_path):
    found = cells(summary.table(write(tmp_path / "study"), "prediction"))
    assert found["head"] == ["seeds", "nll", "perplexity", "vs softmax", "lowest val nll", "ECE"]
    for row, label in (("softmax", "softmax"), ("sigmoid", "sigmoid")):
        nll = np.array(list(NLL[row].values()))
        ratio = np.exp(nll - np.array(list(NLL["softmax"].values())))
        expected = ["3", f"{nll.mean():.3f} ± {nll.std(ddof=1):.3f}", f"{np.exp(nll).mean():.2f}"]
        of_ratio = "1.000" if row == "softmax" else f"{ratio.mean():.3f} ± {ratio.std(ddof=1):.3f}"
        expected += [of_ratio, f"{nll.mean() + 1 / 3:.3f}", ".0200 ± .0100"]
        assert found[label] == expected
    assert found["sigmoid, taught"] == ["1", "4.800", f"{math.exp(4.8):.2f}", f"{math.exp(-0.2):.3f}", "5.133", ".0100"]


def test_rows_keep_their_order_and_a_stranger_comes_last(tmp_path):
    study = write(tmp_path / "study", NLL | {"bayes": {1: 5.0}, "a_new_one": {1: 5.0}})
    assert list(summary.read(study)) == ["softmax", "bayes", "sigmoid", "sigmoid_taught", "a_new_one"]


def test_an_ensemble_is_compared_with_the_mean_of_its_members(tmp_path):
    study = write(tmp_path / "study")
    (study / "softmax-seed1/eval_test_ensemble_of_4.json").write_text(json.dumps({"nll": 4.7}))
    found = cells(summary.table(study, "prediction"))["softmax, ensemble of 4"]
    assert found[3] == f"{math.exp(4.7 - 5.1):.3f}"


def test_all_trials_are_listed_and_the_lowest_stands_out(tmp_path):
    trials = [("softmax", "--learning_rate=0.1", 5.0), ("softmax", "--learning_rate=0.2", 4.5)]
    lines = [json.dumps({"row": row, "flags": [flag], "val_nll": nll}) + "\n" for row, flag, nll in trials]
    (tmp_path / "tuning.jsonl").write_text("".join(lines))
    found = cells(summary.table(tmp_path, "tuning"))
    assert found["softmax"] == ["learning_rate 0.1: 5.000", "**learning_rate 0.2: 4.500**"]


def test_a_damaged_result_and_an_unknown_kind_of_table_are_named(tmp_path):
    study = write(tmp_path / "study")
    with pytest.raises(UserError, match="none of: prediction"):
        summary.table(study, "beauty")
    (study / "softmax-seed1/eval_test.json").write_text("{")
    with pytest.raises(UserError, match=r"softmax-seed1/eval_test.json is damaged"):
        summary.table(study, "prediction")


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


def test_every_study_of_the_logs_has_a_table_in_a_page():
    asked = set(re.findall(r"<!-- table: (\w+) prediction", "".join(page.read_text() for page in PAGES.values())))
    studies = {path.parts[-3] for path in summary.LOGS.glob("*/*/eval_test.json")}
    assert studies - {"quickstart"} == asked


def test_make_results_draws_the_pictures_that_pages_show(tmp_path, monkeypatch):
    study = write(tmp_path / "study")
    shutil.copy(summary.LOGS / "quickstart/softmax-seed1337/config.json", study / "softmax-seed1")
    (page := tmp_path / "page.md").write_text("![](study/summary.png) <!-- table: study prediction -->\n<!-- end -->\n")
    monkeypatch.setattr(summary, "LOGS", tmp_path)
    monkeypatch.setattr(summary, "PAGES", [page])
    summary.main()
    assert "| softmax | 3 |" in page.read_text()
    assert [path.name for path in study.glob("*.png")] == ["summary.png"]


def decimals(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"(?<![\w.])\d*\.\d+(?![\w.]*\w)", text)}


def test_a_decimal_in_the_studys_prose_stands_in_one_of_its_tables():
    page = re.sub(r"`[^`]*`|\]\([^)]*\)", "", PAGES["training_logs/README.md"].read_text(encoding="utf-8"))
    tables, prose = ("\n".join(line for line in page.splitlines() if (line[:1] == "|") == is_) for is_ in (True, False))
    tables += "".join(line for line in PAGES["docs/results.md"].read_text().splitlines() if line.startswith("|"))
    assert decimals(prose) - decimals(tables) == set()
    assert decimals("of 1.25, .5 or -0.031 nats, not 2.10.3") == {1.25, 0.5, 0.031}
