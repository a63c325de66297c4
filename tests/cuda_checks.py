"""What has to hold on a GPU; bench/gpu.py runs these checks.

They compare a device with the CPU. On a CPU they compare it with itself, which shows that the
checks work. A check returns the errors that it measured. $NVIDIA_TF32_OVERRIDE has to be 0.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.heads import OURS
from engine.base.distributed import autocast
from engine.data.tokens import TokenFile
from engine.eval.generation import compile_step, generate
from engine.runs.checkpoint import load_model
from heads import Head, HeadConfig
from tests.helpers import ROOT, records, run, scores_of, write_nanogpt

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative
HEAD_SIZES = {"n": 3000, "n_embd": 64, "vocab_size": 50257}  # more than a chunk; V % 64 > 0
QUICK_SIZES = {"n": 100, "n_embd": 64, "vocab_size": 515}
RUN = {"max_iters": 20, "lr_decay_iters": 20, "eval_interval": 10, "vocab_size": 515}


def cases(
    part: str, device: str, folder: Path, quick: bool
) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """The names of a part's checks and their functions. quick: compile little."""
    if part == "heads":
        sizes = QUICK_SIZES if quick else HEAD_SIZES
        for name in OURS:
            compiles = name == "softmax" or not quick
            yield name, partial(_check_head, name, compiles, device, **sizes)
        return
    write_ids(folder / "data", RUN["vocab_size"])
    if part == "train":
        for name in OURS:
            yield name, partial(_check_steps, name, False, device, folder)
        for name in () if quick else ("softmax", "bayes_sigmoid"):
            yield f"{name} compiled", partial(_check_steps, name, True, device, folder)
    elif part == "resume":
        yield "resume", partial(_check_resume, device, folder)
        for name in ("softmax", "bayes_sigmoid"):
            yield name, partial(_check_predictions, name, device, folder)
    elif part == "processes":
        yield "eager", partial(_check_group, False, device, folder)
        if not quick:
            yield "compiled", partial(_check_group, True, device, folder)


def write_ids(folder: Path, vocab_size: int) -> Path:
    """Token files like nanoGPT's, from the code of this repository: an id is two adjacent bytes."""
    code = b"".join(path.read_bytes() for path in sorted(ROOT.glob("[eht]*/**/*.py")))
    text = np.frombuffer(code, np.uint8).astype(int)
    ids = (text[:-1] * 256 + text[1:]) % vocab_size
    n_val = len(ids) // 10
    return write_nanogpt(folder, {"train": ids[n_val:], "val": ids[:n_val]})


def _check_head(name, compiles, device, n, n_embd, vocab_size):
    """The loss and all gradients against those of a CPU in float32."""
    torch.manual_seed(0)
    reference = Head(HeadConfig(**OURS[name], n_data=10**8), vocab_size, n_embd)
    torch.nn.init.normal_(reference.weights.weight, std=0.2)
    if "estimator" in OURS[name]:  # each device draws its own noise
        reference.weights.log_std.requires_grad_(False).fill_(-20.0)
    x = torch.randn(1, n, n_embd)
    targets = torch.randint(vocab_size, (1, n))

    def loss_and_gradients(where, dtype, compiled):
        head = copy.deepcopy(reference).to(where)
        inputs = x.to(where).requires_grad_()
        loss_of = torch.compile(head.loss) if compiled else head.loss
        with autocast(inputs.device, dtype)[0]:
            loss = loss_of(inputs, targets.to(where))
        parameters = [p for p in head.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [inputs, *parameters])
        return [t.detach().cpu() for t in (loss, *gradients)]

    expected = loss_and_gradients("cpu", "float32", False)
    errors = {}
    for compiled in (False, True)[: 1 + compiles]:
        for dtype, tolerance in TOLERANCE.items():
            found = loss_and_gradients(device, dtype, compiled)
            ratios = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
            errors[f"{dtype}{' compiled' * compiled}"] = max(ratios).item()
            assert max(ratios) < tolerance, errors
    return errors


def _run_errors(found, expected, tolerance):
    """The relative errors of the losses of a run, and of its validation nll."""
    errors = {}
    for key in ("loss", "val_nll"):
        ours, theirs = ([r[key] for r in records(out, key)] for out in (found, expected))
        errors[key] = np.abs(np.divide(ours, theirs) - 1).max().item()
    assert max(errors.values()) < tolerance, errors
    return errors


def _check_steps(name, compile, device, folder):
    """20 steps against those of a CPU in float32."""
    dtype = "bfloat16" if compile else "float32"
    data, expected, out = folder / "data", folder / f"{name} cpu", folder / f"{name} {dtype}"
    if not expected.exists():
        run(data, expected, **RUN, **OURS[name])
    run(data, out, **RUN, **OURS[name], device=device, dtype=dtype, compile=compile)
    return _run_errors(out, expected, TOLERANCE[dtype])


def _check_resume(device, folder):
    """Ten steps, and ten more from their checkpoint, against twenty."""
    data, whole, halves = (folder / name for name in ("data", "whole", "halves"))
    run(data, whole, **RUN, device=device)
    run(data, halves, **RUN | {"max_iters": 10}, device=device)
    run(data, halves, **RUN, device=device, init_from="resume")
    return _run_errors(halves, whole, TOLERANCE["float32"])


def _check_predictions(name, device, folder):
    """A trained model's scores against those of a CPU. How much less likely than the likeliest
    token those of greedy texts are, by cached and by compiled steps (CUDA graphs)."""
    run(folder / "data", folder / name, **RUN, **OURS[name], device=device)
    results = []
    for where in ("cpu", device):
        model = load_model(folder / name, where)
        results.append(scores_of(model, TokenFile(folder / "data", "val"), limit=50, n_samples=-1))
    errors = {key: abs(results[0][key] - results[1][key]) for key in ("nll", "ece", "entropy")}
    start = torch.zeros(2, 4, dtype=torch.long, device=device)
    for how in ("cached", "compiled"):
        if how == "compiled":
            compile_step(model)
        text = generate(model, start, 12, temperature=0.0)
        with torch.no_grad():
            log_probs = model.log_probs(text[:, :-1])[:, 3:]
        chosen = log_probs.gather(-1, text[:, 4:, None])
        errors[how] = (log_probs.amax(-1, keepdim=True) - chosen).max().item()
    assert max(errors.values()) < 1e-3, errors
    return errors


def _check_group(compile, device, folder):
    """Under torchrun, even as one process: fully_shard against DDP."""
    assert torch.distributed.is_torchelastic_launched()
    for sharding in ("none", "fsdp"):
        options = RUN | {"device": device, "compile": compile, "sharding": sharding}
        run(folder / "data", folder / f"{sharding} {compile}", **options)
    out = [folder / f"{sharding} {compile}" for sharding in ("fsdp", "none")]
    return _run_errors(*out, TOLERANCE["float32"])
