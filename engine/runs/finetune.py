"""A model on the weights of another: a run of ours, nanoGPT's or OpenAI's GPT-2, with the same head or any other."""

from collections.abc import Set
from dataclasses import replace

import torch

from engine.base.errors import UserError, warn
from engine.data.tokens import TokenFile, dataset_folder, gather
from engine.data.windows import eval_batches
from engine.gpt2.loading import load_state
from engine.runs import checkpoint
from heads import HeadConfig
from model import GPT, GPTConfig

POSITIONS = 4096  # of the training text on which one likelihood's logits are fitted to another's


def on_weights(config, init_from: str, head: HeadConfig, data: TokenFile, given: Set[str]) -> GPT:
    """The model of these options, with the weights of init_from: where mathematics allows it predicts, under the mean
    of its weights, what that one does. data: the training split."""
    checkpoint.check_tokenizer(init_from, dataset_folder(config.dataset))
    shape, weights = checkpoint.read_weights(init_from)
    if "lm_head.bias" in weights and head.logit_bias == "auto":
        head = replace(head, logit_bias="unigram")  # a bias that is there is kept
    if "tie_head" not in given:
        head = replace(head, tie_head=shape.head.tie_head)
    model = GPT(on_backbone(shape, replace(config.model, head=head), given))
    data.check(model.config.vocab_size)
    new = load_state(model, weights)  # what this head has beyond the old one
    if "lm_head.bias" in new and head.logit_bias == "unigram":
        raise UserError(
            "the weights to start from have no bias, and know frequencies already: leave logit_bias = 'unigram' out, "
            "or give --logit_bias=uniform"
        )
    if any(name.endswith(".log_std") for name in weights.keys() - model.state_dict().keys()):
        warn(
            f"the means of {init_from}'s posterior go on, its widths do not (--weights=bayes, --bayes_mlp keep them)"
        )
    with torch.no_grad():
        if "lm_head.bias" in new:
            model.lm_head.bias.zero_()
        taken = model.lm_head.convert_likelihood(shape.head, lambda: hidden_states(model, data))
        if head.tie_head:
            model.transformer.wpe.weight += (
                taken  # embeddings of token and position add up to the same as before
            )
    model.init_posteriors(data.frequencies(model.config.vocab_size), only=new)
    return model


def hidden_states(model: GPT, data: TokenFile) -> torch.Tensor:
    """(n, C): the hidden states at some POSITIONS of a split, evenly spread blocks."""
    block_size = model.config.block_size
    model.eval()
    with torch.no_grad():
        blocks = eval_batches(data, block_size, 1, max(1, POSITIONS // block_size))
        hidden = [
            model.hidden(gather(data, starts, block_size)[0]).flatten(0, 1) for starts in blocks
        ]
    model.train()
    return torch.cat(hidden)


def on_backbone(shape: GPTConfig, wanted: GPTConfig, given: Set[str]) -> GPTConfig:
    """wanted (dropout, head ...) on a backbone of the given shape; explicit options that contradict it are refused."""
    fixed = ("n_layer", "n_head", "n_embd", "bias", "qkv_bias", "vocab_size")
    for name in fixed:
        if name in given and getattr(wanted, name) != getattr(shape, name):
            raise UserError(
                f"{name} = {getattr(wanted, name)}, but the weights to start from have {getattr(shape, name)}"
            )
    if wanted.block_size > shape.block_size and "block_size" in given:
        raise UserError(
            f"block_size = {wanted.block_size}, but the weights to start from end at {shape.block_size}"
        )
    block_size = min(wanted.block_size, shape.block_size)
    return replace(wanted, block_size=block_size, **{name: getattr(shape, name) for name in fixed})
