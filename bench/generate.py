"""How fast text is generated: ours with and without its cache, with posterior draws, and transformers' generate.

    python bench/generate.py                     # a few minutes on two CPU cores
    python bench/generate.py --n_layer=12 --n_head=12 --n_embd=768 --n_new=64 --rounds=3

Random weights, sampling at temperature 0.8 from the 200 likeliest. Ours runs in bfloat16 where the machine multiplies
it fast, as sample.py does; float32, the precision of transformers' model, is beside it. A text of a Bayesian head that
averages 16 draws per token is compared with one of a single draw.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from bench.heads import OURS
from engine.base.distributed import autocast, keep_memory, pick_device
from engine.eval.generation import generate
from heads import HeadConfig
from model import GPT, GPTConfig

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 512, "vocab_size": 50304}
QUICK = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 67}
SAMPLING = {"temperature": 0.8, "top_k": 200}
DRAWS = 16


def main() -> None:
    args = measure.arguments(__doc__, rounds=5, n_prompt=16, n_new=256, **SHAPE)
    shape = QUICK if args.quick else {name: getattr(args, name) for name in SHAPE}
    n_prompt, n_new = (2, 4) if args.quick else (args.n_prompt, args.n_new)
    keep_memory()
    device = pick_device("auto")
    fast = autocast(device, "auto")[1]
    models = {name: gpt(name, shape).to(device) for name in ("softmax", "sigmoid", "bayes")}
    for batch in (1, 8):
        idx = torch.randint(shape["vocab_size"], (batch, n_prompt), device=device)
        about = {"shapes": shape | {"n_prompt": n_prompt, "n_new": n_new, "batch": batch}}
        for name, model in models.items():
            cases = {
                name: ours(model, idx, n_new, fast),
                "uncached": ours(model, idx, n_new, fast, use_cache=False),
            }
            measure.report(
                "generate", measure.in_turns(cases, args.rounds), "uncached", dtype=fast, **about
            )
        cases = {
            "softmax": ours(models["softmax"], idx, n_new, "float32"),
            "transformers": transformers_generate(idx, n_new, **shape),
            "uncached": ours(models["softmax"], idx, n_new, "float32", use_cache=False),
        }
        measure.report(
            "generate", measure.in_turns(cases, args.rounds), "uncached", dtype="float32", **about
        )
        draws = {
            f"bayes, draws: {n}": ours(models["bayes"], idx, n_new, fast, n_samples=n)
            for n in (DRAWS, 1)
        }
        measure.report(
            "generate", measure.in_turns(draws, args.rounds), "bayes, draws: 1", dtype=fast, **about
        )


def gpt(name: str, shape: dict[str, int]) -> GPT:
    """Our model with the head of that name and random weights."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**shape, bias=True, head=HeadConfig(**OURS[name], n_data=10**8))).eval()


def ours(model: GPT, idx: torch.Tensor, n_new: int, dtype: str, **generation) -> Callable[[], None]:
    """A text of ours; in one autocast context, which keeps the weights that it casts."""

    def case():
        with autocast(idx.device, dtype)[0]:
            generate(model, idx, n_new, **SAMPLING, **generation)

    return case


def transformers_generate(
    idx: torch.Tensor, n_new: int, block_size: int, **shape: int
) -> Callable[[], object]:
    """A text of transformers' GPT-2 in the same shape, cached as is its default, that no token ends."""
    import transformers

    config = transformers.GPT2Config(
        **shape, n_positions=block_size, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval().to(idx.device)
    given = SAMPLING | {"do_sample": True, "max_new_tokens": n_new, "pad_token_id": 0}
    return lambda: model.generate(idx, attention_mask=torch.ones_like(idx), **given)


if __name__ == "__main__":
    main()
