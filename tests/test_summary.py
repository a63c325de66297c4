"""study/summary.py and study/logs.py: the studies' tables hold what the logs do, and the pages
hold the tables.
"""

import json
import math
import shutil

import numpy as np
import pytest

from study import summary
from tests.helpers import ROOT, refusal

PAGES = {str(page.relative_to(ROOT)): page for page in summary.PAGES}
NLL = {  # variant -> seed -> nll
    "softmax": {1: 5.0, 2: 5.2, 3: 5.1},
    "sigmoid": {1: 4.9, 2: 5.15, 3: 5.06},
    "sigmoid_taught": {1: 4.8, 9: 4.8},  # softmax has no seed 9
}


def write_json(path, contents) -> None:
    path.write_text(json.dumps(contents))


def write(study, nll=NLL):
    """A study's folder with runs of these test nlls."""
    for variant, seeds in nll.items():
        for seed, value in seeds.items():
            folder = study / f"{variant}-seed{seed}"
            folder.mkdir(parents=True)
            numbers = {"nll": value, "perplexity": math.exp(value), "ece": seed / 100}
            write_json(folder / "eval_test.json", numbers)
            lines = []
            for step, above in enumerate((0, 0.5, 0.25, 0.375)):
                record = {"step": step, "tokens": 100 * step, "val_nll": value + above}
                lines.append(json.dumps(record | {"seconds": 10.0 * step}) + "\n")
            (folder / "metrics.jsonl").write_text("".join(lines))
    return study


def cells(text: str) -> dict[str, list[str]]:
    """The cells of a table, by those of its first column."""
    found = {}
    for line in text.splitlines():
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        found[first] = others
    return found


def test_a_table_has_means_and_deviations_over_seeds_and_ratios_of_the_same_seed(tmp_path):
    found = cells(summary.table(write(tmp_path / "study"), "prediction"))
    assert found["head"] == ["seeds", "nll", "perplexity", "vs softmax", "ECE"]
    nll = np.array(list(NLL["sigmoid"].values()))
    ratio = np.exp(nll - np.array(list(NLL["softmax"].values())))
    assert found["sigmoid"] == [
        "3",
        f"{nll.mean():.3f} ± {nll.std(ddof=1):.3f}",
        f"{np.exp(nll).mean():.2f}",
        f"{ratio.mean():.3f} ± {ratio.std(ddof=1):.3f}",
        "0.0200 ± 0.0100",
    ]
    distilled = ["2", "4.800", f"{math.exp(4.8):.2f}", f"{math.exp(-0.2):.3f}"]
    assert found["sigmoid, distilled"][:4] == distilled


def test_an_ensemble_is_compared_with_softmaxs_mean_and_other_kinds_with_their_seed(tmp_path):
    study = write(tmp_path / "study")
    for kind in ("averaged", "ensemble_of_4"):
        write_json(study / f"softmax-seed2/eval_test_{kind}.json", {"nll": 4.7})
    found = cells(summary.table(study, "prediction"))
    assert found["softmax, averaged"] == ["1", "4.700", "", f"{math.exp(4.7 - 5.2):.3f}", ""]
    # it has no seeds of its own
    assert found["softmax, ensemble of 4"] == ["", "4.700", "", f"{math.exp(4.7 - 5.1):.3f}", ""]


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_of_a_page_hold_what_the_logs_do(name):
    """This also holds labels, the line of token frequencies, and the lists of trials."""
    page = PAGES[name].read_text(encoding="utf-8")
    assert summary.fill(page) == page, "make results"


@pytest.mark.parametrize(
    "page, word",
    [
        ("<!-- table: mine prediction -->\n<!-- table: mine tuning -->\n<!-- end -->\n", "end"),
        ("<!-- table: yours prediction -->\n<!-- end -->", "yours"),
        ("<!-- table: mine predictions -->\n<!-- end -->", "predictions"),
    ],
)
def test_after_a_mistake_in_a_pages_marker_no_page_is_written(tmp_path, monkeypatch, page, word):
    write(tmp_path / "mine")
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    old = "<!-- table: mine prediction -->\nold\n<!-- end -->\nprose"
    good.write_text(old)
    bad.write_text(page)
    monkeypatch.setattr(summary, "LOGS", tmp_path)
    monkeypatch.setattr(summary, "PAGES", [good, bad])
    assert word in refusal(summary.main)
    assert good.read_text() == old


def test_the_command_writes_the_tables_and_draws_the_pictures_that_pages_show(
    tmp_path, monkeypatch
):
    study = write(tmp_path / "study")
    shutil.copy(summary.LOGS / "quickstart/softmax-seed1337/config.json", study / "softmax-seed1")
    page = tmp_path / "page.md"
    page.write_text("![](study/summary.png) <!-- table: study prediction -->\n<!-- end -->\nprose")
    monkeypatch.setattr(summary, "LOGS", tmp_path)
    monkeypatch.setattr(summary, "PAGES", [page])
    summary.main()
    assert "| softmax | 3 |" in page.read_text() and page.read_text().endswith("prose")
    assert [path.name for path in study.glob("*.png")] == ["summary.png"]
