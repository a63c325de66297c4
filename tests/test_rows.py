"""config/rows/: the rows of the paper's table, on every scale of the study."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

from engine.base.options import flatten, load_config
from heads import HeadConfig
from study.variants import MAIN, PAPER, STUDIES
from tests.helpers import ROOT
from train import TrainConfig

SCALES = {  # tokens of the train split, as its prepare script says them
    "train_gpt2_wikitext_100m": 118e6,
    "train_gpt2_wikitext2_cpu": 2.42e6,
    "train_wikitext2_8k": 2_695_190,
    "train_wikitext2_8k_tenth": 281_113,
    "train_sotu_8k": 1_973_890,
}
ROWS = sorted(path.stem for path in ROOT.glob("config/rows/*.py"))
SCRIPTS = {  # weights, likelihood
    ("point", "categorical"): "train.py",
    ("point", "smooth"): "train_smooth.py",
    ("bayes", "categorical"): "train_bayes.py",
    ("point", "sigmoid"): "train_sigmoid.py",
    ("bayes", "sigmoid"): "train_bayes_sigmoid.py",
}
every_scale = pytest.mark.parametrize("scale", SCALES)


def fixed_by(script: str) -> dict[str, str]:
    """The options that a training script decides itself."""
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / script).read_text()))
        if isinstance(node, ast.Call)
    ]
    main = next(c for c in calls if getattr(c.func, "id", "") == "main")
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in main.keywords}


def options(scale: str, *rows: str, script: str = "train.py") -> dict:
    """What a script makes of a scale and a row."""
    files = [ROOT / f"config/{scale}.py", *(ROOT / f"config/rows/{row}.py" for row in rows)]
    return flatten(load_config(TrainConfig, list(map(str, files)), fixed_by(script))[0])


def test_the_study_has_all_scales_and_all_rows():
    assert {study.scale for study in STUDIES.values()} == set(SCALES)
    assert {*PAPER, *MAIN, "dropout"} <= set(ROWS) and len(PAPER) == 8


def test_main_rows_have_several_seeds_where_they_are_tuned():
    for name, study in STUDIES.items():
        several = {"wikitext2_8k": 4, "wikitext2_8k_tenth": 4, "sotu_8k": 3}.get(name, 1)
        assert (bool(study.rates), bool(study.tuned_as)) == (several == 4, several == 3)
        for row in study.all_variants():
            assert len(study.seeds(row)) == (several if row in MAIN else 1), (name, row)


@every_scale
def test_the_papers_eight_rows_differ_in_the_head_alone_and_dropout_in_its_rate(scale):
    heads, found = flatten(HeadConfig()), {row: options(scale, row) for row in ROWS}
    kinds = {row: {k: v for k, v in found[row].items() if heads.get(k, v) != v} for row in PAPER}
    assert all(kind.pop("logit_bias") == "unigram" for kind in kinds.values())
    bayes, sigmoid = {"weights": "bayes", "kl_weight": 0.1}, {"likelihood": "sigmoid"}
    assert kinds == {
        "softmax": {},
        "smooth_05": {"likelihood": "smooth", "label_smoothing": 0.05},
        "smooth": {"likelihood": "smooth"},  # 0.1 is the default
        "bayes": bayes,
        "sigmoid": sigmoid,
        "sigmoid_regularised": sigmoid | {"sum_penalty": 1.0},
        "sigmoid_weighted": sigmoid | {"pos_weight": 2.0},
        "bayes_sigmoid_weighted": bayes | sigmoid | {"pos_weight": 2.0},
    }
    shared = [{k: v for k, v in found[row].items() if k not in heads} for row in PAPER]
    assert all(row == shared[0] for row in shared)
    assert found["dropout"] == found["softmax"] | {"dropout": 0.1} != found["softmax"]


@every_scale
def test_the_script_of_a_head_takes_scale_and_row_and_trains_what_train_py_does(scale):
    for row in ROWS:
        by_train = options(scale, row)
        script = SCRIPTS[by_train["weights"], by_train["likelihood"]]
        assert options(scale, row, script=script) == by_train
        assert options(scale, script=script) == options(scale) | fixed_by(script)


@every_scale
def test_a_scale_tells_how_a_row_is_run_on_it_in_a_folder_of_its_own(scale, monkeypatch):
    text = re.sub(r" \\\n#\s+", " ", (ROOT / f"config/{scale}.py").read_text())
    command = r"python train\.py (config/\w+\.py config/rows/\w+\.py --out_dir=\S+)"
    argv = re.search(command, text)[1].split()
    monkeypatch.chdir(ROOT)
    found, row = flatten(load_config(TrainConfig, argv)[0]), Path(argv[1]).stem
    assert found == options(scale, row) | {"out_dir": found["out_dir"]}
    assert Path(found["out_dir"]) == Path(options(scale)["out_dir"]).with_name(row)


@every_scale
def test_a_scale_tells_its_epochs_truly(scale):
    found, text = options(scale), (ROOT / f"config/{scale}.py").read_text()
    tokens = found["batch_size"] * found["gradient_accumulation_steps"] * found["block_size"]
    epochs = int(re.search(r"(\d+|one) epochs?", text)[1].replace("one", "1"))
    assert found["max_iters"] * tokens == pytest.approx(epochs * SCALES[scale], rel=0.01)


def test_the_table_of_rows_says_what_their_files_do():
    table = dict(
        re.findall(
            r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "config/README.md").read_text(), re.MULTILINE
        )
    )
    assert sorted(table) == ROWS
    for row, cell in table.items():
        given = runpy.run_path(str(ROOT / f"config/rows/{row}.py")).items()
        assert cell == ", ".join(
            f"`{name} = {json.dumps(value)}`" for name, value in given if name[0] != "_"
        )
