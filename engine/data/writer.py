"""Write token files: threads encode the documents of a corpus, and one writer fills the files.

tokenise() fills files of shard_tokens ids in a work folder. Each time that a file is full,
journal.json records how much of the corpus has been read and how much of each split has been
written. A preparation that was killed continues from there and ends with the same files. install()
moves them into the data set's folder.
"""

import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.base.errors import UserError
from engine.base.files import flush, read_json, sha256_of, write_json
from engine.data.splits import SPLITS, Corpus, Position, walk
from engine.data.tokenizer import Tokenizer, load_tokenizer

BATCH = 1 << 20  # characters that a thread encodes at once; the last piece may exceed it
# the files that a preparation may replace
OURS = re.compile(rf"({'|'.join(SPLITS)})(_\d+)?\.bin")

# ids with end-of-text before each document, and the number of documents that start in them
Encoded = tuple[np.ndarray, int]


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids in the files."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encode(tokenizer: Tokenizer, pieces: list[tuple[str, bool]]) -> Encoded:
    """Encode pieces: (text, whether a document starts with it)."""
    end_of_text = np.array([] if tokenizer.eot is None else [tokenizer.eot], np.uint32)
    ids = []
    n_documents = 0
    for text, is_start in pieces:
        if is_start:
            ids.append(end_of_text)
        ids.append(tokenizer.encode(text))
        n_documents += is_start
    return np.concatenate(ids).astype(dtype_of(tokenizer)), n_documents


def encode_all(
    corpus: Corpus,
    start: Position,
    folder: Path,
    n_threads: int,
) -> Iterator[tuple[Position, dict[str, Encoded]]]:
    """Encode the corpus after start, in order; yields each batch with the position after it.

    folder: each thread loads its own tokenizer from it. With a shared one they wait for each
    other."""
    local = threading.local()

    def load():
        local.tokenizer = load_tokenizer(folder)

    def encode_batch(batch):
        return {split: encode(local.tokenizer, pieces) for split, pieces in batch.items()}

    def batches():
        batch, size, position = {}, 0, start
        for split, text, is_start, position in walk(corpus, start):
            batch.setdefault(split, []).append((text, is_start))
            size += len(text)
            if size >= BATCH:
                yield position, batch
                batch, size = {}, 0
        yield position, batch

    with ThreadPoolExecutor(n_threads, initializer=load) as pool:
        waiting = deque()
        for position, batch in batches():
            waiting.append((position, pool.submit(encode_batch, batch)))
            if len(waiting) > 2 * n_threads:  # bounds the memory
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


@dataclass
class SplitWriter:
    """Writes the files of one split. All but the last have shard_tokens ids."""

    folder: Path
    split: str
    tokenizer: Tokenizer
    shard_tokens: int
    about: dict  # what has been written so far, as the journal records it

    def __post_init__(self):
        self.shards = self.about["shards"]  # the full files
        if self.n_open:  # ids that the journal does not count are written again
            os.truncate(self.path, self.n_open * dtype_of(self.tokenizer).itemsize)

    @property
    def n_open(self) -> int:
        """The number of ids in the file that is not full yet."""
        return self.about["tokens"] - len(self.shards) * self.shard_tokens

    @property
    def path(self) -> Path:
        return self.folder / shard_name(self.split, len(self.shards))

    def write(self, encoded: Encoded) -> int:
        """Append a batch; returns how many files became full."""
        ids, n_documents = encoded
        n_full = len(self.shards)
        has_eot = self.tokenizer.eot is not None
        if has_eot and not self.about["documents"]:
            ids = ids[1:]  # no end-of-text before the first document
        self.about["documents"] += n_documents
        if not has_eot and self.about["documents"] > 1:
            raise UserError("several documents need a tokenizer with an end-of-text token")
        while len(ids):
            part = ids[: self.shard_tokens - self.n_open]
            with open(self.path, "ab" if self.n_open else "wb") as file:
                file.write(part.data)
            self.about["tokens"] += len(part)
            ids = ids[len(part) :]
            if self.n_open == self.shard_tokens:
                self.close_file()
        return len(self.shards) - n_full

    def close_file(self) -> None:
        path = self.path
        flush(path)
        about = {"file": path.name, "tokens": self.n_open, "sha256": sha256_of(path)}
        self.shards.append(about)

    def finish(self) -> dict:
        """Close the last file; returns the split's entry in meta.json."""
        if self.n_open:
            self.close_file()
        if not self.shards:
            advice = "give more text or another --val_fraction"
            raise UserError(f"there is no text for the {self.split} split; {advice}")
        if len(self.shards) == 1:
            self.shards[0]["file"] = f"{self.split}.bin"
        return self.about


def shard_name(split: str, i: int) -> str:
    return f"{split}_{i:06d}.bin"


def tokenise(
    corpus: Corpus,
    work: Path,
    shard_tokens: int,
    n_threads: int,
    about: dict[str, str],
) -> None:
    """Write the files of a corpus into the work folder. The journal ends with their meta.json.

    The folder holds the tokenizer. about: further entries of meta.json, such as the source."""
    tokenizer = load_tokenizer(work)
    sources = [source.name for _, source in corpus.sources]
    journal = read_journal(work)
    if journal.get("sources", sources) != sources:
        journal = {}  # the text has changed: start from its first document
    start = Position(*journal.get("position", ()))
    writers = {}
    for split in {**corpus.splits, **corpus.fractions}:
        written = {"documents": 0, "tokens": 0, "shards": []}
        if journal:
            written = journal["splits"][split]
        writers[split] = SplitWriter(work, split, tokenizer, shard_tokens, written)
    for position, encoded in encode_all(corpus, start, work, n_threads):
        n_closed = sum(writers[split].write(batch) for split, batch in encoded.items())
        if n_closed:
            for writer in writers.values():
                if writer.n_open:
                    flush(writer.path)
            splits = {split: writer.about for split, writer in writers.items()}
            journal = {"position": position, "splits": splits, "sources": sources}
            write_json(work / "journal.json", journal)
            n_tokens = sum(about["tokens"] for about in splits.values())
            print(f"{n_tokens:,} tokens; the same command continues from here")
    meta = read_json(work / "meta.json") | about
    meta["dtype"] = dtype_of(tokenizer).name
    meta["splits"] = {split: writer.finish() for split, writer in writers.items()}
    write_json(work / "journal.json", {"meta": meta})


def read_journal(work: Path) -> dict:
    """What has been done so far: the position in the corpus, or the meta.json to install."""
    path = work / "journal.json"
    return read_json(path) if path.is_file() else {}


def install(work: Path, folder: Path) -> None:
    """Move finished files into the data set's folder, in place of an earlier preparation's.

    The old files are deleted first. Until all new files are moved, one is missing and the data set
    is refused. If this is interrupted, the next call moves the files that are left."""
    meta = read_journal(work)["meta"]
    moves = {}
    for split, about in meta["splits"].items():
        for i, shard in enumerate(about["shards"]):
            moves[folder / shard["file"]] = work / shard_name(split, i)
    for path in folder.iterdir():
        is_old = path not in moves or moves[path].is_file()
        if OURS.fullmatch(path.name) and is_old:
            path.unlink()
    write_json(folder / "meta.json", meta)
    load_tokenizer(work).save(folder)
    for path, made in moves.items():
        if made.is_file():
            os.replace(made, path)
    flush(folder)
    shutil.rmtree(work)
