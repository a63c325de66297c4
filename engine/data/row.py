"""Shards read as one row of ids: few files are open at a time, and each file is checked as a whole once.

A split of one file, or of several that are not large in all, is checked before anything is read. Of a larger one each
shard is checked when it is read from for the first time, and the ids that are read are held against the vocabulary.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import replace

import numpy as np

from engine.base.errors import UserError
from engine.data.scan import Reader, Scan, looks_like, remember
from engine.data.shards import Shard, each_of, joined

WHOLE = 1 << 32  # bytes; several shards that are more in all are not read before they are needed
OPEN = 32  # files; a process may have some 1,000
HEAD = 1 << 16  # bytes by which a file is judged


class Row:
    """counts: how often each id occurs in the shards scanned so far; not of a large row."""

    def __init__(self, shards: list[Shard]):
        self.shards, self.dtype = shards, shards[0].dtype
        self.ends = np.array([len(shard) for shard in shards]).cumsum()
        # a single file has to be read from end to end before its first block in any case
        self.is_large = len(shards) > 1 and sum(shard.size for shard in shards) > WHOLE
        self.counts = np.zeros(0, np.int64)
        self._open, self._lock = OrderedDict(), threading.RLock()
        if len(shards) == 1:
            self.reader(0)  # from now on, whatever is put in the file's place

    def which(self, positions: np.ndarray) -> np.ndarray:
        """The numbers of the shards in which these positions lie; behind the end the last one's."""
        return self.ends.searchsorted(positions, side="right").clip(max=len(self.shards) - 1)

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(len(starts), length): the ids from each of the starts on, whichever shards they lie in."""
        shards = {*self.which(starts).tolist(), *self.which(starts + (length - 1)).tolist()}
        if len(shards) == 1:
            data = self._pieces(shards.pop(), starts, length)
        else:
            data = b"".join(self._across(start, length) for start in starts.tolist())
        return np.frombuffer(data, self.dtype).reshape(len(starts), length)

    def _across(self, start: int, length: int) -> bytes:
        pieces = []
        while length > 0:
            k = int(self.which(start))
            n = min(length, int(self.ends[k]) - start) if k < len(self.shards) - 1 else length
            pieces.append(self._pieces(k, np.array([start]), n))
            start, length = start + n, length - n
        return b"".join(pieces)

    def _pieces(self, k: int, starts: np.ndarray, length: int) -> bytes:
        begin, size = self.ends[k] - len(self.shards[k]), self.dtype.itemsize
        return self.reader(k).pieces((starts - begin) * size, length * size)

    def reader(self, k: int) -> Reader:
        """Shard k, opened; the one that nobody has asked for the longest is let go."""
        with self._lock:
            self._open[k] = reader = self._open.pop(k, None) or self._opened(self.shards[k])
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        return reader

    def _opened(self, shard: Shard) -> Reader:
        reader = Reader(shard.path, shard.header)
        if reader.size != shard.size:
            raise reader.changed()
        if shard.scan and shard.scan.key != reader.key(self.dtype):  # touched, or another file
            if shard.scan.sha256 != (scan := reader.scan(self.dtype)).sha256:
                raise reader.changed()
            shard.scan = replace(scan, counts=[])
        return reader

    def scan(self, k: int, recall: bool = True) -> Scan:
        """What shard k holds; without the counts, which would be most of it, once it is checked. recall: an earlier
        run's scan will do."""
        shard = self.shards[k]
        with self._lock:
            if shard.scan is None:
                shard.scan = self.reader(k).scan(self.dtype, recall)
                if not self.is_large:
                    found = np.array(shard.scan.counts, np.int64)
                    n = max(len(self.counts), len(found))
                    self.counts = sum(
                        np.pad(counts, (0, n - len(counts))) for counts in (self.counts, found)
                    )
            return shard.scan

    def check(self, k: int, vocab_size: int, is_gpt2: bool) -> None:
        """Refuse a shard that is not what was prepared, and ids outside the vocabulary. is_gpt2: may be GPT-2's."""
        shard, scan = self.shards[k], self.scan(k)
        if shard.sha256 not in (None, scan.sha256):
            raise UserError(
                f"{shard.path} is damaged or another file: its sha256 is {scan.sha256[:12]}..., "
                f"meta.json says {shard.sha256[:12]}...; delete that and prepare it again"
            )
        if shard.sha256 is None and shard.header == 0:
            self._check_dtype(k, vocab_size, scan.highest >= vocab_size, is_gpt2)
        if scan.highest >= vocab_size:
            raise not_in_vocabulary(shard, scan.highest, vocab_size)
        if scan.counts:
            remember(shard.path, scan)
            shard.scan = replace(scan, counts=[])

    def _check_dtype(self, k: int, vocab_size: int, outside: bool, is_gpt2: bool) -> None:
        """Refuse numbers of another type, read as uint16. int32 ids are then ids with a 0 behind each: lines of one
        character look the same, so they are refused among GPT-2's ids alone, where 0 is an exclamation mark."""
        if self.dtype.itemsize != 2:
            return
        path = str(self.shards[k].path)
        head = self.reader(k).pieces(np.zeros(1, int), min(self.shards[k].size, HEAD))
        name = looks_like(head, vocab_size)
        if name == ".npy" or name and (outside or is_gpt2):
            how = f"load({path!r})" if name == ".npy" else f"fromfile({path!r}, {name!r})"
            how = f"numpy.{how}.astype('uint16').tofile(NEW_FILE)"
            raise UserError(f"{path} holds {name} data, not uint16 ids alone; write it anew: {how}")

    def fingerprint(self) -> str:
        """Of one file its sha256, of several that of their hashes. Where these are not stated, and a large row would
        have to be read for them, names, sizes and the first and last bytes of each shard stand for it."""
        if len(self.shards) == 1:
            return self.scan(0).sha256
        if all(shard.sha256 for shard in self.shards):
            return joined(shard.sha256 for shard in self.shards)
        if self.is_large:
            return joined(each_of(self.shards, _look))
        return joined(self.scan(k).sha256 for k in range(len(self.shards)))

    def look(self) -> str:
        return joined(each_of(self.shards, _look))


class Ids:
    """The ids of a row, as an array has them: [positions] reads these and all between the first and the last."""

    def __init__(self, row: Row):
        self.row = row

    def __len__(self) -> int:
        return int(self.row.ends[-1])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.row.dtype)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        where = (
            np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        )
        if where.size == 0:
            return np.zeros(where.shape, self.row.dtype)
        first = int(where.min())
        return self.row.rows(np.array([first]), int(where.max()) + 1 - first)[0][where - first]


def not_in_vocabulary(shard: Shard, token: int, vocab_size: int) -> UserError:
    """What to say of an id that the vocabulary does not have."""
    return UserError(
        f"{shard.path} holds token id {token}, outside the vocabulary of {vocab_size}; "
        "use the tokenizer it was made with, or set --vocab_size"
    )


def _look(shard: Shard) -> str:
    """A hash of what can be seen of a shard without reading it."""
    with open(shard.path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(1 << 12)
        file.seek(max(0, size - (1 << 12)))
        seen = f"{shard.path.name} {size} {shard.sha256 or ''}".encode() + head + file.read(1 << 12)
    return hashlib.sha256(seen).hexdigest()
