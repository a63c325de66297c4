"""What CUDA and many processes do, on a machine without either.

fake_cuda.cpp is a CUDA device that does nothing. With it, FakeTensorMode runs whole steps whose
tensors have a shape, a dtype and a device, but no contents: reading one, as .item() does, fails.
Process groups of the backend "fake" answer at once.
"""

import collections
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.heads import OURS
from engine.base.distributed import Processes, autocast
from engine.base.optim import make_optimizer
from engine.base.sharding import clip_gradients
from heads import HeadConfig, linear_loss
from model import GPT, GPTConfig
from tests.helpers import ROOT, output_of

SHAPE = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 67}


class Operators(TorchDispatchMode):
    """Counts operators. Collects those that mix devices, and the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.counts, self.mixed, self.products = collections.Counter(), set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        self.counts[name] += 1
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.mixed.add(name)
        if name in ("aten::mm", "aten::addmm"):  # on a GPU, attention has its own operator
            self.products |= {str(t.dtype) for t in tensors}
        return result


def print_steps() -> None:
    """Train GPT-2 124M for two steps with each head and dtype, on the fake device."""
    # autocast asks a driver that is not there
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda = torch.device("cuda")
    for head, options in OURS.items():
        for dtype in ("float32", "bfloat16", "float16"):
            with FakeTensorMode(), cuda, Operators() as operators:
                config = HeadConfig(**options, n_data=10**9)
                model = GPT(GPTConfig(vocab_size=50257, head=config))
                optimizer = make_optimizer(model, 6e-4, (0.9, 0.95), 0.1)
                batch = torch.empty(2, 4, 1024, dtype=torch.long)
                for _ in range(2):
                    with autocast(cuda, dtype)[0]:
                        loss = model(*batch)
                    loss.backward()
                    clip_gradients(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            products = [name.removeprefix("torch.") for name in operators.products]
            print(json.dumps([head, dtype, products, list(operators.mixed)]))


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory) -> Path:
    """The library of fake_cuda.cpp."""
    if not shutil.which("g++") or torch.version.cuda:
        pytest.skip("needs g++ and a CPU build of torch")
    library = tmp_path_factory.mktemp("fake") / "cuda.so"
    home = Path(torch.__file__).parent
    include = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
    link = [f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"]
    source = ROOT / "tests" / "fake_cuda.cpp"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", *include, source, *link, "-o", library]
    subprocess.run(command, check=True)
    return library


@pytest.mark.slow
def test_a_step_of_124m_stays_on_the_device_and_multiplies_in_its_dtype(fake_cuda):
    command = [sys.executable, "-m", "tests.test_cuda_simulated"]
    lines = output_of(*command, LD_PRELOAD=str(fake_cuda)).splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == 3 * len(OURS)
    for head, dtype, products, mixed in steps:
        assert products == [dtype] and mixed == [], head


@pytest.mark.slow
def test_the_pass_over_50257_logits_is_two_kernels_over_whole_rows(fake_cuda):
    pytest.importorskip("triton", reason="needs the triton package, to generate code")
    lines = output_of(sys.executable, "-m", "tests.triton_kernels", LD_PRELOAD=str(fake_cuda))
    for head, n_kernels, sizes in map(json.loads, lines.splitlines()):
        # 50,304 columns: a multiple of 64, so a thread loads 16 bytes at a time
        assert n_kernels == 2 and sizes == [2048, 50304], head


@pytest.mark.parametrize("head", OURS)
def test_a_step_compiles_only_the_first_time_and_breaks_only_at_the_fused_loss(head, monkeypatch):
    compiled = functools.cache(functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(linear_loss, "_compiled", compiled)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = GPT(GPTConfig(**SHAPE, head=HeadConfig(**OURS[head], n_data=1000)))
    model.compile(backend="eager")
    n_graphs = []
    for step in range(3):
        model.lm_head.kl_ramp.fill_(step / 3)
        model(*torch.randint(67, (2, 4, 16))).backward()
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert n_graphs[0] == n_graphs[2]
    draws_weights = "estimator" in OURS[head]
    assert len(counters["graph_break"]) == 1 + draws_weights


@pytest.fixture
def first_of_many(monkeypatch):
    """first_of_many(world_size, n_local, sharding): the first process and its wrapped model."""

    def join(world_size, n_local, sharding):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_local))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        processes = Processes(torch.device("cpu"), 0, world_size)
        return processes, processes.wrap(GPT(GPTConfig(**SHAPE)), False, sharding)

    yield join
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size, n_local", [(8, 8), (64, 8), (1024, 8), (1024, 1024)])
def test_fully_shard_reduces_in_each_micro_batch_and_between_machines_once(
    first_of_many, world_size, n_local
):
    processes, model = first_of_many(world_size, n_local, "fsdp")
    with Operators() as operators:
        for _ in processes.micro_batches(model, 0, 3 * world_size):
            model(*torch.randint(67, (2, 2, 16))).backward()
    n_layer, counts = SHAPE["n_layer"], operators.counts
    # the weights of a block once for the forward pass and once for the backward pass
    assert counts["c10d::_allgather_base_"] == 3 * (2 * n_layer + 1)
    assert counts["c10d::_reduce_scatter_base_"] == 3 * (n_layer + 1)
    assert counts["c10d::allreduce_"] == (n_layer + 1 if n_local < world_size else 0)
    weight = model.transformer.wte.weight
    assert len(weight.to_local()) == len(weight.grad.to_local()) == -(-67 // n_local)


def test_ddp_averages_gradients_in_the_last_micro_batch(first_of_many):
    processes, model = first_of_many(1024, 8, "none")
    numbers = processes.micro_batches(model, 0, 3 * 1024)
    assert [model.require_backward_grad_sync for _ in numbers] == [False, False, True]


if __name__ == "__main__":
    print_steps()
