"""WikiText-103 (or -2) raw with GPT-2's BPE: the official splits, an article is a document, its text unchanged.

# WikiText-103: data/wikitext, ~118 M tokens, 540 MB of text, minutes
python data/wikitext/prepare.py
# WikiText-2: data/wikitext2, 2.4 M / 250 K / 286 K tokens, seconds
python data/wikitext/prepare.py --version=2
# from wiki.{train,valid,test}.{raw,tokens}, no hub
python data/wikitext/prepare.py --version=2 --source=FOLDER
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import MANY, UserError, check_ranges, run_main
from engine.base.options import load_config
from engine.data import corpus
from engine.data.sources import Part, find, hub_texts
from engine.data.splits import Corpus, with_val

SPLITS = {
    "train": ("train", "train"),
    "val": ("valid", "validation"),
    "test": ("test", "test"),
}  # ours: file, hub
TITLE = re.compile(r" = [^=].* = \n")


@dataclass(frozen=True)
class Options(corpus.Options):
    version: int = 103  # 103, or 2: the same val and test articles, a train split 50 times smaller
    # a folder with wiki.train.raw, wiki.valid.raw, wiki.test.raw (or .tokens); empty: the hub
    source: str = ""
    train_articles: int = 0  # only so many of the train split, the first ones; 0: all


def lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines, each with its newline, of a text in pieces."""
    rest = ""
    for text in texts:
        *whole, rest = (rest + text).split("\n")
        yield from (line + "\n" for line in whole)
    if rest:
        yield rest


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Cut lines (each with its newline) before the titles; joined again, the articles are the lines, nothing lost.

    A title stands between two blank lines: that tells it from table debris (" = Goals ; A = ") that looks like one, and
    leaves WikiText-2 its published 600 / 60 / 60 articles.
    """
    article = []
    for line in lines:
        article.append(line)
        is_title = not line.strip() and len(article) > 1 and TITLE.fullmatch(article[-2])
        if (
            is_title
            and (len(article) == 2 or not article[-3].strip())
            and "".join(article[:-2]).strip()
        ):
            yield "".join(article[:-2])
            article = article[-2:]
    yield "".join(article)


def local(source: Path, name: str, errors: str, n: int | None) -> Part:
    paths = [source / f"wiki.{name}.{suffix}" for suffix in ("raw", "tokens")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"{source} has neither {paths[0].name} nor {paths[1].name}")
    (part,) = find(str(path), errors=errors)
    return corpus.part_of(
        part.name,
        lambda: islice(articles(lines(piece.text for piece in part.pieces())), n),
        part.size,
    )


def from_hub(version: int, split: str, n: int | None) -> Part:
    rows = partial(hub_texts, "Salesforce/wikitext", f"wikitext-{version}-raw-v1", split)
    return corpus.part_of(
        f"wikitext {split}", lambda: islice(articles(line or " \n" for line in rows()), n)
    )  # "" there, " \n" here


def wikitext(options: Options) -> Corpus:
    def part(file_name: str, split: str) -> Part:
        n = (options.train_articles if split == "train" else 0) or None
        if options.source:
            return local(Path(options.source), file_name, options.errors, n)
        return from_hub(options.version, split, n)

    return with_val(
        {split: [part(*names)] for split, names in SPLITS.items()}, options.val_fraction
    )


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if options.version not in (2, 103):
        raise UserError(f"--version={options.version}: there are WikiText 2 and 103")
    check_ranges(options, {"train_articles": (0, MANY)})
    corpus.prepare(
        options, "wikitext" if options.version == 103 else "wikitext2", partial(wikitext, options)
    )


if __name__ == "__main__":
    run_main(main)
