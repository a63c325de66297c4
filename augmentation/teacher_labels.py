"""Teacher labels: what a trained model expects at each position of a data set, written once.

# or --teacher=gpt2
python augmentation/teacher_labels.py --teacher=out/softmax --dataset=wikitext --name=mine
python train_sigmoid.py config/mine.py --dataset=wikitext --labels=mine

The teacher is any model that train.py makes, or OpenAI's GPT-2, with the data's tokenizer. It reads windows of its
block_size that overlap, and labels the last `stride` positions of each, so that a label is made with context: those at
the beginning of a window have none, and say little more than the unigram. Interrupted, the same command goes on.
"""

import hashlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.base.distributed import autocast, pick_device
from engine.base.errors import MANY, UserError, check_ranges, run_main
from engine.base.options import flatten, load_config
from engine.data.labels import LabelWriter, pack, paths_of
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.data.tokens import TokenFile, dataset_folder
from engine.runs.checkpoint import check_tokenizer, load_model

# positions whose log-probabilities (ROWS, V) exist at a time, and sentences that are read together
ROWS = 256
SENTENCE = 64  # tokens of a sentence, at most, that max_perplexity looks at
FREE = (
    "teacher",
    "dataset",
    "name",
    "batch_size",
    "device",
)  # may change when an interrupted run goes on


@dataclass(frozen=True)
class Options:
    teacher: str = ""  # a run folder or checkpoint file, any head, or gpt2, gpt2-medium ...
    dataset: str = ""  # a folder in data/, or the path of a folder with train.bin
    name: str = ""  # of the labels; any number of sets can lie beside each other
    split: str = "train"  # train | val | test: labels of those are for evaluate.py --labels
    k: int = 8  # labels per position, 4 bytes each on the disk
    # topk: the likeliest, renormalised | sample: draws of 1 / k each, in expectation the teacher
    mode: str = "topk"
    share: float = 1.0  # share of the positions that get labels
    max_tokens: int = 0  # label this many positions only, the first ones; 0: all
    # drop a label that gives its sentence more under the teacher; slow; 0: keep all
    max_perplexity: float = 0.0
    # positions labelled per window; 0: half the teacher's block_size; all of it is twice as fast
    stride: int = 0
    batch_size: int = 16  # windows at a time: speed and memory
    seed: int = 1337  # of share and sample
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        if self.mode not in ("topk", "sample"):
            raise UserError(f"mode = {self.mode!r} is not one of: topk, sample")
        if not 0 < self.share <= 1:
            raise UserError(f"share = {self.share} must lie in (0, 1]")
        check_ranges(
            self,
            {
                "k": (1, 1 << 16),
                "batch_size": (1, MANY),
                "max_tokens": (0, MANY),
                "stride": (0, MANY),
            },
        )
        check_ranges(self, {"seed": (0, (1 << 63) - 1)})
        if not (self.max_perplexity == 0 or 1 < self.max_perplexity < math.inf):
            raise UserError(
                f"max_perplexity = {self.max_perplexity} must be above 1, or 0 for no filter"
            )


class Teacher:
    """The model, the tokens that it labels, and the windows it reads them in."""

    def __init__(self, options: Options):
        self.options, self.device = options, pick_device(options.device)
        self.cast, self.dtype = autocast(self.device, options.dtype)
        file = TokenFile(options.dataset, options.split)
        paths_of(file, options.name)  # a bad name is said now
        check_tokenizer(options.teacher, dataset_folder(options.dataset))
        self.model = load_model(options.teacher, self.device)
        self.file, self.T = file, self.model.config.block_size
        self.n_ids = min(
            file.vocab_size, self.model.config.vocab_size
        )  # a padded vocabulary has more than the text
        file.check(self.n_ids)
        if self.n_ids > 1 << 16:
            raise UserError(f"the vocabulary has {self.n_ids:,} ids, but a label has 16 bits")
        for name, most, what in (
            ("k", self.n_ids, "the vocabulary"),
            ("stride", self.T, "the teacher's block_size"),
        ):
            if getattr(options, name) > most:
                raise UserError(f"{name} = {getattr(options, name)} is above {most}, {what}")
        self.stride = options.stride or max(1, self.T // 2)
        self.n_positions = min(
            options.max_tokens or len(file), len(file) - 1
        )  # nothing follows the last token
        self.n_windows = 1 + math.ceil(max(0, self.n_positions - self.T) / self.stride)
        if options.max_perplexity:
            self.ends = sentence_ends(load_tokenizer(dataset_folder(options.dataset)))

    def about(self) -> dict:
        """What decides the labels, for their description."""
        weights = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            weights.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        options = {name: value for name, value in flatten(self.options).items() if name not in FREE}
        return options | {
            "dtype": self.dtype,
            "teacher_sha256": weights.hexdigest(),
            "vocab_size": self.n_ids,
            "windows": self.n_windows,
        }

    @torch.no_grad()
    def label(self, windows: range) -> tuple[int, np.ndarray, dict]:
        """The first position that these windows label, rows (n, 2, K) from there on, and what to count of them."""
        begins, seed, k = (
            np.array(windows)[:, None] * self.stride,
            self.options.seed,
            self.options.k,
        )
        positions = begins + np.arange(self.T)  # (B, T)
        owned = (positions < self.n_positions) & (
            (positions - begins >= self.T - self.stride) | (begins == 0)
        )
        chance = np.stack(
            [np.random.default_rng((seed, w)).random((self.T, 1 + k), np.float32) for w in windows]
        )
        chosen = owned & (chance[:, :, 0] < self.options.share)
        tokens = self.file.ids[
            np.minimum(positions, len(self.file) - 1)
        ]  # what lies behind the end labels nothing
        with self.cast:
            hidden = self.model.hidden(self.to_device(tokens.astype(np.int64)))[
                self.to_device(chosen)
            ]
            ids, weights, mass = self.pick(hidden, self.to_device(chance[chosen][:, 1:]))
        if self.options.max_perplexity and chosen.any():
            weights = self.filtered(positions[chosen], ids, weights)
        first, rows = positions[owned].min(), np.zeros((owned.sum(), 2, k), "<u2")
        rows[positions[chosen] - first] = pack(ids, weights)
        counts = {
            "chosen": int(chosen.sum()),
            "labelled": int(rows[:, 1].any(-1).sum()),
            "mass": mass,
        }
        return int(first), rows, counts

    def pick(
        self, hidden: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """hidden (n, C), uniforms (n, K) -> ids (n, K), weights (n, K) of sum 1, and the sum of the top K's mass."""
        all_ids, all_weights, mass, k = [], [], 0.0, self.options.k
        for x, u in zip(hidden.split(ROWS), uniforms.split(ROWS), strict=True):
            log_probs = self.model.lm_head.log_probs(x)[:, : self.n_ids]
            values, ids = log_probs.topk(k)
            weights, mass = values.softmax(-1), mass + values.exp().sum().item()
            if self.options.mode == "sample":
                cumulative = log_probs.exp().cumsum(-1)
                ids = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp(
                    max=self.n_ids - 1
                )
                same = ids.unsqueeze(-1) == ids.unsqueeze(
                    -2
                )  # what is drawn twice stands once, with the weight of two
                weights = same.float().mean(-1) * ~same.tril(-1).any(-1)
            all_ids.append(ids.cpu().numpy())
            all_weights.append(weights.cpu().numpy())
        return np.concatenate(all_ids), np.concatenate(all_weights), mass

    def filtered(self, positions: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """weights (n, K) without the ids that are implausible behind their positions (n,); their sum 1 again, or 0."""
        sentences = []
        for position, candidates in zip(positions.tolist(), ids, strict=True):
            begin, stop = self.sentence(position + 1)
            for candidate in candidates:
                sentences.append(self.file.ids[begin:stop].astype(np.int64))
                sentences[-1][position + 1 - begin] = candidate
        keep = (self.perplexities(sentences) <= self.options.max_perplexity).reshape(ids.shape)
        weights = weights * (keep | (ids == self.file.ids[positions + 1][:, None]))
        return weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float32).tiny)

    def sentence(self, target: int) -> tuple[int, int]:
        """begin, stop of the sentence around a token, with one token before it where there is one: its context."""
        longest = min(SENTENCE, self.T)
        before = self.ends[self.file.ids[max(0, target - longest // 2) : target]]
        begin = target - (before[::-1].argmax() if before.any() else len(before))
        begin, behind = max(0, begin - 1), self.ends[self.file.ids[target : target + longest]]
        stop = target + (behind.argmax() + 1 if behind.any() else len(behind))
        return begin, min(stop, begin + longest + 1)

    def perplexities(self, sentences: list[np.ndarray]) -> np.ndarray:
        """The teacher's perplexity of each sentence behind its first token, (n,)."""
        result = []
        for i in range(0, len(sentences), ROWS):
            some = [torch.from_numpy(sentence) for sentence in sentences[i : i + ROWS]]
            tokens = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-1).to(
                self.device
            )
            real = tokens[:, 1:] >= 0
            with self.cast:
                hidden = self.model.hidden(tokens[:, :-1].clamp(min=0))[real].split(ROWS)
                targets = tokens[:, 1:][real].split(ROWS)
                log_probs = [
                    self.model.lm_head.log_probs(x).gather(-1, y.unsqueeze(-1)).squeeze(-1)
                    for x, y in zip(hidden, targets, strict=True)
                ]
            nll = torch.zeros(real.shape, device=self.device).masked_scatter(
                real, -torch.cat(log_probs)
            )
            result.append((nll.sum(-1) / real.sum(-1)).exp().cpu().numpy())
        return np.concatenate(result)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) bool: the tokens that end a sentence; end-of-text, which has no bytes, is one."""
    return np.array(
        [not piece or any(end in piece for end in b".!?\n") for piece in tokenizer.token_bytes()]
    )


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if not (options.teacher and options.dataset and options.name):
        raise UserError("give all of --teacher=RUN --dataset=DATA --name=NAME (see --help)")
    teacher = Teacher(options)
    writer = LabelWriter(teacher.file, options.name, teacher.about())
    zero = {"chosen": 0, "labelled": 0, "mass": 0.0, "seconds": 0.0, "teacher": options.teacher}
    progress, n = zero | writer.progress, teacher.n_windows
    if progress["done"] == n:
        print(f"{writer.path} is complete already; nothing to do")
    started = time.perf_counter() - progress["seconds"]
    bar = tqdm(
        total=n,
        initial=progress["done"],
        desc=options.name,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    for begin in range(progress["done"], n, options.batch_size):
        windows = range(begin, min(begin + options.batch_size, n))
        first, rows, counts = teacher.label(windows)
        writer.write(first, rows)
        progress |= {name: progress[name] + value for name, value in counts.items()}
        progress |= {"done": windows.stop, "seconds": time.perf_counter() - started}
        writer.save(**progress)
        bar.update(len(windows))
    bar.close()
    print(
        f"{writer.path}: {progress['labelled']:,} of {teacher.n_positions:,} positions have labels; the {options.k} "
        f"likeliest ids have {progress['mass'] / max(1, progress['chosen']):.1%} of the teacher's probability; "
        f"{writer.path.stat().st_blocks * 512 / 1e6:.1f} MB on the disk, {progress['seconds']:.0f} s"
    )


if __name__ == "__main__":
    run_main(main)
