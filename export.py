"""Export a model as a folder that transformers loads: GPT2LMHeadModel, GPT2TokenizerFast, pipeline("text-generation").

    python export.py --out_dir=out/quickstart/softmax --to=softmax_gpt2
    python export.py --out_dir=out/quickstart/bayes --to=bayes_gpt2 --approximate

Softmax heads on point weights are exported exactly, their bias per token too (engine/gpt2/exporting.py). What it cannot
say, a posterior or a sigmoid, is left out with --approximate alone. The folder is read back before it gets its name,
and compared with the original on the validation split; the figures are in its README.md.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.distributed import Processes, pick_device
from engine.base.errors import UserError, run_main
from engine.base.files import check_writable, new_folder
from engine.base.options import load_config
from engine.data.shards import splits_in
from engine.data.tokenizer import read_meta
from engine.data.tokens import TokenFile, dataset_folder
from engine.data.windows import windows
from engine.eval.evaluation import evaluate, in_pieces
from engine.gpt2.card import Measured, card, known_of
from engine.gpt2.exporting import losses, nearest_gpt2, write_model, write_tokenizer
from engine.gpt2.loading import read_object
from engine.runs.checkpoint import (
    about,
    check_tokenizer,
    folder_of,
    load_model,
    tokenizer_folder,
    tokenizer_of,
)
from engine.runs.logger import environment
from model import GPT

# of the validation split, to measure on: both are asked about the same, a difference needs few
N_TOKENS = 20_480
TOLERANCE = 1e-4  # nats by which log-probabilities of an exact export may differ


@dataclass(frozen=True)
class ExportConfig:
    # a run (its newest checkpoint), a checkpoint file, nanoGPT's or transformers' folder, gpt2*
    out_dir: str = "out"
    to: str = ""  # the folder to make; one that has files is never touched
    approximate: bool = False  # export what no GPT-2 can be as the nearest one
    dataset: str = ""  # measure on another data set than the run's own (same tokenizer)
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto; for the measurement


def main() -> None:
    config, _ = load_config(ExportConfig, sys.argv[1:])
    device, to = pick_device(config.device), free_folder(config.to)
    model = load_model(config.out_dir, device)
    lost = losses(model)
    if lost and not config.approximate:
        raise UserError(
            f"a GPT-2 has no place for {' or '.join(lost)} of {config.out_dir}; to export the nearest GPT-2, "
            "with the difference measured, add --approximate"
        )
    meta = read_meta(tokenizer_folder(config.out_dir))
    has_text = meta is None or meta["tokenizer"].get("kind") != "none"
    tokenizer = tokenizer_of(config.out_dir, model.config.vocab_size) if has_text else None
    trained = about(config.out_dir)
    file = text_to_measure_on(config, trained.get("config", {}).get("dataset"), model)
    if lost and file is None:
        raise UserError(
            "--approximate measures what it costs, and the run's data set is not here; add --dataset=NAME"
        )
    facts = known_of(trained, meta, of_run(config.out_dir), environment())
    with new_folder(to) as folder:
        write_model(folder, nearest_gpt2(model), tokenizer.eot if tokenizer else None)
        if tokenizer:
            write_tokenizer(folder, tokenizer, model.config.block_size)
        measured = measure(model, load_model(folder, device), file)
        if not lost and not measured.largest <= TOLERANCE:
            raise UserError(
                f"what was written predicts otherwise than {config.out_dir}, by up to {measured.largest:.1e} nats on "
                f"{measured.text}; nothing is exported: please report this"
            )
        (folder / "README.md").write_text(
            card(to.name, model, tokenizer, lost, measured, facts), encoding="utf-8"
        )
    for whose, nll in measured.rows:
        print(f"{whose}: nll {nll:.4f} on {measured.n_tokens:,} tokens")
    kind = (
        "the nearest GPT-2"
        if lost
        else f"exact, log-probabilities within {measured.largest:.1e} nats"
    )
    print(
        f"{config.to}: {kind}; transformers' GPT2LMHeadModel.from_pretrained({config.to!r}) loads it"
    )


def free_folder(to: str) -> Path:
    """The folder to make, if it can be made."""
    path = Path(to).resolve()  # a link's own target, and "." by its name
    if not to:
        raise UserError("where to? --to=FOLDER, a new one")
    if path == Path.cwd():
        raise UserError("--to is the folder that you stand in; name a new one")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{to} exists already, and is never written over; give another --to")
    check_writable(path.parent)
    return path


def text_to_measure_on(config: ExportConfig, own: str | None, model: GPT) -> TokenFile | None:
    """The validation split of the data set that the options name, or of the run's own where it is here."""
    dataset = config.dataset or own
    if not dataset or not config.dataset and "val" not in splits_in(dataset_folder(dataset)):
        return None
    check_tokenizer(config.out_dir, dataset_folder(dataset))
    file = TokenFile(dataset, "val")
    file.check(model.config.vocab_size)
    return file


def measure(model: GPT, exported: GPT, file: TokenFile | None) -> Measured:
    """How both predict the same blocks, evenly spread over the split; without one, how far apart they are on random
    ids."""
    block_size = model.config.block_size
    if file is None:
        idx = torch.randint(
            model.config.vocab_size, (4, block_size), generator=torch.Generator().manual_seed(0)
        )
        return Measured(
            (),
            compare(model, exported, [(idx, idx)])[1],
            idx.numel(),
            f"{idx.numel():,} random token ids",
        )
    limit = max(1, N_TOKENS // block_size)
    batches = [(w.x, w.y) for w in windows(file, block_size, 8, limit)]
    nlls, largest = compare(model, exported, batches)
    bayesian = bool(model.bayes_layers())
    rows = [("the original" + (", mean weights" if bayesian else ""), nlls[0])]
    if bayesian and not model.config.bayes_mlp:  # of hidden layers only draws tell
        processes = Processes(model.transformer.wte.weight.device)
        average = evaluate(model, windows(file, block_size, 8, limit), processes, n_samples=-1)
        rows.append(("the original, averaged over its posterior", average.mean("nll")))
    text = (
        f"blocks of {block_size} evenly spread over the validation split of {file.path.parent.name}"
    )
    return Measured(
        [*rows, ("this model", nlls[1])], largest, sum(y.numel() for _, y in batches), text
    )


@torch.no_grad()
def compare(
    a: GPT, b: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[list[float], float]:
    """x, y (B, T) each -> the nll of both, and by how much their log-probabilities differ at most."""
    device = a.transformer.wte.weight.device
    nll, n, largest = torch.zeros(2, dtype=torch.float64), 0, torch.zeros((), device=device)
    for x, y in batches:
        hiddens = [model.hidden(x.to(device)) for model in (a, b)]
        for pieces, targets in in_pieces(hiddens, y.to(device)):
            found = [model.lm_head.log_probs(h) for model, h in zip((a, b), pieces, strict=True)]
            nll -= torch.stack([p.gather(1, targets.unsqueeze(1)).sum() for p in found]).cpu()
            largest = torch.maximum(
                largest, (found[0] - found[1]).abs().max()
            )  # keeps a nan, as max() does not
            n += len(targets)
    return (nll / n).tolist(), largest.item()


def of_run(source: str) -> dict:
    """The config.json of a run folder; {} where there is none."""
    path = folder_of(source) / "config.json"
    return read_object(path) if path.is_file() else {}


if __name__ == "__main__":
    run_main(main)
