"""Text <-> token ids. A folder's meta.json names its tokenizer; load_tokenizer(folder) gives it back.

Four kinds: GPT-2's BPE (gpt2_bpe.py), a BPE trained on the corpus (tokenizers), characters, bytes. All share one small
face: vocab_size, eot (the end-of-text id, or None), encode, decode, token_bytes, and save / describe for the folder.
End-of-text is never produced by encode: the string "<|endoftext|>" inside a text is text.
"""

import codecs
import hashlib
import json
import pickle
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.base.errors import UserError
from engine.data.gpt2_bpe import GPT2Tokenizer, are_gpt2s, to_bytes

KINDS = ("gpt2", "bpe", "char", "byte")


class BPETokenizer:
    """A byte-level BPE trained on the corpus, kept as <folder>/tokenizer.json (the tokenizers library's own format)."""

    kind, file = "bpe", "tokenizer.json"
    parts = ("vocab.json", "merges.txt")  # the same in transformers' folders of old

    def __init__(self, bpe):
        self.bpe = bpe
        self.bpe.encode_special_tokens = True  # an end-of-text string inside the text stays text
        self.vocab_size = bpe.get_vocab_size()
        self.eot = bpe.token_to_id("<|endoftext|>")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Train on the texts; vocab_size counts the 256 bytes and end-of-text in."""
        import tokenizers

        bpe = byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    @classmethod
    def load(cls, folder: Path) -> "BPETokenizer":
        import tokenizers

        path, parts = Path(folder) / cls.file, [Path(folder) / name for name in cls.parts]
        if not path.is_file() and not all(part.is_file() for part in parts):
            raise UserError(f"{path} is missing; prepare the data set again")
        try:
            if path.is_file():
                bpe = tokenizers.Tokenizer.from_file(str(path))
            else:  # GPT-2's own two files
                bpe = byte_level(tokenizers.models.BPE.from_file(*map(str, parts)))
            if "ByteLevel" not in str(json.loads(bpe.to_str())["decoder"]):
                raise ValueError("its tokens are not made of bytes")
            bpe.no_truncation()  # transformers saves what was asked of it last
            bpe.no_padding()
            tokenizer = cls(bpe)
            tokenizer.token_bytes()
        except (
            Exception
        ) as error:  # the library raises bare Exceptions; another kind of BPE has other letters
            why = str(error)[:80]
            raise UserError(
                f"{path} is no byte-level BPE as ours ({why}); prepare or export it again"
            ) from None
        return tokenizer

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.bpe.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        pieces = [self.bpe.id_to_token(i) for i in range(self.vocab_size)]
        return [b"" if i == self.eot else to_bytes(piece) for i, piece in enumerate(pieces)]

    def describe(self) -> dict:
        return {"kind": self.kind, "sha256": hashlib.sha256(self.bpe.to_str().encode()).hexdigest()}

    def save(self, folder: Path) -> None:
        self.bpe.save(str(Path(folder) / self.file))


def byte_level(model):
    """A tokenizers.Tokenizer of this BPE that cuts text and joins tokens as GPT-2's does."""
    import tokenizers

    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe


class CharTokenizer:
    """One id per character, in the order of `chars`; `eot` adds an end-of-text id behind them."""

    kind = "char"

    def __init__(self, chars: Iterable[str], eot: bool = False):
        self.chars = list(chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.eot = len(self.chars) if eot else None
        self.vocab_size = len(self.chars) + int(eot)

    @classmethod
    def train(cls, texts: Iterable[str], eot: bool = False) -> "CharTokenizer":
        return cls(sorted(set().union(*map(set, texts))), eot)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.fromiter((self.ids[char] for char in text), dtype=np.uint32, count=len(text))
        except KeyError as error:
            raise UserError(
                f"the character {error.args[0]!r} is not in this data set's {len(self.ids)} ones"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join("<|endoftext|>" if i == self.eot else self.chars[i] for i in ids)

    def token_bytes(self) -> list[bytes]:
        return [char.encode() for char in self.chars] + [b""] * (self.eot is not None)

    def describe(self) -> dict:
        return {"kind": self.kind, "chars": self.chars, "eot": self.eot is not None}

    def save(self, folder: Path) -> None:
        """Nothing to keep beside meta.json: it holds the characters."""


class ByteTokenizer:
    """The 256 bytes and end-of-text: any text at all, no training."""

    kind, vocab_size, eot = "byte", 257, 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        pieces = [b"<|endoftext|>" if i == self.eot else bytes([i]) for i in ids]
        return b"".join(pieces).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b""]

    def describe(self) -> dict:
        return {"kind": self.kind}

    def save(self, folder: Path) -> None:
        """Nothing to keep: bytes are bytes."""


Tokenizer = GPT2Tokenizer | BPETokenizer | CharTokenizer | ByteTokenizer


@lru_cache(maxsize=4)  # GPT-2's take a tenth of a second
def pieces_of(tokenizer: Tokenizer) -> list[bytes]:
    """tokenizer.token_bytes(), made once."""
    return tokenizer.token_bytes()


def piece_decoder(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A function that takes a text's ids one by one and returns each one's text; a character that is split over tokens
    stands whole at the last of them."""
    pieces, decoder = pieces_of(tokenizer), codecs.getincrementaldecoder("utf-8")("replace")
    return lambda token: (
        "<|endoftext|>" if token == tokenizer.eot else decoder.decode(pieces[token])
    )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that a folder names in meta.json or nanoGPT's meta.pkl, or that transformers left there; nothing of
    that means GPT-2's BPE."""
    folder = Path(folder)
    meta = read_meta(folder)
    if meta is None and (folder / GPT2Tokenizer.file).exists() or not has_tokenizer(folder):
        return GPT2Tokenizer.load(folder)
    if meta is None:
        tokenizer = BPETokenizer.load(folder)
        tokens = [tokenizer.bpe.id_to_token(i) for i in range(GPT2Tokenizer.eot)]
        is_gpt2s = tokenizer.vocab_size == GPT2Tokenizer.vocab_size and are_gpt2s(tokens)
        return GPT2Tokenizer(tokens) if is_gpt2s else tokenizer
    description = meta.get("tokenizer", {})
    kind = description.get("kind")
    if kind == "char":
        return CharTokenizer(description["chars"], description["eot"])
    if kind == "bpe":
        return BPETokenizer.load(folder)
    if kind in ("gpt2", "byte"):
        return GPT2Tokenizer.load(folder) if kind == "gpt2" else ByteTokenizer()
    raise UserError(f"{folder} names an unknown tokenizer {kind!r}; known: {', '.join(KINDS)}")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder itself says what its tokens mean."""
    files = (GPT2Tokenizer.file, BPETokenizer.file, BPETokenizer.parts[0])
    return any((folder / name).exists() for name in files) or read_meta(folder) is not None


def read_meta(folder: str | Path) -> dict | None:
    """meta.json of a folder; a nanoGPT meta.pkl in the same shape; None where there is neither."""
    path = Path(folder) / "meta.json"
    if path.exists():
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            known = isinstance(meta["vocab_size"], int) and meta.get("dtype", "uint16") in (
                "uint16",
                "uint32",
            )
            known = known and all(
                isinstance(about.get("tokens", 0), int) for about in meta.get("splits", {}).values()
            )
            if meta["tokenizer"].get("kind") == "char":
                "".join(
                    meta["tokenizer"]["chars"]
                ).encode()  # raises unless it is characters, which all have bytes
                known = known and isinstance(meta["tokenizer"]["eot"], bool)
            if known:
                return meta
            reason = "other fields than it should have"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} does not describe a data set ({reason}); prepare it again")
    path = Path(folder) / "meta.pkl"
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        vocab_size, itos = int(meta["vocab_size"]), meta.get("itos")
        if itos is None:  # enough to train on; there is no text to be had from such ids
            return {"tokenizer": {"kind": "none"}, "vocab_size": vocab_size}
        chars = [itos[i] for i in range(len(itos))]
        "".join(chars).encode()  # raises unless it is characters
        return {
            "tokenizer": {"kind": "char", "chars": chars, "eot": False},
            "vocab_size": vocab_size,
        }
    except Exception as error:  # the bytes of a damaged file can make the unpickler raise anything
        raise UserError(
            f"{path} is not a nanoGPT character table: {type(error).__name__}: {error}"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; whatever would import or call anything is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}, refused")
