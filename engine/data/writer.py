"""Write token files: threads encode the documents of a corpus, and one writer fills files.

tokenise() fills files of shard_tokens ids in a work folder. Whenever a file is full, journal.json
records how far the corpus has been read and each split been written. A preparation that was killed
continues from there and ends with the same files. install() moves them into the data set's folder.
"""

import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from engine.base.errors import UserError, warn
from engine.base.files import flush, read_json, sha256_of, write_json
from engine.data.shards import joined
from engine.data.splits import SPLITS, Corpus, Position, walk
from engine.data.tokenizer import Tokenizer, load_tokenizer

BATCH = 1 << 20  # characters that a thread gets at once, or one piece more
# what a preparation may replace
OURS = re.compile(rf"({'|'.join(SPLITS)})(_\d+)?\.bin")


class Encoded(NamedTuple):
    """What a batch adds to a split."""

    ids: np.ndarray  # with an end-of-text before each document
    documents: int  # so many start here
    n_bytes: int  # of the text, in UTF-8


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids in a file."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encode(tokenizer: Tokenizer, pieces: list[tuple[str, bool]]) -> Encoded:
    """Encode pieces: text, and whether a document starts with it."""
    end_of_text = np.array([] if tokenizer.eot is None else [tokenizer.eot], np.uint32)
    ids, documents, n_bytes = [], 0, 0
    for text, is_start in pieces:
        if is_start:
            ids.append(end_of_text)
        ids.append(tokenizer.encode(text))
        documents += is_start
        n_bytes += len(text.encode())
    return Encoded(np.concatenate(ids).astype(dtype_of(tokenizer)), documents, n_bytes)


def encode_all(
    corpus: Corpus, start: Position, folder: Path, n_threads: int
) -> Iterator[tuple[Position, dict[str, Encoded]]]:
    """Encode what lies after start, batch by batch, in order; yields the position after each.

    folder: where each thread loads its own tokenizer. In a shared one they wait for each other."""
    local = threading.local()

    def load() -> None:
        local.tokenizer = load_tokenizer(folder)

    def encode_batch(batch: dict[str, list]) -> dict[str, Encoded]:
        return {split: encode(local.tokenizer, pieces) for split, pieces in batch.items()}

    with ThreadPoolExecutor(n_threads, initializer=load) as pool:
        waiting = deque()
        for position, batch in _batches(corpus, start):
            waiting.append((position, pool.submit(encode_batch, batch)))
            if len(waiting) > 2 * n_threads:  # bounds the memory
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _batches(corpus: Corpus, start: Position) -> Iterator[tuple[Position, dict[str, list]]]:
    """The pieces of each split, in batches, and the position after each batch."""
    batch, size, position = {}, 0, start
    for split, text, is_start, position in walk(corpus, start):
        batch.setdefault(split, []).append((text, is_start))
        size += len(text)
        if size >= BATCH:
            yield position, batch
            batch, size = {}, 0
    if batch:
        yield position, batch


@dataclass
class SplitWriter:
    """Writes the files of one split, all but the last with shard_tokens ids."""

    folder: Path
    split: str
    tokenizer: Tokenizer
    shard_tokens: int
    documents: int = 0
    n_bytes: int = 0  # of text
    n_open: int = 0  # ids in the file that is not full yet
    shards: list[dict] = field(default_factory=list)  # the full files

    def __post_init__(self):
        self.file = None
        if self.n_open:  # continue; ids after the journal's end are written again
            self.file = open(self.path, "r+b")  # noqa: SIM115 open until it is full
            self.file.seek(self.n_open * dtype_of(self.tokenizer).itemsize)
            self.file.truncate()

    @property
    def path(self) -> Path:
        return self.folder / shard_name(self.split, len(self.shards))

    @property
    def n_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self.n_open

    def write(self, encoded: Encoded) -> None:
        ids, eot = encoded.ids, self.tokenizer.eot
        if eot is None and self.documents + encoded.documents > 1:
            raise UserError("several documents need a tokenizer with an end-of-text token")
        if eot is not None and encoded.documents and not self.documents:
            ids = ids[1:]  # nothing comes before the first document
        self.documents += encoded.documents
        self.n_bytes += encoded.n_bytes
        while len(ids):
            if self.file is None:
                self.file = open(self.path, "wb")  # noqa: SIM115 open until it is full
            part = ids[: self.shard_tokens - self.n_open]
            self.file.write(part.data)
            self.n_open += len(part)
            ids = ids[len(part) :]
            if self.n_open == self.shard_tokens:
                self.close_file()

    def close_file(self) -> None:
        if self.file is None:
            return
        self.file.close()
        flush(self.path)
        sha256 = sha256_of(self.path)
        self.shards.append({"file": self.path.name, "tokens": self.n_open, "sha256": sha256})
        self.file, self.n_open = None, 0

    def state(self) -> dict:
        """What the journal keeps, with all ids on the disk."""
        if self.file:
            self.file.flush()
            flush(self.path)
        return {key: getattr(self, key) for key in ("documents", "n_bytes", "n_open", "shards")}

    def described(self) -> dict:
        """The finished split's entry in meta.json."""
        about = {"documents": self.documents, "tokens": self.n_tokens, "bytes": self.n_bytes}
        if len(self.shards) == 1:
            return about | {"sha256": self.shards[0]["sha256"]}
        sha256 = joined(shard["sha256"] for shard in self.shards)
        return about | {"sha256": sha256, "shards": self.shards}


def shard_name(split: str, i: int) -> str:
    return f"{split}_{i:06d}.bin"


def tokenise(
    corpus: Corpus,
    tokenizer: Tokenizer,
    work: Path,
    shard_tokens: int,
    n_threads: int,
    about: dict[str, str],
) -> None:
    """Write a corpus' files into the work folder; the journal's last entry is their meta.json.

    about: what else meta.json says, such as the source."""
    sources = [source.name for _, source in corpus.sources]
    known = read_journal(work)
    if known.get("sources", sources) != sources:
        warn(f"the text has changed since {work} was begun: starting from its first document")
        known = {}
    start = Position(*known.get("position", ()))
    states = known.get("splits", {})
    writers = {
        split: SplitWriter(work, split, tokenizer, shard_tokens, **states.get(split, {}))
        for split in corpus.names
    }
    n_before = sum(writer.n_tokens for writer in writers.values())
    if n_before:
        print(f"continuing after {n_before:,} tokens")
    with tqdm(initial=n_before, unit=" tokens", unit_scale=True, disable=None) as bar:
        for position, encoded in encode_all(corpus, start, work, n_threads):
            n_files = sum(len(writer.shards) for writer in writers.values())
            for split, batch in encoded.items():
                writers[split].write(batch)
                bar.update(len(batch.ids))
            bar.set_postfix_str(f"source {position.source + 1} of {len(sources)}")
            if sum(len(writer.shards) for writer in writers.values()) > n_files:
                states = {split: writer.state() for split, writer in writers.items()}
                entry = {"position": position, "splits": states, "sources": sources}
                write_json(work / "journal.json", entry)
    for split, writer in writers.items():
        writer.close_file()
        if not writer.shards:
            advice = "give more text or another --val_fraction"
            raise UserError(f"there is no text for the {split} split; {advice}")
    meta = {
        "tokenizer": tokenizer.describe(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype_of(tokenizer).name,
        "splits": {split: writer.described() for split, writer in writers.items()},
    }
    write_json(work / "journal.json", {"meta": meta | about})


def keep_tokenizer(tokenizer: Tokenizer, work: Path) -> None:
    """Save the tokenizer in the work folder; meta.json comes last and says that it is whole."""
    work.mkdir(exist_ok=True)
    tokenizer.save(work)
    about = {"tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size}
    write_json(work / "meta.json", about)


def read_journal(work: Path) -> dict:
    """What the last call left: how far it came, or once all is done the meta.json to install."""
    path = work / "journal.json"
    return read_json(path) if path.is_file() else {}


def files_of(split: str, about: Mapping) -> dict[str, int]:
    """The names of a split's files and their numbers of ids; about: its entry in meta.json."""
    shards = about.get("shards", [{"file": f"{split}.bin", "tokens": about["tokens"]}])
    return {shard["file"]: shard["tokens"] for shard in shards}


def install(work: Path, folder: Path) -> None:
    """Move finished files into the data set's folder, in place of those of an earlier preparation.

    These go first: until all new files are there, a file is missing and the data set is refused.
    The next call finds in the work folder what is still to be moved."""
    meta = read_journal(work)["meta"]
    moves = {}
    for split, about in meta["splits"].items():
        for i, name in enumerate(files_of(split, about)):
            moves[folder / name] = work / shard_name(split, i)
    for path in folder.iterdir():
        is_new = path in moves and not moves[path].is_file()
        if OURS.fullmatch(path.name) and not is_new:
            path.unlink()
    write_json(folder / "meta.json", meta)
    load_tokenizer(work).save(folder)
    for path, made in moves.items():
        if made.is_file():
            os.replace(made, path)
    flush(folder)
    shutil.rmtree(work)
    if not is_whole(folder, meta):
        raise UserError(f"files of {work} are gone; run the same command to make them again")


def is_whole(folder: Path, meta: Mapping) -> bool:
    """Whether all files that meta.json names are in the folder, in their sizes."""
    itemsize = np.dtype(meta["dtype"]).itemsize
    for split, about in meta["splits"].items():
        for name, tokens in files_of(split, about).items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != tokens * itemsize:
                return False
    return True
