"""Checkpoints: <out_dir>/ckpt_<step>.pt, whole or not there, with their sha256 in SHA256SUMS (`sha256sum -c` reads it).

They hold tensors and plain values, and are loaded without running any code that a file may hold.
"""

import pickle
import shutil
import warnings
import zipfile
from functools import partial
from pathlib import Path

import torch

from engine.base.errors import UserError, warn
from engine.base.files import atomic_write, sha256_of
from engine.base.options import build
from engine.data.gpt2_bpe import GPT2Tokenizer, cached_tokens, write_tokens
from engine.data.tokenizer import BPETokenizer, Tokenizer, has_tokenizer, load_tokenizer, read_meta
from engine.data.tokens import dataset_folder
from engine.gpt2.loading import HUB, from_nanogpt, from_transformers, is_transformers, load_state
from model import GPT, GPTConfig

PARTS = {
    "model": dict,
    "model_config": dict,
    "config": dict,
    "optimizer": dict,
    "scaler": dict,
}  # what save() is given
PARTS |= {"step": int, "best_step": int, "best_val_nll": float, "seconds": float}
KINDS = PARTS | {"tokens": int, "skipped": int, "wandb_id": str, "data": dict}
KINDS |= {"model_args": dict}  # nanoGPT's
SUMS = "SHA256SUMS"
GPT2S = {
    "tokenizer": {"kind": GPT2Tokenizer.kind}
}  # what is said of GPT-2's tokens, or to be said of them


def name_of(step: int) -> str:
    return f"ckpt_{step:08d}.pt"


def exists(out_dir: Path) -> bool:
    """Whether a run is in the folder."""
    return bool(all_in(out_dir))


def read(path: Path) -> dict:
    """A checkpoint file's contents: tensors and plain values only, anything else in it is refused."""
    try:
        if known := read_sums(path.parent).get(path.name):
            if sha256_of(path) not in known:
                raise ValueError(f"its sha256 is not the one in {SUMS}")
        else:  # torch.load itself does not look at the checksums
            check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of old formats, which are read or refused all the same
            state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and "model" in state:
            odd = [
                name
                for name, kind in KINDS.items()
                if name in state and not isinstance(state[name], kind)
            ]
            odd = odd or [
                name
                for name, tensor in state["model"].items()
                if not isinstance(tensor, torch.Tensor)
            ]
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
    paths = all_in(out_dir)
    for path in reversed(paths):
        try:
            return read(path)
        except UserError as error:
            if path == paths[0]:
                raise UserError(
                    f"{error}; there is no other one in {out_dir}, give another --out_dir"
                ) from None
            warn(f"{error}; trying the one before")
    raise UserError(f"there is no checkpoint in {out_dir}; train first, or give another --out_dir")


def read_weights(source: str | Path) -> tuple[GPTConfig, dict]:
    """The model's config and state_dict in a run folder, a checkpoint file (ours or nanoGPT's), a transformers folder,
    or OpenAI's weights by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl)."""
    path = Path(source)
    if str(source) in HUB or is_transformers(path):
        shape, state = from_transformers(source)
    elif path.is_dir() or path.is_file():
        contents = read_newest(path) if path.is_dir() else read(path)
        if "model_config" in contents:
            return build(GPTConfig, contents["model_config"]), contents["model"]
        if "model_args" not in contents:
            raise UserError(f"{source} is neither a checkpoint of ours nor one of nanoGPT's")
        shape, state = from_nanogpt(contents)
    else:
        raise UserError(
            f"{source} does not exist; give a run folder, a checkpoint file, or one of: {', '.join(HUB)}"
        )
    tied = torch.equal(state["transformer.wte.weight"], state["lm_head.weights.weight"])
    return build(GPTConfig, shape | {"tie_head": tied}), state


def load_model(
    source: str | Path, device: torch.device | str = "cpu", config: GPTConfig | None = None
) -> GPT:
    """The model of read_weights(source), ready to predict; config: another head or a shorter block_size on the same
    backbone (what the new head has beyond the old one stays as initialised)."""
    found, state = read_weights(source)
    model = GPT(config or found)
    load_state(model, state)
    return model.to(device).eval()


def folder_of(source: str | Path) -> Path:
    """The folder of a run, also where one of its checkpoint files is named."""
    return Path(source).parent if Path(source).is_file() else Path(source)


def check_tokenizer(source: str | Path, dataset: Path) -> None:
    """Refuse data whose tokenizer is another than that of the run in the folder of source, where both are known."""
    folder, theirs = folder_of(source), read_meta(dataset)
    ours = GPT2S if str(source) in HUB else read_meta(folder)
    if (
        theirs and ours is None and has_tokenizer(folder)
    ):  # transformers': its files of a BPE are not ours to the byte
        found = load_tokenizer(folder)
        same = found.kind == "bpe" == theirs["tokenizer"].get("kind")
        same = same and found.token_bytes() == load_tokenizer(dataset).token_bytes()
        ours = theirs if same else {"tokenizer": found.describe()}
    if ours and theirs and ours["tokenizer"] != theirs["tokenizer"]:
        kinds = [meta["tokenizer"].get("kind") for meta in (ours, theirs)]
        raise UserError(
            f"{source} was trained with another tokenizer ({kinds[0]}) than {dataset} has ({kinds[1]})"
        )


def about(source: str | Path) -> dict:
    """What the checkpoint of a run, the newest in a folder, holds beside the model; {} where source is none."""
    path = Path(source)
    state = (
        read(path)
        if path.is_file()
        else read_newest(path)
        if path.is_dir() and exists(path)
        else {}
    )
    return {name: value for name, value in state.items() if name not in ("model", "optimizer")}


def trained_on(source: str | Path) -> str | None:
    """The data set of a run or checkpoint file (of ours or nanoGPT's); None where the source does not say."""
    return about(source).get("config", {}).get("dataset")


def tokenizer_folder(source: str | Path) -> Path:
    """The folder that says what the tokens of a model mean."""
    folder = folder_of(source)
    if not has_tokenizer(folder) and (
        dataset := trained_on(source)
    ):  # nanoGPT keeps its tokenizer with the data
        return dataset_folder(dataset)
    return folder


def tokenizer_of(source: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that a run, a checkpoint file or GPT-2's weights belong to; GPT-2's where nothing names another."""
    tokenizer = load_tokenizer(folder := tokenizer_folder(source))
    if tokenizer.vocab_size > vocab_size:
        needed = (
            "tokenizer files of its own"
            if is_transformers(folder)
            else "the meta.json of its data set"
        )
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}: {source} needs {needed}"
        )
    return tokenizer


def copy_tokenizer(data_folder: Path, out_dir: Path) -> None:
    """Carry the tokenizer along with the run, so that the run folder is enough to sample from."""
    for name in ("meta.json", "meta.pkl", BPETokenizer.file, GPT2Tokenizer.file):
        if (data_folder / name).is_file():
            atomic_write(out_dir / name, partial(shutil.copyfile, data_folder / name))
    if lacks_bpe(out_dir) and (tokens := cached_tokens()):  # nanoGPT's folders have none
        write_tokens(out_dir / GPT2Tokenizer.file, tokens)


def lacks_bpe(folder: Path) -> bool:
    """Whether the folder's tokens are GPT-2's, and their BPE is not in it."""
    kind = (read_meta(folder) or GPT2S)["tokenizer"].get("kind")
    return kind == GPT2Tokenizer.kind and not (folder / GPT2Tokenizer.file).exists()


def all_in(out_dir: Path) -> list[Path]:
    """Oldest first; a lone ckpt.pt is nanoGPT's."""
    ours = [path for path in Path(out_dir).glob("ckpt_*.pt") if path.stem[5:].isdecimal()]
    return sorted(ours, key=lambda path: int(path.stem[5:])) or sorted(
        Path(out_dir).glob("ckpt.pt")
    )


def check_zip(path: Path) -> None:
    """Compare a zip archive with the checksums that were taken before it was written."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")


def read_sums(folder: Path) -> dict[str, list[str]]:
    """File name -> the hashes that it may have: two while a file is being replaced."""
    sums = {}
    if (folder / SUMS).is_file():
        for line in (folder / SUMS).read_text(errors="replace").splitlines():
            sha256, _, name = line.partition("  ")
            sums.setdefault(name, []).append(sha256)
    return sums


def write_sums(folder: Path, sums: dict[str, list[str]]) -> None:
    lines = [f"{sha256}  {name}\n" for name in sorted(sums) for sha256 in sums[name]]
    atomic_write(folder / SUMS, lambda temporary: temporary.write_text("".join(lines)))
