"""engine/data/sources.py: whatever the files are, all their text is read, in bounded memory."""

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.data import sources
from engine.data.sources import Source, find, hub, split_documents
from engine.data.tokenizer import BPETokenizer, GPT2Tokenizer
from tests.helpers import refusal

ODD = [
    *filter(str.isspace, map(chr, range(0x110000))),
    *"\x00\u180e\u200b\u2060\ufeff\u00ad",
    *["'s", " 's", "é", "e\u0301", "東京", "🏳️‍🌈", "12", "...", "<|endoftext|>"],
    *[" ", "\n", "word", "x"] * 10,
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, chunks and rows so small that every border is met."""
    monkeypatch.setattr(sources, "PIECE", 5)
    monkeypatch.setattr(sources, "CHUNK", 16)
    monkeypatch.setattr(sources, "ROWS", 3)


def documents_of(found: list[Source]) -> list[str]:
    """The pieces of all sources, joined to documents."""
    documents = []
    for source in found:
        for text, is_start in source.pieces():
            assert text
            if is_start:
                documents.append("")
            documents[-1] += text
    return documents


def pieces_of(*documents: str) -> list[tuple[str, bool]]:
    return list(split_documents((text, True) for text in documents))


def write(path: Path, text: str | bytes) -> str:
    """Write a file, compressed if its name says so; returns its path."""
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return str(path)


def table(path: Path, columns: dict) -> str:
    parquet.write_table(pa.table(columns), path)
    return str(path)


def lines(texts: list) -> str:
    records = [json.dumps({"id": 1, "text": text}) for text in texts]
    return "\n".join(records) + "\n"


def refused(read) -> str:
    """The one line that says why something cannot be read."""
    return refusal(lambda: documents_of(read()))


def file_refused(path: str, **options) -> str:
    return refused(lambda: find(path, **options))


def random_text(parts: list[str], seed: int, n: int) -> str:
    return "".join(random.Random(seed).choices(parts, k=n))


ODD_TEXTS = [random_text(ODD, seed, 300) for seed in range(30)]


def test_cutting_a_text_into_pieces_changes_no_token(small):
    bpe = BPETokenizer.train([*ODD_TEXTS, "a word or two. " * 99], 600)
    for text in ODD_TEXTS:
        pieces = [piece for piece, _ in pieces_of(text)]
        assert "".join(pieces) == text and len(pieces) > 5
        for tokenizer in (GPT2Tokenizer(), bpe):
            ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
            assert np.array_equal(ids, tokenizer.encode(text))


def test_documents_of_whitespace_alone_are_left_out_and_nothing_else(small, tmp_path):
    texts = ["", "a", " \n\t", "b" * 100, " " * 100 + "c", "  ", "d e f g h i j\n"]
    source = write(tmp_path / "all.jsonl", lines([*texts, None]))
    assert documents_of(find(source)) == [texts[1], *texts[3:5], texts[6]]
    assert documents_of(find(write(tmp_path / "none.txt", ""))) == []


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_separator_divides_texts_of_every_kind_of_line_end(line_end, tmp_path, capsys):
    path = write(tmp_path / "a.txt", line_end.join(["one", "", "two", "three"]))
    assert documents_of(find(path, separator="\n\n")) == ["one", "two\nthree"]
    assert capsys.readouterr().err == ""
    documents_of(find(path, separator="|"))
    assert "'|'" in capsys.readouterr().err
    documents_of(find(write(tmp_path / "a.txt", "a<|endoftext|>b")))
    assert "--separator" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("Le café est fermé, à côté", "cp1252"),
        ("数据在哪里 are the data", "gb18030"),
        ("plain", "utf-16-le"),
    ],
)
def test_another_encoding_is_named_in_the_error_and_read_on_request(text, encoding, tmp_path):
    path = write(tmp_path / "a.txt", text.encode(encoding))
    assert f"likely {encoding}" in (message := file_refused(path)) or f"={encoding}" in message
    assert documents_of(find(path, encoding=encoding)) == [text]


def test_fields_in_fields_and_pairs_of_fields_are_text(tmp_path):
    rows = [{"data": {"text": "one"}, "prompt": "2 + 2 =", "completion": " 4"}]
    for name in ("a.json", "a.jsonl"):
        path = write(tmp_path / name, json.dumps(rows if name == "a.json" else rows[0]))
        assert documents_of(find(path, field="data.text")) == ["one"]
        assert documents_of(find(path, field="prompt,completion")) == ["2 + 2 = 4"]
    path = write(tmp_path / "a.tsv", "id\tbody\n1\ta, b\n")
    assert documents_of(find(path, field="body")) == ["a, b"]


@pytest.mark.parametrize("separator", ["|", "\n\n", "aab", "東\n京"])
def test_separators_divide_as_str_split_does_wherever_chunks_end(separator, small, tmp_path):
    for seed in range(40):
        text = random_text([separator, *separator, "a", "x y", " ", "東", "\r\n"], seed, 60)
        source = write(tmp_path / "a.txt", text)
        documents = text.replace("\r\n", "\n").split(separator)
        expected = [document for document in documents if document.strip()]
        assert documents_of(find(source, separator=separator)) == expected


def test_a_byte_order_mark_names_the_encoding_and_is_dropped_at_the_start_of_a_file_only(
    small, tmp_path
):
    write(tmp_path / "a.txt", "\ufeff\ufeffone \ufefftwo")
    write(tmp_path / "b.jsonl", "\ufeff" + lines(["\ufeffthree"]))
    write(tmp_path / "c.txt", "naïve 東京".encode("utf-16"))
    expected = ["\ufeffone \ufefftwo", "\ufeffthree", "naïve 東京"]
    assert documents_of(find(str(tmp_path))) == expected


def test_each_line_of_json_is_a_document(small, tmp_path):
    text = lines(ODD_TEXTS).replace("\n", "\r\n\n") + '{"text": "last 😀"}'
    source = write(tmp_path / "a.jsonl.gz", text)
    assert documents_of(find(source)) == [*ODD_TEXTS, "last 😀"]


def test_each_row_of_a_table_is_a_document(small, tmp_path):
    source = table(tmp_path / "a.parquet", {"body": ODD_TEXTS, "id": range(30)})
    assert documents_of(find(source, field="body")) == ODD_TEXTS
    source = write(tmp_path / "a.csv", 'id,body\n1,"a, b\nc"\n2,NA\n3,12\n')
    assert documents_of(find(source, field="body")) == ["a, b\nc", "NA", "12"]


def test_files_folders_and_globs_are_read_in_order_each_once(tmp_path, monkeypatch):
    read = ("b.txt", "a.md", "sub/c.text", "sub/deep/d.TXT.gz", "e.raw")
    for name in (*read, ".hidden.txt", ".git/f.txt", "g.py", "h.yaml"):
        write(tmp_path / "in" / name, Path(name).name)
    os.symlink(tmp_path / "in" / "sub", tmp_path / "in" / "sub" / "deep" / "circle")
    os.symlink(tmp_path / "in" / "b.txt", tmp_path / "in" / "link.txt")
    monkeypatch.chdir(tmp_path)
    for source, expected in (
        ("in", ["a.md", "b.txt", "e.raw", "c.text", "d.TXT.gz"]),
        ("in/e.raw,in/*.txt,in/sub/,./in/e.raw", ["e.raw", "b.txt", "c.text", "d.TXT.gz"]),
        ("in/**/*.t*xt", ["b.txt", "c.text"]),
    ):
        assert documents_of(find(source)) == expected


@pytest.mark.parametrize(
    "name, data, replaced",
    [
        ("a.txt", "naïve 東京 x".encode() + b"caf\xe9", "naïve 東京 xcaf\ufffd"),
        ("a.txt", b"sixteen bytes it\xf0\x9f\x98", "sixteen bytes it\ufffd"),
        ("a.jsonl.gz", b'{"text": "caf\xe9"}', "caf\ufffd"),
        ("a.jsonl", b'{"text": "x\\ud800y"}', "x\ufffdy"),  # half a surrogate pair
    ],
)
def test_text_that_is_not_utf8_is_refused_or_replaced(name, data, replaced, small, tmp_path):
    source = write(tmp_path / name, data)
    assert "--errors=replace" in file_refused(source)
    assert documents_of(find(source, errors="replace")) == [replaced]


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"text": "x"', "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"body": "x", "n": 1}', "body, n; give --field"),
        ('{"text": 5}', "int"),
    ],
)
def test_a_bad_line_of_json_is_refused_by_its_number_or_left_out(line, expected, tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", lines(["good"]) + "\n" + line)
    message = file_refused(source)
    assert expected in message and "a.jsonl: record 3" in message and "--errors=ignore" in message
    assert documents_of(find(source, errors="ignore")) == ["good"]
    assert " 1 record" in capsys.readouterr().err


WHOLE = gzip.compress(b"a long text", mtime=0)  # two workers collect the same names


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.txt", b"PK\x03\x04\x14\x00"),  # zip
        ("a.parquet", b"PAR1" * 10),
        ("a.txt.gz", WHOLE[:-5]),
        ("a.txt.gz", WHOLE + WHOLE[:15]),
        ("a.txt.gz", b"plain text"),
    ],
)
def test_a_file_that_is_cut_short_or_something_else_than_its_name_says_is_refused(
    name, data, tmp_path
):
    path = tmp_path / name
    path.write_bytes(data)
    assert name in file_refused(str(path))


def test_a_source_that_names_no_text_is_refused(tmp_path):
    write(tmp_path / "empty" / ".hidden.txt", "x")
    write(tmp_path / "a.yaml", "{}")
    os.mkfifo(tmp_path / "fifo.txt")
    for name in ("none.txt", "*.md", "empty", "fifo.txt", "a.yaml"):
        assert name in file_refused(f"{tmp_path}/{name}")


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """A data set such as the Hub has, in a folder."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    for name in ("train-0", "train-1", "validation-0"):
        texts = [f"{name} {j}" for j in range(100)] + [None, " "]
        table(tmp_path / "set" / f"{name}.parquet", {"text": texts, "id": range(102)})
    return tmp_path / "set"


def test_a_hub_data_set_gives_a_source_per_file_in_order(hub_folder):
    splits = hub(str(hub_folder))
    assert list(splits) == ["train", "validation"]
    first, second = splits["train"]
    assert first.name != second.name
    for i, source in enumerate([first, second, first]):  # it can be read again
        assert documents_of([source]) == [f"train-{i % 2} {j}" for j in range(100)]


def test_what_goes_wrong_with_a_hub_data_set_is_one_line(hub_folder, monkeypatch, capfd):
    def fail(*_):
        raise ConnectionError("Server Disconnected")

    name = str(hub_folder)
    assert "text, id" in refused(lambda: hub(name, field="body")["train"])
    with monkeypatch.context() as patch:
        patch.setattr("datasets.IterableDataset.__iter__", fail)
        assert "Server Disconnected" in refused(lambda: hub(name)["train"])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "ConnectionError" in refused(lambda: hub("someone/something"))
    assert capfd.readouterr() == ("", "")


def test_a_text_without_blanks_is_read_in_bounded_pieces(tmp_path):
    path = write(tmp_path / "a.txt", "ACGT" * 750_000)
    pieces = [text for source in find(path) for text, _ in source.pieces()]
    assert "".join(pieces) == "ACGT" * 750_000 and max(map(len, pieces)) < 2 * sources.PIECE
