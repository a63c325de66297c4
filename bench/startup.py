"""How long a training takes to start, against packages that it leaves alone: datasets, wandb, matplotlib, transformers.

    python bench/startup.py

Each case is a python of its own, from its start to its end; train_step is train.py itself with one step of a tiny
model. Afterwards the modules that this step has imported are searched for those packages.
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np

from bench import measure

HEAVY = ("datasets", "wandb", "matplotlib", "transformers")
TINY = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --gradient_accumulation_steps=1 --eval_iters=1"
STEP = (
    "import sys, tempfile, train; "
    f"sys.argv[1:] = '--dataset={{folder}} --max_iters=1 --device=cpu --compile=False {TINY}'.split(); "
    "train.main(out_dir=tempfile.mkdtemp(dir='{folder}'))"
)
CASES = {
    "train": "import train",
    "train_step": STEP,
    "python": "pass",
    "torch": "import torch",
    "datasets": "import datasets",
    "wandb": "import wandb",
    "matplotlib": "import matplotlib.pyplot",
    "transformers": "from transformers import GPT2LMHeadModel",
}
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
FOUND = f"print('imported:', *sorted({set(HEAVY)} & sys.modules.keys()))"


def run_python(code: str) -> str:
    """The last line that the code prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def main() -> None:
    args = measure.arguments(__doc__.splitlines()[0], rounds=5)
    chosen = args.cases.split(",") if args.cases else CASES
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):  # a data folder of nanoGPT's, without any meta
            np.arange(1000, dtype="<u2").tofile(Path(folder) / f"{split}.bin")
        codes = {name: CASES[name].format(folder=folder) for name in ("train", *chosen)}
        seconds = measure.in_turns({name: partial(run_python, code) for name, code in codes.items()}, args.rounds)
        memory = {name: int(run_python(f"{code}; {PEAK}")) * 1024 for name, code in codes.items()}
        found = run_python(f"{CASES['train_step'].format(folder=folder)}; {FOUND}")
    measure.table("start-up, a python each (peak: of the whole process)", seconds, "train", memory)
    if found.strip() != "imported:":
        raise SystemExit(f"a training step has {found}")
    print(f"  a training step has imported none of {', '.join(HEAVY)}")
    measure.record_all("startup", seconds, "train", memory, shapes={}, allocator="default")


if __name__ == "__main__":
    main()
