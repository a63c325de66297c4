"""python -m engine.data.describe: what a data folder holds."""

import sys

import pytest

import engine.data.describe
from engine.base.errors import run_main
from tests.helpers import write_nanogpt
from tests.test_shards import SHARDS, TEXT, described, flip


@pytest.fixture
def describe(monkeypatch, capsys):
    """Runs the command; its exit code and output."""

    def run_command(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["engine.data.describe", *map(str, argv)])
        capsys.readouterr()
        try:
            run_main(engine.data.describe.main)
            code = 0
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run_command


def test_it_says_what_a_folder_holds(tmp_path, describe):
    folder = described(tmp_path / "d", train=SHARDS, val=[TEXT[:300]])
    code, printed = describe(folder)
    assert code == 0 and "good" in printed
    assert f"train: {len(TEXT):,} tokens of uint16 in 6 files" in printed
    assert "val: 300" in printed and "257 ids" in printed


def test_it_names_all_damaged_files(tmp_path, describe):
    folder = described(tmp_path / "d", train=SHARDS, val=[TEXT[:300]])
    for name in ("train_000003.bin", "val_000000.bin"):
        flip(folder / name, 9)
    code, printed = describe(folder)
    assert code == 2 and "good" not in printed
    assert printed.count("another sha256") == 2 and "train_000003.bin has" in printed


def test_it_finds_ids_outside_the_vocabulary(tmp_path, describe):
    code, printed = describe(write_nanogpt(tmp_path / "d", {"train": [*range(999), 60000]}))
    assert code == 2 and "token id 60000" in printed


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--help"], ["nowhere"]])
def test_a_mistake_is_one_line(argv, describe):
    code, printed = describe(*argv)
    assert code == 2 and printed.count("\n") == 1
