"""Export a model as a folder that transformers loads: GPT2LMHeadModel, AutoTokenizer, pipeline.

    python export.py --out_dir=out/quickstart/softmax --to=softmax_gpt2
    python export.py --out_dir=out/quickstart/bayes --to=bayes_gpt2 --approximate

Softmax heads with point weights are exported exactly, with their bias per token
(engine/gpt2/exporting.py). GPT-2 cannot represent a posterior or a sigmoid: --approximate leaves
them out. The new folder is read back and compared with the original before it gets its name. Its
README.md has the scores of both on the validation split.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.distributed import Processes, pick_device
from engine.base.errors import UserError, run_main
from engine.base.files import check_writable, new_folder
from engine.base.options import load_config
from engine.data.shards import splits_in
from engine.data.tokens import TokenFile, dataset_folder
from engine.data.windows import windows
from engine.eval.evaluation import evaluate
from engine.gpt2.card import comparison, model_card
from engine.gpt2.exporting import (
    nearest_gpt2,
    unsupported_features,
    write_model,
    write_tokenizer,
)
from engine.runs.checkpoint import check_tokenizer, load_model, read_checkpoint
from model import GPT

# of the validation split; a few are enough, because both models get the same ones
N_TOKENS = 20_480
TOLERANCE = 1e-4  # largest allowed difference of log-probabilities of an exact export, in nats


@dataclass(frozen=True)
class ExportConfig:
    # a run (its newest checkpoint), a checkpoint file, a folder of nanoGPT or transformers, gpt2*
    out_dir: str = "out"
    to: str = ""  # the new folder; a folder with files is never changed
    approximate: bool = False  # export the nearest GPT-2 if GPT-2 cannot represent the model
    dataset: str = ""  # measure on this data set instead of the run's (same tokenizer)
    license: str = "unknown"  # for the card: mit, apache-2.0, cc-by-4.0 ...
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto; for the measurement


def main() -> None:
    config, _ = load_config(ExportConfig, sys.argv[1:])
    source, to = config.out_dir, new_path(config.to)
    checkpoint = read_checkpoint(source)
    device = pick_device(config.device)
    model = checkpoint.model(device)
    unsupported = unsupported_features(model)
    if unsupported and not config.approximate:
        raise UserError(
            f"GPT-2 cannot represent {' or '.join(unsupported)} of {source}; "
            "--approximate exports the nearest GPT-2 and measures the difference"
        )
    tokenizer = checkpoint.tokenizer()
    file = validation_split(config, checkpoint.dataset, model)
    if unsupported and file is None:
        raise UserError(
            "--approximate measures the difference, but the run's data set is not here; "
            "add --dataset=NAME"
        )

    with new_folder(to) as folder:
        write_model(folder, nearest_gpt2(model), tokenizer.eot)
        write_tokenizer(folder, tokenizer, model.config.block_size)
        exported = load_model(folder, device)
        difference = largest_difference(model, exported)
        if not unsupported and not difference <= TOLERANCE:
            raise UserError(
                f"the export's log-probabilities differ from those of {source} by up to "
                f"{difference:.1e} nats; nothing is exported: please report this"
            )
        found = comparison(unsupported, difference)
        nlls = {}
        if file:
            original, nll = nll_of(model, file), nll_of(exported, file)
            nlls[file.path.parent.name] = nll
            found += f"\n\nOn the validation split it has {nll:.4f} nats per token, the original "
            found += f"{original:.4f}."
        card = model_card(to.name, model, checkpoint.about, found, config.license, nlls)
        (folder / "README.md").write_text(card, encoding="utf-8")

    print(found)
    print(f"\ntransformers.GPT2LMHeadModel.from_pretrained({config.to!r}) loads it")


def new_path(to: str) -> Path:
    """Check that a new folder can be made at this path."""
    if not to:
        raise UserError("give --to=FOLDER, a new folder")
    path = Path(to).resolve()  # follows links
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{to} exists and is never overwritten; give another --to")
    check_writable(path.parent, "to")
    return path


def validation_split(config: ExportConfig, own: str | None, model: GPT) -> TokenFile | None:
    """The split of --dataset, or of the run's own data set if it is on this machine."""
    dataset = config.dataset or own
    if not dataset or not config.dataset and "val" not in splits_in(dataset_folder(dataset)):
        return None
    check_tokenizer(config.out_dir, dataset_folder(dataset))
    file = TokenFile(dataset, "val")
    file.check(model.config.vocab_size)
    return file


@torch.no_grad()
def largest_difference(model: GPT, exported: GPT) -> float:
    """The largest difference of log-probabilities on random token ids; nan if one is nan."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (1, model.config.block_size), generator=generator)
    idx = idx.to(model.transformer.wte.weight.device)
    return (model.log_probs(idx) - exported.log_probs(idx)).abs().max().item()


def nll_of(model: GPT, file: TokenFile) -> float:
    """The mean nll of about N_TOKENS tokens, in evenly spaced blocks."""
    processes = Processes(model.transformer.wte.weight.device)
    block_size = model.config.block_size
    batches = windows(file, block_size, 8, limit=max(1, N_TOKENS // block_size))
    return evaluate(model, batches, processes).mean("nll")


if __name__ == "__main__":
    run_main(main)
