"""Export a model as a folder that transformers loads: GPT2LMHeadModel, AutoTokenizer, pipeline.

    python export.py --out_dir=out/quickstart/softmax --to=softmax_gpt2
    python export.py --out_dir=out/quickstart/bayes --to=bayes_gpt2 --approximate

Softmax heads on point weights are exported exactly, with their bias per token
(engine/gpt2/exporting.py). GPT-2 cannot represent a posterior or a sigmoid: with --approximate they
are left out. The written folder is read back and compared with the original before it gets its
name; README.md has the scores of both on the validation split.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.distributed import Processes, pick_device
from engine.base.errors import UserError, run_main
from engine.base.files import check_writable, new_folder, read_json
from engine.base.options import load_config
from engine.data.shards import splits_in
from engine.data.tokenizer import read_meta
from engine.data.tokens import TokenFile, dataset_folder
from engine.data.windows import windows
from engine.eval.evaluation import evaluate
from engine.gpt2.card import Measured, model_card, training_facts
from engine.gpt2.exporting import (
    nearest_gpt2,
    unsupported_features,
    write_model,
    write_tokenizer,
)
from engine.runs.banner import environment
from engine.runs.checkpoint import check_tokenizer, folder_of, load_model, read_checkpoint
from model import GPT

N_TOKENS = 20_480  # of the validation split: the same for both models, so few show a difference
TOLERANCE = 1e-4  # nats by which log-probabilities of an exact export may differ


@dataclass(frozen=True)
class ExportConfig:
    # a run (its newest checkpoint), a checkpoint file, nanoGPT's or transformers' folder, gpt2*
    out_dir: str = "out"
    to: str = ""  # the folder to make; one that has files is never touched
    approximate: bool = False  # export the nearest GPT-2 if GPT-2 cannot represent the model
    dataset: str = ""  # measure on another data set than the run's own (same tokenizer)
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto; for the measurement


def main() -> None:
    config, _ = load_config(ExportConfig, sys.argv[1:])
    source, to = config.out_dir, new_path(config.to)
    checkpoint = read_checkpoint(source)
    model = checkpoint.model(pick_device(config.device))
    unsupported = unsupported_features(model)
    if unsupported and not config.approximate:
        raise UserError(
            f"GPT-2 cannot represent {' or '.join(unsupported)} of {source}; "
            "to export the nearest GPT-2, with the difference measured, add --approximate"
        )
    meta = read_meta(checkpoint.tokenizer_folder())
    has_text = meta is None or meta["tokenizer"].get("kind") != "none"
    tokenizer = checkpoint.tokenizer() if has_text else None
    file = validation_split(config, checkpoint.dataset, model)
    if unsupported and file is None:
        raise UserError(
            "--approximate measures the difference, and the run's data set is not here; "
            "add --dataset=NAME"
        )
    run_config = folder_of(source) / "config.json"
    described = read_json(run_config) if run_config.is_file() else {}
    facts = training_facts(checkpoint.about, meta, described, environment())

    with new_folder(to) as folder:
        write_model(folder, nearest_gpt2(model), tokenizer.eot if tokenizer else None)
        if tokenizer:
            write_tokenizer(folder, tokenizer, model.config.block_size)
        measured = measure(model, load_model(folder, pick_device(config.device)), file)
        if not unsupported and not measured.difference <= TOLERANCE:
            raise UserError(
                f"the export's log-probabilities differ from those of {source} by up to "
                f"{measured.difference:.1e} nats; nothing is exported: please report this"
            )
        card = model_card(to.name, model, tokenizer, unsupported, measured, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")

    for name, nll in measured.nlls:
        print(f"{name}: nll {nll:.4f} on {measured.text}")
    exact = f"exact, log-probabilities within {measured.difference:.1e} nats"
    print(f"{config.to}: {'the nearest GPT-2' if unsupported else exact}; load it with")
    print(f"    transformers.GPT2LMHeadModel.from_pretrained({config.to!r})")


def new_path(to: str) -> Path:
    """Check that a new folder can be made there."""
    if not to:
        raise UserError("where to? --to=FOLDER, a new one")
    path = Path(to).resolve()  # the target of a link
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{to} exists already, and is never written over; give another --to")
    check_writable(path.parent)
    return path


def validation_split(config: ExportConfig, own: str | None, model: GPT) -> TokenFile | None:
    """Of the data set that the options name, or of the run's own if that is on this machine."""
    dataset = config.dataset or own
    if not dataset or not config.dataset and "val" not in splits_in(dataset_folder(dataset)):
        return None
    check_tokenizer(config.out_dir, dataset_folder(dataset))
    file = TokenFile(dataset, "val")
    file.check(model.config.vocab_size)
    return file


def measure(model: GPT, exported: GPT, file: TokenFile | None) -> Measured:
    """Compare log-probabilities on random token ids, and nlls on the split if there is one."""
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    idx = torch.randint(vocab_size, (4, block_size), generator=torch.Generator().manual_seed(0))
    difference = largest_difference(model, exported, idx)
    if file is None:
        return Measured((), difference, f"{idx.numel():,} random token ids")

    limit = max(1, N_TOKENS // block_size)
    processes = Processes(model.transformer.wte.weight.device)

    def nll(model: GPT, n_samples: int = 0) -> float:
        batches = windows(file, block_size, 8, limit)
        return evaluate(model, batches, processes, n_samples=n_samples).mean("nll")

    is_bayesian = bool(model.bayes_layers())
    nlls = [("the original" + ", mean weights" * is_bayesian, nll(model))]
    if is_bayesian and not model.config.bayes_mlp:  # hidden layers need draws
        nlls.append(("the original, averaged over its posterior", nll(model, n_samples=-1)))
    nlls.append(("this model", nll(exported)))
    n_tokens = sum(batch.y.numel() for batch in windows(file, block_size, 8, limit))
    blocks = f"{n_tokens:,} tokens in blocks of {block_size}, evenly spread"
    text = f"{blocks} over the validation split of {file.path.parent.name}"
    return Measured(nlls, difference, text)


@torch.no_grad()
def largest_difference(a: GPT, b: GPT, idx: torch.Tensor) -> float:
    """The largest difference of the models' log-probabilities on idx (B, T); nan if one is nan."""
    rows = idx.to(a.transformer.wte.weight.device).split(1)
    return (
        torch.stack([(a.log_probs(row) - b.log_probs(row)).abs().max() for row in rows])
        .max()
        .item()
    )


if __name__ == "__main__":
    run_main(main)
