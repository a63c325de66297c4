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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import UserError, run_main
from engine.base.options import NonNegativeInt, load_config
from engine.data import corpus
from engine.data.sources import find, hub_texts, source_of
from engine.data.splits import Corpus, with_val

FILES = {"train": "train", "val": "valid", "test": "test"}
HUB = {"train": "train", "val": "validation", "test": "test"}
TITLE = re.compile(r" = [^=].* = \n")


@dataclass(frozen=True)
class Options(corpus.Options):
    # 103, or 2: the same val and test articles, a train split 50 times smaller
    version: int = 103
    # a folder with wiki.train.raw, wiki.valid.raw, wiki.test.raw (or .tokens); empty: the Hub
    source: str = ""
    train_articles: NonNegativeInt = 0  # the first so many of the train split; 0: all


def lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines, each with its newline, of a text in pieces."""
    rest = ""
    for text in texts:
        *whole, rest = (rest + text).split("\n")
        yield from (line + "\n" for line in whole)
    if rest:
        yield rest


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Cut lines (each with its newline) before the titles; joined, the articles are the lines.

    A title is between two blank lines, unlike table debris (" = Goals ; A = ") that looks like one.
    So WikiText-2 has its published 600 / 60 / 60 articles.
    """
    article = []
    for line in lines:
        article.append(line)
        if line.strip() or len(article) < 2 or not TITLE.fullmatch(article[-2]):
            continue
        before = article[:-2]
        follows_blank = not before or not before[-1].strip()
        if follows_blank and "".join(before).strip():
            yield "".join(before)
            article = article[-2:]
    yield "".join(article)


def local_lines(options: Options, split: str) -> Iterator[str]:
    """The lines of one of the three files."""
    folder = Path(options.source)
    paths = [folder / f"wiki.{FILES[split]}.{ending}" for ending in ("raw", "tokens")]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{folder} has neither {paths[0].name} nor {paths[1].name}")
    (source,) = find(str(found[0]), errors=options.errors)
    return lines(text for text, _ in source.pieces())


def hub_lines(options: Options, split: str) -> Iterator[str]:
    """The rows of the Hub's copy, which has "" for a blank line that is " \\n" in the files."""
    name = f"wikitext-{options.version}-raw-v1"
    for texts in hub_texts("Salesforce/wikitext", name, HUB[split]).values():
        yield from (line or " \n" for line in texts())


def wikitext(options: Options) -> Corpus:
    read_lines = local_lines if options.source else hub_lines

    def documents(split: str) -> Callable[[], Iterable[str]]:
        n = options.train_articles if split == "train" else 0
        return lambda: itertools.islice(articles(read_lines(options, split)), n or None)

    splits = {split: [source_of(split, documents(split))] for split in FILES}
    return with_val(splits, options.val_fraction)


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if options.version not in (2, 103):
        raise UserError(f"--version={options.version}: there are WikiText 2 and 103")
    name = "wikitext" if options.version == 103 else "wikitext2"
    corpus.prepare(options, name, lambda: wikitext(options))


if __name__ == "__main__":
    run_main(main)
