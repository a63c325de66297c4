"""engine/base/options.py: defaults < files < flags, and every option documented."""

import inspect
import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from engine.base.options import (
    PositiveInt,
    build,
    flat_fields,
    flatten,
    load_config,
)
from evaluate import EvaluateConfig
from sample import SampleConfig
from tests.helpers import ROOT, refusal, run_script
from train import TrainConfig

# script -> the options that it fixes
FIXED = {
    "train.py": {},
    "train_smooth.py": {"weights": "point", "likelihood": "smooth"},
    "train_bayes.py": {"weights": "bayes", "likelihood": "categorical"},
    "train_sigmoid.py": {"weights": "point", "likelihood": "sigmoid"},
    "train_bayes_sigmoid.py": {"weights": "bayes", "likelihood": "sigmoid"},
}


@dataclass(frozen=True)
class Inner:
    size: PositiveInt = 3  # how big
    rate: Annotated[float, ">= -1"] | Literal["auto"] = "auto"  # a number or a word
    colour: Literal["red", "blue"] = "red"  # one of two


@dataclass(frozen=True)
class Options:
    name: str = "x"  # a word
    steps: int = 10  # how many
    fast: bool = False  # or slow
    inner: Inner = Inner()


def write(path: Path, text: str) -> str:
    path.write_text(inspect.cleandoc(text))
    return str(path)


def test_flags_win_over_files_and_files_over_defaults_and_of_two_the_later_wins(tmp_path):
    first = write(tmp_path / "a.py", "steps = 20\nname = 'file'\nsize = 1")
    second = write(tmp_path / "b.py", "size = 2")
    config, given = load_config(Options, ["--steps=20", "--steps=30", first, second])
    assert config == Options(steps=30, name="file", inner=Inner(size=2))
    assert given == {"steps", "name", "size"}


@pytest.mark.parametrize(
    "argv",
    [
        "--steps=5 --fast=True --size=4",
        "--steps 5 --fast true --size 4",
        "--fast --steps 5 --size=4",
        "--steps=5e0 --fast 1 --size=4.0",
    ],
)
def test_a_flag_takes_an_equals_sign_or_a_space_and_is_true_alone(argv):
    config = Options(steps=5, fast=True, inner=Inner(size=4))
    assert load_config(Options, argv.split())[0] == config


def test_a_value_may_begin_with_a_minus_sign_or_hold_an_equals_sign():
    config, _ = load_config(Options, ["--steps", "-5", "--name=a=b", "--rate=-1e-3"])
    assert (config.steps, config.name, config.inner.rate) == (-5, "a=b", -1e-3)
    assert load_config(Options, ["--rate=auto"])[0].inner.rate == "auto"


def test_nested_options_have_flat_names_and_flatten_undoes_build():
    config, _ = load_config(TrainConfig, ["--prior_std=0.1", "--n_layer=3", "--dropout=0"])
    assert config.model.head.prior_std == 0.1 and config.model.n_layer == 3
    assert config.model.dropout == 0.0
    assert build(TrainConfig, flatten(config)) == config


@pytest.mark.parametrize(
    "text, hint",
    [
        ("stepz = 3", "'steps'"),
        ("xyzzy = 3", "underscore"),
        ("steps = 'ten'", "int"),
        ("steps = 1.5", "int"),
        ("steps = True", "int"),
        ("steps = [1]", "int"),
        ("size = 0", ">= 1"),
        ("rate = -2", ">= -1"),
        ("rate = float('nan')", "nan"),
        ("colour = 'green'", "red, blue"),
    ],
)
def test_unknown_names_and_wrong_values_are_refused_in_files_and_flags(tmp_path, text, hint):
    name, value = text.split(" = ")
    message = refusal(load_config, Options, [write(tmp_path / "a.py", text)])
    assert name in message and hint in message
    assert name in refusal(load_config, Options, [f"--{name}={value}"])
    # without a value
    assert f"--{name}" in refusal(load_config, Options, [f"--{name}", "--steps=3"])


def test_a_config_file_may_import_define_functions_and_keep_helpers_with_an_underscore(tmp_path):
    text = """
        import math
        from pathlib import Path
        _layers = [6, 8]
        def double(n):
            return 2 * n
        steps = double(max(_layers))
        name = "r" + str(math.floor(2.5))
    """
    first = write(tmp_path / "a.py", text)
    config, given = load_config(Options, [first])
    assert (config.steps, config.name, given) == (16, "r2", {"steps", "name"})
    # files do not see each other
    files = [first, write(tmp_path / "b.py", "steps = _layers[0]")]
    assert "NameError" in refusal(load_config, Options, files)


def test_a_missing_config_file_gets_a_suggestion(monkeypatch):
    monkeypatch.chdir(ROOT)
    message = refusal(load_config, Options, ["config/quickstat.py"])
    assert "'config/quickstart.py'" in message


def test_what_a_script_fixes_cannot_be_overridden(tmp_path):
    fixed = FIXED["train_bayes.py"]
    files = [write(tmp_path / "a.py", "weights = 'point'")]
    for argv, word in ((["--likelihood=sigmoid"], "--likelihood=sigmoid"), (files, "weights")):
        assert word in refusal(load_config, TrainConfig, argv, fixed)
    # the same value is no contradiction
    config, _ = load_config(TrainConfig, ["--weights=bayes"], fixed)
    assert fixed.items() <= flatten(config).items()


def test_each_training_script_fixes_its_head(monkeypatch):
    called = {}
    monkeypatch.setattr("train.main", lambda **fixed: called.update(fixed))
    for script, fixed in FIXED.items():
        if fixed:
            run_script(script)
            assert called == fixed


SCRIPTS = {"train.py": TrainConfig, "sample.py": SampleConfig, "evaluate.py": EvaluateConfig}
for path in ROOT.glob("data/*/prepare.py"):
    SCRIPTS[str(path.relative_to(ROOT))] = runpy.run_path(str(path))["Options"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_option_with_a_comment(script, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_script(script, "--help")
    found = re.findall(r"^  --(\w+)=.*\n {8}.....", capsys.readouterr().out, re.MULTILINE)
    # a name that two nested dataclasses share would be listed twice
    assert exit_.value.code == 0 and sorted(found) == sorted(flat_fields(SCRIPTS[script]))


# nanoGPT's config/finetune_shakespeare.py
NANOGPT = """
    import time

    out_dir = 'out-shakespeare'
    eval_interval = 5
    eval_iters = 40
    wandb_log = False # feel free to turn on
    wandb_project = 'shakespeare'
    wandb_run_name = 'ft-' + str(time.time())

    dataset = 'shakespeare'
    init_from = 'gpt2-xl' # this is the largest GPT-2 model

    always_save_checkpoint = False
    batch_size = 1
    gradient_accumulation_steps = 32
    max_iters = 20
    learning_rate = 3e-5
    decay_lr = False
"""


def test_a_config_file_of_nanogpt_loads(tmp_path):
    config, given = load_config(TrainConfig, [write(tmp_path / "a.py", NANOGPT)])
    assert config.wandb_run_name.startswith("ft-") and config.init_from == "gpt2-xl"
    assert config.learning_rate == 3e-5 and not config.decay_lr and len(given) == 14


def test_every_option_of_nanogpts_train_py_is_one_of_ours_with_the_same_type():
    nanogpt = {
        str: "out_dir init_from wandb_project wandb_run_name dataset device dtype",
        int: "eval_interval log_interval eval_iters gradient_accumulation_steps batch_size "
        "block_size n_layer n_head n_embd max_iters warmup_iters lr_decay_iters",
        float: "dropout learning_rate weight_decay beta1 beta2 grad_clip min_lr",
        bool: "eval_only always_save_checkpoint wandb_log bias decay_lr compile",
    }
    ours = flat_fields(TrainConfig)
    for kind, names in nanogpt.items():
        assert {ours[name] for name in names.split()} == {kind}
