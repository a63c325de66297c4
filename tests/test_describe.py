"""python -m engine.data.describe: what a data folder holds."""

import json
import sys

import numpy as np
import pytest

import engine.data.describe
from engine.base.errors import run_main
from engine.data.tokenizer import ByteTokenizer
from tests.helpers import write_dataset, write_nanogpt
from tests.test_shards import SHARDS, TEXT, described, flip, headed


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
    assert code == 0 and printed.count("good") == 2
    for part in (
        "byte of 257 ids",
        f"train: {len(TEXT):,} tokens of uint16 in 6 files",
        "val: 300",
    ):
        assert part in printed
    assert printed.count(TEXT[:80].astype(np.uint8).tobytes().decode()) == 2


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


def test_control_characters_are_printed_as_escapes(tmp_path, describe):
    evil = "\x1b[2J\x07\u202e\r\x9b1m"
    meta = write_dataset(tmp_path / "d", {"train": [evil * 3]}, ByteTokenizer())
    meta["source"] = evil
    (tmp_path / "d" / "meta.json").write_text(json.dumps(meta))
    code, printed = describe(tmp_path / "d")
    assert code == 0 and r"\x1b[2J\x07\u202e\r\x9b1m" in printed
    assert all(char.isprintable() or char == "\n" for char in printed)


def test_a_folder_without_a_tokenizer_shows_ids(tmp_path, describe):
    headed(tmp_path / "d" / "fineweb_train_000001.bin", [100_000, 7, 8], "<u4")
    code, printed = describe(tmp_path / "d")
    assert code == 0 and "128,256 ids" in printed and "ids: 100000 7 8 ..." in printed
    assert "no hashes" in printed


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--help"], ["nowhere"]])
def test_a_mistake_is_one_line(argv, describe):
    code, printed = describe(*argv)
    assert code == 2 and printed.count("\n") == 1
