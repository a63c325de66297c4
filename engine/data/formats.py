"""How a file's bytes become texts: its compression, its encoding, its format, and what can be wrong with each.

A reader yields (text, whether a document ends there), in the file's order, a bounded part of the file at a time.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from engine.base.errors import UserError

CHUNK, ROWS = 1 << 20, 64  # bytes of a file, rows of a table that are read at a time
LONGEST_LINE = 1 << 28  # bytes of a line of JSON, which is read whole
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


class How(NamedTuple):
    """How to read a file, and what to call it."""

    name: str
    ending: str
    compression: str
    field: str
    separator: str
    errors: str


@contextlib.contextmanager
def opened(path: str, identity: str, how: How) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The bytes, decompressed, and the file itself; refused unless it is the same from its listing to its end."""
    try:
        same = identity_of(path) == identity
        if same:
            with open(path, "rb", buffering=CHUNK) as raw:
                yield (
                    (io.BufferedReader(_decompressed(raw, how), CHUNK) if how.compression else raw),
                    raw,
                )
            same = identity_of(path) == identity
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if (
            isinstance(error, OSError) and error.errno
        ):  # of the system; the decompressors' own have none
            raise UserError(f"cannot read {how.name} any more: {error.strerror}") from None
        raise UserError(f"{how.name} is cut short or damaged ({reason(error)})") from None
    if not same:
        raise UserError(f"{how.name} has changed since it was found; run the same command again")


def identity_of(path: str) -> str:
    about = os.stat(path)
    return f"{os.path.abspath(path)} {about.st_size} {about.st_mtime_ns}"


def _decompressed(raw: BinaryIO, how: How) -> BinaryIO:
    if not raw.peek(1):  # to gzip no text at all, but nothing that compresses makes an empty file
        raise EOFError("it is empty")
    if how.compression == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(raw, "zstd")
    if how.compression == ".gz":
        return gzip.open(raw)
    return _Decompressed(
        raw, bz2.BZ2Decompressor if how.compression == ".bz2" else lzma.LZMADecompressor
    )


class _Decompressed(io.RawIOBase):
    """Of .bz2 and .xz, one stream or many. Unlike the standard library's files it does not take a damaged stream behind
    a whole one for the end: most of a file of many streams could be gone, and nobody told."""

    def __init__(self, raw: BinaryIO, new: Callable):
        self.raw, self.new, self.stream, self.data = raw, new, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        text = b""
        while not text:
            if not self.data and (self.stream is None or self.stream.needs_input):
                self.data = self.raw.read(
                    CHUNK >> 4
                )  # not more: what a short stream leaves of it is copied
                if not self.data and self.stream is None:
                    return 0
                if not self.data:
                    raise EOFError("it ends too soon")
            if self.stream is None:
                self.data = self.data.lstrip(b"\0")  # .xz may be padded with them
                self.stream = self.new() if self.data else None
            if self.stream is not None:
                text, self.data = self.stream.decompress(self.data, len(buffer)), b""
                if self.stream.eof:
                    self.stream, self.data = None, self.stream.unused_data
        buffer[: len(text)] = text
        return len(text)


def _text(stream: BinaryIO, how: How) -> Iterator[tuple[str, bool]]:
    """Chunks of a text and whether a document ends there: at each separator, and at the end."""
    held, overlap = (
        "",
        max(0, len(how.separator) - 1),
    )  # so much of a chunk's end can begin a separator
    for text in _decoded(stream, how):
        held += text
        if how.separator:
            *documents, held = held.split(how.separator)
            yield from ((document, True) for document in documents)
        if (safe := len(held) - overlap) > 0:
            yield held[:safe], False
            held = held[safe:]
    yield held, True


def _decoded(stream: BinaryIO, how: How) -> Iterator[str]:
    decoder, offset, begins = codecs.getincrementaldecoder("utf-8")(how.errors), 0, True
    while data := stream.read(CHUNK):
        yield (text := _decode(decoder, data, offset, how)).removeprefix("\ufeff" if begins else "")
        offset, begins = offset + len(data), begins and not text
    yield _decode(decoder, b"", offset, how)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, offset: int, how: How) -> str:
    try:
        return decoder.decode(data, final=not data)
    except (
        UnicodeDecodeError
    ) as error:  # its object begins with the bytes that the decoder had kept
        raise _not_utf8(how, offset + len(data) - len(error.object) + error.start) from None


def _not_utf8(how: How, offset: int) -> UserError:
    where = f"byte {offset:,}{' of what it decompresses to' if how.compression else ''}"
    return UserError(f"{how.name} is not UTF-8 at {where}; --errors=replace goes on")


def _jsonl(stream: BinaryIO, how: How) -> Iterator[tuple[str, bool]]:
    offset = 0
    for number in itertools.count(1):
        if not (line := stream.readline(LONGEST_LINE)):
            return
        where = f"{how.name}, line {number:,}"
        if len(line) == LONGEST_LINE:
            raise UserError(
                f"{where} has more than {LONGEST_LINE >> 20} MB; is it one JSON object a line?"
            )
        try:
            text = line.decode("utf-8", how.errors).removeprefix("\ufeff" if number == 1 else "")
        except UnicodeDecodeError as error:
            raise _not_utf8(how, offset + error.start) from None
        if text and not text.isspace():
            yield _field(text, where, how), True
        offset += len(line)


def _field(line: str, where: str, how: How) -> str:
    """The string under the field in a line of JSON; null is no text."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({reason(error)})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object but {type(record).__name__}")
    if how.field not in record:
        raise UserError(
            f"{where} has no field {how.field!r} but {listed(record) or 'none'}; give --field=..."
        )
    text = record[how.field]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: its field {how.field!r} is no string but {type(text).__name__}")
    escapes = (
        text and not text.isascii() and ("\\ud" in line or "\\uD" in line)
    )  # nothing else can make one
    if escapes and LONE_SURROGATE.search(text):
        if how.errors == "strict":
            raise UserError(
                f"{where} is not UTF-8: it has half a surrogate pair; --errors=replace goes on"
            )
        text = LONE_SURROGATE.sub("\ufffd", text)
    return text or ""


def _parquet(stream: BinaryIO, how: How) -> Iterator[tuple[str, bool]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(stream, buffer_size=CHUNK, page_checksum_verification=True)
        schema = file.schema_arrow
        if how.field not in schema.names:
            raise UserError(
                f"{how.name} has no column {how.field!r} but {listed(schema.names)}; give --field=..."
            )
        kind = schema.field(how.field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (pa.string(), pa.large_string(), pa.string_view()):
            raise UserError(f"{how.name}: its column {how.field!r} is no string but {kind}")
        for batch in file.iter_batches(ROWS, columns=[how.field]):
            column = batch.column(0)
            column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            for data in column.cast(
                pa.large_binary()
            ).to_pylist():  # bytes, which nobody has checked yet
                number += 1
                yield (data or b"").decode("utf-8", how.errors), True
        if number != file.metadata.num_rows:  # a damaged footer can have the reader stop early
            raise UserError(
                f"{how.name} is damaged: it has {number:,} rows and says {file.metadata.num_rows:,}"
            )
    except UnicodeDecodeError:
        raise UserError(
            f"{how.name}, row {number:,} is not UTF-8; --errors=replace goes on"
        ) from None
    except pa.ArrowException as error:
        raise UserError(f"{how.name} is cut short or damaged ({reason(error)})") from None


TEXT = (".txt", ".md", ".text", ".raw", ".tokens")
FORMATS = {**dict.fromkeys(TEXT, _text), ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KNOWN = f"{' '.join(FORMATS)}, all but the last also with {' '.join(COMPRESSED)} behind (jq -c .[] makes .json .jsonl)"


def endings(path: str) -> tuple[str, str]:
    """The ending that tells the format and that of the compression: .jsonl and .gz; the first is empty if unknown."""
    stem, ending = os.path.splitext(path.lower())
    compression = ending if ending in COMPRESSED else ""
    ending = os.path.splitext(stem)[1] if compression else ending
    known = ending in FORMATS and not (compression and FORMATS[ending] is _parquet)
    return (ending if known else "", compression)


def printable(text: str) -> str:
    """On one line of any terminal, whatever a file is called."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def listed(names: Iterable[str]) -> str:
    names = [printable(name)[:50] for name in names]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def reason(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__
