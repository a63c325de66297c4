"""config/: the eight rows of the paper's table, at two sizes."""

import ast
import re

import pytest

from engine.config import flatten, load_config
from heads import HeadConfig
from tests.helpers import ROOT
from train import TrainConfig

STUDIES = {"wikitext_100m": (1024, 118e6), "wikitext2_cpu": (256, 2.42e6)}  # block_size, training tokens
every_study = pytest.mark.parametrize("study", STUDIES)


def fixed_by(script: str) -> dict[str, str]:
    """The options that a training script decides itself."""
    calls = [node for node in ast.walk(ast.parse((ROOT / script).read_text())) if isinstance(node, ast.Call)]
    main = next(c for c in calls if getattr(c.func, "id", "") == "main")
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in main.keywords}


def rows(study: str) -> dict[str, dict]:
    """File name -> its options, loaded by the script that the file's own command names."""
    found = {}
    for path in sorted(ROOT.glob(f"config/train_*{study}.py")):
        script, named = re.search(r"python (train\w*\.py) (config/\w+\.py)", path.read_text()).groups()
        assert named == f"config/{path.name}"
        found[path.name] = flatten(load_config(TrainConfig, [str(path)], fixed_by(script))[0])
        assert found[path.name] == flatten(load_config(TrainConfig, [str(path)])[0]), "train.py must train the same row"
    return found


@every_study
def test_a_study_has_the_eight_rows_which_differ_in_the_head_and_the_folder_alone(study):
    found = rows(study)
    assert len({row["out_dir"] for row in found.values()}) == len(found) == 8
    heads = flatten(HeadConfig()).keys()
    shared = [{k: v for k, v in row.items() if k not in heads and k != "out_dir"} for row in found.values()]
    assert all(row == shared[0] for row in shared)
    chosen = ("weights", "likelihood", "label_smoothing", "sum_penalty", "pos_weight")
    kinds = [{(k, row[k]) for k in chosen} - {(k, flatten(HeadConfig())[k]) for k in chosen} for row in found.values()]
    bayes, sigmoid = ("weights", "bayes"), ("likelihood", "sigmoid")
    weighted, penalised = ("pos_weight", 2.0), ("sum_penalty", 1.0)
    smooth = ("likelihood", "smooth")
    expected = [set(), {bayes}, {sigmoid}, {sigmoid, weighted}, {sigmoid, penalised}, {bayes, sigmoid, weighted}]
    assert sorted(map(sorted, kinds)) == sorted(map(sorted, [*expected, {smooth}, {smooth, ("label_smoothing", 0.05)}]))


@every_study
def test_the_first_row_tells_its_steps_and_tokens_truly(study):
    (block_size, n_data), row = STUDIES[study], rows(study)[f"train_gpt2_{study}.py"]
    text = (ROOT / f"config/train_gpt2_{study}.py").read_text()
    tokens = row["batch_size"] * row["gradient_accumulation_steps"] * block_size
    assert row["block_size"] == block_size
    assert f"{row['max_iters']} steps of" in text.replace("\n# ", " ") and f"{tokens:,} tokens" in text
    epochs = int(re.search(r"(\d+|one) epochs?", text)[1].replace("one", "1"))
    assert row["max_iters"] * tokens == pytest.approx(epochs * n_data, rel=0.01)
