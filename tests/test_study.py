"""python -m study on a tiny study: interrupted, resumed, complete. tests/test_configs.py has the
variants.
"""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import study.__main__ as study
from engine.base import errors
from engine.base.files import read_json, read_json_lines
from engine.base.options import flatten, load_config
from engine.data.tokenizer import CharTokenizer
from study import variants
from study.logs import DISTILLED
from tests.helpers import (
    ROOT,
    TINY,
    output_of,
    refusal,
    run_script,
    values,
    words,
    write_dataset,
    write_words,
)
from train import TrainConfig

BOTH = "bayes_sigmoid_weighted"
SEEDS = (7, 8)
KEPT = {"softmax-seed7", "softmax-seed8", f"{BOTH}-seed7", f"{BOTH}_taught-seed7"}


def patch_study(home: Path, put=setattr) -> None:
    """Replace the studies by a small one in the folder of the fixture."""
    small = variants.Study(
        "small",
        str(home / "words"),
        str(home / "ood"),
        ("softmax", BOTH),
        rates=(1e-2, 1e-3),
        knobs={"weight_decay": 0.0, "kl_weight": 0.5},
        distilled=(BOTH,),
        n_seeds=2,
        ensemble=True,
    )
    put(variants, "SEEDS", SEEDS)
    put(variants, "MAIN", ("softmax",))
    put(study, "ROOT", home)
    put(study, "SEEDS", SEEDS)
    put(study, "STUDIES", {"small": small})
    put(study, "ENSEMBLE", "eval_test_ensemble_of_2.json")


class InThisProcess(study.Scripts):
    """Runs scripts in this process, one after the other; interrupts the study after a number."""

    def __init__(self, limit: float = math.inf):
        super().__init__(1)
        self.limit = limit
        self.commands = []

    def run(self, log: Path, *arguments: str) -> None:
        if len(self.commands) == self.limit:
            raise KeyboardInterrupt
        self.commands.append(" ".join(arguments))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(errors, "run_main", lambda main: main())
            run_script(*arguments)

    def together(self, jobs) -> None:
        for job in jobs:
            job()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a scale and its data."""
    home = tmp_path_factory.mktemp("study")
    (home / "config").mkdir()
    for name in ("train.py", "config/rows"):
        (home / name).symlink_to(ROOT / name)
    scale = TINY | {
        "dataset": str(write_words(home / "words")),
        "eval_interval": 4,
        "eval_iters": 2,
        "max_iters": 8,
        "log_interval": 2,
    }
    lines = [f"{name} = {value!r}\n" for name, value in scale.items()]
    (home / "config/small.py").write_text("".join(lines))
    documents = [words(200, seed=3)[::-1]]
    tokenizer = CharTokenizer(sorted(set(words(4000))))
    write_dataset(home / "ood", {"train": documents, "test": documents}, tokenizer)
    return home


@pytest.fixture
def small_study(home, monkeypatch):
    """The small study, with the fixture's folder as the current one."""
    patch_study(home, monkeypatch.setattr)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(home)


def trials() -> list[dict]:
    return read_json_lines(Path("training_logs/small/tuning.jsonl"))


def kept_files() -> dict[str, int]:
    """The files of the finished runs, and when they were written."""
    folder = Path("training_logs/small")
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("*/*")}


@pytest.fixture(scope="module")
def complete(home):
    """The study, interrupted before some of its scripts, then complete: the files and trials at
    each interrupt, and the commands of all calls.
    """
    interrupted, commands = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch_study(home, patch.setattr)
        patch.chdir(home)
        for limit in (5, 7, 9, math.inf, math.inf):
            scripts = InThisProcess(limit)
            runner = study.Runner("small", scripts)
            try:
                runner.run(study.STUDIES["small"].all_variants())
            except KeyboardInterrupt:
                interrupted.append((kept_files(), trials()))
            commands.append(scripts.commands)
    return interrupted, commands


def test_each_variant_has_trials_of_full_length_and_all_are_listed(small_study, complete):
    knobs = {"softmax": "--weight_decay=0.0", BOTH: "--kl_weight=0.5"}
    for variant, knob in knobs.items():
        first, second, third = [trial for trial in trials() if trial["row"] == variant]
        assert first["flags"] == ["--learning_rate=0.01"]
        assert second["flags"] == ["--learning_rate=0.001"]
        better = min(first, second, key=lambda trial: trial["val_nll"])
        assert third["flags"] == [*better["flags"], knob]
    runs = list(Path("out/study/small").glob("*-seed*"))
    assert len(runs) == 8  # six trials, softmax with another seed, the distilled variant
    for run in runs:
        assert values(run, "step", "loss")[-1] == 8


def test_every_run_leaves_its_records_and_the_best_trial_is_the_first_seeds(small_study, complete):
    logs = Path("training_logs/small")
    assert {path.name for path in logs.iterdir()} == KEPT | {"tuning.jsonl"}
    for name in KEPT:
        names = {path.name for path in (logs / name).iterdir()}
        assert ("eval_test_averaged.json" in names) == name.startswith(BOTH)
        assert ("eval_test_ensemble_of_2.json" in names) == (name == "softmax-seed7")
        assert "ood" in read_json(logs / name / "eval_test.json")
        options = read_json(logs / name / "config.json")
        assert options["seed"] == int(name[-1])
        assert options["labels"] == ("study" if "taught" in name else "")
        of_variant = [trial for trial in trials() if name.startswith(trial["row"])]
        best = min(of_variant, key=lambda trial: trial["val_nll"])
        for flag in best["flags"]:  # of all seeds and of the distilled variant
            key, _, value = flag.lstrip("-").partition("=")
            assert options[key] == float(value)
        if name in ("softmax-seed7", f"{BOTH}-seed7"):
            assert read_json(logs / name / "eval_val.json")["nll"] == best["val_nll"]


def test_after_an_interrupt_the_same_command_repeats_nothing(small_study, complete):
    interrupted, commands = complete
    for files, tried in interrupted:
        assert files.items() <= kept_files().items()
        assert trials()[: len(tried)] == tried
    validations = [line for call in commands for line in call if "--split=val" in line]
    assert len(validations) == len(set(validations)) == 8
    assert len(commands[3]) > 3 and commands[4] == []


def test_a_trial_that_diverges_is_listed_as_infinitely_bad_and_ends_no_study(
    small_study, home, monkeypatch
):
    # at a rate of 1000 weights grow a million times in a step
    small = dataclasses.replace(study.STUDIES["small"], scale="decaying", rates=(1000, 1e-3))
    monkeypatch.setitem(study.STUDIES, "small", small)
    (home / "config/decaying.py").write_text(
        (home / "config/small.py").read_text() + "weight_decay = 1000.0\n"
    )
    runner = study.Runner("small", InThisProcess())
    runner.out = home / "out/diverging"
    runner.logs = home / "diverging"
    assert runner.tune("softmax")[0] == "--learning_rate=0.001"
    diverged, *_ = read_json_lines(runner.logs / "tuning.jsonl")
    assert diverged["flags"] == ["--learning_rate=1000"]
    assert diverged["val_nll"] == math.inf


@pytest.mark.slow
def test_a_signal_ends_the_scripts_that_the_study_started(home):
    code = f"""if True:
        import sys
        from tests.test_study import Path, patch_study, study
        patch_study(Path({str(home)!r}))
        study.STUDIES["again"] = study.STUDIES["small"]
        sys.argv = ["study", "--studies=again"]
        study.run_main(study.main)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline().startswith(b"python train.py")
    process.terminate()
    process.communicate()
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_after_a_script_has_failed_with_its_message_no_other_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = study.Scripts(2)
    run = partial(scripts.run, tmp_path / "log", "train.py", "--max_iter=8")
    assert "max_iter" in refusal(scripts.together, [run])
    assert "another script" in refusal(run)


@pytest.mark.parametrize("name", ["wikitext2_8k", "wikitext2_8k_tenth", "sotu_8k"])
def test_the_kept_runs_are_complete_and_have_the_options_that_the_code_chooses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    about = variants.STUDIES[name]
    runner = study.Runner(name, None)  # no trial is missing
    for variant in about.all_variants():
        plain = variant.removesuffix(DISTILLED)
        files = [f"config/{about.scale}.py", f"config/rows/{plain}.py"]
        config, given = load_config(TrainConfig, [*files, *runner.tune(plain)])
        without_effect = {"out_dir", "compile", "eval_interval", "eval_iters", "log_interval"}
        for seed in about.seeds(variant):
            kept = read_json(runner.kept(variant, seed) / "config.json")
            for name in {*given, *variants.OTHER_VALUES} - without_effect:
                assert kept[name] == flatten(config)[name]

    ensemble = runner.kept("softmax", variants.SEEDS[0]) / study.ENSEMBLE
    assert ensemble.is_file() == about.ensemble


def test_a_fitted_posterior_is_a_variant_and_judged_by_a_better_run(small_study, monkeypatch):
    fitted = dataclasses.replace(
        study.STUDIES["small"],
        variants=("softmax",),
        rates=(),
        distilled=(),
        ensemble=False,
        fitted=("softmax",),
        better=("fitted", ("--max_iters=31",)),
        limit=4,
    )
    monkeypatch.setitem(study.STUDIES, "fitted", fitted)
    study.Runner("fitted", InThisProcess()).run(["softmax"])
    logs = Path("training_logs/fitted")
    assert {path.name for path in logs.iterdir()} == {
        f"softmax{kron}-seed{seed}" for kron in ("", "_kron") for seed in SEEDS
    }
    row = read_json(logs / "softmax_kron-seed7" / "eval_test.json")
    assert "mutual_information" in row["better"]["spearman"]
    assert row["nll"] == pytest.approx(
        read_json(logs / "softmax-seed7" / "eval_test.json")["nll"], abs=1e-6
    )


def test_the_makefile_prepares_the_data_of_all_studies():
    command = ["make", "-nB", "study-data", "WIKITEXT=folder", "SOTU=file"]
    prepared = output_of(*command)
    for name, about in variants.STUDIES.items():
        if name != "wikitext_100m":  # which needs FLAGS
            assert not about.fitted or "data/foreign/prepare.py" in prepared
            texts = () if about.fitted else (about.ood,)
            for data in (about.dataset, *texts):
                assert re.search(rf"--(folder=data/|name=){data}\s", prepared)


def test_a_study_that_does_not_exist_ends_in_one_line(small_study, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "--studies=small,smal"])
    monkeypatch.setattr(study, "Runner", None)  # nothing runs
    assert "'smal'" in refusal(study.main)
