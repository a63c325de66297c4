"""Continue a prompt with a trained model of any head. Tokens are printed as they are drawn.

    python sample.py --out_dir=out/quickstart/bayes --start="The old man" --show_uncertainty
    python sample.py --out_dir=out/quickstart/bayes --interactive
    python sample.py --init_from=gpt2-xl --prompts=prompts.txt --jsonl=texts.jsonl --stop='\\n\\n'

--show_uncertainty colours each token whose prediction was unusually uncertain for this run: beyond
the 75th, 95th or 99th percentile of its own validation text. --abstain=mark underlines tokens of
unusually high epistemic uncertainty, the part that comes from uncertain weights. --html shows all
scores.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engine.base.errors import UserError, run_main
from engine.base.files import check_writable
from engine.base.options import PositiveInt, load_config
from engine.data.tokenizer import incremental_decoder
from engine.eval.generation import compile_step
from engine.eval.report import write_page
from engine.eval.run import Continuation, Run, Sampling
from engine.eval.scored_text import ScoredText, Token
from engine.eval.terminal import Screen


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
    # ask for prompts; an empty one continues the last text, Ctrl-C ends a text, Ctrl-D the program
    interactive: bool = False
    # continuations of each prompt; --interactive shows one
    num_samples: PositiveInt = 10
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
    config, given = load_config(SampleConfig, sys.argv[1:])
    if config.interactive:
        for name in given & {"num_samples", "prompts", "jsonl"}:
            raise UserError(f"--interactive shows one text for each prompt; leave --{name} out")
        config = replace(config, num_samples=1)
    source = config.out_dir if config.init_from == "resume" else config.init_from
    run = Run(source, config.device, config.dtype)
    config = replace(config, sampling=run.with_limit(config.sampling))
    if config.compile:
        compile_step(run.model)
    previous: list[int] = []  # the ids of the newest text and its prompt
    prompts = ask_prompts(run, previous) if config.interactive else read_prompts(run, config)
    out = open(os.devnull, "w") if config.jsonl else sys.stdout  # noqa: SIM115
    screen = Screen(out, config.sampling, config.show_uncertainty)
    scored = {}
    try:
        for i, (shown, ids) in enumerate(prompts):
            sampling = replace(config.sampling, seed=config.sampling.seed + i)
            decode = incremental_decoder(run.tokenizer)
            prompt = ScoredText(Token(decode(id_), id_) for id_ in ids)
            texts = generate(run, prompt, sampling, config, screen)
            previous[:] = ids + [token.id for token in texts[0].tokens]
            for number, text in enumerate(texts):
                title = f"{i + 1}. {shown[:40]!r}, sample {number + 1}"
                page_text = run.scored(prompt + text.tokens, "total")
                if sampling.abstain == "mark":
                    page_text.max_epistemic = sampling.max_epistemic
                scored[title] = {source: page_text}
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
    shown_prompt = "" if config.interactive else prompt.text
    rule = "" if config.interactive else "---------------\n"
    uncertain = config.show_uncertainty or config.html != "" or sampling.abstain != "no"
    ids = [token.id for token in prompt]
    texts = [Continuation(sampling, run.scored((), "total"))]
    screen.begin(shown_prompt)
    try:
        for texts in run.stream(ids, config.num_samples, sampling, uncertain):
            screen.show(texts[0])
    except KeyboardInterrupt:
        if not config.interactive:
            raise
    screen.end(texts[0], rule)
    for text in texts[1:]:
        screen.begin(shown_prompt)
        screen.show(text)
        screen.end(text, rule)
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
        if config.start == SampleConfig.start:
            try:
                run.encode(config.start)
            except UserError:  # its characters have no newline
                lines = [run.tokenizer.decode([0])]
    return [(line, run.encode(line)) for line in lines]


def ask_prompts(run: Run, previous: list[int]) -> Iterator[tuple[str, list[int]]]:
    """Prompts from the keyboard; an empty one continues the previous text."""
    with contextlib.suppress(ImportError):  # for line editing
        import readline  # noqa: F401
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            prompt = input(mark)
            if not mark:  # a pipe shows no input
                print(prompt)
            ids = list(previous) if previous and not prompt else run.encode(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:  # ask again, as a shell does
            print()
        except (UserError, UnicodeDecodeError) as error:
            print(f"error: {error}", file=sys.stderr)
        else:
            yield prompt, ids


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
