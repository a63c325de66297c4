"""Compare runs on held-out text: a table row for each run, a plot of their validation curves, a JSON file in each.

    python evaluate.py --out_dir=out/quickstart/softmax,out/quickstart/bayes --split=test

Every number comes from log_probs, the normalised distribution over the next token, over the whole split: consecutive
blocks of block_size, each token predicted once. `unigram` is what the training text's token frequencies alone reach.
"""

import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from engine.checkpoint import check_tokenizer, load_model, trained_on
from engine.config import load_config
from engine.distributed import autocast, pick_device
from engine.errors import UserError, run
from engine.evaluation import evaluate, unigram_nll, whole_split
from engine.logger import read_records
from engine.tokenizer import load_tokenizer
from engine.tokens import TokenFile, dataset_folder

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
COLUMNS = {
    "nll": "{:.4f}",
    "perplexity": "{:.2f}",
    "bits_per_byte": "{:.4f}",
    "accuracy": "{:.4f}",
    "ece": "{:.4f}",
    "brier": "{:.4f}",
    "entropy": "{:.4f}",
    "mutual_information": "{:.5f}",
    "log_sum_sigma": "{:+.4f}",
    "kl_weight": "{:g}",
}


@dataclass(frozen=True)
class EvaluateConfig:
    out_dir: str = "out"  # one run or several, separated by commas; gpt2* with --dataset
    split: str = "test"  # test | val | train
    dataset: str = ""  # another data set than the run's own (same tokenizer)
    batch_size: int = 16  # blocks at a time: speed and memory (and which noise n_samples draws)
    n_samples: int = 0  # Bayesian heads: posterior samples averaged for each prediction; 0: the mean weights
    plot: str = ""  # where the plot goes; default: val_nll.png in the run's folder, of several runs beside the first
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        if self.batch_size < 1 or self.n_samples < 0:
            raise UserError("batch_size must be at least 1, n_samples at least 0")


def main() -> None:
    config, _ = load_config(EvaluateConfig, sys.argv[1:])
    sources = [source.rstrip("/") for source in config.out_dir.split(",") if source]
    if not sources:
        raise UserError("which runs? --out_dir=RUN or --out_dir=RUN,RUN")
    rows = {}
    for source in sources:
        rows[source] = evaluate_run(source, config)
        if (folder := Path(source)).is_dir():
            (folder / f"eval_{config.split}.json").write_text(json.dumps(rows[source], indent=1))
    print(table(rows, config.split))
    if curves := {s: c for s in sources if (c := read_curve(Path(s) / "metrics.jsonl"))}:
        first = Path(next(iter(curves)))
        default = (first if len(curves) == 1 else first.parent) / "val_nll.png"
        path = Path(config.plot or default)
        plot_curves(curves, path)
        print(f"plot: {os.path.relpath(path)}")


def evaluate_run(source: str, config: EvaluateConfig) -> dict:
    """All numbers of one run, or of GPT-2 by name, on a whole split."""
    device = pick_device(config.device)
    cast, _ = autocast(device, config.dtype)
    model = load_model(source, device)
    dataset = config.dataset or trained_on(source)
    if dataset is None:
        raise UserError(f"{source} does not say what it was trained on; add --dataset=NAME")
    check_tokenizer(source, dataset_folder(dataset))
    file, train = TokenFile(dataset, config.split), TokenFile(dataset, "train")
    file.check(model.config.vocab_size)
    folder = source if (Path(source) / "meta.json").is_file() else dataset_folder(dataset)
    tokenizer = load_tokenizer(folder)
    batches = whole_split(file, model.config.block_size, config.batch_size)
    n_batches = math.ceil((len(file) - 1) / model.config.block_size / config.batch_size)
    bar = tqdm(batches, desc=source, total=n_batches, leave=False, disable=not sys.stderr.isatty())
    result = evaluate(model, bar, device, cast, config.n_samples)
    # end-of-text counts in the nll but has no bytes
    lengths = torch.tensor([len(piece) for piece in tokenizer.token_bytes()]).double()
    n_bytes = file.counts(len(lengths)) @ lengths - lengths[int(file.ids[0])]  # the first token is not predicted
    result["bits_per_byte"] = result["nll"] * result["n_tokens"] / math.log(2) / n_bytes.item()
    result["unigram_nll"] = unigram_nll(file, train.frequencies(model.config.vocab_size))
    head = model.config.head
    return {
        "head": f"{head.weights} x {head.likelihood}",
        "dataset": str(dataset),
        "n_samples": config.n_samples,
    } | result


def table(rows: dict[str, dict], split: str) -> str:
    """The comparison as text: a line per run, columns that no run has left out."""
    first = next(iter(rows.values()))
    names = short_names(rows)
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    lines = [["run", *(name.replace("_", " ") for name in columns), "vs first"]]
    unigram = {"nll": first["unigram_nll"], "perplexity": math.exp(first["unigram_nll"])}
    for source, row in {"unigram": unigram, **rows}.items():
        cells = [COLUMNS[name].format(row[name]) if name in row else "" for name in columns]
        comparable = row.get("dataset", first["dataset"]) == first["dataset"]
        ratio = f"{math.exp(row['nll'] - first['nll']):.3f}" if comparable else ""
        lines.append([names.get(source, source), *cells, ratio])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = [" ".join([line[0].ljust(widths[0]), *cells[1:]]) for line, cells in zip(lines, aligned, strict=True)]
    units = "nll and entropies in nats per token; vs first: ratio of perplexities"
    head = f"{first['dataset']}, {split} split, {first['n_tokens']:,} tokens; {units}"
    return "\n".join([head, *text])


def short_names(sources: Iterable[str]) -> dict[str, str]:
    """source -> the last part of its path, or all of it where two share that part."""
    last = {source: Path(source).name or source for source in sources}
    return {source: name if list(last.values()).count(name) == 1 else source for source, name in last.items()}


def read_curve(path: Path) -> list[tuple[float, float]]:
    """(tokens, val_nll) of a run's evaluations."""
    return [(record["tokens"], record["val_nll"]) for record in read_records(path) if "val_nll" in record]


def plot_curves(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Validation nll against tokens, a line for each run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    names = short_names(curves)
    axes.set_prop_cycle(color=COLOURS[:7], marker=list("osv^D<>"))
    for source, curve in curves.items():
        trained = [point for point in curve if point[0] > 0] or curve  # step 0 would flatten all that follows
        tokens, nll = zip(*((n / 1e6, nll) for n, nll in trained), strict=True)
        label = f"{names[source]} ({nll[-1]:.3f})"
        axes.plot(tokens, nll, markersize=5, markerfacecolor="none", label=label)
    axes.set(xlabel="training tokens (millions)", ylabel="validation nll (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
