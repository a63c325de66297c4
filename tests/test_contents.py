"""python -m engine.data.tokens: what a data folder holds."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import engine.base.errors
import engine.data.scan
import engine.data.tokens
from engine.data.tokenizer import ByteTokenizer
from tests.helpers import ROOT, write_dataset
from tests.test_shards import SHARDS, TEXT, described, flip, headed


def test_python_m_engine_tokens_says_what_a_folder_holds(tmp_path):
    told = subprocess.run(
        [
            sys.executable,
            "-m",
            "engine.data.tokens",
            described(tmp_path / "d", train=SHARDS, val=[TEXT[:300]]),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    text = TEXT.astype(np.uint8).tobytes().decode()
    assert told.stderr == "" and told.stdout.splitlines() == [
        f"{tmp_path / 'd'}: train, val; tokenizer byte of 257 ids (meta.json)",
        f"train: 6 files, 1 documents, {len(TEXT):,} tokens of uint16, {len(TEXT):,} bytes of text, 1.00 a token",
        "  good: as meta.json says",
        f"  text: {text[:80]} ...",
        "val: 1 file, 1 documents, 300 tokens of uint16, 300 bytes of text, 1.00 a token",
        "  good: as meta.json says",
        f"  text: {text[:80]} ...",
    ]


def contents(argv: list[str], monkeypatch) -> int:
    """Run python -m engine.data.tokens here; its exit code."""
    monkeypatch.setattr(sys, "argv", ["engine.data.tokens", *argv])
    try:
        engine.base.errors.run_main(engine.data.tokens.main)
    except SystemExit as end:
        return end.code
    return 0


def test_the_contents_name_all_damaged_files_and_believe_no_earlier_scan(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(engine.data.scan, "SETTLED", 0)
    folder = described(tmp_path / "d", train=SHARDS, val=[TEXT[:300]])
    assert (
        contents([str(folder)], monkeypatch) == 0
        and (folder / ".train_000003.scanned.json").is_file()
    )
    key = engine.data.scan.Reader(folder / "train_000003.bin").key(np.dtype("<u2"))
    for name in ("train_000003.bin", "val_000000.bin"):
        flip(folder / name, 9)
    monkeypatch.setattr(
        engine.data.scan, "_key", lambda *_: key | {"size": os.fstat(_[0].fileno()).st_size}
    )
    capsys.readouterr()
    assert contents([str(folder)], monkeypatch) == 2
    out = capsys.readouterr().out
    assert out.count("is damaged or another file") == 2 and "good" not in out


def test_the_contents_of_a_hostile_folder_cannot_play_with_the_terminal(
    tmp_path, capsys, monkeypatch
):
    evil = "\x1b[2J\x07\u202e\r\x9b1m"
    meta = write_dataset(tmp_path / "d", {"train": [evil * 3]}, ByteTokenizer())
    meta["source"] = evil
    (tmp_path / "d" / "meta.json").write_text(json.dumps(meta))
    assert contents([str(tmp_path / "d")], monkeypatch) == 0
    out = capsys.readouterr().out
    assert (
        all(char.isprintable() or char == "\n" for char in out)
        and r"\x1b[2J\x07\u202e\r\x9b1m" in out
    )
    meta["splits"][f"../{evil}"] = meta["splits"]["train"]
    (tmp_path / "d" / "meta.json").write_text(json.dumps(meta))
    capsys.readouterr()
    assert contents([str(tmp_path / "d")], monkeypatch) == 2
    assert all(char.isprintable() or char == "\n" for char in capsys.readouterr().err)


def test_the_contents_of_a_folder_without_a_tokenizer_are_ids(tmp_path, capsys, monkeypatch):
    headed(tmp_path / "d" / "fineweb_train_000001.bin", [100_000, 7, 8], "<u4")
    assert contents([str(tmp_path / "d")], monkeypatch) == 0
    out = capsys.readouterr().out
    assert (
        "tokenizer none of 128,256 ids (by llm.c's headers)" in out and "ids: 100000 7 8 ..." in out
    )
    assert "no hash to hold against" in out


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--help"], ["nowhere"]])
def test_the_contents_of_nothing_are_one_line(argv, capsys, monkeypatch):
    assert contents(argv, monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1
