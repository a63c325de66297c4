"""What training will cost, known before it begins: parameters by where they are, and the memory of a step.

The memory is counted tensor by tensor for the step that this repository does: fused AdamW, attention without (T, T), a
head in pieces (heads/linear_loss.py). What a process has for other things (Python and its libraries: 0.35 GB, measured
on a CPU; a CUDA context) is not in it. tests/test_budget.py holds it against what steps really take.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.base.errors import warn
from heads.linear_loss import LOGITS_BYTES_CACHE, LOGITS_BYTES_PRODUCT, rows_per_chunk

if TYPE_CHECKING:
    from model import GPT

CGROUPS, MOUNTED = (
    Path("/proc/self/cgroup"),
    Path("/sys/fs/cgroup"),
)  # this process's control groups
# by controller ("": version 2 of the interface): mount, limit, use, and what in it is but page
# cache
GROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
# what is there beside the tensors: gaps that malloc leaves, packed matrices; measured on a CPU, elsewhere a guess
OVERHEAD, ELSEWHERE = {"cpu": (0.2, 20 << 20)}, (0.1, 0)


def parameters(model: "GPT") -> dict[str, int]:
    """How many parameters are in the backbone, in the head and in posteriors' widths (of hidden layers too); each is
    counted once, the embedding with the head where they are one."""
    in_head, counts = (
        {id(p) for p in model.lm_head.parameters()},
        {"backbone": 0, "head": 0, "posterior": 0},
    )
    for name, p in model.named_parameters():
        part = (
            "posterior" if name.endswith("log_std") else "head" if id(p) in in_head else "backbone"
        )
        counts[part] += p.numel()
    return counts


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at the worst moment of a step."""

    state: int  # weights, gradients and AdamW's two moments
    activations: int  # what forward keeps for backward
    head: int  # the pieces of logits, the output weights' casts and gradients
    copy: int  # what a checkpoint is written from, where that lies in the same memory
    overhead: int  # between tensors, and in libraries

    @property
    def total(self) -> int:
        return self.state + self.activations + self.head + self.copy + self.overhead


def memory(
    model: "GPT", batch_size: int, n_micro: int, dtype: str, shards: int = 1, saving: bool = True
) -> Memory:
    """The estimate for micro-batches of batch_size blocks in dtype; n_micro: those of a process in a step; shards: over
    how many processes parameters lie in pieces; saving: whether this process writes checkpoints.

    Two moments can be the worst: behind the head's forward, when all activations are there, and at the end of backward,
    when all gradients are and the embedding's come on top."""
    device = next(model.parameters()).device.type
    n, size = sum(p.numel() for p in model.parameters()), 4 if dtype == "float32" else 2
    n_head = model.lm_head.weights.weight.numel()
    casts = (
        0 if size == 4 else size * (n - n_head)
    )  # autocast's copies live until backward has used them
    gradients = 4 * n // shards
    held = 12 * n // shards + (gradients if n_micro > 1 else 0)
    activations, head = (
        casts + _activations(model, batch_size, device, size),
        _head(model, batch_size, device, size),
    )
    embedding = 4 * n_head * (2 if n_micro > 1 else 1)
    at_head, at_end = held + activations + head, 12 * n // shards + gradients + embedding
    if at_end > at_head:
        activations, head, held = 0, embedding, at_end - embedding
    copy = 12 * n if saving and device == "cpu" else 0
    share, fixed = OVERHEAD.get(device, ELSEWHERE)
    return Memory(
        held, activations, head, copy, int(share * (held + activations + head + copy)) + fixed
    )


def _activations(model: "GPT", batch_size: int, device: str, size: int) -> int:
    """Bytes between forward and backward; size: of a number in matrix products (the residual stream is in 4)."""
    config = model.config
    n_tokens, wide = batch_size * config.block_size, config.n_embd
    # of a block: two residuals, two norms' outputs, q k v, attention's output, four wide before and behind GELU
    block = wide * (2 * 4 + (2 + 3 + 1 + 8) * size)
    if (
        config.dropout
    ):  # a mask behind each of the two branches; on a CPU it is as wide as the numbers
        block += 2 * wide * (size if device == "cpu" else 1)
    if (
        config.dropout and device == "cpu"
    ):  # attention has no fast path with dropout there: scores, weights and masks
        block += config.n_head * config.block_size * (4 * size + 8)
    drawn = 0
    if (
        config.bayes_mlp and config.head.estimator == "sample"
    ):  # a draw of both matrices, and its cast
        drawn = config.n_layer * 8 * wide**2 * (4 + size)
    elif (
        config.bayes_mlp
    ):  # std, its square and noise for each activation of both layers, and squares of their inputs
        block += 4 * wide * (3 * 5 + 5)
    backward = wide * (
        8 * size + 2 * 4
    )  # gradients on their way through the widest part of a block
    if config.gradient_checkpointing:
        return n_tokens * (config.n_layer * 4 * wide + block + backward) + drawn // config.n_layer
    return n_tokens * (config.n_layer * block + backward) + drawn


def _head(model: "GPT", batch_size: int, device: str, size: int) -> int:
    """Bytes of the head's loss and its gradients."""
    weights, options = model.lm_head.weights, model.config.head
    (vocab_size, n_embd), n_tokens = weights.weight.shape, batch_size * model.config.block_size
    matrix, bayes = 4 * vocab_size * n_embd, options.weights == "bayes"
    states = (
        n_tokens * n_embd * (4 + 4 + size)
    )  # the last ones: behind the norm, their gradient, cast
    if (
        bayes and weights.samples_logits
    ):  # all logits, their variance, std, noise and sum, and gradients of them
        return states + 2 * matrix + n_tokens * vocab_size * 4 * 10
    probe = torch.empty(0, dtype=torch.float32 if size == 4 else torch.bfloat16, device=device)
    rows = min(n_tokens, rows_per_chunk(LOGITS_BYTES_PRODUCT, probe, vocab_size))
    block = min(rows, rows_per_chunk(LOGITS_BYTES_CACHE, probe.float(), vocab_size))
    pieces = rows * vocab_size * size + block * vocab_size * 4 * 3
    extra = (
        0
        if not bayes
        else 5
        if options.posterior == "full"
        else 3
        if options.estimator == "sample"
        else 1
    )
    return states + pieces + (matrix if size == 4 else 2 * matrix) + extra * matrix


def available(device: torch.device) -> int | None:
    """Bytes that this process can still get on the device, shared with the processes beside it on a CPU; None where
    nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [n_bytes for n_bytes in (_free(), *_free_in_groups()) if n_bytes is not None]
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if free else None


def _free() -> int | None:
    """Bytes that the machine can still give away, None where it does not say."""
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")),
            None,
        )
    return (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    )


def _free_in_groups() -> Iterator[int]:
    """Bytes that each control group of this process can still give away, and each above it: containers, Slurm's jobs
    and systemd's services have their limits at different depths."""
    groups = re.findall(
        r"^\d+:(.*?):(.*)$", CGROUPS.read_text() if CGROUPS.exists() else "", re.MULTILINE
    )
    for controllers, path in groups:
        for mount, limit, used, cache in (
            GROUP_FILES[name] for name in controllers.split(",") if name in GROUP_FILES
        ):
            group = MOUNTED / mount / path.strip("/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # no such file; the limit "max"
                    most, taken = (int((folder / name).read_text()) for name in (limit, used))
                    stat = folder / "memory.stat"
                    told = re.search(
                        rf"^{cache} (\d+)$", stat.read_text() if stat.exists() else "", re.MULTILINE
                    )
                    yield most - taken + (int(told[1]) if told else 0)


def warn_if_too_much(needed: Memory, there: int | None, weights: int) -> None:
    """Say before training that it will not fit, and what to lower. there: bytes that are free beside the weights, which
    have been made already; None where nobody says."""
    if there is not None and needed.total - weights > there:
        warn(
            f"this run needs about {needed.total / 1e9:.1f} GB and {(there + weights) / 1e9:.1f} GB are free: lower "
            "--batch_size (and raise --gradient_accumulation_steps by as much) or --block_size, or try "
            "--gradient_checkpointing; with several processes --sharding=fsdp"
        )


def banner(
    config, processes, model: "GPT", how: tuple[str, str], n_data: int, first: int
) -> list[str]:
    """The lines that a run begins with: head, size, step, length and memory; warns where memory lacks.

    how: dtype, and compiled or eager; n_data: training tokens; first: the step to begin at."""
    head, counts, n_micro = config.model.head, parameters(model), config.gradient_accumulation_steps
    begun = (
        ""
        if config.init_from in ("scratch", "resume", "auto")
        else f", on the weights of {config.init_from}"
    )
    tied = " (shared with the embedding)" if head.tie_head else ""
    posterior = f", posterior {_size(counts['posterior'])}" if counts["posterior"] else ""
    lines = [
        f"{config.out_dir}: {head.weights} x {head.likelihood} head, {', '.join(how)}, on {processes.world_size} x "
        f"{processes.device.type}"
        + (f", teacher labels {config.labels} ({config.label_mode})" if config.labels else "")
        + (f", going on at step {first}" if first else begun),
        f"  parameters   {_size(sum(counts.values()))}: backbone {_size(counts['backbone'])}, "
        f"head {_size(counts['head'])}{tied}{posterior}",
    ]
    if config.eval_only:
        return lines
    n_tokens = n_micro * config.batch_size * config.model.block_size
    in_all, flops = config.max_iters * n_tokens, n_tokens * model.flops_per_token()
    micro = f"{n_micro:,} micro-batch{'es' if n_micro > 1 else ''} of {config.batch_size} blocks"
    shards = processes.world_size if config.sharding == "fsdp" else 1
    n_own = n_micro // processes.world_size
    steps = f"{config.max_iters:,} step{'' if config.max_iters == 1 else 's'}"
    needed = memory(model, config.batch_size, n_own, how[0], shards, processes.is_main)
    there, weights = (
        available(processes.device),
        sum(p.numel() * 4 for p in model.parameters()) // shards,
    )
    warn_if_too_much(needed, there, weights)
    return [
        *lines,
        f"  a step       {n_tokens:,} tokens ({micro} of {config.model.block_size:,}), {flops:.1e} FLOPs",
        f"  the run      {steps}, {_size(in_all)} tokens, {in_all / n_data:.2f} epochs, "
        f"{flops * config.max_iters:.1e} FLOPs",
        *memory_lines(needed, there, weights),
    ]


def memory_lines(needed: Memory, there: int | None, weights: int) -> list[str]:
    """The banner's lines on memory, whose parts add up; there and weights: as in warn_if_too_much."""
    of = f" of {(there + weights) / 1e9:.1f} GB" if there is not None else ""
    parts = {
        "weights, gradients and AdamW": needed.state,
        "activations": needed.activations,
        "the head": needed.head,
    }
    parts |= {"a checkpoint's copy": needed.copy} if needed.copy else {}
    parts["gaps between them"] = needed.overhead
    return [
        f"  memory       about {needed.total / 1e9:.2f} GB{of}: "
        + ", ".join(f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in parts.items()),
        "               (Python and its libraries come on top, about 0.35 GB on a CPU)",
    ]


def code_line(environment: dict[str, str]) -> str:
    """The banner's line on commit and versions."""
    no_code = ("commit", "machine", "cores", "gpu", "command", "device", "world_size")
    versions = ", ".join(
        f"{name} {value}" for name, value in environment.items() if name not in no_code
    )
    return f"  code         {environment['commit']}, {versions}"


def _size(n: int) -> str:
    """2.10 M for 2,100,000; small numbers as they are."""
    if n >= 10**9:
        return f"{n / 1e9:.2f} B"
    return f"{n / 1e6:.2f} M" if n >= 10**5 else f"{n:,}"
