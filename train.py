"""Train a GPT. This file is the loop; by itself it trains the softmax baseline, the other train_*.py name another head.

    python train.py config/quickstart.py                                          one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py        one machine with 8 GPUs
    python train.py config/train_shakespeare_char.py --device=cpu --compile=False --max_iters=200

Data, dropout and noise of micro-batch i depend on (seed, i) alone: evaluating or logging more often never changes
training, and a resumed run or one on more processes repeats the run of a single process.
"""

import math
import sys
from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from engine.base import distributed
from engine.base.errors import Diverged, UserError, check_memory, run_main
from engine.base.optim import adamw, set_learning_rate
from engine.base.options import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    check_options,
    load_config,
)
from engine.base.sharding import clip_gradients
from engine.data.labels import MODES
from engine.data.windows import eval_batches
from engine.eval.validation import mean_loss
from engine.runs.saver import Saver
from engine.runs.start import describe_run, open_run, prepare_run, training_batches
from model import GPT, GPTConfig

MAX_SKIPPED = 25  # steps in a row; float16's loss scale comes from 65536 to 1 in 16


@dataclass(frozen=True)
class TrainConfig:
    """Names, meanings and defaults are nanoGPT's wherever nanoGPT has the option."""

    out_dir: str = "out"  # the run's folder: checkpoints, metrics.jsonl, config.json
    eval_interval: PositiveInt = 2000  # steps between evaluations; the last step always has one
    log_interval: PositiveInt = 1  # steps between training records
    # batches of the validation split in an evaluation, the same ones each time
    eval_iters: PositiveInt = 200
    eval_only: bool = False  # evaluate once and end
    # end after so many eval_intervals without a lower validation nll (early stop); 0: at max_iters
    patience: NonNegativeInt = 0
    # False: save only when the validation nll is the lowest yet
    always_save_checkpoint: bool = True
    save_interval: NonNegativeInt = 0  # steps between checkpoints; 0: as eval_interval
    # scratch | resume | auto: resume if there is a checkpoint | gpt2* | a run or GPT-2 folder
    init_from: str = "scratch"
    # no longer needed: an option that is given on resuming wins
    allow_change: str = ""
    seed: Seed = 1337  # of weights, data order, dropout and noise
    # log to Weights & Biases as well (offline without an account); val/ compares heads there
    wandb_log: bool = False
    wandb_project: str = "owt"  # project name there
    # run name there; empty: out_dir (nanoGPT's default, gpt2, would name all heads alike)
    wandb_run_name: str = ""
    # a folder in data/, or the path of a folder with train.bin and val.bin
    dataset: str = "openwebtext"
    # teacher labels to train on, by their --name in augmentation/teacher_labels.py
    labels: str = ""
    # soft: the teacher shares in the true token's label | set: all are labels of 1 (sigmoid)
    label_mode: Literal[MODES] = "soft"
    label_weight: Fraction = 0.5  # soft: the teacher's share where there are labels, in [0, 1]
    # micro-batches in a step, counted over all processes
    gradient_accumulation_steps: PositiveInt = 40
    # blocks in a micro-batch; lower it when memory runs out, and accumulate more
    batch_size: PositiveInt = 12
    model: GPTConfig = GPTConfig()
    learning_rate: NonNegativeFloat = 6e-4  # peak; small models take more: 1e-3 and above
    max_iters: NonNegativeInt = 600000  # steps in all
    weight_decay: NonNegativeFloat = 1e-1  # on matrices and embeddings alone
    beta1: Annotated[float, ">= 0", "< 1"] = 0.9  # AdamW's memory of the gradient
    # AdamW's memory of its square; 0.99 where a step has few tokens
    beta2: Annotated[float, ">= 0", "< 1"] = 0.95
    grad_clip: NonNegativeFloat = 1.0  # clip the gradient's norm; 0 does not
    decay_lr: bool = True  # False: a constant learning rate
    # steps of linear warm-up, of the learning rate and of a Bayesian head's KL
    warmup_iters: NonNegativeInt = 2000
    lr_decay_iters: NonNegativeInt = 0  # steps to decay over; 0: max_iters
    min_lr: NonNegativeFloat = 6e-5  # where the cosine ends; about learning_rate / 10
    # none: each process has all weights (DDP) | fsdp: in pieces over all processes (fully_shard)
    sharding: Literal["none", "fsdp"] = "none"
    # seconds without progress after which a process shows its stacks and ends; 0: never
    hang_timeout: NonNegativeFloat = 600.0
    # of torch.distributed: nccl | gloo | auto: nccl on CUDA, else gloo
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto: the best there is
    # float32 | bfloat16 | float16 | auto: bfloat16 where the hardware is fast at it
    dtype: str = "auto"
    # torch.compile: starts a minute later; on a CPU it pays at 50,000 ids
    compile: bool = torch.cuda.is_available()

    def __post_init__(self):
        check_options(self)
        n_bytes = 2 * self.batch_size * self.model.block_size * self.model.n_embd
        what = f"a micro-batch of batch_size = {self.batch_size}"
        check_memory(n_bytes, what, "lower it, and accumulate more")
        if self.sharding == "fsdp" and self.dtype == "float16":
            raise UserError(
                "dtype = 'float16' needs a loss scale, and shards have none; use --dtype=bfloat16"
            )
        if not self.out_dir:
            raise UserError("out_dir is empty; name a folder for the run")


@dataclass
class Progress:
    """How far a run has come; beside model and optimiser this is all that a checkpoint has to bring back."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and checkpoints
    best_val_nll: float = math.inf
    best_step: int = 0
    skipped: int = 0  # steps that left the weights alone, because loss or gradient was not finite
    wandb_id: str = ""
    in_a_row = 0  # no field: who resumes may have changed what was bad

    def improves(self, scores: dict[str, float]) -> bool:
        """Whether val_nll is the lowest so far; if so, remember it. What is not finite ends the run."""
        refuse_non_finite(scores, self.step)
        if better := scores["val_nll"] < self.best_val_nll:
            self.best_val_nll, self.best_step = scores["val_nll"], self.step
        return better

    def watch_skipped(self, finite: bool) -> None:
        """Count the steps without an update in a row; where they do not end, neither will they tomorrow."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row == MAX_SKIPPED:
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row were left out up to step {self.step}: loss or gradient "
                "not finite; resume from the last checkpoint with a lower rate, --init_from=resume "
                "--learning_rate=..., or start again with a lower one or another --dtype"
            )


def main(**fixed: str) -> None:
    """Run train() with the options of the command line; fixed: what a variant's script decides."""

    def from_command_line():
        config, given = load_config(TrainConfig, sys.argv[1:], fixed)
        with distributed.init(config.device, config.backend, config.hang_timeout) as processes:
            train(config, processes, given | set(fixed))

    run_main(from_command_line)


def train(
    config: TrainConfig, processes: distributed.Processes, given: Set[str] = frozenset()
) -> GPT:
    """Train until max_iters and return the model; given: the options that were set on purpose."""
    config, data, bare, state = prepare_run(config, given, processes)
    device, n_micro = processes.device, config.gradient_accumulation_steps
    distributed.check_accumulation(n_micro, processes.world_size)
    cast, dtype = distributed.autocast(device, config.dtype)
    model, how = processes.wrap(bare, config.compile, config.sharding)
    optimizer = adamw(bare, config.learning_rate, (config.beta1, config.beta2), config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    batches = training_batches(config, data["train"], state)
    val_batches = eval_batches(
        data["val"], config.model.block_size, config.batch_size, config.eval_iters
    )
    progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})
    saver = Saver(processes, progress, bare, optimizer, scaler, describe_run(config, data, batches))
    saver.restore(state)
    mine = range(
        progress.step * n_micro + processes.rank, config.max_iters * n_micro, processes.world_size
    )
    ahead = batches.prefetched(mine, device)

    with (
        open_run(config, data, processes, bare, (dtype, how), progress, state) as log,
        processes.watch.watching(),
        saver,
    ):
        for step in range(progress.step, config.max_iters + 1):
            bare.lm_head.kl_ramp.fill_(min(1.0, (step + 1) / (config.warmup_iters + 1)))
            last, improved = step == config.max_iters or config.eval_only, False
            if last or step % config.eval_interval == 0:
                with log.paused():
                    scores = mean_loss(bare, val_batches, data["val"], processes, cast)
                improved = progress.improves(scores)
                log.evaluation(scores)
                last = (
                    last or 0 < config.patience * config.eval_interval <= step - progress.best_step
                )
            due = (
                last or step % (config.save_interval or config.eval_interval) == 0
            ) and config.always_save_checkpoint
            if (due or improved) and not config.eval_only:
                with log.paused():
                    saver.save()
            if last:
                break

            lr = set_learning_rate(optimizer, step, config)
            loss = torch.zeros(1, device=device)
            for micro in processes.share(n_micro):
                processes.heartbeat()
                distributed.seed_micro_batch(config.seed, step * n_micro + micro)
                with processes.accumulate(model, last=micro + processes.world_size >= n_micro):
                    with cast:
                        micro_loss = model(*next(ahead))
                    # gradients are averaged over the processes, so each divides by the micro-batches of its own
                    scaler.scale(micro_loss * (processes.world_size / n_micro)).backward()
                loss += micro_loss.detach() / n_micro
            (loss,) = processes.all_reduce(
                loss
            )  # from here on the step is either done or left out, by all processes
            scaler.unscale_(optimizer)
            grad_norm = clip_gradients(bare.parameters(), config.grad_clip)
            if finite := math.isfinite(loss) and math.isfinite(grad_norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.step, progress.tokens = step + 1, progress.tokens + log.tokens_per_step
            if not finite:
                log.skipped(loss, grad_norm)
            progress.watch_skipped(finite)
            saver.stepped()
            if finite and (step + 1) % config.log_interval == 0:
                log.training(loss, lr, grad_norm)
    return bare


def refuse_non_finite(scores: dict[str, float], step: int) -> None:
    """Stop a training that has come to nothing."""
    for name, value in scores.items():
        if not math.isfinite(value):
            what = f"{name.replace('_', ' ')} is {value} at step {step}"
            raise Diverged(f"{what}; try a lower --learning_rate or --grad_clip")


if __name__ == "__main__":
    main()
