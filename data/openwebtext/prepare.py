"""OpenWebText with GPT-2's BPE: 8,013,769 documents, about 9 B tokens (18 GB), one document in 2,000 for val.

python data/openwebtext/prepare.py                     # streamed from the hub, about 24 GB; killed, it goes on
python data/openwebtext/prepare.py --source=FOLDER     # from local copies (.parquet, .jsonl, .txt, compressed or not)

At 10 M tokens a second (two cores) it takes a quarter of an hour plus the network's time.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine import corpus
from engine.config import load_config
from engine.errors import run
from engine.splits import with_val


@dataclass(frozen=True)
class Options(corpus.Options):
    val_fraction: float = 0.0005  # share of the documents to draw for val; nanoGPT's


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    corpus.prepare(
        options,
        "openwebtext",
        lambda: with_val({"train": corpus.texts(options, "Skylion007/openwebtext")}, options.val_fraction),
    )


if __name__ == "__main__":
    run(main)
