"""How fast text is generated: with and without the cache, with posterior draws, by transformers.

    python bench/generate.py                     4 layers of 256; a few minutes on two CPU cores
    python bench/generate.py --scale=gpt2 --rounds=3

Random weights, sampling at temperature 0.8 from the 200 likeliest tokens. Ours runs in bfloat16 if
the machine multiplies it fast, as sample.py does; transformers' model and the case beside it run in
float32. A text that averages 16 posterior draws per token is compared with one of a single draw.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from bench.heads import OURS
from bench.step import shapes_of, transformers_gpt2
from engine.base.distributed import autocast, keep_memory, pick_device
from engine.eval.generation import generate
from heads import HeadConfig
from model import GPT, GPTConfig


def main() -> None:
    args = measure.arguments(__doc__, 5, scale=("small", "gpt2"))
    shape = shapes_of("quick" if args.quick else args.scale)
    del shape["batch_size"]
    n_prompt = shape["block_size"] // 16
    n_new = min(256, shape["block_size"] - n_prompt)
    keep_memory()
    device = pick_device("auto")
    fast = autocast(device, "auto")[1]
    softmax, bayes = gpt("softmax", shape), gpt("bayes", shape)
    theirs = transformers_gpt2(**shape).eval().to(device)
    for batch in (1, 8):
        idx = torch.randint(shape["vocab_size"], (batch, n_prompt), device=device)
        cases = {
            "uncached": text_of(softmax, idx, n_new, fast, use_cache=False),
            "softmax": text_of(softmax, idx, n_new, fast),
            "bayes": text_of(bayes, idx, n_new, fast),
            "softmax_float32": text_of(softmax, idx, n_new, "float32"),
            "transformers": transformers_text(theirs, idx, n_new),
        }
        draws = {
            "bayes, draws: 1": text_of(bayes, idx, n_new, fast, n_samples=1),
            "bayes, draws: 16": text_of(bayes, idx, n_new, fast, n_samples=16),
        }
        shapes = shape | {"n_prompt": n_prompt, "n_new": n_new, "batch": batch}
        for group in (cases, draws):
            seconds = measure.in_turns(group, args.rounds)
            measure.report("generate", seconds, next(iter(group)), dtype=fast, shapes=shapes)


def gpt(name: str, shape: dict[str, int]) -> GPT:
    """Our model with the head of that name and random weights."""
    torch.manual_seed(0)
    head = HeadConfig(**OURS[name], n_data=10**8)
    return GPT(GPTConfig(**shape, bias=True, head=head)).eval().to(pick_device("auto"))


def text_of(model: GPT, idx: torch.Tensor, n_new: int, dtype: str, **options) -> Callable[[], None]:
    def case():
        with autocast(idx.device, dtype)[0]:  # one context, which keeps the weights that it casts
            generate(model, idx, n_new, temperature=0.8, top_k=200, **options)

    return case


def transformers_text(
    model: torch.nn.Module, idx: torch.Tensor, n_new: int
) -> Callable[[], object]:
    options = {"do_sample": True, "temperature": 0.8, "top_k": 200, "pad_token_id": 0}
    mask = torch.ones_like(idx)
    return lambda: model.generate(idx, attention_mask=mask, max_new_tokens=n_new, **options)


if __name__ == "__main__":
    main()
