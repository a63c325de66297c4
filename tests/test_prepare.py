"""Preparing data: in threads, in bounded memory, interrupted at any point, twice at once."""

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections import Counter

import numpy as np
import pytest

import engine.data.sources
import engine.data.writer
from engine.base.errors import UserError
from engine.base.files import read_json
from engine.data.corpus import Options, prepare
from engine.data.sources import source_of
from engine.data.splits import Corpus, draw, in_memory, with_val
from engine.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from engine.data.tokens import TokenFile
from tests.faults import SHARD, documents, token_files
from tests.helpers import flags, output_of, refusal, refused, run_script, words, write_dataset


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches, so that files become full and the journal is written in between."""
    monkeypatch.setattr(engine.data.writer, "BATCH", 3000)


def train_only(texts: list[str]) -> Corpus:
    return Corpus(in_memory({"train": texts}))


def with_a_tenth_for_val() -> Corpus:
    return with_val(in_memory({"train": documents()}), 0.1)


def prepare_in(folder, corpus=with_a_tenth_for_val, **options) -> dict[str, str]:
    """Prepare by bytes, in several files, unless the options differ; the hash of each file."""
    options = {"tokenizer": "byte", "shard_tokens": SHARD, "num_proc": 1} | options
    prepare(Options(folder=str(folder), **options), "test", corpus)
    return token_files(folder)


def test_documents_in_pieces_are_written_in_order_to_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.data.sources, "PIECE", 1000)
    texts = documents()
    prepare_in(tmp_path, lambda: train_only(texts))
    about = read_json(tmp_path / "meta.json")["splits"]["train"]
    expected = []
    for text in texts:
        expected += [ByteTokenizer.eot, *text.encode()]
    found = []
    for shard in about["shards"]:
        data = (tmp_path / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert len(data) == 2 * shard["tokens"]
        found += np.frombuffer(data, "<u2").tolist()
    assert found == expected[1:]  # one end-of-text between documents, none between pieces
    assert {shard["tokens"] for shard in about["shards"][:-1]} == {SHARD}


def test_three_threads_write_what_one_writes(tmp_path, small_batches):
    options = {"tokenizer": "bpe", "vocab_size": 300}
    one = prepare_in(tmp_path / "1", **options)
    assert one and one == prepare_in(tmp_path / "3", num_proc=3, **options)


def stop_after_journal(patch: pytest.MonkeyPatch) -> None:
    """Interrupt a preparation after each entry in its journal."""
    write_json = engine.data.writer.write_json

    def stopping(path, value):
        write_json(path, value)
        if path.name == "journal.json" and "meta" not in value:
            raise KeyboardInterrupt

    patch.setattr(engine.data.writer, "write_json", stopping)


def test_an_interruption_after_each_file_costs_no_file(tmp_path, monkeypatch, small_batches):
    texts, out = documents(), tmp_path / "out"
    expected = prepare_in(tmp_path / "undisturbed", lambda: train_only(texts))
    stop_after_journal(monkeypatch)
    n_stops, written = 0, {}
    while not (out / "meta.json").is_file():
        try:
            prepare_in(out, lambda: train_only(texts))
        except KeyboardInterrupt:
            n_stops += 1
            (journal,) = out.glob(".preparing-*/journal.json")
            shards = read_json(journal)["splits"]["train"]["shards"]
            now = {}
            for shard in shards:
                now[shard["file"]] = (journal.parent / shard["file"]).stat().st_mtime_ns
            assert written.items() <= now.items()  # no full file is written again
            written = now
    assert n_stops > 5 and token_files(out) == expected


def test_work_on_another_text_is_not_continued(tmp_path, monkeypatch, small_batches):
    """Name and options are the same, as for another revision of a data set of the Hub."""
    with monkeypatch.context() as patch:
        stop_after_journal(patch)
        with pytest.raises(KeyboardInterrupt):
            prepare_in(tmp_path / "out")
    source = source_of("another revision", lambda: documents(20))
    found = prepare_in(tmp_path / "out", lambda: Corpus({"train": [source]}))
    assert found == prepare_in(tmp_path / "undisturbed", lambda: train_only(documents(20)))


def test_an_interruption_while_files_are_moved_leaves_the_old_data_or_the_new_or_a_refusal(
    tmp_path, monkeypatch
):
    """Over an earlier data set, interrupted at the first move, then at the second, and so on."""
    replace = os.replace
    out = tmp_path / "out"
    texts = documents(20)

    def prepare_tokens(folder, shard_tokens: int) -> dict[str, str]:
        return prepare_in(folder, lambda: train_only(texts), shard_tokens=shard_tokens)

    after = prepare_tokens(tmp_path / "new", 2000)
    for stop in range(1, 100):
        before = prepare_tokens(out, 1500)
        n_moves = 0

        def stopping(source, target, stop=stop):
            nonlocal n_moves
            n_moves += 1
            if n_moves == stop:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping)
            try:
                assert prepare_tokens(out, 2000) == after
                break
            except KeyboardInterrupt:
                pass
        with contextlib.suppress(UserError):
            TokenFile(out, "train")
            assert token_files(out) in (before, after)
        assert prepare_tokens(out, 2000) == after
        assert not list(out.glob(".preparing*"))
    assert stop > 8


def test_a_second_preparation_of_a_folder_at_the_same_time_is_refused(tmp_path):
    def corpus() -> Corpus:
        assert "--folder" in refusal(prepare_in, tmp_path / "out")
        return with_a_tenth_for_val()

    assert prepare_in(tmp_path / "out", corpus) == prepare_in(tmp_path / "undisturbed")


def test_a_data_set_is_prepared_again_only_if_options_or_files_change(tmp_path):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    (texts / "a.txt").write_text("some words " * 100)
    asked = []

    def corpus() -> Corpus:
        asked.append(1)
        return train_only([(texts / "a.txt").read_text()])

    def is_prepared(**options) -> bool:
        asked.clear()
        prepare_in(out, corpus, source=str(texts), **options)
        return bool(asked)

    assert is_prepared() and not is_prepared(num_proc=3)
    small = {"shard_tokens": 500}
    assert is_prepared(**small)
    (texts / "a.txt").write_text("other words " * 100)
    assert is_prepared(**small)
    (out / "train_000001.bin").unlink()
    assert is_prepared(**small)
    os.truncate(out / "train_000001.bin", 100)
    os.truncate(out / "train_000001.bin", 1000)  # the right size again
    assert is_prepared(**small)
    (out / "meta.json").write_text("{")
    assert is_prepared(**small) and not is_prepared(**small)
    assert is_prepared() and len(list(out.glob("*.bin"))) == 1  # the shards are gone


def test_of_any_documents_in_a_row_every_split_has_its_share():
    fractions = {"val": 0.05, "test": 0.1}
    splits = [draw(i, fractions) for i in range(100_000)]
    for begin in range(0, 98_000, 9973):
        counts = Counter(splits[begin : begin + 2000])
        assert abs(counts["val"] - 100) <= 3 and abs(counts["test"] - 200) <= 3
    assert {"val", "test"} <= set(splits[:20])


def test_the_tokenizer_of_a_run_or_a_data_set_can_be_used_again(tmp_path):
    first, run = tmp_path / "first", tmp_path / "run"
    prepare_in(first, tokenizer="bpe", vocab_size=300)
    tokenizer = load_tokenizer(first)
    run.mkdir()
    tokenizer.save(run)  # a run on data without a meta file
    for folder in (first, run):
        second = tmp_path / f"as_{folder.name}"
        prepare_in(second, lambda: train_only(["the old sea"]), tokenizer=str(folder))
        ids = TokenFile(second, "train")[:].tolist()
        assert ids == tokenizer.encode("the old sea").tolist()


def test_data_without_a_val_split_are_said_to_be_of_no_use_to_train_py(tmp_path, capsys):
    prepare_in(tmp_path, lambda: train_only(["a"]))
    assert "--val_fraction" in capsys.readouterr().err


def test_end_of_text_inside_a_text_stays_text(tmp_path):
    texts = [f"a <|endoftext|> in document {i}" for i in range(20)]
    prepare_in(tmp_path, lambda: train_only(texts), tokenizer="gpt2")
    tokenizer, ids = load_tokenizer(tmp_path), TokenFile(tmp_path, "train")[:]
    assert (ids == tokenizer.eot).sum() == 19
    assert tokenizer.decode(ids) == "<|endoftext|>".join(texts)


def test_token_files_of_another_program_are_not_overwritten(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"abcd")
    message = refusal(prepare_in, tmp_path)
    assert "train.bin" in message and "--folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def test_in_a_read_only_repository_another_folder_is_advised(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert "--folder" in refusal(prepare_in, tmp_path)


def test_while_a_bpe_is_trained_ctrl_c_ends_the_process(tmp_path, monkeypatch):
    train, before, during = BPETokenizer.train, signal.getsignal(signal.SIGINT), []

    def spy(*arguments):
        during.append(signal.getsignal(signal.SIGINT))
        return train(*arguments)

    monkeypatch.setattr(BPETokenizer, "train", spy)
    prepare_in(tmp_path, tokenizer="bpe", vocab_size=300)
    assert during == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) == before


MEMORY = """
import resource, sys
from engine.data.corpus import Options, prepare
from engine.data.sources import find
from engine.data.splits import Corpus
for path in sys.argv[1:]:
    options = Options(folder=f"{path}.out", tokenizer="byte", num_proc=2, shard_tokens=10**7)
    prepare(options, "test", lambda: Corpus({"train": find(path)}))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """A separate process prepares one document of 7 MB, then one of 100 MB."""
    paths = []
    for n in (40, 600):
        paths.append(str(tmp_path / f"{n}.txt"))
        with open(paths[-1], "w") as file:
            file.write("so many words in a row, and none of them new " * 4000 * n)
    lines = output_of(sys.executable, "-c", MEMORY, *paths).splitlines()
    small, large = (int(line) for line in lines if line.isdigit())
    assert large < small + 30  # MB


@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu"])
def test_scripts_of_the_hub_prepare_local_files(name, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(40)))
    options = {"source": source, "folder": tmp_path / "out", "tokenizer": "byte"}
    run_script(f"data/{name}/prepare.py", *flags(**options, val_fraction=0.25))
    splits = read_json(tmp_path / "out/meta.json")["splits"]
    n_train, n_val = (splits[split]["documents"] for split in ("train", "val"))
    assert n_train + n_val == 40 and abs(n_val - 10) <= 1


def test_foreign_texts_are_source_code_random_and_shuffled_ids_and_files(tmp_path):
    (tmp_path / "play.txt").write_text("the storm and the sea " * 50)
    write_dataset(tmp_path / "data", {"test": [words(300)]}, ByteTokenizer())
    argv = flags(
        dataset=tmp_path / "data",
        source=tmp_path / "play.txt",
        folder=tmp_path / "foreign",
        tokens=500,
    )
    run_script("data/foreign/prepare.py", *argv)
    ids = {}
    for name in ("python", "uniform", "shuffled", "play"):
        ids[name] = TokenFile(tmp_path / "foreign" / name, "test")[:].tolist()
        assert len(ids[name]) == 500
    own = TokenFile(tmp_path / "data", "test")[:].tolist()
    assert ids["shuffled"] != own[:500] and sorted(ids["shuffled"]) == sorted(own[:500])
    assert len(set(ids["uniform"])) > 200
    assert ByteTokenizer().decode(ids["play"]).startswith("the storm and the sea the")
    assert "Record of phased-in" in ByteTokenizer().decode(ids["python"])  # __future__.py
    (tmp_path / "play.txt").rename(tmp_path / "python.txt")
    argv[1] = argv[1].replace("play", "python")
    assert "rename the file" in refused("data/foreign/prepare.py", argv, tmp_path)
