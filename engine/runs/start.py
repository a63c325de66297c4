"""Start a run: from scratch, from pretrained weights, or from a checkpoint."""

import contextlib
import os
import platform
import shlex
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path

import torch

from engine.base.distributed import Processes
from engine.base.errors import UserError
from engine.base.files import check_writable, exclusive_lock, write_json
from engine.base.options import build, flatten
from engine.data.batches import Batches
from engine.data.labels import LabelFile
from engine.data.tokenizer import read_meta
from engine.data.tokens import TokenFile, dataset_folder
from engine.gpt2.loading import load_state
from engine.runs import checkpoint
from engine.runs.banner import banner, code_line, earlier_starts, this_start
from engine.runs.finetune import from_weights
from engine.runs.logger import Logger, forget_after
from model import GPT

# options of a launch, not of the run: a checkpoint does not bring them back
PER_LAUNCH = {"out_dir", "init_from", "allow_change", "eval_only", "backend", "device"}
PER_LAUNCH |= {"hang_timeout"}
# options that make another model, which a checkpoint does not fit
SHAPE = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "qkv_bias", "bayes_mlp"}
SHAPE |= {"weights", "likelihood", "posterior", "tie_head", "logit_bias"}
LAUNCH = ".launch"  # a file in out_dir: which torchrun trains there


def prepare_run(config, given: Set[str], processes: Processes):
    """Returns (config, data, model, state): the options as they hold for this run, the token files
    of both splits, the model on the CPU, and the checkpoint to resume from, {} for a new run.

    given: the names of the options that the user set.
    """
    out_dir = Path(config.out_dir)
    init_from = processes.broadcast(resolve_init_from(out_dir, config.init_from))
    state = {}
    if init_from == "resume":
        state = checkpoint.read_newest(out_dir)
        config = resumed_config(config, state, given)
    elif checkpoint.list_checkpoints(out_dir):
        raise UserError(
            f"{out_dir} already holds a run; add --init_from=resume, or give another --out_dir"
        )

    data = {split: TokenFile(config.dataset, split) for split in ("train", "val")}
    if state:
        check_data(data, state, out_dir)
        model = GPT(config.model)
        load_state(model, state["model"])
    else:
        torch.manual_seed(config.seed)
        n_data = config.model.head.n_data or len(data["train"])
        head = replace(config.model.head, n_data=n_data)
        config = replace(config, model=replace(config.model, head=head))
        if init_from == "scratch":
            model = from_scratch(config, data["train"])
        else:
            model = from_weights(config, init_from, data["train"], given)

    config = replace(config, model=model.config)
    for file in data.values():
        file.check(config.model.vocab_size, config.model.block_size)
    return config, data, model, state


def resolve_init_from(out_dir: Path, init_from: str) -> str:
    """auto means resume if there is a checkpoint, else scratch.

    A run that torchrun restarts resumes its own checkpoints, whatever init_from says.
    """
    launch, file = launch_id(), out_dir / LAUNCH
    restarted = launch and file.is_file() and file.read_text() == launch
    if (init_from == "auto" or restarted) and checkpoint.list_checkpoints(out_dir):
        return "resume"
    return "scratch" if init_from == "auto" else init_from


def launch_id() -> str:
    """Which torchrun started this process: the same text in all that it starts on this machine."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{platform.node()} {os.getppid()} {run_id}" if run_id else ""


def from_scratch(config, file: TokenFile) -> GPT:
    """A new model for this training split."""
    vocab_size = config.model.vocab_size or file.vocab_size
    model = GPT(replace(config.model, vocab_size=vocab_size))
    model.lm_head.init_from_frequencies(file.frequencies(vocab_size))
    return model


def resumed_config(config, state: dict, given: Set[str]):
    """The run's own options, except those that are given now. Another model is refused."""
    out_dir = config.out_dir
    if not {"model_config", "optimizer"} <= state.keys():
        raise UserError(
            f"{out_dir} holds weights without the state of their training; start from the weights: "
            f"--init_from={out_dir} --out_dir=ANOTHER"
        )
    now, before = flatten(config), options_of(config, state)
    for name in sorted(SHAPE & given):
        if now[name] != before[name]:
            raise UserError(
                f"{name} = {now[name]!r}, but the run to resume has {before[name]!r}; "
                f"leave {name} out, or give another --out_dir"
            )
    now |= {name: before[name] for name in now.keys() - PER_LAUNCH - given}
    if state["step"] > now["max_iters"]:
        raise UserError(
            f"{out_dir} is at step {state['step']} already, beyond max_iters = {now['max_iters']}"
        )
    return build(type(config), now)


def options_of(config, state: dict) -> dict:
    """The options of a checkpoint's run; the defaults of those that are newer than it."""
    return flatten(type(config)()) | state["config"]


def changed_options(config, state: dict) -> str:
    """A line that names what is not as it was in the checkpoint."""
    now, before = flatten(config), options_of(config, state)
    names = [name for name in now if name not in PER_LAUNCH and now[name] != before[name]]
    return ", ".join(f"{name} = {now[name]!r} (was {before[name]!r})" for name in names)


def check_data(data: dict[str, TokenFile], state: dict, out_dir: Path) -> None:
    """Refuse to resume on other tokens than the run was trained and evaluated on."""
    for split, recorded in state.get("data", {}).items():
        if not data[split].matches(recorded):
            raise UserError(
                f"{data[split].path} holds other tokens than the run to resume; bring those back, "
                f"or start from its weights: --init_from={out_dir} --out_dir=ANOTHER"
            )


def training_batches(config, file: TokenFile, state: dict) -> Batches:
    """The micro-batches of the training split, with a teacher's labels if the options name some."""
    labels = None
    is_sigmoid = config.model.head.likelihood == "sigmoid"
    if config.label_mode == "set" and not (config.labels and is_sigmoid):
        raise UserError("label_mode = 'set' needs --labels=NAME and --likelihood=sigmoid")
    if config.labels:
        labels = LabelFile(file, config.labels, config.label_mode, config.label_weight)
        labels.check(config.model.vocab_size)
        if state.get("labels", labels.about) != labels.about:
            raise UserError(
                f"{labels.path} does not hold the labels that the run to resume was trained on; "
                "bring those back, or give another --out_dir"
            )
    return Batches(file, config.batch_size, config.model.block_size, config.seed, labels)


def describe_run(config, data: dict[str, TokenFile], batches: Batches) -> dict:
    """What a checkpoint says of its run: options, and which data it was trained on."""
    about = {
        "config": flatten(config),
        "model_config": flatten(config.model),
        "data": {split: file.fingerprint for split, file in data.items()},
    }
    if batches.labels:
        about["labels"] = batches.labels.about
    return about


@contextlib.contextmanager
def open_run(
    config,
    data: dict[str, TokenFile],
    processes: Processes,
    model: GPT,
    dtype: str,
    progress,
    state: dict,
) -> Iterator[Logger]:
    """Make the run's folder, write its options and code there, and print what the run is.

    Only one process at a time may train in a folder.
    """
    out_dir, meta = Path(config.out_dir), data["train"].meta
    start = this_start(processes, progress.step)
    before = earlier_starts(out_dir) if progress.step else []
    n_blocks = config.gradient_accumulation_steps * config.batch_size
    tokens_per_step = n_blocks * config.model.block_size
    lines = banner(config, processes, model, dtype, len(data["train"]), progress.step)
    lines.append(code_line(start))
    if state and (changed := changed_options(config, state)):
        lines.append(f"changed since the checkpoint: {changed}")
    if meta is None:
        lines.append(f"{config.dataset} has no meta.json: its tokens are taken for GPT-2's")
    with contextlib.ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(locked_folder(out_dir))
            if not (state and config.eval_only):  # an evaluation only adds a record
                write_config(config, meta, [*before, start])
        log = Logger(
            out_dir, processes, tokens_per_step, model.flops_per_token(), progress, config.max_iters
        )
        stack.callback(log.close)
        for line in lines:
            log.say(line)
        if config.wandb_log:
            n_params = sum(p.numel() for p in model.parameters())
            log.start_wandb(out_dir, **wandb_options(config, start, n_params))
        yield log
        if not config.eval_only:
            log.say(ending(config, progress))


@contextlib.contextmanager
def locked_folder(out_dir: Path) -> Iterator[None]:
    """Make the folder, and let no other process train there."""
    check_writable(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    busy = f"another process is training in {out_dir}; end it first, or give another --out_dir"
    with exclusive_lock(out_dir / ".lock", busy):
        (out_dir / LAUNCH).write_text(launch_id())
        for file in out_dir.glob("*.*.[0-9]*.tmp"):  # left by a run that was killed
            file.unlink()
        yield


def write_config(config, meta: dict | None, starts: list[dict]) -> None:
    """Write the tokenizer, and config.json with all starts of the run. Records that the run will
    write again are dropped."""
    out_dir, folder = Path(config.out_dir), dataset_folder(config.dataset)
    checkpoint.copy_tokenizer(folder, out_dir)
    if meta and read_meta(folder) is None:  # from the headers of the token files
        write_json(out_dir / "meta.json", meta)
    start = starts[-1]
    environment = {name: start[name] for name in start if name not in ("step", "diff")}
    contents = flatten(config) | {"environment": environment, "starts": starts}
    write_json(out_dir / "config.json", contents)
    forget_after(out_dir / "metrics.jsonl", start["step"])


def wandb_options(config, start: dict, n_params: int) -> dict:
    """How wandb files a run: grouped by its data, with its head as the job type."""
    head, out_dir = config.model.head, Path(config.out_dir)
    return {
        "project": config.wandb_project,
        "name": config.wandb_run_name or "/".join(out_dir.parts[-2:]).removeprefix("out/"),
        "group": Path(config.dataset).name,
        "job_type": f"{head.weights} x {head.likelihood}",
        "tags": [head.weights, head.likelihood, f"{n_params / 1e6:.3g}M"],
        "config": flatten(config) | {"environment": start},
    }


def ending(config, progress) -> str:
    """A run's last line: its best checkpoint, and how to sample from that."""
    best = f"best val nll {progress.best_val_nll:.4f} at step {progress.best_step}"
    if progress.step < config.max_iters:
        best = f"no lower val nll in {config.patience} evaluations: stopped; {best}"
    path = Path(config.out_dir) / checkpoint.name_of(progress.best_step)
    if path.is_file():
        newest = checkpoint.list_checkpoints(path.parent)[-1] == path
        out_dir = shlex.quote(f"--out_dir={path.parent if newest else path}")
        return f"{best}: python sample.py {out_dir}"
    if progress.step:  # the best are the weights that training began with
        return f"{best}: training made it worse, try a lower --learning_rate"
    return best
