"""Processes: one without torchrun, several under it. The model and the loop do not know how many there are."""

import contextlib
import ctypes
import math
import os
import platform
import shutil
import signal
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.base.errors import Interrupted, UserError
from engine.base.sharding import shard
from engine.base.signals import Watch


@dataclass(frozen=True)
class Processes:
    """This process and its peers."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    watch: Watch = field(default_factory=Watch)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> range:
        """Which of n pieces of work this process does."""
        return range(self.rank, n, self.world_size)

    def wrap(
        self, model: torch.nn.Module, compile: bool, sharding: str = "none"
    ) -> tuple[torch.nn.Module, str]:
        """The model on this device, compiled if wanted and possible, its gradients averaged over all processes in
        backward; and how it runs, in words. Shards are made in place: parameters keep their names, as DTensors."""
        if self.world_size > 1 and sharding == "fsdp":
            how = _compiled(model.transformer.h, self.device) if compile else "eager"
            shard(
                model, self.device.type, self.world_size
            )  # which moves it to the device block by block
            return model.to(self.device), f"{how}, parameters sharded"
        model = model.to(self.device)
        how = _compiled([model], self.device) if compile else "eager"
        if self.world_size == 1:
            return model, how
        ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        # every process sets its own; as an argument it is deprecated since torch 2.13
        wrapped.broadcast_buffers = False
        return wrapped, how

    def accumulate(self, model: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around one micro-batch: gradients travel between processes with the last one only."""
        if isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext() if last else model.no_sync()
        if self.world_size > 1:
            model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def heartbeat(self) -> None:
        """The loop's sign of life; a process on its own ends here when a signal asked for it."""
        self.watch.beat()
        if self.world_size == 1 and self.watch.signum:
            raise Interrupted(self.watch.signum)

    def all_reduce(self, values: torch.Tensor) -> list[float]:
        """values (n,) summed over all processes; where one of them was asked to end, all raise Interrupted here."""
        self.heartbeat()
        if self.world_size == 1:
            return values.tolist()
        values = torch.cat([values, values.new_tensor([float(self.watch.signum)])])
        dist.all_reduce(values)
        *values, signals = values.tolist()
        if signals:
            raise Interrupted(self.watch.signum or signal.SIGTERM)
        return values

    def broadcast(self, value: object) -> object:
        """What the first process has, on all."""
        said = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def check_same(self, value: int, what: str) -> None:
        """Refuse to go on where the processes have different values, as a folder that not all see alike makes them."""
        seen = [None] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(seen, value)
            if len(set(seen)) > 1:
                raise UserError(
                    f"the processes disagree on {what}: {seen}; do all machines see the same out_dir?"
                )

    def wait_for_all(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def init(device: str, backend: str, hang_timeout: float = 0.0):
    """Join the processes that torchrun started, or be the only one; yields Processes and takes leave at the end.

    hang_timeout: seconds without progress, in a collective or in the loop, after which a process ends; 0: never."""
    keep_memory()
    # for what autocast leaves in float32, as nanoGPT does
    torch.backends.cuda.matmul.allow_tf32 = True
    world_size, rank = _place()
    if world_size == 1:
        yield Processes(pick_device(device), watch=Watch(0, hang_timeout))
        return
    local = pick_device(device)
    if local.type == "cuda":
        local = torch.device("cuda", _whole("LOCAL_RANK", range(world_size)))
        if local.index >= torch.cuda.device_count():
            raise UserError(
                f"process {local.index} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                f"use torchrun --nproc_per_node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local)
    if backend == "nccl" and local.type != "cuda":
        raise UserError(
            f"backend = 'nccl' needs CUDA, but the device is {local.type}; use --backend=gloo or auto"
        )
    if backend == "auto":
        backend = "nccl" if local.type == "cuda" else "gloo"
    # the watch, which shows where each process is, comes first; this is for what happens before the loop
    timeout = timedelta(seconds=hang_timeout + 60) if hang_timeout else timedelta(days=365)
    try:
        store = _fresh_store(rank, world_size, timeout)
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=rank, world_size=world_size
        )
    except RuntimeError as error:  # a host that is not there, a port that is taken
        raise UserError(
            f"cannot join the other processes ({str(error)[:200]}); start with torchrun"
        ) from None
    yield Processes(local, rank, world_size, Watch(rank, hang_timeout))
    # not behind an error: it would wait for peers that wait for this process
    dist.destroy_process_group()


def pick_device(device: str) -> torch.device:
    """The torch.device of "auto" (the best there is), "cpu", "cuda", "cuda:1", "mps"; refuses one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise UserError(
            f"device = {device!r} is not a device; use auto, cpu, cuda, cuda:N or mps"
        ) from None
    if picked.type == "cuda":
        found = torch.cuda.device_count()
        if (picked.index or 0) >= found:
            raise UserError(
                f"device = {device!r} is not there: this machine has {found} CUDA devices; try --device=auto"
            )
    elif picked.type == "mps" and not _has_mps():
        raise UserError("device = 'mps' is not there; try --device=auto")
    elif picked.type not in ("cpu", "mps"):
        raise UserError(f"device = {device!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return picked


def check_accumulation(gradient_accumulation_steps: int, world_size: int) -> None:
    """Refuse an accumulation (counted over all processes) that the processes cannot share evenly."""
    if gradient_accumulation_steps < 1 or gradient_accumulation_steps % world_size:
        below = max(0, gradient_accumulation_steps // world_size * world_size)
        near = [str(n) for n in (below, below + world_size) if n > 0]
        raise UserError(
            f"gradient_accumulation_steps = {gradient_accumulation_steps} counts over all processes and is no multiple "
            f"of their number, {world_size}; the nearest valid values are {' and '.join(near)}"
        )


def autocast(device: torch.device, dtype: str) -> tuple[contextlib.AbstractContextManager, str]:
    """The autocast context of dtype = auto | float32 | bfloat16 | float16, and the name of the dtype that it uses.

    auto: bfloat16 where the hardware multiplies it fast, else float16 on CUDA, else float32.
    """
    if dtype == "auto":
        if device.type == "cuda":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        else:
            dtype = (
                "bfloat16"
                if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
                else "float32"
            )
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype = {dtype!r} is not one of: auto, float32, bfloat16, float16")
    if dtype == "float32":
        return contextlib.nullcontext(), dtype
    return torch.autocast(device.type, getattr(torch, dtype)), dtype


def seed_micro_batch(seed: int, micro_batch: int) -> None:
    """Make dropout and noise of a micro-batch a function of (seed, micro_batch) alone."""
    torch.manual_seed(
        (seed * 0x9E3779B97F4A7C15 + micro_batch * 0xBF58476D1CE4E5B9 + 1) % (1 << 63)
    )


def peak_flops(device: torch.device) -> float:
    """The dense bf16 peak of the device in FLOP/s from its data sheet; nan where we do not know it."""
    if device.type != "cuda":
        return math.nan
    name = torch.cuda.get_device_name(device)
    peaks = {
        "H200": 989e12,
        "H100": 989e12,
        "A100": 312e12,
        "L40": 181e12,
        "A10": 125e12,
        "V100": 125e12,
        "4090": 165e12,
    }
    return next((peak for part, peak in peaks.items() if part in name), math.nan)


def keep_memory() -> None:
    """Have glibc's malloc keep large freed blocks: by default each step on a CPU faults its tensors' pages in anew."""
    if platform.libc_ver()[0] == "glibc":
        libc, m_mmap_max, m_trim_threshold = ctypes.CDLL(None), -4, -1
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def _place() -> tuple[int, int]:
    """World size and rank, which torchrun puts into the environment; without it there is one process."""
    world_size = _whole("WORLD_SIZE", range(1, 1 << 20), "1")
    rank = _whole("RANK", range(world_size), "0" if world_size == 1 else "")
    if world_size > 1:
        _whole("MASTER_PORT", range(1, 1 << 16))
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(
                "WORLD_SIZE is set and MASTER_ADDR is not; start with torchrun, or unset WORLD_SIZE"
            )
    return world_size, rank


def _whole(name: str, allowed: range, default: str = "") -> int:
    """A number in the environment."""
    text = os.environ.get(name, default)
    if not (text.isdecimal() and int(text) in allowed):
        raise UserError(
            f"{name} = {text!r} in the environment must be {allowed[0]} to {allowed[-1]}; "
            "start with torchrun, or unset WORLD_SIZE and RANK"
        )
    return int(text)


def _fresh_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store in which the processes find each other, with a name space of its own for each start.

    torchrun keeps one store over restarts, where a process may read the address of one that was killed (PyTorch issue
    135712; its restart count differs between machines). So rank 0 waits until all have answered its own name."""
    store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    name, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"here_{rank}", name)
        while name not in (group := store.get("group").decode().split()):
            time.sleep(0.05)
            if time.monotonic() > end:
                raise RuntimeError(f"rank 0 did not answer in {timeout}")
        store.set(" ".join((group[0], name)), "")
        return dist.PrefixStore(group[0], store)
    while time.monotonic() < end:
        others = [store.get(f"here_{other}").decode() for other in range(1, world_size)]
        store.set("group", " ".join((name, *others)))
        time.sleep(0.05)
        if store.check([f"{name} {other}" for other in others]):
            return dist.PrefixStore(name, store)
    raise RuntimeError(f"not all processes answered in {timeout}")


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _compiled(modules: Iterable[torch.nn.Module], device: torch.device) -> str:
    """Compile each in place; says how they run."""
    compiler = os.environ.get("CXX") or (
        "clang++" if platform.system() == "Darwin" else "g++"
    )  # as inductor looks
    if device.type == "cpu" and not shutil.which(compiler):
        return f"eager (torch.compile wants the C++ compiler {compiler} and does not find it)"
    for module in modules:
        module.compile()
    return "compiled"
