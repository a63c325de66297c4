"""Start a run: from scratch, from pretrained weights, or from a checkpoint."""

import contextlib
import shlex
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path

import torch

from engine.base.distributed import Processes
from engine.base.errors import UserError
from engine.base.files import check_writable, exclusive_lock, read_json, write_json
from engine.base.options import build, flatten
from engine.data.tokens import TokenFile, dataset_folder
from engine.gpt2.loading import load_state
from engine.runs import checkpoint
from engine.runs.banner import banner, this_start
from engine.runs.finetune import from_weights
from engine.runs.fit import check_text
from engine.runs.logger import Logger, forget_after
from model import GPT

# options of a start, not of the run: a checkpoint does not restore them
PER_LAUNCH = {"out_dir", "init_from", "eval_only", "backend", "device", "hang_timeout"}
# options of the model and the optimizer, which must be those of the checkpoint
FIXED = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "bayes_mlp"}
FIXED |= {"weights", "likelihood", "posterior", "tie_head", "logit_bias", "optimizer"}


def prepare_run(config, given: Set[str], processes: Processes):
    """Returns (config, data, model, state): the options of this run, the token file of each split,
    the model on the CPU, and the checkpoint to resume from ({} for a new run).

    given: the names of the options that the user set.
    """
    out_dir = Path(config.out_dir)
    saved = checkpoint.list_checkpoints(out_dir)
    init_from = config.init_from
    if init_from == "auto":
        init_from = processes.broadcast("resume" if saved else "scratch")
    state = {}
    if init_from == "resume":
        state = checkpoint.read_newest(out_dir)
        config, changes = resumed_config(config, state, given)
        if changes and processes.is_main:
            print(f"changed since the checkpoint: {', '.join(changes)}")
    elif saved:
        raise UserError(
            f"{out_dir} already holds a run; add --init_from=resume, or give another --out_dir"
        )

    old = None
    if init_from not in ("scratch", "resume"):
        old = checkpoint.read_checkpoint(init_from)
        if old.dataset and "dataset" not in given:  # the run's own data
            config = replace(config, dataset=old.dataset)
    data = {split: TokenFile(config.dataset, split) for split in ("train", "val")}
    if state:
        check_data(data, state, out_dir)
        model = GPT(config.model)
        load_state(model, state["model"])
    else:
        model = new_model(config, old, data["train"], given)
    config = replace(config, model=model.config)
    if config.model.head.is_kron:
        check_text(config.model.n_embd, data["train"])
    for file in data.values():
        file.check(config.model.vocab_size, config.model.block_size)
    return config, data, model, state


def new_model(config, old: checkpoint.Checkpoint | None, file: TokenFile, given: Set[str]) -> GPT:
    """The initial model of a run, from the weights of `old` or from scratch.

    file: the training split."""
    torch.manual_seed(config.seed)
    n_data = config.model.head.n_data or len(file)
    config = build(type(config), flatten(config) | {"n_data": n_data})
    if old:
        return from_weights(config, old, file, given)
    vocab_size = config.model.vocab_size or file.vocab_size
    model = GPT(replace(config.model, vocab_size=vocab_size))
    model.lm_head.init_from_frequencies(file.frequencies(vocab_size))
    return model


def resumed_config(config, state: dict, given: Set[str]):
    """Returns the run's options, with those that the user gave now, and a list of the changes.

    Refuses to change the options in FIXED.
    """
    out_dir = config.out_dir
    if not {"model_config", "optimizer"} <= state.keys():
        raise UserError(
            f"{out_dir} holds weights without an optimizer; start a new run from these weights: "
            f"--init_from={out_dir} --out_dir=ANOTHER"
        )
    options = flatten(config)
    # an option that did not exist when the run started has its default
    before = flatten(type(config)()) | state["config"]
    changes = []
    for name in sorted(options.keys() - PER_LAUNCH):
        if name not in given:
            options[name] = before[name]
        elif options[name] != before[name]:
            changes.append(f"{name} = {options[name]!r} (was {before[name]!r})")
            if name in FIXED:
                raise UserError(
                    f"{changes[-1]} cannot change on resuming; omit --{name}, "
                    "or give another --out_dir"
                )
    if state["step"] > options["max_iters"]:
        raise UserError(
            f"{out_dir} is already at step {state['step']}, beyond "
            f"max_iters = {options['max_iters']}; give a larger --max_iters"
        )
    return build(type(config), options), changes


def check_data(data: dict[str, TokenFile], state: dict, out_dir: Path) -> None:
    """Refuse to resume with other data than the run's."""
    for split, recorded in state.get("data", {}).items():
        if not data[split].matches(recorded):
            raise UserError(
                f"{data[split].path} differs from the data of the run to resume; restore the "
                "data, or start a new run from its weights: "
                f"--init_from={out_dir} --out_dir=ANOTHER"
            )


@contextlib.contextmanager
def open_run(
    config, data: dict[str, TokenFile], processes: Processes, model: GPT, dtype: str, progress
) -> Iterator[Logger]:
    """Make the run's folder, write its options there, and print a description of the run.

    Only one run at a time may train in a folder.
    """
    out_dir, meta = Path(config.out_dir), data["train"].meta
    start = this_start(processes, progress.step)
    path = out_dir / "config.json"
    is_resumed = progress.step and path.is_file()
    before = read_json(path).get("starts", []) if is_resumed else []
    n_blocks = config.gradient_accumulation_steps * config.batch_size
    tokens_per_step = n_blocks * config.model.block_size
    with contextlib.ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(locked_folder(out_dir))
            # evaluating a run again only adds a record
            if not (progress.step and config.eval_only):
                checkpoint.copy_tokenizer(dataset_folder(config.dataset), meta, out_dir)
                facts = flatten(config) | {"starts": [*before, start]}
                write_json(path, facts)
                forget_after(out_dir / "metrics.jsonl", progress.step)
        log = Logger(
            out_dir, processes, tokens_per_step, model.flops_per_token(), progress, config.max_iters
        )
        stack.callback(log.close)
        for line in banner(config, processes, model, dtype, len(data["train"]), progress.step):
            log.say(line)
        if meta is None:
            log.say(f"{config.dataset} has no meta.json: assuming GPT-2's tokens")
        if config.wandb_log:
            name = config.wandb_run_name or "/".join(out_dir.parts[-2:])
            log.start_wandb(
                out_dir, project=config.wandb_project, name=name, config=flatten(config)
            )
        stack.enter_context(processes.watch.watching())
        yield log
        if not config.eval_only:
            log.say(ending(config, progress))


@contextlib.contextmanager
def locked_folder(out_dir: Path) -> Iterator[None]:
    """Make the folder and lock it against other runs."""
    check_writable(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    busy = f"another process is training in {out_dir}; end it first, or give another --out_dir"
    with exclusive_lock(out_dir / ".lock", busy):
        for file in out_dir.glob("*.*.[0-9]*.tmp"):  # of a run that was killed
            file.unlink()
        yield


def ending(config, progress) -> str:
    """A run's last line: its best checkpoint, and the command that samples from it."""
    best = f"best val nll {progress.best_val_nll:.4f} at step {progress.best_step}"
    if progress.step < config.max_iters:
        best = f"stopped: no lower val nll in {config.patience} evaluations; {best}"
    path = Path(config.out_dir) / checkpoint.name_of(progress.best_step)
    if path.is_file():
        return f"{best}: python sample.py {shlex.quote(f'--out_dir={path}')}"
    return best
