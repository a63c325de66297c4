"""Make teacher labels: what a trained model expects at each position of a data set, written once.

# or --teacher=gpt2 python augmentation/teacher_labels.py --teacher=out/softmax --dataset=wikitext
--name=mine python train_sigmoid.py config/mine.py --dataset=wikitext --labels=mine

The teacher is any model that train.py makes, or OpenAI's GPT-2, with the data's tokenizer. It
reads overlapping windows of its block_size and labels the last `stride` positions of each:
positions at the start of a window have little context, so the teacher says little more than the
unigram there. If interrupted, run the same command again.
"""

import hashlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.base.distributed import autocast, pick_device
from engine.base.errors import UserError, run_main
from engine.base.options import check_options, flatten, load_config
from engine.data.labels import LabelWriter, pack, paths_of
from engine.data.tokenizer import load_tokenizer
from engine.data.tokens import TokenFile, dataset_folder
from engine.runs.checkpoint import check_tokenizer, load_model

SENTENCE = 64  # the most tokens of a sentence that max_perplexity looks at
# may differ when an interrupted run is continued
MAY_CHANGE = ("teacher", "dataset", "name", "batch_size", "device")


@dataclass(frozen=True)
class Options:
    teacher: str = ""  # a run folder or checkpoint file, any head, or gpt2, gpt2-medium ...
    dataset: str = ""  # a folder in data/, or the path of a folder with train.bin
    name: str = ""  # of the labels; a data set can have any number of label sets
    split: str = "train"  # train | val | test: labels of val and test are for evaluate.py --labels
    k: Annotated[int, ">= 1", "<= 65536"] = 8  # labels per position, 4 bytes each on the disk
    # topk: the likeliest, renormalised | sample: draws of 1 / k each, in expectation the teacher
    mode: Literal["topk", "sample"] = "topk"
    share: Annotated[float, "> 0", "<= 1"] = 1.0  # share of the positions that get labels
    max_tokens: Annotated[int, ">= 0"] = 0  # label only this many positions; 0: all
    # drop a label that gives its sentence a higher perplexity under the teacher; slow; 0: keep all
    max_perplexity: Annotated[float, ">= 0", "<= 1e6"] = 0.0
    # positions labelled per window; 0: half the teacher's block_size; all of it is twice as fast
    stride: Annotated[int, ">= 0"] = 0
    batch_size: Annotated[int, ">= 1"] = 16  # windows at a time: speed and memory
    seed: Annotated[int, ">= 0"] = 1337  # of share and sample
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        check_options(self)


class Teacher:
    """The model, the tokens that it labels, and the windows in which it reads them."""

    def __init__(self, options: Options):
        self.options = options
        self.device = pick_device(options.device)
        self.cast, self.dtype = autocast(self.device, options.dtype)
        self.file = TokenFile(options.dataset, options.split)
        paths_of(self.file, options.name)  # refuses a bad name
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
        if options.stride > self.block_size:
            raise UserError(f"stride = {options.stride} is above {self.block_size}, the block_size")
        self.stride = options.stride or max(1, self.block_size // 2)
        # nothing follows the last token
        self.n_positions = min(options.max_tokens or len(self.file), len(self.file) - 1)
        unread = max(0, self.n_positions - self.block_size)
        self.n_windows = 1 + math.ceil(unread / self.stride)
        if options.max_perplexity:
            tokens = load_tokenizer(dataset_folder(options.dataset)).token_bytes()
            self.ends_sentence = np.array([ends_sentence(token) for token in tokens])

    def about(self) -> dict:
        """What the labels depend on, for their description."""
        weights = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            weights.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        options = flatten(self.options)
        about = {name: value for name, value in options.items() if name not in MAY_CHANGE}
        return about | {
            "dtype": self.dtype,
            "teacher_sha256": weights.hexdigest(),
            "vocab_size": self.n_ids,
            "windows": self.n_windows,
        }

    @torch.no_grad()
    def label(self, windows: range) -> tuple[int, np.ndarray, dict]:
        """The first position that these windows label, the rows (n, 2, K) from there on, and
        their statistics."""
        tokens = np.zeros((len(windows), self.block_size), np.int64)
        for row, window in zip(tokens, windows, strict=True):
            begin = window * self.stride
            found = self.file[begin : begin + self.block_size]
            row[: len(found)] = found
        with self.cast:
            hiddens = self.model.hidden(self.to_device(tokens))
        all_rows = []
        counts = {"chosen": 0, "labelled": 0, "mass": 0.0}
        for window, hidden in zip(windows, hiddens, strict=True):
            first, end = self.positions(window)
            random = np.random.default_rng((self.options.seed, window))
            uniforms = random.random((self.block_size, 1 + self.options.k), np.float32)
            in_window = slice(first - window * self.stride, end - window * self.stride)
            hidden = hidden[in_window]
            uniforms = uniforms[in_window]
            chosen = np.flatnonzero(uniforms[:, 0] < self.options.share)
            with self.cast:
                ids, weights, mass = self.pick(hidden[chosen], self.to_device(uniforms[chosen, 1:]))
            if self.options.max_perplexity:
                for i, place in enumerate(chosen):
                    weights[i] *= self.is_plausible(first + place, ids[i])
                weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
            rows = np.zeros((end - first, 2, self.options.k), "<u2")
            rows[chosen] = pack(ids, weights)
            all_rows.append(rows)
            counts["chosen"] += len(chosen)
            counts["labelled"] += int(rows[:, 1].any(-1).sum())
            counts["mass"] += mass
        return self.positions(windows[0])[0], np.concatenate(all_rows), counts

    def positions(self, window: int) -> tuple[int, int]:
        """The first position that a window labels, and the end: its last `stride` ones."""
        begin = window * self.stride
        first = begin + self.block_size - self.stride if window else 0
        return first, min(begin + self.block_size, self.n_positions)

    def pick(
        self, hidden: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """hidden (n, C), uniforms (n, K) -> ids (n, K), weights (n, K) of sum 1, and the sum of
        the top K's probability."""
        log_probs = self.model.lm_head.log_probs(hidden)[:, : self.n_ids]
        values, ids = log_probs.topk(self.options.k)
        weights = values.softmax(-1)
        if self.options.mode == "sample":
            cumulative = log_probs.exp().cumsum(-1)
            ids = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
            ids = ids.clamp(max=self.n_ids - 1)
            # an id that is drawn twice appears once, with the weight of two
            is_same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
            weights = is_same.float().mean(-1) * ~is_same.tril(-1).any(-1)
        return ids.cpu().numpy(), weights.cpu().numpy(), values.exp().sum().item()

    def is_plausible(self, position: int, ids: np.ndarray) -> np.ndarray:
        """Whether each of the ids (K,), as the token after this position, leaves its sentence
        with a low perplexity; the true token always does."""
        sentence, place = self.sentence(position + 1)
        variants = np.repeat(sentence[None], len(ids), axis=0)
        variants[:, place] = ids
        variants = self.to_device(variants)
        with self.cast:
            log_probs = self.model.log_probs(variants[:, :-1])
        log_p = log_probs.gather(-1, variants[:, 1:].unsqueeze(-1)).squeeze(-1)
        perplexity = (-log_p.mean(-1)).exp().cpu().numpy()
        return (perplexity <= self.options.max_perplexity) | (ids == sentence[place])

    def sentence(self, target: int) -> tuple[np.ndarray, int]:
        """The sentence around a token, after one token of context if there is one; and the
        token's place in it."""
        longest = min(SENTENCE, self.block_size)
        first = max(0, target - longest // 2 - 1)
        text = self.file[first : target + longest].astype(np.int64)
        place = target - first
        is_end = self.ends_sentence[text]
        is_end[: max(0, place - longest // 2)] = False
        before = np.flatnonzero(is_end[:place])
        after = np.flatnonzero(is_end[place:])
        begin = before[-1] if len(before) else 0
        stop = place + after[0] + 1 if len(after) else len(text)
        stop = min(stop, begin + longest + 1)
        return text[begin:stop], place - begin

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def ends_sentence(token: bytes) -> bool:
    """End-of-text, which has no bytes, ends a sentence too."""
    return not token or any(end in token for end in b".!?\n")


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if not (options.teacher and options.dataset and options.name):
        raise UserError("give all of --teacher=RUN --dataset=DATA --name=NAME (see --help)")
    teacher = Teacher(options)
    writer = LabelWriter(teacher.file, options.name, teacher.about())
    zero = {"chosen": 0, "labelled": 0, "mass": 0.0, "seconds": 0.0, "teacher": options.teacher}
    progress = zero | writer.progress
    done, n = progress["done"], teacher.n_windows
    if done == n:
        print(f"{writer.path} is complete already; nothing to do")
    started = time.perf_counter() - progress["seconds"]
    for begin in tqdm(range(done, n, options.batch_size), options.name, leave=False, disable=None):
        windows = range(begin, min(begin + options.batch_size, n))
        first, rows, counts = teacher.label(windows)
        writer.write(first, rows)
        for name, count in counts.items():
            progress[name] += count
        progress |= {"done": windows.stop, "seconds": time.perf_counter() - started}
        writer.save(**progress)
    labelled, seconds = progress["labelled"], progress["seconds"]
    mass = progress["mass"] / max(1, progress["chosen"])
    print(
        f"{writer.path}: {labelled:,} of {teacher.n_positions:,} positions have labels; the "
        f"{options.k} likeliest ids have {mass:.1%} of the teacher's probability; {seconds:.0f} s"
    )


if __name__ == "__main__":
    run_main(main)
