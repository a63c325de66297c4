"""GPT-2's BPE, by tiktoken. A folder that has its tokens (gpt2.json) needs no network and no cache.

gpt2.json lists the 50,256 tokens in the order of their ids, each byte written as GPT-2's
printable stand-in for it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine.base.errors import UserError
from engine.base.files import atomic_write

# how text is split before bytes are merged, as in tiktoken_ext/openai_public.py
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"  # of the tokens' lines


class GPT2Tokenizer:
    """GPT-2's 50,257 ids: its tokens (tiktoken fetches them if they are not given) and
    end-of-text."""

    kind, file, vocab_size, eot = "gpt2", "gpt2.json", 50257, 50256

    def __init__(self, tokens: Sequence[str] = ()):
        import tiktoken

        if tokens:
            ranks = {to_bytes(token): rank for rank, token in enumerate(tokens)}
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
        """From a folder's gpt2.json, or if it has none from tiktoken."""
        path = Path(folder) / cls.file
        if not path.exists():
            return cls()
        try:
            tokens = json.loads(path.read_text(encoding="utf-8"))
            if are_gpt2s(tokens):
                return cls(tokens)
        except (ValueError, TypeError, RecursionError):
            pass
        raise UserError(f"{path} is not GPT-2's BPE; delete it, and tiktoken fetches it again")

    def encode(self, text: str) -> np.ndarray:
        """Token ids, (n,) uint32."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode([int(i) for i in ids])

    def token_bytes(self) -> list[bytes]:
        return [self.bpe.decode_single_token_bytes(i) for i in range(self.eot)] + [b""]

    def describe(self) -> dict:
        return {"kind": self.kind}

    def save(self, folder: Path) -> None:
        tokens = ["".join(STAND_INS[byte] for byte in token) for token in self.token_bytes()[:-1]]
        text = json.dumps(tokens, ensure_ascii=False)
        path = Path(folder) / self.file
        atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def are_gpt2s(tokens: Sequence[str]) -> bool:
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest() == SHA256


def _stand_ins() -> list[str]:
    """GPT-2's printable stand-in for each byte 0..255 (its bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    code_points = {byte: byte for byte in printable}
    code_points |= {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(code_points[byte]) for byte in range(256)]


STAND_INS = _stand_ins()
BYTES = {stand_in: byte for byte, stand_in in enumerate(STAND_INS)}


def to_bytes(token: str) -> bytes:
    """The bytes of a token that is written with stand-ins; KeyError if a letter is none."""
    return bytes(BYTES[letter] for letter in token)
