"""Imports only go down, and heavy packages are imported where they are used."""

import ast
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT, TINY, flags, write_nanogpt

# lowest first; a file imports from its own layer or a lower one
LAYERS = [
    ["engine/base"],
    ["heads"],
    ["model.py"],
    ["engine/data"],
    ["engine/gpt2"],
    ["engine/runs"],
    ["engine/eval"],
    ["*.py", "data/*", "augmentation", "bench"],
    ["study"],
]
LAYER_OF = {}  # module name -> layer; the first that has a file counts
for number, patterns in enumerate(LAYERS):
    for pattern in patterns:
        for path in ROOT.glob(pattern if pattern.endswith(".py") else f"{pattern}/*.py"):
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            LAYER_OF.setdefault(name.removesuffix(".__init__"), (number, path))


@pytest.mark.parametrize("module", LAYER_OF)
def test_imports_go_down(module):
    layer, path = LAYER_OF[module]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    higher = {name for name in imported & LAYER_OF.keys() if LAYER_OF[name][0] > layer}
    assert higher == set()


def test_neither_importing_train_nor_a_step_imports_a_package_that_training_does_not_need(tmp_path):
    heavy = {"datasets", "wandb", "matplotlib", "transformers", "tiktoken", "tokenizers"}
    heavy |= {"safetensors", "pandas"}
    assert imported("import sys, train", heavy | {"torch._dynamo"}) == []
    write_nanogpt(tmp_path / "data", {"train": np.arange(1000), "val": np.arange(100)})
    options = TINY | {"max_iters": 1, "dataset": tmp_path / "data", "out_dir": tmp_path / "out"}
    code = f"import sys, train; sys.argv[1:] = {flags(**options)!r}; train.main()"
    assert imported(code, heavy) == []


def imported(code: str, packages: set[str]) -> list[str]:
    """Which of the packages have been imported after the code."""
    code += f"; print(*sorted({packages!r} & sys.modules.keys()))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1].split()
