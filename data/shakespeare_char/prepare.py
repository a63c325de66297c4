"""Tiny Shakespeare by characters, nanoGPT's split and ids: 1,003,854 / 111,540 of 65 kinds.

python data/shakespeare_char/prepare.py                         # fetches input.txt, 1.1 MB
python data/shakespeare_char/prepare.py --source=input.txt      # or takes yours
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
    # char, gpt2, bpe (learnt from the train split), byte, or the folder of a run or data set
    tokenizer: str = "char"
    val_fraction: Fraction = 0.1  # how much of the text, from its end, is val


if __name__ == "__main__":
    corpus.main(Options, corpus.tiny_shakespeare)
