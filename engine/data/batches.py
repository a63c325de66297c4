"""Training batches: blocks of a split, in a shuffled order that depends only on (seed, i)."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from engine.data.labels import LabelFile
from engine.data.tokens import TokenFile, gather

Batch = tuple[torch.Tensor, ...]


class BlockOrder:
    """The shuffled order of a split's blocks. lengths: the numbers of tokens of its shards.

    An epoch visits the shards in random order, one after the other, so that a process reads only
    a few files at a time. In each shard it cuts consecutive blocks from a random offset on and
    visits them in random order. A block never crosses shards. A shard shorter than a block and
    its last target is left out.
    """

    def __init__(self, lengths: list[int], block_size: int, seed: int):
        self.lengths = np.array(lengths)
        self.block_size = block_size
        self.seed = seed
        self.begins = self.lengths.cumsum() - self.lengths
        # one block fewer than would fit, so that every offset is possible
        n_blocks = (self.lengths - 1) // block_size - 1
        self.blocks = n_blocks.clip(min=self.lengths > block_size)
        self.n_blocks = int(self.blocks.sum())
        self._epoch = self._place = -1

    def start(self, epoch: int, k: int) -> int:
        """The position of the first token of block k < n_blocks."""
        if epoch != self._epoch:
            n_shards = len(self.lengths)
            # shard k uses the seed (seed, epoch, k); the order of the shards uses the next k
            rng = np.random.default_rng((self.seed, epoch, n_shards))
            self._shards = rng.permutation(n_shards)
            self._ends = self.blocks[self._shards].cumsum()
            self._epoch = epoch
            self._place = -1
        place = int(self._ends.searchsorted(k, side="right"))
        if place != self._place:
            self._place = place
            self._starts = self._shuffled(int(self._shards[place]))
        return int(self._starts[k - self._ends[place]])  # negative: -1 is the last block

    def _shuffled(self, shard):
        """Where a shard's blocks start, in this epoch's order."""
        rng = np.random.default_rng((self.seed, self._epoch, shard))
        n = int(self.blocks[shard])
        slack = int(self.lengths[shard]) - 1 - n * self.block_size
        offset = rng.integers(min(slack + 1, self.block_size))
        return self.begins[shard] + offset + self.block_size * rng.permutation(n)


@dataclass
class Batches:
    """batches[i] -> (x, y), both (batch_size, block_size) int64: micro-batch i of endless epochs.

    An epoch visits each block of the split once. Any process can read any micro-batch, in any
    order and after any restart. With labels of this split, batches[i] is (x, ids, weights):
    see LabelFile.targets.
    """

    file: TokenFile
    batch_size: int
    block_size: int
    seed: int
    labels: LabelFile | None = None

    def __post_init__(self):
        lengths = [len(shard) for shard in self.file.shards]
        self.order = BlockOrder(lengths, self.block_size, self.seed)
        self.n_blocks = self.order.n_blocks

    def __getitem__(self, i: int) -> Batch:
        starts = self.starts(i)
        x, y = gather(self.file, starts, self.block_size)
        if self.labels is None:
            return x, y
        return x, *self.labels.targets(y, starts)

    def starts(self, i: int) -> np.ndarray:
        """Where the blocks of micro-batch i start in the split, (batch_size,)."""
        first = i * self.batch_size
        blocks = range(first, first + self.batch_size)
        return np.array([self.order.start(*divmod(block, self.n_blocks)) for block in blocks])

    def prefetched(self, numbers: Iterable[int], device: torch.device) -> Iterator[Batch]:
        """Yield these micro-batches on the device. While one is in use, a thread reads the next."""
        is_cuda = device.type == "cuda"

        def read(i):
            if is_cuda:  # only pinned memory is copied in the background
                return [tensor.pin_memory() for tensor in self[i]]
            return self[i]

        with ThreadPoolExecutor(1) as reader:
            batches = (reader.submit(read, i) for i in numbers)
            ahead = next(batches, None)
            while ahead:
                ready, ahead = ahead, next(batches, None)
                yield tuple(t.to(device, non_blocking=is_cuda) for t in ready.result())
