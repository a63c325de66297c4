"""What a GPU makes of GPT-2 124M: attention, products, training steps, heads, decoding.

    # under 20 minutes on one CUDA GPU; appends to bench/results.jsonl
    python bench/gpu.py
    # some of its parts: attention, products, steps, heads, decode
    python bench/gpu.py --cases=products,heads
    # tiny shapes on whatever device there is: does it run?
    python bench/gpu.py --quick

All in bf16. A ratio is of times per FLOP, where FLOPs are known; for a step these are the softmax model's for every
head, and their share of the data sheet's is MFU. Memory is what one call needs, gradients included, and for a step also
the weights and the optimiser's state. Each part has a process of its own: none meets what another left.

The goals on an H100 or H200: a softmax step in 900 ms (583k tokens/s, MFU 0.50), smooth within 1.005 of it, sigmoid
1.00, Bayesian ones 1.02; each head in 1 GB; at batch 1 4,000 tokens/s, and 32 draws within 1.15 of one.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import generate, heads, measure, step
from bench.heads import OURS
from engine.base.distributed import pick_device
from engine.base.errors import UserError, run_main
from heads.linear_loss import LOGITS_BYTES_PRODUCT, rows_per_chunk

REPEATS = 20  # of a product, so that launching it does not count
KERNELS = {
    name: getattr(SDPBackend, f"{name.upper()}_ATTENTION")
    for name in ("cudnn", "flash", "efficient")
}
BACKENDS = {
    "default": [*KERNELS.values(), SDPBackend.MATH],
    **KERNELS,
}  # default: what PyTorch picks
DRAWS = (1, 8, 32)


def attention(shape: dict[str, int], rounds: int, device: torch.device) -> None:
    """Forward and backward, causal, on queries, keys and values that lie as model.py splits them."""
    B, T, C = shape["batch_size"], shape["block_size"], shape["n_embd"]
    qkv = torch.randn(B, T, 3 * C, dtype=torch.bfloat16, device=device, requires_grad=True)
    gradient, cases = torch.randn(B, T, C, dtype=torch.bfloat16, device=device), {}
    for name, backends in BACKENDS.items():
        case = partial(attend, qkv, gradient, shape["n_head"], backends)
        try:
            case()
            cases[name] = case
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # not for this device, dtype or shape
            print(f"  attention has no {name} kernel here: {error}")
    flops = dict.fromkeys(
        cases, 7 * B * T**2 * C
    )  # two products forward, five backward, half of each masked
    measure.report(
        "gpu_attention", measure.in_turns(cases, rounds), "default", flops=flops, shapes=shape
    )


def attend(
    qkv: torch.Tensor, gradient: torch.Tensor, n_head: int, backends: SDPBackend | list[SDPBackend]
) -> None:
    """qkv (B, T, 3 C), gradient (B, T, C) by the attention's output."""
    B, T, C = gradient.shape
    with sdpa_kernel(backends):
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.transpose(1, 2).reshape(B, T, C).backward(gradient)
    qkv.grad = None


def products(shape: dict[str, int], rounds: int, device: torch.device) -> None:
    """The backbone's and the head's matrix products, and that of one piece of the head's loss (engine/linear_loss)."""
    n, C, V = shape["batch_size"] * shape["block_size"], shape["n_embd"], shape["vocab_size"]
    x = torch.randn(n, C, dtype=torch.bfloat16, device=device)
    piece, cases, flops = x[: rows_per_chunk(LOGITS_BYTES_PRODUCT, x, V)], {}, {}
    shapes = {
        "c_attn": (x, 3 * C),
        "c_fc": (x, 4 * C),
        "attn.c_proj": (x, C),
        "head": (x, V),
        "head_piece": (piece, V),
    }
    for name, (rows, width) in shapes.items():
        product = partial(
            F.linear, rows, torch.randn(width, C, dtype=torch.bfloat16, device=device)
        )
        cases[name], flops[name] = partial(repeat, product), 2 * len(rows) * C * width
    seconds = {
        name: [t / REPEATS for t in times]
        for name, times in measure.in_turns(cases, rounds).items()
    }
    measure.report("gpu_products", seconds, "head", flops=flops, shapes=shape)


def repeat(case: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        case()


def steps(shape: dict[str, int], rounds: int, device: torch.device) -> None:
    """A training step of each head: micro-batches, gradient accumulation, torch.compile, fused AdamW."""
    n_micro = 16
    cases = {name: step.prepare(name, n_micro=n_micro, **shape) for name in OURS}
    n_tokens = n_micro * shape["batch_size"] * shape["block_size"]
    flops = dict.fromkeys(cases, n_tokens * cases["softmax"].model.flops_per_token())
    seconds = measure.in_turns(cases, rounds)
    memory = {name: case.held() + measure.peak_memory(case) for name, case in cases.items()}
    shapes = shape | {"step_tokens": n_tokens}
    measure.report("gpu_steps", seconds, "softmax", memory, n_tokens, flops, shapes=shapes)


def heads_alone(shape: dict[str, int], rounds: int, device: torch.device) -> None:
    """The heads on one micro-batch of hidden states, against F.linear and F.cross_entropy under the same autocast."""
    n, C, V = shape["batch_size"] * shape["block_size"], shape["n_embd"], shape["vocab_size"]
    shapes = {"n_tokens": n, "n_embd": C, "vocab_size": V}
    cases = {
        name: heads.prepare(name, **shapes)
        for name in ("plain_bf16", *(f"{name}_bf16" for name in OURS))
    }
    seconds = measure.in_turns(cases, rounds)
    memory = {name: measure.peak_memory(case) for name, case in cases.items()}
    measure.report(
        "gpu_heads",
        seconds,
        "plain_bf16",
        memory,
        n,
        dict.fromkeys(cases, 6 * n * C * V),
        shapes=shapes,
    )


def decode(shape: dict[str, int], rounds: int, device: torch.device) -> None:
    """Texts of the Bayesian head that averages draws for each token, the backbone eager and as one compiled graph."""
    shape = {name: size for name, size in shape.items() if name != "batch_size"}
    n_new = shape["block_size"] // 4
    # one code for two models, and for caches that may lie elsewhere
    torch._dynamo.config.recompile_limit = 64
    for batch in (1, 32):
        models = {how: generate.gpt("bayes", shape).to(device) for how in ("eager", "compiled")}
        models["compiled"].compile_step()
        idx, cases = (
            torch.randint(shape["vocab_size"], (batch, n_new // 16 or 1), device=device),
            {},
        )
        for how, model in models.items():
            for n in DRAWS:
                case = generate.ours(model, idx, n_new, "bfloat16", n_samples=n)
                cases[f"{how}, batch {batch}, draws: {n}"] = case
        seconds, shapes = measure.in_turns(cases, rounds), shape | {"batch": batch, "n_new": n_new}
        for how in models:
            group = {name: times for name, times in seconds.items() if name.startswith(how)}
            measure.report(
                "gpu_decode", group, next(iter(group)), n_tokens=batch * n_new, shapes=shapes
            )


PARTS = {
    "attention": attention,
    "products": products,
    "steps": steps,
    "heads": heads_alone,
    "decode": decode,
}


def main() -> None:
    args = measure.arguments(__doc__, rounds=5, batch_size=32)
    device = pick_device("auto")
    if device.type != "cuda" and not args.quick:
        raise UserError(
            f"bench/gpu.py needs a CUDA GPU, the device is {device.type}; --quick runs tiny shapes on it"
        )
    names = args.cases or list(PARTS)
    if len(names) > 1 and not args.quick:  # a part that fails does not end the others
        commands = [[sys.executable, __file__, *sys.argv[1:], f"--cases={name}"] for name in names]
        sys.exit(int(any([subprocess.run(command).returncode for command in commands])))
    measure.use_allocator("tuned")
    torch.backends.cuda.matmul.allow_tf32 = True  # as training has it
    for name in names:
        PARTS[name](
            step.QUICK if args.quick else step.GPT2 | {"batch_size": args.batch_size},
            args.rounds,
            device,
        )


if __name__ == "__main__":
    run_main(main)
