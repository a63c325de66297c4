"""engine/data/sources.py: whatever the files are, all their text comes out, in bounded memory."""

import gzip
import itertools
import json
import os
import random
import subprocess
import sys
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
from tests.conftest import shared_data
from tests.helpers import ROOT

COMPRESS = {"": bytes, ".gz": gzip.compress}
SPACES = [chr(c) for c in range(0x110000) if chr(c).isspace()]
ODD = [
    *SPACES,
    *"\x00\u180e\u200b\u2060\ufeff\u00ad",
    "'s",
    " 's",
    "é",
    "e\u0301",
    "東京",
    "🏳️‍🌈",
    "12",
    "...",
    "<|endoftext|>",
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, chunks and rows so small that every border is met."""
    for name, value in (("PIECE", 5), ("CHUNK", 16), ("ROWS", 3)):
        monkeypatch.setattr(sources, name, value)


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


def pieces_of(documents: list[str]) -> list[tuple[str, bool]]:
    return list(split_documents((text, True) for text in documents))


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def table(path: Path, columns: dict, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, **options)
    return str(path)


def lines(texts: list, field: str = "text") -> str:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts)


def refused(source: str, **options) -> str:
    """The one line that says why the source cannot be read."""
    with pytest.raises(UserError) as error:
        documents_of(find(source, **options))
    message = str(error.value)
    assert message.isprintable() and len(message) < 600
    return message


def odd_text(seed: int, n: int = 300) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice([draw.choice(ODD), " ", "\n", "word", "x"]) for _ in range(n))


@pytest.fixture(scope="module")
def tokenizers() -> list:
    return [
        GPT2Tokenizer(),
        BPETokenizer.train([odd_text(seed) for seed in range(30)] + ["a word or two. " * 99], 600),
    ]


def assert_pieces_encode_as_the_whole(text: str, tokenizers: list) -> int:
    pieces = [piece for piece, _ in pieces_of([text])]
    assert "".join(pieces) == text
    for tokenizer in tokenizers:
        ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
        assert np.array_equal(ids, tokenizer.encode(text))
    return len(pieces)


def test_the_tokens_of_the_pieces_are_the_tokens_of_the_text_whatever_the_spaces(small, tokenizers):
    for seed in range(200):
        assert assert_pieces_encode_as_the_whole(odd_text(seed), tokenizers) > 5


def test_the_tokens_of_the_pieces_are_the_tokens_of_real_text(monkeypatch, tokenizers):
    monkeypatch.setattr(sources, "PIECE", 1000)
    for name in ("tinyshakespeare/input.txt", "wikitext2/wiki.valid.raw", "sotu/sotu.txt"):
        text = shared_data(name).read_bytes().decode()[:200_000]
        assert assert_pieces_encode_as_the_whole(text, tokenizers) > 150


def test_a_cut_behind_any_control_format_or_space_character_changes_no_token(
    monkeypatch, tokenizers
):
    monkeypatch.setattr(sources, "PIECE", 1)
    odd = [
        chr(c)
        for c in range(0x110000)
        if unicodedata.category(chr(c)) in ("Cc", "Cf", "Zs", "Zl", "Zp")
    ]
    for space in (" ", "\n", "  ", " \n"):
        assert_pieces_encode_as_the_whole(
            "".join(f"a{c}{space}{c}b{space}" for c in odd), tokenizers
        )


def test_pieces_join_to_the_documents_and_those_of_whitespace_alone_are_passed_over(small):
    texts = ["", "a", " \n\t", "b" * 100, " " * 100 + "c", "  ", "d e f g h i j\n"]
    joined = []
    for text, first in pieces_of(texts):
        joined += [""] if first else []
        joined[-1] += text
    assert joined == [texts[1], *texts[3:5], texts[6]]


def test_a_text_without_a_place_to_cut_stays_whole():
    text = "東" * (5 << 20)
    assert pieces_of([text]) == [(text, True)]


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_comes_back_whole_line_ends_nul_bytes_and_all(compression, small, tmp_path):
    for seed in range(20):
        text = odd_text(seed) + "\r\n\r\x00\nend\x85"
        source = write(tmp_path / f"a.txt{compression}", COMPRESS[compression](text.encode()))
        assert documents_of(find(source)) == [text]
        data = text.encode()
        write(
            tmp_path / f"a.txt{compression}",
            COMPRESS[compression](data[:77]) + COMPRESS[compression](data[77:]),
        )
        assert documents_of(find(source)) == [
            text
        ]  # two streams in one file, as parallel compressors write


def test_the_pieces_of_a_text_do_not_depend_on_the_chunks_it_is_read_in(
    small, monkeypatch, tmp_path
):
    for seed in range(60):
        source = find(write(tmp_path / "a.txt", text := odd_text(seed)))[0]
        for chunk in (2, 7, 1000):
            monkeypatch.setattr(sources, "CHUNK", chunk)
            assert list(source.pieces()) == pieces_of([text])


@pytest.mark.parametrize("separator", ["|", "\n\n", "aa", "aab", "<|endoftext|>", "東\n京"])
def test_separators_divide_as_str_split_does_wherever_the_chunks_end(separator, small, tmp_path):
    for seed in range(60):
        draw = random.Random(seed)
        text = "".join(draw.choice([separator, *separator, "a", "x y", " "]) for _ in range(60))
        documents = documents_of(find(write(tmp_path / "a.txt", text), separator=separator))
        assert documents == [document for document in text.split(separator) if document.strip()]


def test_a_byte_order_mark_is_dropped_at_the_begin_of_a_file_only(small, tmp_path):
    write(tmp_path / "a.txt", "\ufeff\ufeffone \ufefftwo")
    write(tmp_path / "b.jsonl", "\ufeff" + lines(["\ufeffthree"]))
    write(tmp_path / "c.txt", "\ufeff")
    assert documents_of(find(str(tmp_path))) == ["\ufeffone \ufefftwo", "\ufeffthree"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_each_line_of_json_is_a_document(compression, small, tmp_path):
    texts = [odd_text(seed) for seed in range(30)]
    data = lines([*texts, None, "", " \n"]).replace("\n", "\r\n\n") + json.dumps(
        {"text": "last 😀"}
    )
    source = write(tmp_path / f"a.jsonl{compression}", COMPRESS[compression](data.encode()))
    assert documents_of(find(source)) == [*texts, "last 😀"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_each_row_of_a_table_is_a_document(kind, small, tmp_path):
    texts = [odd_text(seed) for seed in range(30)]
    column = pa.array([*texts, None, "", " ", texts[0]], pa.string()).cast(kind)
    source = table(tmp_path / "a.parquet", {"id": range(34), "body": column}, row_group_size=7)
    assert documents_of(find(source, field="body")) == [*texts, texts[0]]


def test_files_folders_and_globs_are_read_in_order_each_once(tmp_path, monkeypatch):
    for name in (
        "b.txt",
        "a.md",
        "sub/c.text",
        "sub/deep/d.TXT.gz",
        "e.raw",
        ".hidden.txt",
        ".git/f.txt",
        "g.py",
        "h.json",
    ):
        text = Path(name).name.encode()
        write(tmp_path / "in" / name, gzip.compress(text) if name.endswith("gz") else text)
    os.symlink(tmp_path / "in" / "sub", tmp_path / "in" / "sub" / "deep" / "circle")
    os.symlink(tmp_path / "in" / "b.txt", tmp_path / "in" / "link.txt")
    monkeypatch.chdir(tmp_path)
    assert documents_of(find("in")) == ["a.md", "b.txt", "e.raw", "c.text", "d.TXT.gz"]
    assert documents_of(find("in/e.raw,in/*.txt,in/sub/,./in/e.raw")) == [
        "e.raw",
        "b.txt",
        "c.text",
        "d.TXT.gz",
    ]
    assert documents_of(find("in/**/*.t*xt")) == ["b.txt", "c.text"]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_what_is_not_utf8_is_refused_with_its_place_or_replaced(
    compression, ending, small, tmp_path
):
    good = "naïve 東京 " * 9 + "\n"
    data = {
        "txt": good.encode() + b"caf\xe9 end",
        "jsonl": lines([good]).encode() + b'{"text": "caf\xe9 end"}',
    }[ending]
    source = write(tmp_path / f"a.{ending}{compression}", COMPRESS[compression](data))
    message = refused(source)
    assert "0xe9" in message and "--errors=replace" in message
    assert (
        documents_of(find(source, errors="replace"))
        == {
            "txt": [f"{good}caf\ufffd end"],
            "jsonl": [good, "caf\ufffd end"],
        }[ending]
    )


def test_a_text_that_ends_within_a_character_is_not_utf8(small, tmp_path):
    source = write(tmp_path / "a.txt", b"sixteen bytes it\xf0\x9f\x98")
    assert "--errors=replace" in refused(source)
    assert documents_of(find(source, errors="replace")) == ["sixteen bytes it\ufffd"]


def test_half_a_surrogate_pair_is_not_utf8(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "x\\ud800y"}\n')
    assert "line 2" in refused(source) and "--errors=replace" in refused(source)
    assert documents_of(find(source, errors="replace")) == ["😀", "x\ufffdy"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "x"', "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"text": ' + "9" * 10_000 + "}", "ValueError"),
        ('["text"]', "TypeError"),
        ('{"body": "x", "n": 1}', "no field 'text' but body, n; give --field=..."),
        (json.dumps(dict.fromkeys(map(str, range(9999)))), "17, 18, 19"),
        ("{}", "no field 'text'"),
        ('{"text": 5}', "field 'text' is no string but int"),
    ],
)
def test_a_bad_line_of_json_is_refused_by_its_number(line, expected, tmp_path):
    message = refused(write(tmp_path / "a.jsonl", lines(["good"]) + line + "\n"))
    assert expected in message and "a.jsonl: line 2" in message


def test_a_bad_table_is_refused(tmp_path):
    columns = {"body": ["word " * 1000] * 99, "id": range(99)}
    good = table(tmp_path / "a.parquet", columns, compression="none", write_page_checksum=True)
    assert "no field 'text' but body, id" in refused(good)
    assert "field 'id' is no string but int" in refused(good, field="id")
    data = Path(good).read_bytes()
    for i, bad in enumerate([data[:-20], data[:100], b"", b"PAR1" * 10]):
        assert f"bad{i}" in refused(write(tmp_path / f"bad{i}.parquet", bad), field="body")


def test_a_column_of_a_csv_is_read_as_text(small, tmp_path):
    rows = ['"a, b\nc"', "NA", "12", '"say ""so"""'] * 3
    data = "".join(f"{i},{row}\n" for i, row in enumerate(rows))
    source = write(tmp_path / "a.csv", f"id,body\n{data}")
    assert documents_of(find(source, field="body")) == ["a, b\nc", "NA", "12", 'say "so"'] * 3
    assert "text" in refused(source)


def test_a_compressed_file_that_is_cut_short_damaged_or_something_else_is_refused(tmp_path):
    whole = gzip.compress("".join(odd_text(seed) for seed in range(30)).encode())
    for bad in (whole[:5], whole[:-1], whole[: len(whole) // 2], b"plain text", whole + whole[:30]):
        assert "a.txt" in refused(write(tmp_path / "a.txt.gz", bad))


def test_empty_files_and_documents_of_whitespace_are_passed_over(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.md"):
        write(tmp_path / name, " \n\n" if name == "c.md" else "")
    table(tmp_path / "d.parquet", {"text": pa.array([], pa.string())})
    assert documents_of(find(str(tmp_path))) == []


def test_a_source_that_names_no_text_is_refused(tmp_path):
    write(tmp_path / "empty" / ".hidden.txt", "x")
    write(tmp_path / "a.json", "{}")
    os.mkfifo(tmp_path / "fifo.txt")
    for name in ("none.txt", "*.md", "empty", "fifo.txt"):
        message = refused(f"{tmp_path}/{name}")
        assert "does not exist" in message and ".parquet" in message
    assert "no known ending" in refused(f"{tmp_path}/a.json")
    assert "does not exist" in refused("")


MEASURE = """
import resource, sys
from engine.data.sources import find
list(find(sys.argv[1])[0].pieces())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = sum(len(text) for text, _ in find(sys.argv[2])[0].pieces())
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("name", ["txt", "jsonl.gz", "parquet"])
def test_memory_stays_flat_however_long_the_file(name, tmp_path):
    """300 MB (of a table 100) against 6 MB: one document, or documents of 1 MB."""
    text = "Some words in a row, and a few more.\n" * 27_000
    for label, n in (("short", 6), ("long", 100 if name == "parquet" else 300)):
        with open(tmp_path / f"{label}.txt", "w") as plain:
            plain.writelines(itertools.repeat(text, n if name == "txt" else 0))
        if name == "jsonl.gz":  # streams of 1 MB, one behind the other
            write(tmp_path / f"{label}.{name}", gzip.compress(lines([text]).encode(), 1) * n)
        if name == "parquet":
            table(
                tmp_path / f"{label}.{name}",
                {"text": [f"{i} {text}" for i in range(n)]},
                compression="zstd",
            )
    files = [str(tmp_path / f"{label}.{name}") for label in ("short", "long")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    n_characters, megabytes = map(int, done.stdout.split())
    assert n_characters >= n * len(text) and megabytes < 60


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """A data set such as the hub has, in a folder."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for split, n in (("train", 3), ("validation", 1)):
        for i in range(n):
            texts = [f"{split} {i} {j}" for j in range(100)] + [None, " "]
            table(
                tmp_path / "set" / "data" / f"{split}-0000{i}-of-0000{n}.parquet",
                {"text": texts, "id": range(102)},
            )
    return tmp_path / "set"


def hub_refused(*names: str, **options) -> str:
    with pytest.raises(UserError) as error:
        documents_of(hub(*names, **options)["train"])
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    return str(error.value)


def test_a_hub_data_set_gives_a_source_per_file_in_order(hub_folder):
    splits = hub(str(hub_folder))
    found = splits["train"]
    expected = [[f"train {i} {j}" for j in range(100)] for i in range(3)]
    assert [documents_of([source]) for source in found] == expected
    assert list(found[1].pieces()) == list(found[1].pieces())
    assert len({source.name for source in found}) == 3
    expected = [f"validation 0 {j}" for j in range(100)]
    assert documents_of(splits["validation"]) == expected
    assert list(splits) == ["train", "validation"]


def test_a_hub_data_set_of_json_lines_is_read_too(tmp_path, hub_folder):
    for i in range(2):
        write(
            tmp_path / "json" / f"train-{i}.jsonl.gz",
            gzip.compress(lines([f"{i} {j} naïve" for j in range(9)]).encode()),
        )
    assert documents_of(hub(str(tmp_path / "json"))["train"]) == [
        f"{i} {j} naïve" for i in range(2) for j in range(9)
    ]


def test_what_a_hub_data_set_lacks_is_said_in_one_line(tmp_path, hub_folder, capfd):
    assert "no field 'body' but text, id" in hub_refused(str(hub_folder), field="body")
    assert "no string but int" in hub_refused(str(hub_folder), field="id")
    assert "default" in hub_refused(str(hub_folder), "other")
    write(tmp_path / "script" / "script.py", "import datasets")
    said = hub_refused(str(tmp_path / "script"))
    assert "scripts are no longer supported" in said
    (hub_folder / "data" / "train-00001-of-00003.parquet").write_bytes(b"PAR1 and no more")
    assert (
        "ArrowInvalid" in (message := hub_refused(str(hub_folder))) and "the network" not in message
    )
    assert capfd.readouterr() == ("", "")


def test_without_the_hub_the_way_on_is_said_at_once(monkeypatch, capfd):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="someone/something: ConnectionError: "):
        hub("someone/something")
    assert capfd.readouterr() == ("", "")


def test_a_network_that_fails_in_the_middle_is_said_in_one_line(hub_folder, monkeypatch):
    source = hub(str(hub_folder))["train"][0]

    def fail(*_):
        yield {"text": "good"}
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr("datasets.IterableDataset.__iter__", fail)
    with pytest.raises(UserError, match="1/3.*: ConnectionError: Server Disc"):
        list(source.pieces())


def test_the_name_of_a_hubs_data_set_may_say_its_revision(monkeypatch):
    import datasets

    asked = []

    def refuse(*name, revision):
        asked.append((*name, revision))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    for name, subset in (("me/tales@refs/pr/2", "old"), ("me/tales", "")):
        with pytest.raises(UserError):
            hub(name, subset)
    assert asked == [("me/tales", "old", "refs/pr/2"), ("me/tales", None, None)]
