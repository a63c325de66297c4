"""Start a model with any head from trained weights: a run's, nanoGPT's or OpenAI's GPT-2."""

import contextlib
from collections.abc import Set
from dataclasses import replace

import torch

from engine.base.errors import UserError, warn
from engine.data.tokens import TokenFile, dataset_folder
from engine.gpt2.loading import SIZES, load_state
from engine.runs.checkpoint import Checkpoint, check_tokenizer
from engine.runs.fit import states
from model import GPT, GPTConfig

POSITIONS = 4096  # of the training text, on which one likelihood's logits are fitted to another's


def from_weights(config, old: Checkpoint, file: TokenFile, given: Set[str]) -> GPT:
    """A model with these options and the weights of `old`. With its mean weights it makes the same
    predictions, as far as the heads allow.

    file: the training split. given: the names of the options that the user set.
    """
    check_tokenizer(old.source, dataset_folder(config.dataset))
    head = config.model.head
    if "lm_head.bias" in old.weights and head.logit_bias == "auto":
        head = replace(head, logit_bias="unigram")  # keep the bias
    if "tie_head" not in given:
        head = replace(head, tie_head=old.config.head.tie_head)
    model = GPT(on_backbone(old.config, replace(config.model, head=head), given))
    file.check(model.config.vocab_size)

    new = load_state(model, old.weights)  # names of the parameters that `old` does not have
    lost = old.weights.keys() - model.state_dict().keys()
    if any(name.endswith("column_factor") for name in lost):
        new = {*new, "lm_head.weights.log_std"}  # they were fitted together
    if any(name.endswith(".log_std") for name in lost):
        warn(
            f"only the means of the posterior of {old.source} are kept; "
            "--weights=bayes or --bayes_mlp keeps its standard deviations"
        )

    def hidden_states():
        blocks = states(model, file, POSITIONS, contextlib.nullcontext())
        return torch.cat([hidden for hidden, _ in blocks])

    with torch.no_grad():
        if "lm_head.bias" in new:  # trained weights already know the token frequencies
            model.lm_head.bias.zero_()
        shift = model.lm_head.convert_likelihood(old.config.head, hidden_states)
        if head.tie_head:  # the token embedding has shifted; the position embedding undoes it
            model.transformer.wpe.weight += shift
    model.init_posteriors(file.frequencies(model.config.vocab_size), only=new)
    return model


def on_backbone(shape: GPTConfig, wanted: GPTConfig, given: Set[str]) -> GPTConfig:
    """`wanted` (dropout, head ...) with the sizes of `shape`. Refuses other sizes in `given`."""
    sizes = {name: getattr(shape, name) for name in (*SIZES, "bias")}
    sizes["block_size"] = min(wanted.block_size, shape.block_size)
    for name, size in sizes.items():
        if name in given and getattr(wanted, name) != size:
            raise UserError(
                f"{name} = {getattr(wanted, name)}, but the weights in --init_from have {size}; "
                f"omit --{name}"
            )
    return replace(wanted, **sizes)
