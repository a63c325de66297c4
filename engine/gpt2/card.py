"""The README.md of an exported model: its shape, its training, its score, what is missing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data.tokenizer import Tokenizer
from model import GPT

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

A GPT-2 of {millions:.1f} M parameters, exported for transformers: {shape.n_layer} layers,
{shape.n_head} heads, width {shape.n_embd}, {shape.vocab_size:,} token ids, a context of
{shape.block_size} tokens.

| | |
|---|---|
{facts}

## How well it predicts

{prediction}

## Use

```python
{use}
```

## What is missing

- The state of the optimizer: training restarts from the weights alone.
{missing}
"""
USE = """\
from transformers import pipeline

generate = pipeline("text-generation", model="{name}")
print(generate("The", max_new_tokens=50))"""
USE_IDS = """\
from transformers import GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("{name}")  # of token ids; they have no text"""


@dataclass(frozen=True)
class Measured:
    """nlls: (model, nats per token), the export last; empty without a data set.

    difference: the largest difference of log-probabilities between the original and the export.
    text: what was measured on.
    """

    nlls: Sequence[tuple[str, float]]
    difference: float
    text: str


def model_card(
    name: str,
    model: GPT,
    tokenizer: Tokenizer | None,
    unsupported: Sequence[str],
    measured: Measured,
    facts: dict[str, str],
) -> str:
    """Markdown for the Hugging Face Hub. model: as it was trained;
    unsupported: what GPT-2 cannot represent of it; facts: see training_facts."""
    head = model.config.head
    tags = ["gpt2", head.likelihood] + ["bayesian"] * bool(model.bayes_layers())
    n_parameters = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("log_std"))
    ids = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids" if tokenizer else "none"
    table = {"head": f"{head.weights} x {head.likelihood}", **facts, "tokenizer": ids}
    return CARD.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        name=name,
        millions=n_parameters / 1e6,
        shape=model.config,
        facts="\n".join(f"| {what} | {value} |" for what, value in table.items()),
        prediction=_prediction(unsupported, measured),
        use=(USE if tokenizer else USE_IDS).format(name=name),
        missing="\n".join(f"- {what}." for what in _missing(model, unsupported)),
    )


def _prediction(unsupported: Sequence[str], measured: Measured) -> str:
    exact = (
        f"The export is exact: log-probabilities differ by at most {measured.difference:.1e} nats."
    )
    if not measured.nlls:
        return f"Not measured: the data set was not available. {exact}"
    lines = ["| prediction | nll, nats per token | perplexity |", "|---|---|---|"]
    for which, nll in measured.nlls:
        lines.append(f"| {which} | {nll:.4f} | {math.exp(nll):.2f} |")
    lines += ["", f"Measured by export.py on {measured.text}."]
    change = measured.nlls[-1][1] - measured.nlls[0][1]
    nearest = f"The export is approximate: its nll differs by {change:+.4f} nats per token."
    return "\n".join([*lines, nearest if unsupported else exact])


def _missing(model: GPT, unsupported: Sequence[str]) -> list[str]:
    missing = [what[0].upper() + what[1:] for what in unsupported]
    if model.bayes_layers():
        missing.append("Uncertainty of the weights: this is one model, the posterior's mean")
    if model.config.head.likelihood == "smooth":
        missing.append(
            "The correction for label smoothing: probabilities are as smooth as the training labels"
        )
    return missing


def training_facts(
    state: dict, meta: dict | None, config: dict, environment: dict
) -> dict[str, str]:
    """Facts about a training run. state: its checkpoint; meta: its data's meta.json;
    config: its config.json; environment: of the export."""
    options, facts = state.get("config", {}), {}
    if "dataset" in options:
        sizes = [Path(options["dataset"]).name]
        for split, described in (meta or {}).get("splits", {}).items():
            if "tokens" in described:
                sizes.append(f"{split} {described['tokens']:,} tokens")
        facts["data set"] = "; ".join(sizes)
    if options.get("init_from", "scratch") not in ("scratch", "resume", "auto"):
        facts["begun from"] = Path(options["init_from"]).name
    if "step" in state:
        facts["steps"] = f"{state['step']:,}"
    code = {"trained with": config.get("environment", {}), "exported with": environment}
    for what, versions in code.items():
        if "torch" in versions:
            facts[what] = f"commit {versions['commit']}, torch {versions['torch']}"
    return facts
