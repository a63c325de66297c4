"""GPT-2's byte-pair encoding, by tiktoken; a folder that keeps its tokens (gpt2.json) needs no network and no cache.

gpt2.json is a list of the 50,256 tokens in the order of their ranks, each byte as GPT-2's printable stand-in for it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine.base.errors import UserError
from engine.base.files import atomic_write

# how text is cut before it is merged, as in tiktoken_ext/openai_public.py
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# of the tokens, a line each
SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"
MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"  # what tiktoken fetches


class GPT2Tokenizer:
    """GPT-2's 50,257 ids: its 50,256 tokens, fetched by tiktoken unless they are given, and end-of-text."""

    kind, file, vocab_size, eot = "gpt2", "gpt2.json", 50257, 50256

    def __init__(self, tokens: Sequence[str] = ()):
        import tiktoken

        if tokens:
            ranks = {token_bytes: rank for rank, token_bytes in enumerate(map(to_bytes, tokens))}
            special = {"<|endoftext|>": self.eot}
            self.bpe = tiktoken.Encoding(
                "gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
            )
            return
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are OSErrors
            raise UserError(
                f"tiktoken cannot fetch GPT-2's BPE ({type(error).__name__}); "
                "go online once, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from error

    @classmethod
    def load(cls, folder: Path) -> "GPT2Tokenizer":
        """From a folder's gpt2.json, or where it has none from tiktoken."""
        path = Path(folder) / cls.file
        if not path.exists():
            return cls()
        try:
            tokens = json.loads(path.read_text(encoding="utf-8"))
            if not are_gpt2s(tokens):
                raise ValueError("its tokens have another sha256")
        except (ValueError, TypeError, RecursionError) as error:
            why = str(error)[:80]
            raise UserError(
                f"{path} is not GPT-2's BPE ({why}); delete it, and tiktoken fetches it again"
            ) from None
        return cls(tokens)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, (n,) uint32."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode([int(i) for i in ids])

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id, V of them; end-of-text has none."""
        return [self.bpe.decode_single_token_bytes(i) for i in range(self.eot)] + [b""]

    def describe(self) -> dict:
        return {"kind": self.kind}

    def save(self, folder: Path) -> None:
        tokens = [
            "".join(STAND_INS[byte] for byte in token) for token in self.token_bytes()[: self.eot]
        ]
        write_tokens(Path(folder) / self.file, tokens)


def write_tokens(path: Path, tokens: Sequence[str]) -> None:
    atomic_write(
        path,
        lambda temporary: temporary.write_text(
            json.dumps(tokens, ensure_ascii=False), encoding="utf-8"
        ),
    )


def cached_tokens() -> list[str]:
    """The tokens, if tiktoken has fetched them before; never asks the network, as tiktoken itself may, for minutes."""
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    try:
        text = (Path(folder) / hashlib.sha1(MERGES.encode()).hexdigest()).read_text(
            encoding="utf-8"
        )
    except (OSError, ValueError):
        return []
    tokens = sorted(STAND_INS) + [line.replace(" ", "") for line in text.split("\n")[1:-1]]
    return tokens if are_gpt2s(tokens) else []


def are_gpt2s(tokens: Sequence[str]) -> bool:
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest() == SHA256


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte 0..255 (its bytes_to_unicode)."""
    plain = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(stand_ins)) for byte in range(256)]


STAND_INS = byte_alphabet()
BYTES = {stand_in: byte for byte, stand_in in enumerate(STAND_INS)}


def to_bytes(token: str) -> bytes:
    """The bytes of a token in that alphabet; KeyError where a letter is not of it."""
    return bytes(BYTES[letter] for letter in token)
