"""Text <-> token ids. load_tokenizer(folder) returns the tokenizer that a folder's meta.json names.

There are four kinds: GPT-2's BPE (gpt2_bpe.py), a BPE trained on the corpus, characters, bytes.
"""

import codecs
import hashlib
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from engine.base.errors import UserError, warn
from engine.base.files import read_json, write_json
from engine.data.gpt2_bpe import BYTES, GPT2Tokenizer, to_bytes
from engine.data.tokenizer_base import END_OF_TEXT, Tokenizer, token_bytes_of

KINDS = ("gpt2", "bpe", "char", "byte")
LONG_WORD = re.compile(r"(\S{1000})")


class BPETokenizer(Tokenizer):
    """A byte-level BPE in <folder>/tokenizer.json, the format of the tokenizers library."""

    kind, file = "bpe", "tokenizer.json"

    def __init__(self, bpe):
        self.bpe = bpe
        self.bpe.encode_special_tokens = True  # "<|endoftext|>" in a text stays text
        self.vocab_size = bpe.get_vocab_size()
        self.eot = bpe.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Train on the texts. vocab_size includes the 256 bytes and end-of-text."""
        import tokenizers

        bpe = byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        )
        # only these pieces of a long word: the time to learn from it is quadratic in its length
        pieces = (piece for text in texts for piece in LONG_WORD.split(text))
        bpe.train_from_iterator(pieces, trainer)
        return cls(bpe)

    @classmethod
    def load(cls, folder: Path) -> "BPETokenizer":
        import tokenizers

        path = folder / cls.file
        try:
            bpe = tokenizers.Tokenizer.from_file(str(path))
            if "ByteLevel" not in str(json.loads(bpe.to_str())["decoder"]):
                raise ValueError("its tokens are not made of bytes")
            if not BYTES.keys() <= bpe.get_vocab().keys():
                raise ValueError("some bytes have no token")
            bpe.no_truncation()  # settings that transformers saves too
            bpe.no_padding()
            tokenizer = cls(bpe)
            tokenizer.token_bytes()
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"{path} is no byte-level BPE ({str(error)[:80]}); prepare the data or export again"
            ) from None
        return tokenizer

    def encode(self, text: str) -> np.ndarray:
        encoding = self.bpe.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)

    def token_bytes(self) -> list[bytes]:
        tokens = [self.bpe.id_to_token(i) for i in range(self.vocab_size)]
        return [b"" if i == self.eot else to_bytes(token) for i, token in enumerate(tokens)]

    def describe(self) -> dict:
        data = self.bpe.to_str().encode()
        return {"kind": self.kind, "sha256": hashlib.sha256(data).hexdigest()}

    def save(self, folder: Path) -> None:
        self.bpe.save(str(folder / self.file))


def byte_level(model):
    """A tokenizers.Tokenizer of this BPE that splits text and joins tokens as GPT-2 does."""
    import tokenizers

    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe


class CharTokenizer(Tokenizer):
    """One id per character, in the order of `chars`. With eot, end-of-text is the last id."""

    kind = "char"

    def __init__(self, chars: Iterable[str], eot: bool = False):
        self.chars = list(chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.eot = len(self.chars) if eot else None
        self.vocab_size = len(self.chars) + int(eot)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array([self.ids[char] for char in text], dtype=np.uint32)
        except KeyError as error:
            raise UserError(
                f"the character {error.args[0]!r} is not in this data set's vocabulary"
            ) from None

    def token_bytes(self) -> list[bytes]:
        characters = [char.encode() for char in self.chars]
        return characters if self.eot is None else [*characters, b""]

    def describe(self) -> dict:
        return {"kind": self.kind, "chars": self.chars, "eot": self.eot is not None}


class IdTokenizer(CharTokenizer):
    """Ids of unknown text: meta.pkl has the size of the vocabulary only. Each counts as a word."""

    kind = "none"

    def encode(self, text: str) -> np.ndarray:
        raise UserError(
            "the text of this model's tokens is unknown; replace meta.json in its folder by a "
            'meta.pkl that has "itos", or by a tokenizer.json'
        )

    def token_bytes(self) -> list[bytes]:
        return [b"? "] * self.vocab_size

    def describe(self) -> dict:
        return {"kind": self.kind}


class ByteTokenizer(Tokenizer):
    """The 256 bytes and end-of-text, for any text."""

    kind, vocab_size, eot = "byte", 257, 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b""]


def incremental_decoder(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A function that takes the ids of a text one by one and returns the text that each adds.

    A character of several tokens is returned with the last of them."""
    token_bytes = token_bytes_of(tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(token):
        return END_OF_TEXT if token == tokenizer.eot else decoder.decode(token_bytes[token])

    return decode


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder's meta.json, nanoGPT's meta.pkl or transformers' tokenizer.json.

    Without any of these it is GPT-2's BPE."""
    folder = Path(folder)
    has_bpe = (folder / BPETokenizer.file).exists()
    about = {"kind": "bpe" if has_bpe else "gpt2"}
    if meta := read_meta(folder):
        about = meta["tokenizer"]
    kind = about.get("kind")
    if kind == "gpt2":
        return GPT2Tokenizer.load(folder)
    if kind == "bpe":
        return BPETokenizer.load(folder)
    if kind == "char":
        return CharTokenizer(about["chars"], about["eot"])
    if kind == "byte":
        return ByteTokenizer()
    if kind == "none":
        warn(f"the text of {folder}'s tokens is unknown: ignore counts of words and bytes")
        return IdTokenizer(map(str, range(meta["vocab_size"])))
    raise UserError(f"{folder} names an unknown tokenizer {kind!r}; known: {', '.join(KINDS)}")


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **more) -> None:
    """Write a tokenizer's files, then the meta.json that names it. more: its other entries."""
    tokenizer.save(folder)
    meta = {"tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size}
    write_json(folder / "meta.json", meta | more)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder names its tokenizer."""
    names = ("meta.json", "meta.pkl", GPT2Tokenizer.file, BPETokenizer.file)
    return any((folder / name).exists() for name in names)


def read_meta(folder: str | Path) -> dict | None:
    """A folder's meta.json, or nanoGPT's meta.pkl in the same form; None if it has neither."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        path = path.with_name("meta.pkl")
        return _read_meta_pkl(path) if path.exists() else None
    meta = read_json(path)
    is_good = isinstance(meta.get("vocab_size"), int) and isinstance(meta.get("tokenizer"), dict)
    if not is_good or meta.get("dtype", "uint16") not in ("uint16", "uint32"):
        raise UserError(f"{path} does not describe a data set; prepare the data again")
    return meta


def _read_meta_pkl(path):
    """nanoGPT's character table. Without "itos" only the vocabulary's size is known, which is
    enough for training."""
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        tokenizer = {"kind": "none"}
        if itos := meta.get("itos"):
            chars = [itos[i] for i in range(len(itos))]
            tokenizer = {"kind": "char", "chars": chars, "eot": False}
        return {"tokenizer": tokenizer, "vocab_size": int(meta["vocab_size"])}
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise UserError(
            f"{path} is not a nanoGPT character table: {type(error).__name__}: {error}"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers. Refuses anything that would import or call."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"refused to run {module}.{name}")
