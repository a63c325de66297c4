"""Where text comes from: files of any size, or a data set of the hub, as parts that give their documents in pieces.

A piece is about 1 MB of text, so memory is bounded whatever the size. A part gives the same pieces each time and is
read from its begin: who goes on behind some of its pieces passes over these.
"""

import contextlib
import functools
import glob
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.base.errors import UserError
from engine.data.formats import (
    CHUNK,
    FORMATS,
    KNOWN,
    ROWS,
    TEXT,
    How,
    endings,
    identity_of,
    listed,
    opened,
    printable,
    reason,
)

PIECE, LONGEST_PIECE = (
    1 << 20,
    1 << 24,
)  # characters: cut at the first place after so many; after so many anywhere
# Where GPT-2's pattern cuts whatever stands around it. Python's \s is all that Rust's and Oniguruma's is, and a little
# more (\x1c to \x1f): its \S is a space to none of them.
PLACE = re.compile(r"\S(?=[ \n])")


class Piece(NamedTuple):
    text: str  # never empty
    first: bool  # whether a document begins with it
    # bytes of its part that had been read by then (on the disk; of a hub's data set: of text)
    read: int


@dataclass(frozen=True)
class Part:
    """A file, or one file of a hub's data set: what can be read from its begin alone."""

    name: str  # for messages
    size: int  # bytes on the disk; 0: unknown
    identity: (
        str  # by which a change of it is seen: path, size and mtime_ns, or the hub's name for it
    )
    pieces: Callable[[], Iterator[Piece]]  # the same ones each time


def in_pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pieces (text, whether a document begins) that joined are the documents, but for those of whitespace alone."""
    return _cut((document, True) for document in documents)


def _cut(texts: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """The same of texts that come with whether their document ends there."""
    held, first = "", True
    for text, ends in texts:
        begin, search = 0, max(PIECE, len(held) - 1)  # what was held has been searched
        held += text
        while len(held) - begin > PIECE:
            if place := PLACE.search(held, search, begin + LONGEST_PIECE):
                cut = place.end()
            elif len(held) - begin >= LONGEST_PIECE:
                # may cost a token or two more than the text in one piece; and so much whitespace is a document
                cut = begin + LONGEST_PIECE
            else:
                break
            yield held[begin:cut], first
            begin, search, first = cut, cut + PIECE, False
        held = held[begin:]
        if ends:
            if held and not (first and held.isspace()):
                yield held, first
            held, first = "", True


def find(
    source: str, field: str = "text", separator: str = "", errors: str = "strict"
) -> list[Part]:
    """The files that the source names (files, folders, globs, with commas between), each once, in order."""
    if errors not in ("strict", "replace"):
        raise UserError(f"--errors={errors}: strict or replace")
    paths = {}
    for item in [source] if os.path.exists(source) else filter(None, source.split(",")):
        for path in _paths(item):
            paths.setdefault(os.path.realpath(path), path)
    if not paths:
        raise UserError("which text? give files, folders or globs, with commas between")
    hows = [
        How(printable(path), *endings(path), field, separator, errors) for path in paths.values()
    ]
    if separator and not any(how.ending in TEXT for how in hows):
        raise UserError(
            "a separator is for plain text; these files say themselves where their documents end"
        )
    return [_part(path, how) for path, how in zip(paths.values(), hows, strict=True)]


def _paths(item: str) -> list[str]:
    """A folder's files of known formats, hidden ones passed over; or the files that the path or glob names."""
    if os.path.isdir(item):
        if found := [path for path in files_below(item) if endings(path)[0]]:
            return sorted(found)
        raise UserError(f"{printable(item)} holds no file of a known format; known: {KNOWN}")
    found = (
        [item]
        if os.path.exists(item)
        else sorted(p for p in glob.glob(item, recursive=True) if os.path.isfile(p))
    )
    if not found:
        raise UserError(f"{printable(item)} does not exist, and no file matches it")
    for path in found:
        if not endings(path)[0]:
            raise UserError(f"{printable(path)} has no known ending; known: {KNOWN}")
    return found


def files_below(folder: str) -> Iterator[str]:
    """The files in a folder and those below, through links too, but into each folder once: links may form a circle."""
    seen = set()
    for root, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        seen_before = (real := os.path.realpath(root)) in seen
        seen.add(real)
        folders[:] = (
            [] if seen_before else sorted(name for name in folders if not name.startswith("."))
        )
        if not seen_before:
            yield from (os.path.join(root, name) for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {printable(error.filename)}: {error.strerror}")


def _part(path: str, how: How) -> Part:
    try:
        identity, about = identity_of(path), os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {how.name}: {error.strerror}") from None
    if not stat.S_ISREG(about.st_mode) or not os.access(path, os.R_OK):
        raise UserError(f"cannot read {how.name}: it is no regular file, or not yours to read")
    return Part(
        how.name,
        about.st_size,
        identity,
        functools.partial(_pieces, os.path.abspath(path), identity, how),
    )


def _pieces(path: str, identity: str, how: How) -> Iterator[Piece]:
    with opened(path, identity, how) as (stream, raw):
        read = since = 0
        for text, first in _cut(FORMATS[how.ending](stream, how)):
            since += len(text)
            if since > CHUNK:  # to ask costs as much as to read a short document
                read, since = raw.tell(), 0
            yield Piece(text, first, read)


def hub(name: str, subset: str = "", split: str = "train", field: str = "text") -> list[Part]:
    """The files of one split of a data set on the Hugging Face hub, streamed: nothing of it stays on the disk. The name
    may say a revision: NAME@refs/convert/parquet.

    In memory is what datasets holds at a time: of .parquet a row group, mostly some MB, and up to three times over."""
    rows, files = _streamed(name, subset, split, field)
    n_bytes, parts = getattr((rows.info.splits or {}).get(split), "num_bytes", 0) or 0, []
    for i, file in enumerate(files):
        title = " ".join([*filter(None, (name, subset, split)), f"{i + 1}/{len(files)}"])
        file = identity_of(file) if os.path.exists(file) else file
        pieces = functools.partial(_hub_pieces, rows, len(files), i, field, printable(title))
        parts.append(Part(printable(title), n_bytes // len(files), f"{title} {file}", pieces))
    return parts


def hub_texts(
    name: str, subset: str = "", split: str = "train", field: str = "text"
) -> Iterator[str]:
    """All texts of one split, the empty ones too: for a data set whose rows are lines."""
    rows, files = _streamed(name, subset, split, field)
    for i in range(len(files)):
        yield from _hub_texts(rows, len(files), i, field, printable(f"{name} {subset} {split}"))


def _streamed(name: str, subset: str, split: str, field: str) -> tuple:
    """The rows of a split, and the addresses of its files, which hold the revision."""
    with _asking(name):
        builder = _datasets().load_dataset_builder(**_named(name, subset))
        rows = builder.as_streaming_dataset(split=split)
        columns, n = rows.column_names, rows.num_shards
    if columns is not None and field not in columns:
        raise UserError(
            f"{printable(name)} has no column {field!r} but {listed(columns)}; give --field=..."
        )
    files = list((builder.config.data_files or {}).get(split, []))
    return rows, files if len(files) == n else [""] * n


def hub_splits(name: str, subset: str = "") -> list[str]:
    """The names of the splits that a data set on the hub has."""
    with _asking(name):
        return list(_datasets().get_dataset_split_names(**_named(name, subset)))


def _named(name: str, subset: str) -> dict:
    """What datasets' functions want to know of NAME or NAME@REVISION, or a local folder."""
    if not name:
        raise UserError("which data set of the hub? hub:NAME")
    path, revision = (name, "") if os.path.exists(name) else name.partition("@")[::2]
    key = {"name": subset} if subset else {}
    return {"path": path} | key | ({"revision": revision} if revision else {})


def _datasets():
    """The package, silent: what it says of an attempt the last error says too."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    return datasets


@contextlib.contextmanager
def _asking(what: str) -> Iterator[None]:
    """Whatever the hub's libraries raise, after the attempts that they make themselves, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, httpx, aiohttp, fsspec and pyarrow: no base in common
        way_out = "; if it was the network, the same command goes on where this one stopped"
        if isinstance(error, ValueError | _datasets().exceptions.DatasetsError):
            way_out = ""
        elif "scripts are no longer" in str(error):
            way_out = (
                f"; the hub may have it as parquet too: {printable(what)}@refs/convert/parquet"
            )
        raise UserError(
            f"{printable(what)}: {type(error).__name__}: {reason(error)}{way_out}"
        ) from None


def _hub_pieces(rows, n: int, i: int, field: str, name: str) -> Iterator[Piece]:
    read = 0
    for text, first in in_pieces(_hub_texts(rows, n, i, field, name)):
        read += len(text.encode())
        yield Piece(text, first, read)


def _hub_texts(rows, n: int, i: int, field: str, name: str) -> Iterator[str]:
    with _asking(name):
        shard = rows.shard(num_shards=n, index=i)
        shard = shard.select_columns([field]) if rows.column_names is not None else shard
        for batch in shard.iter(batch_size=ROWS):
            if field not in batch:
                raise UserError(
                    f"{name} has no column {field!r} but {listed(batch)}; give --field=..."
                )
            for text in batch[field]:
                if not isinstance(text, str | None):
                    raise UserError(
                        f"{name}: its column {field!r} is no string but {type(text).__name__}"
                    )
                yield text or ""
