"""Windows of block_size tokens that cover a split: all in order, or some, evenly spaced."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from engine.data.tokens import TokenFile, gather


def eval_batches(
    file: TokenFile, block_size: int, batch_size: int, n_batches: int
) -> list[np.ndarray]:
    """Where the blocks start that training evaluates on, by batch; evenly spaced in the split."""
    n_targets = max(1, (len(file) - 1) // block_size) * block_size
    limit = n_batches * batch_size
    batches = window_starts(n_targets, block_size, batch_size, limit, block_size)
    return [starts for starts, _ in batches]


class Windows(NamedTuple):
    """A batch of windows, x and y (B, T). In each of them the targets from `first` on count."""

    x: torch.Tensor
    y: torch.Tensor
    first: int
    at: torch.Tensor  # (B, T - first): the positions in the split of these targets


def windows(
    file: TokenFile, block_size: int, batch_size: int, limit: int = 0, stride: int = 0
) -> Iterator[Windows]:
    """Windows of block_size tokens that cover a split, so that every target counts once.

    stride: the distance between windows (0: block_size). All targets of the first window count,
    and the last `stride` of each other one. What remains at the end is a shorter window in a batch
    of its own. limit: the number of windows to read, evenly spaced (0: all)."""
    stride = stride or block_size
    for starts, length in window_starts(len(file) - 1, block_size, batch_size, limit, stride):
        x, y = gather(file, starts, length)
        first = block_size - stride if starts[0] else 0
        at = torch.from_numpy(starts)[:, None] + torch.arange(first + 1, length + 1)
        yield Windows(x, y, first, at)


def window_starts(
    n: int, block_size: int, batch_size: int, limit: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The starts and the length of each batch of windows over n targets."""
    n_full = (n - block_size) // stride + 1 if n >= block_size else 0
    n_taken = min(limit or n_full, n_full)

    def starts_of(begin, end):
        return np.arange(begin, end) * n_full // n_taken * stride

    first = 0
    if stride < block_size and n_taken:
        # all targets of the first of overlapping windows count, so it is a batch of its own
        yield starts_of(0, 1), block_size
        first = 1
    for begin in range(first, n_taken, batch_size):
        yield starts_of(begin, min(begin + batch_size, n_taken)), block_size
    covered = (n_full - 1) * stride + block_size if n_full else 0
    if covered < n and not 0 < limit <= n_full:
        yield np.array([n_full * stride]), n - n_full * stride
