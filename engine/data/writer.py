"""Documents in, token files out: the one place that writes them. tokens.py reads them and says what they are.

tokenise() goes through a corpus in order and fills files of shard_tokens ids in a folder of work. When one is full,
journal.json says how far all splits and the source have come: who is killed at any instant goes on from there, and ends
with the same files. install() moves them into the data set's folder.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from engine.base.errors import UserError, warn
from engine.base.files import flush, write_json
from engine.data.encoding import Encoded, dtype_of, encode_all
from engine.data.shards import find, joined
from engine.data.splits import SPLITS, Corpus, Position, walk
from engine.data.tokenizer import Tokenizer, load_tokenizer

OURS = re.compile(
    rf"\.?({'|'.join(SPLITS)})(_\d+)?(\.bin|\.scanned\.json)"
)  # what a preparation may replace


class SplitWriter:
    """The files of one split: all but the last hold shard_tokens ids; an end-of-text stands between documents."""

    def __init__(
        self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int, state: Mapping
    ):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.itemsize, self.eot = dtype_of(tokenizer).itemsize, tokenizer.eot
        self.shards, self.documents, self.n_bytes = (
            list(state["shards"]),
            state["documents"],
            state["bytes"],
        )
        self.file, self.sha256, self.n = None, hashlib.sha256(), state["open"]
        if (
            self.n
        ):  # the file in progress; what was written behind the journal's end is written again
            self.file = open(self.path, "r+b")  # noqa: SIM115 open until it is full
            self.file.truncate(self.n * self.itemsize)
            while piece := self.file.read(1 << 22):
                self.sha256.update(piece)

    @property
    def path(self) -> Path:
        return self.folder / shard_name(self.split, len(self.shards))

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self.n

    def write(self, encoded: Encoded) -> bool:
        """Append ids; whether that made a file full."""
        if self.eot is None and self.documents + encoded.documents > 1:
            raise UserError("several documents need a tokenizer with an end-of-text token")
        data, before = memoryview(encoded.data), len(self.shards)
        if encoded.documents and not self.documents and self.eot is not None:
            data = data[self.itemsize :]  # nothing stands before the first of all
        self.documents, self.n_bytes = (
            self.documents + encoded.documents,
            self.n_bytes + encoded.n_bytes,
        )
        while data:
            self.file = self.file or open(self.path, "wb")  # noqa: SIM115 open until it is full
            piece = data[: (self.shard_tokens - self.n) * self.itemsize]
            self.file.write(piece)
            self.sha256.update(piece)
            data, self.n = data[len(piece) :], self.n + len(piece) // self.itemsize
            if self.n == self.shard_tokens:
                self.close_file()
        return len(self.shards) > before

    def close_file(self) -> None:
        if self.file:
            self.sync()
            self.file.close()
            self.shards.append(
                {"file": self.path.name, "tokens": self.n, "sha256": self.sha256.hexdigest()}
            )
            self.file, self.sha256, self.n = None, hashlib.sha256(), 0

    def sync(self) -> None:
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def state(self) -> dict:
        return {
            "documents": self.documents,
            "bytes": self.n_bytes,
            "open": self.n,
            "shards": self.shards,
        }

    def described(self) -> dict:
        """The finished split as meta.json has it."""
        about = {"documents": self.documents, "tokens": self.tokens, "bytes": self.n_bytes}
        if len(self.shards) == 1:
            return about | {"sha256": self.shards[0]["sha256"]}
        return about | {
            "sha256": joined(shard["sha256"] for shard in self.shards),
            "shards": self.shards,
        }


def shard_name(split: str, i: int) -> str:
    return f"{split}_{i:06d}.bin"


def tokenise(
    corpus: Corpus,
    tokenizer: Tokenizer,
    work: Path,
    shard_tokens: int,
    num_proc: int,
    about: Mapping[str, str],
) -> None:
    """Write a corpus' files into the folder of work, from where a killed call stopped, and last of all meta.json.

    about: what else that says, such as the source."""
    source = hashlib.sha256(
        "\n".join(part.identity for _, part in corpus.parts).encode()
    ).hexdigest()
    journal, new = work / "journal.json", {"shards": [], "documents": 0, "bytes": 0, "open": 0}
    known = read_journal(journal, source, dtype_of(tokenizer).itemsize) or {"at": (), "splits": {}}
    names = [name for name in SPLITS if name in {*corpus.splits, *corpus.fractions}]
    writers = {
        name: SplitWriter(work, name, tokenizer, shard_tokens, known["splits"].get(name, new))
        for name in names
    }
    sizes = [0, *itertools.accumulate(part.size for _, part in corpus.parts)]
    before, started = sum(writer.tokens for writer in writers.values()), time.perf_counter()
    if before:
        print(f"going on behind {before:,} tokens")
    at = Position(*known["at"])
    show = {
        "total": sizes[-1] or None,
        "initial": sizes[at.part] + at.read,
        "unit": "B",
        "unit_scale": True,
    }
    with tqdm(**show, disable=None) as bar:
        for position, found in encode_all(
            walk(corpus, at), tokenizer, work / "tokenizer", num_proc
        ):
            full = [name for name, encoded in found.items() if writers[name].write(encoded)]
            rate = (sum(writer.tokens for writer in writers.values()) - before) / (
                time.perf_counter() - started
            )
            bar.set_postfix_str(f"{rate / 1e6:.2f} M tokens/s", refresh=False)
            bar.update(sizes[position.part] + position.read - bar.n)
            for name in full:
                bar.write(
                    f"{len(writers[name].shards):,} files of {name} are whole ({rate / 1e6:.2f} M tokens/s)"
                )
            if full:
                for writer in writers.values():
                    writer.sync()
                states = {name: writer.state() for name, writer in writers.items()}
                write_json(journal, {"at": position, "splits": states, "source": source})
    for writer in writers.values():
        writer.close_file()
        if not writer.shards:
            raise UserError(
                f"there is no text for the {writer.split} split; give more text or another --val_fraction"
            )
    meta = {
        "tokenizer": tokenizer.describe(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype_of(tokenizer).name,
    }
    splits = {name: writer.described() for name, writer in writers.items()}
    write_json(work / "meta.json", meta | {"splits": splits} | about)


def read_journal(journal: Path, source: str, itemsize: int) -> dict | None:
    """What an earlier call has left; None where it has left nothing, or nothing that can be gone on with."""
    if not journal.is_file():
        return None
    try:
        known, sizes = json.loads(journal.read_text()), {}
        Position(*known["at"])
        for split, about in known["splits"].items():
            sizes |= {shard["file"]: shard["tokens"] for shard in about["shards"]}
            sizes |= (
                {shard_name(split, len(about["shards"])): about["open"]} if about["open"] else {}
            )
        paths = {journal.parent / name: tokens * itemsize for name, tokens in sizes.items()}
        there = all(path.is_file() and path.stat().st_size >= size for path, size in paths.items())
        reason = (
            "the text has changed"
            if known["source"] != source
            else ""
            if there
            else "its files are damaged"
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = "its journal is damaged"
    if reason:
        warn(f"the work in {journal.parent} cannot be gone on with ({reason}): beginning anew")
        journal.unlink()
        return None
    return known


def keep_tokenizer(tokenizer: Tokenizer, work: Path) -> None:
    """Save the tokenizer in the folder of work, whole or not at all: who goes on uses the same one."""
    beside = work / "tokenizer.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    tokenizer.save(beside)
    write_json(
        beside / "meta.json",
        {"tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size},
    )
    beside.rename(work / "tokenizer")


def files_of(split: str, about: Mapping) -> list[str]:
    """The names of a split's files; about: its entry in meta.json."""
    return [shard["file"] for shard in about.get("shards", [{"file": f"{split}.bin"}])]


def install(work: Path, folder: Path) -> None:
    """Move what is finished into the data set's folder, and take away what an earlier preparation left there.

    meta.json comes first: whoever is stopped in between leaves files that do not match it, which TokenFile refuses, and
    the folder of work, in which the next call finds all that is still to be moved."""
    meta, names = json.loads((work / "meta.json").read_text()), set()
    write_json(folder / "meta.json", meta)
    load_tokenizer(work / "tokenizer").save(folder)
    for split, about in meta["splits"].items():
        for i, name in enumerate(files_of(split, about)):
            names.add(name)
            if (made := work / shard_name(split, i)).is_file():
                os.replace(made, folder / name)
    if not is_whole(folder, meta):  # somebody has taken files out of work
        (work / "meta.json").unlink()  # so that the next call makes them again
        raise UserError(f"files of {folder} are gone")
    flush(folder)
    for path in folder.iterdir():
        ours = OURS.fullmatch(path.name)
        if ours and f"{ours[1]}{ours[2] or ''}.bin" not in names:
            path.unlink()
    shutil.rmtree(work)


def is_whole(folder: Path, meta: dict) -> bool:
    """Whether all files that a meta.json names are in the folder, in their sizes."""
    try:
        return all(find(folder, split, meta) for split in meta["splits"])
    except UserError:  # that finds one of another size, or a description of none
        return False
