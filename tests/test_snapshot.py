"""The code that a run keeps."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from engine import snapshot
from tests.helpers import ROOT, TINY, flags, run, write_words


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data"))


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A repository of two files, which snapshot takes for ours."""
    (tmp_path / "code" / "engine").mkdir(parents=True)
    (tmp_path / "code" / "train.py").write_text("one")
    (tmp_path / "code" / "engine" / "a.py").write_text("two")
    monkeypatch.setattr(snapshot, "ROOT", tmp_path / "code")
    return tmp_path / "code"


def test_a_run_keeps_code_that_runs_the_config_files_given_and_its_command(data, tmp_path):
    (tmp_path / "mine.py").write_text("from config.train_gpt2_wikitext2_cpu import *\n")
    options = TINY | {"dataset": data, "out_dir": tmp_path / "run", "max_iters": 1}
    command = [sys.executable, str(ROOT / "train.py"), str(tmp_path / "mine.py"), *flags(**options)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(tmp_path / "run" / "code.zip") as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "again")
    assert {"train.py", "engine/start.py", "data/text/prepare.py", "given/mine.py"} <= set(names)
    assert [name for name in names if name.startswith("config/")] == ["config/train_gpt2_wikitext2_cpu.py"]
    assert (tmp_path / "run" / "code.zip").stat().st_size < 400_000
    written = json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["command"]
    assert written.startswith("train.py ") and "--max_iters=1" in written and str(ROOT) not in written
    given = [str(tmp_path / "again" / "train.py"), "given/mine.py", *flags(**options | {"out_dir": tmp_path / "twin"})]
    subprocess.run([sys.executable, *given], cwd=tmp_path / "again", check=True, capture_output=True)
    with zipfile.ZipFile(tmp_path / "twin" / "code.zip") as archive:
        assert archive.namelist() == names


def test_the_same_code_is_the_same_bytes(code, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        snapshot.save_code(tmp_path / name, 0, [])
        shutil.copy(code / "train.py", code / "other")  # another time of change
        shutil.move(code / "other", code / "train.py")
    assert (tmp_path / "a" / "code.zip").read_bytes() == (tmp_path / "b" / "code.zip").read_bytes()


def test_going_on_with_other_code_is_said_and_keeps_both(code, tmp_path):
    (out := tmp_path / "run").mkdir()
    assert snapshot.save_code(out, 0, []) == ""
    first = (out / "code.zip").read_bytes()
    assert snapshot.save_code(out, 10, [tmp_path / "config of another folder.py"]) == ""
    (code / "engine" / "a.py").write_text("three")
    said = "the code has changed since the run began: engine/a.py"
    assert snapshot.save_code(out, 20, []) == f"{said}; kept as code_00000020.zip"
    assert snapshot.save_code(out, 30, []) == said  # the same as at 20
    assert (out / "code.zip").read_bytes() == first
    assert sorted(path.name for path in out.glob("*.zip")) == ["code.zip", "code_00000020.zip"]


def test_a_run_from_before_code_was_kept_gets_no_false_first(data, tmp_path, capsys):
    run(data, tmp_path, max_iters=2, lr_decay_iters=4)
    (tmp_path / "code.zip").unlink()
    run(data, tmp_path, max_iters=4, lr_decay_iters=4, init_from="resume")
    assert "has changed" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.zip")] == ["code_00000002.zip"]
