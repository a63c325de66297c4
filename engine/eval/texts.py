"""What a split says of itself while it is read: bytes, words, documents, token frequencies."""

import codecs

import numpy as np
import torch
from torch import Tensor

from engine.base.errors import UserError
from engine.data.tokenizer import Tokenizer
from engine.data.tokens import TokenFile

STRETCH = 1024  # tokens, of a text without documents
FEW = 20  # documents: with fewer there are more stretches


class TextStats:
    """Counts of the tokens that count() has been given, in their order, and what each token is.

    unit: what a bootstrap resamples. Documents; of a split with few of them stretches of STRETCH tokens (which depend
    on each other: a standard error is then too small); of a part of a split its windows."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        frequencies: Tensor,
        n_documents: float = 0.0,
        part: bool = False,
    ):
        """frequencies: (V,) of the training text."""
        self.eot, self.log_frequencies, n_ids = tokenizer.eot, frequencies.log(), len(frequencies)
        self.pieces = [*tokenizer.token_bytes(), *[b""] * n_ids][
            :n_ids
        ]  # of ids that the tokenizer has not: nothing
        self.bytes = torch.tensor(list(map(len, self.pieces)))
        self.unit = "window" if part else "document" if n_documents >= FEW else "stretch"
        self.n_words, self.n_documents = 0, 0
        self._decoder, self._within = codecs.getincrementaldecoder("utf-8")("replace"), False

    def units(self, at: Tensor, ids: Tensor) -> Tensor:
        """at, ids (B, n): positions and tokens, behind those of the call before -> the number of the unit of each.
        End-of-text belongs to the document that it ends."""
        if self.unit != "document":
            return at // STRETCH if self.unit == "stretch" else at[:, :1].expand_as(at)
        ends = (ids.flatten() == self.eot).long()
        numbers = self.n_documents + ends.cumsum(0) - ends
        self.n_documents += int(ends.sum())
        return numbers.view_as(ids)

    def count(self, ids: Tensor) -> None:
        """Count words, as what stands between white space (WikiText's convention), across calls."""
        pieces = (b"\n" if i == self.eot else self.pieces[i] for i in ids.flatten().tolist())
        if text := self._decoder.decode(b"".join(pieces)):
            self.n_words += len(text.split()) - (self._within and not text[0].isspace())
            self._within = not text[-1].isspace()


def document(file: TokenFile, eot: int | None, number: int, n_tokens: int) -> np.ndarray:
    """The first n_tokens ids, or fewer, of the document with this number, from 0 on."""
    start, left = 0, number
    while left:
        ids = file.rows(np.array([start]), min(1 << 20, len(file) - start))[0]
        ends = np.flatnonzero(ids == eot)[:left]
        left -= len(ends)
        start += int(ends[-1]) + 1 if left == 0 else len(ids)
        if start == len(file):
            raise UserError(
                f"{file.path} has fewer than {number + 1} documents; give a lower --document"
            )
    ids = file.rows(np.array([start]), min(n_tokens, len(file) - start))[0]
    ids = ids[np.argmax(ids != eot) :]  # llm.c's documents begin with end-of-text
    ends = np.flatnonzero(ids == eot)
    return ids[: ends[0]] if len(ends) else ids
