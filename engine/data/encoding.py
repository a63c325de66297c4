"""Text to token ids in several processes: batches of pieces in, their ids out in the same order, memory bounded."""

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.base.errors import UserError
from engine.data.tokenizer import Tokenizer, load_tokenizer

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
        split: Encoded(np.concatenate(ids).astype(dtype).tobytes(), *about)
        for split, (ids, about) in found.items()
    }


def encode_all(
    walked: Iterable[tuple[str, str, bool, Any]], tokenizer: Tokenizer, kept: Path, num_proc: int
) -> Iterator[tuple[Any, dict[str, Encoded]]]:
    """Pieces (split, text, begins a document, position behind it) -> batch by batch, in order: the position behind the
    batch, and its ids by split. Where there is more than one batch num_proc processes take turns, each with two batches
    at a time. kept: the folder from which they load the tokenizer."""
    batches = _batches(walked)
    head = list(itertools.islice(batches, 2))
    if num_proc == 1 or len(head) < 2:
        for position, batch in itertools.chain(head, batches):
            yield position, encode(tokenizer, batch)
        return
    with contextlib.ExitStack() as stack:
        workers, waiting = [], deque()
        for i, (position, batch) in enumerate(itertools.chain(head, batches)):
            if len(waiting) == 2 * num_proc:
                yield waiting[0][0], waiting.popleft()[1].receive()
            if i < num_proc:
                workers.append(stack.enter_context(Worker(kept)))
            workers[i % num_proc].send(batch)
            waiting.append((position, workers[i % num_proc]))
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].receive()


class Worker:
    """A process that encodes: batches go in, what encode() makes of them comes out in the same order. Not one of
    concurrent.futures: where one of those is ended from outside, the others may wait for ever."""

    def __init__(self, kept: Path):
        spawn = multiprocessing.get_context(
            "spawn"
        )  # the same on all systems, and safe beside threads
        self.pipe, its_end = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(its_end, kept), daemon=True)
        self.process.start()
        its_end.close()  # so that a pipe breaks with the process at either end of it

    def send(self, batch: list[tuple[str, str, bool]]) -> None:
        with self.alive():
            self.pipe.send(batch)

    def receive(self) -> dict[str, Encoded]:
        with self.alive():
            found = self.pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            what = "a process that tokenises was ended from outside"
            raise UserError(f"{what}; if memory ran out, give a lower --num_proc") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.pipe.close()  # which ends it
        self.process.join()


def _work(pipe: Connection, kept: Path) -> None:
    """What a Worker's process does until its pipe is closed, or broken because the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that began it
    batches = queue.SimpleQueue()

    def read() -> (
        None
    ):  # in a thread, so that neither end waits for the other to take what it sends
        while True:
            try:
                batches.put(pipe.recv())
            except (EOFError, OSError):
                os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    tokenizer = load_tokenizer(kept)
    while True:
        try:
            found = encode(tokenizer, batches.get())
        except Exception as error:  # whatever it is, it is raised where the batch came from
            found = error
        with contextlib.suppress(OSError):  # the reading thread ends this process
            pipe.send(found)


def _batches(
    walked: Iterable[tuple[str, str, bool, Any]],
) -> Iterator[tuple[Any, list[tuple[str, str, bool]]]]:
    batch, size, position = [], 0, None
    for split, text, first, position in walked:
        batch.append((split, text, first))
        size += len(text)
        if size >= BATCH:
            yield position, batch
            batch, size = [], 0
    if batch:
        yield position, batch
