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

ROWS = 256  # positions whose log-probabilities (ROWS, V) exist at a time; sentences of a batch
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
            # end-of-text, which has no bytes, ends a sentence too
            self.ends_sentence = np.array([not t or any(c in t for c in b".!?\n") for t in tokens])

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
        B, T, K = len(windows), self.block_size, self.options.k
        tokens = np.zeros((B, T), np.int64)
        chance = np.zeros((B, T, 1 + K), np.float32)
        for i, window in enumerate(windows):
            begin = window * self.stride
            found = self.file[begin : begin + T]
            tokens[i, : len(found)] = found
            chance[i] = np.random.default_rng((self.options.seed, window)).random((T, 1 + K), "f4")
        begins = np.array(windows)[:, None] * self.stride
        positions = begins + np.arange(T)
        is_ours = (positions - begins >= T - self.stride) | (begins == 0)
        is_ours &= positions < self.n_positions
        is_chosen = is_ours & (chance[:, :, 0] < self.options.share)
        with self.cast:
            hidden = self.model.hidden(self.to_device(tokens))[self.to_device(is_chosen)]
            ids, weights, mass = self.pick(hidden, self.to_device(chance[is_chosen][:, 1:]))
        if self.options.max_perplexity and is_chosen.any():
            weights = self.filtered(positions[is_chosen], ids, weights)
        first = positions[is_ours].min()
        rows = np.zeros((is_ours.sum(), 2, K), "<u2")
        rows[positions[is_chosen] - first] = pack(ids, weights)
        labelled = int(rows[:, 1].any(-1).sum())
        return int(first), rows, {"chosen": len(ids), "labelled": labelled, "mass": mass}

    def pick(
        self, hidden: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """hidden (n, C), uniforms (n, K) -> ids (n, K), weights (n, K) of sum 1, and the sum of
        the top K's mass."""
        all_ids, all_weights, mass = [], [], 0.0
        for x, u in zip(hidden.split(ROWS), uniforms.split(ROWS), strict=True):
            log_probs = self.model.lm_head.log_probs(x)[:, : self.n_ids]
            values, ids = log_probs.topk(self.options.k)
            weights = values.softmax(-1)
            mass += values.exp().sum().item()
            if self.options.mode == "sample":
                cumulative = log_probs.exp().cumsum(-1)
                ids = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
                ids = ids.clamp(max=self.n_ids - 1)
                # an id that is drawn twice appears once, with the weight of two
                is_same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
                weights = is_same.float().mean(-1) * ~is_same.tril(-1).any(-1)
            all_ids.append(ids.cpu().numpy())
            all_weights.append(weights.cpu().numpy())
        return np.concatenate(all_ids), np.concatenate(all_weights), mass

    def filtered(self, positions: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """weights (n, K) without the ids that are implausible after their positions (n,). The
        sum is 1 again, or 0."""
        variants, true_ids = [], []
        for position, candidates in zip(positions.tolist(), ids, strict=True):
            sentence, place = self.sentence(position + 1)
            true_ids.append(sentence[place])
            for candidate in candidates:
                variants.append(sentence.copy())
                variants[-1][place] = candidate
        is_plausible = self.perplexities(variants) <= self.options.max_perplexity
        is_true = ids == np.array(true_ids)[:, None]
        weights = weights * (is_plausible.reshape(ids.shape) | is_true)
        return weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float32).tiny)

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

    def perplexities(self, sentences: list[np.ndarray]) -> np.ndarray:
        """The teacher's perplexity of each sentence after its first token, (n,)."""
        found = []
        for i in range(0, len(sentences), ROWS):
            batch = [torch.from_numpy(sentence) for sentence in sentences[i : i + ROWS]]
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-1)
            padded = padded.to(self.device)
            is_token = padded[:, 1:] >= 0
            targets = padded[:, 1:][is_token].unsqueeze(-1)
            with self.cast:
                hidden = self.model.hidden(padded[:, :-1].clamp(min=0))[is_token]
                log_p = [
                    self.model.lm_head.log_probs(x).gather(-1, y)
                    for x, y in zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
                ]
            of_sentences = torch.cat(log_p).flatten().split([len(s) - 1 for s in batch])
            found += [(-log_p.mean()).exp().item() for log_p in of_sentences]
        return np.array(found)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


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
    print(
        f"{writer.path}: {progress['labelled']:,} of {teacher.n_positions:,} positions have labels; "
        f"the {options.k} likeliest ids have {progress['mass'] / max(1, progress['chosen']):.1%} of "
        f"the teacher's probability; {writer.path.stat().st_blocks * 512 / 1e6:.1f} MB on the disk, "
        f"{progress['seconds']:.0f} s"
    )


if __name__ == "__main__":
    run_main(main)
