"""Continue a prompt with a trained model, any head; tokens appear as they are drawn.

    python sample.py --out_dir=out/quickstart/bayes --start="The old man" --show_uncertainty
    python sample.py --out_dir=out/quickstart/bayes --interactive
    python sample.py --init_from=gpt2-xl --prompts=prompts.txt --jsonl=texts.jsonl --num_samples=3 --stop='\\n\\n'

With --show_uncertainty each token is coloured by the entropy of the prediction it was drawn from; with a Bayesian head
those are underlined whose epistemic uncertainty (what the weights do not know) is high. --html has all figures.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engine.base.errors import UserError, check_ranges, run_main
from engine.base.files import check_writable
from engine.base.options import load_config
from engine.eval.reading import AVERAGED, Reading, Token, reader
from engine.eval.report import Document, write_page
from engine.eval.run import Continuation, Run, Sampling
from engine.eval.terminal import Screen

TAKEN = {
    "sample",
    "text",
    "ended",
    "seed",
    "n_tokens",
    "uncertain",
    "tokens",
    "nll",
    "total",
    "epistemic",
}  # in JSON


@dataclass(frozen=True)
class SampleConfig:
    # resume: the newest checkpoint in out_dir | gpt2* | a run folder or checkpoint file
    init_from: str = "resume"
    out_dir: str = "out"  # with init_from=resume: the run, or one of its checkpoint files
    # the prompt; FILE:prompt.txt reads it; "" or "<|endoftext|>" starts a new document
    start: str = "\n"
    prompts: str = ""  # a file of prompts: one in each line, or .jsonl with a field "prompt"
    # ask for prompts; an empty one goes on with the text, Ctrl-C ends a text, Ctrl-D all
    interactive: bool = False
    num_samples: int = 10  # continuations of each prompt; with --interactive 1
    sampling: Sampling = Sampling()
    # colour the tokens by uncertainty, and give figures with --jsonl
    show_uncertainty: bool = False
    # write all texts there, a page coloured by uncertainty with figures under the pointer
    html: str = ""
    jsonl: str = ""  # write all texts there, a JSON object per line, instead of to the screen
    device: str = "auto"  # cpu | cuda | cuda:1 | mps | auto
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto
    # one compiled graph per token (on CUDA a CUDA graph): for long texts on a GPU
    compile: bool = False

    def __post_init__(self):
        check_ranges(self, {"num_samples": (1, 10**6)})
        if self.interactive and (self.prompts or self.jsonl):
            raise UserError("--interactive asks for its prompts; leave --prompts and --jsonl out")
        if self.interactive and sys.stdin is None:
            raise UserError("--interactive asks for its prompts, and standard input is closed")
        for path in map(Path, filter(None, (self.html, self.jsonl))):
            if path.exists():
                raise UserError(f"{path} is there already; delete it, or name another file")
            if not path.parent.is_dir():
                raise UserError(f"there is no folder {path.parent}; make it, or name another file")
            check_writable(path.parent)
        if self.html and Path(self.html).resolve() == Path(self.jsonl).resolve():
            raise UserError(f"--html and --jsonl both name {self.html}; give two files")


def main() -> None:
    config, said = load_config(SampleConfig, sys.argv[1:])
    if config.interactive and "num_samples" in said:
        raise UserError("--interactive writes one text at a time; leave --num_samples out")
    model = Run(
        config.out_dir if config.init_from == "resume" else config.init_from,
        config.device,
        config.dtype,
    )
    model.check(config.sampling)
    if config.sampling.n_samples and not model.model.bayes_layers():
        raise UserError(
            f"{model.source} has point weights, of which there is nothing to draw; leave --n_samples out"
        )
    if config.compile:
        model.model.compile_step()
    last: list[int] = []  # the ids of the newest text, its prompt among them
    prompts = asked(model, last) if config.interactive else given(model, config)
    screen, documents = Screen(config, bool(model.model.bayes_layers())), []
    with contextlib.ExitStack() as stack:
        lines = (
            stack.enter_context(open(config.jsonl, "x", encoding="utf-8")) if config.jsonl else None
        )
        stack.callback(
            finish, config, model.source, documents
        )  # with what there is, also when it is interrupted
        for i, (record, ids) in enumerate(prompts):
            sampling = replace(config.sampling, seed=config.sampling.seed + i)
            prompt = Reading(reader(model.tokenizer)(ids))
            texts = write(model, prompt, sampling, config, screen)
            last[:] = ids + [token.id for token in texts[0].tokens]
            for number, text in enumerate(texts):
                if lines:
                    found = record | {"sample": number} | as_record(text, config.show_uncertainty)
                    print(json.dumps(found, ensure_ascii=False), file=lines, flush=True)
                if config.html:
                    title = f"{record['prompt'][:40]!r}, sample {number + 1}"
                    documents.append(Document(title, {model.source: prompt + text.tokens}))


def finish(config: SampleConfig, source: str, documents: list[Document]) -> None:
    """Write the page, and say where the texts are."""
    if documents:
        note = ", ".join(f"{name} = {value!r}" for name, value in vars(config.sampling).items())
        write_page(Path(config.html), f"Texts of {source}", note, "", documents)
    for path in filter(None, (config.html if documents else "", config.jsonl)):
        print(f"texts: {path}", file=sys.stderr)


def write(
    model: Run, prompt: Reading, sampling: Sampling, config: SampleConfig, screen: Screen
) -> list[Continuation]:
    """Write a prompt's continuations: the first one appears while it is drawn, the others when all are done."""
    n, texts = 1 if config.interactive else config.num_samples, [Continuation(sampling)]
    uncertain = config.show_uncertainty or bool(config.html) or sampling.abstain != "no"
    screen.begin(prompt)
    try:
        for texts in model.stream([token.id for token in prompt], n, sampling, uncertain):
            screen.show(texts[0])
    except KeyboardInterrupt:
        if not config.interactive:
            raise
    screen.end(texts[0])
    for text in texts[1:]:
        screen.begin(prompt)
        screen.show(text)
        screen.end(text)
    return texts


def given(model: Run, config: SampleConfig) -> list[tuple[dict, list[int]]]:
    """The prompts of the options, all checked before the first is used: what is known of each, and its ids."""
    start = config.start
    records = [
        {"prompt": read_file(start.removeprefix("FILE:")) if start.startswith("FILE:") else start}
    ]
    if config.prompts:
        lines = [
            line for line in read_file(config.prompts).split("\n") if line.strip()
        ]  # U+2028 may stand in one
        as_json = config.prompts.endswith(".jsonl")
        records = [
            from_json(line, i, config.prompts) if as_json else {"prompt": line}
            for i, line in enumerate(lines)
        ]
        if not records:
            raise UserError(f"{config.prompts} has no prompts")
    return [(record, model.encode(record["prompt"])) for record in records]


def from_json(line: str, i: int, path: str) -> dict:
    """A line of a .jsonl file of prompts."""
    try:
        record = json.loads(line)
        record["prompt"].encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(
            f'{path}: its prompt {i + 1} is no JSON object with a text "prompt"'
        ) from None
    if taken := sorted(TAKEN & record.keys()):
        raise UserError(
            f"{path}: its prompt {i + 1} has the field {taken[0]!r}, which the output has; rename it"
        )
    return record


def asked(model: Run, last: list[int]) -> Iterator[tuple[dict, list[int]]]:
    """Prompts from the keyboard; an empty one goes on with the last text."""
    with contextlib.suppress(ImportError):  # where there is one, lines can be edited
        import readline  # noqa: F401
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
            ids = list(last) if last and not prompt else model.encode(prompt)
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "")
            return
        except KeyboardInterrupt:  # as in a shell: another line
            print()
        except UnicodeDecodeError as error:
            print(f"error: the line is not UTF-8 ({error.reason})", file=sys.stderr)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        else:
            yield {"prompt": prompt}, ids


def read_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {path}: {error}") from None


def as_record(text: Continuation, with_tokens: bool) -> dict:
    """A text as it stands in the .jsonl file."""
    tokens, sampling = text.tokens, text.sampling
    record = {
        "text": text.text,
        "ended": text.ended,
        "seed": sampling.seed,
        "n_tokens": len(tokens),
    }
    if sampling.abstain == "mark":
        record["uncertain"] = [i for i, token in enumerate(tokens) if sampling.too_uncertain(token)]
    if with_tokens:
        record |= tokens.means() | {
            "tokens": [{"text": token.text, "id": token.id} | figures(token) for token in tokens]
        }
    return record


def figures(token: Token) -> dict[str, float]:
    return {name: round(getattr(token, name), 5) for name in AVERAGED}


if __name__ == "__main__":
    run_main(main)
