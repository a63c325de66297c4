"""Every documented command names a script, config files and options that exist.

Commands are taken from the Markdown pages, the comments that config files begin with, the
docstrings of modules, and the Makefile.
"""

import ast
import functools
import re
import runpy
import shlex
import subprocess

import pytest

from engine.base.options import load_config
from tests.helpers import ROOT
from tests.test_rows import fixed_by

TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
# what a reader adds: a config file, the head of docs/heads.md, the data set of docs/data.md
PLACEHOLDERS = {"mine.py", "config/mine.py", "--likelihood=softcap", "data/enwik8/prepare.py"}
COMMAND = re.compile(r"\b(?:python3?|torchrun|sbatch|\$\(PY\)) ([^\n`|]*)")
OPTIONS = {  # script -> the class of its options, where that is not called Options
    "train.py": "TrainConfig",
    "sample.py": "SampleConfig",
    "evaluate.py": "EvaluateConfig",
    "hellaswag.py": "HellaSwagConfig",
    "export.py": "ExportConfig",
    "study/__main__.py": "StudyConfig",
}


@functools.cache
def documentation() -> dict[str, str]:
    """File -> its text that may hold commands."""
    found = {}
    for path in TRACKED:
        is_log = path.startswith("training_logs/") and path.count("/") > 1
        if not is_log and (path.endswith(".md") or path == "Makefile"):
            found[path] = (ROOT / path).read_text()
        elif path.endswith(".py") and not path.startswith("tests/"):
            source = (ROOT / path).read_text()
            comments = "\n".join(re.findall(r"^#[ ]?(.*)$", source, re.MULTILINE))
            found[path] = comments + "\n" + (ast.get_docstring(ast.parse(source)) or "")
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command that runs a Python file or module."""
    found = []
    for command in COMMAND.findall(re.sub(r"\\\n\s*", " ", text)):
        command = re.sub(r"(?<=\S) {2,}(?!--)\S.*| #.*|\[.*?\]|[;)].*", "", command)
        try:
            words = shlex.split(command)
        except ValueError:  # an apostrophe of the text that follows
            words = command.split()
        starts = [i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"]
        if starts and "-c" not in words[: starts[0]]:
            found.append(words[starts[0] :])
    return found


def arguments(words: list[str]) -> list[str]:
    """Config files and flags of a command, up to the text that follows it."""
    found = []
    for before, word in zip(words, words[1:], strict=False):
        is_value = before.startswith("--") and "=" not in before
        if word.startswith("--") or word.endswith(".py") or is_value:
            found.append(word.rstrip(".,:"))
        else:
            break
    return found


@pytest.mark.parametrize("page", documentation())
def test_commands_name_files_and_options_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, *rest in commands(documentation()[page]):
        if script == "-m":
            module = rest.pop(0).replace(".", "/")
            names = [f"{module}.py", f"{module}/__main__.py"]
            script = next((name for name in names if name in TRACKED), "")
            assert script or "/" not in module and module not in ("study", "tests"), module
            if not script:
                continue  # another package's: pip, pytest, venv
        if script not in PLACEHOLDERS:
            assert script in TRACKED, script
            check_options(script, arguments([script, *rest]))


def check_options(script: str, argv: list[str]) -> None:
    argv = [word for word in argv if word not in PLACEHOLDERS | {"--help"} and "$" not in word]
    if script.startswith("bench/"):
        known = {"quick", "rounds", "cases"} | set(re.findall(r"(\w+)=", read(script)))
        options = [word for word in argv if word.startswith("--")]
        assert {word[2:].partition("=")[0] for word in options} <= known
        return
    is_train = re.fullmatch(r"train\w*\.py", script)
    if options := options_of("train.py" if is_train else script):
        load_config(options, argv, fixed_by(script) if is_train else None)


@functools.cache
def options_of(script: str) -> type | None:
    name = OPTIONS.get(script, "Options")
    if f"class {name}" not in read(script):
        return None
    return runpy.run_path(script, run_name="documented")[name]


def read(path: str) -> str:
    return (ROOT / path).read_text()


def test_documented_targets_are_in_the_makefile():
    targets = set(re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE))
    for page, text in documentation().items():
        named = re.findall(r"(?:^ {4}|`)make ([a-z]+)", text, re.MULTILINE)
        assert set(named) <= targets, page
