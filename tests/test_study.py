"""python -m study on a tiny study: killed, resumed, complete. (Variants: tests/test_rows.py.)"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import study.__main__ as study
from engine.base.errors import UserError
from engine.base.files import read_json_lines
from engine.data.tokenizer import CharTokenizer
from study import variants
from study.logs import read_trials
from study.summary import tuning
from tests.helpers import ROOT, TINY, contents, records, words, write_dataset, write_words

BOTH = "bayes_sigmoid_weighted"
VARIANTS, SEEDS = ("softmax", BOTH), (7, 8)
KEPT = {"softmax-seed7", "softmax-seed8", f"{BOTH}-seed7", f"{BOTH}_taught-seed7"}
KNOBS = {"softmax": "--weight_decay=0.0", BOTH: "--kl_weight=0.5"}


def main(home: Path, argv: list[str], put=setattr) -> None:
    """One small study in the folder of the fixture; put: how to replace the module's values."""
    knobs = {"weight_decay": 0.0, "kl_weight": 0.5}
    small = variants.Study(
        "small", f"{home}/foreign", VARIANTS, (1e-2, 1e-3), knobs, "", VARIANTS[1:], 2, True
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
    tokenizer = CharTokenizer.train([words(4000)])
    write_dataset(
        home / "foreign",
        {split: [words(200, seed=3)[::-1]] for split in ("train", "test")},
        tokenizer,
    )
    return home


FLAGS = ["--jobs=2", "--logs=logs", "--train_flags=--max_iters=8 --log_interval=2"]


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
    while not (done := list(home.glob("logs/small/*/eval_test.json"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = [contents(path.parent) for path in done], trials(home)
    return *before, commands(home, *FLAGS), commands(home, *FLAGS)


def trials(home: Path) -> list[dict]:
    return [
        json.loads(line) for line in (home / "logs/small/tuning.jsonl").read_text().splitlines()
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
    assert {path.name for path in (home / "logs/small").iterdir()} == KEPT | {"tuning.jsonl"}
    for name in KEPT:
        kept = home / "logs/small" / name
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


def test_a_kept_run_counts_as_done_with_the_options_that_are_chosen_now_alone(
    home, calls, monkeypatch
):
    monkeypatch.setattr(study, "run_main", lambda main: None)
    main(home, [], monkeypatch.setattr)
    runner = study.Runner(
        study.StudyConfig(logs="logs", train_flags=FLAGS[-1].removeprefix("--train_flags="))
    )
    assert runner.has_records("small", "softmax", 8)
    path = home / "logs/small/softmax-seed8/config.json"
    kept = path.read_text()
    try:
        for name in (
            "learning_rate",
            "weight_decay",
            "dropout",
            "max_iters",
            "n_embd",
        ):  # trials, row, call, scale
            for options in (
                json.loads(kept) | {name: 0.123},
                {k: v for k, v in json.loads(kept).items() if k != name},
            ):
                path.write_text(json.dumps(options))
                assert not runner.has_records("small", "softmax", 8), name
    finally:
        path.write_text(kept)


def test_a_run_whose_scale_has_changed_is_not_gone_on_with(home, calls):
    scale = home / "config/small.py"
    text = scale.read_text()
    scale.write_text(text + "n_layer = 3\n")
    try:
        process = start(home, *FLAGS)
        output, errors = process.communicate()
    finally:
        scale.write_text(text)
    assert process.returncode == 2 and errors.count("\n") == 1 and "python " not in output
    assert (
        "small/softmax_learning_rate=0.01-seed7 was trained with another n_layer; delete it"
        in errors
    )


@pytest.mark.parametrize(
    "line", ['{"row": "softmax", "val_nll": 1.0}', '{"flags": [], "val_nll": 1.0}', "null", "{"]
)
def test_a_damaged_list_of_trials_is_named(tmp_path, line):
    runner = study.Runner(study.StudyConfig(logs=str(tmp_path)))
    (tmp_path / "wikitext2_8k").mkdir()
    (tmp_path / "wikitext2_8k/tuning.jsonl").write_text(line)
    with pytest.raises(UserError, match="wikitext2_8k/tuning.jsonl"):
        runner.tune("wikitext2_8k", "softmax")


def test_a_trial_that_diverges_is_listed_as_infinitely_bad_and_ends_no_study(home, monkeypatch):
    monkeypatch.setattr(study, "run_main", lambda main: None)
    main(home, [], monkeypatch.setattr)
    # at a rate of 1000 weights grow a million times in a step
    flags = "--max_iters=8 --weight_decay=1000"
    runner = study.Runner(study.StudyConfig(logs="diverging", train_flags=flags))
    runner.home = Path("out/diverging")
    best = {}
    small = dataclasses.replace(variants.STUDIES["small"], rates=(1000, 1e-3))
    monkeypatch.setitem(variants.STUDIES, "small", small)
    runner.together([lambda: best.update(softmax=runner.tune("small", "softmax"))])
    logs = home / "diverging/small"
    listed = {
        trial["flags"][0]: trial["val_nll"] for trial in read_json_lines(logs / "tuning.jsonl")
    }
    assert listed["--learning_rate=1000"] == math.inf and math.isfinite(
        listed["--learning_rate=0.001"]
    )
    assert best["softmax"][0] == "--learning_rate=0.001" and "learning_rate 1000: inf" in tuning(
        logs
    )


def test_a_trial_of_other_options_is_repeated_and_the_latest_counts(tmp_path, monkeypatch):
    runner = study.Runner(study.StudyConfig(logs=str(tmp_path)))
    path, flags = tmp_path / "wikitext2_8k/tuning.jsonl", ["--learning_rate=0.5"]
    monkeypatch.setattr(runner, "train", lambda *about: Path())
    for nll in (5.0, 4.0):
        monkeypatch.setattr(runner, "evaluate", lambda *about, nll=nll: {"nll": nll})
        for name in ("softmax", "bayes"):
            assert runner.trial("wikitext2_8k", name, flags)["val_nll"] == 5.0
    options = read_json_lines(path)[1]["options"].items()
    assert options >= {"learning_rate": 0.5, "n_layer": 3, "kl_weight": 0.1}.items()
    path.write_text(path.read_text().replace('"n_layer": 3', '"n_layer": 4', 1))  # of softmax's
    names = ("softmax", "bayes")
    nlls = [runner.trial("wikitext2_8k", name, flags)["val_nll"] for name in names]
    assert nlls == [4.0, 5.0]
    assert [trial["val_nll"] for trial in read_trials(path)] == [4.0, 5.0]


def test_the_kept_trials_are_of_todays_scales_so_that_none_is_made_again():
    runner = study.Runner(study.StudyConfig())
    for name in variants.STUDIES:
        for trial in read_json_lines(ROOT / f"training_logs/{name}/tuning.jsonl"):
            assert trial["options"] == runner.options(name, trial["row"], trial["flags"]), (
                name,
                trial["row"],
            )


@pytest.mark.parametrize("name", ["wikitext2_8k", "wikitext2_8k_tenth", "sotu_8k"])
def test_the_kept_runs_of_the_tuned_studies_are_complete_and_what_the_code_chooses_today(name):
    runner, about = study.Runner(study.StudyConfig()), variants.STUDIES[name]
    assert all(runner.is_done(name, variant) for variant in about.all_variants())
    assert runner.ensemble_of(name).is_file() == about.ensemble


def test_an_ensemble_goes_when_one_of_its_members_is_trained_again(tmp_path, monkeypatch):
    runner = study.Runner(study.StudyConfig(logs=str(tmp_path)))
    (kept := runner.ensemble_of("wikitext2_8k")).parent.mkdir(parents=True)
    kept.touch()
    there = []  # when the run's records come: a kill after that must leave no old ensemble
    for method in ("train", "evaluate"):
        monkeypatch.setattr(runner, method, lambda *about: None)
    monkeypatch.setattr(runner, "keep", lambda *about: there.append(kept.is_file()))
    monkeypatch.setattr(runner, "has_records", lambda *about: True)
    runner.finish("wikitext2_8k", "softmax")
    assert kept.is_file() and there == []
    monkeypatch.setattr(runner, "has_records", lambda *about: about[-1] != variants.SEEDS[-1])
    runner.finish("wikitext2_8k", "softmax")
    assert not kept.is_file() and there == [False]


def test_a_runs_records_bring_no_ensemble_of_other_runs_with_them(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "config.json", "eval_val.json", "eval_test.json", study.ENSEMBLE):
        (folder / name).touch()
    study.Runner(study.StudyConfig(logs=str(tmp_path))).keep(folder, "study", "softmax-seed1337")
    kept = {path.name for path in (tmp_path / "study/softmax-seed1337").iterdir()}
    assert kept == {"metrics.jsonl", "config.json", "eval_val.json", "eval_test.json"}


def test_every_data_set_is_prepared_after_the_one_whose_tokenizer_it_has():
    for name, about in variants.STUDIES.items():
        names = study.data_sets([name])
        assert {about.dataset(ROOT), about.foreign} <= set(names) <= set(variants.PREPARE)
        for i, data in enumerate(names):
            for flag in variants.PREPARE[data]:
                if flag.startswith("--tokenizer=data/"):
                    assert flag.removeprefix("--tokenizer=data/") in names[:i]
    assert study.data_sets(["sotu_8k"])[:2] == ["sotu_8k", "wikitext2_by_sotu_8k"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--studies=small,smal"], "studies = 'smal' is not one of: small"),
        (
            ["--rows=softmax,none"],
            f"rows = 'none' is not one of: softmax, {BOTH}, {BOTH}_taught, bayes",
        ),
        (["--jobs=0"], "jobs = 0 must be >= 1"),
        (["--train_flags=--max_iter=8"], "--max_iter is not an option; did you mean 'max_iters'?"),
    ],
)
def test_a_mistake_ends_in_one_line(home, argv, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(home, ["--logs=nothing", *argv], monkeypatch.setattr)
    output, errors = capsys.readouterr()
    assert exit_.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors and not (home / "nothing").exists()
    assert "python " not in output


@pytest.mark.parametrize("given", ["", "no.txt"])
def test_a_missing_file_of_addresses_is_said_before_anything_is_prepared(
    tmp_path, monkeypatch, capsys, given
):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.setattr(sys, "argv", ["study.py", "--studies=wikitext2", f"--sotu={given}"])
    with pytest.raises(SystemExit) as exit_:
        study.run_main(study.main)
    errors = capsys.readouterr().err
    assert (
        exit_.value.code == 2 and errors.count("\n") == 1 and f"--sotu={given or 'FILE'}" in errors
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config"]
