"""Where text comes from: local files, or a data set of the Hugging Face Hub.

A Source is one file or one part of a data set. It is read in chunks of about 1 MB, so memory is
bounded for any size. The datasets package reads tables and the Hub. Plain text and .jsonl have
readers of their own here: datasets reads a .txt whole or line by line, and it infers a type for
every field of a .jsonl, so that a field nobody asked for can stop it after a gigabyte.
"""

import bz2
import contextlib
import functools
import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TextIO

from engine.base.errors import UserError

TEXT = (".txt", ".md", ".text", ".raw", ".tokens")
JSON_LINES = (".jsonl", ".ndjson")
KNOWN = (*TEXT, *JSON_LINES, ".parquet", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
PIECE = 1 << 20  # characters: cut a document at the first good place after so many
LONGEST_PIECE = 1 << 24  # characters: cut it anywhere after so many
CHUNK = 1 << 20  # characters of a text that are read at a time
LONGEST_LINE = 1 << 28  # characters of a line of JSON, which is read whole
ROWS = 256  # rows of a table that are read at a time
# A cut here changes no token: GPT-2's pattern always ends a token between a character and a space.
# Python's \s is the \s of Rust and Oniguruma and a little more (\x1c to \x1f), never less.
GOOD_CUT = re.compile(r"\S(?=[ \n])")
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")

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
        begin = 0
        search_from = max(PIECE, len(held) - 1)  # what was held has been searched
        held += text
        while len(held) - begin > PIECE:
            found = GOOD_CUT.search(held, search_from, begin + LONGEST_PIECE)
            if found is None and len(held) - begin < LONGEST_PIECE:
                break
            cut = found.end() if found else begin + LONGEST_PIECE
            yield held[begin:cut], is_start
            begin, search_from, is_start = cut, cut + PIECE, False
        held = held[begin:]
        if ends:
            if held and not (is_start and held.isspace()):
                yield held, is_start
            held, is_start = "", True


def find(
    source: str, field: str = "text", separator: str = "", errors: str = "strict"
) -> list[Source]:
    """The files that --source names, in order."""

    def pieces(path: str) -> Pieces:
        ending = endings(path)[0]
        if ending in TEXT:
            return split_documents(_read_text(path, separator, errors))
        if ending in JSON_LINES:
            texts = _read_json_lines(path, field, errors)
        else:
            texts = _column(_table(path, field), field, path)
        return split_documents((text, True) for text in texts)

    sources = []
    for path in list_files(source):
        if endings(path)[0] not in KNOWN:
            raise UserError(f"{printable(path)} has no known ending; {HELP}")
        sources.append(Source(path, functools.partial(pieces, os.path.abspath(path))))
    return sources


HELP = f"known are {' '.join(KNOWN)}, and those with {' '.join(COMPRESSED)} after them"


def list_files(source: str) -> list[str]:
    """The files that a list of files, folders and globs names, each once."""
    paths: dict[str, str] = {}
    for item in [source] if os.path.exists(source) else source.split(","):
        if os.path.isdir(item):
            below = glob.glob(os.path.join(glob.escape(item), "**", "*"), recursive=True)
            found = [path for path in below if endings(path)[0] in KNOWN]
        else:
            found = [item] if os.path.exists(item) else glob.glob(item, recursive=True)
        found = sorted(filter(os.path.isfile, found))
        if not found:
            raise UserError(f"{printable(item)} does not exist, or holds no file to read; {HELP}")
        for path in found:
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def endings(path: str) -> tuple[str, str]:
    """The ending that names the format, and that of the compression if there is one."""
    stem, ending = os.path.splitext(path.lower())
    if ending in COMPRESSED:
        return os.path.splitext(stem)[1], ending
    return ending, ""


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
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
            if line.isspace():
                continue
            where = f"{path}, line {number:,}"
            try:
                text = _text_in(json.loads(line), field, where)
                text.encode()
            except UnicodeEncodeError:
                if errors == "strict":
                    raise _not_utf8(where, " (half a surrogate pair)") from None
                text = LONE_SURROGATE.sub("\ufffd", text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{printable(where)} is no JSON ({reason(error)})") from None
            yield text


@contextlib.contextmanager
def _open_text(path: str, errors: str) -> Iterator[TextIO]:
    """A file's text with its line ends unchanged. What is wrong with its bytes becomes one line."""
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
    raw = openers.get(endings(path)[1], open)(path, "rb")
    with io.TextIOWrapper(raw, "utf-8-sig", errors, newline="\n") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            place = ""
            if raw.seekable():  # the decoder was given the last bytes that were read
                place = f" at byte {raw.tell() - len(error.object) + error.start:,}"
            raise _not_utf8(path, place) from None
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # of the system; the decompressors' own have no number
            raise UserError(f"{printable(path)} is cut short or damaged: {reason(error)}") from None


def _open_zst(path: str, _: str) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


def _not_utf8(where: str, place: str) -> UserError:
    advice = "convert it, or give --errors=replace"
    return UserError(f"{printable(where)} is not UTF-8{place}; {advice}")


def _table(path: str, field: str):
    """The rows of a local .parquet, .csv or .tsv, streamed."""
    datasets = _import_datasets()
    if endings(path)[0] == ".parquet":
        options = {"path": "parquet", "batch_size": ROWS}
    else:
        features = datasets.Features({field: datasets.Value("string")})
        options = {"path": "csv", "features": features, "chunksize": ROWS}
        options["sep"] = "," if endings(path)[0] == ".csv" else "\t"
        options["keep_default_na"] = False  # "NA" is a text
    with _one_line_errors(path):
        files = glob.escape(path)
        return datasets.load_dataset(**options, data_files=files, split="train", streaming=True)


def hub(name: str, subset: str = "", split: str = "train", field: str = "text") -> list[Source]:
    """The files of one split of a data set on the Hugging Face Hub, streamed: none stays on disk.

    name: NAME or NAME@REVISION. In memory is a row group of a .parquet, mostly some MB."""
    texts = hub_texts(name, subset, split, field)
    return [source_of(file, texts_of_file) for file, texts_of_file in texts.items()]


def hub_texts(
    name: str, subset: str = "", split: str = "train", field: str = "text"
) -> dict[str, Callable[[], Iterator[str]]]:
    """For each file of the split a function that returns all its texts, the empty ones too."""
    with _one_line_errors(name):
        builder = _import_datasets().load_dataset_builder(**_arguments(name, subset))
        rows = builder.as_streaming_dataset(split=split)
        n = rows.num_shards
        texts = {}
        for i in range(n):
            about = (name, subset, split, f"{i + 1}/{n}", builder.hash)  # the hash of its revision
            title = " ".join(filter(None, about))
            file = rows.shard(num_shards=n, index=i)
            texts[title] = functools.partial(_column, file, field, title)
    return texts


def hub_splits(name: str, subset: str = "") -> list[str]:
    """The names of the splits that a data set on the Hub has."""
    with _one_line_errors(name):
        return list(_import_datasets().get_dataset_split_names(**_arguments(name, subset)))


def _arguments(name: str, subset: str) -> dict[str, str]:
    """Arguments of datasets' functions for NAME, NAME@REVISION or a local folder."""
    path, revision = (name, "") if os.path.exists(name) else name.partition("@")[::2]
    arguments = {"path": path, "name": subset, "revision": revision}
    return {key: value for key, value in arguments.items() if value}


def _column(rows, field: str, name: str) -> Iterator[str]:
    """One column of a data set of the datasets package."""
    with _one_line_errors(name):
        if field in (rows.column_names or ()):
            rows = rows.select_columns([field])
        for batch in rows.iter(batch_size=ROWS):
            for values in zip(*batch.values(), strict=True):
                yield _text_in(dict(zip(batch, values, strict=True)), field, name)


def _text_in(record: object, field: str, where: str) -> str:
    """The text in the field of a record; null is no text."""
    if not isinstance(record, dict):
        raise UserError(f"{printable(where)} is no JSON object but {type(record).__name__}")
    if field not in record:
        names = ", ".join(printable(name)[:50] for name in list(record)[:20])
        raise UserError(
            f"{printable(where)} has no field {field!r} but {names or 'none'}; give --field=..."
        )
    text = record[field]
    if not isinstance(text, str | None):
        kind = type(text).__name__
        raise UserError(f"{printable(where)}: field {field!r} is no string but {kind}")
    return text or ""


def _import_datasets():
    """The package, silent: the last error says all that its warnings say."""
    import datasets
    import huggingface_hub

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no network for local files
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    return datasets


@contextlib.contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turn what the libraries raise, after their own retries, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of six libraries, which have no base class in common
        is_wrong = isinstance(error, ValueError | _import_datasets().exceptions.DatasetsError)
        advice = "" if is_wrong else "; if it was the network, the same command continues"
        kind = type(error).__name__
        raise UserError(f"{printable(name)}: {kind}: {reason(error)}{advice}") from None


def printable(text: object) -> str:
    """On one line of any terminal, whatever a file is called."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def reason(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__
