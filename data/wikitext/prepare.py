"""WikiText-103 (or -2) raw with GPT-2's BPE: the official splits, an article is a document, its text unchanged.

python data/wikitext/prepare.py                  # WikiText-103: data/wikitext, ~118 M tokens, 540 MB of text, minutes
python data/wikitext/prepare.py --version=2      # WikiText-2: data/wikitext2, 2.4 M / 250 K / 286 K tokens, seconds
python data/wikitext/prepare.py --version=2 --source=FOLDER     # from wiki.{train,valid,test}.{raw,tokens}, no hub
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.config import load_config
from engine.errors import UserError, run
from engine.tokenizer import GPT2Tokenizer
from engine.tokens import DATA_ROOT
from engine.writer import write_dataset

SPLITS = {"train": ("train", "train"), "val": ("valid", "validation"), "test": ("test", "test")}  # ours: file, hub
TITLE = re.compile(r" = [^=].* = \n")


@dataclass(frozen=True)
class Options:
    version: int = 103  # 103, or 2: the same val and test articles, a train split 50 times smaller
    source: str = ""  # a folder with wiki.train.raw, wiki.valid.raw, wiki.test.raw (or .tokens); empty: the hub
    folder: str = ""  # where the token files go; empty: data/wikitext, for version 2 data/wikitext2


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Cut lines (each with its newline) before the titles; joined again, the articles are the lines, nothing lost.

    A title stands between two blank lines: that tells it from table debris (" = Goals ; A = ") that looks like one, and
    leaves WikiText-2 its published 600 / 60 / 60 articles.
    """
    article = []
    for line in lines:
        article.append(line)
        is_title = not line.strip() and len(article) > 1 and TITLE.fullmatch(article[-2])
        if is_title and (len(article) == 2 or not article[-3].strip()) and "".join(article[:-2]).strip():
            yield "".join(article[:-2])
            article = article[-2:]
    yield "".join(article)


def lines_from_folder(source: Path, name: str) -> Iterator[str]:
    paths = [source / f"wiki.{name}.{suffix}" for suffix in ("raw", "tokens")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"{source} has neither {paths[0].name} nor {paths[1].name}")
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); convert it, e.g. with iconv -t UTF-8") from None


def lines_from_hub(version: int, split: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset("Salesforce/wikitext", f"wikitext-{version}-raw-v1", split=split)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the hub does not give Salesforce/wikitext ({type(error).__name__}); use --source=FOLDER"
        ) from error
    for batch in rows.iter(batch_size=10_000):
        yield from (line or " \n" for line in batch["text"])  # the hub has "" where the files have " \n"


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if options.version not in (2, 103):
        raise UserError(f"--version={options.version}: there are WikiText 2 and 103")
    folder = options.folder or DATA_ROOT / ("wikitext" if options.version == 103 else "wikitext2")
    splits = {}
    for split, (file_name, hub_name) in SPLITS.items():
        if options.source:
            lines = lines_from_folder(Path(options.source), file_name)
        else:
            lines = lines_from_hub(options.version, hub_name)
        splits[split] = articles(lines)
    write_dataset(folder, splits, GPT2Tokenizer())


if __name__ == "__main__":
    run(main)
