"""HellaSwag (Zellers et al. 2019): which of four endings fits? For any head, by its log_probs.

    python hellaswag.py --out_dir=gpt2
    python hellaswag.py --out_dir=out/quickstart/bayes --limit=1000 --n_samples=16

The context is the raw ctx, an ending follows after a space. acc takes the ending with the highest
sum of log-probabilities; acc_norm divides the sum by the number of the ending's tokens.
harness.py --tasks=hellaswag cleans the text and divides by characters: its scores are others.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.base.distributed import autocast, pick_device
from engine.base.errors import UserError, run_main
from engine.base.files import DATA_ROOT, check_writable, write_json
from engine.base.options import Draws, NonNegativeInt, PositiveInt, load_config
from engine.eval.endings import score_endings
from engine.eval.evaluation import check_n_samples
from engine.runs.checkpoint import Checkpoint, read_checkpoint, results_folder

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
ITEMS = DATA_ROOT / "hellaswag" / "hellaswag_val.jsonl"


@dataclass(frozen=True)
class HellaSwagConfig:
    # a run, a checkpoint file, a folder of nanoGPT or transformers, gpt2*
    out_dir: str = "out"
    results: str = ""  # folder for hellaswag.json; default: that of the run, out/gpt2* for GPT-2
    source: str = ""  # the items, a JSONL file; default: those in data/hellaswag
    # only the first items (3,243 are from ActivityNet, then 6,799 from WikiHow); 0: all
    limit: NonNegativeInt = 0
    batch_size: PositiveInt = 16  # items at a time: speed and memory
    # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    n_samples: Draws = 0
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto


Item = tuple[str, list[str], int]  # context, four endings with their spaces, index of the true one


def main() -> None:
    config, _ = load_config(HellaSwagConfig, sys.argv[1:])
    source = config.out_dir
    folder = Path(config.results or results_folder(source))
    items = read_items(config)
    checkpoint = read_checkpoint(source)
    check_writable(folder, "results")
    log_probs, lengths = score(config, checkpoint, items)
    if not log_probs.isfinite().all():
        raise UserError(f"{source} gives log-probabilities that are not finite; train it again")
    labels = [label for _, _, label in items]
    result = judge(log_probs, lengths, torch.tensor(labels))
    result |= asdict(config) | {"model": source}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "hellaswag.json", result)
    text = "{model}, {n:,} items: acc {acc:.4f} ± {acc_stderr:.4f}, "
    text += "acc_norm {acc_norm:.4f} ± {acc_norm_stderr:.4f}"
    print(text.format(**result))


def score(
    config: HellaSwagConfig, checkpoint: Checkpoint, items: list[Item]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 4) each: the sum of log p over each ending, and its number of tokens."""
    device = pick_device(config.device)
    model = checkpoint.model(device)
    tokenizer = checkpoint.tokenizer()
    check_n_samples(model, config.n_samples, config.out_dir)
    texts = []
    for context, endings, _ in items:  # encoded apart, so that all endings follow the same tokens
        first, *others = [tokenizer.encode(text).tolist() for text in (context, *endings)]
        texts.append((first, others))
    cast, _ = autocast(device, config.dtype)
    with cast:
        log_probs, _ = score_endings(model, texts, 4 * config.batch_size, config.n_samples)
    lengths = [[len(ids) for ids in endings] for _, endings in texts]
    return log_probs.view(-1, 4), torch.tensor(lengths)


def read_items(config: HellaSwagConfig) -> list[Item]:
    """The items that the options name."""
    path = Path(config.source or ITEMS)
    if not path.is_file():
        raise UserError(
            f"{path} is missing; give --source=FILE, or: curl -f --create-dirs -o '{path}' {URL}"
        )
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} has no items; it must have a JSON object on each line")
    items = []
    for number, line in enumerate(lines[: config.limit or None], 1):
        try:
            items.append(item_of(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, item {number} is not a HellaSwag item: {error!r}") from None
    return items


def item_of(record: dict) -> Item:
    """The item of a JSON object."""
    endings, label = record["endings"], int(record["label"])  # a string in the Hub's copy
    if len(endings) != 4 or label not in range(4):
        raise ValueError("an item needs 4 endings and a label from 0 to 3")
    return record["ctx"], [" " + ending for ending in endings], label


def judge(log_probs: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> dict:
    """The scores. log_probs, lengths: see score(); labels: (n,)."""
    n = len(labels)
    means = log_probs / lengths.clamp(min=1)
    result = {"n": n}
    for name, values in (("acc", log_probs), ("acc_norm", means)):
        correct = values.argmax(1) == labels
        share = correct.double().mean().item()
        result[name] = share
        variance = share * (1 - share) / max(1, n - 1)
        result[f"{name}_stderr"] = variance**0.5
    return result


if __name__ == "__main__":
    run_main(main)
