"""python -m study on a tiny study: killed, resumed, complete. (Variants: tests/test_rows.py.)"""

import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import study.__main__ as study
from engine.base.errors import UserError
from engine.base.files import read_json, read_json_lines
from engine.base.options import flatten, load_config
from engine.data.tokenizer import CharTokenizer
from study import variants
from study.logs import DISTILLED
from study.summary import tuning
from tests.helpers import ROOT, TINY, contents, records, words, write_dataset, write_words
from train import TrainConfig

BOTH = "bayes_sigmoid_weighted"
VARIANTS, SEEDS = ("softmax", BOTH), (7, 8)
KEPT = {"softmax-seed7", "softmax-seed8", f"{BOTH}-seed7", f"{BOTH}_taught-seed7"}
KNOBS = {"softmax": "--weight_decay=0.0", BOTH: "--kl_weight=0.5"}


def main(home: Path, argv: list[str], put=setattr) -> None:
    """One small study in the folder of the fixture; put: how to replace the module's values."""
    knobs = {"weight_decay": 0.0, "kl_weight": 0.5}
    small = variants.Study(
        "small",
        str(home / "words"),
        str(home / "foreign"),
        VARIANTS,
        rates=(1e-2, 1e-3),
        knobs=knobs,
        distilled=VARIANTS[1:],
        n_seeds=2,
        ensemble=True,
    )
    values = {"ROOT": home, "SEEDS": SEEDS, "MAIN": VARIANTS[:1], "STUDIES": {"small": small}}
    for name, value in values.items():
        for module in (study, variants):
            if hasattr(module, name):
                put(module, name, value)
    put(study, "ENSEMBLE", "eval_test_ensemble_of_2.json")
    put(sys, "argv", ["study.py", "--studies=small", *argv])
    study.run_main(study.main)


def start(home: Path, *argv: str) -> subprocess.Popen:
    code = f"from tests.test_study import Path, main; main(Path({str(home)!r}), {list(argv)})"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, **streams
    )


def commands(home: Path, *argv: str) -> list[str]:
    """What a whole call of the study runs."""
    process = start(home, *argv)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return [line for line in output.splitlines() if line.startswith("python ")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a scale, its data and our scripts in it."""
    home = tmp_path_factory.mktemp("study")
    (home / "config").mkdir()
    for name in ("train.py", "evaluate.py", "augmentation", "config/rows"):
        (home / name).symlink_to(ROOT / name)
    scale = TINY | {
        "dataset": str(write_words(home / "words")),
        "eval_interval": 4,
        "eval_iters": 2,
    }
    (home / "config/small.py").write_text(
        "".join(f"{name} = {value!r}\n" for name, value in scale.items())
    )
    tokenizer = CharTokenizer(sorted(set(words(4000))))
    write_dataset(
        home / "foreign",
        {split: [words(200, seed=3)[::-1]] for split in ("train", "test")},
        tokenizer,
    )
    return home


FLAGS = ["--jobs=2", "--train_flags=--max_iters=8 --log_interval=2"]


def test_ended_by_a_signal_it_ends_what_it_has_started(home):
    process = start(home, *FLAGS)
    assert process.stdout.readline().startswith("python train.py")
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 130 and errors.strip() == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.fixture(scope="module")
def calls(home):
    """Killed once a run has its records, then run to the end, then called again: the records and
    trials at the kill, and the commands of the two later calls."""
    process = start(home, *FLAGS)
    while not (done := list(home.glob("out/tried/logs/small/[!.]*/eval_test.json"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for name in KEPT - {path.parent.name for path in done}:  # as if killed while it copies records
        (home / f"out/tried/logs/small/.{name}.tmp").mkdir(exist_ok=True)
    before = [contents(path.parent) for path in done], trials(home)
    return *before, commands(home, *FLAGS), commands(home, *FLAGS)


def trials(home: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (home / "out/tried/logs/small/tuning.jsonl").read_text().splitlines()
    ]


def test_every_row_has_three_trials_of_full_length_all_listed(home, calls):
    for row in VARIANTS:
        first, second, third = [trial for trial in trials(home) if trial["row"] == row]
        assert [first["flags"], second["flags"]] == [
            ["--learning_rate=0.01"],
            ["--learning_rate=0.001"],
        ]
        better = min(first, second, key=lambda trial: trial["val_nll"])
        assert third["flags"] == [*better["flags"], KNOBS[row]]
    assert len(trials(home)) == 6
    runs = [path.parent for path in home.glob("out/tried/small/*/metrics.jsonl")]
    steps = [[record["step"] for record in records(path, "loss")] for path in runs]
    assert steps == [[2, 4, 6, 8]] * 8  # six trials, softmax with another seed, the taught row


def test_every_run_leaves_its_records_and_the_best_trial_is_the_first_seeds(home, calls):
    assert {path.name for path in (home / "out/tried/logs/small").iterdir()} == KEPT | {
        "tuning.jsonl"
    }
    for name in KEPT:
        kept = home / "out/tried/logs/small" / name
        names = {path.name for path in kept.iterdir()}
        assert names >= {"metrics.jsonl", "config.json", "eval_val.json", "eval_test.json"}
        assert ("eval_test_averaged.json" in names) == name.startswith(BOTH)
        assert ("eval_test_ensemble_of_2.json" in names) == (name == "softmax-seed7")
        test = json.loads((kept / "eval_test.json").read_text())
        assert test["ood"]["dataset"] == str(home / "foreign") and ("continuations" in test) == (
            "seed7" in name
        )
        best = min(
            (t for t in trials(home) if name.startswith(t["row"])),
            key=lambda trial: trial["val_nll"],
        )
        options = json.loads((kept / "config.json").read_text())
        for flag in best["flags"]:  # all seeds, and the taught row, as the validation split chose
            key, _, value = flag.lstrip("-").partition("=")
            assert options[key] == float(value)
        assert (options["seed"], options["labels"]) == (
            int(name[-1]),
            "study" if "taught" in name else "",
        )
        nll = json.loads((kept / "eval_val.json").read_text())["nll"]
        assert (nll == best["val_nll"]) == (name in ("softmax-seed7", f"{BOTH}-seed7"))


def test_killed_the_same_command_goes_on_and_once_complete_it_runs_nothing(home, calls):
    done, tried, rest, again = calls
    assert done and all(
        files.items() <= contents(Path(next(iter(files))).parent).items() for files in done
    )
    assert len(tried) >= 3 and trials(home)[: len(tried)] == tried
    for trial in tried:  # what is listed is not asked again
        folder = (
            "_".join([trial["row"], *(flag.removeprefix("--") for flag in trial["flags"])])
            + f"-seed{SEEDS[0]}"
        )
        assert not any("--split=val" in command and f"/{folder} " in command for command in rest)
    assert len(rest) > 3 and again == []


def test_a_trial_that_diverges_is_listed_as_infinitely_bad_and_ends_no_study(home, monkeypatch):
    monkeypatch.setattr(study, "run_main", lambda main: None)
    main(home, [], monkeypatch.setattr)
    monkeypatch.chdir(home)
    # at a rate of 1000 weights grow a million times in a step
    small = dataclasses.replace(variants.STUDIES["small"], rates=(1000, 1e-3))
    monkeypatch.setitem(variants.STUDIES, "small", small)
    config = study.StudyConfig(train_flags="--max_iters=8 --weight_decay=1000")
    runner = study.Runner("small", config, study.Scripts(1))
    runner.out = home / "out/diverging"
    runner.logs = home / "diverging"
    best = runner.tune("softmax")
    listed = read_json_lines(runner.logs / "tuning.jsonl")
    nlls = {trial["flags"][0]: trial["val_nll"] for trial in listed}
    assert nlls["--learning_rate=1000"] == math.inf
    assert math.isfinite(nlls["--learning_rate=0.001"])
    assert best[0] == "--learning_rate=0.001"
    assert "learning_rate 1000: inf" in tuning(runner.logs)


def options(about: variants.Study, variant: str, flags: list[str]) -> dict:
    """The options that config files and flags give a run, and those that are tuned."""
    files = [f"config/{about.scale}.py", f"config/rows/{variant}.py"]
    config, given = load_config(TrainConfig, [*files, *flags])
    without_effect = {"out_dir", "compile", "eval_interval", "eval_iters", "log_interval"}
    names = {"learning_rate", *variants.OTHER_VALUES, *given} - without_effect
    return {name: value for name, value in flatten(config).items() if name in names}


@pytest.mark.parametrize("name", ["wikitext2_8k", "wikitext2_8k_tenth", "sotu_8k"])
def test_the_kept_runs_are_complete_and_of_the_options_that_the_code_chooses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    about = variants.STUDIES[name]
    runner = study.Runner(name, study.StudyConfig(), study.Scripts(1))
    monkeypatch.setattr(runner.scripts, "run", None)  # no trial is missing
    for variant in about.all_variants():
        assert runner.is_kept(variant)
        plain = variant.removesuffix(DISTILLED)
        expected = options(about, plain, runner.tune(plain)).items()
        for seed in about.seeds(variant):
            kept = read_json(runner.kept(variant, seed) / "config.json")
            assert expected <= kept.items()
    for trial in read_json_lines(runner.logs / "tuning.jsonl"):
        assert trial["options"] == options(about, trial["row"], trial["flags"])
    ensemble = runner.kept("softmax", variants.SEEDS[0]) / study.ENSEMBLE
    assert ensemble.is_file() == about.ensemble


def test_a_script_that_fails_is_reported_with_its_message(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = study.Scripts(2)
    with pytest.raises(UserError, match="did you mean 'max_iters'?"):
        scripts.together([lambda: scripts.run(tmp_path / "log", "train.py", "--max_iter=8")])
    with pytest.raises(UserError, match="another script failed"):
        scripts.run(tmp_path / "log", "train.py")


def test_the_makefile_prepares_the_data_of_all_studies(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    command = ["make", "-n", "study-data", "WIKITEXT=folder", "SOTU=file"]
    prepared = subprocess.check_output(command, cwd=tmp_path, text=True)
    large = subprocess.check_output([*command, "FLAGS=wikitext_100m"], cwd=tmp_path, text=True)
    for name, about in variants.STUDIES.items():
        scale = runpy.run_path(str(ROOT / f"config/{about.scale}.py"))
        assert about.dataset == scale["dataset"]
        if name == "wikitext_100m":
            assert "wikitext/prepare.py\n" in large and "--name=sotu " in large
        else:
            for data in (about.dataset, about.foreign):
                assert re.search(rf"--(folder=data/|name=){data}\s", prepared)
    for line in prepared.splitlines():  # a tokenizer comes before its use
        if "--tokenizer=data/" in line:
            source = re.search(r"--tokenizer=data/(\w+)", line)[1]
            assert re.search(rf"--(folder=data/|name=){source}\s", prepared.partition(line)[0])
    without = subprocess.run(command[:-1], cwd=tmp_path, capture_output=True, text=True)
    assert without.returncode == 2 and "give SOTU=FILE" in without.stderr


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--studies=small,smal"], "'smal' is not one of: small"),
        (["--rows=softmax,none"], f"'none' is not one of: softmax, {BOTH}, {BOTH}_taught"),
        (["--jobs=0"], "jobs = 0 must be >= 1"),
    ],
)
def test_a_mistake_ends_in_one_line(home, argv, message, monkeypatch, capsys):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as exit_:
        main(home, argv, monkeypatch.setattr)
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors and not (home / "training_logs").exists()
