"""How a run begins: afresh, from weights, or where a checkpoint left it; what may be another then, and what not."""

import contextlib
import difflib
import os
import platform
import shlex
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path

import torch

from engine.base.distributed import Processes
from engine.base.errors import UserError, warn
from engine.base.files import check_writable, exclusive_lock, write_json
from engine.base.options import build, flatten
from engine.data.batches import Batches
from engine.data.labels import LabelFile
from engine.data.tokenizer import read_meta
from engine.data.tokens import TokenFile, dataset_folder
from engine.gpt2.loading import load_state
from engine.runs import checkpoint
from engine.runs.banner import banner, code_line, earlier_starts, this_start
from engine.runs.finetune import on_weights
from engine.runs.logger import Logger, forget_after
from model import GPT

# what belongs to this start of a run, not to the run
HERE = {"out_dir", "init_from", "allow_change", "eval_only", "backend", "device", "hang_timeout"}
# what may change in the middle, and stays as it was where it is not given: how long, how, with which reports it runs
FREE = {
    "max_iters",
    "eval_interval",
    "eval_iters",
    "log_interval",
    "save_interval",
    "always_save_checkpoint",
}
FREE |= {
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "gradient_checkpointing",
    "dtype",
    "compile",
    "sharding",
}
FREE |= {"patience"}
FREE |= {"dataset"}  # what counts is what is in it, see check_data
LAUNCH = ".launch"  # a file in out_dir: which torchrun trains there
FROM_DATA = ("vocab_size", "n_data")  # 0 there asks for the data's own


def start(config, given: Set[str], processes: Processes):
    """(config, data, model, state): the config as it holds for this run, the token files of both splits, checked; the
    model, on the CPU; and the checkpoint that the run goes on from, {} where it begins. given: the options named on
    purpose."""
    out_dir = Path(config.out_dir)
    init_from = processes.broadcast(how_to_begin(out_dir, config.init_from))
    state = checkpoint.read_newest(out_dir) if init_from == "resume" else {}
    if state:
        config = resumed(config, state, given)
    elif checkpoint.exists(out_dir):
        raise UserError(
            f"{out_dir} already holds a run; go on with --init_from=resume, or give another --out_dir"
        )
    data = {split: TokenFile(config.dataset, split) for split in ("train", "val")}
    if state:
        model = GPT(config.model)
        load_state(model, state["model"])
    else:
        model = begin(config, init_from, data["train"], given)
    config = replace(config, model=model.config)
    for file in data.values():
        file.check(config.model.vocab_size, config.model.block_size)
    if state:
        check_data(data, state, allowed_changes(config))
    return config, data, model, state


def how_to_begin(out_dir: Path, init_from: str) -> str:
    """auto: resume, if there is a run. What this very torchrun has begun, and starts anew, is resumed too."""
    ours, mark = _launch(), out_dir / LAUNCH
    if init_from == "auto" or (ours and mark.is_file() and mark.read_text() == ours):
        return (
            "resume"
            if checkpoint.exists(out_dir)
            else "scratch"
            if init_from == "auto"
            else init_from
        )
    return init_from


def _launch() -> str:
    """Which torchrun has started this process; the same for all that it starts on this machine."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{platform.node()} {os.getppid()} {run_id}" if run_id else ""


def begin(config, init_from: str, data: TokenFile, given: Set[str]) -> GPT:
    """A model at its start: from scratch, or from the weights of a run or of GPT-2 with a head of these options."""
    torch.manual_seed(config.seed)
    head = replace(config.model.head, n_data=config.model.head.n_data or len(data))
    if init_from == "scratch":
        model = GPT(
            replace(config.model, vocab_size=config.model.vocab_size or data.vocab_size, head=head)
        )
        data.check(model.config.vocab_size)
        model.lm_head.init_from_frequencies(data.frequencies(model.config.vocab_size))
        return model
    return on_weights(config, init_from, head, data, given)


def resumed(config, state: dict, given: Set[str]):
    """The config to go on with: the run's own, but for what is said now and may change."""
    out_dir = config.out_dir
    if checkpoint.PARTS.keys() - state.keys():
        what = (
            "a nanoGPT checkpoint"
            if "model_args" in state
            else "a model without the state of its training"
        )
        raise UserError(f"{out_dir} holds {what}; start from its weights: --init_from={out_dir}")
    now, before = (
        flatten(config),
        flatten(type(config)()) | state["config"],
    )  # of an older version: its defaults
    allowed = allowed_changes(config)
    for name in allowed - now.keys():
        close = difflib.get_close_matches(name, now, 1)
        raise UserError(
            f"allow_change: unknown option {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    said = {
        name for name in given - HERE & before.keys() if not (name in FROM_DATA and now[name] == 0)
    }
    now |= {name: before[name] for name in now.keys() & before.keys() - HERE - said}
    ends = [values["lr_decay_iters"] or values["max_iters"] for values in (before, now)]
    changed = {name for name in said - FREE - allowed if now[name] != before[name]}
    for name in sorted(changed - ({"lr_decay_iters"} if ends[0] == ends[1] else set())):
        raise UserError(
            f"{name} = {now[name]!r}, but the run to resume has {before[name]!r}; leave it so, use another --out_dir, "
            f"or change it on purpose with --allow_change={','.join(sorted(allowed | {name}))}"
        )
    if now["decay_lr"] and ends[0] != ends[1]:
        warn(
            f"the learning rate decays to step {ends[1]} now, not {ends[0]} (--lr_decay_iters={ends[0]} keeps it)"
        )
    if state["step"] > now["max_iters"]:
        raise UserError(
            f"{out_dir} is at step {state['step']} already, beyond max_iters = {now['max_iters']}"
        )
    checkpoint.check_tokenizer(out_dir, dataset_folder(now["dataset"]))
    return build(type(config), now)


def allowed_changes(config) -> set[str]:
    return {name for name in config.allow_change.replace(" ", "").split(",") if name}


def check_data(data: dict[str, TokenFile], state: dict, allowed: Set[str]) -> None:
    """Refuse to resume on other tokens than the run was trained and evaluated on."""
    for split, sha256 in state.get("data", {}).items():
        if not data[split].matches(sha256) and "dataset" not in allowed:
            raise UserError(
                f"{data[split].path} holds other tokens than the run to resume began with; bring those back, use "
                "another --out_dir, or change them on purpose with --allow_change=dataset"
            )


def training_batches(config, file: TokenFile, state: dict) -> Batches:
    """The micro-batches of the training split, with teacher labels where the options name some.

    state: the checkpoint that the run goes on from; its labels must be the same ones."""
    labels = None
    if config.label_mode == "set" and not config.labels:
        raise UserError("label_mode = 'set' needs --labels=NAME")
    if config.labels:
        if config.label_mode == "set" and config.model.head.likelihood != "sigmoid":
            raise UserError(
                "label_mode = 'set' needs --likelihood=sigmoid: labels of another likelihood sum to 1"
            )
        labels = LabelFile(file, config.labels, config.label_mode, config.label_weight)
        labels.check(config.model.vocab_size)
        if (
            state
            and state.get("labels") != labels.about
            and "labels" not in allowed_changes(config)
        ):
            raise UserError(
                f"{labels.path} was made anew since the run to resume began; use another --out_dir, or go on with it "
                "on purpose with --allow_change=labels"
            )
    return Batches(file, config.batch_size, config.model.block_size, config.seed, labels)


def describe(config, data: dict[str, TokenFile], batches: Batches) -> dict:
    """What a checkpoint says of its run: options, seeds among them, and the data by their hashes."""
    labels = {"labels": batches.labels.about} if batches.labels else {}
    hashes = {split: file.fingerprint for split, file in data.items()}
    return {
        "config": flatten(config),
        "model_config": flatten(config.model),
        "data": hashes,
    } | labels


@contextlib.contextmanager
def open_run(
    config,
    data: dict[str, TokenFile],
    processes: Processes,
    model: GPT,
    how: tuple[str, str],
    progress,
) -> Iterator[Logger]:
    """Make the run's folder, write down what the run is, and say it. One process at a time may train in a folder.

    how: the dtype, and compiled or eager, as Processes.wrap says it."""
    out_dir, meta = Path(config.out_dir), data["train"].meta
    start = this_start(processes, progress.step)
    before = earlier_starts(out_dir) if progress.step else []
    tokens_per_step = (
        config.gradient_accumulation_steps * config.batch_size * config.model.block_size
    )
    with contextlib.ExitStack() as stack:
        if processes.is_main:
            _take(out_dir, stack)
            if not (
                progress.step and config.eval_only
            ):  # to evaluate a run adds a record and leaves all else as it is
                _write_down(config, meta, [*before, start])
        log = Logger(
            out_dir, processes, tokens_per_step, model.flops_per_token(), progress, config.max_iters
        )
        stack.callback(log.close)
        for line in (
            *banner(config, processes, model, how, len(data["train"]), progress.step),
            code_line(start, before),
        ):
            log.say(line)
        if meta is None:
            log.say(
                f"{config.dataset} has no meta.json and no meta.pkl: its tokens are taken for GPT-2's BPE"
            )
        if processes.is_main and checkpoint.lacks_bpe(out_dir):
            log.say(
                f"tiktoken has not fetched GPT-2's BPE, so {out_dir} goes without; sample.py will fetch it"
            )
        if config.wandb_log:
            n_params = sum(p.numel() for p in model.parameters())
            log.start_wandb(out_dir, **wandb_options(config, start, n_params))
        yield log
        if not config.eval_only:
            log.say(ending(config, progress))


def _take(out_dir: Path, stack: contextlib.ExitStack) -> None:
    """Make the folder, and keep others from training there until the stack is closed."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {out_dir}: {error.strerror}; give another --out_dir"
        ) from None
    check_writable(out_dir)
    busy = f"another process is training in {out_dir}; end it first, or give another --out_dir"
    stack.enter_context(exclusive_lock(out_dir / ".lock", busy))
    (out_dir / LAUNCH).write_text(_launch())
    for left_by_a_killed_run in out_dir.glob("*.*.[0-9]*.tmp"):
        left_by_a_killed_run.unlink()


def _write_down(config, meta: dict | None, starts: list[dict]) -> None:
    """Write the tokenizer, and config.json with all starts of the run; drop records that will be written again."""
    out_dir, folder = Path(config.out_dir), dataset_folder(config.dataset)
    checkpoint.copy_tokenizer(folder, out_dir)
    if meta and read_meta(folder) is None:  # known by the files' headers alone
        write_json(out_dir / "meta.json", meta)
    start = starts[-1]
    environment = {name: start[name] for name in start if name not in ("step", "diff")}
    about = {"environment": environment, "starts": starts}
    write_json(out_dir / "config.json", flatten(config) | about)
    forget_after(out_dir / "metrics.jsonl", start["step"])


def wandb_options(config, start: dict, n_params: int) -> dict:
    """How wandb files a run: with those on the same text, by its head."""
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
    """Why a run ended where it did, and how to sample from its best checkpoint."""
    why = (
        f"no lower val nll in {config.patience} evaluations: stopped; "
        if progress.step < config.max_iters
        else ""
    )
    best = f"{why}best val nll {progress.best_val_nll:.4f} at step {progress.best_step}"
    path = Path(config.out_dir) / checkpoint.name_of(progress.best_step)
    if not path.is_file():  # the weights that it began with are kept where they came from
        return best + (
            ": training made it worse, try a lower --learning_rate" if progress.step else ""
        )
    newest = checkpoint.all_in(path.parent)[-1] == path
    return f"{best}: python sample.py {shlex.quote(f'--out_dir={path.parent if newest else path}')}"
