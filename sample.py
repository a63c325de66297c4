"""Continue a prompt with a trained model, any head.

    python sample.py --out_dir=out/quickstart/bayes --start="The old man" --show_uncertainty
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt --num_samples=3 --max_new_tokens=100

With --show_uncertainty each token is coloured by the entropy of the prediction it was drawn from; with a Bayesian head,
the tenth of the tokens whose epistemic uncertainty (what the weights do not know) is highest are underlined.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint import load_model, tokenizer_of
from engine.config import load_config
from engine.distributed import autocast, pick_device
from engine.errors import MANY, UserError, check_ranges, run
from engine.tokenizer import Tokenizer, decode_each

# the effective number of tokens that the model wavers between (exp of the entropy), and the colour up to there
SHADES = ((2, 40), (5, 148), (20, 220), (100, 208), (math.inf, 196))


@dataclass(frozen=True)
class SampleConfig:
    init_from: str = "resume"  # resume: the newest checkpoint in out_dir | gpt2* | a run folder or checkpoint file
    out_dir: str = "out"  # with init_from=resume: the run, or one of its checkpoint files
    start: str = "\n"  # the prompt; FILE:prompt.txt reads it; "" or "<|endoftext|>" starts a new document
    num_samples: int = 10  # continuations
    max_new_tokens: int = 500  # length of each
    temperature: float = 0.8  # below 1: safer, above 1: wilder, 0: always the likeliest token
    top_k: int = 200  # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    n_samples: int = 0  # Bayesian heads: posterior draws averaged per token; 0: the mean weights; -1: all, not sampled
    seed: int = 1337  # the same seed, the same text
    show_uncertainty: bool = False  # colour the tokens by uncertainty
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto
    compile: bool = False  # one compiled graph per token (on CUDA a CUDA graph): for long texts on a GPU

    def __post_init__(self):
        check_ranges(self, {"num_samples": (1, 10**6), "max_new_tokens": (1, 10**6), "n_samples": (-1, 10**6)})
        check_ranges(self, {"temperature": (0.0, 1e6), "top_k": (0, MANY), "seed": (0, (1 << 63) - 1)})
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must lie in (0, 1]")


def main() -> None:
    config, _ = load_config(SampleConfig, sys.argv[1:])
    device = pick_device(config.device)
    cast, _ = autocast(device, config.dtype)
    source = config.out_dir if config.init_from == "resume" else config.init_from
    model = load_model(source, device)
    tokenizer = tokenizer_of(source, model.config.vocab_size)
    if config.compile:
        model.compile_step()
    prompt = encode_prompt(config.start, tokenizer)
    idx = torch.tensor([prompt] * config.num_samples, device=device)
    torch.manual_seed(config.seed)
    options = {"n_ids": tokenizer.vocab_size} | {
        name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "n_samples")
    }
    tokens, total, epistemic = [], [], []
    with cast, torch.no_grad():
        for token, prediction in model.stream(idx, config.max_new_tokens, **options, uncertain=config.show_uncertainty):
            tokens.append(token)
            if config.show_uncertainty:
                total.append(prediction.total)
                epistemic.append(prediction.epistemic)
    tokens = torch.cat(tokens, dim=1).tolist()
    if config.show_uncertainty:
        total, epistemic = torch.cat(total, dim=1), torch.cat(epistemic, dim=1)
        print(legend(epistemic))
    for i, row in enumerate(tokens):
        if config.show_uncertainty:
            print(decode_pieces(prompt, tokenizer) + coloured(row, total[i], epistemic[i], tokenizer))
            print(f"[mean uncertainty: total {total[i].mean():.3f} nats, epistemic {epistemic[i].mean():.4f} nats]")
        else:
            print(tokenizer.decode(prompt + row))
        print("---------------")


def encode_prompt(start: str, tokenizer: Tokenizer) -> list[int]:
    """The prompt's token ids, at least one."""
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        try:
            start = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompt {path}: {error}") from None
    if start in ("", "<|endoftext|>"):
        if tokenizer.eot is None:
            raise UserError("this tokenizer has no end-of-text token to start from; give some text with --start")
        return [tokenizer.eot]
    return tokenizer.encode(start).tolist()


def decode_pieces(ids: list[int], tokenizer: Tokenizer, before=lambda i: "", after="") -> str:
    """The text of ids, before(i) and after around each token's."""
    return "".join(before(i) + piece + after for i, piece in enumerate(decode_each(ids, tokenizer)))


def coloured(ids: list[int], total: torch.Tensor, epistemic: torch.Tensor, tokenizer: Tokenizer) -> str:
    """The text of ids in terminal colours (plain when the output is no terminal)."""
    if not use_colour():
        return decode_pieces(ids, tokenizer)
    high = epistemic.float().quantile(0.9).item()

    def style(i: int) -> str:
        shade = next(colour for limit, colour in SHADES if math.exp(total[i]) <= limit)
        return f"\033[38;5;{shade}m" + ("\033[4m" if 0 < high <= epistemic[i] else "")

    return decode_pieces(ids, tokenizer, style, "\033[0m")


def legend(epistemic: torch.Tensor) -> str:
    """What the colours mean."""
    names = [f"{limit:.0f}" if limit < math.inf else "more" for limit, _ in SHADES]
    shown = [f"\033[38;5;{c}m{n}\033[0m" if use_colour() else n for n, (_, c) in zip(names, SHADES, strict=True)]
    text = f"[the model wavers between up to {' / '.join(shown)} tokens (exp of the entropy)"
    return text + ("; underlined: the tenth of highest epistemic uncertainty]" if epistemic.any() else "]")


def use_colour() -> bool:
    return (sys.stdout.isatty() and "NO_COLOR" not in os.environ) or "FORCE_COLOR" in os.environ


if __name__ == "__main__":
    run(main)
