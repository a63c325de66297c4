"""engine/data/sources.py: whatever the files are, all their text is read, in bounded memory."""

import gzip
import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.base.errors import UserError
from engine.data import sources
from engine.data.sources import Source, find, hub, split_documents
from engine.data.tokenizer import BPETokenizer, GPT2Tokenizer

CHARACTERS = list(map(chr, range(0x110000)))
ODD = [
    *filter(str.isspace, CHARACTERS),
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


def table(path: Path, columns: dict, **options) -> str:
    parquet.write_table(pa.table(columns), path, **options)
    return str(path)


def lines(texts: list) -> str:
    records = [json.dumps({"id": 1, "text": text}) for text in texts]
    return "\n".join(records) + "\n"


def refused(read) -> str:
    """The one line that says why something cannot be read."""
    with pytest.raises(UserError) as error:
        documents_of(read())
    message = str(error.value)
    assert message.isprintable() and len(message) < 600
    return message


def file_refused(path: str, **options) -> str:
    return refused(lambda: find(path, **options))


def random_text(parts: list[str], seed: int, n: int) -> str:
    return "".join(random.Random(seed).choices(parts, k=n))


ODD_TEXTS = [random_text(ODD, seed, 300) for seed in range(30)]


@pytest.fixture(scope="module")
def tokenizers() -> list:
    bpe = BPETokenizer.train([*ODD_TEXTS, "a word or two. " * 99], 600)
    return [GPT2Tokenizer(), bpe]


def assert_pieces_have_the_tokens_of_the_whole(text: str, tokenizers: list) -> None:
    pieces = [piece for piece, _ in pieces_of(text)]
    assert "".join(pieces) == text and len(pieces) > 5
    for tokenizer in tokenizers:
        ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
        assert np.array_equal(ids, tokenizer.encode(text))


def test_cutting_a_text_into_pieces_changes_no_token(small, tokenizers):
    for text in ODD_TEXTS:
        assert_pieces_have_the_tokens_of_the_whole(text, tokenizers)


def test_a_cut_after_any_control_format_or_space_character_changes_no_token(small, tokenizers):
    categories = ("Cc", "Cf", "Zs", "Zl", "Zp")
    odd = [c for c in CHARACTERS if unicodedata.category(c) in categories]
    for space in (" ", "\n", "  ", " \n"):
        text = "".join(f"a{c}{space}{c}b{space}" for c in odd)
        assert_pieces_have_the_tokens_of_the_whole(text, tokenizers)


def test_documents_of_whitespace_alone_are_left_out_and_nothing_else(small, tmp_path):
    texts = ["", "a", " \n\t", "b" * 100, " " * 100 + "c", "  ", "d e f g h i j\n"]
    expected = [texts[1], *texts[3:5], texts[6]]
    for i, text in enumerate(texts):
        write(tmp_path / f"{i}.txt", text)
    assert documents_of(find(str(tmp_path))) == expected
    write(tmp_path / "all.jsonl", lines([*texts, None]))
    assert documents_of(find(f"{tmp_path}/all.jsonl")) == expected
    assert documents_of(find(write(tmp_path / "none.jsonl", ""))) == []


def test_a_text_is_read_whole_as_python_reads_it_whatever_the_chunks(small, monkeypatch, tmp_path):
    for text in ODD_TEXTS:
        path = write(tmp_path / "a.txt", (text + "\r\n\r\nend\x85").replace("\x00", ""))
        with open(path, encoding="utf-8") as file:
            expected = pieces_of(file.read())
        (source,) = find(path)
        for chunk in (4, 16, 1000):
            monkeypatch.setattr(sources, "CHUNK", chunk)
            assert list(source.pieces()) == expected


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_separator_divides_texts_of_every_kind_of_line_end(line_end, tmp_path, capsys):
    path = write(tmp_path / "a.txt", line_end.join(["one", "", "two", "three"]))
    assert documents_of(find(path, separator="\n\n")) == ["one", "two\nthree"]
    assert capsys.readouterr().err == ""
    documents_of(find(path, separator="|"))
    assert "'|'" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_names_the_encoding(encoding, tmp_path):
    path = write(tmp_path / "a.txt", "naïve 東京".encode(encoding))
    assert documents_of(find(path)) == ["naïve 東京"]


@pytest.mark.parametrize(
    ("text", "encoding"),
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


@pytest.mark.parametrize("data", [b"PK\x03\x04\x14\x00", b"\x7fELF\x02\x00\x00"])
def test_binary_files_named_txt_are_refused(data, tmp_path):
    file_refused(write(tmp_path / "a.txt", data))


def test_fields_in_fields_and_pairs_of_fields_are_text(tmp_path):
    rows = [{"data": {"text": "one"}, "prompt": "2 + 2 =", "completion": " 4"}]
    for name in ("a.json", "a.jsonl"):
        path = write(tmp_path / name, json.dumps(rows if name == "a.json" else rows[0]))
        assert documents_of(find(path, field="data.text")) == ["one"]
        assert documents_of(find(path, field="prompt,completion")) == ["2 + 2 = 4"]
    path = write(tmp_path / "a.tsv", "id\tbody\n1\ta, b\n")
    assert documents_of(find(path, field="body")) == ["a, b"]


def test_a_compressed_file_may_have_several_streams(tmp_path):
    path = tmp_path / "a.txt.gz"  # as parallel compressors write it
    path.write_bytes(gzip.compress("a lo東".encode()[:-1]) + gzip.compress("東".encode()[-1:]))
    assert documents_of(find(str(path))) == ["a lo東"]


@pytest.mark.parametrize("separator", ["|", "\n\n", "aab", "東\n京"])
def test_separators_divide_as_str_split_does_wherever_chunks_end(separator, small, tmp_path):
    for seed in range(40):
        text = random_text([separator, *separator, "a", "x y", " "], seed, 60)
        source = write(tmp_path / "a.txt", text)
        expected = [document for document in text.split(separator) if document.strip()]
        assert documents_of(find(source, separator=separator)) == expected


def test_a_byte_order_mark_is_dropped_at_the_start_of_a_file_only(small, tmp_path):
    write(tmp_path / "a.txt", "\ufeff\ufeffone \ufefftwo")
    write(tmp_path / "b.jsonl", "\ufeff" + lines(["\ufeffthree"]))
    write(tmp_path / "c.txt", "\ufeff")
    assert documents_of(find(str(tmp_path))) == ["\ufeffone \ufefftwo", "\ufeffthree"]


def test_each_line_of_json_is_a_document(small, tmp_path):
    text = lines(ODD_TEXTS).replace("\n", "\r\n\n") + '{"text": "last 😀"}'
    source = write(tmp_path / "a.jsonl.gz", text)
    assert documents_of(find(source)) == [*ODD_TEXTS, "last 😀"]


def test_each_row_of_a_table_is_a_document(small, tmp_path):
    texts = pa.array(ODD_TEXTS, pa.string())
    columns = {
        "body": texts.cast(pa.string_view()),
        "other": texts.cast(pa.dictionary(pa.int32(), pa.string())),
        "id": range(30),
    }
    source = table(tmp_path / "a.parquet", columns, row_group_size=7)
    for name in ("body", "other"):
        assert documents_of(find(source, field=name)) == ODD_TEXTS
    write(tmp_path / "a.csv", 'id,body\n1,"a, b\nc"\n2,NA\n3,12\n')
    found = documents_of(find(f"{tmp_path}/a.csv", field="body"))
    assert found == ["a, b\nc", "NA", "12"]


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
    ("name", "data", "replaced"),
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
    ("line", "expected"),
    [
        ('{"text": "x"', "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"body": "x", "n": 1}', "body, n; give --field"),
        ('{"text": 5}', "int"),
    ],
)
def test_a_bad_line_of_json_is_refused_by_its_number(line, expected, tmp_path):
    source = write(tmp_path / "a.jsonl", lines(["good"]) + line)
    message = file_refused(source)
    assert expected in message and "a.jsonl: line 2" in message


def test_a_bad_table_is_refused(tmp_path):
    columns = {"body": ["word " * 1000] * 99, "id": range(99)}
    good = table(tmp_path / "a.parquet", columns)
    assert "body, id" in file_refused(good)
    assert "int" in file_refused(good, field="id")
    data = Path(good).read_bytes()
    for bad in (data[:-20], b"", b"PAR1" * 10):
        assert "bad" in file_refused(write(tmp_path / "bad.parquet", bad), field="body")


def test_a_compressed_file_that_is_cut_short_or_something_else_is_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(b"a long text")
    for bad in (whole[:-5], whole + whole[:15], b"plain text"):
        path.write_bytes(bad)
        assert "a.txt" in file_refused(str(path))


def test_a_source_that_names_no_text_is_refused(tmp_path):
    write(tmp_path / "empty" / ".hidden.txt", "x")
    write(tmp_path / "a.yaml", "{}")
    os.mkfifo(tmp_path / "fifo.txt")
    for name in ("none.txt", "*.md", "empty", "fifo.txt", "a.yaml"):
        message = file_refused(f"{tmp_path}/{name}")
        assert name in message and ".parquet" in message  # among the known endings


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
    train = splits["train"]
    for i, source in enumerate(train):
        for _ in range(2):  # it can be read again
            assert documents_of([source]) == [f"train-{i} {j}" for j in range(100)]
    first, second = train
    assert first.name != second.name


def test_what_goes_wrong_with_a_hub_data_set_is_one_line(hub_folder, monkeypatch, capfd):
    def fail(*_):
        raise ConnectionError("Server Disconnected")

    name = str(hub_folder)
    assert "text, id" in refused(lambda: hub(name, field="body")["train"])
    with monkeypatch.context() as patch:
        patch.setattr("datasets.IterableDataset.__iter__", fail)
        assert "Server Disconnected" in refused(lambda: hub(name)["train"])
    (hub_folder / "train-0.parquet").write_bytes(b"PAR1 and no more")
    assert "ArrowInvalid" in refused(lambda: hub(name)["train"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "ConnectionError" in refused(lambda: hub("someone/something"))
    assert capfd.readouterr() == ("", "")
