"""What is usual for a run: the quantiles of its uncertainties on its own validation text.

Training writes percentiles.json with its last checkpoint, and evaluate.py writes it too.
"""

from pathlib import Path

import numpy as np
import torch

from engine.base.errors import UserError
from engine.base.files import read_json
from engine.data.tokens import TokenFile
from engine.runs.fit import states
from heads import token_scores

PERCENTILES = "percentiles.json"
LEVELS = [*range(100), 99.5, 99.9, 100]  # of the quantiles, in percent
N_TOKENS = 10_000  # of validation text, at the end of training
ROWS = 64  # predictions in memory at a time


class Percentiles(dict[str, list[float]]):
    """nll, total, epistemic -> the values in nats at LEVELS. Point weights have no epistemic ones,
    and a run without percentiles.json has none."""

    def of(self, name: str, value: float) -> float:
        """The percentile of a value in nats, 0 to 100."""
        return np.interp(value, self[name], LEVELS)

    def value(self, name: str, percentile: float) -> float:
        """The value in nats at a percentile."""
        return np.interp(percentile, LEVELS, self[name])


def percentiles_of(columns: dict[str, torch.Tensor]) -> Percentiles:
    """columns: name -> (n,), the values of n tokens."""
    found = Percentiles()
    for name, values in columns.items():
        if values.max() > 0:
            found[name] = np.percentile(values.double().cpu().numpy(), LEVELS).tolist()
    return found


def read_percentiles(folder: Path) -> Percentiles:
    path = folder / PERCENTILES
    quantiles = read_json(path) if path.is_file() else {}
    if any(len(values) != len(LEVELS) for values in quantiles.values()):
        raise UserError(
            f"{path} is damaged; delete it, and evaluate.py --split=val writes it again"
        )
    return Percentiles(quantiles)


@torch.no_grad()
def measure(model, val: TokenFile, cast) -> Percentiles:
    """Those of the model's predictions by its mean weights, on evenly spaced blocks."""
    found = []
    for hidden, targets in states(model, val, N_TOKENS, cast):
        for x, ids in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
            with cast:
                prediction = model.lm_head.predict(x)
            nll = token_scores(prediction.log_probs, ids).nll
            found.append(torch.stack([nll, prediction.total, prediction.epistemic]))
    nll, total, epistemic = torch.cat(found, dim=1)
    return percentiles_of({"nll": nll, "total": total, "epistemic": epistemic})
