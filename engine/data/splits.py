"""Which text goes to which split: a corpus' own splits, documents drawn from train, or the ends of a few documents."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from engine.data.sources import Part, Piece

SPLITS = ("train", "val", "test")
# 2^64 / golden ratio: its multiples mod 2^64 lie evenly, however many are taken
GOLDEN = 11400714819323198485


@dataclass(frozen=True)
class Corpus:
    """The parts of each split; fractions: which shares of train's documents are drawn for other splits."""

    splits: Mapping[str, Sequence[Part]]
    fractions: Mapping[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> list[tuple[str, Part]]:
        return [(split, part) for split, parts in self.splits.items() for part in parts]


class Position(NamedTuple):
    """How far a corpus is read: these parts, and so many pieces of the next; documents drawn, and the last one's split;
    bytes of that next part, for the progress bar."""

    part: int = 0
    piece: int = 0
    documents: int = 0
    split: str = ""
    read: int = 0


def walk(corpus: Corpus, start: Position) -> Iterator[tuple[str, str, bool, Position]]:
    """The pieces behind start: split, text, whether a document begins, the position behind it."""
    documents, split = start.documents, start.split
    for i, (given, part) in enumerate(corpus.parts[start.part :], start.part):
        done = start.piece if i == start.part else 0
        for j, piece in enumerate(itertools.islice(part.pieces(), done, None), done + 1):
            if piece.first and given == "train":
                split, documents = draw(documents, corpus.fractions), documents + 1
            split = split if given == "train" else given
            yield split, piece.text, piece.first, Position(i, j, documents, split, piece.read)


def with_val(splits: Mapping[str, Sequence[Part]], fraction: float) -> Corpus:
    """The corpus with these splits; with a fraction val is drawn from train, and takes the place of an official one."""
    if not fraction:
        return Corpus(splits)
    return Corpus({split: splits[split] for split in splits if split != "val"}, {"val": fraction})


def draw(document: int, fractions: Mapping[str, float]) -> str:
    """The split of a document by its number: in any row of documents each split has its share, give or take a few."""
    point = (document + 1) * GOLDEN % 2**64 / 2**64
    for split, fraction in fractions.items():
        if point < fraction:
            return split
        point -= fraction
    return "train"


def lengths_of_few(parts: Sequence[Part], enough: int) -> list[list[int]] | None:
    """The lengths of all documents in characters, part by part; None if there are enough of them."""
    lengths, n = [], 0
    for part in parts:
        lengths.append([])
        for text, first, _ in part.pieces():
            n += first
            if n >= enough:
                return None
            lengths[-1] += [0] if first else []
            lengths[-1][-1] += len(text)
    return lengths


def ends(
    parts: Sequence[Part], lengths: Sequence[Sequence[int]], fractions: Mapping[str, float]
) -> Corpus:
    """Few documents: the beginning of each is train, its end the other splits, cut between paragraphs if possible."""
    splits, low, last = {}, 0.0, ("train", *fractions)[-1]
    for split, fraction in {"train": 1 - sum(fractions.values()), **fractions}.items():
        high = 1.0 if split == last else low + fraction  # sums of fractions can be a little off
        splits[split] = [
            Part(part.name, part.size, part.identity, partial(_stretch, part, of_part, low, high))
            for part, of_part in zip(parts, lengths, strict=True)
        ]
        low = high
    return Corpus(splits)


def _stretch(part: Part, lengths: Sequence[int], low: float, high: float) -> Iterator[Piece]:
    """What lies between these shares of each document's length."""
    document, at, first = -1, 0, True
    for text, begins, read in part.pieces():
        if begins:
            document, at, first = document + 1, 0, True
        begin, end = (
            cut_near(text, round(lengths[document] * share) - at) for share in (low, high)
        )
        if begin < end:
            yield Piece(text[begin:end], first, read)
            first = False
        at += len(text)


def cut_near(text: str, position: int) -> int:
    """The end of a paragraph, else of a line, else of a word, at or a little before the position."""
    position = min(max(position, 0), len(text))
    for mark in ("\n\n", "\n", " ") if 0 < position < len(text) else ():
        found = text.rfind(mark, max(0, position - len(text) // 50), position)
        if found >= 0:
            return found + len(mark)
    return position
