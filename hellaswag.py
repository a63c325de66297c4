"""HellaSwag (Zellers et al. 2019): which of four endings fits? Any head, from log_probs.

    python hellaswag.py --out_dir=out/quickstart/bayes --source=hellaswag_val.jsonl --limit=1000
    python hellaswag.py --model=gpt2 --download --style=harness

Two conventions, not to be compared with each other: completion is the raw ctx, then " " + ending; harness the text
cleaned as in lm-evaluation-harness. acc takes the ending of the highest sum of log-probabilities, acc_norm divides that
by the ending's tokens (completion) or characters (harness). Are answers in doubt, by any measure, wrong more often?
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from engine.base.distributed import autocast, pick_device
from engine.base.errors import UserError, run_main
from engine.base.files import atomic_write, check_writable, write_json
from engine.base.options import load_config
from engine.eval.endings import encode, score_endings
from engine.eval.evaluation import abstaining
from engine.gpt2.loading import HUB
from engine.runs.checkpoint import read_checkpoint

FIELDS = {
    "completion": ("ctx",),
    "harness": ("activity_label", "ctx_a", "ctx_b"),
}  # of an item, beside its endings


@dataclass(frozen=True)
class HellaSwagConfig:
    out_dir: str = ""  # the run to score; hellaswag.json and the answers are written there
    # or OpenAI's: gpt2 | gpt2-medium | gpt2-large | gpt2-xl; what is written goes to out/<model>
    model: str = ""
    source: str = ""  # the items, a JSONL file
    # or the 10,042 validation items from the Hugging Face Hub (kept by datasets' own cache)
    download: bool = False
    style: str = "completion"  # completion | harness
    # so many items, the first ones (3,243 of ActivityNet, then 6,799 of WikiHow)
    limit: int | str = "all"
    batch_size: int = 16  # items at a time: speed and memory (and which noise n_samples draws)
    # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    n_samples: int = 0
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        limited = self.limit == "all" if isinstance(self.limit, str) else self.limit >= 1
        for fine, advice in (
            (
                bool(self.out_dir) != bool(self.model),
                "which model? --out_dir=RUN or --model=gpt2, one of the two",
            ),
            (
                self.model in ("", *HUB),
                f"model = {self.model!r} is not one of {', '.join(HUB)}; a run: --out_dir=RUN",
            ),
            (
                bool(self.source) != self.download,
                "which items? --source=FILE.jsonl or --download, one of the two",
            ),
            (self.style in FIELDS, f"style = {self.style!r} is not one of: {', '.join(FIELDS)}"),
            (limited, f"limit = {self.limit!r} must be at least 1, or 'all'"),
            (self.batch_size >= 1, f"batch_size = {self.batch_size} must be at least 1"),
            (self.n_samples >= -1, f"n_samples = {self.n_samples} must be at least -1"),
        ):
            if not fine:
                raise UserError(advice)


class Item(NamedTuple):
    """A context, the four texts that may follow it (each with its space), their characters, the right one."""

    context: str
    endings: list[str]
    n_chars: list[int]
    label: int


def main() -> None:
    config, _ = load_config(HellaSwagConfig, sys.argv[1:])
    source = config.model or config.out_dir
    folder = Path("out", config.model) if config.model else Path(config.out_dir)
    if config.out_dir and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --out_dir is the folder of a run")
    items = read_items(config)
    checkpoint, device = read_checkpoint(source), pick_device(config.device)
    model = checkpoint.model(device)
    cast, _ = autocast(device, config.dtype)
    if model.config.bayes_mlp and config.n_samples < 0:
        raise UserError(
            f"{source} has Bayesian MLPs, which only draws reach: give --n_samples=16, say"
        )
    tokenizer = checkpoint.tokenizer()
    texts = [encode(tokenizer, item.context, item.endings) for item in items]
    check_writable(folder)  # an hour before anything is written
    log_probs, epistemic = score_endings(
        model, texts, config.batch_size, cast, config.n_samples, desc=source
    )
    if not log_probs.isfinite().all():
        raise UserError(
            f"{source} gives log-probabilities that are not finite; train it again, or use float32"
        )
    n_tokens = torch.tensor([[len(ids) for ids in endings] for _, endings in texts])
    result, answers = judge(
        items, config.style, n_tokens, log_probs.view(-1, 4), epistemic.view(-1, 4)
    )
    head = model.config.head
    result |= asdict(config) | {"model": source, "head": f"{head.weights} x {head.likelihood}"}
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(answer) + "\n" for answer in answers)
    atomic_write(
        folder / f"hellaswag_{config.style}.jsonl", lambda temporary: temporary.write_text(lines)
    )
    write_json(folder / "hellaswag.json", result)
    print(summary(result))


def read_items(config: HellaSwagConfig) -> list[Item]:
    """The items, prepared in their style; one that cannot be is named."""
    items = []
    for where, record in islice(records(config), None if config.limit == "all" else config.limit):
        try:
            items.append(
                prepare(json.loads(record) if isinstance(record, bytes) else record, config.style)
            )
        except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of the fields
            raise UserError(f"{where} is not an item: {error}") from None
    if not items:
        raise UserError(
            f"{config.source} holds no items: it should have a JSON object on each line"
        )
    return items


def records(config: HellaSwagConfig) -> Iterator[tuple[str, bytes | dict]]:
    """Where each item stands, and the item: lines of JSON from a file, dicts from the hub."""
    if config.source:
        if not Path(config.source).is_file():
            raise UserError(
                f"{config.source} is missing; it should be HellaSwag's validation items, or use --download"
            )
        with open(config.source, "rb") as file:
            yield from (
                (f"{config.source}, line {n}", line)
                for n, line in enumerate(file, 1)
                if line.strip()
            )
        return
    import datasets

    try:
        rows = datasets.load_dataset("Rowan/hellaswag", split="validation")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the hub does not give Rowan/hellaswag ({type(error).__name__}); use --source=FILE"
        ) from error
    yield from ((f"Rowan/hellaswag, item {n}", row) for n, row in enumerate(rows))


def prepare(record: dict, style: str) -> Item:
    """One item in this style; a ValueError says what it lacks."""
    needed = ("endings", "label", *FIELDS[style])
    if missing := [name for name in needed if not isinstance(record, dict) or name not in record]:
        raise ValueError(f"it has no {missing[0]!r}")
    endings, label, texts = (
        record["endings"],
        str(record["label"]),
        [record[name] for name in FIELDS[style]],
    )
    if (
        not isinstance(endings, list)
        or len(endings) != 4
        or not all(isinstance(t, str) for t in endings + texts)
    ):
        raise ValueError(f"it needs texts as {', '.join(FIELDS[style])}, and 4 endings")
    if label not in ("0", "1", "2", "3"):  # on the hub it is a text
        raise ValueError(f"its label is {record['label']!r}, not 0, 1, 2 or 3")
    "".join(
        endings + texts
    ).encode()  # half a surrogate pair, which JSON can hold, is a ValueError too
    before = context = texts[0]
    if style == "harness":
        before, endings = (
            clean(f"{texts[0]}: {texts[1]} {texts[2].capitalize()}"),
            [clean(text) for text in endings],
        )
        context = before.rstrip()  # the space belongs to the endings, as it does to GPT-2's tokens
    space = before[len(context) :] + " "
    return Item(
        context, [space + ending for ending in endings], [len(e) for e in endings], int(label)
    )


def clean(text: str) -> str:
    """lm-evaluation-harness' preprocessing: WikiHow's marks in brackets go."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def judge(
    items: Sequence[Item],
    style: str,
    n_tokens: torch.Tensor,
    log_probs: torch.Tensor,
    epistemic: torch.Tensor,
) -> tuple[dict, list[dict]]:
    """The scores, and a record for each item. Of each ending, (n, 4): its tokens, and the sums over them of log p and
    of the epistemic uncertainty, nats."""
    labels, n_chars = (
        torch.tensor(column) for column in zip(*((i.label, i.n_chars) for i in items), strict=True)
    )
    n, result = len(items), {"n": len(items)}
    mean = log_probs / (n_tokens if style == "completion" else n_chars.clamp(min=1))
    answers = {"acc": log_probs.argmax(1), "acc_norm": mean.argmax(1)}
    for name, answer in answers.items():
        share = (answer == labels).double().mean().item()
        result |= {name: share, f"{name}_stderr": (share * (1 - share) / max(1, n - 1)) ** 0.5}
    best, second = mean.topk(2).values.unbind(1)
    doubt = {"margin": second - best}  # a small margin is doubt, whatever the head
    if epistemic.any():
        doubt["epistemic"] = (
            (epistemic / n_tokens).gather(1, answers["acc_norm"].unsqueeze(1)).squeeze(1)
        )
    result |= {
        f"abstaining_by_{by}": abstaining(answers["acc_norm"] == labels, d)
        for by, d in doubt.items()
    }
    columns = (
        {"item": torch.arange(n), "label": labels}
        | {f"answer_{name}": a for name, a in answers.items()}
        | doubt
    )
    columns["margin"] = best - second
    columns |= {"log_probs": log_probs, "n_tokens": n_tokens, "n_chars": n_chars}
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return result, [dict(zip(columns, row, strict=True)) for row in rows]


def summary(result: dict) -> str:
    """The result in lines of text."""
    scores = "{model}, {style} style, {n:,} items: acc {acc:.4f} +- {acc_stderr:.4f}"
    scores += ", acc_norm {acc_norm:.4f} +- {acc_norm_stderr:.4f}"
    shown = "  {}: acc_norm of the more certain half {:.4f}, of the rest {:.4f}; risk-coverage area {:.4f}"
    lines = [
        shown.format(k.replace("_", " "), *v.values())
        for k, v in result.items()
        if k.startswith("abstaining")
    ]
    return "\n".join([scores.format(**result), *lines])


if __name__ == "__main__":
    run_main(main)
