"""Every documented command names a script, config files and options that exist.

Commands are taken from the Markdown pages, the comments that config files begin with, the
docstrings of modules, and the Makefile.
"""

import ast
import functools
import re
import runpy
import shlex

from engine.base.options import load_config
from tests.helpers import ROOT, output_of
from tests.test_config import FIXED

TRACKED = output_of("git", "ls-files").split()
# what a reader adds: a config file, the head of docs/heads.md, the data set of docs/data.md
PLACEHOLDERS = {"mine.py", "config/mine.py", "--likelihood=softcap", "data/enwik8/prepare.py"}
COMMAND = re.compile(r"\b(?:python3?|torchrun|sbatch|\$\(PY\)) ([^\n`|]*)")
# parts of a line that are no arguments: a remark, a comment, [optional], the next command
REMARKS = re.compile(r"(?<=\S) {2,}(?!--)\S.*| #.*|\[.*?\]|[;)].*")


def documentation() -> dict[str, str]:
    """File -> its text that may hold commands."""
    found = {}
    for path in TRACKED:
        text = (ROOT / path).read_text() if path.endswith((".md", ".py", "Makefile")) else ""
        if path.endswith(".py"):
            comments = "\n".join(re.findall(r"^#[ ]?(.*)$", text, re.MULTILINE))
            text = comments + "\n" + (ast.get_docstring(ast.parse(text)) or "")
        is_log = path.startswith("training_logs/") and path.count("/") > 1
        if text and not is_log and not path.startswith("tests/"):
            found[path] = re.sub(r"\\\n\s*", " ", text)
    return found


def split(command: str) -> list[str]:
    command = REMARKS.sub("", command)
    try:
        return shlex.split(command)
    except ValueError:  # an apostrophe of the text that follows
        return command.split()


def arguments(words: list[str]) -> list[str]:
    """Config files and flags of a command, up to the text that follows it."""
    found = []
    before = ""
    for word in words:
        is_value = before.startswith("--") and "=" not in before
        if not (word.startswith("--") or word.endswith(".py") or is_value):
            break
        before = word.rstrip(".,:")
        if before not in PLACEHOLDERS | {"--help"} and "$" not in before:
            found.append(before)
    return found


def test_commands_name_files_and_options_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    for page, text in documentation().items():
        for command in COMMAND.findall(text):
            words = split(command.replace("-m study ", "study/__main__.py "))
            scripts = [word for word in words if word.endswith(".py")]
            if "-c" in words or "-m" in words or not scripts or scripts[0] in PLACEHOLDERS:
                continue
            script = scripts[0]
            assert script in TRACKED, f"{page}: {command}"
            if options := options_of("train.py" if script in FIXED else script):
                argv = arguments(words[words.index(script) + 1 :])
                load_config(options, argv, FIXED.get(script))


@functools.cache
def options_of(script: str) -> type | None:
    """The dataclass of a script's options."""
    source = (ROOT / script).read_text()
    name = re.search(r"load_config\((\w+)|class Options", source)
    return runpy.run_path(script)[name[1] or "Options"] if name else None


def test_documented_targets_are_in_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in documentation().items():
        named = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, re.MULTILINE)
        assert set(named) <= targets, page
