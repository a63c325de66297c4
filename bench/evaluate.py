"""What averaging over a posterior costs in an evaluation: 0, 1, 16 and all (-1) draws.

    python bench/evaluate.py                     GPT-2 124M: some minutes on two CPU cores
    python bench/evaluate.py --scale=study --blocks=16
    python bench/evaluate.py --cases=bayes --blocks=1 --rounds=9

Both Bayesian heads with random weights on random tokens, fp32, blocks one at a time. The posterior
is as wide as at the start of training (logits with a std of 0.4). The aim: 16 draws in at most
twice the time of one.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import generate, measure
from bench.step import shapes_of
from engine.base.distributed import Processes, keep_memory, pick_device
from engine.data.windows import Windows
from engine.eval.evaluation import evaluate

HEADS = ("bayes", "bayes_sigmoid")


def main() -> None:
    args = measure.arguments(__doc__, 5, HEADS, blocks=2, scale=("gpt2", "study"))
    shape = shapes_of("quick" if args.quick else args.scale)
    del shape["batch_size"]
    keep_memory()
    text = torch.randint(shape["vocab_size"], (args.blocks, shape["block_size"] + 1))
    at = torch.arange(shape["block_size"])[None]
    blocks = [Windows(block[None, :-1], block[None, 1:], 0, at) for block in text]
    shapes = shape | {"blocks": args.blocks}
    score = partial(evaluate, batches=blocks, processes=Processes(pick_device("auto")))
    for head in args.cases or HEADS:
        model = generate.gpt(head, shape)
        cases = {}
        for n in (0, 1, 16, -1):
            cases[f"{head}, draws: {n}"] = partial(score, model, n_samples=n)
        seconds = measure.in_turns(cases, args.rounds)
        measure.report("evaluate", seconds, f"{head}, draws: 1", shapes=shapes)


if __name__ == "__main__":
    main()
