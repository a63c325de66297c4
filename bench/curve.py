"""Whether a faster loss is the same loss: 200 steps of each head, in pieces and compiled, beside all logits at once.

    python bench/curve.py --dataset=quickstart          after data/quickstart/prepare.py; about 3 minutes on two cores

In fp32, from the same weights, on the same batches. Training amplifies rounding, so there is a yardstick: all logits at
once from weights that differ in their last bit. Prints the largest differences of the losses, and writes all of them to
training_logs/curves.json.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch

import heads
from bench import measure
from bench.heads import OURS
from engine.config import load_config
from engine.distributed import seed_micro_batch
from engine.errors import run
from engine.linear_loss import plain_loss
from engine.optim import adamw
from engine.tokens import Batches, TokenFile
from heads import HeadConfig
from model import GPT, GPTConfig


@dataclass(frozen=True)
class Options:
    dataset: str = "quickstart"  # a folder in data/, or a path
    steps: int = 200
    out: str = "training_logs/curves.json"  # all losses


def all_at_once(likelihood, x, weight, bias, added, targets, label_weights=None, center=None):
    """linear_loss, all logits at once and left to autograd."""
    logits = x @ weight.t() + (0.0 if bias is None else bias)
    logits = logits + (0.0 if added is None else added.x @ added.weight.t())
    loss = plain_loss(likelihood, logits, targets, label_weights).mean()
    return loss, None if center is None else (weight - center).square().mean()


def curve(file: TokenFile, name: str, how: str, steps: int) -> list[float]:
    """The losses of a small GPT trained with that head. how: plain | rounded (the yardstick) | pieces | compiled."""
    torch.manual_seed(0)
    head = HeadConfig(**OURS[name], n_data=len(file), kl_weight=0.1)
    shape = {"block_size": 128, "vocab_size": file.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 128}
    model = GPT(GPTConfig(**shape, head=head))
    model.lm_head.start_from(file.frequencies(file.vocab_size))
    optimizer, batches, losses = adamw(model, 2e-3, (0.9, 0.95), 0.1), Batches(file, 4, 128, seed=0), []
    forward = measure.compiled(model) if how == "compiled" else model
    if how == "rounded":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + torch.finfo(torch.float32).eps * torch.randn_like(parameter).sign()
    at_once = how in ("plain", "rounded")
    patch = mock.patch.object(heads, "linear_loss", all_at_once) if at_once else contextlib.nullcontext()
    with patch:
        for step in range(steps):
            seed_micro_batch(0, step)
            loss = forward(*batches[step])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    file, curves = TokenFile(options.dataset, "train"), {}
    for name in OURS:
        curves[name] = {
            how: curve(file, name, how, options.steps) for how in ("plain", "rounded", "pieces", "compiled")
        }
        plain = curves[name]["plain"]
        apart = {
            how: max(abs(a - b) for a, b in zip(losses, plain, strict=True)) for how, losses in curves[name].items()
        }
        line = f"{name:<18} loss {plain[0]:.4f} -> {plain[-1]:.4f}; largest difference from all logits at once: "
        print(line + ", ".join(f"{how} {apart[how]:.1e}" for how in ("rounded", "pieces", "compiled")), flush=True)
    Path(ROOT / options.out).write_text(json.dumps({"machine": measure.machine(), "torch": torch.__version__} | curves))


if __name__ == "__main__":
    run(main)
