"""Choose each text's split: official splits, documents drawn from train, or the ends of a few."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from engine.data.sources import Pieces, Source

SPLITS = ("train", "val", "test")
GOLDEN = 11400714819323198485  # 2^64 / golden ratio: its multiples mod 2^64 lie evenly


@dataclass(frozen=True)
class Corpus:
    """The sources of each split; fractions: the shares of train's documents for other splits."""

    splits: Mapping[str, Sequence[Source]]
    fractions: Mapping[str, float] = field(default_factory=dict)

    @property
    def sources(self) -> list[tuple[str, Source]]:
        return [(split, source) for split, sources in self.splits.items() for source in sources]

    @property
    def names(self) -> list[str]:
        """The names of its splits."""
        return [name for name in SPLITS if name in {*self.splits, *self.fractions}]


def with_val(splits: Mapping[str, Sequence[Source]], fraction: float) -> Corpus:
    """A corpus with a fraction of train's documents as val, or the official val if that is 0."""
    if not fraction:
        return Corpus(splits)
    return Corpus({split: splits[split] for split in splits if split != "val"}, {"val": fraction})


class Position(NamedTuple):
    """How far a corpus has been read."""

    source: int = 0  # so many sources
    piece: int = 0  # and so many pieces of the next one
    documents: int = 0  # so many documents of the train sources
    split: str = ""  # where the last of them went


def walk(corpus: Corpus, start: Position) -> Iterator[tuple[str, str, bool, Position]]:
    """The pieces after start: split, text, whether a document starts, the position after it."""
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
    """The split of a document from its number: of documents in a row each split has its share."""
    point = (document + 1) * GOLDEN % 2**64 / 2**64
    for split, fraction in fractions.items():
        if point < fraction:
            return split
        point -= fraction
    return "train"


def lengths_if_few(sources: Sequence[Source], enough: int) -> list[int] | None:
    """The characters of each document; None if there are enough documents to draw from."""
    lengths = []
    for source in sources:
        for text, is_start in source.pieces():
            if is_start:
                lengths.append(0)
            if len(lengths) == enough:
                return None
            lengths[-1] += len(text)
    return lengths


def cut_ends(
    sources: Sequence[Source], lengths: Sequence[int], fractions: Mapping[str, float]
) -> Corpus:
    """The start of each document is train, its end the other splits; cut between paragraphs."""
    bounds = [0.0, *itertools.accumulate([1 - sum(fractions.values()), *fractions.values()])]
    bounds[-1] = 1.0  # a sum of fractions can be a little off
    splits = {}
    for split, low, high in zip(("train", *fractions), bounds[:-1], bounds[1:], strict=True):
        pieces = partial(_stretch, sources, lengths, low, high)
        splits[split] = [Source(split, pieces)]
    return Corpus(splits)


def _stretch(sources: Sequence[Source], lengths: Sequence[int], low: float, high: float) -> Pieces:
    """What lies between these shares of each document's length."""
    number = -1
    for source in sources:
        for text, is_start in source.pieces():
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
