"""What a context that is read once saves: HellaSwag items by engine/eval/endings.py, and as four separate rows.

    # GPT-2 124M, random weights, under two minutes
    python bench/hellaswag.py --source=hellaswag_val.jsonl

Completion style, fp32. four_rows: what users write, log_probs of an item's four padded rows, at all positions.
separate: our own code given each ending with a context of its own, so that only the sharing differs.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from engine.base.distributed import keep_memory, pick_device
from engine.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from engine.eval.endings import encode, score_endings
from model import GPT, GPTConfig

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768}


def main() -> None:
    args = measure.arguments(__doc__, rounds=3, source="", items=16)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32} if args.quick else SHAPE
    tokenizer = ByteTokenizer() if args.quick else GPT2Tokenizer()
    keep_memory()
    model = (
        GPT(GPTConfig(vocab_size=tokenizer.vocab_size, bias=True, **shape))
        .to(pick_device("auto"))
        .eval()
    )
    lines = (
        Path(args.source).read_text().splitlines()
    )  # short items first: take them from everywhere
    items = [json.loads(line) for line in lines[:: max(1, len(lines) // args.items)]][: args.items]
    texts = [
        encode(tokenizer, item["ctx"], [" " + ending for ending in item["endings"]])
        for item in items
    ]
    apart = [(context, [ending]) for context, endings in texts for ending in endings]
    cases = {
        "shared": lambda: score_endings(model, texts),
        "separate": lambda: score_endings(model, apart, batch_size=64),
        "four_rows": lambda: [four_rows(model, *text) for text in texts],
    }
    seconds = measure.in_turns(cases, args.rounds)
    for baseline in ("separate", "four_rows"):
        pair = {name: seconds[name] for name in ("shared", baseline)}
        measure.report("hellaswag", pair, baseline, shapes=shape | {"items": len(items)})


@torch.no_grad()
def four_rows(model: GPT, context: list[int], endings: list[list[int]]) -> list[float]:
    """The sum of log p of each ending."""
    rows = [torch.tensor(context + ids) for ids in endings]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(
        model.transformer.wte.weight.device
    )
    of_next = model.log_probs(idx[:, :-1]).gather(-1, idx[:, 1:, None]).squeeze(-1)
    return [
        x[len(context) - 1 : len(row) - 1].sum().item()
        for x, row in zip(of_next, rows, strict=True)
    ]


if __name__ == "__main__":
    main()
