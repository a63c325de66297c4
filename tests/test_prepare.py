"""Preparing data: in threads, in bounded memory, killed at any instant, twice at once."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import engine.data.writer
from engine.base.errors import UserError
from engine.data.corpus import Options, prepare
from engine.data.sources import source_of
from engine.data.splits import Corpus, Position, draw, walk, with_val
from engine.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from engine.data.tokens import TokenFile
from tests.conftest import shared_data
from tests.faults import SHARD, documents, token_files
from tests.helpers import ROOT, flags, words


def whole(texts: list[str]) -> Corpus:
    return Corpus({"train": [source_of("train", lambda: texts)]})


def drawn() -> Corpus:
    return with_val({"train": [source_of("train", documents)]}, 0.1)


def into(folder: Path, **options) -> Options:
    """By bytes, in several files, unless the options differ."""
    options = {"tokenizer": "byte", "shard_tokens": SHARD, "num_proc": 1} | options
    return Options(folder=str(folder), **options)


def stop_after_journal(monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
    write_json = engine.data.writer.write_json

    def stopping(path, value):
        write_json(path, value)
        if path.name == "journal.json" and "meta" not in value:
            raise stop

    monkeypatch.setattr(engine.data.writer, "BATCH", 3000)
    monkeypatch.setattr(engine.data.writer, "write_json", stopping)


def test_a_split_larger_than_a_shard_comes_in_several_that_hold_all_of_it_in_order(tmp_path):
    texts = documents()
    prepare(into(tmp_path), "test", lambda: whole(texts))
    meta = json.loads((tmp_path / "meta.json").read_text())
    shards = meta["splits"]["train"]["shards"]
    names = [shard["file"] for shard in shards]
    assert len(shards) > 5 and names == sorted(path.name for path in tmp_path.glob("*.bin"))
    assert {shard["tokens"] for shard in shards[:-1]} == {SHARD}
    ids = np.concatenate([np.fromfile(tmp_path / name, "<u2") for name in names])
    tokenizer = ByteTokenizer()
    expected = [piece for text in texts for piece in ([tokenizer.eot], tokenizer.encode(text))]
    assert np.array_equal(ids, np.concatenate(expected)[1:]) and max(map(len, texts)) > SHARD
    for shard in shards:
        data = (tmp_path / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    joined = "\n".join(shard["sha256"] for shard in shards)
    assert meta["splits"]["train"]["sha256"] == hashlib.sha256(joined.encode()).hexdigest()


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe", "char", "byte"])
def test_threads_write_what_one_thread_writes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.data.writer, "BATCH", 5000)
    for n in (1, 3):
        options = into(tmp_path / str(n), tokenizer=tokenizer, vocab_size=300, num_proc=n)
        prepare(options, "test", drawn)
    assert token_files(tmp_path / "1") == token_files(tmp_path / "3") != {}


def test_killed_at_any_instant_the_same_command_continues_and_ends_with_the_same_files(
    tmp_path, monkeypatch
):
    """kill -9 at random instants of forked processes, which need no start."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    monkeypatch.setattr(engine.data.writer, "BATCH", 3000)
    instants = random.Random(1)
    started = time.perf_counter()
    prepare(into(tmp_path / "plain"), "test", drawn)
    seconds = time.perf_counter() - started
    fork = multiprocessing.get_context("fork")
    kept = 0
    for _ in range(12):
        options = into(tmp_path / "out", num_proc=2)
        process = fork.Process(target=prepare, args=(options, "test", drawn))
        process.start()
        process.join(instants.uniform(0, seconds))
        process.kill()
        process.join()
        kept += bool(list(tmp_path.glob("out/.preparing-*/journal.json")))
    prepare(options, "test", drawn)
    assert kept and token_files(tmp_path / "out") == token_files(tmp_path / "plain")
    assert not list(tmp_path.glob("out/.*"))


def test_a_kill_after_each_file_costs_no_file(tmp_path, monkeypatch):
    """In one process: stop after every journal entry, and look which files are written again."""
    corpus, options, stops, seen = whole(documents()), into(tmp_path / "out"), 0, {}
    prepare(into(tmp_path / "plain"), "test", lambda: corpus)
    stop_after_journal(monkeypatch, KeyboardInterrupt)
    while not (tmp_path / "out" / "meta.json").is_file():
        try:
            prepare(options, "test", lambda: corpus)
        except KeyboardInterrupt:
            stops += 1
            (work,) = (tmp_path / "out").glob(".preparing-*")
            shards = json.loads((work / "journal.json").read_text())["splits"]["train"]["shards"]
            times = {shard["file"]: (work / shard["file"]).stat().st_mtime_ns for shard in shards}
            assert seen.items() <= times.items()  # none of the full ones is touched again
            seen = times
    assert stops > 5 and token_files(tmp_path / "out") == token_files(tmp_path / "plain")


def test_killed_while_files_move_into_place_nothing_half_is_read_and_the_next_call_ends_it(
    tmp_path, monkeypatch
):
    """Over an earlier data set: after every single move the reader refuses or reads it whole."""
    new, old = tmp_path / "new", tmp_path / "out"
    prepare(into(new), "test", drawn)
    for stop in range(1, 100):
        prepare(into(old, tokenizer="char"), "test", drawn)
        before, moves, move = token_files(old), [], os.replace

        def stopping(source, target, stop=stop, moves=moves, move=move):
            moves.append(target)
            if len(moves) == stop:
                raise KeyboardInterrupt
            move(source, target)

        monkeypatch.setattr(os, "replace", stopping)
        try:
            prepare(into(old), "test", drawn)
            break
        except KeyboardInterrupt:
            monkeypatch.undo()
        try:
            for split in ("train", "val"):
                TokenFile(old, split).check(257)
            assert token_files(old) in (before, token_files(new))
        except UserError:
            pass
        prepare(into(old), "test", drawn)
        assert token_files(old) == token_files(new) and not list(old.glob(".preparing*"))
    monkeypatch.undo()
    assert stop > 8 and token_files(old) == token_files(new)


def test_two_at_once_do_not_spoil_each_other(tmp_path, monkeypatch):
    prepare(into(tmp_path / "plain"), "test", drawn)
    refused = []

    def meanwhile():
        with pytest.raises(UserError) as error:
            prepare(into(tmp_path / "out"), "test", drawn)
        refused.append(str(error.value))
        return drawn()

    prepare(into(tmp_path / "out"), "test", meanwhile)
    assert "another process" in refused[0]
    assert token_files(tmp_path / "out") == token_files(tmp_path / "plain")


@pytest.mark.parametrize("when", [1, 2, 3, 7, 12, 20])
def test_a_full_disk_is_one_line_and_with_room_again_the_same_call_continues(
    when, tmp_path, monkeypatch
):
    """The disk refuses at the n-th flush of a file or folder, whatever that is of."""
    flushes, fsync = [], os.fsync

    def full(fd: int) -> None:
        flushes.append(fd)
        if len(flushes) == when:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(engine.data.writer, "BATCH", 3000)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(into(tmp_path / "out"), "test", lambda: whole(documents()))
    assert not token_files(tmp_path / "out")
    assert when < 7 or list(tmp_path.glob("out/.preparing-*/train_*.bin"))
    for folder in ("out", "plain"):
        prepare(into(tmp_path / folder), "test", lambda: whole(documents()))
    assert token_files(tmp_path / "out") == token_files(tmp_path / "plain")


def test_a_source_that_breaks_off_half_way_loses_nothing(tmp_path, monkeypatch, capsys):
    texts, broken = documents(), [True]

    def until_it_breaks():
        for i, text in enumerate(texts):
            if broken[0] and i == 300:
                raise UserError("the network is gone")
            yield text

    monkeypatch.setattr(engine.data.writer, "BATCH", 3000)
    corpus = Corpus({"train": [source_of("train", until_it_breaks)]})
    with pytest.raises(UserError, match="the network is gone"):
        prepare(into(tmp_path / "out"), "test", lambda: corpus)
    assert "the same command continues" in capsys.readouterr().out
    (work,) = (tmp_path / "out").glob(".preparing-*")
    assert len(list(work.glob("train_*.bin"))) > 2
    with pytest.raises(UserError, match="is missing"):  # nothing of it can be read
        TokenFile(tmp_path / "out", "train")
    broken[0] = False
    prepare(into(tmp_path / "out"), "test", lambda: corpus)
    prepare(into(tmp_path / "plain"), "test", lambda: whole(texts))
    assert token_files(tmp_path / "out") == token_files(tmp_path / "plain")


def test_what_is_ready_is_not_made_again_until_options_or_files_change(tmp_path, capsys):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    (texts / "a.txt").write_text("some words " * 100)
    asked = []

    def corpus() -> Corpus:
        asked.append(1)
        return whole([(texts / "a.txt").read_text()])

    def is_made(**more) -> bool:
        before = len(asked)
        options = {"source": str(texts), "shard_tokens": 10**6} | more
        prepare(into(out, **options), "test", corpus)
        assert ("is ready" in capsys.readouterr().out) == (len(asked) == before)
        return len(asked) > before

    assert is_made() and not is_made() and not is_made(num_proc=3)
    assert is_made(shard_tokens=500)
    (texts / "a.txt").write_text("other words " * 100)
    assert is_made(shard_tokens=500)
    (out / "train_000001.bin").unlink()
    assert is_made(shard_tokens=500)
    (out / "train_000001.bin").write_bytes(b"ab")
    assert is_made(shard_tokens=500)
    (texts / "log").write_text("no text")
    assert not is_made(shard_tokens=500)
    assert is_made() and len(list(out.glob("*.bin"))) == 1  # nothing is left of the shards


def test_of_any_documents_in_a_row_every_split_has_its_share():
    fractions = {"val": 0.05, "test": 0.1}
    drawn = [draw(i, fractions) for i in range(100_000)]
    for begin in range(0, 98_000, 9973):
        row = drawn[begin : begin + 2000]
        assert abs(row.count("val") - 100) <= 3 and abs(row.count("test") - 200) <= 3
    assert {"val", "test"} <= set(drawn[:20])
    assert [draw(i, {}) for i in range(5)] == ["train"] * 5
    assert draw(10**12, {"val": 0.9999999}) == "val"


def test_every_document_goes_whole_to_one_split_and_an_official_split_stays_unless_val_is_drawn():
    texts = {
        split: [f"{split} {i} " + words(50, seed=i) for i in range(100)]
        for split in ("train", "val", "test")
    }
    sources = {split: [source_of(split, lambda t=t: t)] for split, t in texts.items()}

    def splits_of(fraction: float) -> dict[str, list[str]]:
        found = {}
        for split, text, is_start, _ in walk(with_val(sources, fraction), Position()):
            assert is_start
            found.setdefault(split, []).append(text)
        return found

    assert splits_of(0) == texts
    drawn = splits_of(0.1)
    assert drawn["test"] == texts["test"] and len(drawn["val"]) in (9, 10, 11)
    assert sorted(drawn["train"] + drawn["val"]) == sorted(texts["train"])


def test_the_tokenizer_of_a_run_or_a_data_set_can_be_used_again(tmp_path):
    texts = documents(60)
    for kind in ("char", "bpe"):
        first, second = tmp_path / f"{kind}1", tmp_path / f"{kind}2"
        prepare(into(first, tokenizer=kind, vocab_size=300), "test", lambda: whole(texts))
        options = Options(folder=str(second), tokenizer=str(first))
        prepare(options, "test", lambda: whole(texts[:9]))
        metas = [json.loads((folder / "meta.json").read_text()) for folder in (first, second)]
        assert metas[0]["tokenizer"] == metas[1]["tokenizer"]
        ids = TokenFile(second, "train").ids
        assert np.array_equal(ids, TokenFile(first, "train").ids[: len(ids)])
        assert load_tokenizer(second).decode(ids).startswith(texts[0])


def test_end_of_text_inside_a_text_stays_text(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.data.writer, "BATCH", 50)
    texts = [f"a <|endoftext|> in document {i}" for i in range(20)]
    for kind in ("gpt2", "byte"):
        folder = tmp_path / kind
        options = Options(folder=str(folder), tokenizer=kind, num_proc=2)
        prepare(options, "test", lambda: whole(texts))
        tokenizer, ids = load_tokenizer(folder), np.fromfile(folder / "train.bin", "<u2")
        assert (ids == tokenizer.eot).sum() == 19
        assert tokenizer.decode(ids) == "<|endoftext|>".join(texts)


def test_memory_does_not_grow_with_the_text(tmp_path):
    """A process of its own prepares 7 MB, then 106 MB."""
    code = """
import resource, sys
from engine.data.corpus import Options, prepare
from engine.data.sources import source_of
from engine.data.splits import Corpus
text = "so many words in a row, and none of them new " * 4000
for n in (40, 600):
    sources = [source_of("train", lambda: (text for _ in range(n)))]
    options = Options(folder=f"{sys.argv[1]}/{n}", tokenizer="byte", num_proc=2, shard_tokens=10**7)
    prepare(options, "test", lambda: Corpus({"train": sources}))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    argv = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = (int(line) for line in done.stdout.split("\n") if line.isdigit())
    assert large < small + 30  # MB
    assert sum(path.stat().st_size for path in (tmp_path / "600").glob("*.bin")) > 200e6


def test_characters_of_every_split_are_in_the_table(tmp_path):
    texts = {"train": ["ab"], "val": ["xy"]}
    corpus = Corpus({split: [source_of(split, lambda t=t: t)] for split, t in texts.items()})
    prepare(Options(folder=str(tmp_path), tokenizer="char"), "test", lambda: corpus)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.chars == list("abxy") and tokenizer.eot is None


def test_a_disk_that_is_full_while_files_move_into_place_costs_nothing_either(
    tmp_path, monkeypatch
):
    out, write_json = tmp_path / "out", engine.data.writer.write_json
    prepare(into(out), "test", lambda: whole(["AAAA"]))

    def full(path, value):
        if path == out / "meta.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr(engine.data.writer, "write_json", full)
    options = into(out, shard_tokens=9)
    with pytest.raises(OSError, match="No space left"):
        prepare(options, "test", lambda: whole(["BBBB"]))
    with pytest.raises(UserError):
        TokenFile(out, "train")
    monkeypatch.undo()
    asked = []
    prepare(options, "test", lambda: asked.append(1))
    assert not asked and bytes(TokenFile(out, "train").ids.astype(np.uint8)) == b"BBBB"


def test_token_files_of_another_program_are_not_written_over(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"abcd")
    with pytest.raises(UserError, match=r"train\.bin of another program; .*--folder"):
        prepare(into(tmp_path), "test", lambda: whole(["new"]))
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def test_unfinished_work_on_another_text_starts_again(tmp_path, monkeypatch):
    """The same name and options, as of a data set of the Hub, but another revision."""
    with monkeypatch.context() as patch:
        stop_after_journal(patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(into(tmp_path / "out"), "test", lambda: whole(documents()))
    texts = [text.upper() for text in documents()]
    corpus = Corpus({"train": [source_of("train at another revision", lambda: texts)]})
    prepare(into(tmp_path / "out"), "test", lambda: corpus)
    prepare(into(tmp_path / "plain"), "test", lambda: whole(texts))
    assert token_files(tmp_path / "out") == token_files(tmp_path / "plain")


@pytest.mark.parametrize("meta", ["[1, 2]", "{", '{"made_from": 3, "splits": {"train": {}}}'])
def test_a_damaged_meta_json_is_prepared_again(meta, tmp_path):
    prepare(into(tmp_path), "test", lambda: whole(["x y z"]))
    good = (tmp_path / "meta.json").read_text()
    (tmp_path / "meta.json").write_text(meta)
    prepare(into(tmp_path), "test", lambda: whole(["x y z"]))
    assert (tmp_path / "meta.json").read_text() == good


def test_the_tokenizer_of_a_run_on_data_without_meta_can_be_used_again(tmp_path):
    GPT2Tokenizer().save(tmp_path)
    out = tmp_path / "out"
    prepare(into(out, tokenizer=str(tmp_path)), "test", lambda: whole(["the old sea"]))
    assert load_tokenizer(out).decode(TokenFile(out, "train").ids) == "the old sea"


def test_all_scripts_take_the_common_options_and_do_what_they_say(tmp_path, monkeypatch):
    common = {field.name for field in fields(Options)}
    paths = {path.parent.name: path for path in ROOT.glob("data/*/prepare.py")}
    for path in paths.values():
        assert common <= {field.name for field in fields(runpy.run_path(str(path))["Options"])}
    shakespeare = dict.fromkeys(("shakespeare", "shakespeare_char"), "tinyshakespeare/input.txt")
    wikitext = dict.fromkeys(("wikitext", "openwebtext", "fineweb_edu", "text"), "wikitext2")
    for name, source in (shakespeare | wikitext).items():
        folder = tmp_path / name
        options = {"source": shared_data(source), "folder": folder, "tokenizer": "byte"}
        options |= {"val_fraction": 0.25, "shard_tokens": 300_000, "num_proc": 2}
        monkeypatch.setattr(sys, "argv", [str(paths[name]), *flags(**options)])
        runpy.run_path(str(paths[name]), run_name="__main__")
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["tokenizer"] == {"kind": "byte"} and {"train", "val"} <= meta["splits"].keys()
        assert meta["splits"]["train"]["shards"][0]["tokens"] == 300_000
        sizes = {split: about["tokens"] for split, about in meta["splits"].items()}
        if name not in ("openwebtext", "fineweb_edu"):  # three documents
            assert 0.2 < sizes["val"] / (sizes["train"] + sizes["val"]) < 0.3
