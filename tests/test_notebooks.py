"""The notebooks run on other runs than the kept ones, and what is kept is whole and light."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks.execute import execute
from study import summary
from tests.helpers import ROOT, TINY, flags, run, write_bytes

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {"play", "bayes_gpt", "results"}
PATH = re.compile(
    r"(?<![\w.:/<])/(tmp|work|home|root|Users|usr|opt|var|mnt)\b|site-packages|Traceback|[A-Z]:\\\\"
)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A working copy, so that nothing is written to this one; IPython's history goes there, too."""
    for name in ("notebooks", "engine", "heads", "study", "config", "training_logs", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def shown(notebook: nbformat.NotebookNode) -> str:
    """All texts that the cells show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return json.dumps(
        [output.get("text") or {**output.data, "image/png": ""} for output in outputs]
    )


def said(error: CellExecutionError) -> str:
    """What a failing cell showed behind its source."""
    return error.traceback.rpartition("---\n")[2].strip()


def n_pictures(notebook: nbformat.NotebookNode) -> int:
    return sum(
        "image/png" in output.get("data", ())
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )


def test_play_trains_samples_and_looks_inside(copy):
    data = write_bytes(copy / "words")
    options = flags(
        **{name: value for name, value in TINY.items() if name != "max_iters"}, max_iters=5
    )
    notebook = execute(
        copy / "notebooks/play.ipynb",
        dataset=str(data),
        out_dir="out/tiny",
        options=options,
        prompt="the",
        sentence="the old sea",
        words=["t", "no token"],
    )
    assert (copy / "out/tiny/ckpt_00000005.pt").exists()
    assert (
        "step 5/5" in shown(notebook) and "tokens]" in shown(notebook) and n_pictures(notebook) == 4
    )


def test_bayes_gpt_asks_any_bayesian_run(copy):
    data = write_bytes(copy / "words")
    for name, weights in (("bayes", "bayes"), ("softmax", "point")):
        run(data, copy / "out" / name, weights=weights, max_iters=10, eval_interval=10)
    runs = {"bayes": "out/bayes", "softmax": "out/softmax"}
    notebook = execute(copy / "notebooks/bayes_gpt.ipynb", prompt="the old", n_blocks=8, **runs)
    assert n_pictures(notebook) == 5 and "mutual_information" in shown(notebook)


def test_bayes_gpt_says_in_a_line_what_to_run_first(copy):
    with pytest.raises(CellExecutionError) as error:
        execute(copy / "notebooks/bayes_gpt.ipynb")
    assert (
        said(error.value)
        == "error: out/quickstart/bayes is missing: `make run` trains it, in about 8 minutes"
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        ("logs", "there are no studies in"),
        ("eval_test.json", "bayes-seed1337/eval_test.json is damaged"),
    ],
)
def test_results_says_in_a_line_what_is_wrong_with_the_logs(copy, damage, message):
    if damage == "eval_test.json":
        (copy / "training_logs/quickstart/bayes-seed1337/eval_test.json").write_text('{"nll": 4.')
    with pytest.raises(CellExecutionError) as error:
        execute(
            copy / "notebooks/results.ipynb", **({"logs": "nowhere"} if damage == "logs" else {})
        )
    (line,) = said(error.value).splitlines()
    assert line.startswith("error: ") and message in line


def test_results_shows_a_run_that_someone_adds(copy):
    logs = copy / "training_logs"
    for study in [path for path in logs.iterdir() if path.is_dir() and path.name != "quickstart"]:
        shutil.rmtree(study)
    shutil.copytree(logs / "quickstart/bayes-seed1337", logs / "quickstart/mine-seed7")
    (logs / "new/softmax-seed1").mkdir(parents=True)  # not evaluated yet
    shutil.copy(logs / "quickstart/bayes-seed1337/metrics.jsonl", logs / "new/softmax-seed1")
    text = shown(notebook := execute(copy / "notebooks/results.ipynb"))
    assert "| mine, kl_weight 0.1 | 1 | 4.319 |" in text and "| sigmoid | 1 | 4.297 |" in text
    assert "new: nothing evaluated yet" in text and n_pictures(notebook) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_a_whole_run_light_and_of_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 600_000
    assert PATH.search(shown(notebook)) is None
    assert n_pictures(notebook) >= 4
    assert notebook.metadata.kernelspec.name == "python3"
    assert not [cell for cell in notebook.cells if cell.metadata.keys() - {"tags"}]
    for cell in code:  # what prints, ends in a value or draws has shown something
        last = cell.source.splitlines()[-1]
        if last.startswith(("plt.show()", "print(")) or re.fullmatch(
            r"\w+_figure\(.*\)|reading.*", last
        ):
            assert cell.outputs


def test_results_is_kept_with_the_tables_that_the_logs_make_today():
    kept = nbformat.read(ROOT / "notebooks/results.ipynb", as_version=4)
    shown_tables = [
        output.data.get("text/markdown")
        for cell in kept.cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    for study in filter(Path.is_dir, summary.LOGS.iterdir()):
        for kind in (*summary.COLUMNS, "tuning"):
            assert summary.table(study, kind) in shown_tables, (
                f"{study.name} {kind}: notebooks/execute.py"
            )


def test_all_notebooks_are_tested_and_begin_alike():
    assert {path.stem for path in NOTEBOOKS} == NAMES
    first = {
        next(c.source for c in nbformat.read(p, 4).cells if c.cell_type == "code")
        for p in NOTEBOOKS
    }
    assert len(first) == 1


def test_play_is_kept_with_the_banner_that_runs_begin_with_today():
    assert re.search(
        r"  parameters   \d.*  a step       .*  the run ",
        shown(nbformat.read(NOTEBOOKS[1], 4)),
    )
