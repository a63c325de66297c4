"""Print texts while they are generated, coloured by the uncertainty of each token."""

import os
import re
from typing import TextIO

from engine.eval.run import Continuation, Sampling
from engine.eval.scored_text import legend

SHADES = ("", "38;5;220", "38;5;208", "38;5;196")  # codes of yellow, orange and red
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that control a terminal


class Screen:
    """Prints growing texts.

    coloured: colour tokens by the percentile of their total uncertainty if the terminal has
    colours, and print means."""

    def __init__(self, out: TextIO, sampling: Sampling, coloured: bool):
        self.out = out
        self.sampling = sampling
        self.coloured = coloured
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self.has_colours = (out.isatty() and not plain) or os.environ.get("FORCE_COLOR", "0") != "0"

    def begin(self, prompt: str) -> None:
        self.n_shown = 0
        self._print(self._styled(prompt))

    def show(self, text: Continuation) -> None:
        """Print the new tokens."""
        for token in text.tokens[self.n_shown :]:
            is_marked = self.sampling.too_uncertain(token)
            code = SHADES[text.tokens.shade(token)] if self.coloured else ""
            if is_marked:
                code += ";4"  # underlined
            self._print(self._styled(token.text, code.strip(";")))
            if is_marked and not self.has_colours:
                self._print("[?]")
        self.n_shown = len(text.tokens)

    def end(self, text: Continuation, rule: str) -> None:
        self._print("\n")
        limit = self.sampling.max_epistemic
        if text.ended == "abstain":
            self._print(f"[abstains: epistemic uncertainty above {limit:.3g} nats]\n")
        if self.sampling.abstain == "mark":
            n_marked = sum(map(self.sampling.too_uncertain, text.tokens))
            of = f"{n_marked} of {len(text.tokens)} tokens"
            self._print(f"[marked: {of}, epistemic uncertainty above {limit:.3g} nats]\n")
        if self.coloured:
            self._print(f"[{legend(text.tokens)} {text.tokens.summary()}]\n")
        self._print(rule)

    def _styled(self, text, code=""):
        if self.out.isatty():
            text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        return f"\033[{code}m{text}\033[0m" if self.has_colours and code else text

    def _print(self, text):
        print(text, end="", file=self.out, flush=True)
