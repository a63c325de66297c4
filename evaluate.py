"""Compare runs on held-out text: a table row for each run, a plot of their validation curves, a JSON file in each.

    python evaluate.py --out_dir=out/quickstart/softmax,out/quickstart/bayes --split=test

Every number comes from log_probs, the normalised distribution over the next token, over the whole split: consecutive
blocks of block_size, each token predicted once. `unigram` is what the training text's token frequencies alone reach.
With --std_tolerance=0.01 --n_samples=16 a Bayesian run has a second row: its posterior as wide as costs no more than
that on the validation split.
"""

import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from engine.checkpoint import check_tokenizer, folder_of, has_tokenizer, load_model, trained_on
from engine.config import load_config
from engine.distributed import autocast, pick_device
from engine.errors import MANY, UserError, check_ranges, run
from engine.evaluation import evaluate, unigram_nll, whole_split, widest_posterior
from engine.files import write_json
from engine.labels import LabelFile
from engine.logger import read_records
from engine.pretrained import HUB
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokens import TokenFile, dataset_folder

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
SCALE_BLOCKS = 64  # of the validation split, to find the widest posterior on
COLUMNS = {
    "nll": "{:.4f}",
    "perplexity": "{:.2f}",
    "perplexity_desmoothed": "{:.2f}",
    "bits_per_byte": "{:.4f}",
    "accuracy": "{:.4f}",
    "ece": "{:.4f}",
    "brier": "{:.4f}",
    "entropy": "{:.4f}",
    "n_samples": "{:d}",
    "mutual_information": "{:.5f}",
    "recall_at_k": "{:.4f}",
    "lrap": "{:.4f}",
    "log_sum_sigma": "{:+.4f}",
    "kl_weight": "{:g}",
}


@dataclass(frozen=True)
class EvaluateConfig:
    out_dir: str = "out"  # runs (the newest checkpoint) or checkpoint files, with commas; gpt2* with --dataset
    split: str = "test"  # test | val | train
    dataset: str = ""  # another data set than the run's own (same tokenizer)
    batch_size: int = 16  # blocks at a time: speed and memory (and which noise n_samples draws)
    limit: int = 0  # this many blocks, evenly spread over the split; 0: the whole split
    n_samples: int = 0  # Bayesian: posterior draws averaged per prediction; 0: the mean weights; -1: all, not sampled
    std_tolerance: float = (
        0.0  # Bayesian: evaluate also with the widest posterior within so many nats on val; 0: do not
    )
    labels: str = (
        ""  # a label set of this split (augmentation/teacher_labels.py --split): recall@k and LRAP of its sets
    )
    plot: str = ""  # where the plot goes; default: val_nll.png in the run's folder, of several runs beside the first
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto

    def __post_init__(self):
        check_ranges(self, {"batch_size": (1, MANY), "limit": (0, MANY), "n_samples": (-1, 10**6)})
        check_ranges(self, {"std_tolerance": (0.0, 1e6)})
        if self.plot and Path(self.plot).is_dir():
            raise UserError(f"plot = {self.plot!r} is a folder; name a file")
        if self.std_tolerance and self.n_samples == 0:
            raise UserError("std_tolerance needs predictions that see the width: give --n_samples=16, say, or -1")


def main() -> None:
    config, _ = load_config(EvaluateConfig, sys.argv[1:])
    sources = [source.rstrip("/") for source in config.out_dir.split(",") if source]
    if not sources:
        raise UserError("which runs? --out_dir=RUN or --out_dir=RUN,RUN")
    for source in sources:  # before an hour goes into the ones that are there
        if source not in HUB and not Path(source).exists():
            raise UserError(f"{source} does not exist; give run folders, or one of: {', '.join(HUB)}")
    rows = {}
    for source in sources:
        rows[source] = evaluate_run(source, config)
        if (folder := folder_of(source)).is_dir():
            name = (
                f"eval_{config.split}.json"
                if Path(source).is_dir()
                else f"eval_{config.split}_{Path(source).stem}.json"
            )
            write_json(folder / name, rows[source])
    scaled = {
        f"{s} (std x {row['scaled']['std_factor']:.2f})": row["scaled"] for s, row in rows.items() if "scaled" in row
    }
    print(table(rows | scaled, config.split))
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
    if config.std_tolerance and not model.bayes_layers() and source == config.out_dir:
        raise UserError(f"{source} has no posterior to scale; leave --std_tolerance out")
    if model.config.bayes_mlp and config.n_samples < 0:
        raise UserError(f"{source} has Bayesian MLPs, which only draws reach: give --n_samples=16, say")
    dataset = config.dataset or trained_on(source)
    if dataset is None:
        raise UserError(f"{source} does not say what it was trained on; add --dataset=NAME")
    check_tokenizer(source, dataset_folder(dataset))
    file = TokenFile(dataset, config.split)
    file.check(model.config.vocab_size)
    labels = LabelFile(file, config.labels, "set") if config.labels else None
    shape, head = (model.config.block_size, config.batch_size), model.config.head

    def scores(file: TokenFile, limit: int, n_samples: int, what: str, labels: LabelFile | None = None) -> dict:
        n_blocks = min(limit or math.inf, (len(file) - 1) / shape[0])
        show = {"desc": what, "total": math.ceil(n_blocks / shape[1]), "leave": False}
        batches = tqdm(whole_split(file, *shape, limit, labels), **show, disable=not sys.stderr.isatty())
        return evaluate(model, batches, device, cast, n_samples)

    about = {"head": f"{head.weights} x {head.likelihood}", "dataset": str(dataset), "n_samples": config.n_samples}
    about |= {"limit": config.limit} if config.limit else {}
    about |= {"labels": config.labels, "k": labels.about["k"] + 1} if labels else {}
    result = about | scores(file, config.limit, config.n_samples, source, labels)
    targets = (y for _, y in whole_split(file, *shape, config.limit))
    folder = folder_of(source) if has_tokenizer(folder_of(source)) else dataset_folder(dataset)
    frequencies = TokenFile(dataset, "train").frequencies(model.config.vocab_size)
    result |= of_text(targets, frequencies, load_tokenizer(folder), result["nll"])
    if config.std_tolerance and model.bayes_layers():
        val = TokenFile(dataset, "val")
        val.check(model.config.vocab_size)
        nll = partial(scores, val, SCALE_BLOCKS, config.n_samples, f"{source}: width")
        factor = widest_posterior(model, lambda: nll()["nll"], config.std_tolerance)
        about = {"std_factor": factor, "std_tolerance": config.std_tolerance, "n_samples": config.n_samples}
        result["scaled"] = scaled = about | scores(file, config.limit, config.n_samples, f"{source}: scaled")
        scaled["bits_per_byte"] = result["bits_per_byte"] * scaled["nll"] / result["nll"]
    return result


def of_text(targets: Iterable[torch.Tensor], frequencies: torch.Tensor, tokenizer: Tokenizer, nll: float) -> dict:
    """What follows from the predicted tokens themselves: nll in bits per byte, and the nll of the frequencies (V,)."""
    counts = sum(torch.bincount(y.flatten(), minlength=len(frequencies)) for y in targets).double()
    # end-of-text counts in the nll but has no bytes
    lengths = torch.tensor([len(piece) for piece in tokenizer.token_bytes()]).double()
    bits, n_bytes = nll * counts.sum() / math.log(2), counts[: len(lengths)] @ lengths
    return {"bits_per_byte": (bits / n_bytes).item(), "unigram_nll": unigram_nll(counts, frequencies)}


def table(rows: dict[str, dict], split: str) -> str:
    """The comparison as text: a line per run, columns that no run has left out."""
    first = next(iter(rows.values()))
    names = short_names(rows)
    columns = [name for name in COLUMNS if any(row.get(name, 0) != 0 for row in rows.values())]
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
