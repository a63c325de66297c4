"""Write teacher labels: a trained model's predictions at each position of a training text.

    python augmentation/teacher_labels.py --teacher=out/softmax --dataset=wikitext --name=mine
    python train_sigmoid.py config/mine.py --dataset=wikitext --labels=mine

The teacher is any model that train.py makes, or OpenAI's GPT-2 (--teacher=gpt2). It must have the
data's tokenizer. It reads overlapping windows of its block_size and labels the second half of each,
because with little context, at the start of a window, its predictions are hardly better than token
frequencies. After an interruption, run the same command again.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.base.distributed import autocast, pick_device
from engine.base.errors import UserError, run_main
from engine.base.files import exclusive_lock, read_json, write_json
from engine.base.options import PositiveInt, load_config
from engine.data.labels import LABEL_BYTES, identity, pack, paths_of, refuse_other
from engine.data.tokens import TokenFile, dataset_folder, gather
from engine.data.windows import window_starts
from engine.runs.checkpoint import check_tokenizer, load_model


@dataclass(frozen=True)
class Options:
    teacher: str = ""  # a run folder or checkpoint file of any head, or gpt2, gpt2-medium ...
    dataset: str = ""  # a folder in data/, or the path of a folder with train.bin
    name: str = ""  # of the label set; a data set can have any number of them
    # labels per position, the likeliest, renormalised; 4 bytes each on disk
    k: PositiveInt = 8
    batch_size: PositiveInt = 16  # windows at a time; lower it to save memory
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto


class Teacher:
    """The model, the tokens to label, and the windows in which it reads them."""

    def __init__(self, options: Options):
        self.options = options
        self.device = pick_device(options.device)
        self.cast, self.dtype = autocast(self.device, options.dtype)
        self.file = TokenFile(options.dataset, "train")
        check_tokenizer(options.teacher, dataset_folder(options.dataset))
        self.model = load_model(options.teacher, self.device)
        self.block_size = self.model.config.block_size
        # a padded vocabulary has more ids than the text
        self.n_ids = min(self.file.vocab_size, self.model.config.vocab_size)
        self.file.check(self.n_ids)
        if self.n_ids > 1 << 16:
            raise UserError(f"the vocabulary has {self.n_ids:,} ids, but a label has 16 bits")
        if options.k > self.n_ids:
            raise UserError(f"k = {options.k} is above {self.n_ids}, the vocabulary")
        self.stride = max(1, self.block_size // 2)  # from a window to the next
        self.n_positions = len(self.file) - 1  # nothing follows the last token
        self.n_windows = sum(len(starts) for starts, _ in self.batches())

    def batches(self) -> Iterator[tuple[np.ndarray, int]]:
        """Where the windows of each batch start, and their length."""
        return window_starts(
            self.n_positions, self.block_size, self.options.batch_size, 0, self.stride
        )

    def about(self) -> dict:
        """All that the labels depend on, for their description."""
        weights = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            weights.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        return {
            "mode": "topk",
            "k": self.options.k,
            "dtype": self.dtype,
            "teacher_sha256": weights.hexdigest(),
            "vocab_size": self.n_ids,
            "windows": self.n_windows,
        }

    @torch.no_grad()
    def label(self, starts: np.ndarray, length: int) -> tuple[int, np.ndarray]:
        """The first position that the windows at `starts` label, and the rows (n, 2, K) from it on.

        All positions of the first window are labelled, and the last `stride` of each other one."""
        first = self.block_size - self.stride if starts[0] else 0
        x, _ = gather(self.file, starts, length)
        rows = []
        with self.cast:
            for hidden in self.model.hidden(x.to(self.device)):  # (T, C), one window at a time
                log_probs = self.model.lm_head.log_probs(hidden[first:])
                values, ids = log_probs[:, : self.n_ids].topk(self.options.k)
                rows.append(pack(ids.cpu().numpy(), values.softmax(-1).cpu().numpy()))
        return int(starts[0]) + first, np.concatenate(rows)


def write_labels(teacher: Teacher) -> Path:
    """Label all windows that are not done yet; returns the path of the rows.

    Rows are flushed to disk before they count as done, so a killed run can be continued."""
    file = teacher.file
    options = teacher.options
    path, description = paths_of(file, options.name)
    about = teacher.about() | identity(file)
    row_size = options.k * LABEL_BYTES
    busy = f"another process is writing {path}; wait for it, or give another --name"
    with exclusive_lock(path, busy), open(path, "r+b") as output:
        done = windows_done(path, description, about)
        output.truncate(row_size * len(file))
        for starts, length in tqdm(teacher.batches(), options.name, leave=False, disable=None):
            now_done = int(starts[-1]) // teacher.stride + 1
            if now_done <= done:
                continue
            position, rows = teacher.label(starts, length)
            output.seek(row_size * position)
            output.write(rows.tobytes())
            output.flush()
            os.fsync(output.fileno())
            write_json(description, about | {"done": now_done})
    return path


def windows_done(path: Path, description: Path, about: dict) -> int:
    """The number of windows that an interrupted run with the same options has written."""
    if description.is_file():
        found = read_json(description)
        advice = f"give another --name, or delete {path} and its .json"
        refuse_other(about, found, f"{path} was made with other options", advice)
        return found["done"]
    if path.stat().st_size:
        raise UserError(f"{path} has no .json next to it; delete it, or give another --name")
    write_json(description, about | {"done": 0})
    return 0


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if not (options.teacher and options.dataset and options.name):
        raise UserError("give all of --teacher=RUN --dataset=DATA --name=NAME (see --help)")
    teacher = Teacher(options)
    path = write_labels(teacher)
    print(f"{path} is complete: {teacher.n_positions:,} positions")


if __name__ == "__main__":
    run_main(main)
