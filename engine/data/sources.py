"""Where text comes from: local files, or a data set of the Hugging Face Hub.

A Source is one file or one part of a data set. It is read in chunks of about 1 MB, so memory is
bounded at any size. The datasets package is used for the Hub only, for two reasons. It reads a
.txt as a whole or line by line. It infers a type for every field of a .jsonl, so a field that is
not needed can end the reading after a gigabyte.
"""

import codecs
import contextlib
import csv
import functools
import glob
import gzip
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from engine.base.errors import UserError, warn
from engine.data.tokenizer import END_OF_TEXT

TEXT = (".txt", ".md", ".text", ".raw", ".tokens")
PIECE = 1 << 20  # characters after which a document is cut at the next good place
CHUNK = 1 << 20  # characters of a text to read at a time
ROWS = 256  # rows of a .parquet to read at a time
# A cut here changes no token: GPT-2's pattern always ends a token between a character and a space.
# Python's \s has all characters of Rust's and Oniguruma's \s, and \x1c to \x1f.
# To bound the memory, words of 65,536 characters are cut too.
GOOD_CUT = re.compile(r"\S(?=[ \n])|\S{65536}")

Chunks = Iterator[tuple[str, bool]]  # text, and whether a document ends after it
Pieces = Iterator[tuple[str, bool]]  # text, and whether a document starts with it


class Source(NamedTuple):
    """Documents. Each call of pieces() reads them again, in the same pieces.

    documents(): the same, one string for each, also for empty ones; None if one may not fit into
    memory."""

    name: str
    pieces: Callable[[], Pieces]
    documents: Callable[[], Iterable[str]] | None = None


def source_of(name: str, documents: Callable[[], Iterable[str]]) -> Source:
    """A source from a function that returns documents."""

    def pieces():
        return split_documents((text, True) for text in documents())

    return Source(name, pieces, documents)


def split_documents(chunks: Chunks) -> Pieces:
    """Cut documents where that changes no token. Documents of whitespace are left out."""
    held, is_start = "", True
    for text, ends in chunks:
        held += text
        begin = 0
        while found := GOOD_CUT.search(held, begin + PIECE):
            yield held[begin : found.end()], is_start
            begin, is_start = found.end(), False
        held = held[begin:]
        if ends:
            if held and not (is_start and held.isspace()):
                yield held, is_start
            held, is_start = "", True


def find(
    source: str,
    field: str = "text",
    separator: str = "",
    errors: str = "strict",
    encoding: str = "",
) -> list[Source]:
    """The files that --source names, in order.

    field: where a line or row has its text: a name, data.text for a field in a field, or several
    with commas, joined. separator: divides a text into documents. encoding: empty: UTF-8, or what a
    byte-order mark says."""

    def pieces(path):
        with one_line_errors(path):
            open_text = functools.partial(_open_text, path, errors, encoding)
            if format_of(path) in TEXT:
                chunks = _read_text(path, separator, open_text)
            else:
                records = RECORDS[format_of(path)](path, open_text)
                chunks = ((text, True) for text in _texts(path, records, field, errors))
            yield from split_documents(chunks)

    sources = []
    for path in list_files(source):
        if format_of(path) not in KNOWN:
            raise UserError(f"{path} has no known file extension; {HELP}")
        sources.append(Source(path, functools.partial(pieces, path)))
    return sources


def list_files(source: str) -> list[str]:
    """The files in a comma-separated list of files, folders and globs, each once."""
    paths = {}
    for item in source.split(","):
        if os.path.isdir(item):
            below = glob.glob(os.path.join(glob.escape(item), "**", "*"), recursive=True)
            found = [path for path in below if format_of(path) in KNOWN]
        else:
            found = glob.glob(item, recursive=True) or [item]
        files = sorted(filter(os.path.isfile, found))
        if not files:
            raise UserError(f"{item} does not exist or has no files to read; {HELP}")
        for path in files:
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def format_of(path: str) -> str:
    """The file extension that names the format, without .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _open_text(path, errors, encoding, newline=None):
    """Open a text file; by default, every kind of line end is read as a newline."""
    opener = gzip.open if path.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        start = file.read(CHUNK)
    if start.startswith(b"PK\x03\x04"):
        raise UserError("this is a zip archive; unpack it first")
    if not encoding and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    if not encoding and b"\0" in start:
        raise UserError("it has NUL bytes, so it is no text, or give --encoding=utf-16-le")
    return opener(path, "rt", encoding=encoding or "utf-8-sig", errors=errors, newline=newline)


def likely_encoding(text: bytes) -> str:
    """A guess for text that is not UTF-8: Chinese has its high bytes in pairs."""
    pairs = len(re.findall(rb"[\x81-\xfe]{2}", text))
    single = len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", text))
    return "gb18030" if pairs > single else "cp1252"


def _read_text(path, separator, open_text):
    rest, found = "", False
    with open_text() as file:
        while chunk := file.read(CHUNK):
            rest += chunk
            found |= (separator or END_OF_TEXT) in rest
            if separator:
                *documents, rest = rest.split(separator)
                yield from ((document, True) for document in documents)
            # keep what may be the start of a separator
            safe = max(0, len(rest) - len(separator))
            yield rest[:safe], False
            rest = rest[safe:]
    yield rest, True
    if separator and not found:
        warn(f"{path} does not have the separator {separator!r}: it is one document")
    if found and not separator:
        warn(f"{path}: {END_OF_TEXT} is read as text; --separator='{END_OF_TEXT}' divides it there")


def _texts(path, records, field, errors):
    """The text of each record, which is a dict or a line of JSON."""
    n_bad = 0
    for number, record in enumerate(records, 1):
        try:
            with one_line_errors(f"record {number:,}"):
                if isinstance(record, str):
                    record = json.loads(record) if record.strip() else {field: ""}
                text = _text_in(record, field)
                # JSON may hold half a surrogate pair, which UTF-8 cannot encode
                text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors)
        except UserError as error:
            if errors != "ignore":
                raise UserError(f"{error}; --errors=ignore leaves out such records") from None
            n_bad += 1
        else:
            yield text
    if n_bad:
        warn(f"{path}: {n_bad:,} records without a text are left out")


def _read_json(path, open_text):
    with open_text() as file:
        records = json.load(file)
    if not isinstance(records, list):
        raise UserError("it holds no list of records; one record per line is a .jsonl")
    return records


def _read_json_lines(path, open_text):
    with open_text() as file:
        yield from file


def _read_csv(path, open_text):
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if format_of(path) == ".tsv" else ","
    with open_text(newline="") as file:
        yield from csv.DictReader(file, delimiter=delimiter)


def _read_parquet(path, open_text):
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(ROWS):
        yield from batch.to_pylist()


RECORDS = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
KNOWN = (*TEXT, *RECORDS)
HELP = f"known are {' '.join(KNOWN)}, and these followed by .gz"


def hub(name: str, subset: str = "", field: str = "text") -> dict[str, list[Source]]:
    """The files of each split of a data set on the Hugging Face Hub, streamed without a local copy.

    name: NAME or NAME@REVISION. Memory holds one row group of a .parquet, usually a few MB."""
    path, _, revision = name.partition("@")
    splits = {}
    with one_line_errors(name):
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # the error that is raised says enough
        builder = datasets.load_dataset_builder(path, subset or None, revision=revision or None)
        for split, rows in builder.as_streaming_dataset().items():
            splits[split] = []
            for i in range(rows.num_shards):
                # each revision has another hash
                title = f"{name} {subset} {split} {i + 1}/{rows.num_shards} {builder.hash}"
                file = rows.shard(num_shards=rows.num_shards, index=i)
                texts = functools.partial(_column, file, field, title)
                splits[split].append(source_of(title, texts))
    return splits


def _column(rows, field, title):
    """The texts in one column of a data set of the datasets package."""
    with one_line_errors(title):
        for row in rows:
            yield _text_in(row, field)


def _text_in(record, field):
    """The text in a field of a record, or in several; empty for null."""
    if field not in record and "," in field:
        return "".join(_text_in(record, name) for name in field.split(","))
    if field not in record and "." in field:
        outer, _, inner = field.partition(".")
        if isinstance(record.get(outer), dict):
            return _text_in(record[outer], inner)
    if field not in record:
        found = ", ".join(map(str, record))[:200]
        raise UserError(f"no field {field!r}, only {found}; give --field=...")
    text = record[field]
    if not isinstance(text, str | None):
        raise UserError(f"field {field!r} is not a string but {type(text).__name__}")
    return text or ""


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn any error while reading a file or data set into one line that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # six libraries raise errors without a common base class
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, UnicodeError):
            reason += "; "
            if isinstance(error, UnicodeDecodeError):
                reason += f"give --encoding, likely {likely_encoding(error.object)}, or "
            reason += "--errors=replace"
        raise UserError(f"{name}: {reason}") from None
