"""Tiny Shakespeare by characters, nanoGPT's split and ids: 65 characters, 1,003,854 / 111,540 tokens, a second or two.

python data/shakespeare_char/prepare.py                         # fetches input.txt, 1.1 MB
python data/shakespeare_char/prepare.py --source=input.txt      # or takes yours
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.config import load_config
from engine.corpus import tiny_shakespeare
from engine.errors import run
from engine.tokenizer import CharTokenizer
from engine.writer import write_dataset


@dataclass(frozen=True)
class Options:
    source: str = ""  # a local input.txt; empty: fetch it
    folder: str = str(Path(__file__).resolve().parent)  # where train.bin, val.bin and meta.json go


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    train, val = tiny_shakespeare(options.source, Path(options.folder))
    write_dataset(options.folder, {"train": [train], "val": [val]}, CharTokenizer.train([train, val]))


if __name__ == "__main__":
    run(main)
