"""GPT-2's BPE, by tiktoken. With a folder's gpt2.json it needs no network and no cache.

gpt2.json lists the 50,256 tokens in the order of their ids. Each byte is written as the printable
character that GPT-2 uses for it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.base.errors import UserError
from engine.base.files import write_text
from engine.data.tokenizer_base import END_OF_TEXT, Tokenizer

# splits text before bytes are merged; as in tiktoken_ext/openai_public.py
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# of the tokens, one a line
SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50,257 ids. tokens: all but end-of-text; if none are given, tiktoken's."""

    kind, file, vocab_size, eot = "gpt2", "gpt2.json", 50257, 50256

    def __init__(self, tokens: Sequence[str] = ()):
        import tiktoken

        if tokens:
            ranks = {to_bytes(token): rank for rank, token in enumerate(tokens)}
            special = {END_OF_TEXT: self.eot}
            self.bpe = tiktoken.Encoding(
                "gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
            )
            return
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are OSErrors
            raise UserError(
                f"tiktoken cannot download GPT-2's BPE ({type(error).__name__}); "
                "go online once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from error

    @classmethod
    def load(cls, folder: Path) -> "GPT2Tokenizer":
        """Load from a folder's gpt2.json; if there is none, from tiktoken."""
        path = folder / cls.file
        if not path.exists():
            return cls()
        try:
            tokens = json.loads(path.read_text(encoding="utf-8"))
            if hashlib.sha256("\n".join(tokens).encode()).hexdigest() == SHA256:
                return cls(tokens)
        except (ValueError, TypeError, RecursionError):
            pass
        raise UserError(f"{path} is not GPT-2's BPE; delete it, and tiktoken downloads it again")

    def encode(self, text: str) -> np.ndarray:
        """Token ids, (n,) uint32."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def token_bytes(self) -> list[bytes]:
        return [self.bpe.decode_single_token_bytes(i) for i in range(self.eot)] + [b""]

    def save(self, folder: Path) -> None:
        tokens = [to_stand_ins(token) for token in self.token_bytes()[:-1]]
        write_text(folder / self.file, json.dumps(tokens, ensure_ascii=False))


# GPT-2's printable character for each byte (its bytes_to_unicode)
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
STAND_INS = {byte: chr(byte) for byte in PRINTABLE}
STAND_INS |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTES = {stand_in: byte for byte, stand_in in STAND_INS.items()}


def to_stand_ins(token: bytes) -> str:
    return "".join(STAND_INS[byte] for byte in token)


def to_bytes(token: str) -> bytes:
    """The bytes of a token written in GPT-2's printable characters; KeyError if one is not."""
    return bytes(BYTES[letter] for letter in token)
