r"""Prepare a data set from your own text. If this is killed, the same command continues.

python data/text/prepare.py --source=notes,book.txt,'more/*.txt' --name=mytext
python data/text/prepare.py --source=speeches.txt --separator='\n\n\n' --tokenizer=bpe
# from the Hugging Face Hub
python data/text/prepare.py --source=hub:roneneldan/TinyStories --name=tinystories

Then: python train.py --dataset=mytext. A document is a .txt or a part of it between separators, a
line of a .jsonl, or a row of a table. Of 20 or more documents, whole ones are drawn for val and
test. Of fewer, the end of each becomes val and test. The Hub's official splits are kept.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import UserError
from engine.base.options import Fraction
from engine.data import corpus
from engine.data.sources import find, hub
from engine.data.splits import SPLITS, Corpus, draw_or_cut


@dataclass(frozen=True)
class Options(corpus.Options):
    # files, folders and globs, separated by commas, or hub:NAME
    # (.txt .json .jsonl .parquet .csv .tsv, also .gz)
    source: str = ""
    subset: str = ""  # of the data set on the Hub
    # the field or column with the text: "text", "data.text", "prompt,completion"
    field: str = "text"
    # divides a .txt into documents, e.g. '\n\n\n'; empty: it is one document
    separator: str = ""
    # share of the documents (of fewer than 20: of their text) for val; 0: none
    val_fraction: Fraction = 0.05
    test_fraction: Fraction = 0.05  # the same for test
    name: str = "mytext"  # the data set's name: data/<name>/

    def __post_init__(self):
        is_plain = Path(self.name).name == self.name not in ("", "..")
        if not is_plain or (corpus.DATA_ROOT / self.name / "prepare.py").is_file():
            advice = "give a plain name other than those of the folders with a prepare.py"
            raise UserError(f"--name={self.name}: {advice}")
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError("--val_fraction and --test_fraction must leave something for train")


def own_text(options: Options) -> Corpus:
    if not options.source:
        raise UserError("which text? --source=FILES (see --help)")
    fractions = {"val": options.val_fraction, "test": options.test_fraction}
    fractions = {split: fraction for split, fraction in fractions.items() if fraction}
    if options.source.startswith("hub:"):
        return from_hub(options, fractions)
    separator = options.separator.replace("\\r", "").replace("\\n", "\n").replace("\\t", "\t")
    sources = find(options.source, options.field, separator, options.errors, options.encoding)
    return draw_or_cut(sources, fractions)


def from_hub(options: Options, fractions: dict[str, float]) -> Corpus:
    """The official splits of a data set on the Hub. Those that it lacks are drawn from train."""
    name = options.source.removeprefix("hub:")
    official = hub(name, options.subset, options.field)
    splits = {split: official[theirs] for split, theirs in SPLITS.items() if theirs in official}
    if "train" not in splits:
        raise UserError(f"{name} has no train split, only {', '.join(official)}")
    drawn = {split: fractions[split] for split in fractions if split not in splits}
    return Corpus(splits, drawn)


if __name__ == "__main__":
    corpus.main(Options, own_text)
