"""The Triton kernels of the fused loss, generated for an H200 that is not there.

python -m tests.triton_kernels prints the number of kernels of each head's pass over the logits, and
the lengths of their loops. It needs triton, and fake_cuda.cpp loaded before torch.
"""

import functools
import json
import re
import types

import torch
import torch._inductor.config
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from bench.heads import OURS
from heads import HeadConfig
from heads.likelihoods import LIKELIHOODS
from heads.linear_loss import LowRankLogits, _normaliser

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    total_memory=141 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=60 << 20,
)
ANSWERS = {
    "is_available": True,
    "is_initialized": True,
    "current_device": 0,
    "device_count": 1,
    "get_device_properties": H200,
    "get_device_capability": (9, 0),
    "get_compute_capability": 90,
    "is_triton_capable": True,
    "raise_if_triton_unavailable": None,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
    "synchronize": None,
    "_lazy_init": None,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
}


class Generated(Exception):
    """Ends the compilation, which would need a driver."""


def pretend() -> None:
    """Answer Inductor's questions as a machine with an H200 would."""
    for where in (torch.cuda, CudaInterface, CudaInterface.Worker):
        for name, answer in ANSWERS.items():
            if hasattr(where, name):
                setattr(where, name, staticmethod(lambda *_, answer=answer: answer))
    torch.version.cuda = "13.0"
    torch.compiler.is_compiling = lambda: True
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = False
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
    )
    triton.runtime.driver.set_active(driver)


def code_of(function, *arguments: torch.Tensor) -> str:
    """The code that Inductor generates for a function of fake tensors."""
    found = []

    def keep(graph):
        found.append(graph.codegen()[0].value)
        raise Generated

    GraphLowering._compile_to_module = keep
    graph = make_fx(function, decomposition_table=select_decomp_table())(*arguments)
    try:
        compile_fx_inner(graph, arguments)
    except torch._inductor.exc.InductorError:
        if not found:
            raise
    return found[0]


def main() -> None:
    pretend()
    for head, options in OURS.items():
        config = HeadConfig(**options, n_data=10**9)
        likelihood = LIKELIHOODS[config.likelihood](config, 50257)
        normaliser = functools.partial(_normaliser, likelihood, True, 50257)

        def function(logits, bias, *shift, normaliser=normaliser):
            gradients, value = normaliser(logits, bias, LowRankLogits(*shift))
            return *gradients, value

        with FakeTensorMode(), torch.no_grad():
            new = functools.partial(torch.empty, device="cuda")
            logits = new(2048, 50304, dtype=torch.bfloat16)
            code = code_of(function, logits, new(50304), new(2048, 1), new(50304, 1))
        n_kernels = code.count("async_compile.triton(")
        sizes = {int(size) for size in re.findall(r"_numel = (\d+)", code)}
        print(json.dumps([head, n_kernels, sorted(sizes)]))


if __name__ == "__main__":
    main()
