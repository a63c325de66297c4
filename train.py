"""Train a GPT. This file has the options and the loop. It trains the softmax baseline by default;
train_bayes.py, train_sigmoid.py and the others set another head.

    # one process, CPU or GPU
    python train.py config/quickstart.py
    # one machine with 8 GPUs
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Data, dropout and noise of micro-batch i depend only on (seed, i). So evaluating or logging more
often does not change training. A resumed run repeats the uninterrupted one, and several processes
repeat the run of a single process.
"""

import math
import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from engine.base import distributed
from engine.base.distributed import Processes
from engine.base.errors import Diverged, UserError, run_main
from engine.base.files import write_json
from engine.base.optim import make_optimizer, set_learning_rate
from engine.base.options import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    load_config,
)
from engine.base.sharding import clip_gradients
from engine.data.batches import Batch, Batches
from engine.data.labels import MODES, LabelFile
from engine.data.tokens import TokenFile
from engine.data.windows import eval_batches
from engine.eval.validation import mean_loss
from engine.runs.fit import fit_posterior
from engine.runs.percentiles import PERCENTILES, measure
from engine.runs.saver import Saver
from engine.runs.start import open_run, prepare_run
from model import GPT, GPTConfig

MAX_SKIPPED = 25  # steps in a row; float16's loss scale falls from 65536 to 1 in 16 steps


@dataclass(frozen=True)
class TrainConfig:
    """Options that nanoGPT has keep its names and meanings; docs/training.md lists exceptions."""

    out_dir: str = "out"  # the run's folder: checkpoints, metrics.jsonl, config.json
    eval_interval: PositiveInt = 2000  # steps between evaluations; the last step always has one
    log_interval: PositiveInt = 1  # steps between training records
    # batches of the validation split in an evaluation, the same ones each time
    eval_iters: PositiveInt = 200
    eval_only: bool = False  # evaluate once and exit
    # early stopping after this many eval_intervals without a lower validation nll; 0: never
    patience: NonNegativeInt = 0
    # False: save only when the validation nll is the lowest so far
    always_save_checkpoint: bool = True
    save_interval: NonNegativeInt = 0  # steps between checkpoints; 0: eval_interval
    # scratch | resume | auto: resume if there is a checkpoint, else scratch | gpt2* | a run, a
    # checkpoint file, or a folder of nanoGPT or transformers
    init_from: str = "scratch"
    seed: Seed = 1337  # of weights, data order, dropout and noise
    # also log to Weights & Biases; its val/ charts compare heads
    wandb_log: bool = False
    wandb_project: str = "owt"  # project name in Weights & Biases
    # run name there; empty: out_dir (nanoGPT's default, gpt2, would give all heads one name)
    wandb_run_name: str = ""
    # a folder in data/, or the path of a folder with train.bin and val.bin
    dataset: str = "openwebtext"
    # teacher labels to train on: their --name in augmentation/teacher_labels.py
    labels: str = ""
    # soft: mix the teacher's prediction into the true token's label | set: each id has the label 1
    # (sigmoid)
    label_mode: Literal[MODES] = "soft"
    label_weight: Fraction = 0.5  # soft: the teacher's part of a label, in [0, 1]
    # micro-batches in a step, over all processes; divided into smaller ones if the processes cannot
    # share them evenly
    gradient_accumulation_steps: PositiveInt = 40
    # blocks in a micro-batch; when memory runs out, lower it and accumulate more
    batch_size: Annotated[int, ">= 1", "<= 1e6"] = 12
    model: GPTConfig = GPTConfig()
    # adamw | muon: Muon for the matrices in the blocks, AdamW for the rest; it needs fewer steps
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: NonNegativeFloat = 6e-4  # peak; small models take more: 1e-3 and above
    max_iters: NonNegativeInt = 600000  # steps of the run
    weight_decay: NonNegativeFloat = 1e-1  # on matrices and embeddings only
    beta1: Annotated[float, ">= 0", "< 1"] = 0.9  # AdamW's decay of the gradient's average
    # AdamW's decay of the squared gradient's average; 0.99 if a step has few tokens
    beta2: Annotated[float, ">= 0", "< 1"] = 0.95
    grad_clip: NonNegativeFloat = 1.0  # clip the gradient's norm to this; 0: do not clip
    decay_lr: bool = True  # False: a constant learning rate
    # steps of linear warm-up, of the learning rate and of a Bayesian head's KL
    warmup_iters: NonNegativeInt = 2000
    lr_decay_iters: NonNegativeInt = 0  # step at which the decay ends; 0: max_iters
    min_lr: NonNegativeFloat = 6e-5  # at the end of the decay; about learning_rate / 10
    # none: each process has all weights (DDP) | fsdp: the processes of a machine share them out
    # (fully_shard)
    sharding: Literal["none", "fsdp"] = "none"
    # seconds without progress, from the first finished step on, after which a process prints its
    # stacks and exits; 0: never
    hang_timeout: NonNegativeFloat = 600.0
    # torch.distributed's backend: nccl | gloo | auto: nccl on CUDA, else gloo
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto: the best available
    # float32 | bfloat16 | float16 | auto: bfloat16 if the hardware is fast at it, else float16 on
    # CUDA, else float32
    dtype: str = "auto"
    # torch.compile: the first step takes up to a minute longer; on a CPU later ones take 0.6 to 0.8
    # of the time without it
    compile: bool = torch.cuda.is_available()

    def __post_init__(self):
        if self.sharding == "fsdp" and self.dtype == "float16":
            raise UserError(
                "dtype = 'float16' needs a loss scale, which sharding does not support; "
                "use --dtype=bfloat16"
            )
        if self.sharding == "fsdp" and self.optimizer == "muon":
            raise UserError(
                "optimizer = 'muon' needs whole matrices, and fsdp shards them; use --sharding=none"
            )
        if self.model.head.is_kron and self.sharding == "fsdp":
            raise UserError("posterior = 'kron' cannot be fitted with fsdp; use --sharding=none")
        head = self.model.head
        if head.posterior == "kron" and head.weights == "point" and not self.max_iters:
            raise UserError("a posterior is fitted to Bayesian weights; use train_bayes.py")
        has_sets = self.labels and self.model.head.likelihood == "sigmoid"
        if self.label_mode == "set" and not has_sets:
            raise UserError("label_mode = 'set' needs --labels=NAME and --likelihood=sigmoid")
        if not self.out_dir:
            raise UserError("out_dir is empty; name a folder for the run")


@dataclass
class Progress:
    """How far a run is. A checkpoint holds these fields, the model and the optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, without evaluation and checkpoints
    best_val_nll: float = math.inf
    best_step: int = 0
    skipped: int = 0  # steps without an update, because the loss or the gradient was not finite
    wandb_id: str = ""
    skipped_in_a_row = 0  # not a field, not saved: the count restarts on resume

    def improves(self, scores: dict[str, float]) -> bool:
        """Whether val_nll is the lowest so far. A score that is not finite ends the run."""
        for name, value in scores.items():
            if not math.isfinite(value):
                what = f"{name.replace('_', ' ')} is {value} at step {self.step}"
                raise Diverged(f"{what}; try a lower --learning_rate or --grad_clip")
        is_best = scores["val_nll"] < self.best_val_nll
        if is_best:
            self.best_val_nll, self.best_step = scores["val_nll"], self.step
        return is_best

    def advance(self, n_tokens: int, is_finite: bool) -> None:
        """Count a step of n_tokens. It was skipped if its loss or gradient was not finite."""
        self.step += 1
        self.tokens += n_tokens
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1

    def check_skipped(self) -> None:
        """End the run after MAX_SKIPPED skipped steps in a row: it would skip later ones, too."""
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row were skipped up to step {self.step}: the loss or "
                "the gradient is not finite; resume from the last checkpoint with a lower rate "
                "(--init_from=resume --learning_rate=...), or start again with another --dtype"
            )


def main(**fixed: str) -> None:
    """Train with the options of the command line.

    fixed: options that a script like train_bayes.py sets itself."""

    def train_from_command_line():
        config, given = load_config(TrainConfig, sys.argv[1:], fixed)
        with distributed.init(config.device, config.backend, config.hang_timeout) as processes:
            train(config, processes, given | set(fixed))

    run_main(train_from_command_line)


def open_batches(
    config: TrainConfig, data: dict[str, TokenFile], processes: Processes, progress: Progress
) -> tuple[int, Iterator[Batch], list[np.ndarray]]:
    """Returns the number of micro-batches in a step, those of this process from the next step to
    the last, and the block starts of the batches that each evaluation reads.
    """
    batch_size, block_size = config.batch_size, config.model.block_size
    val_batches = eval_batches(data["val"], block_size, batch_size, config.eval_iters)
    n_micro, batch_size = distributed.divide_step(
        config.gradient_accumulation_steps, batch_size, processes.world_size
    )
    labels = None
    if config.labels:
        labels = LabelFile(data["train"], config.labels, config.label_mode, config.label_weight)
        labels.check(config.model.vocab_size)
    batches = Batches(data["train"], batch_size, block_size, config.seed, labels)
    numbers = processes.share(progress.step * n_micro, config.max_iters * n_micro)
    return n_micro, batches.prefetched(numbers, processes.device), val_batches


def train(config: TrainConfig, processes: Processes, given: Set[str] = frozenset()) -> GPT:
    """Train until max_iters and return the model. given: names of the options that the user set."""
    config, data, raw_model, state = prepare_run(config, given, processes)
    cast, dtype = distributed.autocast(processes.device, config.dtype)
    model = processes.wrap(raw_model, config.compile, config.sharding, dtype)
    name, betas = config.optimizer, (config.beta1, config.beta2)
    optimizer = make_optimizer(raw_model, config.learning_rate, betas, config.weight_decay, name)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == "float16")
    progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})
    n_micro, batches, val_batches = open_batches(config, data, processes, progress)
    saver = Saver(config, data, processes, progress, raw_model, optimizer, scaler)
    saver.restore(state)
    with open_run(config, data, processes, raw_model, dtype, progress) as log, saver:
        for step in range(progress.step, config.max_iters + 1):
            raw_model.lm_head.kl_ramp.fill_(min(1.0, (step + 1) / (config.warmup_iters + 1)))
            is_last = step == config.max_iters or config.eval_only
            improved = False
            if is_last or step % config.eval_interval == 0:
                with log.paused():
                    scores = mean_loss(raw_model, val_batches, data["val"], processes, cast)
                improved = progress.improves(scores)
                log.evaluation(scores)
                patience_steps = config.patience * config.eval_interval
                is_last |= 0 < patience_steps <= step - progress.best_step
            is_fitted = is_last and config.model.head.is_kron and not config.eval_only
            if is_fitted:
                log.say(fit_posterior(raw_model, data["train"], processes, cast))
            is_save_step = is_last or step % (config.save_interval or config.eval_interval) == 0
            should_save = improved or is_fitted or (is_save_step and config.always_save_checkpoint)
            if should_save and not config.eval_only:
                with log.paused():
                    saver.save()
                if is_last and processes.is_main and config.sharding == "none":
                    usual = measure(raw_model, data["val"], cast)
                    write_json(Path(config.out_dir, PERCENTILES), usual)
            if is_last:
                break

            lr = set_learning_rate(optimizer, step, config)
            loss = torch.zeros((), device=processes.device)
            for micro_batch in processes.micro_batches(model, step * n_micro, (step + 1) * n_micro):
                distributed.seed_micro_batch(config.seed, micro_batch)
                with cast:
                    micro_loss = model(*next(batches))
                # DDP averages gradients over processes, so divide by this process's share
                scaler.scale(micro_loss * (processes.world_size / n_micro)).backward()
                loss += micro_loss.detach() / n_micro
            scaler.unscale_(optimizer)
            grad_norm = clip_gradients(raw_model.parameters(), config.grad_clip)
            # the only time that a step waits for the device. A signal interrupts all processes here
            # or none: either all finish the step or none
            share = grad_norm / processes.world_size
            loss, grad_norm = processes.all_reduce(torch.stack([loss, share]))
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if is_finite:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            progress.advance(log.tokens_per_step, is_finite)
            saver.stepped()
            if not is_finite:
                log.skipped(loss, grad_norm)
                progress.check_skipped()
            elif progress.step % config.log_interval == 0:
                log.training(loss, lr, grad_norm)
    return raw_model


if __name__ == "__main__":
    main()
