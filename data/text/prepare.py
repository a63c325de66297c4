r"""Your own text in, a data set out: about 8 M tokens a second on two cores. Killed, the same command goes on.

python data/text/prepare.py --source=notes,book.txt,'more/*.txt' --name=mytext     # then: train.py --dataset=mytext
python data/text/prepare.py --source=speeches.txt --separator='\n\n\n' --tokenizer=bpe --vocab_size=4096
# from the Hugging Face Hub
python data/text/prepare.py --source=hub:roneneldan/TinyStories --name=tinystories

A .txt is a document, or each piece of it between separators is; so is a line of a .jsonl and a row of a .parquet. From
20 documents on, whole documents are drawn for val and test; with fewer, every document gives its end. A hub's own
validation and test splits stay what they are.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import UserError, run_main
from engine.base.options import load_config
from engine.data import corpus
from engine.data.sources import find, hub, hub_splits
from engine.data.splits import Corpus, ends, lengths_of_few

ENOUGH_DOCUMENTS = 20
OFFICIAL = {"train": "train", "val": "validation", "test": "test"}  # ours: the hub's


@dataclass(frozen=True)
class Options(corpus.Options):
    # files, folders and globs, commas between (.txt .jsonl .parquet, also .gz .zst ...), or
    # hub:NAME
    source: str = ""
    subset: str = ""  # of the hub's data set
    field: str = "text"  # where a .jsonl, a .parquet or the hub's data set has the text
    # what stands between two documents of a .txt, e.g. '\n\n\n'; empty: it is one document
    separator: str = ""
    # share of the documents, or of few documents' text, for val; 0: none
    val_fraction: float = 0.05
    test_fraction: float = 0.05  # the same for test
    name: str = "mytext"  # the data set's name: data/<name>/


def own_text(options: Options) -> Corpus:
    fractions = {"val": options.val_fraction, "test": options.test_fraction}
    fractions = {split: fraction for split, fraction in fractions.items() if fraction}
    if options.source.startswith("hub:"):
        name = options.source.removeprefix("hub:")
        there = hub_splits(name, options.subset)
        if "train" not in there:
            raise UserError(f"{name} has no train split, but {', '.join(there)}")
        official = {split: theirs for split, theirs in OFFICIAL.items() if theirs in there}
        splits = {
            split: hub(name, options.subset, theirs, options.field)
            for split, theirs in official.items()
        }
        return Corpus(
            splits, {split: share for split, share in fractions.items() if split not in splits}
        )
    separator = options.separator.replace("\\n", "\n").replace("\\t", "\t")
    parts = find(options.source, options.field, separator, options.errors)
    lengths = lengths_of_few(parts, ENOUGH_DOCUMENTS)
    return (
        Corpus({"train": parts}, fractions) if lengths is None else ends(parts, lengths, fractions)
    )


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if not options.source:
        raise UserError("which text? --source=FILES (see --help)")
    own = options.name not in ("", ".", "..") and Path(options.name).name == options.name
    if not own or (corpus.DATA_ROOT / options.name / "prepare.py").is_file():
        raise UserError(
            f"--name={options.name} must be a plain name and none of the data sets that have a prepare.py"
        )
    fractions = (options.val_fraction, options.test_fraction)
    if not (all(fraction >= 0 for fraction in fractions) and sum(fractions) < 1):
        raise UserError(
            "--val_fraction and --test_fraction must be 0 or more and leave something for train"
        )
    corpus.prepare(options, options.name, partial(own_text, options))


if __name__ == "__main__":
    run_main(main)
