"""Token files: the one place that reads them; engine/writer.py writes them.

A data set is a folder: <split>.bin holds the ids of all documents in one row, little-endian uint16 (uint32 where the
vocabulary needs it), end-of-text between documents; meta.json says which tokenizer, vocabulary, dtype, counts and
hashes. nanoGPT's folders (train.bin, val.bin, meta.pkl or no meta at all) read as well. The order of batches is a
function of (seed, i) alone.
"""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.files import DATA_ROOT
from engine.scan import Reader, Scan, looks_like, remember
from engine.tokenizer import GPT2Tokenizer, read_meta

HEAD = 1 << 16  # bytes by which the dtype of a file is judged


def dataset_folder(dataset: str | Path) -> Path:
    """data/<dataset> of this repository, or the path itself where it names a folder."""
    folder = DATA_ROOT / dataset
    return folder if folder.is_dir() else Path(dataset)


class TokenFile:
    """One split of a data set, a row of uint16 or uint32, with its checks and counts."""

    def __init__(self, dataset: str | Path, split: str):
        folder = dataset_folder(dataset)
        self.path = folder / f"{split}.bin"
        if not self.path.is_file():
            raise UserError(f"{self.path} is missing; {_how_to_get(folder, split)}")
        self.meta = read_meta(folder)
        self.dtype = np.dtype((self.meta or {}).get("dtype", "uint16")).newbyteorder("<")
        self._reader = Reader(self.path)
        size = self._reader.size
        n, rest = divmod(size, self.dtype.itemsize)
        if n == 0 or rest:
            raise UserError(f"{self.path} has {size} bytes: no whole {self.dtype.name} ids; prepare it again")
        splits = (self.meta or {}).get("splits", {split: {}})
        if split not in splits:
            raise UserError(
                f"{self.path} is no split of this data set, which has {', '.join(splits)}; prepare it again"
            )
        expected = splits[split].get("tokens", n)
        if n != expected:
            raise UserError(f"{self.path} holds {n:,} tokens, meta.json says {expected:,}; prepare it again")
        self._expected_sha256 = splits[split].get("sha256")  # nanoGPT's folders have none

    def __len__(self) -> int:
        return self._reader.size // self.dtype.itemsize

    @property
    def ids(self) -> np.ndarray:
        """All ids (n,), read-only, mapped anew: what is looked at takes memory until the array is let go."""
        return self._reader.mapped(self.dtype)

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(len(starts), length): the ids from each of the starts on, read from the disk."""
        size = self.dtype.itemsize
        data = self._reader.pieces(starts * size, length * size)
        return np.frombuffer(data, self.dtype).reshape(len(starts), length)

    @cached_property
    def _scan(self) -> Scan:
        return self._reader.scan(self.dtype)

    @property
    def sha256(self) -> str:
        """The file's fingerprint: of its bytes."""
        return self._scan.sha256

    @property
    def vocab_size(self) -> int:
        """The vocabulary that the folder's meta file states; without one it is nanoGPT's: GPT-2's BPE."""
        return GPT2Tokenizer.vocab_size if self.meta is None else self.meta["vocab_size"]

    def check(self, vocab_size: int, block_size: int = 1) -> None:
        """Refuse a split shorter than one block, one that is not what was prepared, and ids outside the vocabulary."""
        if len(self) < block_size + 1:
            raise UserError(
                f"{self.path} has {len(self):,} tokens, too few for one block of {block_size} and its target; "
                f"use more text or --block_size={max(1, len(self) - 1)} or less"
            )
        if self._expected_sha256 not in (None, self.sha256):
            raise UserError(
                f"{self.path} is damaged or another file: its sha256 is {self.sha256[:12]}..., "
                f"meta.json says {self._expected_sha256[:12]}...; prepare it again"
            )
        outside = self._scan.highest >= vocab_size
        if self._expected_sha256 is None:
            self._check_dtype(vocab_size, outside)
        if outside:
            raise UserError(
                f"{self.path} holds token id {self._scan.highest}, outside the vocabulary of {vocab_size}; "
                "use the tokenizer it was made with, or set --vocab_size"
            )
        remember(self.path, self._scan)

    def _check_dtype(self, vocab_size: int, outside: bool) -> None:
        """Refuse numbers of another type, read as uint16. int32 ids are then ids with a 0 behind each: lines of one
        character look the same, so they are refused among GPT-2's ids alone, where 0 is an exclamation mark."""
        if self.dtype.itemsize != 2:
            return
        name = looks_like(self._reader.pieces(np.zeros(1, int), min(self._reader.size, HEAD)), vocab_size)
        if name == ".npy" or name and (outside or vocab_size >= self.vocab_size == GPT2Tokenizer.vocab_size):
            how = f"load({str(self.path)!r})" if name == ".npy" else f"fromfile({str(self.path)!r}, {name!r})"
            how = f"numpy.{how}.astype('uint16').tofile(NEW_FILE)"
            raise UserError(f"{self.path} holds {name} data, not uint16 ids alone; write it anew: {how}")

    def counts(self, vocab_size: int) -> torch.Tensor:
        """How often each id occurs, (vocab_size,) float64."""
        self.check(vocab_size)
        counts = torch.tensor(self._scan.counts, dtype=torch.float64)
        return torch.nn.functional.pad(counts, (0, vocab_size - len(counts)))

    def frequencies(self, vocab_size: int) -> torch.Tensor:
        """How often each id occurs as a share of all, (vocab_size,) float64; half an occurrence is added to each."""
        counts = self.counts(vocab_size) + 0.5
        return counts / counts.sum()


class Batches:
    """batches[i] -> (x, y), both (batch_size, block_size) int64: micro-batch i of an endless, shuffled order.

    An epoch cuts the file into consecutive blocks from a random offset and visits each block once; offset and order
    depend on (seed, epoch) alone, so any process can produce any micro-batch, in any order, after any restart.
    labels: an engine.labels.LabelFile of this file; what its targets() makes of y then takes y's place.
    """

    def __init__(self, file: TokenFile, batch_size: int, block_size: int, seed: int, labels=None):
        self.file, self.batch_size, self.block_size, self.seed = file, batch_size, block_size, seed
        self.labels = labels
        self.n_blocks = max(1, (len(file) - 1) // block_size - 1)  # one block less, so that every offset fits
        self._epoch, self._starts = -1, None

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        blocks = range(i * self.batch_size, (i + 1) * self.batch_size)
        starts = np.array([self._block_start(*divmod(block, self.n_blocks)) for block in blocks])
        x, y = gather(self.file, starts, self.block_size)
        return (x, y) if self.labels is None else (x, *self.labels.targets(y, starts))

    def prefetched(self, order: Iterable[int], device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
        """The micro-batches of that order on the device, each read while the one before it is worked on."""
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for i in itertools.chain(order, [None]):
                batch, ahead = ahead, None if i is None else reader.submit(self._read, i, device.type == "cuda")
                if batch is not None:
                    yield tuple(t.to(device, non_blocking=device.type == "cuda") for t in batch.result())

    def _read(self, i: int, pinned: bool) -> tuple[torch.Tensor, ...]:
        return tuple(t.pin_memory() if pinned else t for t in self[i])  # from pinned memory alone a GPU copies aside

    def _block_start(self, epoch: int, k: int) -> int:
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            slack = len(self.file) - 1 - self.n_blocks * self.block_size
            offset = rng.integers(min(slack + 1, self.block_size))
            self._epoch, self._starts = epoch, offset + self.block_size * rng.permutation(self.n_blocks)
        return self._starts[k]


def gather(file: TokenFile, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y (len(starts), block_size) int64: the blocks at `starts` and the same blocks one token later."""
    rows = torch.from_numpy(file.rows(starts, block_size + 1).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _how_to_get(folder: Path, split: str) -> str:
    if (folder / f"{split}.bin").parent.is_dir() and list(folder.glob("*.bin")):
        return f"this data set has {', '.join(sorted(path.stem for path in folder.glob('*.bin')))}"
    if (folder / "prepare.py").is_file():
        return f"run: python data/{folder.name}/prepare.py"
    for script in sorted(DATA_ROOT.glob("*/prepare.py"), reverse=True):
        if folder.name.startswith(script.parent.name):  # wikitext2
            return f"run: python data/{script.parent.name}/prepare.py (its --help says how)"
    known = sorted(path.parent.name for path in DATA_ROOT.glob("*/prepare.py"))
    return f"run one of: {', '.join(f'python data/{name}/prepare.py' for name in known)}"
