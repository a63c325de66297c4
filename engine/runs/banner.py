"""Describe a run: the lines that it prints first, and the code, versions and machine that
config.json records.
"""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from engine.base.distributed import divide_step

ROOT = Path(__file__).resolve().parents[2]


def banner(config, processes, model, dtype: str, n_data: int, step: int) -> list[str]:
    """The lines that a run prints first: head, parameters, size of a step, length of the run.

    n_data: training tokens; step: the next step."""
    head = config.model.head
    how = "compiled" if config.compile else "eager"
    title = f"{config.out_dir}: {head.weights} x {head.likelihood} head, {dtype}, {how}, "
    title += f"{config.optimizer}, on {processes.world_size} x {processes.device.type}"
    if step:
        title += f", resuming at step {step}"
    n_parameters = sum(p.numel() for p in model.parameters())
    parameters = f"  parameters   {_size(n_parameters)}"
    if config.eval_only:
        return [title, parameters]
    block_size = config.model.block_size
    n_micro, batch_size = divide_step(
        config.gradient_accumulation_steps, config.batch_size, processes.world_size
    )
    n_tokens = n_micro * batch_size * block_size
    flops = n_tokens * model.flops_per_token()
    n_all = config.max_iters * n_tokens
    micro_batches = f"{n_micro:,} x {batch_size} blocks of {block_size:,}"
    return [
        title,
        parameters,
        f"  a step       {n_tokens:,} tokens ({micro_batches}), {flops:.1e} FLOPs",
        f"  the run      {config.max_iters:,} steps, {_size(n_all)} tokens, "
        f"{n_all / n_data:.2f} epochs, {config.max_iters * flops:.1e} FLOPs",
    ]


def environment() -> dict[str, str]:
    """What results depend on besides the options: commit ("-dirty": with uncommitted changes),
    versions and machine.
    """
    return {
        "commit": _git("describe", "--always", "--dirty").strip() or "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def this_start(processes, step: int) -> dict:
    """The record of a start of a run in config.json: step, code, command and machine."""
    return {
        "step": step,
        **environment(),
        "diff": _git("diff", "HEAD", "--", "*.py"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": str(processes.device),
        "world_size": processes.world_size,
    }


def _git(*arguments):
    """The output of git in this repository, on the first process; "" if git or the repository is
    missing.
    """
    if os.environ.get("RANK", "0") != "0":
        return ""
    command = ["git", f"--git-dir={ROOT / '.git'}", *arguments]
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=ROOT, capture_output=True).stdout.decode(
            errors="replace"
        )
    return ""


def _size(n):
    """2.10 M for 2,100,000; small numbers as they are."""
    if n >= 10**9:
        return f"{n / 1e9:.2f} B"
    return f"{n / 1e6:.2f} M" if n >= 10**5 else f"{n:,}"
