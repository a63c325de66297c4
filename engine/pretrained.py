"""Weights that others wrote, in our names: OpenAI's GPT-2 in transformers' format, and nanoGPT's checkpoints.

Both give (shape, state): the options of GPTConfig that the file decides, and a state_dict of ours.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from engine.errors import UserError

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
TRANSPOSED = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)  # transformers' Conv1D
ENDS = ("transformer.wte.weight", "lm_head.weights.weight", "transformer.wpe.weight")  # no GPT is without them
FIXED = {  # transformers' options that change the function; ours is GPT-2's own
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def from_transformers(source: str | Path) -> tuple[dict, dict]:
    """A GPT-2 from the Hugging Face Hub by name (gpt2, gpt2-medium ...) or from a folder with model.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = _hub_files(source) if source in HUB else [Path(source) / f for f in ("config.json", "model.safetensors")]
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path} is missing; a transformers GPT-2 folder holds config.json and model.safetensors")
    try:
        config = json.loads(Path(paths[0]).read_text())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{paths[0]} is not JSON of a model ({error}); fetch or export it again") from None
    for name, value in ({"model_type": None} | config).items():
        if value != FIXED.get(name, value):
            raise UserError(f"{source} has {name} = {value!r}; only GPT-2 with {FIXED[name]!r} fits this model")
    try:
        tensors = load_file(paths[1])
    except SafetensorError as error:
        raise UserError(f"{paths[1]} is damaged ({error}); fetch or export it again") from None
    state = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # tied to wte; masks of old versions
        state["transformer." + name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    state["lm_head.weights.weight"] = tensors.get("lm_head.weight", state.get("transformer.wte.weight"))
    shape = _pick(config, ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions"), paths[0])
    return shape | {"block_size": shape.pop("n_positions"), "bias": True}, _pick(state, (*ENDS, *state), paths[1])


def from_nanogpt(checkpoint: dict) -> tuple[dict, dict]:
    """The contents of a nanoGPT ckpt.pt."""
    state = {}
    for name, tensor in checkpoint["model"].items():
        name = name.removeprefix("_orig_mod.").removeprefix("module.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state["lm_head.weights.weight" if name == "lm_head.weight" else name] = tensor
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    return _pick(checkpoint["model_args"], names, "the checkpoint"), _pick(state, (*ENDS, *state), "the checkpoint")


def load_state(model: torch.nn.Module, state: dict) -> list[str]:
    """Load a state_dict whose head may be another and whose block_size may be longer.

    Returns the parameters that stay as initialised, which only the head's own may (a bias) and posteriors' widths.
    """
    state = _pick(state, (*ENDS, *state), "the checkpoint")
    positions = "transformer.wpe.weight"
    state[positions] = state[positions][: model.config.block_size]
    ours = model.state_dict()
    for name, tensor in state.items():
        if name.endswith(".log_std") and name in ours and tensor.size(1) == 1:  # a row posterior is a full one too
            state[name] = tensor.expand_as(ours[name])
    if wrong := [n for n, t in state.items() if n in ours and t.shape != ours[n].shape]:
        n = wrong[0]
        raise UserError(
            f"{n} has shape {tuple(state[n].shape)} in the checkpoint, {tuple(ours[n].shape)} in this model"
            + ("; add --posterior=full" if n.endswith(".log_std") else "")
        )
    if model.config.head.tie_head and not torch.equal(*(state[name] for name in ENDS[:2])):
        raise UserError("the checkpoint's output weights are not its token embedding; add --tie_head=False")
    if "lm_head.bias" in state and "lm_head.bias" not in ours:
        raise UserError(
            "the checkpoint's head has a bias per token, which logit_bias = 'none' would lose; leave that out, or add "
            "--logit_bias=unigram, which keeps it"
        )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if odd := [n for n in [*missing, *unexpected] if not (n.startswith("lm_head.") or n.endswith(".log_std"))]:
        raise UserError(f"the checkpoint does not fit this model: {odd[0]} ({len(odd)} such parameters)")
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
