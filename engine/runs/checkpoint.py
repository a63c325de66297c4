"""Checkpoints: <out_dir>/ckpt_<step>.pt, and other trained models that load like one.

A checkpoint holds tensors and plain values. Loading it runs no code.
"""

import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.errors import UserError, warn
from engine.base.files import write_json
from engine.base.options import build
from engine.data.gpt2_bpe import GPT2Tokenizer
from engine.data.tokenizer import BPETokenizer, Tokenizer, has_tokenizer, load_tokenizer, read_meta
from engine.data.tokens import dataset_folder
from engine.gpt2.loading import HUB, from_nanogpt, from_transformers, is_transformers, load_state
from model import GPT, GPTConfig

GPT2_META = {"tokenizer": {"kind": GPT2Tokenizer.kind}}  # of data and models without a meta.json


@dataclass(frozen=True)
class Checkpoint:
    """A trained model as its files describe it."""

    source: str | Path
    config: GPTConfig
    weights: dict[str, torch.Tensor]
    about: dict  # the rest of the file: the run's options, step ...; may be {}

    def model(self, device: torch.device | str = "cpu") -> GPT:
        """The model, ready to predict."""
        model = GPT(self.config)
        load_state(model, self.weights)
        return model.to(device).eval()

    @property
    def dataset(self) -> str | None:
        """The data set that the model was trained on, if known."""
        return self.about.get("config", {}).get("dataset")

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer: GPT-2's, unless a file names another."""
        folder, vocab_size = folder_of(self.source), self.config.vocab_size
        if self.dataset and not has_tokenizer(folder):  # nanoGPT keeps it with the data
            folder = dataset_folder(self.dataset)
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}; copy the "
                f"tokenizer's files (meta.json or meta.pkl of its data set) to {self.source}"
            )
        return tokenizer


def name_of(step: int) -> str:
    return f"ckpt_{step:08d}.pt"


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; without any, nanoGPT's ckpt.pt."""
    ours = Path(out_dir).glob("ckpt_" + 8 * "[0-9]" + ".pt")
    return sorted(ours) or list(Path(out_dir).glob("ckpt.pt"))


def read(path: Path) -> dict:
    """The contents of a checkpoint file. Refuses a damaged file and one that would run code."""
    try:
        check_crc(path)  # torch.load ignores it
        # mapped, the processes of a machine share one copy in memory
        has_peers = os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
        mmap = has_peers and zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if isinstance(state, dict) and isinstance(state.get("model"), dict):
            return state
        reason = "it holds no model"
    except pickle.UnpicklingError:  # torch's text advises to trust the file
        reason = "it holds more than tensors and plain values"
    except Exception as error:  # with a damaged file, the unpickler may raise anything
        reason = str(error).split("\n")[0][:120]
    raise UserError(f"{path} is not a good checkpoint: {reason}; use another one, or train again")


def check_crc(path: Path) -> None:
    """Check a zip archive against its checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")


def read_newest(out_dir: Path) -> dict:
    """The newest checkpoint of a run. If it is damaged, warn and read the one before it."""
    paths = list_checkpoints(out_dir)
    if not paths:
        raise UserError(
            f"there is no checkpoint in {out_dir}; train first, or give another --out_dir"
        )
    for path in reversed(paths[1:]):
        try:
            return read(path)
        except UserError as error:
            warn(str(error))
    return read(paths[0])


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a trained model.

    source: a run folder (its newest checkpoint), a checkpoint file (ours or nanoGPT's), a folder of
    transformers, or OpenAI's weights by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl).
    """
    path, about = Path(source), {}
    if str(source) in HUB or is_transformers(path):
        shape, weights = from_transformers(source)
    elif path.exists():
        state = read_newest(path) if path.is_dir() else read(path)
        about = {name: state[name] for name in state.keys() - {"model", "optimizer"}}
        if "model_config" in state:
            config = build(GPTConfig, state["model_config"])
            return Checkpoint(source, config, state["model"], about)
        if "model_args" not in state:
            raise UserError(f"{source} is not a checkpoint of ours or of nanoGPT")
        shape, weights = from_nanogpt(state)
    else:
        choices = f"a run folder, a checkpoint file, or one of: {', '.join(HUB)}"
        raise UserError(f"{source} does not exist; give {choices}")
    tied = torch.equal(weights["transformer.wte.weight"], weights["lm_head.weights.weight"])
    return Checkpoint(source, build(GPTConfig, shape | {"tie_head": tied}), weights, about)


def load_model(source: str | Path, device: torch.device | str = "cpu") -> GPT:
    """The model of read_checkpoint(source), ready to predict."""
    return read_checkpoint(source).model(device)


def folder_of(source: str | Path) -> Path:
    """The folder of a run, given the folder or one of its checkpoint files."""
    return Path(source).parent if Path(source).is_file() else Path(source)


def results_folder(source: str | Path) -> Path:
    """The folder for a model's results: that of its run, or out/gpt2* for OpenAI's."""
    return Path("out", source) if source in HUB else folder_of(source)


def check_tokenizer(source: str | Path, dataset: Path) -> None:
    """Refuse data with a tokenizer other than the model's, if both are known."""
    folder, theirs = folder_of(source), read_meta(dataset)
    ours = GPT2_META if str(source) in HUB else read_meta(folder)
    if theirs and ours:
        same = ours["tokenizer"] == theirs["tokenizer"]
    elif theirs and has_tokenizer(folder):  # transformers' file of the same BPE has other bytes
        same = load_tokenizer(folder).token_bytes() == load_tokenizer(dataset).token_bytes()
    else:
        return
    if not same:
        raise UserError(
            f"{dataset} has another tokenizer than {source}; "
            "prepare the data with the tokenizer of the model (--tokenizer)"
        )


def copy_tokenizer(dataset: Path, meta: dict | None, out_dir: Path) -> None:
    """Copy a data set's tokenizer to a run's folder, which is then enough to sample from.

    meta: the data set's meta.json; None for GPT-2's tokens.
    """
    if meta:
        write_json(out_dir / "meta.json", meta)
    for name in (BPETokenizer.file, GPT2Tokenizer.file):
        if (dataset / name).is_file():
            shutil.copyfile(dataset / name, out_dir / name)
