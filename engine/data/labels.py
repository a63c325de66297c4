"""Teacher labels: K ids and weights for each position of a token file. The one place that writes and reads them.

Beside <split>.bin lie <split>.<name>.labels, a row (2, K) of little-endian uint16 for each token: ids, and weights as
the bits of float16; and <split>.<name>.labels.json: what they were made of and how far they have come. Row i speaks of
the token behind token i. The weights of a row sum to 1, and no id has two of them; a row of zeros is a position
without labels. Whatever is not yet written is a hole in the file, which reads as zeros and takes no space.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from engine.base.errors import UserError
from engine.base.files import exclusive_lock, write_json
from engine.data.scan import Reader
from engine.data.tokens import DATA_ROOT, TokenFile

MODES = ("soft", "set")


def paths_of(file: TokenFile, name: str) -> tuple[Path, Path]:
    """Where the label set of that name lies: its rows and their description."""
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise UserError(f"{name!r} cannot name labels; use letters, digits, _ and -")
    return tuple(
        file.path.with_name(f"{file.path.stem}.{name}.labels{end}") for end in ("", ".json")
    )


def identity(file: TokenFile) -> dict:
    """What labels belong to: these tokens under this tokenizer."""
    described = (file.meta or {"tokenizer": {"kind": "gpt2"}})["tokenizer"]
    tokenizer = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    return {
        "tokens": len(file),
        "tokens_sha256": file.sha256,
        "tokenizer_sha256": tokenizer.hexdigest(),
    }


def pack(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ids, weights (n, K) -> rows (n, 2, K) uint16; an id of weight 0 becomes 0."""
    bits = weights.astype("<f2").view("<u2")
    return np.stack([np.where(bits > 0, ids, 0).astype("<u2"), bits], axis=1)


def unpack(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """rows (..., 2, K) uint16 -> ids (..., K) int64, weights (..., K) float32."""
    weights = rows[..., 1, :].view("<f2").astype(np.float32)
    return torch.from_numpy(rows[..., 0, :].astype(np.int64)), torch.from_numpy(weights)


class LabelFile:
    """A finished label set, for training.

    mode "soft": the teacher's distribution takes `weight` of a position's label, the true token keeps the rest. Of the
    likeliest K (topk) the file says how likely each is among them, not how likely it is that any of them comes. So they
    speak only where the true token is one of them, and a label is right in expectation: with weight w,
    E_y[label_v] = (1 - w) p_v + w P(y in K) q(v | K), which is p_v where the teacher is right. Everywhere, they would
    get all of the teacher's share, of which it gives four of 8,192 ids a third.
    mode "set": the true token and all of the teacher's are labels of 1.
    """

    def __init__(self, file: TokenFile, name: str, mode: str = "soft", weight: float = 0.5):
        self.path, about = paths_of(file, name)
        self.mode, self.weight = mode, weight
        folder = file.path.parent
        dataset = folder.name if folder.parent == DATA_ROOT else folder
        make = (
            f"python augmentation/teacher_labels.py --teacher=RUN --dataset={dataset} --name={name}"
        )
        make += "" if file.path.stem == "train" else f" --split={file.path.stem}"
        if not about.is_file():
            raise UserError(f"{about} is missing; run: {make}")
        self.about = read_about(about)
        way_out = f"delete it and its .json, and run: {make}"
        refuse_other(identity(file), self.about, f"{self.path} was made for other data", way_out)
        if self.about["done"] < self.about["windows"]:
            done = self.about["done"] / self.about["windows"]
            raise UserError(
                f"{self.path} is {done:.0%} done; to finish it run again what began it: {make} ..."
            )
        self.row = (2, self.about["k"])
        if not self.path.is_file() or self.path.stat().st_size != 2 * len(file) * math.prod(
            self.row
        ):
            raise UserError(f"{self.path} is not of the size that its .json says; {way_out}")
        self.reader = Reader(self.path)

    @property
    def rows(self) -> np.ndarray:
        """All rows (n, 2, K), mapped anew."""
        return self.reader.mapped("<u2").reshape(-1, *self.row)

    def check(self, vocab_size: int) -> None:
        """Refuse a model without an id that may be among the labels."""
        if self.about["vocab_size"] > vocab_size:
            largest = self.about["vocab_size"] - 1
            raise UserError(
                f"{self.path} has ids up to {largest}, but vocab_size = {vocab_size}; use other --labels"
            )

    def targets(self, y: torch.Tensor, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """y (B, T), the tokens behind positions starts (B,) + 0 .. T - 1 -> ids (B, T, K + 1) int64, the true one
        first, and label weights (B, T, K + 1) float32: soft ones sum to 1, those of a set are 1 once for each member.
        """
        size = 2 * math.prod(self.row)
        rows = np.frombuffer(self.reader.pieces(starts * size, y.size(1) * size), "<u2")
        ids, weights = unpack(rows.reshape(*y.shape, *self.row))
        if ids.max() >= self.about["vocab_size"] or not ((weights >= 0) & (weights <= 1)).all():
            raise UserError(
                f"{self.path} is damaged; delete it and its .json, and make the labels again"
            )
        y, total = y.unsqueeze(-1), weights.sum(-1, keepdim=True)
        targets = torch.cat([y, ids], -1)
        if self.mode == "set":
            return targets, torch.cat(
                [torch.ones_like(total), ((weights > 0) & (ids != y)).float()], -1
            )
        speaks = (
            ((ids == y) & (weights > 0)).any(-1, keepdim=True)
            if self.about.get("mode") == "topk"
            else total > 0
        )
        share = self.weight * speaks
        # float16 lets the total be off by some 1e-4
        return targets, torch.cat([1 - share, weights * (share / total.clamp(min=1e-6))], -1)


class LabelWriter:
    """Writes a label set piece by piece, each on the disk before it counts as done: a killed run goes on behind it.

    about: what the set is made of; whoever goes on must have the same. progress: starts at 0, save() changes it.
    """

    def __init__(self, file: TokenFile, name: str, about: dict):
        self.path, self.about_path = paths_of(file, name)
        self.about = about | identity(file)
        busy = f"another process is writing {self.path}; wait for it, or give another --name"
        self.lock = contextlib.ExitStack()
        self.lock.enter_context(exclusive_lock(self.path, busy))
        self.file = open(self.path, "r+b")  # noqa: SIM115 open for as long as there is a writer
        size, found = 4 * len(file) * about["k"], self.path.stat().st_size
        if self.about_path.is_file():
            self.progress = read_about(self.about_path)
            way_out = f"give another --name, or delete {self.path} and its .json"
            refuse_other(self.about, self.progress, f"{self.path} was made otherwise", way_out)
            if found != size and self.progress["done"]:
                raise UserError(
                    f"{self.path} has {found:,} bytes, not {size:,}; delete it and its .json"
                )
        elif found:
            raise UserError(
                f"{self.path} has no .json beside it, so nobody knows what it is; delete it"
            )
        else:
            self.save(done=0)
        if found != size:
            self.file.truncate(size)

    def write(self, first: int, rows: np.ndarray) -> None:
        """rows (n, 2, K) of the positions from first on."""
        self.file.seek(4 * first * self.about["k"])
        self.file.write(rows.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())

    def save(self, **progress) -> None:
        """Say in the description how far the rows have come."""
        self.progress = self.about | progress
        write_json(self.about_path, self.progress)


def read_about(path: Path) -> dict:
    """A label set's description."""
    try:
        about = json.loads(path.read_text())
        least = {"k": 1, "vocab_size": 1, "windows": 1, "done": 0}
        if all(isinstance(about[name], int) and about[name] >= n for name, n in least.items()):
            return about
    except (ValueError, KeyError, TypeError, RecursionError):  # the line below says it
        pass
    raise UserError(f"{path} does not describe labels; delete it and {path.with_suffix('')}")


def refuse_other(wanted: dict, found: dict, what: str, way_out: str) -> None:
    """Compare descriptions, and name the first difference."""
    for name, value in wanted.items():
        if found.get(name) != value:
            there, here = f"{found.get(name)}"[:16], f"{value}"[:16]
            raise UserError(f"{what}: its {name} is {there}, here it is {here}; {way_out}")
