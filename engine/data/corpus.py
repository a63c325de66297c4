"""What the prepare scripts share: their options, the tokenizer, and a preparation that can be killed and goes on."""

import glob
import hashlib
import json
import os
import shutil
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.base.errors import UserError, check_ranges
from engine.base.files import DATA_ROOT, atomic_write, exclusive_lock
from engine.data.encoding import available_processors
from engine.data.formats import endings, identity_of
from engine.data.sources import Part, Piece, files_below, find, hub, in_pieces
from engine.data.splits import Corpus, Position, walk
from engine.data.tokenizer import (
    KINDS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    read_meta,
)
from engine.data.writer import OURS, files_of, install, is_whole, keep_tokenizer, tokenise

FORMAT = 1  # of what is written here; with another one all is prepared anew
LEARN_FROM = 1 << 30  # characters of the train split that a BPE learns from, at most
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Options:
    """What every prepare script can be told; those that differ override a default."""

    source: str = ""  # local files or folders with the text, commas between; empty: fetch it
    # gpt2, bpe (learnt from the train split), char, byte, or the folder of a run or data set
    tokenizer: str = "gpt2"
    vocab_size: int = 4096  # of a bpe, with its 256 bytes and end-of-text
    # share of the train split's documents to draw for val; 0: the official val split
    val_fraction: float = 0.0
    # ids in a file; a split with more has several, train_000000.bin ...
    shard_tokens: int = 100_000_000
    num_proc: int = 0  # processes that tokenise; 0: as many as there are processors
    errors: str = "strict"  # text that is not UTF-8: strict refuses it, replace reads U+FFFD there
    folder: str = ""  # where the token files go; empty: data/<name>


def prepare(options: Options, name: str, corpus: Callable[[], Corpus]) -> None:
    """Write the data set of that name from a corpus, which is not asked for where all is there already.

    What has been killed goes on, and what is there is ready, for as long as the options and local files are the same.
    """
    check_ranges(
        options, {"val_fraction": (0, 0.999), "shard_tokens": (1, 1 << 40), "num_proc": (0, 1024)}
    )
    if options.errors not in ("strict", "replace"):
        raise UserError(f"errors = {options.errors!r} must be strict or replace")
    folder = Path(options.folder or DATA_ROOT / name)
    asked = {
        key: value for key, value in asdict(options).items() if key not in ("num_proc", "folder")
    }
    asked |= {"format": FORMAT, "name": name, "source": _stamps(options.source) or options.source}
    if options.tokenizer not in KINDS:
        asked["tokenizer"] = tokenizer_in(options.tokenizer).describe()
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    work, lock = folder / f".preparing-{key}", folder / ".preparing.lock"
    if not work.exists() and is_ready(folder, key):
        print(f"{folder} is ready; delete its meta.json to prepare it again")
        return
    _refuse_others_files(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(
        lock, f"another process prepares {folder}; wait for it, or give another --folder"
    ):
        try:
            work.mkdir(exist_ok=True)
            if not (work / "meta.json").is_file():
                _make(options, corpus(), work, {"source": options.source or name, "made_from": key})
            install(work, folder)
            _say(folder)
        except BaseException as error:
            kept = any((work / file).is_file() for file in ("journal.json", "meta.json"))
            if not kept:
                shutil.rmtree(work, ignore_errors=True)
            if kept and isinstance(error, UserError | OSError):
                raise UserError(
                    f"{error}; with the same text the same command goes on behind whole files"
                ) from error
            raise
        finally:
            lock.unlink(missing_ok=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()


def _refuse_others_files(folder: Path) -> None:
    """Token files that no meta.json of ours describes are somebody's work."""
    found = sorted(path.name for path in folder.glob("*.bin") if OURS.fullmatch(path.name))
    if found and not (folder / "meta.json").is_file():
        raise UserError(
            f"{folder} holds {found[0]} of another program; move it away, or give another --folder"
        )


def _make(options: Options, corpus: Corpus, work: Path, about: Mapping[str, str]) -> None:
    """All that is to be installed, in the folder of work."""
    if not (work / "tokenizer").is_dir():
        keep_tokenizer(make_tokenizer(options, corpus), work)
    tokenizer = load_tokenizer(work / "tokenizer")
    tokenise(
        corpus,
        tokenizer,
        work,
        options.shard_tokens,
        options.num_proc or available_processors(),
        about,
    )


def _say(folder: Path) -> None:
    for split, about in read_meta(folder)["splits"].items():
        files = files_of(split, about)
        where = files[0] if len(files) == 1 else f"{split}_*.bin, {len(files):,} files"
        counts = f"{about['documents']:,} documents, {about['bytes']:,} bytes, {about['tokens']:,} tokens"
        print(f"{folder / where}: {counts}")
    for left in sorted(folder.glob(".preparing-*")):
        print(
            f"{left} is unfinished work of other options or another text; delete it if nobody goes on with it"
        )


def is_ready(folder: Path, key: str) -> bool:
    """Whether the folder holds a whole data set that was prepared under this key."""
    try:
        meta = read_meta(folder) or {}
    except UserError:  # a damaged meta.json is what to prepare anew
        return False
    return meta.get("made_from") == key and is_whole(folder, meta)


def _stamps(source: str) -> list[str]:
    """The local files that --source names, with size and time, by which a change of them is seen."""
    source = source.removeprefix("hub:")
    items = [source] if os.path.exists(source) else source.split(",")
    paths = [
        path
        for item in items
        for path in ([item] if os.path.exists(item) else glob.glob(item, recursive=True))
    ]
    files = [
        [path] if os.path.isfile(path) else [p for p in files_below(path) if endings(p)[0]]
        for path in paths
    ]
    return sorted({identity_of(file) for some in files for file in some})


def part_of(name: str, documents: Callable[[], Iterable[str]], size: int = 0) -> Part:
    """A part whose documents a script makes itself; size: their bytes, if known."""

    def pieces() -> Iterator[Piece]:
        read = 0
        for text, first in in_pieces(documents()):
            read += len(text.encode())
            yield Piece(text, first, min(read, size))

    return Part(name, size, name, pieces)


def make_tokenizer(options: Options, corpus: Corpus) -> Tokenizer:
    """The tokenizer that the options name. A BPE learns from train alone; characters must cover every split."""
    kind = options.tokenizer
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        characters, documents = set(), Counter()
        for split, text, first, _ in walk(corpus, Position()):
            characters.update(text)
            documents[split] += first
        return CharTokenizer(sorted(characters), eot=max(documents.values(), default=0) > 1)
    if kind == "bpe":
        if not 257 <= options.vocab_size <= 1 << 20:
            raise UserError(
                f"--vocab_size={options.vocab_size}: a BPE needs 257 (bytes, end-of-text) to {1 << 20}"
            )
        return BPETokenizer.train(_beginning_of_train(corpus, LEARN_FROM), options.vocab_size)
    return tokenizer_in(kind)


def tokenizer_in(folder: str) -> Tokenizer:
    """That of a run or a data set."""
    if Path(folder).is_dir() and (
        read_meta(folder) is not None or (Path(folder) / GPT2Tokenizer.file).is_file()
    ):
        return load_tokenizer(folder)
    raise UserError(
        f"unknown tokenizer {folder!r}; known: {', '.join(KINDS)}, and the folder of a run or a data set"
    )


def _beginning_of_train(corpus: Corpus, n: int) -> Iterator[str]:
    for split, text, *_ in walk(corpus, Position()):
        if split == "train" and n > 0:
            yield text
            n -= len(text)
        elif n <= 0:
            return


def texts(options: Options, hub_name: str, subset: str = "") -> list[Part]:
    """The local files that the options name, else a hub's data set."""
    return find(options.source, errors=options.errors) if options.source else hub(hub_name, subset)


def check_sha256(data: bytes, expected: str, what: str) -> bytes:
    """The data, if its hash is the expected one."""
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise UserError(
            f"{what} has sha256 {found[:12]}..., not {expected[:12]}...: another file, or a damaged one"
        )
    return data


def tiny_shakespeare(options: Options, name: str) -> Corpus:
    """It from a local copy or fetched once into the data set's folder; its end, val_fraction of it, is val."""
    path = Path(options.source or Path(options.folder or DATA_ROOT / name) / "input.txt")
    if not options.source and not path.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=60) as response:
                data = check_sha256(response.read(), SHAKESPEARE_SHA256, SHAKESPEARE)
        except OSError as error:
            raise UserError(
                f"cannot fetch {SHAKESPEARE} ({error}); give a local copy with --source=PATH"
            ) from None
        atomic_write(path, lambda temporary: temporary.write_bytes(data))
    own_text = f"{path} (for a text of your own use data/text/prepare.py)"
    text = check_sha256(path.read_bytes(), SHAKESPEARE_SHA256, own_text).decode()
    cut = int((1 - options.val_fraction) * len(text))
    splits = {"train": text[:cut]} | ({"val": text[cut:]} if options.val_fraction else {})
    return Corpus({split: [part_of(split, lambda t=t: [t], len(t))] for split, t in splits.items()})
