"""Speed of text generation: with and without the cache, with posterior draws, by transformers.

    python bench/generate.py                     4 layers of 256; a few minutes on two CPU cores
    python bench/generate.py --scale=gpt2 --rounds=3

The weights are random; sampling is at temperature 0.8 from the 200 likeliest tokens. On a GPU, each
cached token of our models is a CUDA graph. They run in bfloat16 where the machine multiplies it
fast, as in sample.py. transformers' model and our softmax_float32 run in float32. A text that
averages 16 posterior draws per token is compared with one that uses a single draw.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from bench.heads import N_DATA, OURS
from bench.step import SHAPE, SIZES, transformers_gpt2
from engine.base.distributed import autocast, pick_device
from engine.eval.generation import compile_step, generate
from heads import HeadConfig
from model import GPT, GPTConfig

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 200, "pad_token_id": 0}


def main() -> None:
    args = measure.arguments(__doc__, SHAPE, SIZES)
    shape = args.shapes
    del shape["batch_size"]
    device = pick_device("auto")
    softmax = gpt("softmax", device, **shape)
    bayes = gpt("bayes", device, **shape)
    theirs = transformers_gpt2(**shape).eval().to(device)
    n_prompt = shape["block_size"] // 16
    n_new = min(256, shape["block_size"] - n_prompt)
    for batch in (1, 8):
        idx = torch.randint(shape["vocab_size"], (batch, n_prompt), device=device)
        prompt = {"inputs": idx, "attention_mask": torch.ones_like(idx), "max_new_tokens": n_new}
        cases = {
            "uncached": partial(write, softmax, idx, n_new, use_cache=False),
            "softmax": partial(write, softmax, idx, n_new),
            "bayes": partial(write, bayes, idx, n_new),
            "softmax_float32": partial(write, softmax, idx, n_new, dtype="float32"),
            "transformers": partial(theirs.generate, **prompt, **SAMPLED),
        }
        draws = {
            "bayes, draws: 1": partial(write, bayes, idx, n_new, n_samples=1),
            "bayes, draws: 16": partial(write, bayes, idx, n_new, n_samples=16),
        }
        sizes = {
            "n_prompt": n_prompt,
            "n_new": n_new,
            "batch": batch,
        }
        for group in (cases, draws):
            measure.compare("generate", group, args.rounds, shape | sizes)


def gpt(name: str, device: torch.device, **shape: int) -> GPT:
    """Our model with the head of that name and random weights."""
    torch.manual_seed(0)
    head = HeadConfig(**OURS[name], n_data=N_DATA)
    model = GPT(GPTConfig(**shape, bias=True, head=head)).eval().to(device)
    if device.type == "cuda":
        compile_step(model)
    return model


def write(model: GPT, idx: torch.Tensor, n_new: int, dtype: str = "auto", **options) -> None:
    with autocast(idx.device, dtype)[0]:
        generate(model, idx, n_new, temperature=0.8, top_k=200, **options)


if __name__ == "__main__":
    main()
