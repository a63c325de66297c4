"""Checkpoints: <out_dir>/ckpt_<step>.pt, written beside and renamed; loaded without running any code that they hold."""

import os
import pickle
import shutil
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import build, flatten
from engine.errors import UserError
from engine.pretrained import HUB, from_nanogpt, from_transformers, load_state
from engine.tokenizer import read_meta
from model import GPT, GPTConfig

KEEP = 2  # newest checkpoints kept beside the best one
PARTS = {"model": dict, "model_config": dict, "config": dict, "optimizer": dict, "scaler": dict}  # what save() is given
PARTS |= {"step": int, "best_step": int, "best_val_nll": float, "seconds": float}
KINDS = PARTS | {"model_args": dict}  # nanoGPT's


def save(out_dir: Path, state: dict) -> Path:
    """Write state (it has "step" and "best_step") as a new checkpoint, then let go of the old ones."""
    path = out_dir / f"ckpt_{state['step']:08d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); the earlier checkpoints are untouched") from None
    os.replace(temporary, path)
    best = out_dir / f"ckpt_{state['best_step']:08d}.pt"
    for old in _checkpoints(out_dir)[:-KEEP]:
        if old != best:
            old.unlink()
    return path


def exists(out_dir: Path) -> bool:
    """Whether a run is in the folder."""
    return bool(_checkpoints(out_dir))


def read(path: Path) -> dict:
    """A checkpoint file's contents: tensors and plain values only, anything else in it is refused."""
    try:
        if zipfile.is_zipfile(path):  # torch.load itself does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
        with warnings.catch_warnings(action="ignore"):  # of old formats, which are read or refused all the same
            state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and "model" in state:
            odd = [name for name, kind in KINDS.items() if name in state and not isinstance(state[name], kind)]
            odd = odd or [name for name, tensor in state["model"].items() if not isinstance(tensor, torch.Tensor)]
            if not odd:
                return state
            reason = f"its {odd[0]} is of another kind"
        else:
            reason = "it holds no model"
    except Exception as error:  # the bytes of a damaged file can make the unpickler raise anything
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds something else than tensors and plain values, which is never run"
    raise UserError(f"{path} is not a good checkpoint: {reason}")


def read_newest(out_dir: Path) -> dict:
    """The newest good checkpoint of a run folder; a damaged one is named and passed over."""
    paths = _checkpoints(out_dir)
    for path in reversed(paths):
        try:
            return read(path)
        except UserError as error:
            if path == paths[0]:
                raise UserError(f"{error}; there is no other one in {out_dir}, give another --out_dir") from None
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    raise UserError(f"there is no checkpoint in {out_dir}; train first, or give another --out_dir")


def read_weights(source: str | Path) -> tuple[GPTConfig, dict]:
    """The model's config and state_dict in a run folder, a checkpoint file (ours or nanoGPT's), a transformers folder,
    or OpenAI's weights by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl)."""
    path = Path(source)
    if str(source) in HUB or (path / "model.safetensors").is_file():
        shape, state = from_transformers(source)
    elif path.is_dir() or path.is_file():
        contents = read_newest(path) if path.is_dir() else read(path)
        if "model_config" in contents:
            return build(GPTConfig, contents["model_config"]), contents["model"]
        if "model_args" not in contents:
            raise UserError(f"{source} is neither a checkpoint of ours nor one of nanoGPT's")
        shape, state = from_nanogpt(contents)
    else:
        raise UserError(f"{source} does not exist; give a run folder, a checkpoint file, or one of: {', '.join(HUB)}")
    tied = torch.equal(state["transformer.wte.weight"], state["lm_head.weights.weight"])
    return build(GPTConfig, shape | {"tie_head": tied}), state


def load_model(source: str | Path, device: torch.device | str = "cpu", config: GPTConfig | None = None) -> GPT:
    """The model of read_weights(source), ready to predict; config: another head or a shorter block_size on the same
    backbone (what the new head has beyond the old one stays as initialised)."""
    found, state = read_weights(source)
    model = GPT(config or found)
    load_state(model, state)
    return model.to(device).eval()


def on_backbone(shape: GPTConfig, wanted: GPTConfig, given: set[str]) -> GPTConfig:
    """wanted (dropout, head ...) on a backbone of the given shape; explicit options that contradict it are refused."""
    fixed = ("n_layer", "n_head", "n_embd", "bias", "qkv_bias", "vocab_size")
    for name in fixed:
        if name in given and getattr(wanted, name) != getattr(shape, name):
            raise UserError(
                f"{name} = {getattr(wanted, name)}, but the weights to start from have {getattr(shape, name)}"
            )
    if wanted.block_size > shape.block_size and "block_size" in given:
        raise UserError(f"block_size = {wanted.block_size}, but the weights to start from end at {shape.block_size}")
    block_size = min(wanted.block_size, shape.block_size)
    return replace(wanted, block_size=block_size, **{name: getattr(shape, name) for name in fixed})


def resumed_config(saved: GPTConfig, wanted: GPTConfig, given: set[str]) -> GPTConfig:
    """The saved model's config; only dropout and gradient_checkpointing may change in the middle of a run."""
    free = ("dropout", "gradient_checkpointing")
    before, after = flatten(saved), flatten(wanted)
    for name in sorted(given & before.keys() - set(free)):
        if before[name] != after[name] and not (name == "vocab_size" and after[name] == 0):
            raise UserError(
                f"{name} = {after[name]!r}, but the run to resume has {before[name]!r}; use another --out_dir"
            )
    return replace(saved, **{name: after[name] for name in free if name in given})


def check_continuity(saved: dict, wanted: dict) -> None:
    """Refuse to resume a run with other data or another size of step: its micro-batches would not go on."""
    same = ("dataset", "seed", "batch_size", "gradient_accumulation_steps", "labels", "label_mode", "label_weight")
    for name in same:
        if saved[name] != wanted[name]:
            raise UserError(
                f"the run to resume has {name} = {saved[name]!r}, this one {wanted[name]!r}; add --{name}={saved[name]}"
            )


def check_tokenizer(source: str | Path, dataset: Path) -> None:
    """Refuse data whose tokenizer is another than that of the run in the folder of source, where both are known."""
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    metas = [{"tokenizer": {"kind": "gpt2"}} if str(source) in HUB else read_meta(folder), read_meta(dataset)]
    if None not in metas and metas[0]["tokenizer"] != metas[1]["tokenizer"]:
        kinds = [meta["tokenizer"].get("kind") for meta in metas]
        raise UserError(f"{source} was trained with another tokenizer ({kinds[0]}) than {dataset} has ({kinds[1]})")


def trained_on(source: str | Path) -> str | None:
    """The data set of a run (of ours or nanoGPT's); None where the source does not say."""
    state = read_newest(Path(source)) if Path(source).is_dir() and exists(Path(source)) else {}
    return state.get("config", {}).get("dataset")


def copy_tokenizer(data_folder: Path, out_dir: Path) -> None:
    """Carry the tokenizer along with the run, so that the run folder is enough to sample from."""
    for name in ("meta.json", "meta.pkl", "tokenizer.json"):
        if (data_folder / name).is_file():
            shutil.copyfile(data_folder / name, out_dir / name)


def _checkpoints(out_dir: Path) -> list[Path]:
    """Oldest first; a lone ckpt.pt is nanoGPT's."""
    return sorted(Path(out_dir).glob("ckpt_*.pt")) or sorted(Path(out_dir).glob("ckpt.pt"))
