"""Token files: the one place that serves them; engine/data/writer.py writes them.

A data set is a folder: <split>.bin holds the ids of all documents in one row, little-endian uint16 (uint32 where the
vocabulary needs it), end-of-text between documents; meta.json says which tokenizer, vocabulary, dtype, counts and
hashes. A split may lie in several files, its shards. nanoGPT's folders (train.bin, val.bin, meta.pkl or no meta at all)
and llm.c's files read as well. The order of batches is a function of (seed, i) alone.

    python -m engine.data.tokens data/wikitext       says what a folder holds, and checks it
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from engine.base.errors import UserError, run_main
from engine.base.files import DATA_ROOT
from engine.data.order import Order
from engine.data.row import Ids, Row, not_in_vocabulary
from engine.data.shards import find, splits_in
from engine.data.tokenizer import GPT2Tokenizer, load_tokenizer, read_meta

PIECES, PIECE = (
    256,
    1 << 19,
)  # of a large split so many pieces of so many ids tell how often each occurs
# of llm.c's files of 32-bit ids, by Llama 3's tokenizer; we have none that knows their text
LLAMA3 = {"tokenizer": {"kind": "none"}, "vocab_size": 128256}


def dataset_folder(dataset: str | Path) -> Path:
    """data/<dataset> of this repository, or the path itself where it names a folder."""
    folder = DATA_ROOT / dataset
    return folder if folder.is_dir() else Path(dataset)


class TokenFile:
    """One split of a data set, a row of uint16 or uint32 in one file or many, with its checks and counts.

    path names the split in messages, and what lies beside it; of a split in several files there is none of that name.
    meta: what meta.json or meta.pkl says, or the headers; None: nothing says anything but GPT-2's BPE.
    """

    def __init__(self, dataset: str | Path, split: str):
        folder = dataset_folder(dataset)
        self.path, self.meta = folder / f"{split}.bin", read_meta(folder)
        shards = find(folder, split, self.meta)
        if not shards:
            raise UserError(f"{self.path} is missing; {_how_to_get(folder)}")
        if self.meta is None and shards[0].header and shards[0].dtype.itemsize == 4:
            self.meta = LLAMA3
        self.row, self.dtype = Row(shards), shards[0].dtype
        self._n_ids = self.vocab_size  # until check() is told of a model's

    def __len__(self) -> int:
        return int(self.row.ends[-1])

    @property
    def ids(self) -> np.ndarray | Ids:
        """All ids (n,); one file is mapped anew: what is looked at takes memory until the array is let go."""
        return Ids(self.row) if len(self.row.shards) > 1 else self.row.reader(0).mapped(self.dtype)

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(len(starts), length): the ids from each of the starts on, read from the disk."""
        rows = self.row.rows(starts, length)
        if (
            self.row.is_large and rows.size and rows.max() >= self._n_ids
        ):  # no check has seen all of it
            i, j = np.unravel_index(rows.argmax(), rows.shape)
            raise not_in_vocabulary(
                self.row.shards[self.row.which(starts[i] + j)], rows.max(), self._n_ids
            )
        return rows

    @cached_property
    def sha256(self) -> str:
        """The split's fingerprint: of its bytes, or of what engine/data/row.py takes for them."""
        return self.row.fingerprint()

    @cached_property
    def fingerprint(self) -> str:
        """For checkpoints: a hash of names, sizes, stated hashes, and first and last bytes of the files. Cheap."""
        return self.row.look()

    def matches(self, recorded: str) -> bool:
        """Whether a checkpoint's record of its data is of these tokens: their fingerprint, or, in a checkpoint of the
        first edition, their sha256."""
        return recorded == self.fingerprint or recorded == self.sha256

    @property
    def vocab_size(self) -> int:
        """The vocabulary that the folder's meta file states; without one it is nanoGPT's: GPT-2's BPE."""
        return GPT2Tokenizer.vocab_size if self.meta is None else self.meta["vocab_size"]

    def check(self, vocab_size: int, block_size: int = 1) -> None:
        """Refuse a split shorter than one block, one that is not what was prepared, and ids outside the vocabulary; the
        latter two in a large split's shards when they are read: see check_shards."""
        longest = max(map(len, self.row.shards))
        if longest < block_size + 1:
            has = f"{longest:,} tokens" + (
                " in its longest shard" if len(self.row.shards) > 1 else ""
            )
            way_out = "use more text" + (
                f" or --block_size={longest - 1} or less" if longest > 1 else ""
            )
            raise UserError(
                f"{self.path} has {has}, too few for one block of {block_size} and its target; {way_out}"
            )
        self._n_ids = vocab_size
        if not self.row.is_large:
            self.check_shards(range(len(self.row.shards)))

    def check_shards(self, numbers: Iterable[int]) -> None:
        """Read these shards from end to end, if nobody has yet, and refuse one that is not as it should be."""
        for k in numbers:
            self.row.check(
                k, self._n_ids, self._n_ids >= self.vocab_size == GPT2Tokenizer.vocab_size
            )

    def counts(self, vocab_size: int) -> torch.Tensor:
        """How often each id occurs, (vocab_size,) float64; of a large split in PIECES evenly spaced pieces alone: so
        many tokens, from all over the text, give a frequency of 1e-5 to 3 %, where all would take an hour."""
        self.check(vocab_size)
        counts = self.row.counts
        if self.row.is_large:
            n = min(PIECES, len(self))
            apart = len(self) // n
            rows = (self.rows(np.array([i * apart]), min(PIECE, apart)) for i in range(n))
            counts = sum(np.bincount(row[0], minlength=vocab_size) for row in rows)
        counts = torch.from_numpy(counts.astype(np.float64))
        return torch.nn.functional.pad(counts, (0, vocab_size - len(counts)))

    def frequencies(self, vocab_size: int) -> torch.Tensor:
        """How often each id occurs as a share of all, (vocab_size,) float64; half an occurrence is added to each."""
        counts = self.counts(vocab_size) + 0.5
        return counts / counts.sum()


class Batches:
    """batches[i] -> (x, y), both (batch_size, block_size) int64: micro-batch i of an endless, shuffled order.

    An epoch visits each block of the split once, in an order that depends on (seed, epoch) alone (see order.py),
    so any process can produce any micro-batch, in any order, after any restart.
    labels: an engine.data.labels.LabelFile of this file; what its targets() makes of y then takes y's place.
    """

    def __init__(self, file: TokenFile, batch_size: int, block_size: int, seed: int, labels=None):
        self.file, self.batch_size, self.block_size, self.labels = (
            file,
            batch_size,
            block_size,
            labels,
        )
        self.order = Order([len(shard) for shard in file.row.shards], block_size, seed)
        self.n_blocks = self.order.n_blocks

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        return self._at(self.starts(i))

    def starts(self, i: int) -> np.ndarray:
        """The positions (batch_size,) at which the blocks of micro-batch i start."""
        blocks = range(i * self.batch_size, (i + 1) * self.batch_size)
        return np.array([self.order.start(*divmod(block, self.n_blocks)) for block in blocks])

    def _at(self, starts: np.ndarray) -> tuple[torch.Tensor, ...]:
        x, y = gather(self.file, starts, self.block_size)
        return (x, y) if self.labels is None else (x, *self.labels.targets(y, starts))

    def prefetched(
        self, order: Iterable[int], device: torch.device
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """The micro-batches of that order on the device, each read while the one before it is worked on."""
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for i in itertools.chain(order, [None]):
                batch, ahead = (
                    ahead,
                    None if i is None else reader.submit(self._read, i, device.type == "cuda"),
                )
                if batch is not None:
                    yield tuple(
                        t.to(device, non_blocking=device.type == "cuda") for t in batch.result()
                    )

    def _read(self, i: int, pinned: bool) -> tuple[torch.Tensor, ...]:
        starts = self.starts(i)
        if self.file.row.is_large:  # all others are checked before
            self.file.check_shards(np.unique(self.file.row.which(starts)).tolist())
        return tuple(
            t.pin_memory() if pinned else t for t in self._at(starts)
        )  # from there alone a GPU copies aside


def gather(
    file: TokenFile, starts: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y (len(starts), block_size) int64: the blocks at `starts` and the same blocks one token later."""
    rows = torch.from_numpy(file.rows(starts, block_size + 1).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _how_to_get(folder: Path) -> str:
    if found := splits_in(folder):
        return f"this data set has {', '.join(found)}"
    if (folder / "prepare.py").is_file():
        return f"run: python data/{folder.name}/prepare.py"
    for script in sorted(DATA_ROOT.glob("*/prepare.py"), reverse=True):
        if folder.name.startswith(script.parent.name):  # wikitext2
            return f"run: python data/{script.parent.name}/prepare.py (its --help says how)"
    known = sorted(path.parent.name for path in DATA_ROOT.glob("*/prepare.py"))
    return f"run one of: {', '.join(f'python data/{name}/prepare.py' for name in known)}"


def main() -> None:
    """python -m engine.data.tokens FOLDER: say what it holds, and end with 2 if something is wrong with it."""
    from engine.data import contents

    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError(
            "give one data folder or its name in data/: python -m engine.data.tokens wikitext"
        )
    folder = dataset_folder(sys.argv[1])
    meta = read_meta(folder)
    splits = (meta or {}).get("splits") or splits_in(folder)
    if not splits:
        raise UserError(f"{folder} holds no token files; {_how_to_get(folder)}")
    files = {split: TokenFile(folder, split) for split in splits}
    found = next(iter(files.values())).meta
    described = [name for name in ("meta.json", "meta.pkl") if (folder / name).is_file()]
    known_by = (described + ["nothing says another" if found is None else "by llm.c's headers"])[0]
    has_text = found is None or found["tokenizer"].get("kind", "none") != "none"
    if not contents.describe(
        sys.argv[1], files, known_by, load_tokenizer(folder) if has_text else None
    ):
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
