"""The README.md of an exported model: its shape, its scores, and what GPT-2 could not represent."""

from collections.abc import Sequence
from pathlib import Path

from engine.gpt2.loading import HUB
from model import GPT

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{metadata}
---

# {name}

A GPT-2 of {shape.n_layer} layers, {shape.n_head} heads and width {shape.n_embd}, with
{shape.vocab_size:,} token ids and a context of {shape.block_size} tokens. It was trained with a
{shape.head.weights} x {shape.head.likelihood} head{training} and exported for transformers:

```python
from transformers import GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("{name}")
```

{found}
"""

RESULT = """
model-index:
- name: {name!r}
  results:
  - task: {{type: text-generation}}
    dataset: {{type: {dataset!r}, name: {dataset!r}, split: val}}
    metrics:
    - {{type: nll, name: nats per token, value: {nll:.4f}}}"""


def model_card(
    name: str, model: GPT, about: dict, found: str, license: str, nlls: dict[str, float]
) -> str:
    """Markdown for the Hugging Face Hub.

    model: the trained model; about: its checkpoint's description; found: the comparison with the
    export; nlls: data set -> the export's on its validation split; empty or one.
    """
    config = about.get("config", {})
    training = f" for {about['step']:,} steps" if about.get("step") else ""
    if dataset := config.get("dataset"):
        training += f" on {Path(dataset).name}"
    metadata = f"license: {license}"
    if base_model := HUB.get(config.get("init_from")):
        metadata += f"\nbase_model: {base_model}"
    for dataset, nll in nlls.items():
        metadata += RESULT.format(name=name, dataset=dataset, nll=nll)
    return CARD.format(
        metadata=metadata, name=name, shape=model.config, training=training, found=found
    )


def comparison(unsupported: Sequence[str], difference: float) -> str:
    """unsupported: from unsupported_features(); difference: the largest of log-probabilities."""
    if not unsupported:
        return f"The export is exact: log-probabilities differ by at most {difference:.1e} nats."
    lines = ["The export is approximate. GPT-2 cannot represent:", ""]
    lines += [f"- {feature}" for feature in unsupported]
    return "\n".join(lines)
