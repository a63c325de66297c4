"""What averaging over a posterior costs in an evaluation with a Bayesian head: 0, 1, 16 and all (-1) draws.

    python bench/evaluate.py                     # GPT-2 124M: some minutes on two CPU cores
    python bench/evaluate.py --scale=study --blocks=16    # the size of config/train_wikitext2_8k.py
    python bench/evaluate.py --cases=bayes --blocks=1 --rounds=9

Random weights and tokens, the posterior's width as training starts it (logits with a std of 0.4), fp32, blocks of 1,024
tokens (study: 256) one at a time. The time of a split is that of its blocks. The aim: 16 draws in at
most twice the time of one.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from bench.step import QUICK, SCALES
from engine.base.distributed import Processes, keep_memory, pick_device
from engine.data.windows import Windows
from engine.eval.evaluation import evaluate
from heads import HeadConfig
from model import GPT, GPTConfig

HEADS = {"bayes": "categorical", "bayes_sigmoid": "sigmoid"}
DRAWS = (0, 1, 16, -1)


def main() -> None:
    args = measure.arguments(__doc__, rounds=5, cases=HEADS, blocks=2, scale=("gpt2", "study"))
    shape = dict(QUICK if args.quick else SCALES[args.scale][0])
    del shape["batch_size"]
    keep_memory()
    device = pick_device("auto")
    text = torch.randint(shape["vocab_size"], (args.blocks, shape["block_size"] + 1))
    at = torch.arange(shape["block_size"])[None]
    blocks = [Windows(block[None, :-1], block[None, 1:], 0, at) for block in text]
    for head in args.cases or HEADS:
        model = GPT(GPTConfig(**shape, head=HeadConfig("bayes", HEADS[head], n_data=10**8))).to(
            device
        )
        cases = {
            f"{head}, draws: {n}": partial(evaluate, model, blocks, Processes(device), n_samples=n)
            for n in DRAWS
        }
        seconds, baseline = measure.in_turns(cases, args.rounds), f"{head}, draws: 1"
        n_tokens, shapes = text[:, 1:].numel(), shape | {"blocks": len(blocks)}
        measure.report("evaluate", seconds, baseline, n_tokens=n_tokens, shapes=shapes)


if __name__ == "__main__":
    main()
