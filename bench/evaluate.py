"""What averaging over a posterior costs in an evaluation: 0, 1, 16 and all (-1) draws.

    python bench/evaluate.py                     GPT-2 124M: some minutes on two CPU cores
    python bench/evaluate.py --scale=study

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

N_BLOCKS = {"gpt2": 2, "study": 16, "quick": 1}


def main() -> None:
    args = measure.arguments(__doc__, scale=("gpt2", "study"))
    n_blocks = N_BLOCKS[args.scale]
    shape = shapes_of(args.scale)
    keep_memory()
    at = torch.arange(shape["block_size"])[None]
    size = (n_blocks, shape["block_size"] + 1)
    text = torch.randint(shape["vocab_size"], size)
    blocks = []
    for block in text.split(1):
        blocks.append(Windows(block[:, :-1], block[:, 1:], 0, at))
    processes = Processes(pick_device("auto"))
    for head in ("bayes", "bayes_sigmoid"):
        model = generate.gpt(head, **shape)
        cases = {}
        for n in (0, 1, 16, -1):
            case = partial(evaluate, model, blocks, processes, n_samples=n)
            cases[f"{head}, draws: {n}"] = case
        seconds = measure.in_turns(cases, args.rounds)
        shapes = shape | {"blocks": n_blocks}
        measure.report("evaluate", seconds, f"{head}, draws: 1", shapes)


if __name__ == "__main__":
    main()
