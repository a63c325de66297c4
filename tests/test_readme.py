"""README's tables hold the numbers of the logs."""

import json

import pytest

from tests.helpers import ROOT

RESULTS = sorted(ROOT.glob("training_logs/*/*/eval_test.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parts[-3]}/{path.parts[-2]}")
def test_a_row_of_the_readme_is_what_the_log_says(path):
    result = json.loads(path.read_text())
    cells = [f"{result['nll']:.3f}", f"{result['perplexity']:.2f}", f"{result['bits_per_byte']:.4f}"]
    cells += [f"{result[name]:.4f}".lstrip("0") for name in ("accuracy", "ece", "brier")]
    rows = [line.split(" | ") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert any(set(cells) <= set(row) for row in rows)
    assert (path.parent / "metrics.jsonl").is_file() and (path.parent / "config.json").is_file()
