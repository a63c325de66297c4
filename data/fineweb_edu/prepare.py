"""FineWeb-Edu with GPT-2's BPE, streamed from the Hub into files of 100 M tokens.

# the sample of 10 B tokens, in data/fineweb_edu, 20 GB
python data/fineweb_edu/prepare.py
# or 100 B, in data/fineweb_edu_100BT; also 350BT, or all of it: --size=default
python data/fineweb_edu/prepare.py --size=100BT
# from local copies of its .parquet files
python data/fineweb_edu/prepare.py --source=FOLDER
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.options import Fraction
from engine.data import corpus
from engine.data.splits import Corpus


@dataclass(frozen=True)
class Options(corpus.Options):
    # of the sample, in tokens; default: all 1.3 T
    size: Literal["10BT", "100BT", "350BT", "default"] = "10BT"
    # share of the documents for val: 10 M of the 10 B tokens
    val_fraction: Fraction = 0.001

    @property
    def name(self) -> str:
        return "fineweb_edu" if self.size == "10BT" else f"fineweb_edu_{self.size}"


def fineweb(options: Options) -> Corpus:
    subset = options.size if options.size == "default" else f"sample-{options.size}"
    return corpus.train_and_val(options, "HuggingFaceFW/fineweb-edu", subset)


if __name__ == "__main__":
    corpus.main(Options, fineweb)
