"""Texts on a terminal while they are written, coloured by how uncertain each token was."""

import bisect
import math
import os
import re
import sys
from typing import TYPE_CHECKING

from engine.eval.reading import Reading, Token
from engine.eval.run import Continuation, Sampling

if TYPE_CHECKING:
    from sample import SampleConfig

# the effective number of tokens that the model wavers between (exp of the entropy), and the colour up to there
SHADES = ((2, 40), (5, 148), (20, 220), (100, 208), (math.inf, 196))
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what would steer the terminal


class Screen:
    """Prints texts as they grow, in colours where the terminal has some."""

    def __init__(self, config: "SampleConfig", known: bool):
        self.config, self.known, self.tty = config, known, bool(sys.stdout) and sys.stdout.isatty()
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self.colours = (self.tty and not plain) or "FORCE_COLOR" in os.environ
        self.silent, self.seen = bool(config.jsonl), 0
        if config.show_uncertainty and self.colours:
            names = [f"{limit:.0f}" if limit < math.inf else "more" for limit, _ in SHADES]
            shown = [
                self._styled(name, f"38;5;{c}") for name, (_, c) in zip(names, SHADES, strict=True)
            ]
            marked = (
                f"above {config.sampling.max_epistemic} nats"
                if config.sampling.max_epistemic
                else "a high tenth"
            )
            text = (
                f"[the model wavers between up to {' / '.join(shown)} tokens (exp of the entropy)"
            )
            self._print(
                text + (f"; underlined: epistemic uncertainty, {marked}]" if known else "]"),
                end="\n",
            )

    def begin(self, prompt: Reading) -> None:
        """A text begins; in a conversation its prompt stands there already."""
        self.seen, self.epistemic = 0, []
        if not self.config.interactive:
            self._print(self._styled(prompt.text))

    def show(self, text: Continuation) -> None:
        """Print what is new."""
        for token in text.tokens[self.seen :]:
            styles, mark, coloured = [], "", self.config.show_uncertainty
            if coloured:
                styles.append(
                    f"38;5;{next(colour for limit, colour in SHADES if math.exp(token.total) <= limit)}"
                )
            if (coloured or text.sampling.abstain == "mark") and self._is_high(
                token, text.sampling
            ):
                styles.append("4")
                mark = "" if self.colours else "[?]" * text.sampling.too_uncertain(token)
            self._print(self._styled(token.text, *styles) + mark)
        self.seen = len(text.tokens)

    def end(self, text: Continuation) -> None:
        self._print("", end="\n")
        if text.ended == "abstain":
            self._print(
                f"[abstains: epistemic uncertainty above {text.sampling.max_epistemic} nats]",
                end="\n",
            )
        if self.config.show_uncertainty and text.tokens:
            mean = text.tokens.means()
            epistemic = f", epistemic {mean['epistemic']:.4f} nats" if self.known else ""
            self._print(f"[mean uncertainty: total {mean['total']:.3f} nats{epistemic}]", end="\n")
        if not self.config.interactive:
            self._print("---------------", end="\n")

    def _is_high(self, token: Token, sampling: Sampling) -> bool:
        """Whether a token is underlined: above the limit, or without one in the highest tenth of the text so far."""
        if not token.epistemic:
            return False
        if sampling.max_epistemic:
            return token.epistemic > sampling.max_epistemic
        bisect.insort(self.epistemic, token.epistemic)
        return (
            len(self.epistemic) >= 10
            and token.epistemic >= self.epistemic[-(len(self.epistemic) // 10)]
        )

    def _styled(self, text: str, *codes: str) -> str:
        text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if self.tty else text
        return f"\033[{';'.join(codes)}m{text}\033[0m" if self.colours and codes and text else text

    def _print(self, text: str, end: str = "") -> None:
        if not self.silent:
            print(text, end=end, flush=True)
