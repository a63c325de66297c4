r"""Tokens per second from text files to token files: engine/data/writer.py, and nanoGPT's way to do it.

    python bench/tokenise.py --source=articles.txt --separator='\n\n' --repeat=8    # enwik8's articles: five minutes

Whole preparations, processes' starts and the flush to the disk included, each into an empty folder. ours: with all
processors and with one; datasets_map: datasets.map over the documents with all, its ids copied into a memmap, which is
how nanoGPT's prepare.py does it. repeat: the same text so many times, for a corpus that outweighs the starts.
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import measure
from engine.data.encoding import available_processors
from engine.data.sources import find
from engine.data.tokenizer import GPT2Tokenizer
from engine.data.tokens import TokenFile


def main() -> None:
    args = measure.arguments(__doc__, rounds=3, source="", separator="", repeat=1)
    n_proc = available_processors()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        documents = Path(folder) / "documents.jsonl"  # the same file for both
        texts = ["A few words.", "And a few more of them."] * 50
        if not args.quick:
            parts = find(args.source, separator=args.separator.replace("\\n", "\n"))
            texts = [piece.text for part in parts for piece in part.pieces()] * args.repeat
        datasets.Dataset.from_dict({"text": texts}).to_json(documents)
        cases = {
            f"ours_{n_proc}": partial(ours, documents, folder, n_proc),
            "ours_1": partial(ours, documents, folder, 1),
            f"datasets_map_{n_proc}": partial(datasets_map, documents, folder, n_proc),
        }
        n_tokens = {name: case() for name, case in cases.items()}
        assert len(set(n_tokens.values())) == 1, n_tokens
        seconds = measure.in_turns(cases, args.rounds)
    baseline, shapes = list(cases)[-1], {"tokens": n_tokens["ours_1"], "documents": len(texts)}
    measure.report("tokenise", seconds, baseline, n_tokens=shapes["tokens"], shapes=shapes)


def ours(documents: Path, folder: str, num_proc: int) -> int:
    with tempfile.TemporaryDirectory(
        dir=folder
    ) as out:  # a process of its own: those it starts import its main module
        options = {
            "source": documents,
            "folder": out,
            "num_proc": num_proc,
            "val_fraction": 0,
            "test_fraction": 0,
        }
        command = [
            sys.executable,
            ROOT / "data" / "text" / "prepare.py",
            *(f"--{n}={v}" for n, v in options.items()),
        ]
        subprocess.run(command, check=True, capture_output=True)
        return len(TokenFile(out, "train"))


def datasets_map(documents: Path, folder: str, num_proc: int) -> int:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        rows = datasets.load_dataset(
            "json", data_files=str(documents), split="train", cache_dir=out
        )
        tokenised = rows.map(_encode, remove_columns=["text"], num_proc=num_proc)
        n = int(np.sum(tokenised["len"], dtype=np.uint64))
        ids, at = np.memmap(Path(out) / "train.bin", dtype=np.uint16, mode="w+", shape=(n,)), 0
        n_shards = min(1024, len(tokenised))
        for i in range(n_shards):
            part = np.concatenate(
                tokenised.shard(n_shards, i, contiguous=True).with_format("numpy")["ids"]
            )
            ids[at : at + len(part)] = part
            at += len(part)
        ids.flush()
        return n - 1  # it has an end-of-text behind the last document too


def _encode(row: dict) -> dict:
    bpe = GPT2Tokenizer().bpe
    ids = [*bpe.encode_ordinary(row["text"]), bpe.eot_token]
    return {"ids": ids, "len": len(ids)}


if __name__ == "__main__":
    main()
