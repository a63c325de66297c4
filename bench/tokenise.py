"""Tokens per second and peak memory from a .jsonl to token files, with all processors.

    # two minutes
    python bench/tokenise.py --source=articles.jsonl

A round is a whole preparation (data/text/prepare.py) into an empty folder, with the start of its
process and the flush to the disk. The median of the rounds counts.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import measure
from engine.data.tokens import TokenFile


def main() -> None:
    args = measure.arguments(__doc__, source=())
    seconds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(args.source)
            if args.quick:
                source = Path(folder, "documents.jsonl")
                source.write_text('{"text": "A few words."}\n{"text": "And a few more."}\n' * 50)
            started = time.perf_counter()
            n_tokens = prepare(source, Path(folder, "out"))
            seconds.append(time.perf_counter() - started)
    speed = n_tokens / statistics.median(seconds) / 1e6
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{n_tokens:,} tokens, {speed:.1f} M tokens/s, peak memory {peak:,.0f} MiB")
    print(f"machine: {measure.machine()}")


def prepare(source: Path, folder: Path) -> int:
    """Prepare the file in a process of its own; returns the number of tokens."""
    script = ROOT / "data" / "text" / "prepare.py"
    flags = [f"--source={source}", f"--folder={folder}", "--val_fraction=0", "--test_fraction=0"]
    subprocess.run([sys.executable, script, *flags], check=True, capture_output=True)
    return len(TokenFile(folder, "train"))


if __name__ == "__main__":
    main()
