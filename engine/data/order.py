"""The order of training blocks: shard by shard, a function of (seed, epoch)."""

import numpy as np


class Order:
    """Block k of an epoch: where it starts, in a row of shards of these lengths.

    An epoch takes the shards in an order of its own. It cuts each into consecutive blocks from a random offset and
    visits each of these once, then goes to the next shard: a process reads from few files at a time, and keeps the
    order of one. No block crosses shards, and a shard without a block and its target is passed over.
    """

    def __init__(self, lengths: list[int], block_size: int, seed: int):
        self.lengths, self.block_size, self.seed = np.array(lengths), block_size, seed
        self.begins = self.lengths.cumsum() - self.lengths
        # one block less than there is room for, so that every offset fits
        self.blocks = ((self.lengths - 1) // block_size - 1).clip(min=self.lengths > block_size)
        self.n_blocks = int(self.blocks.sum())
        self._epoch = self._place = -1

    def start(self, epoch: int, k: int) -> int:
        """The position of the first token of block k < n_blocks."""
        if epoch != self._epoch:
            # a number behind the last shard's: a stream of random numbers that no shard draws from
            self._shards = np.random.default_rng((self.seed, epoch, len(self.lengths))).permutation(
                len(self.lengths)
            )
            self._ends = self.blocks[self._shards].cumsum()
            self._epoch, self._place = epoch, -1
        place = int(self._ends.searchsorted(k, side="right"))
        if place != self._place:
            self._place, self._starts = place, self._shuffled(int(self._shards[place]))
        return int(
            self._starts[k - self._ends[place]]
        )  # counted from behind: the shard's last block is -1

    def _shuffled(self, shard: int) -> np.ndarray:
        """The starts of a shard's blocks in this epoch's order."""
        rng = np.random.default_rng((self.seed, self._epoch, shard))
        n = int(self.blocks[shard])
        slack = int(self.lengths[shard]) - 1 - n * self.block_size
        first = self.begins[shard] + rng.integers(min(slack + 1, self.block_size))
        return first + self.block_size * rng.permutation(n)
