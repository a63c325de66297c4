"""Print texts while they are generated, coloured by the uncertainty of each token."""

import math
import os
import re
from typing import TextIO

import numpy as np

from engine.eval.run import Continuation, Sampling

# upper limit of the effective number of likely tokens (exp of the entropy) -> colour
SHADES = {2: 40, 5: 148, 20: 220, 100: 208, math.inf: 196}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that control a terminal


class Screen:
    """Prints growing texts.

    coloured: if the terminal has colours, colour tokens by entropy and underline those of high
    epistemic uncertainty."""

    def __init__(self, out: TextIO, sampling: Sampling, coloured: bool):
        self.out = out
        self.sampling = sampling
        self.coloured = coloured
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self.has_colours = (out.isatty() and not plain) or "FORCE_COLOR" in os.environ
        if coloured and self.has_colours:
            shades = [self._styled(f"{n:g}", f"38;5;{shade}") for n, shade in SHADES.items()]
            self._print(f"[colours: effective number of tokens, up to {' / '.join(shades)}; ")
            self._print("underlined: high epistemic uncertainty]\n")

    def begin(self, prompt: str) -> None:
        self.n_shown = 0
        self.epistemic = []
        self._print(self._styled(prompt))

    def show(self, text: Continuation) -> None:
        """Print the new tokens."""
        for token in text.tokens[self.n_shown :]:
            codes = []
            if self.coloured:
                n_tokens = math.exp(token.total)
                shade = next(shade for limit, shade in SHADES.items() if n_tokens <= limit)
                codes.append(f"38;5;{shade}")
            if self._is_high(token):
                codes.append("4")
            self._print(self._styled(token.text, *codes))
            if self.sampling.too_uncertain(token) and not self.has_colours:
                self._print("[?]")
        self.n_shown = len(text.tokens)

    def end(self, text: Continuation, rule: str) -> None:
        self._print("\n")
        if text.ended == "abstain":
            limit = self.sampling.max_epistemic
            self._print(f"[abstains: epistemic uncertainty above {limit} nats]\n")
        if self.coloured and text.tokens:
            means = text.tokens.means()
            shown = "total {total:.3f} nats, epistemic {epistemic:.4f} nats".format(**means)
            self._print(f"[mean uncertainty: {shown}]\n")
        self._print(rule)

    def _is_high(self, token):
        """Above the limit; without a limit, in the highest tenth of the text so far."""
        if self.sampling.abstain != "no":
            return self.sampling.too_uncertain(token)
        self.epistemic.append(token.epistemic)
        if not self.coloured or len(self.epistemic) < 10:
            return False
        return token.epistemic > np.quantile(self.epistemic, 0.9)

    def _styled(self, text, *codes):
        if self.out.isatty():
            text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        return f"\033[{';'.join(codes)}m{text}\033[0m" if self.has_colours and codes else text

    def _print(self, text):
        print(text, end="", file=self.out, flush=True)
