"""Tiny Shakespeare by characters with nanoGPT's split and ids: 1,003,854 / 111,540 tokens, 65 ids.

python data/shakespeare_char/prepare.py                      # downloads input.txt, 1.1 MB
python data/shakespeare_char/prepare.py --source=input.txt   # or uses yours
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.options import Fraction
from engine.data import corpus


@dataclass(frozen=True)
class Options(corpus.Options):
    name = "shakespeare_char"
    # char, gpt2, bpe (trained on the train split), byte, or the folder of a run or data set
    tokenizer: str = "char"
    val_fraction: Fraction = 0.1  # share of the text, at its end, for val


if __name__ == "__main__":
    corpus.main(Options, corpus.tiny_shakespeare)
