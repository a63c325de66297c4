"""Choose the split of each text: official splits, documents drawn from train, or their ends."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from engine.data.sources import Source, source_of

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # our names: the Hub's
ENOUGH_DOCUMENTS = 20  # with fewer, the end of each becomes val and test
GOLDEN = 11400714819323198485  # 2^64 / golden ratio: its multiples mod 2^64 are evenly spread


class Corpus(NamedTuple):
    """The sources of each split. fractions: the shares of train documents to draw for others."""

    splits: Mapping[str, Sequence[Source]]
    fractions: Mapping[str, float] = {}

    @property
    def sources(self) -> list[tuple[str, Source]]:
        return [(split, source) for split, sources in self.splits.items() for source in sources]


def in_memory(splits: Mapping[str, Sequence[str]]) -> dict[str, list[Source]]:
    """A source for each split from its documents. Splits without text are left out."""
    return {
        split: [source_of(split, partial(iter, documents))]
        for split, documents in splits.items()
        if any(documents)
    }


def with_val(splits: Mapping[str, Sequence[Source]], fraction: float) -> Corpus:
    """A corpus whose val is drawn from train, or the official val if fraction is 0."""
    if not fraction:
        return Corpus(splits)
    others = {split: splits[split] for split in splits if split != "val"}
    return Corpus(others, {"val": fraction})


class Position(NamedTuple):
    """How far a corpus has been read."""

    source: int = 0  # number of sources that are done
    piece: int = 0  # number of pieces of the next source that are done
    documents: int = 0  # number of documents of the train sources that are done
    split: str = ""  # the split of the last of them


def walk(corpus: Corpus, start: Position) -> Iterator[tuple[str, str, bool, Position]]:
    """The pieces after start: (split, text, whether a document starts, position after it)."""
    _, done, documents, split = start
    for i, (given, source) in enumerate(corpus.sources[start.source :], start.source):
        pieces = itertools.islice(source.pieces(), done, None)
        for n, (text, is_start) in enumerate(pieces, done + 1):
            if given != "train":
                split = given
            elif is_start:
                split = draw(documents, corpus.fractions)
                documents += 1
            yield split, text, is_start, Position(i, n, documents, split)
        done = 0


def draw(document: int, fractions: Mapping[str, float]) -> str:
    """The split of document number `document`. Any run of documents has each split's share."""
    point = (document + 1) * GOLDEN % 2**64 / 2**64
    for split, fraction in fractions.items():
        if point < fraction:
            return split
        point -= fraction
    return "train"


def draw_or_cut(
    sources: Sequence[Source],
    fractions: Mapping[str, float],
) -> Corpus:
    """Draw these fractions of the documents, or if there are few, cut off the end of each."""
    lengths = []
    for text, is_start in _pieces(sources):
        if is_start:
            lengths.append(0)
        if len(lengths) == ENOUGH_DOCUMENTS:
            return Corpus({"train": sources}, fractions)
        lengths[-1] += len(text)
    splits, low = {}, 0.0
    shares = {"train": 1 - sum(fractions.values()), **fractions}
    for split, share in shares.items():
        high = low + share
        splits[split] = [Source(split, partial(_stretch, sources, lengths, low, high))]
        low = high
    return Corpus(splits)


def _pieces(sources):
    return itertools.chain.from_iterable(source.pieces() for source in sources)


def _stretch(
    sources,
    lengths,
    low,
    high,
):
    """The text between these shares of each document's length, cut between paragraphs."""
    number = -1
    for text, is_start in _pieces(sources):
        if is_start:
            number, offset, starts = number + 1, 0, True
        begin = cut_near(text, round(lengths[number] * low) - offset)
        end = cut_near(text, round(lengths[number] * high) - offset)
        if begin < end:
            yield text[begin:end], starts
            starts = False
        offset += len(text)


def cut_near(text: str, position: int) -> int:
    """The end of a paragraph, line or word at or a little before the position."""
    position = min(max(position, 0), len(text))
    if 0 < position < len(text):
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, max(0, position - len(text) // 50), position)
            if found >= 0:
                return found + len(mark)
    return position
