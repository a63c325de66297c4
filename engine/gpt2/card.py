"""The README.md of an exported model: what it is, what it was trained on, how well it predicts, what it leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data.tokenizer import Tokenizer
from engine.eval.validation import exp
from model import GPT


@dataclass(frozen=True)
class Measured:
    """Nats per token on the same text: rows of (whose prediction, nll); how far log-probabilities differ at most."""

    rows: Sequence[tuple[str, float]]
    largest: float
    n_tokens: int
    text: str  # which


def card(
    name: str,
    model: GPT,
    tokenizer: Tokenizer | None,
    lost: Sequence[str],
    measured: Measured,
    facts: dict[str, str],
) -> str:
    """Markdown for the Hugging Face Hub. model: as it was trained; facts: what is known of that; lost: what was."""
    head, shape = model.config.head, model.config
    tags = dict.fromkeys(["gpt2", *(["bayesian"] if model.bayes_layers() else []), head.likelihood])
    n_parameters = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(".log_std"))
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [*(f"- {tag}" for tag in tags), "---", "", f"# {name}", ""]
    lines += [
        f"A GPT-2 of {n_parameters / 1e6:.1f} M parameters ({shape.n_layer} layers, {shape.n_head} heads, width "
        f"{shape.n_embd}, {shape.vocab_size:,} token ids) that reads {shape.block_size} tokens at a time, exported for "
        "transformers."
        + (
            " The bias per token that it was trained with lies in lm_head.weight."
            if model.lm_head.bias is not None
            else ""
        ),
        "",
    ]
    about = {"head": f"{head.weights} x {head.likelihood}"} | facts
    about["tokenizer"] = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids" if tokenizer else "none"
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in about.items()), ""]
    lines += [
        "## How well it predicts",
        "",
        *_prediction(lost, measured),
        "",
        *_use(name, tokenizer),
    ]
    return "\n".join([*lines, "## What is not in it", "", *_missing(model, tokenizer, lost), ""])


def _prediction(lost: Sequence[str], measured: Measured) -> list[str]:
    difference = f"log-probabilities differ by at most {measured.largest:.1e} nats from those of the original"
    if not measured.rows:
        return [
            f"Not measured: the data set was not at hand. The export is exact: on {measured.text} {difference}."
        ]
    lines = ["| prediction | nll, nats per token | perplexity |", "|---|---|---|"]
    lines += [f"| {whose} | {nll:.4f} | {exp(nll):.2f} |" for whose, nll in measured.rows]
    lines += ["", f"Measured by export.py on {measured.n_tokens:,} tokens: {measured.text}."]
    if not lost:
        return [*lines, f"The export is exact: on them {difference}."]
    change = measured.rows[-1][1] - measured.rows[0][1]
    return [
        *lines,
        f"The export is approximate, the nearest GPT-2: its nll differs by {change:+.4f} nats per token.",
    ]


def _use(name: str, tokenizer: Tokenizer | None) -> list[str]:
    lines = ["## Use", "", "```python"]
    if tokenizer is None:
        load = f'model = GPT2LMHeadModel.from_pretrained("{name}")'
        call = f"{load}  # of token ids; they have no text"
        return [*lines, "from transformers import GPT2LMHeadModel", "", call, "```", ""]
    call = [
        f'generate = pipeline("text-generation", model="{name}")',
        'print(generate("The", max_new_tokens=50))',
    ]
    return [*lines, "from transformers import pipeline", "", *call, "```", ""]


def _missing(model: GPT, tokenizer: Tokenizer | None, lost: Sequence[str]) -> list[str]:
    lines = [f"- {what[0].upper()}{what[1:]}." for what in lost]
    if model.bayes_layers():
        lines.append(
            "- Uncertainty of the weights: this is one model, which does not know what it does not know."
        )
    if model.config.head.likelihood == "smooth":
        lines.append(
            "- The correction for label smoothing: probabilities are as smooth as those it was trained on."
        )
    lines.append("- The state of the optimiser: training goes on from the weights alone.")
    if tokenizer and tokenizer.eot is not None:
        lines.append(
            "- In training the string `<|endoftext|>` inside a text was text; transformers reads it as the token."
        )
    if tokenizer and tokenizer.vocab_size < model.config.vocab_size:
        n = model.config.vocab_size
        lines.append(
            f"- Text for the ids {tokenizer.vocab_size:,} to {n - 1:,}, which the tokenizer does not have."
        )
    return lines


def known_of(about: dict, meta: dict | None, config: dict, here: dict) -> dict[str, str]:
    """What is known of a training. about: its checkpoint's; meta: of its data; config: the run's config.json; here: the
    environment now."""
    options, facts = about.get("config", {}), {}
    splits = {split: of for split, of in (meta or {}).get("splits", {}).items() if "tokens" in of}
    if "dataset" in options:
        sizes = [f"{split} {of['tokens']:,} tokens" for split, of in splits.items()]
        facts["data set"] = "; ".join([Path(options["dataset"]).name, *sizes])
    if "init_from" in options and options["init_from"] not in ("scratch", "resume", "auto"):
        facts["begun from"] = Path(options["init_from"]).name
    if isinstance(step := about.get("step", about.get("iter_num")), int):
        facts["steps"] = f"{step:,}"
        facts |= {"tokens trained": f"{about['tokens']:,}"} if about.get("tokens") else {}
    code = {"trained with": config.get("environment", {}), "exported with": here}
    facts |= {
        what: f"commit {by['commit']}, torch {by['torch']}"
        for what, by in code.items()
        if "torch" in by
    }
    return facts
