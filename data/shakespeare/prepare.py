"""Tiny Shakespeare with GPT-2's BPE and nanoGPT's split: 301,966 / 36,059 tokens.

python data/shakespeare/prepare.py                      # downloads input.txt, 1.1 MB
python data/shakespeare/prepare.py --source=input.txt   # or uses yours
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.options import Fraction
from engine.data import corpus


@dataclass(frozen=True)
class Options(corpus.Options):
    name = "shakespeare"
    val_fraction: Fraction = 0.1  # share of the text, at its end, for val


if __name__ == "__main__":
    corpus.main(Options, corpus.tiny_shakespeare)
