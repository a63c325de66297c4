"""FineWeb-Edu with GPT-2's BPE, streamed from the hub into files of 100 M tokens; killed, it goes on.

# the sample of 10 B tokens: data/fineweb_edu, 20 GB
python data/fineweb_edu/prepare.py
# data/fineweb_edu_100BT; 350BT, or all of it: --size=default
python data/fineweb_edu/prepare.py --size=100BT
python data/fineweb_edu/prepare.py --source=FOLDER     # from local copies of its .parquet files
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import UserError, run_main
from engine.base.options import load_config
from engine.data import corpus
from engine.data.splits import Corpus, with_val

SIZES = ("10BT", "100BT", "350BT", "default")


@dataclass(frozen=True)
class Options(corpus.Options):
    size: str = "10BT"  # of the sample, in tokens: 10BT, 100BT, 350BT; or default, all 1.3 T
    val_fraction: float = 0.001  # share of the documents to draw for val: 10 M tokens of the 10 B


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if options.size not in SIZES:
        raise UserError(f"--size={options.size} must be one of {', '.join(SIZES)}")
    name = "fineweb_edu" if options.size == "10BT" else f"fineweb_edu_{options.size}"
    subset = options.size if options.size == "default" else f"sample-{options.size}"

    def fineweb() -> Corpus:
        return with_val(
            {"train": corpus.texts(options, "HuggingFaceFW/fineweb-edu", subset)},
            options.val_fraction,
        )

    corpus.prepare(options, name, fineweb)


if __name__ == "__main__":
    run_main(main)
