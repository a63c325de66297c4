"""OpenWebText with GPT-2's BPE: 8,013,769 documents, about 9 B tokens (18 GB).

# streamed from the Hub, about 24 GB; if killed, the same command continues
python data/openwebtext/prepare.py
# from local copies (.parquet, .jsonl, .txt)
python data/openwebtext/prepare.py --source=FOLDER
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.options import Fraction
from engine.data import corpus
from engine.data.splits import Corpus

# the main branch has a script, which datasets 4 and later refuse
HUB = "Skylion007/openwebtext@refs/pr/22"


@dataclass(frozen=True)
class Options(corpus.Options):
    name = "openwebtext"
    val_fraction: Fraction = 0.0005  # share of the documents for val; nanoGPT's


def openwebtext(options: Options) -> Corpus:
    return corpus.train_and_val(options, HUB)


if __name__ == "__main__":
    corpus.main(Options, openwebtext)
