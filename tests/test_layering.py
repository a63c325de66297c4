"""Imports only go down, and heavy packages are imported where they are used."""

import ast
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT, TINY, flags, write_nanogpt

# lowest first; a file imports from its own layer or a lower one
LAYERS = [
    "engine/base/",
    "heads/",
    "model.py",
    "engine/data/",
    "engine/gpt2/",
    "engine/runs/",
    "engine/eval/",
]
LAYERS += ["", "study/"]  # "": the scripts, at the top and in data/, augmentation/ and bench/
FILES = [
    path
    for folder in (*LAYERS, "data/*/", "augmentation/", "bench/")
    for path in ROOT.glob(f"{folder}*.py")
]
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in FILES
}


def layer_of(module: str) -> int:
    name = module.replace(".", "/") + ".py"
    return next(
        (i for i, layer in enumerate(LAYERS) if layer and name.startswith(layer)), LAYERS.index("")
    )


def imports_of(module: str) -> set[str]:
    """The modules of this repository that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


UPWARD = {  # to be mended
    ("heads.weights", "heads"),
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert {
        name
        for name in imports_of(module)
        if layer_of(name) > layer_of(module) and (module, name) not in UPWARD
    } == set()


def test_neither_importing_train_nor_a_step_imports_a_package_that_training_does_not_need(tmp_path):
    heavy = {
        "torch._dynamo",
        "datasets",
        "wandb",
        "matplotlib",
        "transformers",
        "tiktoken",
        "tokenizers",
        "safetensors",
        "pandas",
    }
    assert imported("import sys, train", heavy) == []
    write_nanogpt(tmp_path / "data", {"train": np.arange(1000), "val": np.arange(100)})
    tiny = flags(**TINY | {"max_iters": 1, "dataset": tmp_path / "data"})
    step = (
        f"import sys, train; sys.argv[1:] = {tiny!r}; train.main(out_dir={str(tmp_path / 'out')!r})"
    )
    assert imported(step, heavy - {"torch._dynamo"}) == []


def imported(code: str, packages: set[str]) -> list[str]:
    """Which of the packages have been imported behind the code."""
    code += f"; print(*sorted({packages!r} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()[-1].split()
