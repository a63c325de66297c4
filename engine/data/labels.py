"""Teacher labels: K ids and weights for each position of a training text.

augmentation/teacher_labels.py writes them to train.<name>.labels, next to train.bin. Row i,
(2, K) little-endian uint16, labels the token after token i: the ids, then their weights (the bits
of float16). The ids of a row differ and its weights sum to 1. A row of zeros has no labels. Rows
that are not written yet are a hole in the file, which reads as zeros and takes no space.
train.<name>.labels.json records what the labels depend on and how many windows are done.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch

from engine.base.errors import UserError
from engine.base.files import read_json
from engine.data.shards import Shard
from engine.data.tokens import TokenFile

MODES = ("soft", "set")
LABEL_BYTES = 4  # an id of 2 bytes and a float16 weight


def paths_of(file: TokenFile, name: str) -> tuple[Path, Path]:
    """The paths of a label set's rows and of its description."""
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise UserError(f"{name!r} cannot name labels; use letters, digits, _ and -")
    path = file.path.with_name(f"{file.path.stem}.{name}.labels")
    return path, path.with_name(f"{path.name}.json")


def identity(file: TokenFile) -> dict:
    """What a label set must match: the tokens and their tokenizer."""
    tokenizer = file.meta["tokenizer"] if file.meta else {"kind": "gpt2"}
    described = json.dumps(tokenizer, sort_keys=True).encode()
    return {
        "tokens": len(file),
        "tokens_sha256": file.sha256,
        "tokenizer_sha256": hashlib.sha256(described).hexdigest(),
    }


def refuse_other(expected: dict, found: dict, what: str, advice: str) -> None:
    """Compare two descriptions; raise a UserError that names the first difference."""
    for name, value in expected.items():
        if found.get(name) != value:
            there = str(found.get(name))[:16]
            here = str(value)[:16]
            raise UserError(f"{what}: its {name} is {there}, not {here}; {advice}")


def pack(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ids, weights (n, K) -> rows (n, 2, K) uint16; an id of weight 0 becomes 0."""
    bits = weights.astype("<f2").view("<u2")
    used_ids = np.where(bits > 0, ids, 0)
    return np.stack([used_ids.astype("<u2"), bits], axis=1)


def unpack(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """rows (..., 2, K) uint16 -> ids (..., K) int64, weights (..., K) float32."""
    ids = rows[..., 0, :].astype(np.int64)
    weights = rows[..., 1, :].view("<f2").astype(np.float32)
    return torch.from_numpy(ids), torch.from_numpy(weights)


class LabelFile:
    """A complete label set, for training.

    mode "soft": the label gives `weight` to the teacher's distribution and the rest to the true
    token. Top-k labels hold the teacher's probabilities given that the next token is one of the
    K ids, but not how likely that is. They are used only if the true token is one of the K. This
    makes the label right in expectation: with weight w, E_y[label_v] =
    (1 - w) p_v + w P(y in K) q(v | K), which is p_v if the teacher is right.
    mode "set": the true token and all of the teacher's ids have the label 1.
    """

    def __init__(
        self,
        file: TokenFile,
        name: str,
        mode: str = "soft",
        weight: float = 0.5,
    ):
        self.path, description = paths_of(file, name)
        self.mode = mode
        self.weight = weight
        make = f"run augmentation/teacher_labels.py with --name={name}"
        if not (description.is_file() and self.path.is_file()):
            raise UserError(f"{self.path} or its .json is missing; {make}")
        self.about = read_json(description)
        again = f"delete it and its .json, and {make}"
        refuse_other(identity(file), self.about, f"{self.path} was made for other data", again)
        done = self.about["done"] / self.about["windows"]
        if done < 1:
            raise UserError(f"{self.path} is {done:.0%} done; to finish it, {make}")
        size = len(file) * self.about["k"] * LABEL_BYTES
        if self.path.stat().st_size != size:
            raise UserError(f"{self.path} has another size than its .json says; {again}")
        self.shard = Shard(self.path, np.dtype("<u2"), size)

    @property
    def rows(self) -> np.ndarray:
        """All rows (n, 2, K), mapped into memory."""
        return self.shard.map().reshape(-1, 2, self.about["k"])

    def check(self, vocab_size: int) -> None:
        """Refuse a model whose vocabulary is smaller than the labels'."""
        largest = self.about["vocab_size"] - 1
        if largest >= vocab_size:
            raise UserError(
                f"{self.path} has ids up to {largest}, but vocab_size = {vocab_size}; "
                "use other --labels"
            )

    def targets(self, y: torch.Tensor, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """y (B, T): the true tokens after the positions starts (B,) + 0 .. T - 1.

        Returns ids (B, T, K + 1) int64, the true one first, and weights (B, T, K + 1) float32.
        Soft labels sum to 1. In a set each id has the weight 1 once."""
        rows = self.rows
        blocks = [rows[start : start + y.size(1)] for start in starts]
        ids, weights = unpack(np.stack(blocks))
        are_weights = (weights >= 0) & (weights <= 1)
        if ids.max() >= self.about["vocab_size"] or not are_weights.all():
            raise UserError(f"{self.path} is damaged; delete it and its .json, and make it again")
        y = y.unsqueeze(-1)
        total = weights.sum(-1, keepdim=True)
        is_label = weights > 0
        is_true = ids == y
        if self.mode == "set":
            of_true = torch.ones_like(total)
            of_others = (is_label & ~is_true).float()
        else:
            is_used = total > 0
            if self.about.get("mode") == "topk":
                is_used = (is_label & is_true).any(-1, keepdim=True)
            share = self.weight * is_used
            of_true = 1 - share
            # in float16 the weights' sum differs from 1 by about 1e-4
            of_others = weights * (share / total.clamp(min=1e-6))
        all_ids = torch.cat([y, ids], -1)
        all_weights = torch.cat([of_true, of_others], -1)
        return all_ids, all_weights
