"""A model of ours as transformers' GPT-2: its tensors, its config.json, its tokenizer's files.

What GPT-2 has no place for is a bias per token. Yet it fits, exactly: LayerNorm's z sums to 0 over its C entries, so
those of z + 1 have the mean 1, and c_v / C added to all weights of a token adds c_v to its logit, whatever z is. With
the last norm's weight g and bias b moved into the output weights W, and 1 in the place of both,

    W (g z + b) + bias = W' (z + 1),    W'_v = W_v g + c_v / C,    c = bias + W (b - g)

The output weights are then no longer the token embedding.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from engine.data.gpt2_bpe import STAND_INS
from engine.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, byte_level
from engine.gpt2.loading import CONV1D, FIXED, WEIGHTS, load_state
from heads import HeadConfig
from model import GPT

EOT = "<|endoftext|>"


def losses(model: GPT) -> list[str]:
    """What of the model a GPT-2 cannot say; nothing: it predicts the same."""
    layers, lost = model.bayes_layers(), []
    if layers:
        only = "the output weights" if layers == [model.lm_head.weights] else "weights"
        lost.append(f"the posterior of {only} (their means stay)")
    if model.lm_head.likelihood.logit_offset is not None:
        lost.append(
            f"the {model.config.head.likelihood} likelihood (a softmax of its logits stays)"
        )
    return lost


def nearest_gpt2(model: GPT) -> GPT:
    """The same weights, their means where they have a distribution, under a softmax head with biases everywhere.

    From a sigmoid's logits to a softmax's nothing changes (see Head.convert_likelihood): pos_weight
    raises all of them alike."""
    state = {
        name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".log_std")
    }
    biased = "lm_head.bias" in state
    head = HeadConfig(
        tie_head=model.config.head.tie_head, logit_bias="uniform" if biased else "none"
    )
    gpt2 = GPT(replace(model.config, bias=True, qkv_bias=False, bayes_mlp=False, head=head))
    zeros = {
        name: torch.zeros_like(p) for name, p in gpt2.named_parameters() if name.endswith(".bias")
    }
    load_state(gpt2, zeros | state)
    return gpt2.eval()


def tensors_of(gpt2: GPT) -> dict[str, torch.Tensor]:
    """The tensors of a nearest_gpt2 by transformers' names, tied output weights once."""
    state = {name: tensor.detach().cpu() for name, tensor in gpt2.state_dict().items()}
    weight, bias = state.pop("lm_head.weights.weight"), state.pop("lm_head.bias", None)
    if bias is not None:
        g, b = (state[f"transformer.ln_f.{name}"] for name in ("weight", "bias"))
        state |= {
            "transformer.ln_f.weight": torch.ones_like(g),
            "transformer.ln_f.bias": torch.ones_like(b),
        }
        weight = with_bias(*(t.double() for t in (weight, bias, g, b))).float()
    if bias is not None or not gpt2.config.head.tie_head:
        state["lm_head.weight"] = weight
    turned = {name: t.t() if name.endswith(tuple(CONV1D)) else t for name, t in state.items()}
    return {name: tensor.contiguous() for name, tensor in turned.items()}


def with_bias(
    weight: torch.Tensor, bias: torch.Tensor, g: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """W' (V, C) of the formula above, for weight (V, C), bias (V,), g and b (C,)."""
    c = bias + weight @ (b - g)
    return weight * g + (c / weight.size(1)).unsqueeze(1)


def config_of(gpt2: GPT, tensors: dict[str, torch.Tensor], eot: int | None) -> dict:
    """config.json of a nearest_gpt2 with these tensors."""
    ours = gpt2.config
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        "n_inner": None,
        "n_positions": ours.block_size,
    }
    config |= {name: getattr(ours, name) for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), ours.dropout)
    config |= ends(eot) | {
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "float32",
    }
    return config | {"initializer_range": 0.02, "use_cache": True}


def ends(eot: int | None) -> dict:
    """The ids that begin, end and fill up a text; None of a tokenizer without end-of-text, where a text never ends."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)


def write_model(folder: Path, gpt2: GPT, eot: int | None) -> None:
    """config.json, generation_config.json and model.safetensors."""
    from safetensors.torch import save_file

    tensors = tensors_of(gpt2)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_object(folder / "config.json", config_of(gpt2, tensors, eot))
    shutil.copymode(
        folder / "config.json", folder / WEIGHTS
    )  # safetensors lets nobody but the owner read it
    write_object(folder / "generation_config.json", ends(eot))


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """tokenizer.json and tokenizer_config.json for transformers; meta.json, and what it needs, for us."""
    pipeline = pipeline_of(tokenizer)
    cuts = json.loads(pipeline.to_str())
    # GPT-2's class in transformers 5 keeps the vocabulary and the merges alone, and brings the rest of it
    is_gpt2s = (
        cuts["pre_tokenizer"] == GPT2S_CUTS
        and cuts["normalizer"] is None
        and tokenizer.eot is not None
    )
    names = ("bos_token", "eos_token", "pad_token", *(("unk_token",) if is_gpt2s else ()))
    config = {"tokenizer_class": "GPT2Tokenizer" if is_gpt2s else "PreTrainedTokenizerFast"}
    config |= {
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    config |= {} if tokenizer.eot is None else dict.fromkeys(names, EOT)
    pipeline.save(str(folder / BPETokenizer.file))
    tokenizer.save(folder)
    write_object(folder / "tokenizer_config.json", config)
    write_object(
        folder / "meta.json",
        {"tokenizer": tokenizer.describe(), "vocab_size": tokenizer.vocab_size},
    )


GPT2S_CUTS = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def pipeline_of(tokenizer: Tokenizer):
    """The tokenizers.Tokenizer that gives the same ids. It takes the string <|endoftext|> for that token, as
    transformers' tokenizers do; ours never do."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Pipeline

    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.bpe
    if isinstance(tokenizer, CharTokenizer):  # an unknown character is an error, as it is with us
        names = tokenizer.chars + [EOT] * (tokenizer.eot is not None)
        pipeline = Pipeline(
            models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="")
        )
        pipeline.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        pipeline.decoder = decoders.Fuse()
    else:
        tokens = [
            "".join(STAND_INS[byte] for byte in token)
            for token in tokenizer.token_bytes()[: tokenizer.eot]
        ]
        vocab = {name: i for i, name in enumerate([*tokens, EOT])}
        pipeline = byte_level(models.BPE(vocab, merges_of(tokens)))
    if tokenizer.eot is not None:
        pipeline.add_special_tokens([AddedToken(EOT, normalized=False, special=True)])
    return pipeline


def merges_of(tokens: list[str]) -> list[tuple[str, str]]:
    """The merges of a BPE, of its tokens in the order of their ranks, the 256 bytes first: merging a token's bytes by
    the ranks below its own leaves the two parts that it was made of."""
    rank, merges = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens[256:]:
        parts = list(token)
        while len(parts) > 2:
            best = min(
                range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], len(rank))
            )
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def write_object(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
