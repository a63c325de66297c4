"""Read other programs' GPT-2 weights: transformers' folders, OpenAI's by name, nanoGPT's ckpt.pt.

Each reader returns (shape, state): the options of GPTConfig that the file determines, and a
state_dict with the names of model.py.
"""

from pathlib import Path

import torch

from engine.base.errors import UserError, warn
from engine.base.files import read_json

HUB = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # lists the weight files if there are several
# transformers stores these weights as (in, out), the transpose of nn.Linear's
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (
    ".attn.bias",
    ".attn.masked_bias",
)  # causal masks, which old versions of transformers saved
EMBEDDING = "transformer.wte.weight"
OUTPUT = "lm_head.weights.weight"
POSITIONS = "transformer.wpe.weight"
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size")  # the same names everywhere
FIXED = {  # options that change what the model computes; model.py has GPT-2's values
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}


def is_transformers(folder: Path) -> bool:
    """Whether the folder holds a model saved by transformers, complete or not."""
    config = folder / "config.json"
    if config.is_file() and '"model_type"' in config.read_text(errors="replace"):
        return True
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def from_transformers(source: str | Path) -> tuple[dict, dict]:
    """Read a GPT-2 from the Hugging Face Hub (a name in HUB), or a folder saved by transformers."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path, *weight_paths = _hub_files(source) if source in HUB else _files_of(Path(source))
    config = read_json(Path(config_path))
    shape = _shape_of(config, config_path)
    tensors = {}
    for path in weight_paths:
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); fetch or export it again") from None

    output = tensors.pop("lm_head.weight", None)
    state = {}
    for name, tensor in tensors.items():
        if not name.endswith(MASKS):
            name = "transformer." + name.removeprefix("transformer.")
            state[name] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor
    _require(state, (EMBEDDING, POSITIONS), source)
    if output is None:
        if config.get("tie_word_embeddings") is False:
            raise UserError(
                f"{source} has no lm_head.weight, and its config.json does not tie it to wte.weight"
            )
        output = state[EMBEDDING]
    state[OUTPUT] = output
    return shape, state


def _files_of(folder):
    """The paths of config.json and of the weight files."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    paths = [folder / name for name in ("config.json", *names)]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is missing; convert a pytorch_model.bin, which could run code, with "
                'python -c "from transformers import GPT2LMHeadModel as M; '
                f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
    return paths


def _hub_files(name):
    from huggingface_hub import hf_hub_download

    try:
        return [hf_hub_download(HUB[name], file) for file in ("config.json", WEIGHTS)]
    except OSError as error:  # its network and not-found errors are OSErrors
        raise UserError(
            f"cannot fetch {name} from the Hugging Face Hub ({type(error).__name__}); "
            "go online once, or name a folder saved by transformers"
        ) from error


def _shape_of(config, path):
    """The options of GPTConfig that a config.json determines; refuses all models but GPT-2."""
    for name, expected in FIXED.items():
        found = config.get(name, None if name == "model_type" else expected)
        if found != expected:
            raise UserError(f"{path} has {name} = {found!r}; GPT-2 has {expected!r}")
    sizes = (*SIZES, "n_positions")
    _require(config, sizes, path)
    shape = {name: config[name] for name in sizes}
    for name, size in shape.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{path} has {name} = {size!r}; it must be a positive integer")
    return shape | {"block_size": shape.pop("n_positions"), "bias": True}


def from_nanogpt(checkpoint: dict) -> tuple[dict, dict]:
    """checkpoint: the contents of a nanoGPT ckpt.pt."""
    options = checkpoint["model_args"]
    names = (*SIZES, "block_size", "bias")
    _require(options, names, "the checkpoint")
    for name in options:
        if name not in (*names, "dropout"):
            raise UserError(f"the checkpoint's model_args have {name!r}, which GPT-2 does not have")
    shape = {name: options[name] for name in names}
    state = {}
    for name, tensor in checkpoint["model"].items():
        name = name.removeprefix("_orig_mod.").removeprefix("module.")
        if not name.endswith(MASKS):
            state[OUTPUT if name == "lm_head.weight" else name] = tensor
    _require(state, (EMBEDDING, OUTPUT, POSITIONS), "the checkpoint")
    warn(
        "nanoGPT uses the exact GELU, model.py GPT-2's tanh approximation: "
        "predictions differ in the third or fourth digit"
    )
    return shape, state


def load_state(model: torch.nn.Module, state: dict) -> list[str]:
    """Load a state_dict from a model whose head may differ and whose block_size may be larger.

    Returns the names of the parameters that keep their initial values. Only the head's bias and
    the standard deviations of a posterior may be among them.
    """
    _require(state, (EMBEDDING, OUTPUT, POSITIONS), "the checkpoint")
    ours, state = model.state_dict(), dict(state)
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"the weights diverged: {name} has values that are not finite; "
                "take an earlier checkpoint"
            )
        if name == POSITIONS:
            state[name] = tensor[: model.config.block_size]
        if name.endswith(".log_std") and name in ours and tensor.size(1) == 1:
            state[name] = tensor.expand_as(ours[name])  # one std per row, as a full posterior
        found = state[name].shape
        if name in ours and ours[name].shape != found:
            hint = "; add --posterior=full" if name.endswith(".log_std") else ""
            raise UserError(
                f"{name} has shape {tuple(found)} in the checkpoint, "
                f"{tuple(ours[name].shape)} in this model{hint}"
            )
    if model.config.head.tie_head and not torch.equal(state[EMBEDDING], state[OUTPUT]):
        raise UserError(
            "the checkpoint's output weights differ from its token embedding; add --tie_head=False"
        )
    if "lm_head.bias" in state and "lm_head.bias" not in ours:
        raise UserError(
            "the checkpoint's head has a bias per token, which logit_bias = 'none' would drop; "
            "leave out that option, or keep the bias with --logit_bias=unigram"
        )
    missing, unexpected = model.load_state_dict(state, strict=False)
    for name in (*missing, *unexpected):
        if not name.startswith("lm_head.") and not name.endswith(".log_std"):
            raise UserError(f"the checkpoint does not fit this model: it differs in {name}")
    return missing


def _require(found, names, where):
    for name in names:
        if name not in found:
            raise UserError(f"{where} does not describe a GPT-2: it has no {name}")
