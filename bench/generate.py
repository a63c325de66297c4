"""How fast text is generated: ours with and without its cache, with posterior draws, and transformers' generate.

    python bench/generate.py                     # a few minutes on two CPU cores
    python bench/generate.py --n_layer=12 --n_head=12 --n_embd=768 --n_new=64 --rounds=3

Random weights, sampling at temperature 0.8 from the 200 likeliest. Ours runs in bfloat16 where the machine multiplies
it fast, as sample.py does; float32, the precision of transformers' model, is beside it. A text of a Bayesian head that
averages 16 draws per token is compared with one of a single draw. Results go to bench/results.jsonl.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import measure
from engine.config import load_config
from engine.distributed import autocast, keep_memory, pick_device
from engine.errors import run
from heads import HeadConfig
from model import GPT, GPTConfig

HEADS = {"softmax": ("point", "categorical"), "sigmoid": ("point", "sigmoid"), "bayes": ("bayes", "categorical")}
SAMPLING = {"temperature": 0.8, "top_k": 200}
DRAWS = 16


@dataclass(frozen=True)
class Options:
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 512
    vocab_size: int = 50304
    n_prompt: int = 16  # tokens
    n_new: int = 256  # tokens
    rounds: int = 5
    quick: bool = False  # tiny shapes, to see that it runs
    results: str = str(measure.RESULTS)  # where the records go


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    if options.quick:
        tiny = {"n_layer": 1, "n_embd": 32, "block_size": 16, "vocab_size": 67, "n_prompt": 2, "n_new": 4, "rounds": 2}
        options = replace(options, **tiny)
    measure.RESULTS = Path(options.results)
    keep_memory()
    device = pick_device("auto")
    models = {name: gpt(options, *head).to(device) for name, head in HEADS.items()}
    fast = autocast(device, "auto")[1]
    for batch in (1, 8):
        idx = torch.randint(options.vocab_size, (batch, options.n_prompt), device=device)
        for name, model in models.items():
            case, baseline = ours(model, idx, options, fast), ours(model, idx, options, fast, use_cache=False)
            compare({name: case, "uncached": baseline}, "uncached", options, batch, fast)
        model = models["softmax"]
        cases = {
            "softmax": ours(model, idx, options, "float32"),
            "transformers": transformers_generate(idx, options),
            "uncached": ours(model, idx, options, "float32", use_cache=False),
        }
        compare(cases, "uncached", options, batch, "float32")
        draws = {f"bayes, draws: {n}": ours(models["bayes"], idx, options, fast, n_samples=n) for n in (DRAWS, 1)}
        compare(draws, "bayes, draws: 1", options, batch, fast)


def gpt(options: Options, weights: str, likelihood: str) -> GPT:
    """Our model with a head and random weights."""
    torch.manual_seed(0)
    shape = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    return GPT(GPTConfig(**shape, bias=True, head=HeadConfig(weights, likelihood, n_data=10**8))).eval()


def ours(model: GPT, idx: torch.Tensor, options: Options, dtype: str, **generation) -> Callable[[], None]:
    """A text of ours; in one autocast context, which keeps the weights that it casts."""

    def case():
        with autocast(idx.device, dtype)[0]:
            model.generate(idx, options.n_new, **SAMPLING, **generation)

    return case


def transformers_generate(idx: torch.Tensor, options: Options) -> Callable[[], object]:
    """A text of transformers' GPT-2 in the same shape, cached as is its default, that no token ends."""
    import transformers

    shape = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config = transformers.GPT2Config(**shape, n_positions=options.block_size, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval().to(idx.device)
    given = SAMPLING | {"do_sample": True, "max_new_tokens": options.n_new, "pad_token_id": 0}
    return lambda: model.generate(idx, attention_mask=torch.ones_like(idx), **given)


def compare(cases: dict[str, Callable], baseline: str, options: Options, batch: int, dtype: str) -> None:
    """Time the cases in turns, print their table and record their ratios to the baseline."""
    seconds = measure.in_turns(cases, options.rounds)
    measure.table(f"{options.n_new} tokens, batch {batch}, {dtype}", seconds, baseline)
    shapes = {name: value for name, value in asdict(options).items() if name not in ("rounds", "quick", "results")}
    for case in cases:
        if case != baseline:
            about = {"seconds": round(statistics.median(seconds[case]), 5), "dtype": dtype}
            about["shapes"] = shapes | {"batch": batch}
            measure.record("generate", case, baseline, measure.ratio(seconds[case], seconds[baseline]), **about)


if __name__ == "__main__":
    run(main)
