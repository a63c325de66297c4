r"""Your own text: UTF-8 files in, a data set out, in seconds per 10 MB.

python data/text/prepare.py --source=notes,book.txt,'more/*.txt' --name=mytext     # then: train.py --dataset=mytext
python data/text/prepare.py --source=speeches.txt --separator='\n\n\n' --tokenizer=bpe --vocab_size=4096

A file is a document, or each piece of it between separators is. From 20 documents on, whole documents are drawn for
val and test; with fewer, every document gives its end, cut between paragraphs where it can be.
"""

import glob
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.config import load_config
from engine.corpus import make_tokenizer, read_text
from engine.errors import UserError, run
from engine.tokens import DATA_ROOT
from engine.writer import write_dataset

ENOUGH_DOCUMENTS = 20


@dataclass(frozen=True)
class Options:
    source: str = ""  # files, folders (their .txt files) and globs, with commas between
    separator: str = ""  # what stands between two documents of one file, e.g. '\n\n\n'; empty: a file is a document
    tokenizer: str = "gpt2"  # gpt2, bpe (trained on your train split), char or byte
    vocab_size: int = 4096  # of a bpe
    val_fraction: float = 0.05  # of the documents or of the text; 0: no val split
    test_fraction: float = 0.05  # the same for test
    name: str = "mytext"  # the data set's name: data/<name>/
    folder: str = ""  # where the token files go; empty: data/<name>


def find_files(source: str) -> list[Path]:
    """Every file that the source names, each once, in its order; folders and globs sorted."""
    found = []
    for pattern in filter(None, source.split(",")):
        path = Path(pattern)
        paths = sorted(path.rglob("*.txt")) if path.is_dir() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [path] if path.is_file() else [path for path in paths if path.is_file()]
        if not files:
            raise UserError(f"--source: {pattern} {'holds no .txt file' if path.is_dir() else 'does not exist'}")
        found += files
    return list(dict.fromkeys(found))


def split_documents(documents: list[str], fractions: dict[str, float]) -> dict[str, list[str]]:
    """Whole documents, drawn by a fixed seed, kept in their order within each split."""
    n = len(documents)
    order, splits = np.random.default_rng(0).permutation(n).tolist(), {}
    for split, fraction in fractions.items():
        drawn = sorted(order.pop() for _ in range(max(1, round(n * fraction))))
        splits[split] = [documents[i] for i in drawn]
    return {"train": [documents[i] for i in sorted(order)]} | splits


def split_tails(documents: list[str], fractions: dict[str, float]) -> dict[str, list[str]]:
    """The beginning of each document for train, its end for val and test."""
    splits = {"train": [], **{split: [] for split in fractions}}
    for text in documents:
        begin, share = 0, 1 - sum(fractions.values())
        for split, fraction in [("train", share), *fractions.items()]:
            end = len(text) if split == list(splits)[-1] else cut_near(text, begin + round(len(text) * fraction))
            splits[split].append(text[begin:end])
            begin = end
    return splits


def cut_near(text: str, position: int) -> int:
    """The end of a paragraph, else of a line, else of a word, at or a little before the position."""
    slack = len(text) // 50
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, max(0, position - slack), position)
        if found >= 0:
            return found + len(mark)
    return position


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if not options.source:
        raise UserError("which text? --source=FILES (see --help)")
    if (
        options.name in ("", ".", "..")
        or Path(options.name).name != options.name
        or (DATA_ROOT / options.name / "prepare.py").is_file()
    ):
        raise UserError(f"--name={options.name} must be a plain name and none of the data sets that have a prepare.py")
    fractions = {"val": options.val_fraction, "test": options.test_fraction}
    if not (all(fraction >= 0 for fraction in fractions.values()) and sum(fractions.values()) < 1):
        raise UserError("--val_fraction and --test_fraction must be 0 or more and leave something for train")
    fractions = {split: fraction for split, fraction in fractions.items() if fraction}
    separator = options.separator.replace("\\n", "\n").replace("\\t", "\t")
    texts = [read_text(path) for path in find_files(options.source)]
    documents = [part for text in texts for part in (text.split(separator) if separator else [text]) if part.strip()]
    if not documents:
        raise UserError(f"--source={options.source}: there is no text in {len(texts)} file(s)")
    splits = (split_documents if len(documents) >= ENOUGH_DOCUMENTS else split_tails)(documents, fractions)
    tokenizer = make_tokenizer(options.tokenizer, splits, options.vocab_size)
    write_dataset(options.folder or DATA_ROOT / options.name, splits, tokenizer)


if __name__ == "__main__":
    run(main)
