"""Checkpoints: <out_dir>/ckpt_<step>.pt, whole or not there, with their sha256 in SHA256SUMS (`sha256sum -c` reads it).

They hold tensors and plain values, and are loaded without running any code that a file may hold.
"""

import hashlib
import os
import pickle
import shutil
import sys
import warnings
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from engine.config import build
from engine.errors import Interrupted, UserError, warn
from engine.files import flush, replace
from engine.pretrained import HUB, from_nanogpt, from_transformers, load_state
from engine.sharding import is_sharded, load_optimizer, whole, whole_model
from engine.tokenizer import read_meta
from model import GPT, GPTConfig

KEEP = 2  # newest checkpoints kept beside the best one
PARTS = {"model": dict, "model_config": dict, "config": dict, "optimizer": dict, "scaler": dict}  # what save() is given
PARTS |= {"step": int, "best_step": int, "best_val_nll": float, "seconds": float}
KINDS = PARTS | {"model_args": dict}  # nanoGPT's
SUMS = "SHA256SUMS"


class Saver:
    """What of a run survives, written in the background, one checkpoint at a time; the old ones go.

    Only what this run has written and read back, or was loaded from, counts among the KEEP; all others go once there
    are as many: a damaged file does not take a good one's place. As a context it ends with all on the disk, and when
    the run is interrupted it saves first.
    """

    def __init__(self, processes, progress, model, optimizer, scaler, about: dict):
        self.processes, self.progress, self.about = processes, progress, about
        self.out_dir = Path(about["config"]["out_dir"])
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.sharded = is_sharded(model)  # now: behind a forward pass they may lie there whole
        self.saved, self.good = progress.step, [name_of(progress.step)] if progress.step else []
        self.thread, self.pending = ThreadPoolExecutor(1), Future()
        self.pending.set_result(None)

    def restore(self, state: dict) -> None:
        """Load optimiser and loss scale of a checkpoint, if there is one; the model has its weights already."""
        self.processes.check_same(self.progress.step, "the step to go on from")
        try:
            if state:
                load_optimizer(self.optimizer, state["optimizer"])
            if state.get("scaler") and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"the checkpoint in {self.out_dir} has no optimiser of this model: {error}") from None

    def save(self) -> None:
        """Take a copy of all and start to write it; nothing to do where this step is saved already."""
        if self.progress.step == self.saved:
            return
        self.pending.result()  # the write before has to be done, and raises here what went wrong
        if self.processes.is_main or self.sharded:
            parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            state = {"model": whole_model(self.model)} | whole(parts)
        if self.processes.is_main:
            self.pending = self.thread.submit(self._write, state | self.about | vars(self.progress))
        self.saved = self.progress.step

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, _) -> None:
        interrupted = isinstance(error, Interrupted)
        try:
            if interrupted and not self.about["config"]["eval_only"]:
                self.save()
            if interrupted or kind is None:
                self.pending.result()
                self.processes.wait_for_all()  # torchrun ends all as soon as one is gone
            if interrupted and self.processes.is_main:
                saved = f"{self.out_dir / name_of(self.saved)} holds it; " if self.saved else "nothing to save; "
                print(f"interrupted at step {self.saved}: {saved}go on with --init_from=auto", file=sys.stderr)
        finally:
            self.thread.shutdown()

    def _write(self, state: dict) -> None:
        path = self.out_dir / name_of(state["step"])
        try:
            replace(path, lambda temporary: self._write_and_read_back(temporary, path.name, state))
            self.good = [name for name in self.good if name != path.name] + [path.name]
            if len(self.good) >= KEEP:
                kept = {*self.good[-KEEP:], name_of(state["best_step"])}
                for old in _checkpoints(self.out_dir):
                    if old.name not in kept:
                        old.unlink()
            sums = _read_sums(self.out_dir)
            _write_sums(self.out_dir, {name: sums[name][:1] for name in sums if (self.out_dir / name).exists()})
        except (OSError, RuntimeError, ValueError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:150]
            raise UserError(
                f"cannot write {path} ({reason}; {shutil.disk_usage(self.out_dir).free >> 20:,} MiB free); the earlier "
                "checkpoints are untouched: make room and go on with --init_from=resume"
            ) from None

    def _write_and_read_back(self, temporary: Path, name: str, state: dict) -> None:
        torch.save(state, str(temporary))  # from a path torch writes without the GIL
        flush(temporary)
        sha256 = _hash(temporary, from_disk=True)
        _check_sums_of_zip(temporary)
        sums = _read_sums(self.out_dir)  # a file of this name that is there keeps its line until it is replaced
        _write_sums(self.out_dir, sums | {name: [sha256, *sums.get(name, [])]})


def name_of(step: int) -> str:
    return f"ckpt_{step:08d}.pt"


def exists(out_dir: Path) -> bool:
    """Whether a run is in the folder."""
    return bool(_checkpoints(out_dir))


def read(path: Path) -> dict:
    """A checkpoint file's contents: tensors and plain values only, anything else in it is refused."""
    try:
        if known := _read_sums(path.parent).get(path.name):
            if _hash(path) not in known:
                raise ValueError(f"its sha256 is not the one in {SUMS}")
        else:  # torch.load itself does not look at the checksums
            _check_sums_of_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, which are read or refused all the same
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
            warn(f"{error}; trying the one before")
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
            replace(out_dir / name, partial(shutil.copyfile, data_folder / name))


def _checkpoints(out_dir: Path) -> list[Path]:
    """Oldest first; a lone ckpt.pt is nanoGPT's."""
    return sorted(Path(out_dir).glob("ckpt_*.pt")) or sorted(Path(out_dir).glob("ckpt.pt"))


def _hash(path: Path, from_disk: bool = False) -> str:
    """The file's sha256; from_disk: of what the disk gives back, not of what the system remembers of it."""
    with open(path, "rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        sha256 = hashlib.sha256()
        while piece := file.read(1 << 22):
            sha256.update(piece)
    return sha256.hexdigest()


def _check_sums_of_zip(path: Path) -> None:
    """Compare a zip archive with the checksums that were taken before it was written."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")


def _read_sums(folder: Path) -> dict[str, list[str]]:
    """File name -> the hashes that it may have: two while a file is being replaced."""
    sums = {}
    if (folder / SUMS).is_file():
        for line in (folder / SUMS).read_text(errors="replace").splitlines():
            sha256, _, name = line.partition("  ")
            sums.setdefault(name, []).append(sha256)
    return sums


def _write_sums(folder: Path, sums: dict[str, list[str]]) -> None:
    lines = [f"{sha256}  {name}\n" for name in sorted(sums) for sha256 in sums[name]]
    replace(folder / SUMS, lambda temporary: temporary.write_text("".join(lines)))
