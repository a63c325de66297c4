"""Where text comes from: local files, or a data set of the Hugging Face Hub.

A Source is one file or one part of a data set. It is read in chunks of about 1 MB, so memory is
bounded for any size. The datasets package reads the Hub only: it reads a .txt whole or line by
line, and it infers a type for every field of a .jsonl, so that a field nobody asked for can stop
it after a gigabyte.
"""

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
from typing import NamedTuple, TextIO

from engine.base.errors import UserError

TEXT = (".txt", ".md", ".text", ".raw", ".tokens")
PIECE = 1 << 20  # characters: cut a document at the first good place after so many
CHUNK = 1 << 20  # characters of a text that are read at a time
ROWS = 256  # rows of a .parquet that are read at a time
# A cut here changes no token: GPT-2's pattern always ends a token between a character and a space.
# Python's \s is the \s of Rust and Oniguruma and a little more (\x1c to \x1f), never less.
GOOD_CUT = re.compile(r"\S(?=[ \n])")

Chunks = Iterator[tuple[str, bool]]  # text, and whether a document ends after it
Pieces = Iterator[tuple[str, bool]]  # text, and whether a document starts with it


class Source(NamedTuple):
    """Documents that can be read again and again, always in the same pieces."""

    name: str
    pieces: Callable[[], Pieces]


def source_of(name: str, documents: Callable[[], Iterable[str]]) -> Source:
    """A source from a function that returns documents."""
    return Source(name, lambda: split_documents((text, True) for text in documents()))


def split_documents(chunks: Chunks) -> Pieces:
    """Cut documents where that changes no token, and leave out documents of whitespace."""
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
) -> list[Source]:
    """The files that --source names, in order."""

    def pieces(path: str) -> Pieces:
        with one_line_errors(path):
            if format_of(path) in TEXT:
                yield from split_documents(_read_text(path, separator, errors))
            else:
                texts = RECORDS[format_of(path)](path, field, errors)
                yield from split_documents((text, True) for text in texts)

    sources = []
    for path in list_files(source):
        if format_of(path) not in KNOWN:
            raise UserError(f"{path} has no known ending; {HELP}")
        sources.append(Source(path, functools.partial(pieces, path)))
    return sources


def list_files(source: str) -> list[str]:
    """The files that a list of files, folders and globs names, each once."""
    paths = {}
    for item in source.split(","):
        if os.path.isdir(item):
            below = glob.glob(os.path.join(glob.escape(item), "**", "*"), recursive=True)
            found = [path for path in below if format_of(path) in KNOWN]
        else:
            found = glob.glob(item, recursive=True) or [item]
        files = sorted(filter(os.path.isfile, found))
        if not files:
            raise UserError(f"{item} does not exist, or holds no file to read; {HELP}")
        for path in files:
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def format_of(path: str) -> str:
    """The ending that names the format; .gz may follow it."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _open_text(path: str, errors: str) -> TextIO:
    """A file's text with its line ends unchanged."""
    opener = gzip.open if path.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", errors=errors, newline="\n")


def _read_text(path: str, separator: str, errors: str) -> Chunks:
    rest = ""
    with _open_text(path, errors) as file:
        while chunk := file.read(CHUNK):
            rest += chunk
            if separator:
                *documents, rest = rest.split(separator)
                yield from ((document, True) for document in documents)
            # the last characters may be the start of a separator
            safe = max(0, len(rest) - max(0, len(separator) - 1))
            yield rest[:safe], False
            rest = rest[safe:]
    yield rest, True


def _read_json_lines(path: str, field: str, errors: str) -> Iterator[str]:
    with _open_text(path, errors) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            with one_line_errors(f"line {number:,}"):
                text = _text_in(json.loads(line), field)
                # JSON may hold half a surrogate pair, which is no text
                text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors)
            yield text


def _read_csv(path: str, field: str, errors: str) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    with _open_text(path, errors) as file:
        for row in csv.DictReader(file):
            yield _text_in(row, field)


def _read_parquet(path: str, field: str, _: str) -> Iterator[str]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    columns = [field] if field in file.schema_arrow.names else None
    for batch in file.iter_batches(ROWS, columns=columns):
        for row in batch.to_pylist():
            yield _text_in(row, field)


RECORDS = {
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
KNOWN = (*TEXT, *RECORDS)
HELP = f"known are {' '.join(KNOWN)}, and those with .gz after them"


def hub(name: str, subset: str = "", field: str = "text") -> dict[str, list[Source]]:
    """The files of each split of a data set on the Hugging Face Hub, streamed: none stays on disk.

    name: NAME or NAME@REVISION. In memory is a row group of a .parquet, mostly some MB."""
    splits = hub_texts(name, subset, field)
    return {
        split: [source_of(title, texts) for title, texts in files.items()]
        for split, files in splits.items()
    }


def hub_texts(
    name: str,
    subset: str = "",
    field: str = "text",
) -> dict[str, dict[str, Callable[[], Iterator[str]]]]:
    """For each file of each split a function that returns all its texts, the empty ones too."""
    path, _, revision = name.partition("@")
    splits = {}
    with one_line_errors(name):
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # the last error says it all
        builder = datasets.load_dataset_builder(path, subset or None, revision=revision or None)
        for split, rows in builder.as_streaming_dataset().items():
            splits[split] = {}
            for i in range(rows.num_shards):
                number = f"{i + 1}/{rows.num_shards}"
                title = f"{name} {subset} {split} {number} {builder.hash}"  # hash: of its revision
                file = rows.shard(num_shards=rows.num_shards, index=i)
                splits[split][title] = functools.partial(_column, file, field, title)
    return splits


def _column(rows, field: str, title: str) -> Iterator[str]:
    """One column of a data set of the datasets package."""
    with one_line_errors(title):
        if field in (rows.column_names or ()):
            rows = rows.select_columns([field])
        for row in rows:
            yield _text_in(row, field)


def _text_in(record: dict, field: str) -> str:
    """The text in the field of a record; null is no text."""
    if field not in record:
        found = ", ".join(map(str, record))[:200]
        raise UserError(f"no field {field!r} but {found}; give --field=...")
    text = record[field]
    if not isinstance(text, str | None):
        raise UserError(f"field {field!r} is no string but {type(text).__name__}")
    return text or ""


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file or data set is read into one line that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # of six libraries, which have no base class in common
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, UnicodeError):
            reason += "; convert it to UTF-8, or give --errors=replace"
        raise UserError(f"{name}: {reason}") from None
