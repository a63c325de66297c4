"""Teacher labels: K ids and weights for each position of a split. augmentation/teacher_labels.py
makes them.

<split>.<name>.labels lies next to <split>.bin: for each token a row (2, K) of little-endian
uint16, the ids and their weights (as bits of float16). Row i labels the token after token i. Its
weights sum to 1 and its ids differ; a row of zeros is a position without labels.
<split>.<name>.labels.json holds what they were made from and how many windows are done.
Positions that are not written yet are a hole in the file: they read as zeros and take no space.
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
UINT16 = np.dtype("<u2")


def paths_of(file: TokenFile, name: str) -> tuple[Path, Path]:
    """The paths of a label set: its rows, and their description."""
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise UserError(f"{name!r} cannot name labels; use letters, digits, _ and -")
    path = file.path.with_name(f"{file.path.stem}.{name}.labels")
    return path, path.with_name(f"{path.name}.json")


def identity(file: TokenFile) -> dict:
    """What labels belong to: these tokens, made by this tokenizer."""
    tokenizer = file.meta["tokenizer"] if file.meta else {"kind": "gpt2"}
    described = json.dumps(tokenizer, sort_keys=True).encode()
    return {
        "tokens": len(file),
        "tokens_sha256": file.sha256,
        "tokenizer_sha256": hashlib.sha256(described).hexdigest(),
    }


def refuse_other(expected: dict, found: dict, what: str, advice: str) -> None:
    """Compare descriptions, and name the first difference."""
    for name, value in expected.items():
        if found.get(name) != value:
            there = str(found.get(name))[:16]
            here = str(value)[:16]
            raise UserError(f"{what}: its {name} is {there}, here it is {here}; {advice}")


def row_bytes(k: int) -> int:
    return 2 * k * UINT16.itemsize


def pack(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ids, weights (n, K) -> rows (n, 2, K) uint16; an id of weight 0 becomes 0."""
    bits = weights.astype("<f2").view(UINT16)
    return np.stack([np.where(bits > 0, ids, 0).astype(UINT16), bits], axis=1)


def unpack(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """rows (..., 2, K) uint16 -> ids (..., K) int64, weights (..., K) float32."""
    ids = rows[..., 0, :].astype(np.int64)
    weights = rows[..., 1, :].view("<f2").astype(np.float32)
    return torch.from_numpy(ids), torch.from_numpy(weights)


class LabelFile:
    """A finished label set, for training.

    mode "soft": the teacher's distribution takes `weight` of a position's label, the true token
    keeps the rest. The file holds how likely each of the K likeliest ids (topk) is among these
    K, not how likely it is that the next token is one of them. So these labels are used only
    where the true token is one of the K, which makes a label right in expectation: with weight
    w, E_y[label_v] = (1 - w) p_v + w P(y in K) q(v | K), which is p_v if the teacher is right.
    mode "set": the true token and all of the teacher's ids are labels of 1.
    """

    def __init__(self, file: TokenFile, name: str, mode: str = "soft", weight: float = 0.5):
        self.path, description = paths_of(file, name)
        self.mode = mode
        self.weight = weight
        make = f"run augmentation/teacher_labels.py with --name={name} --split={file.path.stem}"
        if not (description.is_file() and self.path.is_file()):
            raise UserError(f"{self.path} or its .json is missing; {make}")
        self.about = read_json(description)
        again = f"delete it and its .json, and {make}"
        refuse_other(identity(file), self.about, f"{self.path} was made for other data", again)
        done = self.about["done"] / self.about["windows"]
        if done < 1:
            raise UserError(f"{self.path} is {done:.0%} done; to finish it, {make}")
        size = len(file) * row_bytes(self.about["k"])
        if self.path.stat().st_size != size:
            raise UserError(f"{self.path} does not have the size that its .json says; {again}")
        self.shard = Shard(self.path, UINT16, 0, size)

    @property
    def rows(self) -> np.ndarray:
        """All rows (n, 2, K), mapped."""
        return self.shard.map().reshape(-1, 2, self.about["k"])

    def check(self, vocab_size: int) -> None:
        """Refuse a model whose vocabulary lacks ids that may be among the labels."""
        largest = self.about["vocab_size"] - 1
        if largest >= vocab_size:
            raise UserError(
                f"{self.path} has ids up to {largest}, but vocab_size = {vocab_size}; "
                "use other --labels"
            )

    def targets(self, y: torch.Tensor, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """y (B, T), the tokens after positions starts (B,) + 0 .. T - 1 -> ids (B, T, K + 1)
        int64, the true one first, and label weights (B, T, K + 1) float32: soft ones sum to 1,
        those of a set are 1 once for each member."""
        rows = self.rows
        blocks = [rows[start : start + y.size(1)] for start in starts]
        ids, weights = unpack(np.stack(blocks))
        if ids.max() >= self.about["vocab_size"] or not ((weights >= 0) & (weights <= 1)).all():
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
            # float16 makes the total differ from 1 by some 1e-4
            of_others = weights * (share / total.clamp(min=1e-6))
        return torch.cat([y, ids], -1), torch.cat([of_true, of_others], -1)
