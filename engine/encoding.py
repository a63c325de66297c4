"""Text to token ids in several processes: batches of pieces in, their ids out in the same order, memory bounded."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.tokenizer import Tokenizer, load_tokenizer

BATCH = 1 << 20  # characters, or one piece more, that a process gets in one go


class Encoded(NamedTuple):
    """What a batch gives a split: ids as bytes, an end-of-text before each document; how many begin; UTF-8 bytes."""

    data: bytes
    documents: int
    n_bytes: int


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Of the ids in a file."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def available_processors() -> int:
    """Those that this process may use, which on a cluster can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode(tokenizer: Tokenizer, batch: list[tuple[str, str, bool]]) -> dict[str, Encoded]:
    """Pieces (split, text, whether it begins a document) -> what each split gets of them."""
    found, eot = {}, np.array([] if tokenizer.eot is None else [tokenizer.eot], np.uint32)
    for split, text, first in batch:
        ids, about = found.setdefault(split, ([], [0, 0]))
        ids += [eot, tokenizer.encode(text)] if first else [tokenizer.encode(text)]
        about[0] += first
        about[1] += len(text.encode())
    dtype = dtype_of(tokenizer)
    return {
        split: Encoded(np.concatenate(ids).astype(dtype).tobytes(), *about) for split, (ids, about) in found.items()
    }


def encode_all(
    walked: Iterable[tuple[str, str, bool, Any]], tokenizer: Tokenizer, kept: Path, num_proc: int
) -> Iterator[tuple[Any, dict[str, Encoded]]]:
    """Pieces (split, text, begins a document, position behind it) -> batch by batch, in order: the position behind the
    batch, and its ids by split. Where there is more than one batch num_proc processes share the work.

    kept: the folder from which they load the tokenizer. It is not handed to them: a process that is ended while it is
    sent more than a pipe holds leaves Python waiting for ever."""
    batches = _batches(walked)
    head = list(itertools.islice(batches, 2))
    if num_proc == 1 or len(head) < 2:
        for position, batch in itertools.chain(head, batches):
            yield position, encode(tokenizer, batch)
        return
    spawn = multiprocessing.get_context("spawn")  # the same on all systems, and safe beside threads
    pool, waiting = ProcessPoolExecutor(num_proc, spawn, _begin, (kept,)), deque()
    try:
        for position, batch in itertools.chain(head, batches):
            waiting.append((position, _submitted(pool, batch)))
            if len(waiting) > 2 * num_proc:
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenises was ended from outside; if memory ran out, lower --num_proc"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, batch: list[tuple[str, str, bool]]) -> Future:
    try:
        return pool.submit(_encode, batch)
    except OSError as error:  # of a process that is to be started, also because another has just ended
        raise BrokenProcessPool(str(error)) from None


def _batches(walked: Iterable[tuple[str, str, bool, Any]]) -> Iterator[tuple[Any, list[tuple[str, str, bool]]]]:
    batch, size, position = [], 0, None
    for split, text, first, position in walked:
        batch.append((split, text, first))
        size += len(text)
        if size >= BATCH:
            yield position, batch
            batch, size = [], 0
    if batch:
        yield position, batch


def _begin(kept: Path) -> None:
    """A process begins: it will end with the one that began it, however that ends, and leaves Ctrl-C to it."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _tokenizer = load_tokenizer(kept)


def _encode(batch: list[tuple[str, str, bool]]) -> dict[str, Encoded]:
    return encode(_tokenizer, batch)
