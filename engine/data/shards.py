"""Find the files of a split and the format of each. engine/data/tokens.py reads them.

A split is one file, <split>.bin, or several shards. Our meta.json lists them. Without it, as in
nanoGPT's folders, they are found by name: [<prefix>_]<split>[_<digits>].bin. Only sizes and first
ids are read, so thousands of shards open fast.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.base.errors import UserError

SPLIT_FILE = re.compile(r"(?:([^.].*)_)?([^_.]*[^_.0-9][^_.]*)(?:_([0-9]+))?\.bin")
PAGE = 1 << 12


@dataclass(frozen=True)
class Shard:
    """A file of ids. sha256: from meta.json, or None."""

    path: Path
    dtype: np.dtype
    size: int  # of the file, in bytes
    sha256: str | None = None

    def __len__(self) -> int:
        return self.size // self.dtype.itemsize

    def map(self) -> np.ndarray:
        """Its ids (n,), read-only. Pages that were read take memory until the map is freed."""
        if self.path.stat().st_size != self.size:
            raise UserError(
                f"{self.path} changed while it was used; when it is complete, start again or resume"
            )
        mapped = np.memmap(self.path, self.dtype, "r", 0, (len(self),))
        return mapped.view(np.ndarray)  # slicing it is faster

    def fingerprint(self) -> str:
        """A hash of its name, size, sha256 in meta.json, first and last page."""
        with open(self.path, "rb", buffering=0) as file:
            first = file.read(PAGE)
            file.seek(max(0, self.size - PAGE))
            last = file.read(PAGE)
        about = f"{self.path.name} {self.size} {self.sha256 or ''}"
        return hashlib.sha256(about.encode() + first + last).hexdigest()


def find(folder: Path, split: str, meta: dict | None) -> list[Shard]:
    """The files of a split in order, after a check of sizes; [] if there are none."""
    meta = meta or {}
    dtype = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<")
    parts = []
    if "splits" not in meta:
        parts = [{"file": name} for name in _find_by_name(folder, split)]
    elif about := meta["splits"].get(split):
        parts = about.get("shards", [about | {"file": f"{split}.bin"}])
    return [_shard(folder, part, dtype) for part in parts]


def splits_in(folder: Path) -> list[str]:
    """The splits of a folder, by the names of its token files."""
    return sorted({match[2] for match in _token_files(folder)})


def _token_files(folder):
    names = os.listdir(folder) if folder.is_dir() else []
    return [match for match in map(SPLIT_FILE.fullmatch, names) if match]


def _find_by_name(folder, split):
    """The names of a split's files, in the order of their numbers."""
    found = [match for match in _token_files(folder) if match[2] == split]
    found.sort(key=lambda match: (int(match[3] or 0), match[0]))
    kinds = {(match[1], match[3] is None) for match in found}
    if len(kinds) > 1:
        names = ", ".join(match[0] for match in found[:3])
        raise UserError(
            f"{folder} has {names}: which is the {split} split? move the other files away"
        )
    return [match[0] for match in found]


def _shard(folder, part, dtype):
    """A file of a split. part: its entry in meta.json; without meta.json, only its name."""
    path = folder / part["file"]
    if not path.is_file():
        raise UserError(f"{path} is missing, but meta.json lists it; prepare the data again")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, which is not a whole number of {dtype.name} ids; prepare "
            "the data again"
        )
    shard = Shard(path, dtype, size, part.get("sha256"))
    stated = part.get("tokens", len(shard))
    if len(shard) != stated:
        raise UserError(
            f"{path} holds {len(shard):,} tokens, but meta.json says {stated}; prepare the data "
            "again"
        )
    ids = np.fromfile(path, dtype, 0 if shard.sha256 else PAGE)
    is_wide = ids[::2].any() and not ids[1::2].any()  # no text has a 0 at every other position
    if is_wide and dtype.itemsize == 2 and len(ids) > 64:
        raise UserError(
            f"{path} holds ids of 4 or 8 bytes; write it again with ids.astype(np.uint16)"
        )
    return shard


def joined(hashes: Iterable[str]) -> str:
    """One sha256 for several files: that of their hexadecimal hashes, one per line."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
