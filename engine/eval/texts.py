"""Count the bytes, words and documents of a split while it is read; find the first document."""

import numpy as np
from torch import Tensor

from engine.data.tokenizer import Tokenizer
from engine.data.tokens import TokenFile

STRETCH = 1024  # tokens, the bootstrap's unit for a text of few documents
FEW_DOCUMENTS = 20  # with fewer, the bootstrap resamples stretches
SEARCHED = 1 << 16  # the first document is searched for in the first tokens of a split


class TextStats:
    """Counts the bytes, words and documents of the tokens given to read(), in order.

    White space separates words, as in WikiText's word counts.

    unit: what the bootstrap resamples. By default documents. If the split has few documents,
    stretches of STRETCH tokens; neighbouring stretches depend on each other, so the standard error
    is then too small. If only a part of the split is read, windows."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        frequencies: Tensor,
        n_documents: int = 0,
        part: bool = False,
    ):
        """frequencies: (V,), of the training text. part: only a part of the split is read."""
        self.log_frequencies = frequencies.log()
        self.eot = -1 if tokenizer.eot is None else tokenizer.eot
        self.pieces = dict(enumerate(tokenizer.token_bytes()))
        self.pieces[self.eot] = b"\n"  # ends a word
        self.unit = "document" if n_documents >= FEW_DOCUMENTS else "stretch"
        if part:
            self.unit = "window"
        self.text = bytearray()
        self.n_documents = 0

    @property
    def n_bytes(self) -> int:
        return len(self.text) - self.n_documents

    @property
    def n_words(self) -> int:
        return len(self.text.decode(errors="replace").split())

    def read(self, at: Tensor, ids: Tensor) -> Tensor:
        """Count the next tokens: positions and ids (B, T) -> the number of each token's unit.

        An end-of-text token belongs to the document that it ends."""
        pieces = [self.pieces.get(i, b"") for i in ids.flatten().tolist()]
        self.text += b"".join(pieces)
        ends = (ids.flatten() == self.eot).long()
        documents = self.n_documents + ends.cumsum(0) - ends
        self.n_documents += int(ends.sum())
        if self.unit == "stretch":
            return at // STRETCH
        if self.unit == "window":
            return at[:, :1].expand_as(at)
        return documents.view_as(ids)


def first_document(file: TokenFile, eot: int | None, n_tokens: int) -> np.ndarray:
    """The first document that is not empty, at most n_tokens ids of it."""
    ids = file[:SEARCHED]
    is_text = ids != eot
    text = ids[is_text.argmax() :]
    n_ends = np.cumsum(text == eot)
    return text[n_ends == 0][:n_tokens]
