"""Reading large files in pieces, and the one pass over a token file that tells what is in it.

The pass gives the sha256 and how often each id occurs. It is remembered in a small file beside the data, for as long as
the data's size and times stay as they are; a folder that cannot be written to is read again by each run.
"""

import contextlib
import hashlib
import json
import mmap
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.base.errors import UserError
from engine.base.files import atomic_write

CHUNK = 1 << 20  # ids in one go: few enough that counting them stays near the processor's cache
MOST_IDS = 1 << 24  # no vocabulary is as large; a damaged id of 4 billion would take 32 GB to count
SETTLED = (
    2 * 10**9
)  # ns; a file that changed later than this before its scan may change again at the same file time


class Reader:
    """A file that stays open, so that one put in its place does not matter, and is read rather than mapped: the pages
    of a mapping count as the process's memory for as long as it lasts, and one behind a new end kills the process.

    header: so many bytes come before the first one that is asked for."""

    def __init__(self, path: Path, header: int = 0):
        self.path, self.header, self.lock = path, header, threading.Lock()
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 open for as long as there is a reader
        weakref.finalize(self, self.file.close)
        self.size = os.fstat(self.file.fileno()).st_size

    def pieces(self, starts: np.ndarray, size: int) -> bytes:
        """size bytes from each of the starts, one piece behind the other."""
        found = []
        with self.lock:  # Windows has no os.pread
            for start in starts.tolist():
                self.file.seek(self.header + start)
                found.append(self.file.read(size))
        if len(data := b"".join(found)) != len(starts) * size:
            raise self.changed()
        return data

    def mapped(self, dtype: str | np.dtype) -> np.ndarray:
        """All behind the header, read-only; the pages that are looked at count as memory until the array is let go."""
        try:
            mapping = mmap.mmap(self.file.fileno(), self.size, access=mmap.ACCESS_READ)
            return np.frombuffer(mapping, dtype, offset=self.header)
        except ValueError:  # more than there is
            raise self.changed() from None

    def scan(self, dtype: np.dtype, recall: bool = True) -> "Scan":
        """What the whole file holds, from the memory of an earlier scan where there is one and recall allows it."""
        with self.lock, open(os.dup(self.file.fileno()), "rb") as file:
            key = _key(file, dtype, self.header)
            found = _recall(self.path, key) if recall else None
            if not found:
                file.seek(0)
                found = _scan(file, dtype, key)
            if key["size"] != self.size or _key(file, dtype, self.header) != key:
                raise self.changed()
        return found

    def key(self, dtype: np.dtype) -> dict:
        """What tells whether the file is still the one that was scanned."""
        return _key(self.file, dtype, self.header)

    def changed(self) -> UserError:
        way_out = "when whatever writes it is done, start again or resume"
        return UserError(f"{self.path} changed while it was read; {way_out}")


@dataclass(frozen=True, eq=False)
class Scan:
    """key: the file's size, times, dtype and header; time_ns: of the scan's begin; sha256: of all bytes; counts: of the
    ids up to the highest one."""

    key: dict
    time_ns: int
    sha256: str
    highest: int
    counts: list[int]


def remember(path: Path, scan: Scan) -> None:
    """Write a scan down, for a file that has passed all checks; several processes may do so at once."""
    if scan.time_ns - scan.key["ctime_ns"] < SETTLED or _recall(path, scan.key):
        return
    memory = json.dumps({"scan": asdict(scan), "check": _check(asdict(scan))})
    with contextlib.suppress(OSError):  # no permission, no space: the next run reads the file again
        atomic_write(_memory(path), lambda temporary: temporary.write_text(memory))


def looks_like(head: bytes, vocab_size: int) -> str:
    """As which numbers, if any, the first bytes of what should be uint16 are ids of the vocabulary, most not 0."""
    if head.startswith(b"\x93NUMPY"):
        return ".npy"
    for name in ("int64", "float64", "int32", "float32"):
        values = np.frombuffer(head[: len(head) // 8 * 8], np.dtype(name).newbyteorder("<"))
        with np.errstate(invalid="ignore"):  # bytes of text make floats of any kind
            good = (values >= 0) & (values < vocab_size) & (values == np.floor(values))
        if len(values) >= 64 and good.all() and (values > 0).mean() > 0.5:
            return name
    return ""


def _scan(file: BinaryIO, dtype: np.dtype, key: dict) -> Scan:
    started, sha256, highest = time.time_ns(), hashlib.sha256(), 0
    counts, buffer = np.zeros(0, np.int64), np.empty(CHUNK, dtype)
    sha256.update(file.read(key.get("header", 0)))
    with ThreadPoolExecutor(1) as counter:  # counting takes as long as hashing does
        while n := file.readinto(buffer) // dtype.itemsize:
            ids = buffer[:n]
            highest = max(highest, int(ids.max()))
            of_chunk = (
                counter.submit(np.bincount, ids, minlength=len(counts))
                if highest < MOST_IDS
                else None
            )
            sha256.update(ids)
            if of_chunk:
                earlier, counts = counts, of_chunk.result()
                counts[: len(earlier)] += earlier
    return Scan(key, started, sha256.hexdigest(), highest, counts.tolist())


def _key(file: BinaryIO, dtype: np.dtype, header: int) -> dict:
    about = os.fstat(file.fileno())
    times = {"mtime_ns": about.st_mtime_ns, "ctime_ns": about.st_ctime_ns}
    return (
        {"size": about.st_size, "dtype": dtype.name}
        | times
        | ({"header": header} if header else {})
    )


def _memory(path: Path) -> Path:
    return path.with_name(f".{path.stem}.scanned.json")


def _recall(path: Path, key: dict) -> Scan | None:
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # none, or a damaged one: as if there were none
        memory = json.loads(_memory(path).read_text())
        if memory["check"] == _check(memory["scan"]) and memory["scan"]["key"] == key:
            return Scan(**memory["scan"])
    return None


def _check(scan: dict) -> str:
    return hashlib.sha256(json.dumps(scan, sort_keys=True).encode()).hexdigest()
