"""WikiText-103 (or -2) raw with GPT-2's BPE and its official splits; an article is a document.

# WikiText-103: data/wikitext, ~118 M tokens, 540 MB of text, minutes
python data/wikitext/prepare.py
# WikiText-2: data/wikitext2, 2.4 M / 250 K / 286 K tokens, seconds
python data/wikitext/prepare.py --version=2
# from wiki.{train,valid,test}.{raw,tokens}, without the Hub
python data/wikitext/prepare.py --version=2 --source=FOLDER
"""

import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import UserError
from engine.base.options import NonNegativeInt
from engine.data import corpus
from engine.data.sources import hub, one_line_errors, source_of
from engine.data.splits import SPLITS, Corpus, with_val

TITLE = re.compile(r" = [^=].* = \n")


@dataclass(frozen=True)
class Options(corpus.Options):
    # 2 has the val and test articles of 103 and a train split 50 times smaller
    version: Literal["103", "2"] = "103"
    # a folder with wiki.train.raw, wiki.valid.raw, wiki.test.raw (or .tokens); empty: the Hub
    source: str = ""
    train_articles: NonNegativeInt = 0  # use only the first ones of the train split; 0: all

    @property
    def name(self) -> str:
        return "wikitext" if self.version == "103" else "wikitext2"


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Cut lines (with their newlines) before each title. The articles contain all lines.

    A title is between two blank lines. Debris of tables (" = Goals ; A = ") looks like a title, but
    is not. This gives WikiText-2 its published 600 / 60 / 60 articles.
    """
    article = []
    for line in lines:
        article.append(line)
        follows_title = len(article) > 1 and TITLE.fullmatch(article[-2])
        if line.strip() or not follows_title:
            continue
        before = article[:-2]
        follows_blank = not before or not before[-1].strip()
        if follows_blank and "".join(before).strip():
            yield "".join(before)
            article = article[-2:]
    yield "".join(article)


def read_lines(options: Options, split: str) -> Iterator[str]:
    """The lines of a split, each with its newline, from a file or from the Hub."""
    if not options.source:
        splits = hub("Salesforce/wikitext", f"wikitext-{options.version}-raw-v1")
        for source in splits[SPLITS[split]]:
            # on the Hub blank lines are empty
            yield from (line or " \n" for line in source.documents())
        return
    name = "valid" if split == "val" else split
    found = sorted(Path(options.source).glob(f"wiki.{name}.*"))
    if not found:
        raise UserError(f"{options.source} has no wiki.{name}.raw")
    form = {"encoding": options.encoding or "utf-8", "errors": options.errors}
    with one_line_errors(str(found[0])), open(found[0], newline="\n", **form) as file:
        yield from file


def wikitext(options: Options) -> Corpus:
    def documents(split):
        n = options.train_articles if split == "train" else 0
        return itertools.islice(articles(read_lines(options, split)), n or None)

    splits = {split: [source_of(split, partial(documents, split))] for split in SPLITS}
    return with_val(splits, options.val_fraction)


if __name__ == "__main__":
    corpus.main(Options, wikitext)
