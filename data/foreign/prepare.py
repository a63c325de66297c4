"""Texts that a model of English prose has not seen, to test whether its uncertainty notices.

    python data/foreign/prepare.py --dataset=quickstart --source=speeches.txt,play.txt
    python evaluate.py --out_dir=out/quickstart/bayes --ood_dataset=foreign/python,foreign/uniform

It needs no download. Each becomes a data set with a test split: python (the modules of Python's own
standard library), uniform (ids drawn at random), shuffled (the data set's test split in random
order), and each local file, under its name without the extension.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import UserError, run_main
from engine.base.files import DATA_ROOT, sha256_of
from engine.base.options import PositiveInt, load_config
from engine.data.sources import find
from engine.data.tokenizer import load_tokenizer, save_tokenizer
from engine.data.tokens import TokenFile, dataset_folder


@dataclass(frozen=True)
class Options:
    dataset: str = ""  # whose tokenizer to use, and whose test split to shuffle
    source: str = ""  # local files with text, separated by commas
    tokens: PositiveInt = 100_000  # of each text, at most
    folder: str = ""  # where to write the data sets; empty: data/foreign


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if not options.dataset:
        raise UserError("give --dataset=NAME, the data set of the model to test")
    file = TokenFile(options.dataset, "test")
    tokenizer = load_tokenizer(dataset_folder(options.dataset))
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = {"python": "\n".join(path.read_text(encoding="utf-8") for path in modules)}
    for source in find(options.source) if options.source else ():
        name = Path(source.name).stem
        if name in (*texts, "uniform", "shuffled"):
            raise UserError(f"{source.name}: there is a text {name} already; rename the file")
        texts[name] = "".join(text for text, _ in source.pieces())
    random = np.random.default_rng(1337)
    ids = {
        "uniform": random.integers(0, tokenizer.vocab_size, options.tokens),
        "shuffled": random.permutation(file[: options.tokens]),
    }
    for name, text in texts.items():
        start = text[: 20 * options.tokens]  # a token has fewer characters
        ids[name] = tokenizer.encode(start)[: options.tokens]
    root = Path(options.folder or DATA_ROOT / "foreign")
    for name, numbers in ids.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        numbers.astype(file.dtype).tofile(folder / "test.bin")
        about = {"tokens": len(numbers), "documents": 1, "sha256": sha256_of(folder / "test.bin")}
        save_tokenizer(tokenizer, folder, dtype=file.dtype.name, splits={"test": about})
        print(f"{folder}, test: {len(numbers):,} tokens")
    print(f"evaluate.py --ood_dataset={','.join(str(root / name) for name in ids)}")


if __name__ == "__main__":
    run_main(main)
