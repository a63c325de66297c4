"""Which files hold a split, and the format of each. engine/data/tokens.py reads them.

A split is <split>.bin or several shards. Our meta.json names them. Without it (nanoGPT's and
llm.c's folders) the file names decide: [<prefix>_]<split>[_<digits>].bin. A file starts with
llm.c's header (256 int32: magic number, version, number of tokens, ...) or with its first id.
Nothing but sizes and headers is read, so thousands of shards open fast.
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

HEADER = 1024  # bytes of llm.c's header
# magic number -> version, type of the ids
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
FILE_NAME = re.compile(r"[\w-][\w .-]*")  # in the folder itself
SPLIT_FILE = re.compile(r"(?:([^.].*)_)?([^_.]*[^_.0-9][^_.]*)(?:_([0-9]+))?\.bin")
PAGE = 1 << 12
THREADS = 16  # on a network disk, looking at thousands of files one by one takes minutes


@dataclass(frozen=True)
class Shard:
    """One file of ids, after `header` bytes. sha256: as meta.json states it, or None."""

    path: Path
    dtype: np.dtype
    header: int
    size: int  # of the file, in bytes
    sha256: str | None = None

    def __len__(self) -> int:
        return (self.size - self.header) // self.dtype.itemsize

    def map(self) -> np.ndarray:
        """Its ids (n,), read-only. The pages that are read count as memory until the map is
        dropped."""
        if self.path.stat().st_size != self.size:
            raise UserError(
                f"{self.path} changed while it was used; when it is complete, start again or resume"
            )
        mapped = np.memmap(self.path, self.dtype, "r", self.header, (len(self),))
        return mapped.view(np.ndarray)  # whose slices are faster

    def fingerprint(self) -> str:
        """A hash of its name, size, stated sha256, first and last page."""
        with open(self.path, "rb", buffering=0) as file:
            first = file.read(PAGE)
            file.seek(max(0, self.size - PAGE))
            last = file.read(PAGE)
        about = f"{self.path.name} {self.size} {self.sha256 or ''}"
        return hashlib.sha256(about.encode() + first + last).hexdigest()


def find(folder: Path, split: str, meta: dict | None) -> list[Shard]:
    """The files of a split in their order, with sizes and headers checked; an empty list if
    there are none."""
    meta = meta or {}
    dtype = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<")
    if "splits" not in meta:
        return _find_by_name(folder, split, dtype)
    if split in meta["splits"]:
        return _find_stated(folder, split, meta["splits"][split], dtype)
    path = folder / f"{split}.bin"
    if path.is_file():
        known = ", ".join(meta["splits"])
        raise UserError(f"{path} is no split of this data set, which has {known}; prepare it again")
    return []


def splits_in(folder: Path) -> list[str]:
    """The splits that a folder's token files belong to, by their names."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted({match[2] for match in map(SPLIT_FILE.fullmatch, names) if match})


def _find_stated(folder: Path, split: str, about: dict, dtype: np.dtype) -> list[Shard]:
    """The files that meta.json names; they hold ids only."""
    listed = about.get("shards")
    if listed is None:
        if not (folder / f"{split}.bin").is_file():
            return []
        listed = [about | {"file": f"{split}.bin"}]
    try:
        names = [part["file"] for part in listed]
        is_good = len(names) > 0 and all(map(FILE_NAME.fullmatch, names))
    except (KeyError, TypeError):
        is_good = False
    if not is_good:
        raise UserError(
            f"{folder / 'meta.json'} does not describe the files of {split!r}; prepare it again"
        )

    def find_part(part: dict) -> Shard:
        path = folder / part["file"]
        if not path.is_file():
            raise UserError(f"{path} is missing, but meta.json names it; prepare it again")
        shard = _without_header(path, path.stat().st_size, dtype, part.get("sha256"))
        if len(shard) != part.get("tokens", len(shard)):
            raise UserError(
                f"{path} holds {len(shard):,} tokens, but meta.json says {part['tokens']}; "
                "prepare it again"
            )
        return shard

    return each_of(listed, find_part)


def _find_by_name(folder: Path, split: str, dtype: np.dtype) -> list[Shard]:
    """The files that are named like the split's: all with a header, or all without."""
    by_prefix = {}  # (prefix, whether there is no number) -> (number, name) of each file
    for name in os.listdir(folder) if folder.is_dir() else []:
        match = SPLIT_FILE.fullmatch(name)
        if match and match[2] == split and (folder / name).is_file():
            found = by_prefix.setdefault((match[1], match[3] is None), [])
            found.append((int(match[3] or 0), name))
    if len(by_prefix) > 1:
        names = " and ".join(sorted(min(found)[1] for found in by_prefix.values()))
        raise UserError(
            f"{folder} has {names}: which is the {split} split? keep only its files there"
        )
    paths = [folder / name for found in by_prefix.values() for _, name in sorted(found)]
    shards = each_of(paths, lambda path: _by_header(path, dtype))
    for shard in shards:
        if shard.dtype != shards[0].dtype:
            raise UserError(f"{shards[0].path} and {shard.path.name} have ids of two types")
    return shards


def _by_header(path: Path, dtype: np.dtype) -> Shard:
    """A file with llm.c's header, or of ids only.

    The magic numbers, read as ids, are not in GPT-2's vocabulary: a damaged header is refused,
    never read as ids."""
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        magic, version, n = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
    if magic not in FORMATS:
        return _without_header(path, size, dtype)
    expected_version, dtype = FORMATS[magic]
    expected_size = HEADER + n * dtype.itemsize
    if n < 1 or (version, size) != (expected_version, expected_size):
        raise UserError(
            f"{path} is damaged or of another version: its header says version {version} "
            f"and {n:,} tokens, which is {expected_size:,} bytes, but it has {size:,}; get it "
            f"again, or write it with today's llm.c (version {expected_version})"
        )
    return Shard(path, dtype, HEADER, size)


def _without_header(path: Path, size: int, dtype: np.dtype, sha256: str | None = None) -> Shard:
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"{path} has {size} bytes: not whole {dtype.name} ids; prepare it again")
    return Shard(path, dtype, 0, size, sha256)


def each_of(items: Iterable, function: Callable) -> list:
    """function(item) of each, in their order, by several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def joined(hashes: Iterable[str]) -> str:
    """One sha256 for several files: of their hexadecimal hashes, one on each line."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
