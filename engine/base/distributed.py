"""Processes: one, or several under torchrun. Model and loop are the same for both."""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.base.errors import Interrupted, UserError
from engine.base.sharding import shard
from engine.base.signals import Watch

# dense bf16 FLOP/s from the data sheets
PEAK_FLOPS = {  # a part of the name -> FLOP/s; the first that occurs counts
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10": 125e12,
    "4090": 165e12,
}


@dataclass(frozen=True)
class Processes:
    """This process among the others of a run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    watch: Watch = field(default_factory=Watch)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, first: int, end: int) -> range:
        """The micro-batches of this process among those from first to end (exclusive)."""
        return range(first + self.rank, end, self.world_size)

    def wrap(
        self, model: torch.nn.Module, compile: bool, sharding: str, dtype: str = "float32"
    ) -> torch.nn.Module:
        """Return the model on this device. Its backward averages gradients over all processes.

        fsdp shards in place: parameters become DTensors. dtype: that of autocast.
        """
        shards = dist.is_initialized() and sharding == "fsdp"
        if compile:
            prepare_compiler(self.device)
        if compile and not shards:
            model.compile()
        elif compile:
            for block in model.transformer.h:
                block.compile()
            model.lm_head.data_loss = torch.compile(model.lm_head.data_loss)
        if shards:  # moves blocks to the device one by one
            shard(model, self.device.type, self.world_size, getattr(torch, dtype))
        model = model.to(self.device)
        if shards or not dist.is_initialized():
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        ddp_model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        ddp_model.broadcast_buffers = False  # torch 2.13 deprecates it as an argument
        return ddp_model

    def micro_batches(self, model: torch.nn.Module, first: int, end: int) -> Iterator[int]:
        """This process's micro-batches of a step.

        Backward averages gradients only in the last. fully_shard averages them within a machine in
        each: otherwise a process would keep all gradients until then, not only its shard.
        """
        numbers = self.share(first, end)
        for number in numbers:
            self.heartbeat()
            is_last = number == numbers[-1]
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = is_last  # no_sync() does the same
            elif dist.is_initialized():
                model.set_requires_all_reduce(is_last)
            yield number

    def heartbeat(self) -> None:
        """Restart the hang timer; after a signal, a single process raises Interrupted."""
        self.watch.beat()
        if self.world_size == 1 and self.watch.signum:
            raise Interrupted(self.watch.signum)

    def all_reduce(self, values: torch.Tensor) -> list[float]:
        """Sum values (n,) over all processes. After a signal to one, all raise Interrupted."""
        self.heartbeat()
        if not dist.is_initialized():
            return values.tolist()
        values = values.to(self.device)  # nccl takes no others
        signum = values.new_full((1,), self.watch.signum)  # unlike new_tensor, it does not wait
        values = torch.cat([values, signum])
        dist.all_reduce(values)
        *values, signals = values.tolist()
        if signals:
            raise Interrupted(self.watch.signum or signal.SIGTERM)
        return values

    def broadcast(self, value: object) -> object:
        """Returns the value of the main process on all processes."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait_for_all(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def init(device: str, backend: str, hang_timeout: float = 0.0):
    """Join the processes that torchrun started, or be the only one. Yields Processes.

    A single process that torchrun started joins a group too: so DDP, fully_shard and NCCL run, and
    can be tested, on one GPU.

    hang_timeout: seconds without progress, in a collective or in the loop, after which a process
    exits; 0: never.
    """
    # for matrix products that autocast leaves in float32; nanoGPT does the same
    torch.backends.cuda.matmul.allow_tf32 = True
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    watch = Watch(rank == 0, hang_timeout)
    picked = pick_device(device)
    if picked.type == "cpu":
        keep_memory()
    if world_size == 1 and not dist.is_torchelastic_launched():
        yield Processes(picked, watch=watch)
        return
    if picked.type == "cuda":
        picked = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', rank)}")
        torch.cuda.set_device(picked)
    if backend == "auto":
        backend = "nccl" if picked.type == "cuda" else "gloo"
    # after the first step the hang timer fires first and prints the stacks; before, this does
    timeout = timedelta(seconds=hang_timeout + 60) if hang_timeout else timedelta(days=365)
    try:
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=_fresh_store(rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            # nccl connects now, not in the first collective: what is wrong with it ends here
            device_id=picked if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:  # unknown host, port in use, no MASTER_ADDR
        raise UserError(
            f"cannot join the other processes ({str(error)[:200]}); "
            "start with torchrun, and without CUDA use --backend=gloo"
        ) from None
    yield Processes(picked, rank, world_size, watch)
    # not after an error: it would wait for processes that wait for this one
    dist.destroy_process_group()


def pick_device(device: str) -> torch.device:
    """The torch.device of "auto" (the best available), "cpu", "cuda", "cuda:1" or "mps"."""
    n_gpus, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if n_gpus else "mps" if has_mps else "cpu")
    n_found = {"cpu": 1, "cuda": n_gpus, "mps": int(has_mps)}
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or (picked.index or 0) >= n_found.get(picked.type, 0):
        raise UserError(
            f"device = {device!r} is not available: this machine has {n_gpus} CUDA devices; "
            "use --device=auto, cpu, cuda, cuda:N or mps"
        )
    return picked


def divide_step(n_micro: int, batch_size: int, world_size: int) -> tuple[int, int]:
    """Divide a step of n_micro x batch_size blocks into at least n_micro equal micro-batches, whose
    number is a multiple of world_size. Returns (micro-batches, blocks in each).

    The step keeps its blocks, so the number of processes changes only rounding and noise."""
    n_blocks = n_micro * batch_size
    for n_parts in range(n_micro, n_blocks + 1):
        if n_parts % world_size == 0 and n_blocks % n_parts == 0:
            return n_parts, n_blocks // n_parts
    nearest = max(1, round(n_micro / world_size)) * world_size
    raise UserError(
        f"{world_size} processes cannot share a step of {n_micro} x {batch_size} blocks evenly; "
        f"use --gradient_accumulation_steps={nearest}"
    )


def autocast(device: torch.device, dtype: str) -> tuple[contextlib.AbstractContextManager, str]:
    """The autocast context of dtype = auto | float32 | bfloat16 | float16, and its dtype's name.

    auto: bfloat16 if the hardware is fast at it, else float16 on CUDA, else float32.
    """
    if dtype == "auto" and device.type == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif dtype == "auto":
        is_fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if is_fast else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype = {dtype!r} is not one of: auto, float32, bfloat16, float16")
    if dtype == "float32":
        return contextlib.nullcontext(), dtype
    return torch.autocast(device.type, getattr(torch, dtype)), dtype


def seed_micro_batch(seed: int, micro_batch: int) -> None:
    """Make dropout and noise of a micro-batch depend only on (seed, micro_batch)."""
    mixed = seed * 0x9E3779B97F4A7C15 + micro_batch * 0xBF58476D1CE4E5B9 + 1
    torch.manual_seed(mixed % (1 << 63))


def peak_flops(device: torch.device) -> float:
    """The device's dense bf16 peak in FLOP/s; nan if unknown."""
    if device.type != "cuda":
        return math.nan
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), math.nan)


def prepare_compiler(device: torch.device) -> None:
    """Check that the C++ compiler that torch.compile needs on a CPU is installed. Share the cores
    of a machine among the compile workers of its processes: by default, each starts up to 32."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise UserError(f"compile = True needs {compiler}; install it, or use --compile=False")
    if n_local := int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
        n_workers = max(1, min(32, os.cpu_count() // n_local))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(n_workers))


def keep_memory() -> None:
    """Make malloc keep large freed blocks: by default every step page-faults its tensors again."""
    if sys.platform == "linux":
        mallopt, m_mmap_max, m_trim_threshold = ctypes.CDLL(None).mallopt, -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def _fresh_store(rank, world_size, timeout):
    """The store in which the processes find each other, with a new prefix for each start.

    torchrun keeps one store over restarts, so a process may read the address of a killed one
    (PyTorch issue 135712; the restart count differs between machines). So each process announces a
    random name, and rank 0 answers to each name with its own, the prefix. It asks again for the
    names that did not confirm this: they may be those of killed processes.
    """
    store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    name = uuid.uuid4().hex
    if rank:
        store.set(f"name_{rank}", name)
        prefix = store.get(f"prefix_for_{name}").decode()  # waits for it
        store.set(f"{prefix} {name}", "")
        return dist.PrefixStore(prefix, store)
    missing = list(range(1, world_size))
    while missing:
        names = {other: store.get(f"name_{other}").decode() for other in missing}
        for other_name in names.values():
            store.set(f"prefix_for_{other_name}", name)
        time.sleep(0.05)
        missing = [other for other in missing if not store.check([f"{name} {names[other]}"])]
    return dist.PrefixStore(name, store)
