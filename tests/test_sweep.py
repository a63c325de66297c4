"""augmentation/sweep.py: the study goes on where it stopped, and its labels and checkpoints do not
stay behind.
"""

import runpy
import sys

import pytest

from tests.helpers import ROOT, TINY, flags, records, run, write_words

pytest.importorskip("optuna", reason="the sweep needs optuna")


def sweep(capsys, monkeypatch, *argv: str) -> str:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *argv])
    runpy.run_path(str(ROOT / "augmentation/sweep.py"), run_name="__main__")
    return capsys.readouterr().out


def test_a_sweep_finds_the_best_of_its_trials_and_goes_on_where_it_stopped(
    tmp_path, capsys, monkeypatch
):
    data = write_words(tmp_path / "data")
    run(data, tmp_path / "teacher", max_iters=20)
    before = sorted(data.iterdir())
    options = {
        "teacher": tmp_path / "teacher",
        "dataset": data,
        "out_dir": tmp_path / "sweep",
        "thresholds": "0,200",
    }
    argv = flags(**TINY | options | {"max_iters": 5, "eval_interval": 5})
    capsys.readouterr()
    first = sweep(capsys, monkeypatch, *argv, "--trials=1").splitlines()
    more = sweep(capsys, monkeypatch, *argv, "--trials=3").splitlines()
    assert [line.split(":")[0] for line in first] == ["without a teacher", "trial 0", "best"]
    assert [line.split(":")[0] for line in more] == [
        "without a teacher",
        "trial 1",
        "trial 2",
        "best",
    ]
    nlls = [float(line.split("val nll ")[1].split()[0]) for line in [first[1], *more[1:]]]
    assert nlls[-1] == min(nlls[:-1])
    assert (
        first[0] == more[0] and records(tmp_path / "sweep/no_teacher", "val_nll")[-1]["step"] == 5
    )
    with pytest.raises(SystemExit):
        sweep(capsys, monkeypatch, *argv, "--trials=4", "--max_iters=6")
    assert "holds a sweep with other options" in capsys.readouterr().err
    assert sorted(data.iterdir()) == before and not list((tmp_path / "sweep").glob("**/*.pt"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which teacher?"),
        (["--teacher=x", "--trials=0"], "trials = 0 must be"),
        (["--teacher=x", "--script=train_foo.py"], "train_foo.py does not exist"),
        (["--teacher=x", "--labels=y"], "leave --labels out"),
        (
            [
                "--teacher=nowhere",
                "--max_iters=1",
                *flags(**{k: v for k, v in TINY.items() if k != "max_iters"}),
            ],
            "nowhere",
        ),
    ],
)
def test_a_mistake_is_one_line(argv, message, tmp_path, capsys, monkeypatch):
    data = write_words(tmp_path / "data")
    with pytest.raises(SystemExit) as exit_:
        sweep(capsys, monkeypatch, *argv, f"--dataset={data}", f"--out_dir={tmp_path / 'sweep'}")
    error = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and message in error
    )
