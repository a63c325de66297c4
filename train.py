"""Train a GPT. This file is the loop; by itself it trains the softmax baseline, the other train_*.py name another head.

    python train.py config/quickstart.py                                          one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py        one machine with 8 GPUs
    python train.py config/train_shakespeare_char.py --device=cpu --compile=False --max_iters=200

Data, dropout and noise of micro-batch i depend on (seed, i) alone: evaluating or logging more often never changes
training, and a resumed run or one on more processes repeats the run of a single process.
"""

import json
import math
import sys
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine import checkpoint, distributed
from engine.config import build, flatten, load_config
from engine.errors import MANY, UserError, check_memory, check_ranges, run
from engine.evaluation import eval_batches, mean_loss
from engine.labels import MODES, LabelFile
from engine.logger import Logger, environment, forget_after
from engine.optim import adamw, set_learning_rate
from engine.pretrained import load_state
from engine.tokenizer import read_meta
from engine.tokens import Batches, TokenFile, dataset_folder
from model import GPT, GPTConfig

RANGES = {name: (1, MANY) for name in ("eval_interval", "log_interval", "eval_iters", "batch_size")}
RANGES |= {name: (0, MANY) for name in ("save_interval", "max_iters", "warmup_iters", "lr_decay_iters")}
RANGES |= {name: (0.0, 1e3) for name in ("learning_rate", "min_lr", "weight_decay")}
RANGES |= {"gradient_accumulation_steps": (1, 10**9), "grad_clip": (0.0, 1e9), "label_weight": (0.0, 1.0)}
RANGES |= {"seed": (0, (1 << 63) - 1)}


@dataclass(frozen=True)
class TrainConfig:
    """Names, meanings and defaults are nanoGPT's wherever nanoGPT has the option."""

    out_dir: str = "out"  # the run's folder: checkpoints, metrics.jsonl, config.json
    eval_interval: int = 2000  # steps between evaluations; the last step always has one
    log_interval: int = 1  # steps between training records
    eval_iters: int = 200  # batches of the validation split in an evaluation, the same ones each time
    eval_only: bool = False  # evaluate once and end
    always_save_checkpoint: bool = True  # False: save only when the validation nll is the lowest yet
    save_interval: int = 0  # steps between checkpoints; 0: as eval_interval
    init_from: str = (
        "scratch"  # scratch | resume | auto: resume if there is a checkpoint | gpt2* | a run or GPT-2 folder
    )
    seed: int = 1337  # of weights, data order, dropout and noise
    wandb_log: bool = False  # log to Weights & Biases as well (offline without an account)
    wandb_project: str = "owt"  # project name there
    wandb_run_name: str = "gpt2"  # run name there
    dataset: str = "openwebtext"  # a folder in data/, or the path of a folder with train.bin and val.bin
    labels: str = ""  # teacher labels to train on, by their --name in augmentation/teacher_labels.py
    label_mode: str = "soft"  # soft: the teacher shares in the true token's label | set: all are labels of 1 (sigmoid)
    label_weight: float = 0.5  # soft: the teacher's share where there are labels, in [0, 1]
    gradient_accumulation_steps: int = 40  # micro-batches in a step, counted over all processes
    batch_size: int = 12  # blocks in a micro-batch; lower it when memory runs out, and accumulate more
    model: GPTConfig = GPTConfig()
    learning_rate: float = 6e-4  # peak; small models take more: 1e-3 and above
    max_iters: int = 600000  # steps in all
    weight_decay: float = 1e-1  # on matrices and embeddings alone
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # AdamW's memory of its square; 0.99 where a step has few tokens
    grad_clip: float = 1.0  # clip the gradient's norm; 0 does not
    decay_lr: bool = True  # False: a constant learning rate
    warmup_iters: int = 2000  # steps of linear warm-up, of the learning rate and of a Bayesian head's KL
    lr_decay_iters: int = 0  # steps to decay over; 0: max_iters
    min_lr: float = 6e-5  # where the cosine ends; about learning_rate / 10
    backend: str = "auto"  # of torch.distributed: nccl | gloo | auto: nccl on CUDA, else gloo
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto: the best there is
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto: bfloat16 where the hardware is fast at it
    compile: bool = torch.cuda.is_available()  # torch.compile: starts a minute later; on a CPU it pays at 50,000 ids

    def __post_init__(self):
        check_ranges(self, RANGES)
        n_bytes = 2 * self.batch_size * self.model.block_size * self.model.n_embd  # of one hidden state of many
        check_memory(n_bytes, f"a micro-batch of batch_size = {self.batch_size}", "lower it, and accumulate more")
        if not self.out_dir:
            raise UserError("out_dir is empty; name a folder for the run")
        if self.label_mode not in MODES:
            raise UserError(f"label_mode = {self.label_mode!r} is not one of: {', '.join(MODES)}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"beta1 = {self.beta1} and beta2 = {self.beta2} must lie in [0, 1)")


def main(**fixed: str) -> None:
    """Run train() with the options of the command line; fixed: what a variant's script decides."""

    def from_command_line():
        config, given = load_config(TrainConfig, sys.argv[1:], fixed)
        with distributed.start(config.device, config.backend) as processes:
            train(config, processes, given | set(fixed))

    run(from_command_line)


def train(config: TrainConfig, processes: distributed.Processes, given: Set[str] = frozenset()) -> GPT:
    """Train until max_iters and return the model; given: the options that were set on purpose."""
    device, n_micro = processes.device, config.gradient_accumulation_steps
    distributed.check_accumulation(n_micro, processes.world_size)
    cast, dtype = distributed.autocast(device, config.dtype)
    data = {split: TokenFile(config.dataset, split) for split in ("train", "val")}
    bare, state = start_model(config, data["train"], given)
    config = replace(config, model=bare.config)
    for file in data.values():
        file.check(config.model.vocab_size, config.model.block_size)
    optimizer = adamw(bare.to(device), config.learning_rate, (config.beta1, config.beta2), config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    for name, part in (("optimizer", optimizer), ("scaler", scaler)):
        if state:
            part.load_state_dict(state[name])
    first, best_step = state.get("step", 0), state.get("best_step", 0)
    best_val_nll = state.get("best_val_nll", math.inf)
    model, how = processes.wrap(bare, config.compile)
    batches = training_batches(config, data["train"], state)
    val_batches = eval_batches(data["val"], config.model.block_size, config.batch_size, config.eval_iters)
    mine = range(first * n_micro + processes.rank, config.max_iters * n_micro, processes.world_size)
    ahead = batches.prefetched(mine, device)
    log = open_log(config, processes, bare, f"{dtype}, {how}", first, state.get("seconds", 0.0))

    for step in range(first, config.max_iters + 1):
        bare.lm_head.kl_ramp.fill_(min(1.0, (step + 1) / (config.warmup_iters + 1)))
        last, improved = step == config.max_iters or config.eval_only, False
        if last or step % config.eval_interval == 0:
            with log.paused():
                scores = mean_loss(bare, val_batches, data["val"], processes, cast)
            refuse_non_finite(scores, step)
            log.evaluation(step, scores)
            improved = scores["val_nll"] < best_val_nll
            best_val_nll, best_step = (scores["val_nll"], step) if improved else (best_val_nll, best_step)
        due = (last or step % (config.save_interval or config.eval_interval) == 0) and config.always_save_checkpoint
        if processes.is_main and step > first and (due or improved) and not config.eval_only:
            progress = {"step": step, "best_val_nll": best_val_nll, "best_step": best_step, "seconds": log.seconds}
            with log.paused():
                checkpoint.save(Path(config.out_dir), snapshot(config, bare, optimizer, scaler, batches) | progress)
        if last:
            break

        lr = set_learning_rate(optimizer, step, config)
        loss = torch.zeros((), device=device)
        for micro in processes.share(n_micro):
            distributed.seed_micro_batch(config.seed, step * n_micro + micro)
            with processes.accumulate(model, last=micro + processes.world_size >= n_micro):
                with cast:
                    micro_loss = model(*next(ahead))
                # DDP averages over the processes, so each divides by the micro-batches of its own
                scaler.scale(micro_loss * (processes.world_size / n_micro)).backward()
            loss += micro_loss.detach() / n_micro
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(bare.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.log_interval == 0:
            log.training(step + 1, processes.sum(loss).item(), lr, grad_norm.item())
    log.close()
    return bare


def start_model(config: TrainConfig, data: TokenFile, given: Set[str]) -> tuple[GPT, dict]:
    """The model to train, on CPU, and the checkpoint that it goes on from ({} when it starts afresh)."""
    out_dir, init_from = Path(config.out_dir), config.init_from
    if init_from == "auto":
        init_from = "resume" if checkpoint.exists(out_dir) else "scratch"
    if init_from == "resume":
        state = checkpoint.read_newest(out_dir)
        if checkpoint.PARTS.keys() - state.keys():
            what = "a nanoGPT checkpoint" if "model_args" in state else "a model without the state of its training"
            raise UserError(f"{out_dir} holds {what}; start from its weights: --init_from={out_dir}")
        shape = checkpoint.resumed_config(build(GPTConfig, state["model_config"]), config.model, given)
        checkpoint.check_continuity(flatten(TrainConfig()) | state["config"], flatten(config))
        checkpoint.check_tokenizer(out_dir, dataset_folder(config.dataset))
        if state["step"] > config.max_iters:
            raise UserError(f"{out_dir} is at step {state['step']} already, beyond max_iters = {config.max_iters}")
        model = GPT(shape)
        load_state(model, state["model"])
        return model, state
    if checkpoint.exists(out_dir):
        raise UserError(f"{out_dir} already holds a run; go on with --init_from=resume, or give another --out_dir")
    torch.manual_seed(config.seed)
    head = replace(config.model.head, n_data=config.model.head.n_data or len(data))
    if init_from == "scratch":
        model = GPT(replace(config.model, vocab_size=config.model.vocab_size or data.vocab_size, head=head))
        data.check(model.config.vocab_size)
        model.lm_head.start_from(data.frequencies(model.config.vocab_size))
        return model, {}
    checkpoint.check_tokenizer(init_from, dataset_folder(config.dataset))
    shape, weights = checkpoint.read_weights(init_from)
    model = GPT(checkpoint.on_backbone(shape, replace(config.model, head=head), given))
    data.check(model.config.vocab_size)
    new = load_state(model, weights)  # what this head has beyond the old one
    if "lm_head.bias" in new and head.logit_bias == "unigram":
        raise UserError(
            "the weights to start from have no bias, and know frequencies already: give --logit_bias=uniform"
        )
    if any(name.endswith(".log_std") for name in new):
        model.start_posteriors(data.frequencies(model.config.vocab_size), only=new)
    return model, {}


def training_batches(config: TrainConfig, file: TokenFile, state: dict) -> Batches:
    """The micro-batches of the training split, with teacher labels where the options name some.

    state: the checkpoint that the run goes on from; its labels must be the same ones."""
    labels = None
    if config.label_mode == "set" and not config.labels:
        raise UserError("label_mode = 'set' needs --labels=NAME")
    if config.labels:
        if config.label_mode == "set" and config.model.head.likelihood != "sigmoid":
            raise UserError("label_mode = 'set' needs --likelihood=sigmoid: labels of another likelihood sum to 1")
        labels = LabelFile(file, config.labels, config.label_mode, config.label_weight)
        labels.check(config.model.vocab_size)
        if state and state.get("labels") != labels.about:
            raise UserError(f"{labels.path} was made anew since the run to resume began; use another --out_dir")
    return Batches(file, config.batch_size, config.model.block_size, config.seed, labels)


def refuse_non_finite(scores: dict[str, float], step: int) -> None:
    """Stop a training that has come to nothing."""
    for name, value in scores.items():
        if not math.isfinite(value):
            what = f"{name.replace('_', ' ')} is {value} at step {step}"
            raise UserError(f"{what}; try a lower --learning_rate or --grad_clip")


def snapshot(
    config: TrainConfig, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, batches: Batches
) -> dict:
    """What a checkpoint holds beside the run's progress: tensors and plain values."""
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    configs = {"model_config": flatten(config.model), "config": flatten(config)}
    labels = {"labels": batches.labels.about} if batches.labels else {}
    return {name: part.state_dict() for name, part in parts.items()} | configs | labels


def open_log(
    config: TrainConfig, processes: distributed.Processes, model: GPT, how: str, first: int, seconds: float
) -> Logger:
    """Make the run's folder, write down what the run is, and say it."""
    out_dir = Path(config.out_dir)
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * config.model.block_size
    if processes.is_main:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {out_dir}: {error.strerror}; give another --out_dir") from None
        if not (first and config.eval_only):  # to evaluate a run adds a record and leaves all others as they are
            checkpoint.copy_tokenizer(dataset_folder(config.dataset), out_dir)
            about = environment() | {"device": str(processes.device), "world_size": processes.world_size}
            (out_dir / "config.json").write_text(json.dumps(flatten(config) | {"environment": about}, indent=1))
            forget_after(out_dir / "metrics.jsonl", first)
    log = Logger(out_dir, processes, tokens_per_step, model.flops_per_token(), first, config.max_iters, seconds)
    n_head = sum(p.numel() for p in model.lm_head.parameters())
    n_all = sum(p.numel() for p in model.parameters())
    log.say(
        f"{out_dir}: {config.model.head.weights} x {config.model.head.likelihood} head, {n_all / 1e6:.2f} M parameters "
        f"({n_head / 1e6:.2f} M in the head{', shared with the embedding' if config.model.head.tie_head else ''}), "
        f"{tokens_per_step:,} tokens per step, {how}, on {processes.world_size} x {processes.device.type}"
        + (f", teacher labels {config.labels} ({config.label_mode})" if config.labels else "")
        + (f", going on at step {first}" if first else "")
    )
    if read_meta(dataset_folder(config.dataset)) is None:
        log.say(f"{config.dataset} has no meta.json and no meta.pkl: its tokens are taken for GPT-2's BPE")
    if config.wandb_log:
        log.start_wandb(config.wandb_project, config.wandb_run_name, flatten(config), out_dir)
    return log


if __name__ == "__main__":
    main()
