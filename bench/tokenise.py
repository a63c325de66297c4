"""Tokens per second from a .jsonl to token files: ours, and nanoGPT's way to do it.

    # five minutes
    python bench/tokenise.py --source=articles.jsonl

A case is a whole preparation into an empty folder, with the start of its process and the flush to
the disk. ours: data/text/prepare.py with all processors and with one. datasets_map: datasets.map
over the documents, its ids copied into a memmap, as in nanoGPT's prepare.py.
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
from engine.data.corpus import available_processors
from engine.data.tokenizer import GPT2Tokenizer
from engine.data.tokens import TokenFile


def main() -> None:
    args = measure.arguments(__doc__, rounds=3, source="")
    n = available_processors()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = Path(args.source)
        if args.quick:
            source = folder / "documents.jsonl"
            lines = ['{"text": "A few words."}\n', '{"text": "And a few more of them."}\n']
            source.write_text("".join(lines * 50))
        baseline = f"datasets_map_{n}"
        cases = {
            f"ours_{n}": partial(ours, source, folder, n),
            "ours_1": partial(ours, source, folder, 1),
            baseline: partial(datasets_map, source, folder, n),
        }
        n_tokens = {name: case() for name, case in cases.items()}
        assert len(set(n_tokens.values())) == 1, n_tokens
        seconds = measure.in_turns(cases, args.rounds)
    shapes = {"tokens": n_tokens[baseline]}
    measure.report("tokenise", seconds, baseline, n_tokens=shapes["tokens"], shapes=shapes)


def ours(source: Path, folder: Path, num_proc: int) -> int:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        script = ROOT / "data" / "text" / "prepare.py"
        flags = [f"--source={source}", f"--folder={out}", f"--num_proc={num_proc}"]
        flags += ["--val_fraction=0", "--test_fraction=0"]
        subprocess.run([sys.executable, script, *flags], check=True, capture_output=True)
        return len(TokenFile(out, "train"))


def datasets_map(source: Path, folder: Path, num_proc: int) -> int:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        files = {"data_files": str(source), "split": "train", "cache_dir": out}
        rows = datasets.load_dataset("json", **files)
        rows = rows.map(_encode, remove_columns=["text"], num_proc=num_proc)
        n = int(np.sum(rows["len"], dtype=np.uint64))
        ids = np.memmap(Path(out) / "train.bin", dtype=np.uint16, mode="w+", shape=(n,))
        end = 0
        n_shards = min(1024, len(rows))
        for i in range(n_shards):
            shard = rows.shard(n_shards, i, contiguous=True).with_format("numpy")
            part = np.concatenate(shard["ids"])
            ids[end : end + len(part)] = part
            end += len(part)
        ids.flush()
        return n - 1  # it has an end-of-text after the last document too


def _encode(row: dict) -> dict:
    bpe = GPT2Tokenizer().bpe
    ids = [*bpe.encode_ordinary(row["text"]), bpe.eot_token]
    return {"ids": ids, "len": len(ids)}


if __name__ == "__main__":
    main()
