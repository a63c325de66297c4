"""Train a GPT. This file is the loop. On its own it trains the softmax baseline; train_bayes.py,
train_sigmoid.py and the others set another head.

    # one process, CPU or GPU
    python train.py config/quickstart.py
    # one machine with 8 GPUs
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Data, dropout and noise of micro-batch i depend on (seed, i) alone. So evaluating or logging more
often never changes training, and a resumed run, or one on more processes, repeats the run of a
single process.
"""

import math
import sys
from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from engine.base import distributed
from engine.base.errors import Diverged, UserError, run_main
from engine.base.optim import make_optimizer, set_learning_rate
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
from engine.data.batches import Batches
from engine.data.labels import MODES
from engine.data.windows import eval_batches
from engine.eval.validation import mean_loss
from engine.runs.fit import fit_posterior
from engine.runs.saver import Saver
from engine.runs.start import describe_run, open_run, prepare_run, training_labels
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
    # micro-batches in a step, over all processes; more and smaller ones if these do not divide it
    gradient_accumulation_steps: PositiveInt = 40
    # blocks in a micro-batch; lower it when memory runs out, and accumulate more
    batch_size: Annotated[int, ">= 1", "<= 1e6"] = 12
    model: GPTConfig = GPTConfig()
    # adamw | muon: Muon for the matrices in the blocks, AdamW for the rest; fewer steps do as much
    optimizer: Literal["adamw", "muon"] = "adamw"
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
        if self.sharding == "fsdp" and self.dtype == "float16":
            raise UserError(
                "dtype = 'float16' needs a loss scale, and shards have none; use --dtype=bfloat16"
            )
        if self.sharding == "fsdp" and self.optimizer == "muon":
            raise UserError(
                "optimizer = 'muon' needs whole matrices, and fsdp shards them; use --sharding=none"
            )
        if self.sharding == "fsdp" and self.model.head.posterior == "kron":
            raise UserError(
                "posterior = 'kron' needs whole weights, and fsdp shards them; train with "
                "--posterior=row, then fit it: --init_from=RUN --max_iters=0 --posterior=kron"
            )
        has_sets = self.labels and self.model.head.likelihood == "sigmoid"
        if self.label_mode == "set" and not has_sets:
            raise UserError("label_mode = 'set' needs --labels=NAME and --likelihood=sigmoid")
        if not self.out_dir:
            raise UserError("out_dir is empty; name a folder for the run")


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds besides the model and the optimiser."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and checkpoints
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
        """Count a step of n_tokens, which is skipped if its loss or gradient was not finite."""
        self.step += 1
        self.tokens += n_tokens
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1

    def check_skipped(self) -> None:
        """End the run when too many steps in a row were skipped: later ones would be, too."""
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row were skipped up to step {self.step}: the loss or "
                "the gradient is not finite; resume from the last checkpoint with a lower rate, "
                "--init_from=resume --learning_rate=..., or start again with another --dtype"
            )


def main(**fixed: str) -> None:
    """Train with the options of the command line; fixed: what a script like train_bayes.py sets."""

    def train_from_command_line():
        config, given = load_config(TrainConfig, sys.argv[1:], fixed)
        with distributed.init(config.device, config.backend, config.hang_timeout) as processes:
            train(config, processes, given | set(fixed))

    run_main(train_from_command_line)


def train(
    config: TrainConfig, processes: distributed.Processes, given: Set[str] = frozenset()
) -> GPT:
    """Train until max_iters and return the model; given: names of the options that the user set."""
    config, data, raw_model, state = prepare_run(config, given, processes)
    device = processes.device
    n_micro, batch_size = distributed.divide_step(
        config.gradient_accumulation_steps, config.batch_size, processes.world_size
    )
    cast, dtype = distributed.autocast(device, config.dtype)
    model = processes.wrap(raw_model, config.compile, config.sharding)
    betas = (config.beta1, config.beta2)
    optimizer = make_optimizer(
        raw_model, config.learning_rate, betas, config.weight_decay, config.optimizer
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})

    block_size = config.model.block_size
    labels = training_labels(config, data["train"])
    batches = Batches(data["train"], batch_size, block_size, config.seed, labels)
    my_micro_batches = processes.share(progress.step * n_micro, config.max_iters * n_micro)
    prefetched = batches.prefetched(my_micro_batches, device)
    val_batches = eval_batches(data["val"], block_size, config.batch_size, config.eval_iters)
    run_info = describe_run(config, data)
    saver = Saver(processes, progress, raw_model, optimizer, scaler, run_info)
    saver.restore(state)
    run = open_run(config, data, processes, raw_model, dtype, progress)

    with run as log, processes.watch.watching(), saver:
        for step in range(progress.step, config.max_iters + 1):
            # the KL of a Bayesian head warms up with the learning rate
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
            if is_last and config.model.head.posterior == "kron" and not config.eval_only:
                log.say(fit_posterior(raw_model, data, processes, cast))
                saver.saved_step = -1  # this step is saved again: its posterior has changed
            is_save_step = is_last or step % (config.save_interval or config.eval_interval) == 0
            should_save = improved or (is_save_step and config.always_save_checkpoint)
            if should_save and not config.eval_only:
                with log.paused():
                    saver.save()
            if is_last:
                break

            lr = set_learning_rate(optimizer, step, config)
            loss = torch.zeros(1, device=device)
            for micro_batch in processes.micro_batches(model, step * n_micro, (step + 1) * n_micro):
                distributed.seed_micro_batch(config.seed, micro_batch)
                with cast:
                    micro_loss = model(*next(prefetched))
                # gradients are averaged over the processes, so each divides by its own share
                scaler.scale(micro_loss * (processes.world_size / n_micro)).backward()
                loss += micro_loss.detach() / n_micro
            # after this, all processes finish the step or none: a signal interrupts here, if at all
            (loss,) = processes.all_reduce(loss)
            scaler.unscale_(optimizer)
            grad_norm = clip_gradients(raw_model.parameters(), config.grad_clip)
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if is_finite:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
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
