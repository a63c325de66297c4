"""Continue a prompt with a trained model of any head. Tokens are printed as they are drawn.

    python sample.py --out_dir=out/quickstart/bayes --start="The old man" --show_uncertainty
    python sample.py --init_from=gpt2-xl --prompts=prompts.txt --jsonl=texts.jsonl --stop='\\n\\n'

--show_uncertainty colours each token whose prediction was unusually uncertain for this run: beyond
the 75th, 95th or 99th percentile of its own validation text. --abstain=mark underlines tokens of
unusually high epistemic uncertainty, the part that comes from uncertain weights. --html shows all
scores.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from engine.base.errors import UserError, run_main
from engine.base.files import check_writable
from engine.base.options import check_options, load_config
from engine.data.tokenizer import incremental_decoder
from engine.eval.generation import compile_step
from engine.eval.report import write_page
from engine.eval.run import Continuation, Run, Sampling
from engine.eval.scored_text import ScoredText, Token
from engine.eval.terminal import Screen

RULE = "---------------\n"  # after each text, as in nanoGPT


@dataclass(frozen=True)
class SampleConfig:
    # resume: the newest checkpoint in out_dir | gpt2* | a run, a checkpoint file, or a folder of
    # nanoGPT or transformers
    init_from: str = "resume"
    out_dir: str = "out"  # with init_from=resume: the run, or one of its checkpoint files
    # the prompt; FILE:prompt.txt reads it; "" or "<|endoftext|>" starts a new document; \n ends a
    # line
    start: str = "\n"
    prompts: str = ""  # a file of prompts, one per line
    num_samples: Annotated[int, ">= 1", "<= 1e6"] = 10  # continuations of each prompt
    sampling: Sampling = Sampling()
    # colour tokens by total uncertainty; with --jsonl, write the scores of each token
    show_uncertainty: bool = False
    # write all texts to this page, coloured by uncertainty; hover over a token for its scores
    html: str = ""
    jsonl: str = ""  # write all texts to this file, one JSON object per line; print nothing
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto
    # compile the step of one token (on CUDA to a CUDA graph): faster for long texts on a GPU
    compile: bool = False

    def __post_init__(self):
        check_options(self)
        for option in ("html", "jsonl"):
            path = Path(getattr(self, option))
            if path == Path():
                continue
            if path.exists():
                raise UserError(f"{path} exists already; delete it, or name another file")
            if not path.parent.is_dir():
                raise UserError(f"there is no folder {path.parent}; make it, or name another file")
            check_writable(path.parent, option)


def main() -> None:
    config, _ = load_config(SampleConfig, sys.argv[1:])
    source = config.out_dir if config.init_from == "resume" else config.init_from
    run = Run(source, config.device, config.dtype)
    config = replace(config, sampling=run.with_limit(config.sampling))
    if config.compile:
        compile_step(run.model)
    prompts = read_prompts(run, config)
    out = open(os.devnull, "w") if config.jsonl else sys.stdout  # noqa: SIM115
    screen = Screen(out, config.sampling, config.show_uncertainty)
    scored = {}
    try:
        for i, (shown, ids) in enumerate(prompts):
            sampling = replace(config.sampling, seed=config.sampling.seed + i)
            decode = incremental_decoder(run.tokenizer)
            prompt = ScoredText(Token(decode(id_), id_) for id_ in ids)
            texts = generate(run, prompt, sampling, config, screen)
            for number, text in enumerate(texts):
                title = f"{i + 1}. {shown[:40]!r}, sample {number + 1}"
                scored[title] = {source: run.scored(prompt + text.tokens, "total")}
                if config.jsonl:
                    line = {"prompt": shown, "sample": number}
                    line |= as_record(text, config.show_uncertainty)
                    with open(config.jsonl, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    finally:  # also after an interrupt, with the texts so far
        if config.html and scored:
            write_page(Path(config.html), f"Texts of {source}", str(config.sampling), "", scored)


def generate(
    run: Run, prompt: ScoredText, sampling: Sampling, config: SampleConfig, screen: Screen
) -> list[Continuation]:
    """Continue a prompt. Print the first text while it is drawn, the others when all are done."""
    uncertain = config.show_uncertainty or config.html != "" or sampling.abstain != "no"
    ids = [token.id for token in prompt]
    screen.begin(prompt.text)
    for texts in run.stream(ids, config.num_samples, sampling, uncertain):
        screen.show(texts[0])
    screen.end(texts[0], RULE)
    for text in texts[1:]:
        screen.begin(prompt.text)
        screen.show(text)
        screen.end(text, RULE)
    return texts


def read_prompts(run: Run, config: SampleConfig) -> list[tuple[str, list[int]]]:
    """All prompts and their ids, checked before the first is used."""
    if config.prompts:
        lines = [line for line in read_text(config.prompts).split("\n") if line.strip()]
        if not lines:
            raise UserError(f"{config.prompts} has no prompts")
    elif config.start.startswith("FILE:"):
        lines = [read_text(config.start.removeprefix("FILE:"))]
    else:
        lines = [config.start.replace("\\n", "\n").replace("\\t", "\t")]  # as in --stop
    return [(line, run.encode(line)) for line in lines]


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {path}: {error}") from None


def as_record(text: Continuation, with_tokens: bool) -> dict:
    """A text's fields in the .jsonl file."""
    tokens = text.tokens
    sampling = text.sampling
    record = {
        "text": text.text,
        "ended": text.ended,
        "seed": sampling.seed,
        "n_tokens": len(tokens),
    }
    if sampling.abstain == "mark":
        record["uncertain"] = [i for i, token in enumerate(tokens) if sampling.too_uncertain(token)]
    if with_tokens:
        record |= tokens.means()
        record["tokens"] = [token._asdict() for token in tokens]
    return record


if __name__ == "__main__":
    run_main(main)
