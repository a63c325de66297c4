"""Token files, read as one array per split. writer.py writes them, batches.py shuffles them.

A data set is a folder. <split>.bin, or several shards, hold the ids of all documents, with
end-of-text between documents, as little-endian uint16 (uint32 for a vocabulary that needs it).
meta.json holds the tokenizer, vocabulary, dtype, sizes and hashes. nanoGPT's folders (train.bin,
val.bin, meta.pkl or no meta file) work unchanged. The command that prepared a data set checks its
hashes if it is run again.
"""

import difflib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from engine.base.errors import UserError
from engine.base.files import DATA_ROOT, sha256_of
from engine.data.shards import find, joined, splits_in
from engine.data.tokenizer import GPT2Tokenizer, read_meta

CHUNK = 1 << 19  # ids to count at a time


def dataset_folder(dataset: str | Path) -> Path:
    """data/<dataset> of this repository, or the path itself if it names a folder."""
    folder = DATA_ROOT / dataset
    return folder if folder.is_dir() else Path(dataset)


class TokenFile:
    """One split of a data set: the ids of one file or of many shards, as one array.

    file[begin:end] and file.rows(starts, length) read ids and check them against the vocabulary.
    A shard is mapped only while it is read: memory stays flat and few files are open, however
    many shards there are. path: the split's name in messages; several shards have no such file.
    meta: the contents of meta.json or meta.pkl; None if there is neither. The vocabulary is then
    GPT-2's, as in nanoGPT.
    """

    def __init__(self, dataset: str | Path, split: str):
        folder = dataset_folder(dataset)
        self.path = folder / f"{split}.bin"
        self.meta = read_meta(folder)
        self.shards = find(folder, split, self.meta)
        if not self.shards:
            raise UserError(f"{self.path.absolute()} is missing; {_how_to_get(folder)}")
        self.dtype = self.shards[0].dtype
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.vocab_size = self.meta["vocab_size"] if self.meta else GPT2Tokenizer.vocab_size
        self.max_vocab_size = self.vocab_size  # check() sets the model's

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, end, _ = where.indices(len(self))
        return self.rows(np.array([begin]), max(0, end - begin))[0]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The ids from each start on, (len(starts), length)."""
        rows = np.empty((len(starts), length), self.dtype)
        for row, start in zip(rows, starts.tolist(), strict=True):
            self._read(start, row)
        if rows.size and rows.max() >= self.max_vocab_size:
            i, j = np.unravel_index(rows.argmax(), rows.shape)
            shard, position = self._locate(int(starts[i] + j))
            raise UserError(
                f"{shard.path} holds token id {rows[i, j]}, outside the vocabulary of "
                f"{self.max_vocab_size}, at position {position:,}; use the tokenizer it was made "
                "with, or set --vocab_size"
            )
        return rows

    def _read(self, position, row):
        """Fill a row with the ids from a position on."""
        while len(row):
            shard, begin = self._locate(position)
            part = shard.map()[begin : begin + len(row)]
            row[: len(part)] = part
            row = row[len(part) :]
            position += len(part)

    def _locate(self, position):
        """The shard with a position of the split, and the position in that shard."""
        k = self.ends.searchsorted(position, side="right")
        shard = self.shards[k]
        return shard, position - int(self.ends[k]) + len(shard)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the tokens in checkpoints: a hash of each shard's fingerprint."""
        return joined(shard.fingerprint() for shard in self.shards)

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the file, or of its shards' sha256s. What meta.json lacks is computed."""
        hashes = [shard.sha256 or sha256_of(shard.path) for shard in self.shards]
        return hashes[0] if len(hashes) == 1 else joined(hashes)

    def matches(self, recorded: str) -> bool:
        """Whether a checkpoint was trained on these tokens.

        recorded: their fingerprint, or in a checkpoint of the first edition their sha256, which
        takes minutes to compute if meta.json lacks it."""
        return recorded == self.fingerprint or recorded == self.sha256

    def check(self, vocab_size: int, block_size: int = 1) -> None:
        """Refuse a split shorter than one block. Sets the vocabulary that ids are checked against
        when they are read."""
        longest = max(map(len, self.shards))
        if longest < block_size + 1:
            raise UserError(
                f"{self.path} has {longest:,} tokens (in its longest file), too few for one block "
                f"of {block_size} and its target; use more text, or --block_size={longest - 1}"
            )
        self.max_vocab_size = vocab_size

    def counts(self, vocab_size: int) -> torch.Tensor:
        """How often each id occurs, (vocab_size,) float64."""
        self.check(vocab_size)
        counts = np.zeros(vocab_size, np.int64)
        for begin in range(0, len(self), CHUNK):
            counts += np.bincount(self[begin : begin + CHUNK], minlength=vocab_size)
        return torch.from_numpy(counts.astype(np.float64))

    def frequencies(self, vocab_size: int) -> torch.Tensor:
        """The share of each id, (vocab_size,) float64, with half an occurrence added to each."""
        counts = self.counts(vocab_size) + 0.5
        return counts / counts.sum()


def gather(
    file: TokenFile, starts: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y (len(starts), block_size) int64: the blocks at `starts`, and those one token later."""
    rows = torch.from_numpy(file.rows(starts, block_size + 1).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _how_to_get(folder):
    if found := splits_in(folder):
        return f"this data set has {', '.join(found)}; prepare it with that split"
    known = [path.parent.name for path in DATA_ROOT.glob("*/prepare.py")]
    nearest = difflib.get_close_matches(folder.name, known, 1) or ["text"]
    return (
        f"nor is it in {DATA_ROOT}; run python data/{nearest[0]}/prepare.py (see --help), or give "
        "--dataset=PATH"
    )
