"""What all kinds of tokenizers have in common. engine/data/tokenizer.py lists the kinds."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text <-> token ids.

    Each kind has vocab_size, eot (the end-of-text id, or None), encode and token_bytes (the bytes
    of each id). encode never returns end-of-text: "<|endoftext|>" inside a text is encoded as text.
    """

    def decode(self, ids: Iterable[int]) -> str:
        token_bytes = token_bytes_of(self)
        found = [END_OF_TEXT.encode() if i == self.eot else token_bytes[i] for i in ids]
        return b"".join(found).decode(errors="replace")

    def describe(self) -> dict:
        """The tokenizer's entry in meta.json."""
        return {"kind": self.kind}

    def save(self, folder: Path) -> None:
        """Write the files that a kind has beside meta.json: most have none."""


@lru_cache(maxsize=4)  # GPT-2's take a tenth of a second
def token_bytes_of(tokenizer: Tokenizer) -> list[bytes]:
    """tokenizer.token_bytes(), cached."""
    return tokenizer.token_bytes()
