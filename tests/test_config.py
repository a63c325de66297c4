"""engine/base/options.py: defaults < files < flags, and every option documented."""

import inspect
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from torch.distributed.run import get_args_parser

from engine.base.errors import UserError
from engine.base.options import (
    PositiveInt,
    build,
    check_options,
    flat_fields,
    flatten,
    load_config,
)
from evaluate import EvaluateConfig
from sample import SampleConfig
from tests.helpers import ROOT, write_words
from train import TrainConfig, main

PREPARE = sorted(ROOT.glob("data/*/prepare.py"))
CONFIGS = [TrainConfig, SampleConfig, EvaluateConfig]


@dataclass(frozen=True)
class Inner:
    size: PositiveInt = 3  # how big
    rate: Annotated[float, ">= -1"] | Literal["auto"] = "auto"  # a number or a word
    colour: Literal["red", "blue"] = "red"  # one of two

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class Options:
    name: str = "x"  # a word
    steps: int = 10  # how many
    fast: bool = False  # or slow
    inner: Inner = Inner()


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refusal(argv: list[str], cls: type = Options, fixed: dict | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_config(cls, argv, fixed)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_win_over_files_and_files_over_defaults_and_of_two_the_later_wins(tmp_path):
    first = write(tmp_path / "a.py", "steps = 20\nname = 'file'\nsize = 1")
    second = write(tmp_path / "b.py", "size = 2")
    config, given = load_config(Options, ["--steps=20", "--steps=30", first, second])
    assert config == Options(steps=30, name="file", inner=Inner(size=2))
    assert given == {"steps", "name", "size"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps=5", "--fast=True", "--size=4"],
        ["--steps", "5", "--fast", "true", "--size", "4"],
        ["--fast", "--steps", "5", "--size=4"],
        ["--steps=5", "--fast", "1", "--size=4"],
    ],
)
def test_a_flag_takes_an_equals_sign_or_a_space_and_a_bare_one_is_true(argv):
    assert load_config(Options, argv)[0] == Options(steps=5, fast=True, inner=Inner(size=4))


def test_a_value_may_begin_with_a_minus_sign_or_hold_an_equals_sign():
    config, _ = load_config(Options, ["--steps", "-5", "--name=a=b", "--rate=-1e-3"])
    assert (config.steps, config.name, config.inner.rate) == (-5, "a=b", -1e-3)


def test_nested_options_have_flat_names_and_flatten_undoes_build():
    config, _ = load_config(TrainConfig, ["--prior_std=0.1", "--n_layer=3", "--dropout=0"])
    assert (config.model.head.prior_std, config.model.n_layer, config.model.dropout) == (
        0.1,
        3,
        0.0,
    )
    assert build(TrainConfig, flatten(config)) == config


@pytest.mark.parametrize("cls", CONFIGS)
def test_no_option_name_occurs_twice(cls):
    def count(cls: type) -> int:
        hints = inspect.get_annotations(cls)
        return sum(
            count(hint) if hasattr(hint, "__dataclass_fields__") else 1 for hint in hints.values()
        )

    assert count(cls) == len(flat_fields(cls))


def test_an_unknown_name_gets_a_suggestion(tmp_path):
    assert "did you mean 'n_layer'?" in refusal(["--n_layers=3"], TrainConfig)
    assert "--help" in refusal(["--xyzzy=3"], TrainConfig)
    file = write(tmp_path / "a.py", "n_layers = 3")
    assert f"{file}: n_layers is not an option; did you mean 'n_layer'?" in refusal(
        [file], TrainConfig
    )
    assert "underscore" in refusal([write(tmp_path / "b.py", "xyzzy = 3")])


@pytest.mark.parametrize("flag", ["--steps=many", "--steps=1.5", "--steps=True", "--fast=2"])
def test_a_flag_of_the_wrong_type_is_named_beside_the_type(flag):
    name, _, value = flag.partition("=")
    wanted = "bool" if name == "--fast" else "int"
    assert refusal([flag]) == f"{name} wants {wanted}, got {value!r}"


def test_torchrun_passes_every_option_on():
    launch = ["--standalone", "--nproc_per_node=2", "train.py"]
    for option in flat_fields(TrainConfig):
        for argv in ([f"--{option}=1"], [f"--{option}", "1"]):
            # it ends the program where a flag abbreviates two of its own
            arguments = get_args_parser().parse_args([*launch, *argv])
            assert arguments.training_script_args == argv


@pytest.mark.parametrize("text", ["size = = 4", "size = 1 / 0"])
def test_an_error_in_a_config_file_is_one_line(tmp_path, text):
    assert "a.py: " in refusal([write(tmp_path / "a.py", text)])


def test_a_missing_config_file_gets_a_suggestion(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "did you mean 'config/quickstart.py'?" in refusal(["config/quickstat.py"])
    assert "does not exist" in refusal(["steps=3"])


@pytest.mark.parametrize(
    "value", ["'ten'", "1.5", "True", "None", "[1]", "__import__('pathlib').Path()"]
)
def test_a_value_of_the_wrong_type_in_a_file_is_refused_with_both_types(tmp_path, value):
    message = refusal([write(tmp_path / "a.py", f"steps = {value}")])
    assert "a.py: steps wants int, got " in message


def test_whole_numbers_may_be_written_as_floats_and_floats_as_whole_numbers(tmp_path):
    config, _ = load_config(TrainConfig, ["--max_iters=1e4", "--grad_clip=1"])
    assert config.max_iters == 10000 and isinstance(config.max_iters, int)
    assert config.grad_clip == 1.0 and isinstance(config.grad_clip, float)
    assert load_config(Options, [write(tmp_path / "a.py", "steps = 60e3")])[0].steps == 60000


def test_values_outside_the_declared_range_or_choices_are_refused_however_the_options_are_made():
    assert refusal(["--size=0"]) == "size = 0 must be >= 1"
    assert ">= -1" in refusal(["--rate=-2"]) and "auto" in refusal(["--rate=fast"])
    assert refusal(["--colour=green"]) == "colour = 'green' is not one of: red, blue"
    with pytest.raises(UserError, match=">= 1"):
        Inner(size=0)
    with pytest.raises(UserError, match=">= -1"):
        Inner(rate=float("nan"))


def test_an_option_of_two_types_takes_the_first_that_fits():
    assert load_config(Options, ["--rate=0.5"])[0].inner.rate == 0.5
    assert load_config(Options, ["--rate=auto"])[0].inner.rate == "auto"


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
    config, given = load_config(Options, [write(tmp_path / "a.py", inspect.cleandoc(text))])
    assert (config.steps, config.name, given) == (16, "r2", {"steps", "name"})


def test_config_files_do_not_see_each_other_or_the_script(tmp_path):
    files = [write(tmp_path / "a.py", "_n = 1"), write(tmp_path / "b.py", "steps = _n")]
    assert "NameError" in refusal(files)


def test_a_flag_without_a_value_is_refused():
    assert "--steps=VALUE" in refusal(["--steps"])
    assert "--steps=VALUE" in refusal(["--steps", "--fast"])


def test_what_a_script_fixes_cannot_be_overridden_from_anywhere(tmp_path):
    fixed = {"weights": "bayes", "likelihood": "categorical"}
    assert "train.py --likelihood=sigmoid" in refusal(["--likelihood=sigmoid"], TrainConfig, fixed)
    assert "this script sets" in refusal(
        [write(tmp_path / "a.py", "weights = 'point'")], TrainConfig, fixed
    )
    config, _ = load_config(
        TrainConfig, ["--weights=bayes"], fixed
    )  # saying the same is no contradiction
    assert (config.model.head.weights, config.model.head.likelihood) == ("bayes", "categorical")


@pytest.mark.parametrize(
    ("script", "head"),
    [
        ("train_smooth.py", ("point", "smooth")),
        ("train_bayes.py", ("bayes", "categorical")),
        ("train_sigmoid.py", ("point", "sigmoid")),
        ("train_bayes_sigmoid.py", ("bayes", "sigmoid")),
    ],
)
def test_each_variant_script_fixes_its_head(monkeypatch, script, head):
    called = {}
    monkeypatch.setattr("train.main", lambda **fixed: called.update(fixed))
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert called == {"weights": head[0], "likelihood": head[1]}


def documented(text: str) -> dict[str, str]:
    """Option -> its comment, from the output of --help."""
    return dict(re.findall(r"^  --(\w+)=.*\n {8}(.*)", text, re.MULTILINE))


@pytest.mark.parametrize("cls", CONFIGS)
def test_help_lists_every_option_with_a_comment(cls, capsys):
    with pytest.raises(SystemExit) as exit_:
        load_config(cls, ["--help"])
    found = documented(capsys.readouterr().out)
    assert exit_.value.code == 0 and found.keys() == flat_fields(cls).keys()
    assert [name for name, comment in found.items() if len(comment) < 5] == []


@pytest.mark.parametrize("path", PREPARE, ids=lambda path: path.parent.name)
def test_help_of_a_prepare_script_lists_every_option_with_a_comment(path, monkeypatch, capsys):
    options = runpy.run_path(str(path))["Options"]
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(path), run_name="__main__")
    found = documented(capsys.readouterr().out)
    assert exit_.value.code == 0 and found.keys() == flat_fields(options).keys()
    assert [name for name, comment in found.items() if len(comment) < 5] == []


def test_help_says_what_the_script_fixes(capsys):
    with pytest.raises(SystemExit):
        load_config(TrainConfig, ["-h"], {"weights": "bayes"})
    assert "--weights='bayes'  (set by this script)" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/**/*.py")), ids=lambda path: path.stem)
def test_every_config_file_of_ours_loads_and_begins_with_a_comment(path):
    assert path.read_text().startswith("#")
    load_config(TrainConfig, [str(path)])


# the options that nanoGPT's own config files set; a user brings such files along
NANOGPT = {
    "train_shakespeare_char": {
        "out_dir": "out-shakespeare-char",
        "eval_interval": 250,
        "eval_iters": 200,
        "log_interval": 10,
        "always_save_checkpoint": False,
        "wandb_log": False,
        "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char",
        "gradient_accumulation_steps": 1,
        "batch_size": 64,
        "block_size": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "learning_rate": 1e-3,
        "max_iters": 5000,
        "lr_decay_iters": 5000,
        "min_lr": 1e-4,
        "beta2": 0.99,
        "warmup_iters": 100,
    },
    "train_gpt2": {
        "wandb_log": True,
        "wandb_project": "owt",
        "wandb_run_name": "gpt2-124M",
        "batch_size": 12,
        "block_size": 1024,
        "gradient_accumulation_steps": 40,
        "max_iters": 600000,
        "lr_decay_iters": 600000,
        "eval_interval": 1000,
        "eval_iters": 200,
        "log_interval": 10,
        "weight_decay": 1e-1,
    },
    "finetune_shakespeare": {
        "out_dir": "out-shakespeare",
        "eval_interval": 5,
        "eval_iters": 40,
        "wandb_log": False,
        "wandb_project": "shakespeare",
        "dataset": "shakespeare",
        "init_from": "gpt2-xl",
        "always_save_checkpoint": False,
        "batch_size": 1,
        "gradient_accumulation_steps": 32,
        "max_iters": 20,
        "learning_rate": 3e-5,
        "decay_lr": False,
    },
    "eval_gpt2": {
        "batch_size": 8,
        "eval_iters": 500,
        "eval_only": True,
        "wandb_log": False,
        "init_from": "gpt2",
    },
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpts_config_files_load_with_their_meaning(tmp_path, name):
    text = "".join(f"{option} = {value!r}\n" for option, value in NANOGPT[name].items())
    if name == "train_gpt2":
        text = text.replace("steps = 40", "steps = 5 * 8")
    if name == "finetune_shakespeare":
        text = "import time\n" + text + "wandb_run_name = 'ft-' + str(time.time())\n"
    config, given = load_config(TrainConfig, [write(tmp_path / f"{name}.py", text)])
    values = flatten(config)
    assert {option: values[option] for option in NANOGPT[name]} == NANOGPT[name]
    assert given - NANOGPT[name].keys() <= {"wandb_run_name"}
    assert name != "finetune_shakespeare" or re.fullmatch(r"ft-\d+\.\d+", config.wandb_run_name)


def test_every_option_of_nanogpts_train_py_is_one_of_ours_with_the_same_type():
    nanogpt = {
        str: "out_dir init_from wandb_project wandb_run_name dataset device dtype",
        int: "eval_interval log_interval eval_iters gradient_accumulation_steps batch_size "
        "block_size n_layer n_head n_embd max_iters warmup_iters lr_decay_iters",
        float: "dropout learning_rate weight_decay beta1 beta2 grad_clip min_lr",
        bool: "eval_only always_save_checkpoint wandb_log bias decay_lr compile",
    }
    ours = flat_fields(TrainConfig)
    assert {
        name: type_ for type_, names in nanogpt.items() for name in names.split()
    }.items() <= ours.items()


def test_a_config_of_five_lines_is_enough_to_train(tmp_path, monkeypatch, capsys):
    write_words(tmp_path / "words")
    lines = [
        f"dataset = {str(tmp_path / 'words')!r}",
        f"out_dir = {str(tmp_path / 'run')!r}",
        "n_layer = n_head = 2",
        "n_embd = block_size = 32",
        "max_iters = gradient_accumulation_steps = eval_iters = 2",
    ]
    (tmp_path / "five.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "five.py")])
    main()
    assert "step 2/2 | val nll" in capsys.readouterr().out
