"""What the prepare scripts share: options, tokenizers, and prepare(), which resumes if killed."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from engine.base.errors import UserError, run_main, warn
from engine.base.files import DATA_ROOT, check_writable, exclusive_lock, sha256_of
from engine.base.options import PositiveInt, load_config
from engine.data import shards
from engine.data.sources import find, hub, list_files
from engine.data.splits import Corpus, Position, in_memory, walk, with_val
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
    save_tokenizer,
)
from engine.data.writer import OURS, install, read_journal, tokenise

FORMAT = 1  # of the files written; a new number makes every data set be prepared again
LEARN_FROM = 1_000_000  # train documents that a BPE is trained on, at most
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Options:
    """The options of every prepare script. A script may change a default."""

    source: str = ""  # local files or folders with the text, separated by commas; empty: download
    # gpt2, bpe (trained on the train split), char, byte, or a folder with a run, data or a
    # tokenizer.json
    tokenizer: str = "gpt2"
    # of a bpe, including the 256 bytes and end-of-text
    vocab_size: Annotated[int, ">= 257", "<= 1e6"] = 4096
    # share of the train documents that becomes val; 0: the official val split
    val_fraction: Annotated[float, ">= 0", "< 1"] = 0.0
    # tokens per file; a longer split has several files, train_000000.bin ...
    shard_tokens: PositiveInt = 100_000_000
    num_proc: Annotated[int, ">= 0", "<= 1024"] = 0  # threads that tokenise; 0: one per processor
    # for what cannot be decoded: strict refuses it, replace puts U+FFFD in its place, ignore leaves
    # it out, and records without a text too
    errors: Literal["strict", "replace", "ignore"] = "strict"
    encoding: str = ""  # of the source's text; empty: UTF-8, or what a byte-order mark says
    folder: str = ""  # where to write the token files; empty: data/<name>


def main(options_class: type, corpus: Callable[[Any], Corpus]) -> None:
    """Run a prepare script. options_class.name: the data set's folder in data/."""

    def run():
        options, _ = load_config(options_class, sys.argv[1:])
        prepare(options, options.name, lambda: corpus(options))

    run_main(run)


def prepare(options: Options, name: str, corpus: Callable[[], Corpus]) -> None:
    """Write a data set, unless the folder has one with these options from these local files. Its
    hashes are checked.

    A preparation that was killed is continued. corpus: called only if there is text to read."""
    folder = Path(options.folder or DATA_ROOT / name)
    key = _key(options, name)
    work, lock = folder / f".preparing-{key}", folder / ".preparing.lock"
    if _is_ready(folder, key):
        shutil.rmtree(work, ignore_errors=True)
        print(f"{folder} is ready and undamaged; delete its meta.json to prepare it again")
        return
    check_writable(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another process is preparing {folder}; wait for it, or give another --folder"
    with exclusive_lock(lock, busy):
        try:
            if "meta" not in read_journal(work):
                about = {"source": options.source or name, "made_from": key}
                _write(options, corpus(), work, about)
            install(work, folder)
        finally:
            if not read_journal(work):
                shutil.rmtree(work, ignore_errors=True)
            lock.unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()  # unless it holds files
    splits = read_meta(folder)["splits"]
    if "val" not in splits:
        warn(f"train.py will not take {folder}, which has no val split: give --val_fraction=0.05")
    for split, about in splits.items():
        print(f"{folder}, {split}: {about['tokens']:,} tokens, {about['documents']:,} documents")


def _is_ready(folder, key):
    """Whether the folder has a data set with this key, with all its files undamaged."""
    others = [path.name for path in folder.glob("*.bin") if OURS.fullmatch(path.name)]
    if others and not (folder / "meta.json").is_file():
        advice = "move it away, or give another --folder"
        raise UserError(f"another program wrote {folder}/{min(others)}; {advice}")
    try:
        meta = read_meta(folder) or {}
        if meta.get("made_from") != key:
            return False
        files = [file for split in meta["splits"] for file in shards.find(folder, split, meta)]
    except UserError:
        return False
    return all(sha256_of(file.path) == file.sha256 for file in files)


def _key(options, name):
    """A hash of everything that the files depend on."""
    is_local = options.source and not options.source.startswith("hub:")
    stamps = []
    for path in list_files(options.source) if is_local else []:
        stat = os.stat(path)
        stamps.append(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}")
    asked = asdict(options)
    del asked["num_proc"], asked["folder"]
    asked |= {"format": FORMAT, "name": name, "source": sorted(stamps) or options.source}
    if options.tokenizer not in KINDS:
        asked["tokenizer"] = tokenizer_in(options.tokenizer).describe()
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(options, corpus, work, about):
    """Write all files into the work folder, ready to install."""
    if not (work / "meta.json").is_file():  # written last: the tokenizer is complete
        tokenizer = make_tokenizer(options, corpus)
        work.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, work)
    n_threads = options.num_proc or os.cpu_count() or 1
    tokenise(corpus, work, options.shard_tokens, n_threads, about)


def make_tokenizer(options: Options, corpus: Corpus) -> Tokenizer:
    """The tokenizer that the options name. A bpe is trained on train, char covers all splits."""
    kind = options.tokenizer
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        train = (text for split, text, *_ in walk(corpus, Position()) if split == "train")
        # Ctrl-C kills the process: the library, which is not Python, would ignore an exception
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            return BPETokenizer.train(itertools.islice(train, LEARN_FROM), options.vocab_size)
        finally:
            signal.signal(signal.SIGINT, handler)
    if kind == "char":
        characters, documents = set(), Counter()
        for split, text, is_start, _ in walk(corpus, Position()):
            characters.update(text)
            documents[split] += is_start
        return CharTokenizer(sorted(characters), eot=max(documents.values(), default=0) > 1)
    return tokenizer_in(kind)


def tokenizer_in(folder: str) -> Tokenizer:
    """The tokenizer of a run or a data set."""
    if not has_tokenizer(Path(folder)):
        known = f"known: {', '.join(KINDS)}, or a folder with a run, data or a tokenizer.json"
        raise UserError(f"unknown tokenizer {folder!r}; {known}")
    return load_tokenizer(folder)


def train_and_val(options: Options, hub_name: str, subset: str = "") -> Corpus:
    """The local files that --source names, else the train split of a data set on the Hub; val is
    drawn from them."""
    if options.source:
        sources = find(options.source, errors=options.errors, encoding=options.encoding)
    else:
        sources = hub(hub_name, subset)["train"]
    return with_val({"train": sources}, options.val_fraction)


def check_sha256(data: bytes, expected: str, what: str) -> bytes:
    """Return the data if it has this hash."""
    if hashlib.sha256(data).hexdigest() != expected:
        raise UserError(f"{what} is damaged or another file: its sha256 is not {expected}")
    return data


def tiny_shakespeare(options: Options) -> Corpus:
    """Tiny Shakespeare, from a local copy or downloaded. The end of the text is val."""
    data = Path(options.source).read_bytes() if options.source else fetch(SHAKESPEARE)
    what = f"{options.source or SHAKESPEARE} (for your own text use data/text/prepare.py)"
    text = check_sha256(data, SHAKESPEARE_SHA256, what).decode()
    cut = int((1 - options.val_fraction) * len(text))
    splits = {
        "train": [text[:cut]],
        "val": [text[cut:]],
    }
    return Corpus(in_memory(splits))


def fetch(url: str) -> bytes:
    """Download a file."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except OSError as error:
        advice = "give a local copy with --source=PATH"
        raise UserError(f"cannot download {url} ({error}); {advice}") from None
