"""Write a model as transformers' GPT-2: its tensors, config.json and tokenizer files.

GPT-2 has no bias per token, but its output weights can represent one exactly. The C entries of a
LayerNorm's normalized z sum to 0, so z + 1 has mean 1, and adding c_v / C to all weights of token v
adds c_v to its logit for every z. We move the last norm's weight g and bias b into the output
weights W and replace both by 1:

    W (g z + b) + bias = W' (z + 1),    W'_v = W_v g + c_v / C,    c = bias + W (b - g)

The output weights are then no longer the token embedding.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from engine.base.errors import UserError
from engine.base.files import write_json
from engine.data.gpt2_bpe import to_stand_ins
from engine.data.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    byte_level,
    save_tokenizer,
)
from engine.gpt2.loading import CONV1D, FIXED, SIZES, WEIGHTS, load_state
from heads import HeadConfig
from model import GPT


def unsupported_features(model: GPT) -> list[str]:
    """The parts of the model that GPT-2 cannot represent; empty if the export is exact."""
    features = []
    if model.bayes_layers():
        features.append("the posterior of weights (the export has their means)")
    name = model.config.head.likelihood
    likelihood = model.lm_head.likelihood
    if not likelihood.is_softmax:
        if likelihood.logit_offset is None:
            raise UserError(f"GPT-2 cannot represent a {name} head, whose prediction is no softmax")
        features.append(f"the {name} likelihood (the export has a softmax of its logits)")
    return features


def nearest_gpt2(model: GPT) -> GPT:
    """A GPT with the mean weights, a softmax head, and biases everywhere.

    A softmax can use a sigmoid's logits unchanged: pos_weight shifts all of them equally (see
    Head.convert_likelihood).
    """
    state = model.state_dict()
    means = {name: tensor for name, tensor in state.items() if not name.endswith(".log_std")}
    logit_bias = "uniform" if "lm_head.bias" in means else "none"
    head = HeadConfig(tie_head=model.config.head.tie_head, logit_bias=logit_bias)
    config = replace(model.config, bias=True, bayes_mlp=False, head=head)
    gpt2 = GPT(config)
    for name, tensor in gpt2.state_dict().items():
        if name.endswith(".bias"):  # 0 where the model has none
            means.setdefault(name, tensor)
    load_state(gpt2, means)
    return gpt2.eval()


def transformers_tensors(gpt2: GPT) -> dict[str, torch.Tensor]:
    """The tensors of a nearest_gpt2() under transformers' names; tied weights are stored once."""
    tensors = {}
    for name, tensor in gpt2.state_dict().items():
        tensors[name] = tensor.t() if name.endswith(CONV1D) else tensor
    weight = tensors.pop("lm_head.weights.weight")
    bias = tensors.pop("lm_head.bias", None)
    if bias is not None:
        g = tensors["transformer.ln_f.weight"]
        b = tensors["transformer.ln_f.bias"]
        exact = with_bias(weight.double(), bias.double(), g.double(), b.double())
        weight = exact.float()
        tensors["transformer.ln_f.weight"] = torch.ones_like(g)
        tensors["transformer.ln_f.bias"] = torch.ones_like(b)
    if bias is not None or not gpt2.config.head.tie_head:
        tensors["lm_head.weight"] = weight
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def with_bias(
    weight: torch.Tensor, bias: torch.Tensor, g: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """W' (V, C) in the formula of the module; weight: (V, C), bias: (V,), g and b: (C,)."""
    c = bias + weight @ (b - g)
    return weight * g + (c / weight.size(1)).unsqueeze(1)


def write_model(folder: Path, gpt2: GPT, eot: int | None) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    eot: the id that ends a text, or None.
    """
    from safetensors.torch import save_file

    tensors = transformers_tensors(gpt2)
    shape = gpt2.config
    special_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        **{name: getattr(shape, name) for name in SIZES},
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,  # the same, for llama.cpp
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), shape.dropout),
        **special_ids,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special_ids)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(
        folder / "config.json", folder / WEIGHTS
    )  # save_file makes it readable only by the owner


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers, and meta.json with the files
    that it needs for this repository.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json unchanged
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would embed token_type_ids
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eot is not None:
        config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    if tokenizer.kind != "none":
        transformers_tokenizer(tokenizer).save(str(folder / BPETokenizer.file))
    write_json(folder / "tokenizer_config.json", config)
    save_tokenizer(tokenizer, folder)


def transformers_tokenizer(tokenizer: Tokenizer):
    """A tokenizers.Tokenizer that gives the same ids.

    Like all tokenizers of transformers, it encodes the string <|endoftext|> as the special token.
    Ours never do.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as TransformersTokenizer

    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.bpe
    if isinstance(tokenizer, CharTokenizer):
        names = tokenizer.chars + [END_OF_TEXT] * (tokenizer.eot is not None)
        ids = {name: i for i, name in enumerate(names)}
        # without an unknown token a character outside the table is an error, as in CharTokenizer
        made = TransformersTokenizer(models.WordLevel(ids, unk_token=""))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
    else:
        tokens = [to_stand_ins(token) for token in tokenizer.token_bytes()[: tokenizer.eot]]
        ids = {name: i for i, name in enumerate([*tokens, END_OF_TEXT])}
        made = byte_level(models.BPE(ids, merges_of(tokens)))
    if tokenizer.eot is not None:
        made.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return made


def merges_of(tokens: list[str]) -> list[tuple[str, str]]:
    """The merges of a BPE whose tokens are in the order of their ranks, the 256 bytes first.

    Merging the bytes of a token with the ranks below its own ends at the two parts of its merge.
    """
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        parts = list(token)
        while len(parts) > 2:
            pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
            ranks = [rank.get(pair, len(rank)) for pair in pairs]
            best = ranks.index(min(ranks))
            parts[best : best + 2] = [pairs[best]]
        merges.append((parts[0], parts[1]))
    return merges
