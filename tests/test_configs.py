"""config/: its table against the files, and the rows of the paper's table on every scale."""

import re

import pytest

from engine.base.options import flatten, load_config
from heads import HeadConfig
from study.variants import MAIN, PAPER, STUDIES
from tests.helpers import ROOT
from tests.test_config import FIXED
from train import TrainConfig

TABLE = {}  # name of a file -> the cells of its line
for line in (ROOT / "config/README.md").read_text().splitlines():
    name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
    if name.endswith(".py`"):
        TABLE[name.strip("`")] = cells
UNITS = {"": 1, "M": 1e6, "B": 1e9}


ROWS = sorted(path.stem for path in ROOT.glob("config/rows/*.py"))


def load(*names: str) -> TrainConfig:
    """The options of train.py with these files of config/."""
    paths = [str(ROOT / "config" / name) for name in names]
    return load_config(TrainConfig, paths)[0]


def tokens_per_step(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps * config.model.block_size


def test_the_table_has_a_line_for_each_file_and_its_number_of_tokens():
    assert sorted(TABLE) == sorted(path.name for path in ROOT.glob("config/*.py"))
    for name, (_, prepare, tokens, *_) in TABLE.items():
        config = load(name)
        number, unit = re.fullmatch(r"([\d.,]+) ?([MB]?)", tokens).groups()
        expected = 0 if config.eval_only else config.max_iters * tokens_per_step(config)
        found = float(number.replace(",", "")) * UNITS[unit]
        assert found == pytest.approx(expected, rel=0.02), name
        # the comment of a file has the command that prepares its data
        comment = (ROOT / "config" / name).read_text()
        comment = re.sub(r" \\\n# +", " ", comment)
        assert f"python {prepare.strip('`')}" in comment, name


def test_the_sizes_of_gpt2_differ_from_124m_in_size_batch_and_rate_alone():
    base = vars(load("train_gpt2.py"))
    shapes = {
        "medium": (24, 16, 1024),
        "large": (36, 20, 1280),
        "xl": (48, 25, 1600),
    }
    changed = {"out_dir", "model", "batch_size", "gradient_accumulation_steps"}
    changed |= {"learning_rate", "min_lr"}
    for size, shape in shapes.items():
        config = load(f"train_gpt2_{size}.py")
        assert {name for name, value in vars(config).items() if value != base[name]} == changed
        model = config.model
        assert (model.n_layer, model.n_head, model.n_embd) == shape
        assert tokens_per_step(config) == 491_520


@pytest.mark.parametrize("head", ["smooth", "bayes", "sigmoid", "bayes_sigmoid"])
def test_each_head_has_a_config_at_124m_that_is_made_of_its_rows(head):
    scale = "train_gpt2_wikitext_100m.py"
    rows = [f"rows/{row}.py" for row in head.split("_")]
    expected = flatten(load(scale, *rows)) | FIXED[f"train_{head}.py"]
    expected["out_dir"] = f"out/wikitext_100m/{head}"
    assert flatten(load(f"train_{head}_gpt2_wikitext_100m.py")) == expected


@pytest.mark.parametrize("scale", [study.scale for study in STUDIES.values()])
def test_the_papers_eight_rows_differ_in_the_head_alone_and_dropout_in_its_rate(scale):
    heads = flatten(HeadConfig())
    found = {row: flatten(load(f"{scale}.py", f"rows/{row}.py")) for row in ROWS}
    assert found["dropout"] == found["softmax"] | {"dropout": 0.1} != found["softmax"]
    kinds = []
    for row in PAPER:
        kinds.append({name: found[row].pop(name) for name in heads})
        assert kinds[-1]["logit_bias"] == "unigram"
    assert all(found[row] == found["softmax"] for row in PAPER)
    assert all(kinds.count(kind) == 1 for kind in kinds)
    assert {*PAPER, *MAIN, "dropout"} == set(ROWS)
