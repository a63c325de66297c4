"""What the prepare scripts share: options, tokenizers, and prepare(), which can be killed."""

import contextlib
import hashlib
import json
import os
import shutil
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.base.errors import UserError
from engine.base.files import DATA_ROOT, atomic_write, exclusive_lock
from engine.base.options import PositiveInt, check_options
from engine.data.sources import Source, find, hub, list_files, source_of
from engine.data.splits import Corpus, Position, walk
from engine.data.tokenizer import (
    KINDS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
    read_meta,
)
from engine.data.writer import (
    OURS,
    files_of,
    install,
    is_whole,
    keep_tokenizer,
    read_journal,
    tokenise,
)

FORMAT = 1  # of what is written here; a new number prepares every data set again
LEARN_FROM = 1 << 30  # characters of the train split that a BPE learns from, at most
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Options:
    """The options of every prepare script, which may override a default."""

    source: str = ""  # local files or folders with the text, commas between; empty: fetch it
    # gpt2, bpe (learnt from the train split), char, byte, or the folder of a run or data set
    tokenizer: str = "gpt2"
    # of a bpe, with its 256 bytes and end-of-text
    vocab_size: Annotated[int, ">= 257", "<= 1e6"] = 4096
    # share of the train split's documents to draw for val; 0: the official val split
    val_fraction: Annotated[float, ">= 0", "< 1"] = 0.0
    # ids in a file; a split with more has several, train_000000.bin ...
    shard_tokens: PositiveInt = 100_000_000
    num_proc: Annotated[int, ">= 0", "<= 1024"] = 0  # threads that tokenise; 0: one per processor
    # text that is not UTF-8: strict refuses it, replace reads U+FFFD there
    errors: Literal["strict", "replace"] = "strict"
    folder: str = ""  # where the token files go; empty: data/<name>

    def __post_init__(self):
        check_options(self)


def prepare(options: Options, name: str, corpus: Callable[[], Corpus]) -> None:
    """Write a data set, unless it is there, made with the same options from the same local files.

    corpus: called if there is work to do. A preparation that was killed is continued."""
    folder = Path(options.folder or DATA_ROOT / name)
    key = _key(options, name)
    work = folder / f".preparing-{key}"
    meta = _read_ours(folder)
    if not work.exists() and meta.get("made_from") == key and is_whole(folder, meta):
        print(f"{folder} is ready; delete its meta.json to prepare it again")
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".preparing.lock"
    busy = f"another process prepares {folder}; wait for it, or give another --folder"
    with exclusive_lock(lock, busy):
        try:
            if "meta" not in read_journal(work):
                about = {"source": options.source or name, "made_from": key}
                _write(options, corpus(), work, about)
            install(work, folder)
            _describe(folder)
        except (UserError, OSError) as error:
            if not read_journal(work):
                raise
            raise UserError(f"{error}; run the same command again to continue") from error
        finally:
            if not read_journal(work):
                shutil.rmtree(work, ignore_errors=True)
            lock.unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing is in it


def _key(options: Options, name: str) -> str:
    """A hash of all that decides what is written."""
    source = options.source.removeprefix("hub:")
    is_local = os.path.exists(source) or (source and source == options.source)
    files = [os.path.abspath(path) for path in list_files(source)] if is_local else []
    stamps = [f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}" for path in files]
    asked = asdict(options)
    del asked["num_proc"], asked["folder"]
    asked |= {"format": FORMAT, "name": name, "source": sorted(stamps) or options.source}
    if options.tokenizer not in KINDS:
        asked["tokenizer"] = tokenizer_in(options.tokenizer).describe()
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _read_ours(folder: Path) -> dict:
    """A data set's meta.json, or {} if that is damaged; refuse another program's files."""
    if not (folder / "meta.json").is_file():
        others = [path.name for path in folder.glob("*.bin") if OURS.fullmatch(path.name)]
        if others:
            advice = "move it away, or give another --folder"
            raise UserError(f"{folder} holds {min(others)} of another program; {advice}")
    try:
        return read_meta(folder) or {}
    except UserError:
        return {}


def _write(options: Options, corpus: Corpus, work: Path, about: Mapping[str, str]) -> None:
    """Everything that is to be installed, into the work folder."""
    if not (work / "meta.json").is_file():
        tokenizer = make_tokenizer(options, corpus)
        keep_tokenizer(tokenizer, work)
    n_threads = options.num_proc or available_processors()
    tokenise(corpus, load_tokenizer(work), work, options.shard_tokens, n_threads, about)


def _describe(folder: Path) -> None:
    for split, about in read_meta(folder)["splits"].items():
        n_files = len(files_of(split, about))
        where = f"{split}.bin" if n_files == 1 else f"{split}_*.bin, {n_files:,} files"
        counts = [f"{about[what]:,} {what}" for what in ("documents", "bytes", "tokens")]
        print(f"{folder / where}: {', '.join(counts)}")
    for left in folder.glob(".preparing-*"):
        print(f"{left} is unfinished work with other options; delete it if nobody continues it")


def make_tokenizer(options: Options, corpus: Corpus) -> Tokenizer:
    """The tokenizer that the options name. A BPE learns from train, characters cover all splits."""
    kind = options.tokenizer
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return BPETokenizer.train(_start_of_train(corpus), options.vocab_size)
    if kind == "char":
        characters, documents = set(), Counter()
        for split, text, is_start, _ in walk(corpus, Position()):
            characters.update(text)
            documents[split] += is_start
        return CharTokenizer(sorted(characters), eot=max(documents.values(), default=0) > 1)
    return tokenizer_in(kind)


def _start_of_train(corpus: Corpus) -> Iterator[str]:
    n = 0
    for split, text, *_ in walk(corpus, Position()):
        if n >= LEARN_FROM:
            return
        if split == "train":
            yield text
            n += len(text)


def tokenizer_in(folder: str) -> Tokenizer:
    """The tokenizer of a run or a data set."""
    if not has_tokenizer(Path(folder)):
        known = f"known: {', '.join(KINDS)}, and the folder of a run or a data set"
        raise UserError(f"unknown tokenizer {folder!r}; {known}")
    return load_tokenizer(folder)


def available_processors() -> int:
    """The processors that this process may use, on a cluster fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def texts(options: Options, hub_name: str, subset: str = "") -> list[Source]:
    """The local files that --source names, or else a data set of the Hub."""
    if options.source:
        return find(options.source, errors=options.errors)
    return hub(hub_name, subset)


def check_sha256(data: bytes, expected: str, what: str) -> bytes:
    """The data, if it has this hash."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        hashes = f"sha256 {found[:12]}..., not {expected[:12]}..."
        raise UserError(f"{what} has {hashes}: another file, or a damaged one")
    return data


def tiny_shakespeare(options: Options, name: str) -> Corpus:
    """Tiny Shakespeare from a local copy, or fetched once; the end of the text is val."""
    path = Path(options.source or Path(options.folder or DATA_ROOT / name) / "input.txt")
    if not options.source and not path.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=60) as response:
                data = check_sha256(response.read(), SHAKESPEARE_SHA256, SHAKESPEARE)
        except OSError as error:
            advice = "give a local copy with --source=PATH"
            raise UserError(f"cannot fetch {SHAKESPEARE} ({error}); {advice}") from None
        atomic_write(path, lambda temporary: temporary.write_bytes(data))
    what = f"{path} (for a text of your own use data/text/prepare.py)"
    text = check_sha256(path.read_bytes(), SHAKESPEARE_SHA256, what).decode()
    cut = int((1 - options.val_fraction) * len(text))
    splits = {"train": [source_of("train", lambda: [text[:cut]])]}
    if options.val_fraction:
        splits["val"] = [source_of("val", lambda: [text[cut:]])]
    return Corpus(splits)
