"""Weights that others wrote, in our names: OpenAI's GPT-2 in transformers' format, and nanoGPT's checkpoints.

Both give (shape, state): the options of GPTConfig that the file decides, and a state_dict of ours.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from engine.base.errors import UserError, warn

HUB = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
WEIGHTS, INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
)  # of one file, or of those that the index names
PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # of old versions; to read them can run code
CONV1D = {  # transformers keeps these transposed, (in, out) in multiples of n_embd
    "attn.c_attn.weight": (1, 3),
    "attn.c_proj.weight": (1, 1),
    "mlp.c_fc.weight": (1, 4),
    "mlp.c_proj.weight": (4, 1),
}
ENDS = (
    "transformer.wte.weight",
    "lm_head.weights.weight",
    "transformer.wpe.weight",
)  # no GPT is without them
FIXED = {  # transformers' options that change the function; ours is GPT-2's own
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}


def is_transformers(folder: Path) -> bool:
    """Whether a folder is one that transformers saved a model to, complete or not."""
    config = folder / "config.json"
    described = config.is_file() and '"model_type"' in config.read_text(errors="replace")
    return described or any((folder / name).is_file() for name in (WEIGHTS, INDEX, *PICKLES))


def from_transformers(source: str | Path) -> tuple[dict, dict]:
    """A GPT-2 from the Hugging Face Hub by name (gpt2, gpt2-medium ...) or from a folder that transformers saved."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path, *weight_paths = _hub_files(source) if source in HUB else _files_of(Path(source))
    config = read_object(config_path)
    shape, tensors, state = _shape_of(config, config_path), {}, {}
    try:
        for path in weight_paths:
            tensors |= load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); fetch or export it again") from None
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # not of the backbone; masks of old versions
        state["transformer." + name] = _ours(name, tensor, shape["n_embd"], source)
    if config.get("tie_word_embeddings") is False and "lm_head.weight" not in tensors:
        raise UserError(
            f"{source} has no lm_head.weight, which its config.json does not tie to wte.weight"
        )
    state["lm_head.weights.weight"] = tensors.get(
        "lm_head.weight", state.get("transformer.wte.weight")
    )
    return shape, _pick(state, (*ENDS, *state), weight_paths[0])


def _files_of(folder: Path) -> list[Path]:
    """config.json and the weights' files."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if (folder / INDEX).is_file():
            files = read_object(folder / INDEX).get("weight_map")
            if not (
                files
                and isinstance(files, dict)
                and all(isinstance(name, str) for name in files.values())
            ):
                raise UserError(f"{folder / INDEX} names no files; fetch or export it again")
            names = sorted(set(files.values()))
        elif pickles := [name for name in PICKLES if (folder / name).is_file()]:
            raise UserError(
                f"{folder} has its weights as {pickles[0]}, a format that can run code; convert it: "
                'python -c "from transformers import GPT2LMHeadModel as M; '
                f"M.from_pretrained('{folder}').save_pretrained('{folder}', safe_serialization=True)\""
            )
    paths = [folder / name for name in ("config.json", *names)]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is missing; a transformers GPT-2 folder holds {', '.join(p.name for p in paths)}"
            )
    return paths


def read_object(path: str | Path) -> dict:
    """A file's JSON object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        error = "it is no object"
    except (ValueError, RecursionError) as reason:
        error = reason
    raise UserError(f"{path} is not JSON of a model ({error}); fetch or export it again")


def _shape_of(config: dict, where: str | Path) -> dict:
    """The options of GPTConfig that a config.json decides; one that computes something else than GPT-2 is refused."""
    for name, value in ({"model_type": None} | config).items():
        if value != FIXED.get(name, value):
            raise UserError(
                f"{where} has {name} = {value!r}; this model is GPT-2, which has {FIXED[name]!r}"
            )
    shape = _pick(config, ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions"), where)
    for name, value in shape.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{where} has {name} = {value!r}, which must be a whole number above 0")
    n_inner, expected = config.get("n_inner"), 4 * shape["n_embd"]
    if n_inner not in (None, expected):
        raise UserError(
            f"{where} has n_inner = {n_inner!r}; this model is GPT-2, which has 4 * n_embd = {expected}"
        )
    return shape | {"block_size": shape.pop("n_positions"), "bias": True}


def _ours(name: str, tensor: torch.Tensor, n_embd: int, source: str | Path) -> torch.Tensor:
    """A tensor of transformers' as ours is."""
    if not tensor.is_floating_point():
        raise UserError(
            f"{source}: {name} is {tensor.dtype}; quantised weights do not fit, save them as float32"
        )
    kind = next((kind for kind in CONV1D if name.endswith(kind)), None)
    if kind is None:
        return tensor
    expected, found = tuple(n * n_embd for n in CONV1D[kind]), tuple(tensor.shape)
    if found != expected:
        way_out = (
            "; it was saved from an nn.Linear: transpose all of " if found == expected[::-1] else ""
        )
        way_out += ", ".join(CONV1D) if way_out else ""
        raise UserError(f"{source}: {name} has shape {found}, GPT-2's Conv1D {expected}{way_out}")
    return tensor.t().contiguous()


def from_nanogpt(checkpoint: dict) -> tuple[dict, dict]:
    """The contents of a nanoGPT ckpt.pt."""
    state = {}
    for name, tensor in checkpoint["model"].items():
        name = name.removeprefix("_orig_mod.").removeprefix("module.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state["lm_head.weights.weight" if name == "lm_head.weight" else name] = tensor
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    if odd := sorted(checkpoint["model_args"].keys() - {*names, "dropout"}):
        raise UserError(
            f"the checkpoint's model_args have {odd[0]!r}, which nanoGPT's GPT-2 has not: another model"
        )
    found = (
        _pick(checkpoint["model_args"], names, "the checkpoint"),
        _pick(state, (*ENDS, *state), "the checkpoint"),
    )
    warn(
        "nanoGPT's GELU is exact, ours GPT-2's own (tanh): predictions differ in the third or fourth digit"
    )
    return found


def load_state(model: torch.nn.Module, state: dict) -> list[str]:
    """Load a state_dict whose head may be another and whose block_size may be longer.

    Returns the parameters that stay as initialised, which only the head's own may (a bias) and posteriors' widths.
    """
    state = _pick(state, (*ENDS, *state), "the checkpoint")
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"the weights diverged: {bad[0]} has values that are not finite; take an earlier checkpoint"
        )
    positions = "transformer.wpe.weight"
    if state[positions].dim():
        state[positions] = state[positions][: model.config.block_size]
    ours = model.state_dict()
    for name, tensor in state.items():
        if (
            name.endswith(".log_std") and name in ours and tensor.size(1) == 1
        ):  # a row posterior is a full one too
            state[name] = tensor.expand_as(ours[name])
    if wrong := [n for n, t in state.items() if n in ours and t.shape != ours[n].shape]:
        n = wrong[0]
        raise UserError(
            f"{n} has shape {tuple(state[n].shape)} in the checkpoint, {tuple(ours[n].shape)} in this model"
            + ("; add --posterior=full" if n.endswith(".log_std") else "")
        )
    if model.config.head.tie_head and not torch.equal(*(state[name] for name in ENDS[:2])):
        raise UserError(
            "the checkpoint's output weights are not its token embedding; add --tie_head=False"
        )
    if "lm_head.bias" in state and "lm_head.bias" not in ours:
        raise UserError(
            "the checkpoint's head has a bias per token, which logit_bias = 'none' would lose; leave that out, or add "
            "--logit_bias=unigram, which keeps it"
        )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if odd := [
        n
        for n in [*missing, *unexpected]
        if not (n.startswith("lm_head.") or n.endswith(".log_std"))
    ]:
        raise UserError(
            f"the checkpoint does not fit this model: {odd[0]} ({len(odd)} such parameters)"
        )
    return missing


def _pick(found: dict, names: Iterable[str], where: str | Path) -> dict:
    """These fields of what was found."""
    for name in names:
        if name not in found:
            raise UserError(f"{where} does not describe a GPT-2: it has no {name}")
    return {name: found[name] for name in names}


def _hub_files(name: str) -> list[str]:
    from huggingface_hub import hf_hub_download

    try:
        return [hf_hub_download(HUB[name], file) for file in ("config.json", "model.safetensors")]
    except OSError as error:  # its network and not-found errors are OSErrors
        raise UserError(
            f"cannot fetch {name} from the Hugging Face Hub ({type(error).__name__}); "
            "go online once, or give a folder that transformers saved"
        ) from error
