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
    """The names of a part's checks and their functions. quick: compile one head only."""
    write_ids(folder / "data", RUN["vocab_size"])
    for name, check in CHECKS[part].items():
        if not quick or "compiled" not in name or name == "softmax compiled":
            yield name, partial(check, name, device, folder)


def write_ids(folder: Path, vocab_size: int) -> Path:
    """Token files like nanoGPT's, from the code of this repository: an id is two adjacent bytes."""
    code = b"".join(path.read_bytes() for path in sorted(ROOT.glob("[eht]*/**/*.py")))
    text = np.frombuffer(code, np.uint8).astype(int)
    ids = (text[:-1] * 256 + text[1:]) % vocab_size
    n_val = len(ids) // 10
    return write_nanogpt(folder, {"train": ids[n_val:], "val": ids[:n_val]})


def check_head(name, device, folder):
    """The loss and all gradients of a head."""
    options = OURS[name.split()[0]]
    n, vocab_size, n_embd = 600, 50257, 16  # on CUDA more than a chunk of float32
    torch.manual_seed(0)
    reference = Head(HeadConfig(**options, n_data=10**8), vocab_size, n_embd)
    torch.nn.init.normal_(reference.weights.weight, std=0.2)
    if "estimator" in options:  # each device draws its own noise
        reference.weights.log_std.requires_grad_(False).fill_(-20.0)
    x, targets = torch.randn(1, n, n_embd), torch.randint(vocab_size, (1, n))
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


def check_training(name, device, folder):
    """20 steps, or ten and ten more from their checkpoint."""
    data, out, expected = folder / "data", folder / name, folder / f"{name} cpu"
    options, dtype = RUN | OURS[name.split()[0]], "float32"
    run(data, expected, **options)
    if "compiled" in name:
        dtype = "bfloat16"
    options |= {"device": device, "dtype": dtype, "compile": "compiled" in name}
    if "resumed" in name:
        run(data, out, **options | {"max_iters": 10})
    run(data, out, **options, init_from="auto")
    return run_errors(out, expected, TOLERANCE[dtype])


def check_predictions(name, device, folder):
    """The scores of a model are those that a CPU finds. Compiled steps (CUDA graphs) write the same
    text as cached ones."""
    data, out = folder / "data", folder / name
    run(data, out, **RUN, **OURS[name], device=device)
    scores = []
    for where in ("cpu", device):
        model = load_model(out, where)
        scores.append(scores_of(model, TokenFile(data, "val"), limit=500, n_samples=-1))
    errors = {key: abs(scores[0][key] - scores[1][key]) for key in ("nll", "ece", "entropy")}
    start = torch.zeros(2, 4, dtype=torch.long, device=device)
    cached = generate(model, start, 12, temperature=0.0)
    compile_step(model)
    compiled = generate(model, start, 12, temperature=0.0)
    errors["text"] = (cached != compiled).float().mean().item()
    assert max(errors.values()) < 1e-3, errors
    return errors


def check_group(name, device, folder):
    """Under torchrun, even with one process: fully_shard against DDP."""
    assert torch.distributed.is_torchelastic_launched()
    options = RUN | {"device": device, "compile": name == "compiled"}
    for sharding in ("none", "fsdp"):
        run(folder / "data", folder / f"{name} {sharding}", **options, sharding=sharding)
    return run_errors(folder / f"{name} fsdp", folder / f"{name} none", TOLERANCE["float32"])


CHECKS = {
    "heads": dict.fromkeys([*OURS, *(f"{name} compiled" for name in OURS)], check_head),
    "train": dict.fromkeys([*OURS, "sigmoid compiled", "bayes compiled"], check_training),
    "resume": {"softmax resumed": check_training, "bayes_sigmoid": check_predictions},
    "processes": dict.fromkeys(["eager", "compiled"], check_group),
}
