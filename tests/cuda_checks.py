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
from tests.helpers import ROOT, records, run, scores_of, value_and_gradients, write_nanogpt

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative; of gradients in norm
RUN = {"max_iters": 20, "lr_decay_iters": 20, "eval_interval": 10, "vocab_size": 515}


def cases(
    part: str, device: str, folder: Path, quick: bool
) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """The names of a part's checks and their functions. quick: smaller, and compile one head."""
    write_ids(folder / "data", RUN["vocab_size"])
    check, names = CHECKS[part]
    for name in names:
        if not quick or "compiled" not in name or name == "softmax compiled":
            yield name, partial(check, name, device, folder, quick)


def write_ids(folder: Path, vocab_size: int) -> Path:
    """Token files like nanoGPT's, from the code of this repository: an id is two adjacent bytes."""
    code = b"".join(path.read_bytes() for path in sorted(ROOT.glob("[eht]*/**/*.py")))
    text = np.frombuffer(code, np.uint8).astype(int)
    ids = (text[:-1] * 256 + text[1:]) % vocab_size
    n_val = len(ids) // 10
    return write_nanogpt(folder, {"train": ids[n_val:], "val": ids[:n_val]})


def check_head(name, device, folder, quick):
    """The loss and all gradients of a head."""
    options = OURS[name.split()[0]]
    # more than a chunk; no multiple of 64
    n, vocab_size = (100, 515) if quick else (2100, 50257)
    torch.manual_seed(0)
    reference = Head(HeadConfig(**options, n_data=10**8), vocab_size, 64)
    torch.nn.init.normal_(reference.weights.weight, std=0.2)
    if "estimator" in options:  # each device draws its own noise
        reference.weights.log_std.requires_grad_(False).fill_(-20.0)
    x, targets = torch.randn(1, n, 64), torch.randint(vocab_size, (1, n))
    results = []
    for where, dtype in (("cpu", "float32"), (device, "float32"), (device, "bfloat16")):
        head, inputs = copy.deepcopy(reference).to(where), x.to(where).requires_grad_()
        loss_of = torch.compile(head.loss) if results and "compiled" in name else head.loss
        with autocast(inputs.device, dtype)[0]:
            loss = loss_of(inputs, targets.to(where))
        parameters = [p for p in head.parameters() if p.requires_grad]
        found = value_and_gradients(loss, [inputs, *parameters])
        results.append([t.detach().cpu() for t in found])
    errors = {}
    for dtype, found in zip(TOLERANCE, results[1:], strict=True):
        ratios = [(a - b).norm() / b.norm() for a, b in zip(found, results[0], strict=True)]
        errors[dtype] = max(ratios).item()
        assert errors[dtype] < TOLERANCE[dtype], errors
    return errors


def run_errors(found, expected, tolerance):
    """The losses of a run and its validation nll, against those of another run."""
    errors = {}
    for key in ("loss", "val_nll"):
        ours, theirs = ([r[key] for r in records(out, key)] for out in (found, expected))
        errors[key] = np.abs(np.divide(ours, theirs) - 1).max().item()
    assert max(errors.values()) < tolerance, errors
    return errors


def check_steps(name, device, folder, quick):
    """20 steps."""
    compile = "compiled" in name
    dtype = "bfloat16" if compile else "float32"
    options = RUN | OURS[name.split()[0]]
    run(folder / "data", folder / f"{name} cpu", **options)
    options |= {"device": device, "dtype": dtype, "compile": compile}
    run(folder / "data", folder / name, **options)
    return run_errors(folder / name, folder / f"{name} cpu", TOLERANCE[dtype])


def check_predictions(name, device, folder, quick):
    """Ten steps and ten more from their checkpoint are twenty. The scores of the model are those
    that a CPU finds. Compiled steps (CUDA graphs) write the same text as cached ones."""
    out, whole = folder / name, folder / f"{name} whole"
    options = RUN | OURS[name] | {"device": device}
    run(folder / "data", out, **options | {"max_iters": 10})
    run(folder / "data", out, **options, init_from="resume")
    run(folder / "data", whole, **options)
    errors = run_errors(out, whole, TOLERANCE["float32"])
    scores = []
    for where in ("cpu", device):
        model = load_model(out, where)
        scores.append(scores_of(model, TokenFile(folder / "data", "val"), limit=500, n_samples=-1))
    errors |= {key: abs(scores[0][key] - scores[1][key]) for key in ("nll", "ece", "entropy")}
    start = torch.zeros(2, 4, dtype=torch.long, device=device)
    cached = generate(model, start, 12, temperature=0.0)
    compile_step(model)
    compiled = generate(model, start, 12, temperature=0.0)
    errors["text"] = (cached != compiled).float().mean().item()
    assert max(errors.values()) < 1e-3, errors
    return errors


def check_group(name, device, folder, quick):
    """Under torchrun, even with one process: fully_shard against DDP."""
    assert torch.distributed.is_torchelastic_launched()
    outs = []
    for sharding in ("none", "fsdp"):
        outs.append(folder / f"{sharding} {name}")
        options = RUN | {"device": device, "sharding": sharding, "compile": name == "compiled"}
        run(folder / "data", outs[-1], **options)
    return run_errors(*outs, TOLERANCE["float32"])


CHECKS = {
    "heads": (check_head, [*OURS, *(f"{name} compiled" for name in OURS)]),
    "train": (check_steps, [*OURS, "sigmoid compiled", "bayes compiled"]),
    "resume": (check_predictions, ["softmax", "bayes_sigmoid"]),
    "processes": (check_group, ["eager", "compiled"]),
}
