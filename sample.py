"""Continue a prompt with a trained model, any head; tokens appear as they are drawn.

    python sample.py --out_dir=out/quickstart/bayes --start="The old man" --show_uncertainty
    python sample.py --out_dir=out/quickstart/bayes --interactive
    python sample.py --init_from=gpt2-xl --prompts=prompts.txt --jsonl=texts.jsonl --stop='\\n\\n'

--show_uncertainty colours each token by the entropy of the prediction it was drawn from; with a
Bayesian head it underlines tokens whose epistemic uncertainty (what the weights do not know) is
high. --html has all numbers.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from engine.base.errors import UserError, run_main
from engine.base.files import check_writable, parse_json
from engine.base.options import check_options, load_config
from engine.data.tokenizer import incremental_decoder
from engine.eval.report import write_page
from engine.eval.run import Continuation, Run, Sampling
from engine.eval.scored_text import AVERAGED, ScoredText, Token
from engine.eval.terminal import Screen

# fields of the JSON output, which a prompt's record must not have
OUTPUT = {"sample", "text", "ended", "seed", "n_tokens", "uncertain", "tokens", *AVERAGED}


@dataclass(frozen=True)
class SampleConfig:
    # resume: the newest checkpoint in out_dir | gpt2* | a run folder or checkpoint file
    init_from: str = "resume"
    out_dir: str = "out"  # with init_from=resume: the run, or one of its checkpoint files
    # the prompt; FILE:prompt.txt reads it; "" or "<|endoftext|>" starts a new document
    start: str = "\n"
    prompts: str = ""  # a file of prompts: one in each line, or .jsonl with a field "prompt"
    # ask for prompts; an empty one continues the text, Ctrl-C ends a text, Ctrl-D ends all
    interactive: bool = False
    # continuations of each prompt; with --interactive always 1
    num_samples: Annotated[int, ">= 1", "<= 1e6"] = 10
    sampling: Sampling = Sampling()
    # colour the tokens by uncertainty, and write their scores with --jsonl
    show_uncertainty: bool = False
    # write all texts to this page, coloured by uncertainty, with the scores under the pointer
    html: str = ""
    jsonl: str = ""  # write all texts to this file, a JSON object per line, not to the screen
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto
    # one compiled graph per token (on CUDA a CUDA graph): for long texts on a GPU
    compile: bool = False

    def __post_init__(self):
        check_options(self)
        if self.interactive and (self.prompts or self.jsonl):
            raise UserError("--interactive asks for its prompts; leave --prompts and --jsonl out")
        for path in map(Path, filter(None, (self.html, self.jsonl))):
            if path.exists():
                raise UserError(f"{path} exists already; delete it, or name another file")
            if not path.parent.is_dir():
                raise UserError(f"there is no folder {path.parent}; make it, or name another file")
            check_writable(path.parent)


def main() -> None:
    config, _ = load_config(SampleConfig, sys.argv[1:])
    source = config.out_dir if config.init_from == "resume" else config.init_from
    run = Run(source, config.device, config.dtype)
    run.check(config.sampling)
    if config.sampling.n_samples and not run.model.bayes_layers():
        raise UserError(f"{source} has point weights, which cannot be drawn; leave --n_samples out")
    if config.compile:
        run.model.compile_step()
    last: list[int] = []  # the ids of the newest text and its prompt
    prompts = ask_prompts(run, last) if config.interactive else read_prompts(run, config)
    out = open(os.devnull, "w") if config.jsonl else sys.stdout  # noqa: SIM115
    screen = Screen(out, config.sampling, config.show_uncertainty)
    scored = {}
    try:
        for i, (record, ids) in enumerate(prompts):
            sampling = replace(config.sampling, seed=config.sampling.seed + i)
            decode = incremental_decoder(run.tokenizer)
            prompt = ScoredText(Token(decode(i), i) for i in ids)
            texts = generate(run, prompt, sampling, config, screen)
            last[:] = ids + [token.id for token in texts[0].tokens]
            for number, text in enumerate(texts):
                if config.jsonl:
                    numbers = as_record(text, config.show_uncertainty)
                    append_line(config.jsonl, record | {"sample": number} | numbers)
                title = f"{i + 1}. {record['prompt'][:40]!r}, sample {number + 1}"
                scored[title] = {source: ScoredText(prompt + text.tokens)}
    finally:  # what there is, also after an interrupt
        if config.html and scored:
            options = ", ".join(
                f"{name} = {value!r}" for name, value in vars(config.sampling).items()
            )
            write_page(Path(config.html), f"Texts of {source}", options, "", scored)
        for path in filter(None, (config.html, config.jsonl)):
            print(f"texts: {path}", file=sys.stderr)


def generate(
    run: Run, prompt: ScoredText, sampling: Sampling, config: SampleConfig, screen: Screen
) -> list[Continuation]:
    """Continue a prompt; the first text appears while it is drawn, the others when all are done."""
    n_texts = 1 if config.interactive else config.num_samples
    shown_prompt = "" if config.interactive else prompt.text
    rule = "" if config.interactive else "---------------\n"
    uncertain = config.show_uncertainty or bool(config.html) or sampling.abstain != "no"
    texts = [Continuation(sampling)]
    screen.begin(shown_prompt)
    try:
        for texts in run.stream([token.id for token in prompt], n_texts, sampling, uncertain):
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


def read_prompts(run: Run, config: SampleConfig) -> list[tuple[dict, list[int]]]:
    """The records and ids of the prompts, all checked before the first is used."""
    if not config.prompts:
        text = config.start
        if text.startswith("FILE:"):
            text = read_text(text.removeprefix("FILE:"))
        return [({"prompt": text}, run.encode(text))]
    lines = [line for line in read_text(config.prompts).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{config.prompts} has no prompts")
    if config.prompts.endswith(".jsonl"):
        records = [
            parse_prompt(line, f"{config.prompts}: its prompt {i}")
            for i, line in enumerate(lines, 1)
        ]
    else:
        records = [{"prompt": line} for line in lines]
    return [(record, run.encode(record["prompt"])) for record in records]


def parse_prompt(line: str, where: str) -> dict:
    """A line of a .jsonl file of prompts."""
    record = parse_json(line.encode(), where)
    if not isinstance(record.get("prompt"), str):
        raise UserError(f'{where} has no text "prompt"')
    if taken := record.keys() & OUTPUT:
        raise UserError(f"{where} has the field {taken.pop()!r}, which the output has; rename it")
    return record


def ask_prompts(run: Run, last: list[int]) -> Iterator[tuple[dict, list[int]]]:
    """Prompts from the keyboard; an empty one continues the last text."""
    with contextlib.suppress(ImportError):  # lines can then be edited
        import readline  # noqa: F401
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
            ids = list(last) if last and not prompt else run.encode(prompt)
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "")
            return
        except KeyboardInterrupt:  # as in a shell: another line
            print()
        except (UserError, UnicodeDecodeError) as error:
            print(f"error: {error}", file=sys.stderr)
        else:
            yield {"prompt": prompt}, ids


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {path}: {error}") from None


def append_line(path: str, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


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
        record["tokens"] = []
        for token in tokens:
            scores = {name: round(getattr(token, name), 5) for name in AVERAGED}
            record["tokens"].append({"text": token.text, "id": token.id} | scores)
    return record


if __name__ == "__main__":
    run_main(main)
