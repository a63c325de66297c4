"""What the prepare scripts share: reading text files, making the tokenizer, knowing that the work is done already."""

import hashlib
import urllib.request
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from engine.errors import UserError
from engine.tokenizer import KINDS, BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, read_meta

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text(path: str | Path) -> str:
    """The file's text, line ends as they are; a file that is missing or not UTF-8 is a UserError."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; convert it, e.g. with iconv -t UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def check_sha256(data: bytes, expected: str, what: str) -> bytes:
    """The data, if its hash is the expected one."""
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise UserError(f"{what} has sha256 {found[:12]}..., not {expected[:12]}...: another file, or a damaged one")
    return data


def tiny_shakespeare(source: str, folder: Path) -> tuple[str, str]:
    """nanoGPT's train and val text, 90 % and 10 %, from a local copy (source) or fetched once into the folder."""
    path = Path(source or folder / "input.txt")
    if not source and not path.is_file():
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=60) as response:
                data = check_sha256(response.read(), SHAKESPEARE_SHA256, SHAKESPEARE)
        except OSError as error:
            raise UserError(f"cannot fetch {SHAKESPEARE} ({error}); give a local copy with --source=PATH") from None
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    text = read_text(path)
    check_sha256(text.encode(), SHAKESPEARE_SHA256, f"{path} (for a text of your own use data/text/prepare.py)")
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def make_tokenizer(kind: str, splits: Mapping[str, Sequence[str]], vocab_size: int) -> Tokenizer:
    """The tokenizer for these documents. A BPE learns from train alone; characters must cover every split."""
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer {kind!r}; known: {', '.join(KINDS)}")
    if kind == "bpe":
        if not 257 <= vocab_size <= 1 << 20:
            raise UserError(f"--vocab_size={vocab_size}: a BPE needs 257 (the bytes and end-of-text) to {1 << 20}")
        return BPETokenizer.train(splits["train"], vocab_size)
    if kind == "char":
        needs_eot = any(len(documents) > 1 for documents in splits.values())
        return CharTokenizer.train(chain(*splits.values()), eot=needs_eot)
    return GPT2Tokenizer() if kind == "gpt2" else ByteTokenizer()


def is_prepared(folder: Path, kind: str, vocab_size: int) -> bool:
    """Whether the folder holds a whole data set, by its own hashes, made with this tokenizer."""
    meta = read_meta(folder)
    if meta is None or meta["tokenizer"].get("kind") != kind or (kind == "bpe" and meta["vocab_size"] != vocab_size):
        return False
    if kind == "bpe" and not (folder / BPETokenizer.file).is_file():
        return False
    files = {folder / f"{split}.bin": about.get("sha256") for split, about in meta.get("splits", {}).items()}
    return bool(files) and all(
        p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == sha256 for p, sha256 in files.items()
    )
