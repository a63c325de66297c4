"""OpenWebText with GPT-2's BPE: 8,013,769 documents, about 9 B tokens (18 GB), one document in 2,000 for val.

# streamed from the hub, some 24 GB; killed, it goes on
python data/openwebtext/prepare.py
# from local copies (.parquet, .jsonl, .txt, compressed or not)
python data/openwebtext/prepare.py --source=FOLDER

On two cores the tokens take some 20 minutes, at 8 to 9 M a second, beside the network's time.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import run_main
from engine.base.options import load_config
from engine.data import corpus
from engine.data.splits import Corpus, with_val

HUB = "Skylion007/openwebtext@refs/pr/22"  # its main branch held a script, which datasets 4 and later refuse


@dataclass(frozen=True)
class Options(corpus.Options):
    val_fraction: float = 0.0005  # share of the documents to draw for val; nanoGPT's


def openwebtext(options: Options) -> Corpus:
    return with_val({"train": corpus.texts(options, HUB)}, options.val_fraction)


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    corpus.prepare(options, "openwebtext", partial(openwebtext, options))


if __name__ == "__main__":
    run_main(main)
