"""The notebooks run on other runs than the kept ones, and what is kept is complete and small."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from engine.base.files import read_json
from notebooks.execute import execute
from study import summary
from tests.helpers import ROOT, TINY, flags, run, write_bytes

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/<])/(tmp|work|home|root|Users|usr|opt|var|mnt)\b|Traceback")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A working copy, so that nothing is written to this one; IPython's history goes there too."""
    for name in ("notebooks", "engine", "heads", "study", "config", "training_logs", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def outputs_of(notebook: nbformat.NotebookNode) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def shown(notebook: nbformat.NotebookNode) -> str:
    """All texts that the cells show."""
    texts = []
    for output in outputs_of(notebook):
        assert output.get("name") != "stderr"
        texts.append(output.get("text") or {**output.data, "image/png": ""})
    return json.dumps(texts)


def n_pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", ()) for output in outputs_of(notebook))


@pytest.mark.slow
def test_play_trains_samples_and_looks_inside(copy):
    notebook = execute(
        copy / "notebooks/play.ipynb",
        dataset=str(write_bytes(copy / "words")),
        out_dir="out/tiny",
        options=flags(**TINY | {"max_iters": 5}),
        prompt="the",
        sentence="the old sea",
        words=["t", "no token"],
    )
    assert (copy / "out/tiny/ckpt_00000005.pt").exists()
    assert "tokens]" in shown(notebook)
    assert n_pictures(notebook) == 4


@pytest.mark.slow
def test_bayes_gpt_uses_any_bayesian_run(copy):
    data = write_bytes(copy / "words")
    for weights in ("bayes", "point"):
        run(data, copy / "out" / weights, weights=weights, max_iters=10)
    notebook = execute(
        copy / "notebooks/bayes_gpt.ipynb",
        bayes="out/bayes",
        softmax="out/point",
        fitted="out/kron",
        prompt="the old",
        n_blocks=8,
    )
    assert n_pictures(notebook) == 4
    assert "mutual_information" in shown(notebook)


@pytest.mark.slow
def test_bayes_gpt_without_its_runs_ends_in_one_line(copy):
    with pytest.raises(CellExecutionError) as error:
        execute(copy / "notebooks/bayes_gpt.ipynb")
    (line,) = error.value.traceback.rpartition("---\n")[2].strip().splitlines()
    assert line.startswith("error: out/quickstart/bayes")


@pytest.mark.slow
def test_results_shows_the_studies_of_a_folder(copy):
    shutil.copytree(copy / "training_logs/quickstart", copy / "logs/mine")
    (copy / "logs/new/softmax-seed1").mkdir(parents=True)  # not evaluated yet
    notebook = execute(copy / "notebooks/results.ipynb", logs="logs")
    scores = read_json(copy / "logs/mine/sigmoid-seed1337/eval_test.json")
    assert f"| sigmoid | 1 | {scores['nll']:.3f} |" in shown(notebook)
    assert n_pictures(notebook) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_kept_notebook_is_a_complete_run_and_names_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    assert path.stat().st_size < 750_000
    assert MACHINE_PATH.search(shown(notebook)) is None
    assert n_pictures(notebook) >= 4


def test_the_kept_results_are_the_tables_that_the_logs_make_today():
    notebook = nbformat.read(ROOT / "notebooks/results.ipynb", as_version=4)
    tables = [output.get("data", {}).get("text/markdown") for output in outputs_of(notebook)]
    for study in filter(Path.is_dir, summary.LOGS.iterdir()):
        for kind in (*summary.COLUMNS, "tuning"):
            assert summary.table(study, kind) in tables, "make results"
