r"""A data set from your own text. If a preparation is killed, the same command continues it.

python data/text/prepare.py --source=notes,book.txt,'more/*.txt' --name=mytext
python data/text/prepare.py --source=speeches.txt --separator='\n\n\n' --tokenizer=bpe
# from the Hugging Face Hub
python data/text/prepare.py --source=hub:roneneldan/TinyStories --name=tinystories

Then: python train.py --dataset=mytext. A document is a .txt, or each part of it between separators,
a line of a .jsonl, or a row of a table. From 20 documents on, whole documents are drawn for val and
test; with fewer, every document gives its end. The Hub's official splits stay what they are.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import UserError, run_main
from engine.base.options import Fraction, load_config
from engine.data import corpus
from engine.data.sources import find, hub, hub_splits
from engine.data.splits import Corpus, cut_ends, lengths_if_few

ENOUGH_DOCUMENTS = 20
OFFICIAL = {"train": "train", "val": "validation", "test": "test"}  # ours: the Hub's


@dataclass(frozen=True)
class Options(corpus.Options):
    # files, folders and globs with commas between (.txt .jsonl .parquet .csv, also .gz .zst ...),
    # or hub:NAME
    source: str = ""
    subset: str = ""  # of the Hub's data set
    field: str = "text"  # where a .jsonl, a table or the Hub's data set has the text
    # what stands between two documents of a .txt, e.g. '\n\n\n'; empty: it is one document
    separator: str = ""
    # share of the documents, or of few documents' text, for val; 0: none
    val_fraction: Fraction = 0.05
    test_fraction: Fraction = 0.05  # the same for test
    name: str = "mytext"  # the data set's name: data/<name>/


def own_text(options: Options) -> Corpus:
    fractions = {"val": options.val_fraction, "test": options.test_fraction}
    fractions = {split: fraction for split, fraction in fractions.items() if fraction}
    if options.source.startswith("hub:"):
        return from_hub(options, fractions)
    separator = options.separator.replace("\\n", "\n").replace("\\t", "\t")
    sources = find(options.source, options.field, separator, options.errors)
    lengths = lengths_if_few(sources, ENOUGH_DOCUMENTS)
    if lengths is None:
        return Corpus({"train": sources}, fractions)
    return cut_ends(sources, lengths, fractions)


def from_hub(options: Options, fractions: dict[str, float]) -> Corpus:
    """The official splits of a data set of the Hub; those that it lacks are drawn from train."""
    name = options.source.removeprefix("hub:")
    found = hub_splits(name, options.subset)
    if "train" not in found:
        raise UserError(f"{name} has no train split, but {', '.join(found)}")
    splits = {
        split: hub(name, options.subset, official, options.field)
        for split, official in OFFICIAL.items()
        if official in found
    }
    drawn = {split: fractions[split] for split in fractions if split not in splits}
    return Corpus(splits, drawn)


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if not options.source:
        raise UserError("which text? --source=FILES (see --help)")
    is_plain = Path(options.name).name == options.name != ".."
    if not is_plain or (corpus.DATA_ROOT / options.name / "prepare.py").is_file():
        advice = "give a plain name that no folder with a prepare.py has"
        raise UserError(f"--name={options.name}: {advice}")
    if options.val_fraction + options.test_fraction >= 1:
        raise UserError("--val_fraction and --test_fraction must leave something for train")
    corpus.prepare(options, options.name, lambda: own_text(options))


if __name__ == "__main__":
    run_main(main)
