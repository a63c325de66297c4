"""Statistics of a split, taken while it is read: bytes, words, documents, token frequencies."""

import codecs

import numpy as np
import torch
from torch import Tensor

from engine.base.errors import UserError
from engine.data.tokenizer import Tokenizer
from engine.data.tokens import TokenFile

STRETCH = 1024  # tokens, of a text without documents
FEW_DOCUMENTS = 20  # with fewer, the bootstrap resamples stretches
SEARCHED = 1 << 26  # tokens of a split in which documents are looked for


class TextStats:
    """Counts of the tokens that read() has seen, in their order; bytes and frequency of each token.

    unit: what a bootstrap resamples. Documents; stretches of STRETCH tokens if the split has few
    documents (neighbours depend on each other, so a standard error is then too small); windows if
    only a part of the split is read."""

    def __init__(
        self, tokenizer: Tokenizer, frequencies: Tensor, n_documents: float = 0.0, part=False
    ):
        """frequencies: (V,), in the training text. part: only a part of the split is read."""
        self.eot, self.log_frequencies = tokenizer.eot, frequencies.log()
        pieces = list(tokenizer.token_bytes())[: len(frequencies)]
        self.pieces = pieces + [b""] * (len(frequencies) - len(pieces))
        self.n_bytes = torch.tensor([len(piece) for piece in self.pieces])
        self.unit = "window" if part else "document" if n_documents >= FEW_DOCUMENTS else "stretch"
        self.n_words, self.n_documents = 0, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._within_word = False

    def read(self, at: Tensor, ids: Tensor) -> Tensor:
        """Count the next tokens: positions and ids (B, T) -> the number of the unit of each.

        An end-of-text token belongs to the document that it ends."""
        self._count_words(ids)
        if self.unit == "stretch":
            return at // STRETCH
        if self.unit == "window":
            return at[:, :1].expand_as(at)
        ends = (ids.flatten() == self.eot).long()
        documents = self.n_documents + ends.cumsum(0) - ends
        self.n_documents += int(ends.sum())
        return documents.view_as(ids)

    def scores(self, ids: Tensor) -> dict[str, Tensor]:
        """ids (n,) -> the scores (n,) that need no model."""
        return {"unigram_nll": -self.log_frequencies[ids], "n_bytes": self.n_bytes[ids]}

    def _count_words(self, ids: Tensor) -> None:
        """Words are what white space separates (as WikiText counts them)."""
        pieces = [b"\n" if i == self.eot else self.pieces[i] for i in ids.flatten().tolist()]
        if text := self._decoder.decode(b"".join(pieces)):
            goes_on = self._within_word and not text[0].isspace()
            self.n_words += len(text.split()) - goes_on
            self._within_word = not text[-1].isspace()


def document_bounds(file: TokenFile, eot: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The starts and ends of the documents in a split's first SEARCHED tokens; no empty ones."""
    ids = file[:SEARCHED]
    found = np.flatnonzero(ids == eot)
    starts, ends = np.append(0, found + 1), np.append(found, len(ids))
    kept = ends > starts
    return starts[kept], ends[kept]


def document(file: TokenFile, eot: int | None, number: int, n_tokens: int) -> np.ndarray:
    """The first n_tokens ids, or fewer, of document `number`; the first document is 0."""
    starts, ends = document_bounds(file, eot)
    if number >= len(starts):
        raise UserError(f"{file.path} has {len(starts)} documents; give a lower --document")
    start = starts[number]
    return file[start : min(start + n_tokens, ends[number])]
