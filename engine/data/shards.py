"""The files of a split: which they are, and what each is. engine/data/row.py reads them.

A split is <split>.bin or several shards. meta.json names ours. Of folders without it, nanoGPT's and llm.c's, the names
tell: [<prefix>_]<split>[_<digits>].bin; and a file begins with llm.c's header (256 int32: magic, version, number of
tokens) or with its first id. Of thousands of shards each costs no more than a look at its size and first bytes.
"""

import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.base.errors import UserError
from engine.data.scan import Scan

HEADER = 1024  # bytes of llm.c's header
FORMATS = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}  # magic number: version, type of the ids
NAME = re.compile(r"[\w-][\w .-]*")  # of a file in the same folder
LOOKS = 16  # files looked at together: over a network one after the other takes minutes


@dataclass(slots=True, eq=False)
class Shard:
    """One file: ids behind a header of so many bytes. sha256: what meta.json says; scan: what was found, once it is."""

    path: Path
    dtype: np.dtype
    header: int
    size: int  # bytes of the file
    sha256: str | None = None
    scan: Scan | None = None

    def __len__(self) -> int:
        return (self.size - self.header) // self.dtype.itemsize


def find(folder: Path, split: str, meta: dict | None) -> list[Shard]:
    """The split's files in their order, sizes and headers checked; an empty list where there is none."""
    dtype = np.dtype((meta or {}).get("dtype", "uint16")).newbyteorder("<")
    splits = (meta or {}).get("splits")
    if splits is None:
        return _found(folder, split, dtype)
    path = folder / f"{split}.bin"
    if split in splits:
        return _stated(folder, split, splits[split], dtype)
    if path.is_file():
        raise UserError(
            f"{path} is no split of this data set, which has {', '.join(splits)}; prepare it again"
        )
    return []


def splits_in(folder: Path) -> list[str]:
    """The splits that the names of the token files in a folder tell."""
    pattern = re.compile(r"(?:[^.].*_)?([^_.]*[^_.0-9][^_.]*)(?:_[0-9]+)?\.bin")
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted({match[1] for match in map(pattern.fullmatch, names) if match})


def _stated(folder: Path, split: str, about: dict, dtype: np.dtype) -> list[Shard]:
    """The files that meta.json names: ids alone."""
    several, wrong = (
        "shards" in about,
        f"{folder / 'meta.json'} does not describe the files of {split!r}",
    )
    try:
        listed = about["shards"] if several else [about | {"file": f"{split}.bin"}]
        names = [shard["file"] for shard in listed]
        sizes = [shard["tokens"] if several else shard.get("tokens") for shard in listed]
        sums = [shard["sha256"] if several else shard.get("sha256") for shard in listed]
        good = (
            names and len(set(names)) == len(names) and all(NAME.fullmatch(name) for name in names)
        )
        good = good and all(isinstance(sha256, str if several else str | None) for sha256 in sums)
        good = good and (not several or about.get("tokens", sum(sizes)) == sum(sizes))
        good = good and (not several or about.get("sha256", joined(sums)) == joined(sums))
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{wrong}; prepare it again")
    paths = [folder / name for name in names]
    if not several and not paths[0].is_file():
        return []
    found = each_of(paths, _size)
    return [
        _raw(*shard) for shard in zip(paths, found, [dtype] * len(paths), sizes, sums, strict=True)
    ]


def _found(folder: Path, split: str, dtype: np.dtype) -> list[Shard]:
    """The files that have the names of the split's, each with a header or each without."""
    pattern, kinds = re.compile(rf"(?:([^.].*)_)?{re.escape(split)}(?:_([0-9]+))?\.bin"), {}
    for entry in os.scandir(folder) if folder.is_dir() else []:
        if (match := pattern.fullmatch(entry.name)) and entry.is_file():
            kinds.setdefault((match[1], match[2] is None), []).append(
                (int(match[2] or 0), entry.name)
            )
    if len(kinds) > 1:
        names = " and ".join(sorted(min(kind)[1] for kind in kinds.values()))
        raise UserError(
            f"{folder} has {names}: which is the {split} split? leave the files of one there"
        )
    paths = [folder / name for kind in kinds.values() for _, name in sorted(kind)]
    shards = [
        _with_header(path, *look, dtype)
        for path, look in zip(paths, each_of(paths, _look), strict=True)
    ]
    for shard in shards:
        if (shard.header, shard.dtype) != (shards[0].header, shards[0].dtype):
            raise UserError(
                f"{shards[0].path} and {shard.path.name} are of two formats; one split has one format"
            )
    return shards


def _with_header(path: Path, size: int, head: bytes, dtype: np.dtype) -> Shard:
    """A header is one if magic number, version and size agree; what only looks like one is refused, never read as ids
    (as GPT-2's, the magic numbers would be above the vocabulary)."""
    magic, version, n = struct.unpack("<3i", head.ljust(12, b"\0"))
    if magic not in FORMATS:
        return _raw(path, size, dtype)
    wanted, dtype = FORMATS[magic]
    if version != wanted:
        raise UserError(
            f"{path} begins as a file of llm.c's, of version {version}, not {wanted}; write it anew with today's "
            "llm.c, or, if these are ids alone, describe the split in a meta.json"
        )
    expected = HEADER + n * dtype.itemsize
    if n < 1 or size != expected:
        raise UserError(
            f"{path} is cut short or damaged: its header says {n:,} tokens, which makes {expected:,} bytes, and it has "
            f"{size:,}; get it again"
        )
    return Shard(path, dtype, HEADER, size)


def _raw(
    path: Path, size: int, dtype: np.dtype, expected: int | None = None, sha256: str | None = None
) -> Shard:
    if size < 0:
        raise UserError(f"{path} is missing, which meta.json names; prepare it again")
    n, rest = divmod(size, dtype.itemsize)
    if n == 0 or rest:
        raise UserError(f"{path} has {size} bytes: no whole {dtype.name} ids; prepare it again")
    if expected not in (None, n):
        raise UserError(f"{path} holds {n:,} tokens, meta.json says {expected:,}; prepare it again")
    return Shard(path, dtype, 0, size, sha256)


def each_of(paths: Iterable, look: Callable) -> list:
    """What look() says of each, in their order."""
    with ThreadPoolExecutor(LOOKS) as pool:
        return list(pool.map(look, paths))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _look(path: Path) -> tuple[int, bytes]:
    """A file's size and its first bytes."""
    with open(path, "rb", buffering=0) as file:
        return os.fstat(file.fileno()).st_size, file.read(12)


def joined(digests: Iterable[str]) -> str:
    """One sha256 for several files, of their hashes in hexadecimal digits, a line each."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
