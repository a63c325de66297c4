"""The code that a run keeps."""

import importlib
import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from engine.runs import snapshot
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
    assert {"train.py", "engine/runs/start.py", "data/text/prepare.py", "given/mine.py"} <= set(
        names
    )
    assert [name for name in names if name.startswith("config/")] == [
        "config/train_gpt2_wikitext2_cpu.py"
    ]
    assert (tmp_path / "run" / "code.zip").stat().st_size < 400_000
    written = json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["command"]
    assert (
        written.startswith("train.py ") and "--max_iters=1" in written and str(ROOT) not in written
    )
    given = [
        str(tmp_path / "again" / "train.py"),
        "given/mine.py",
        *flags(**options | {"out_dir": tmp_path / "twin"}),
    ]
    subprocess.run(
        [sys.executable, *given], cwd=tmp_path / "again", check=True, capture_output=True
    )
    with zipfile.ZipFile(tmp_path / "twin" / "code.zip") as archive:
        assert archive.namelist() == names


def test_the_same_code_is_the_same_bytes(code, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        snapshot.save_code(tmp_path / name, 0, [])
        shutil.copy(code / "train.py", code / "other")  # another time of change
        shutil.move(code / "other", code / "train.py")
    assert (tmp_path / "a" / "code.zip").read_bytes() == (tmp_path / "b" / "code.zip").read_bytes()


def test_going_on_with_other_code_than_the_last_start_is_said_and_all_is_kept(code, tmp_path):
    (out := tmp_path / "run").mkdir()
    assert snapshot.save_code(out, 0, []) == ("code.zip", "")
    first = (out / "code.zip").read_bytes()
    assert snapshot.save_code(out, 10, [tmp_path / "config of another folder.py"]) == (
        "code.zip",
        "",
    )
    (code / "engine" / "a.py").write_text("three")
    said, newer = "the code has changed since the last start: engine/a.py", "code_00000020.zip"
    assert snapshot.save_code(out, 20, [], "code.zip") == (newer, f"{said}; kept as {newer}")
    assert snapshot.save_code(out, 30, [], newer) == (newer, "")  # the same as at 20
    (code / "engine" / "a.py").write_text("two")
    assert snapshot.save_code(out, 40, [], newer) == ("code.zip", said)  # the first again
    (code / "engine" / "a.py").write_text("four")
    assert snapshot.save_code(out, 20, [], "code.zip")[0] == "code_00000020_2.zip"
    assert (out / "code.zip").read_bytes() == first
    assert sorted(path.name for path in out.glob("*.zip")) == [
        "code.zip",
        newer,
        "code_00000020_2.zip",
    ]


def test_an_archive_with_a_flipped_bit_stops_no_run(code, tmp_path):
    (code / "train.py").write_text("one line of code\n" * 20)
    snapshot.save_code(tmp_path, 0, [])
    whole = (tmp_path / "code.zip").read_bytes()
    for i in range(len(whole)):
        for bit in (1, 16):
            (tmp_path / "code.zip").write_bytes(
                whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :]
            )
            snapshot.save_code(tmp_path, 10, [])
    (tmp_path / "code.zip").write_bytes(whole)
    (tmp_path / "code_00000010.zip").unlink(missing_ok=True)
    assert snapshot.save_code(tmp_path, 10, []) == ("code.zip", "")


def test_config_files_are_kept_with_what_they_import_from_beside_and_two_of_one_name_both(
    code, tmp_path, monkeypatch
):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"from base_of_{folder} import *\n")
        (tmp_path / folder / f"base_of_{folder}.py").write_text("max_iters = 1\n")
        monkeypatch.syspath_prepend(tmp_path / folder)
        importlib.import_module(f"base_of_{folder}")
    snapshot.save_code(
        tmp_path,
        0,
        [tmp_path / "a" / "mine.py", tmp_path / "b" / "mine.py", tmp_path / "a" / "mine.py"],
    )
    with zipfile.ZipFile(tmp_path / "code.zip") as archive:
        kept = {
            name: archive.read(name).decode()
            for name in archive.namelist()
            if name.startswith("given/")
        }
    assert sorted(kept) == [
        "given/base_of_a.py",
        "given/base_of_b.py",
        "given/mine.py",
        "given/mine_2.py",
    ]
    assert "base_of_a" in kept["given/mine.py"] and "base_of_b" in kept["given/mine_2.py"]


def test_config_json_lists_the_starts_of_a_run(data, tmp_path):
    written = lambda: json.loads((tmp_path / "config.json").read_text())  # noqa: E731
    run(data, tmp_path, max_iters=2, lr_decay_iters=6)
    first = written()["environment"]
    assert written()["starts"] == [{"step": 0, "code": "code.zip"} | first]
    run(data, tmp_path, max_iters=4, lr_decay_iters=6, init_from="resume")
    assert [start["step"] for start in written()["starts"]] == [0, 2]
    assert written()["starts"][-1] == {"step": 2, "code": "code.zip"} | written()["environment"]
    (tmp_path / "config.json").write_text(
        json.dumps({"environment": first})
    )  # of before starts were kept
    run(data, tmp_path, max_iters=6, init_from="resume")
    assert written()["starts"] == [
        first,
        {"step": 4, "code": "code.zip"} | written()["environment"],
    ]


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", '{"starts": 3}', '{"starts": [4]}', "{}", "[" * 100_000]
)
def test_a_damaged_config_json_tells_of_no_starts(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert snapshot.starts(tmp_path) == []


def test_a_run_from_before_code_was_kept_gets_no_false_first(data, tmp_path, capsys):
    run(data, tmp_path, max_iters=2, lr_decay_iters=4)
    (tmp_path / "code.zip").unlink()
    run(data, tmp_path, max_iters=4, lr_decay_iters=4, init_from="resume")
    assert "has changed" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.zip")] == ["code_00000002.zip"]
