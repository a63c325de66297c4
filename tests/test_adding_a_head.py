"""A head that a user adds as docs/heads.md says is right in every mode, or the mode is refused."""

import re
import shutil
import sys
import textwrap

from tests.helpers import ROOT, output_of

MAX_LINES = 40  # that a head may cost
FOLDERS = ("heads", "engine", "tests", "study", "bench", "config")


def docs_block(first_line: str) -> str:
    """The indented block of docs/heads.md that starts with this line."""
    text = (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
    start = text.index(f"    {first_line}")
    block = re.match(r"(?:    .*\n|\n(?=    ))+", text[start:]).group()
    return textwrap.dedent(block)


def replace_once(path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_soft_capped_softmax_of_the_docs_is_right_in_every_mode_or_refused(tmp_path):
    """Makes the docs' edits in a copy of the repository and runs tests/softcap.py there."""
    likelihood = docs_block("class SoftCapped")
    option = docs_block("logit_cap: ")
    n_edited_lines = 2  # the entry and the choice
    assert len((likelihood + option).splitlines()) + n_edited_lines <= MAX_LINES
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    file = tmp_path / "heads" / "likelihoods.py"
    entries = "LIKELIHOODS = {"
    replace_once(file, entries, f'{likelihood}\n\n{entries}"softcap": SoftCapped, ')
    file = tmp_path / "heads" / "config.py"
    choices = 'likelihood: Literal["categorical", '
    replace_once(file, choices, f'{choices}"softcap", ')
    next_option = "    # sigmoid: weight of (sum_v"
    replace_once(file, next_option, textwrap.indent(option, "    ") + next_option)

    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    output_of(*command, "tests/softcap.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
