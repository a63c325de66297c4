"""config/: what its files and their table say, against what the files are. (The paper's rows:
tests/test_rows.py.)
"""

import json
import re
import runpy
import shlex
import sys

import pytest

from engine.base.options import flatten, load_config
from tests.helpers import ROOT, TINY, flags, write_bytes
from tests.test_rows import fixed_by
from train import TrainConfig

PATHS = sorted(ROOT.glob("config/*.py"))
TABLE = {
    cells[0].strip("`"): cells[1:]
    for line in (ROOT / "config/README.md").read_text().splitlines()
    if re.match(r"\| `\w+\.py`", line)
    and (cells := [cell.strip() for cell in line.strip("|").split("|")])
}
UNITS = {"": 1, "M": 1e6, "B": 1e9}
every_file = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def comment(path) -> str:
    """The comment that the file begins with, in one line."""
    lines = path.read_text().replace(" \\\n", "\n").splitlines()
    return " ".join(
        line.lstrip("# ") for line in lines[: [line[:1] == "#" for line in lines].index(False)]
    )


def options(path) -> TrainConfig:
    """Loaded by the script that the file's own command names."""
    script = re.search(rf"(\w+\.py) config/{path.stem}\.py", comment(path))[1]
    return load_config(TrainConfig, [str(path)], fixed_by(script))[0]


def tokens_per_step(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps * config.model.block_size


def test_the_table_has_a_line_for_each_file_and_no_other():
    assert sorted(TABLE) == [path.name for path in PATHS]


@every_file
def test_a_file_names_data_with_a_prepare_script_and_its_command(path):
    config, command = options(path), shlex.split(TABLE[path.name][1].strip("`"))
    assert (ROOT / command[0]).is_file()
    of_text = {"mytext": "text", "sotu_8k": "text"}
    folder = of_text.get(config.dataset, re.sub("^wikitext2.*", "wikitext", config.dataset))
    assert command[0] == f"data/{folder}/prepare.py"
    assert f"python {TABLE[path.name][1].strip('`')}" in comment(path)


@every_file
def test_a_file_says_how_long_it_takes_and_who_says_so(path):
    text, (*_, nll, time, memory) = comment(path), TABLE[path.name]
    assert re.search(r"\b(\d+ s|seconds|minutes?|hours|days)\b", text)
    assert re.search(r"measured|publish|[Nn]ot run", text)
    assert re.search(r"measured|published|estimated", time) and re.search(
        r"GB \((measured|estimated)\)", memory
    )
    assert re.search(r"measured|published|not run|by text|by row", nll)


@every_file
def test_the_tokens_that_a_file_and_the_table_name_are_its_own(path):
    config = options(path)
    in_all = 0 if config.eval_only else config.max_iters * tokens_per_step(config)
    number, unit = re.fullmatch(r"([\d.,]+) ?([MB]?)", TABLE[path.name][2]).groups()
    assert float(number.replace(",", "")) * UNITS[unit] == pytest.approx(in_all, rel=0.02)
    for steps, tokens in re.findall(r"([\d,]+) steps of ([\d,]+) tokens", comment(path))[:1]:
        assert int(steps.replace(",", "")) == config.max_iters
        assert int(tokens.replace(",", "")) == tokens_per_step(config)
    for number, unit in re.findall(r"([\d.]+) ([MB])(?: tokens)? in all", comment(path)):
        assert float(number) * UNITS[unit] == pytest.approx(in_all, rel=0.02)


def test_the_sizes_of_gpt2_differ_from_124m_in_size_batch_and_rate_alone():
    base = vars(load_config(TrainConfig, [str(ROOT / "config/train_gpt2.py")])[0])
    changed = {
        "out_dir",
        "model",
        "batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "min_lr",
    }
    for name, shape in {
        "medium": (24, 16, 1024),
        "large": (36, 20, 1280),
        "xl": (48, 25, 1600),
    }.items():
        config = load_config(TrainConfig, [str(ROOT / f"config/train_gpt2_{name}.py")])[0]
        assert {key for key, value in vars(config).items() if value != base[key]} == changed
        assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == shape
        assert tokens_per_step(config) == 491_520


HEADS_AT_124M = {  # script and config file -> the rows that the file is made of
    "train.py config/train_gpt2_wikitext_100m.py": [],
    "train_smooth.py config/train_smooth_gpt2_wikitext_100m.py": ["smooth"],
    "train_bayes.py config/train_bayes_gpt2_wikitext_100m.py": ["bayes"],
    "train_sigmoid.py config/train_sigmoid_gpt2_wikitext_100m.py": ["sigmoid"],
    "train_bayes_sigmoid.py config/train_bayes_sigmoid_gpt2_wikitext_100m.py": ["bayes", "sigmoid"],
}


@pytest.mark.parametrize("command", HEADS_AT_124M)
def test_each_head_has_a_command_of_its_own_at_124m(command, tmp_path, monkeypatch):
    script, path = command.split()
    files = ["config/train_gpt2_wikitext_100m.py"]
    files += [f"config/rows/{row}.py" for row in HEADS_AT_124M[command]]
    monkeypatch.chdir(ROOT)
    expected = flatten(load_config(TrainConfig, files)[0]) | fixed_by(script)
    expected["out_dir"] = f"out/wikitext_100m/{'_'.join(HEADS_AT_124M[command]) or 'softmax'}"
    for fixed in (fixed_by(script), {}):
        assert flatten(load_config(TrainConfig, [path], fixed)[0]) == expected

    folder = write_bytes(tmp_path / "data")
    tiny = flags(**TINY | {"max_iters": 1, "dataset": folder, "out_dir": tmp_path / "run"})
    monkeypatch.setattr(sys, "argv", [script, path, *tiny])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "val_nll" in json.loads(lines[-1])
