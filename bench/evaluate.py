"""What averaging over posterior draws costs in an evaluation: GPT-2 124M with a Bayesian head, 0, 1 and 16 draws.

    python bench/evaluate.py                     # about two minutes on two CPU cores
    python bench/evaluate.py --cases=bayes --blocks=1 --rounds=9

Random weights and tokens, the posterior's width as training starts it (logits with a std of 0.4), fp32, blocks of 1,024
tokens one at a time. The time of a split is that of its blocks: WikiText-2's validation split has 242 of them. The aim:
16 draws in at most twice the time of one.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from engine.distributed import Processes, keep_memory, pick_device
from engine.evaluation import Windows, evaluate
from heads import HeadConfig
from model import GPT, GPTConfig

HEADS = {"bayes": "categorical", "bayes_sigmoid": "sigmoid"}
DRAWS = (0, 1, 16)


def main() -> None:
    args = measure.arguments(__doc__, rounds=5, blocks=2)
    shape = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    if args.quick:
        shape = {"vocab_size": 67, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 32}
    keep_memory()
    device = pick_device("auto")
    text = torch.randint(shape["vocab_size"], (args.blocks, shape["block_size"] + 1))
    at = torch.arange(shape["block_size"])[None]
    blocks = [Windows(block[None, :-1], block[None, 1:], 0, at, at) for block in text]
    for head in args.cases or HEADS:
        model = GPT(GPTConfig(**shape, head=HeadConfig("bayes", HEADS[head], n_data=10**8))).to(device)
        cases = {f"{head}, draws: {n}": partial(evaluate, model, blocks, Processes(device), n_samples=n) for n in DRAWS}
        seconds, baseline = measure.in_turns(cases, args.rounds), f"{head}, draws: 1"
        n_tokens, shapes = text[:, 1:].numel(), shape | {"blocks": len(blocks)}
        measure.report("evaluate", seconds, baseline, n_tokens=n_tokens, shapes=shapes)


if __name__ == "__main__":
    main()
