"""What a GPU makes of GPT-2 124M: attention, products, training steps, heads, decoding; beside each result its goal.

    python bench/gpu.py                           # under 20 minutes on one CUDA GPU; appends to bench/results.jsonl
    python bench/gpu.py --cases=products,heads    # some of its parts: attention, products, steps, heads, decode
    python bench/gpu.py --quick                   # tiny shapes on whatever device there is: does it run?

All in bf16. of_peak is the share of the data sheet's FLOP/s; for a step that is MFU, with the softmax model's FLOPs for
every head. A ratio is of times per FLOP, where FLOPs are given. Memory is what one call needs, gradients included, and
for a step also the weights and the optimiser's state. Each part has a process of its own: none meets what another left.
"""

import gc
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import generate, heads, measure, step
from bench.heads import OURS
from engine.distributed import peak_flops, pick_device
from engine.linear_loss import PIECE, rows_within


@dataclass(frozen=True)
class Sizes:
    shape: dict[str, int]  # of the model; batch_size: sequences in a micro-batch, halved until it fits
    step_tokens: int  # of a training step, all its micro-batches
    attention_batch: int  # sequences, halved until they fit
    n_new: int  # tokens of a text
    repeats: int  # of a product, so that launching it does not count


FULL = Sizes(step.GPT2 | {"batch_size": 32}, step_tokens=524_288, attention_batch=128, n_new=256, repeats=20)
QUICK = Sizes(step.QUICK, step_tokens=64, attention_batch=2, n_new=3, repeats=2)
KERNELS = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("cudnn", "flash", "efficient")}
BACKENDS = {"default": [*KERNELS.values(), SDPBackend.MATH], **KERNELS}  # default: what PyTorch picks
STEP_GOALS = {
    "softmax": "<= 900 ms, 583k tokens/s, 0.50 of 989 TFLOP/s",
    "smooth": "x <= 1.005",
    "sigmoid": "x <= 1.00",
}
STEP_GOALS |= dict.fromkeys(("bayes", "bayes_sigmoid"), "x <= 1.02")
DRAWS = (1, 8, 32)


def attention(sizes: Sizes, rounds: int, device: torch.device) -> None:
    """Forward and backward, causal, on queries, keys and values that lie as model.py splits them."""
    T, C = sizes.shape["block_size"], sizes.shape["n_embd"]

    def prepare(batch_size: int) -> dict[str, Callable[[], None]]:
        qkv = torch.randn(batch_size, T, 3 * C, dtype=torch.bfloat16, device=device, requires_grad=True)
        gradient, cases = torch.randn(batch_size, T, C, dtype=torch.bfloat16, device=device), {}
        for name, backends in BACKENDS.items():
            case = partial(attend, qkv, gradient, sizes.shape["n_head"], backends)
            try:
                case()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # not for this device, dtype or shape
                print(f"  attention has no {name} kernel here: {error}")
                continue
            cases[name] = case
        return cases

    cases, batch_size = fitting(prepare, sizes.attention_batch)
    flops = dict.fromkeys(cases, 7 * batch_size * T**2 * C)  # two products forward, five backward, half of each masked
    about = {"shapes": sizes.shape | {"batch_size": batch_size}}
    report("attention", measure.in_turns(cases, rounds), "default", flops, **about)


def attend(qkv: torch.Tensor, gradient: torch.Tensor, n_head: int, backends: SDPBackend | list[SDPBackend]) -> None:
    """qkv (B, T, 3 C), gradient (B, T, C) by the attention's output."""
    B, T, C = gradient.shape
    with sdpa_kernel(backends):
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.transpose(1, 2).reshape(B, T, C).backward(gradient)
    qkv.grad = None


def products(sizes: Sizes, rounds: int, device: torch.device) -> None:
    """The backbone's and the head's matrix products, and that of one piece of the head's loss (engine/linear_loss)."""
    n, C, V = sizes.shape["batch_size"] * sizes.shape["block_size"], sizes.shape["n_embd"], sizes.shape["vocab_size"]
    x = torch.randn(n, C, dtype=torch.bfloat16, device=device)
    piece, cases, flops = x[: rows_within(PIECE, x, V)], {}, {}
    shapes = {"c_attn": (x, 3 * C), "c_fc": (x, 4 * C), "attn.c_proj": (x, C), "head": (x, V), "head_piece": (piece, V)}
    for name, (rows, width) in shapes.items():
        product = partial(F.linear, rows, torch.randn(width, C, dtype=torch.bfloat16, device=device))
        cases[name], flops[name] = partial(repeat, product, sizes.repeats), 2 * len(rows) * C * width
    seconds = {name: [t / sizes.repeats for t in times] for name, times in measure.in_turns(cases, rounds).items()}
    report("products", seconds, "head", flops, shapes=sizes.shape)


def repeat(case: Callable[[], object], times: int) -> None:
    for _ in range(times):
        case()


def steps(sizes: Sizes, rounds: int, device: torch.device) -> None:
    """A training step of each head: micro-batches, gradient accumulation, torch.compile, fused AdamW."""

    def prepare(batch_size: int) -> dict[str, step.Step]:
        shape = sizes.shape | {"batch_size": batch_size}
        n_micro = sizes.step_tokens // (batch_size * shape["block_size"])
        return {name: step.prepare(name, n_micro=n_micro, **shape) for name in OURS}

    cases, batch_size = fitting(prepare, sizes.shape["batch_size"])
    flops = dict.fromkeys(cases, sizes.step_tokens * cases["softmax"].model.flops_per_token())
    seconds = measure.in_turns(cases, rounds)
    memory = {name: case.held() + measure.peak_memory(case) for name, case in cases.items()}
    about = {"shapes": sizes.shape | {"batch_size": batch_size, "step_tokens": sizes.step_tokens}}
    report("steps", seconds, "softmax", flops, sizes.step_tokens, memory, STEP_GOALS, **about)


def heads_alone(sizes: Sizes, rounds: int, device: torch.device) -> None:
    """The heads on one micro-batch of hidden states, against F.linear and F.cross_entropy under the same autocast."""
    shape = {name: sizes.shape[name] for name in ("n_embd", "vocab_size")}
    shape["n_tokens"] = sizes.shape["batch_size"] * sizes.shape["block_size"]
    cases = {name: heads.prepare(name, **shape) for name in ("plain_bf16", *(f"{name}_bf16" for name in OURS))}
    seconds = measure.in_turns(cases, rounds)
    memory = {name: measure.peak_memory(case) for name, case in cases.items()}
    flops = dict.fromkeys(cases, 6 * shape["n_tokens"] * shape["n_embd"] * shape["vocab_size"])
    goals = {f"{name}_bf16": "<= 954 MiB (1 GB)" for name in OURS}
    report("heads", seconds, "plain_bf16", flops, shape["n_tokens"], memory, goals, shapes=shape)


def decode(sizes: Sizes, rounds: int, device: torch.device) -> None:
    """Texts of the Bayesian head that averages draws for each token, the backbone eager and as one compiled graph."""
    shape = {name: size for name, size in sizes.shape.items() if name != "batch_size"}
    options = generate.Options(**shape, n_prompt=min(16, shape["block_size"] // 2), n_new=sizes.n_new)
    torch._dynamo.config.recompile_limit = 64  # one code for two models, and for caches that may lie elsewhere
    for batch in (1, 32):
        models = {how: generate.gpt(options, *generate.HEADS["bayes"]).to(device) for how in ("eager", "compiled")}
        models["compiled"].compile_step()
        idx, cases = torch.randint(shape["vocab_size"], (batch, options.n_prompt), device=device), {}
        for how, model in models.items():
            for n in DRAWS:
                case = generate.ours(model, idx, options, "bfloat16", n_samples=n)
                cases[f"{how}, batch {batch}, draws: {n}"] = case
        seconds, about = measure.in_turns(cases, rounds), {"shapes": shape | {"batch": batch, "n_new": sizes.n_new}}
        for how in models:
            group = {name: times for name, times in seconds.items() if name.startswith(how)}
            one, *_, most = group
            goals = {most: "x <= 1.15"} | ({one: ">= 4,000 tokens/s"} if batch == 1 else {})
            report("decode", group, one, {}, batch * sizes.n_new, goals=goals, **about)


def fitting(prepare: Callable[[int], dict[str, Callable]], batch_size: int) -> tuple[dict[str, Callable], int]:
    """prepare(batch_size) -> cases, each called once; with the batch halved for as long as the memory does not do."""
    while True:
        try:
            cases = prepare(batch_size)
            for case in cases.values():
                case()
            measure.synchronize()
            return cases, batch_size
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        cases, batch_size = None, batch_size // 2
        gc.collect()
        torch.cuda.empty_cache()


def report(
    part: str,
    seconds: Mapping[str, list[float]],
    baseline: str,
    flops: Mapping[str, float],
    n_tokens: int = 0,
    memory: Mapping[str, int] | None = None,
    goals: Mapping[str, str] | None = None,
    **about,
) -> None:
    """Print and record each case: its median time, its ratio to the baseline, its rates, its memory, its goal."""
    print(f"\n{part}: ratios to {baseline}; {about}")
    peak = peak_flops(pick_device("auto"))
    for name, times in seconds.items():
        low, median, high = measure.quartiles(times)
        time_ratio = measure.ratio(times, seconds[baseline]) * (flops[baseline] / flops[name] if flops else 1)
        figures = {"tokens_per_s": n_tokens / median} if n_tokens else {}
        figures |= {"tflops": flops[name] / median / 1e12, "of_peak": flops[name] / median / peak} if flops else {}
        figures |= {"peak_mib": memory[name] / 2**20} if memory else {}
        figures = {unit: round(value, 4) for unit, value in figures.items() if value == value}  # no peak is known: nan
        line = f"  {name:<29} {median * 1e3:9.3f} ms ({low * 1e3:.3f} - {high * 1e3:.3f})  x {time_ratio:.3f}"
        line += "".join(f"  {unit} {value:,.{3 if value < 100 else 0}f}" for unit, value in figures.items())
        print(line + (f"  goal {goals[name]}" if goals and name in goals else ""), flush=True)
        measure.record(f"gpu_{part}", name, baseline, time_ratio, seconds=round(median, 7), **figures, **about)


PARTS = {"attention": attention, "products": products, "steps": steps, "heads": heads_alone, "decode": decode}


def main() -> None:
    args = measure.arguments(__doc__.splitlines()[0], rounds=5)
    device = pick_device("auto")
    if device.type != "cuda" and not args.quick:
        sys.exit(
            f"error: bench/gpu.py needs a CUDA GPU, and the device is {device.type}; --quick runs tiny shapes on it"
        )
    names = args.cases.split(",") if args.cases else list(PARTS)
    if len(names) > 1 and not args.quick:  # a part that fails does not end the others
        commands = [[sys.executable, __file__, f"--cases={name}", f"--rounds={args.rounds}"] for name in names]
        sys.exit(int(any([subprocess.run(command).returncode for command in commands])))
    measure.use_allocator("tuned")
    torch.backends.cuda.matmul.allow_tf32 = True  # as training has it
    for name in names:
        PARTS[name](QUICK if args.quick else FULL, args.rounds, device)


if __name__ == "__main__":
    main()
