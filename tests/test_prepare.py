"""Preparing data: bounded, in processes, killed at any instant, twice at once; the files come out the same."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import engine.data.encoding
import engine.data.writer
from engine.base.errors import UserError
from engine.data.corpus import Options, is_ready, part_of, prepare
from engine.data.splits import Corpus, draw, walk, with_val
from engine.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from engine.data.tokens import TokenFile
from tests.conftest import shared_data
from tests.faults import SHARD, documents, preparations, preparing, token_files
from tests.helpers import ROOT, flags, words


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A text that takes a second or so, documents of all lengths."""
    path = tmp_path_factory.mktemp("source") / "tales.txt"
    path.write_text("\n\n".join([*documents() * 20, words(SHARD)]))
    return path


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> tuple[dict[str, str], float]:
    """The files of a preparation that nothing happens to, and the seconds that it takes."""
    folder, started = tmp_path_factory.mktemp("undisturbed"), time.perf_counter()
    subprocess.run(preparing(source, folder), check=True, capture_output=True)
    return token_files(folder), time.perf_counter() - started


def test_a_split_larger_than_a_shard_comes_in_several_that_hold_all_of_it_in_order(
    source, tmp_path
):
    texts = documents()
    folder = tmp_path / "out"
    prepare(
        Options(folder=str(folder), tokenizer="byte", shard_tokens=SHARD),
        "test",
        lambda: whole(texts),
    )
    meta = json.loads((folder / "meta.json").read_text())
    shards = meta["splits"]["train"]["shards"]
    assert len(shards) > 5 and [shard["file"] for shard in shards] == sorted(
        path.name for path in folder.glob("*.bin")
    )
    assert {shard["tokens"] for shard in shards[:-1]} == {SHARD} and 0 < shards[-1][
        "tokens"
    ] <= SHARD
    ids = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in shards])
    tokenizer = ByteTokenizer()
    expected = np.concatenate(
        [piece for text in texts for piece in ([tokenizer.eot], tokenizer.encode(text))]
    )[1:]
    assert np.array_equal(ids, expected) and max(map(len, texts)) > SHARD
    for shard in shards:
        assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    joined = "\n".join(shard["sha256"] for shard in shards)
    assert meta["splits"]["train"]["sha256"] == hashlib.sha256(joined.encode()).hexdigest()


def whole(texts: list[str]) -> Corpus:
    return Corpus({"train": [part_of("train", lambda: texts)]})


def drawn() -> Corpus:
    return with_val({"train": [part_of("train", documents)]}, 0.1)


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe", "char", "byte"])
def test_processes_write_what_one_process_writes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.data.encoding, "BATCH", 5000)
    for num_proc in (1, 3):
        options = Options(
            tokenizer=tokenizer, vocab_size=300, num_proc=num_proc, shard_tokens=SHARD
        )
        prepare(replace(options, folder=str(tmp_path / str(num_proc))), "test", drawn)
    assert token_files(tmp_path / "1") == token_files(tmp_path / "3") != {}


def test_killed_at_any_instant_the_same_command_goes_on_and_ends_with_the_same_files(tmp_path):
    found = preparations(4, tmp_path, tmp_path, random.Random(1))
    assert found["which_stayed_untouched"] == found["behind_a_whole_file"] > 0
    assert found["with_the_undisturbed_files"] == found["preparations_finished"] > 0


def test_a_kill_behind_each_file_costs_no_file_and_the_journal_is_all_that_is_needed(
    tmp_path, monkeypatch
):
    """In one process: stop behind every journal entry in turn, and look at which files are written again."""
    corpus, stops = whole(documents()), 0
    options = Options(
        folder=str(tmp_path / "out"), tokenizer="byte", shard_tokens=SHARD, num_proc=1
    )
    prepare(replace(options, folder=str(tmp_path / "plain")), "test", lambda: corpus)
    monkeypatch.setattr(engine.data.encoding, "BATCH", 3000)
    write_json, seen = engine.data.writer.write_json, {}

    def stop_behind_journal(path, value):
        write_json(path, value)
        if path.name == "journal.json":
            raise KeyboardInterrupt

    while True:
        monkeypatch.setattr(engine.data.writer, "write_json", stop_behind_journal)
        try:
            prepare(options, "test", lambda: corpus)
            break
        except KeyboardInterrupt:
            stops += 1
        (work,) = (tmp_path / "out").glob(".preparing-*")
        shards = json.loads((work / "journal.json").read_text())["splits"]["train"]["shards"]
        times = {shard["file"]: (work / shard["file"]).stat().st_mtime_ns for shard in shards}
        assert seen.items() <= times.items()  # none of the whole ones is touched again
        seen = times
    assert stops > 5 and token_files(tmp_path / "out") == token_files(tmp_path / "plain")


def test_killed_while_files_move_into_place_nothing_half_is_read_and_the_next_call_ends_it(
    tmp_path, monkeypatch
):
    """An earlier data set of other ids lies there; behind every single move the reader refuses or reads it whole."""
    new, old = tmp_path / "new", tmp_path / "out"
    options = Options(tokenizer="byte", shard_tokens=SHARD, num_proc=1)

    def run(folder: Path, **more) -> None:
        prepare(replace(options, folder=str(folder), **more), "test", drawn)

    run(new)
    for stop in range(1, 100):
        run(old, tokenizer="char")
        moves, move = [], os.replace

        def stopping(source, target, stop=stop, moves=moves, move=move):
            moves.append(target)
            if len(moves) == stop:
                raise KeyboardInterrupt
            move(source, target)

        before = token_files(old)
        monkeypatch.setattr(os, "replace", stopping)
        try:
            run(old)
            break
        except KeyboardInterrupt:
            monkeypatch.undo()
        try:
            for split in ("train", "val"):
                TokenFile(old, split).check(257)
            whole_one = token_files(old)
            assert whole_one in (before, token_files(new))
        except UserError:
            pass
        run(old)
        assert token_files(old) == token_files(new) and not list(old.glob(".preparing*"))
    monkeypatch.undo()
    assert stop > 8 and token_files(old) == token_files(new)


def test_two_at_once_do_not_spoil_each_other(source, undisturbed, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(preparing(source, tmp_path / "out"), **pipes) for _ in range(2)]
    said = [process.communicate() for process in both]
    codes = [process.returncode for process in both]
    assert token_files(tmp_path / "out") == undisturbed[0] and 0 in codes
    for code, (out, err) in zip(codes, said, strict=True):
        refused = code == 2 and "another process prepares" in err and err.count("\n") == 1
        assert refused or (code == 0 and (out.count("\n") > 2 or "is ready" in out))


def test_the_processes_end_with_the_one_that_began_them(source, tmp_path):
    process = subprocess.Popen(
        preparing(source, tmp_path / "out", tokenizer="gpt2"), stdout=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux's /proc")
    found = []
    while (
        len(found) < 3 and process.poll() is None
    ):  # two that tokenise, one that Python starts beside them
        found = children.read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it had not come to its end by itself
    until = time.monotonic() + 20
    while any(alive(pid) for pid in found) and time.monotonic() < until:
        time.sleep(0.05)
    assert found and not any(alive(pid) for pid in found)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_is_ended_from_outside_is_said_in_one_line_and_leaves_nothing_half(
    tmp_path, monkeypatch
):
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc")
    ended = []

    def end_one() -> None:
        while not ended:
            for pid in children.read_text().split():
                if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(int(pid), signal.SIGKILL)
                    ended.append(pid)

    monkeypatch.setattr(engine.data.encoding, "BATCH", 5000)
    threading.Thread(target=end_one, daemon=True).start()
    with pytest.raises(UserError, match="ended from outside.*--num_proc"):
        prepare(
            Options(folder=str(tmp_path / "out"), num_proc=2), "test", lambda: whole(documents())
        )
    assert ended and not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", [1, 2, 3, 7, 12, 20])
def test_a_full_disk_is_one_line_and_with_room_again_the_same_call_goes_on(
    when, tmp_path, monkeypatch
):
    """The disk refuses at the n-th flush of a file or folder, whatever that is of."""
    options, flushes, fsync = (
        Options(tokenizer="byte", shard_tokens=SHARD, num_proc=1),
        [],
        os.fsync,
    )

    def full(fd: int) -> None:
        flushes.append(fd)
        if len(flushes) == when:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(engine.data.encoding, "BATCH", 3000)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((UserError, OSError), match="No space left"):
        prepare(replace(options, folder=str(tmp_path / "out")), "test", lambda: whole(documents()))
    assert not token_files(tmp_path / "out") and (
        when < 7 or list(tmp_path.glob("out/.preparing-*/train_*.bin"))
    )
    for folder in ("out", "plain"):
        prepare(replace(options, folder=str(tmp_path / folder)), "test", lambda: whole(documents()))
    assert token_files(tmp_path / "out") == token_files(tmp_path / "plain")


def test_a_source_that_breaks_off_half_way_loses_nothing(tmp_path, monkeypatch):
    texts, broken = documents(), [True]

    def until_it_breaks():
        for i, text in enumerate(texts):
            if broken[0] and i == 300:
                raise UserError("the network is gone")
            yield text

    monkeypatch.setattr(engine.data.encoding, "BATCH", 3000)
    options = Options(
        folder=str(tmp_path / "out"), tokenizer="byte", shard_tokens=SHARD, num_proc=1
    )
    corpus = Corpus({"train": [part_of("train", until_it_breaks)]})
    with pytest.raises(UserError, match="the network is gone; .* the same command goes on"):
        prepare(options, "test", lambda: corpus)
    (work,) = (tmp_path / "out").glob(".preparing-*")
    assert len(list(work.glob("train_*.bin"))) > 2
    with pytest.raises(UserError, match="is missing"):  # nothing of it can be read
        TokenFile(tmp_path / "out", "train")
    broken[0] = False
    prepare(options, "test", lambda: corpus)
    prepare(replace(options, folder=str(tmp_path / "plain")), "test", lambda: whole(texts))
    assert token_files(tmp_path / "out") == token_files(tmp_path / "plain")


def test_what_is_ready_is_not_made_again_until_options_or_files_change(source, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some words " * 100)
    asked = []

    def run(**more) -> str:
        options = Options(
            **{"source": str(texts), "tokenizer": "byte", "folder": str(tmp_path / "out")} | more
        )
        prepare(options, "test", lambda: asked.append(1) or whole([(texts / "a.txt").read_text()]))
        return capsys.readouterr().out

    assert (
        "1 documents" in run()
        and "is ready" in run()
        and "is ready" in run(num_proc=3)
        and len(asked) == 1
    )
    assert "is ready" not in run(shard_tokens=500) and len(asked) == 2
    (texts / "a.txt").write_text("other words " * 100)
    assert "is ready" not in run(shard_tokens=500) and len(asked) == 3
    (tmp_path / "out" / "train_000001.bin").unlink()
    assert "is ready" not in run(shard_tokens=500) and len(asked) == 4
    assert (
        "is ready" not in run() and len(list((tmp_path / "out").glob("*.bin"))) == 1
    )  # of shards nothing is left


def test_in_any_row_of_documents_every_split_has_its_share():
    fractions = {"val": 0.05, "test": 0.1}
    drawn = [draw(i, fractions) for i in range(100_000)]
    for begin in range(0, 98_000, 9973):
        row = drawn[begin : begin + 2000]
        assert abs(row.count("val") - 100) <= 3 and abs(row.count("test") - 200) <= 3
    assert {"val", "test"} <= set(drawn[:20])
    assert [draw(i, {}) for i in range(5)] == ["train"] * 5
    assert draw(10**12, {"val": 0.9999999}) == "val"


def test_every_document_goes_whole_to_one_split_and_an_official_split_stays_unless_val_is_drawn(
    tmp_path,
):
    texts = {
        split: [f"{split} {i} " + words(50, seed=i) for i in range(100)]
        for split in ("train", "val", "test")
    }
    parts = {split: [part_of(split, lambda t=t: t)] for split, t in texts.items()}

    def splits_of(fraction: float) -> dict[str, list[str]]:
        found = {}
        for split, text, first, _ in walk(with_val(parts, fraction), engine.data.writer.Position()):
            assert first
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
        options = Options(folder=str(first), tokenizer=kind, vocab_size=300)
        prepare(options, "test", lambda: whole(texts))
        prepare(Options(folder=str(second), tokenizer=str(first)), "test", lambda: whole(texts[:9]))
        metas = [json.loads((folder / "meta.json").read_text()) for folder in (first, second)]
        assert (
            metas[0]["tokenizer"] == metas[1]["tokenizer"]
            and metas[0]["vocab_size"] == metas[1]["vocab_size"]
        )
        ids = np.fromfile(second / "train.bin", "<u2")
        assert np.array_equal(ids, np.fromfile(first / "train.bin", "<u2")[: len(ids)])
        assert load_tokenizer(second).decode(ids).startswith(texts[0])


def test_end_of_text_inside_a_text_stays_text_in_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.data.encoding, "BATCH", 50)
    texts = [f"a <|endoftext|> in document {i}" for i in range(20)]
    for kind in ("gpt2", "byte"):
        folder = tmp_path / kind
        prepare(
            Options(folder=str(folder), tokenizer=kind, num_proc=2), "test", lambda: whole(texts)
        )
        tokenizer, ids = load_tokenizer(folder), np.fromfile(folder / "train.bin", "<u2")
        assert (ids == tokenizer.eot).sum() == 19
        assert tokenizer.decode(ids) == "<|endoftext|>".join(texts)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_memory_does_not_grow_with_the_text(num_proc, tmp_path):
    """A process of its own prepares 7 and 106 MB: its memory, and that of the largest of those that it begins."""
    code = """
import resource, sys
from engine.data.corpus import Options, part_of, prepare
from engine.data.splits import Corpus
text = "so many words in a row, and none of them new " * 4000
texts = lambda: (text for _ in range(int(sys.argv[1])))
options = Options(folder=sys.argv[2], tokenizer="byte", num_proc=int(sys.argv[3]), shard_tokens=10**7)
prepare(options, "test", lambda: Corpus({"train": [part_of("train", texts)]}))
print(*(resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""
    peaks = []
    for n in (40, 600):
        argv = [sys.executable, "-c", code, str(n), str(tmp_path / str(n)), str(num_proc)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append([int(peak) for peak in done.stdout.split()[-2:]])
    assert all(large < small + 15 for small, large in zip(*peaks, strict=True)), peaks  # MB
    assert sum(path.stat().st_size for path in (tmp_path / "600").glob("*.bin")) > 200e6


def test_characters_of_every_split_are_in_the_table(tmp_path):
    parts = {"train": ["ab"], "val": ["xy"]}
    corpus = Corpus({split: [part_of(split, lambda t=t: t)] for split, t in parts.items()})
    prepare(Options(folder=str(tmp_path), tokenizer="char"), "test", lambda: corpus)
    tokenizer = load_tokenizer(tmp_path)
    assert (
        isinstance(tokenizer, CharTokenizer)
        and tokenizer.chars == list("abxy")
        and tokenizer.eot is None
    )


def test_ready_means_made_of_this_and_whole(tmp_path):
    prepare(Options(folder=str(tmp_path), tokenizer="gpt2"), "test", lambda: whole(["a b c"]))
    key = json.loads((tmp_path / "meta.json").read_text())["made_from"]
    assert is_ready(tmp_path, key) and not is_ready(tmp_path, "another")
    assert GPT2Tokenizer().decode(np.fromfile(tmp_path / "train.bin", "<u2")) == "a b c"
    (tmp_path / "train.bin").write_bytes(b"ab")
    assert not is_ready(tmp_path, key)


def test_a_disk_that_is_full_while_files_move_into_place_costs_nothing_either(
    tmp_path, monkeypatch
):
    options, write_json = (
        Options(folder=str(tmp_path / "out"), tokenizer="byte", num_proc=1),
        engine.data.writer.write_json,
    )
    prepare(options, "test", lambda: whole(["AAAA"]))
    before = token_files(tmp_path / "out")

    def full(path, value):
        if path == tmp_path / "out" / "meta.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr(engine.data.writer, "write_json", full)
    with pytest.raises(UserError, match="No space left .* the same command goes on"):
        prepare(replace(options, shard_tokens=9), "test", lambda: whole(["BBBB"]))
    assert (
        token_files(tmp_path / "out") == before
        and TokenFile(tmp_path / "out", "train").check(257) is None
    )
    monkeypatch.undo()
    asked = []
    prepare(replace(options, shard_tokens=9), "test", lambda: asked.append(1))
    assert not asked and bytes(TokenFile(tmp_path / "out", "train").ids.astype(np.uint8)) == b"BBBB"


def test_token_files_of_another_program_are_not_written_over(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"abcd")
    with pytest.raises(UserError, match=r"holds train\.bin of another program; .*--folder"):
        prepare(Options(folder=str(tmp_path), tokenizer="byte"), "test", lambda: whole(["new"]))
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def stopped_behind_a_file(options: Options, corpus: Corpus, monkeypatch) -> None:
    write_json = engine.data.writer.write_json

    def stop(path, value):
        write_json(path, value)
        if path.name == "journal.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.data.encoding, "BATCH", 3000)
        patch.setattr(engine.data.writer, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(options, "test", lambda: corpus)


@pytest.mark.parametrize("what", ["source", "damaged", "nothing", "gone"])
def test_work_that_cannot_be_gone_on_with_is_begun_anew_and_said(
    what, tmp_path, monkeypatch, capsys
):
    options = Options(
        folder=str(tmp_path / "out"), tokenizer="byte", shard_tokens=SHARD, num_proc=1
    )
    stopped_behind_a_file(options, whole(documents()), monkeypatch)
    (journal,) = tmp_path.glob("out/.preparing-*/journal.json")
    texts, corpus = documents(), whole(documents())
    if what == "source":  # the same name and options, as of a hub's data set, but other text
        texts = [text.upper() for text in texts]
        part = part_of("train", lambda: texts)
        corpus = Corpus({"train": [replace(part, identity="another revision")]})
    elif what == "gone":
        next(journal.parent.glob("train_*.bin")).unlink()
    else:
        journal.write_text("{" if what == "damaged" else "{}")
    prepare(options, "test", lambda: corpus)
    assert "beginning anew" in capsys.readouterr().err
    prepare(replace(options, folder=str(tmp_path / "plain")), "test", lambda: whole(texts))
    assert token_files(tmp_path / "out") == token_files(tmp_path / "plain")


def test_unfinished_work_of_other_options_is_left_and_named(tmp_path, monkeypatch, capsys):
    options = Options(
        folder=str(tmp_path / "out"), tokenizer="byte", shard_tokens=SHARD, num_proc=1
    )
    stopped_behind_a_file(options, whole(documents()), monkeypatch)
    (work,) = tmp_path.glob("out/.preparing-*")
    prepare(replace(options, tokenizer="char"), "test", lambda: whole(["abc"]))
    assert (
        work / "journal.json"
    ).is_file() and f"{work} is unfinished work" in capsys.readouterr().out


def test_a_change_of_a_file_is_seen_wherever_the_source_finds_it(tmp_path, capsys):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    inner, linked = tmp_path / "texts" / "deep" / "a.txt", tmp_path / "elsewhere" / "b.txt"
    for source, path in (
        (f"{tmp_path}/texts/**/a.txt", inner),
        (f"{tmp_path}/texts", linked),
        (f"{tmp_path}/", linked),
    ):
        inner.write_text("some words")
        linked.write_text("more words")
        options = Options(source=source, folder=str(tmp_path / "out"), tokenizer="byte")
        prepare(options, "test", lambda: whole(["x"]))
        prepare(options, "test", lambda: whole(["x"]))
        assert "is ready" in capsys.readouterr().out
        (tmp_path / "texts" / "run.log").write_text("no text")
        prepare(options, "test", lambda: whole(["x"]))
        assert "is ready" in capsys.readouterr().out
        path.write_text("other words, and more of them")
        prepare(options, "test", lambda: whole(["x"]))
        assert "is ready" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "meta",
    ["[1, 2]", '{"splits": "x"}', "{", '{"made_from": 3, "splits": {"train": {"shards": {}}}}'],
)
def test_a_damaged_meta_json_is_prepared_anew(meta, tmp_path):
    options = Options(folder=str(tmp_path), tokenizer="byte")
    prepare(options, "test", lambda: whole(["x y z"]))
    good = (tmp_path / "meta.json").read_text()
    (tmp_path / "meta.json").write_text(meta)
    prepare(options, "test", lambda: whole(["x y z"]))
    assert (tmp_path / "meta.json").read_text() == good


def test_the_tokenizer_of_a_run_on_data_without_meta_can_be_used_again(tmp_path):
    GPT2Tokenizer().save(tmp_path)
    options = Options(folder=str(tmp_path / "out"), tokenizer=str(tmp_path))
    prepare(options, "test", lambda: whole(["the old sea"]))
    assert (
        load_tokenizer(tmp_path / "out").decode(TokenFile(tmp_path / "out", "train").ids)
        == "the old sea"
    )


def test_files_that_are_gone_from_finished_work_are_said_and_made_again(tmp_path, monkeypatch):
    options = Options(
        folder=str(tmp_path / "out"), tokenizer="byte", shard_tokens=SHARD, num_proc=1
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            "engine.data.corpus.install", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(options, "test", lambda: whole(documents()))
    next(tmp_path.glob("out/.preparing-*/train_000001.bin")).unlink()
    with pytest.raises(UserError, match="are gone; .* the same command"):
        prepare(options, "test", lambda: whole(documents()))
    for folder in ("out", "plain"):
        prepare(replace(options, folder=str(tmp_path / folder)), "test", lambda: whole(documents()))
    assert token_files(tmp_path / "out") == token_files(tmp_path / "plain")


def test_on_a_terminal_a_bar_shows_how_far_it_is_how_fast_and_how_long_it_will_take(
    source, tmp_path
):
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    ours, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 25, 120, 0, 0))
    process = subprocess.Popen(
        preparing(source, tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=its_end
    )
    os.close(its_end)
    said = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while piece := os.read(ours, 4096):
            said += piece
    assert process.wait() == 0
    assert re.search(
        rb"[1-9][0-9]?%.*[0-9.]+M/[0-9.]+M \[[0-9:]+<[0-9:]+, .*[0-9.]+ M tokens/s\]", said
    ), said


def test_all_scripts_take_the_common_options_and_do_what_they_say(tmp_path, monkeypatch):
    common = {"source", "num_proc", "shard_tokens", "tokenizer", "val_fraction", "errors", "folder"}
    scripts = {
        path.parent.name: runpy.run_path(str(path)) for path in ROOT.glob("data/*/prepare.py")
    }
    assert len(scripts) == 7
    assert all(
        common <= {field.name for field in fields(script["Options"])} for script in scripts.values()
    )
    sources = {
        "shakespeare": "tinyshakespeare/input.txt",
        "shakespeare_char": "tinyshakespeare/input.txt",
    }
    sources |= {"wikitext": "wikitext2"} | dict.fromkeys(
        ("openwebtext", "fineweb_edu", "text"), "wikitext2"
    )
    for name, source in sources.items():
        folder = tmp_path / name
        options = {
            "source": shared_data(source),
            "tokenizer": "byte",
            "val_fraction": 0.25,
            "folder": folder,
        }
        options |= {"shard_tokens": 300_000, "num_proc": 2}
        argv = [str(ROOT / "data" / name / "prepare.py"), *flags(**options)]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0], run_name="__main__")
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["tokenizer"] == {"kind": "byte"} and {"train", "val"} <= meta["splits"].keys()
        assert meta["splits"]["train"]["shards"][0]["tokens"] == 300_000
        sizes = {split: about["tokens"] for split, about in meta["splits"].items()}
        assert (
            name in ("openwebtext", "fineweb_edu")
            or 0.2 < sizes["val"] / (sizes["train"] + sizes["val"]) < 0.3
        )
