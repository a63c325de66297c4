"""Imports only go down, and heavy packages are imported where they are used."""

import ast
import sys

import numpy as np

from tests.helpers import ROOT, TINY, flags, output_of, write_nanogpt

# lowest first; a file imports from its own layer or a lower one
LAYERS = [
    ["engine/base/*.py"],
    ["heads/*.py"],
    ["model.py"],
    ["engine/data/*.py"],
    ["engine/gpt2/*.py"],
    ["engine/runs/*.py"],
    ["engine/eval/*.py"],
    ["*.py", "data/*/*.py", "augmentation/*.py", "bench/*.py"],
    ["study/*.py"],
]


def imported_names(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_go_down():
    layer_of, imports = {}, {}
    for layer, patterns in enumerate(LAYERS):
        for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            layer_of.setdefault(name.removesuffix(".__init__"), layer)
            imports[name] = imported_names(path.read_text(encoding="utf-8"))
    for name, imported in imports.items():
        layer = layer_of[name.removesuffix(".__init__")]
        assert {other for other in imported if layer_of.get(other, 0) > layer} == set(), name


def test_training_imports_no_package_that_it_does_not_need(tmp_path):
    heavy = {"datasets", "wandb", "matplotlib", "transformers", "tiktoken", "tokenizers"}
    heavy |= {"safetensors", "pandas"}
    write_nanogpt(tmp_path / "data", {"train": np.arange(1000), "val": np.arange(100)})
    options = TINY | {"max_iters": 1, "dataset": tmp_path / "data", "out_dir": tmp_path / "out"}
    code = f"""
import sys, train
assert "torch._dynamo" not in sys.modules
sys.argv[1:] = {flags(**options)!r}
train.main()
print(*sorted({heavy!r} & sys.modules.keys()))
"""
    assert output_of(sys.executable, "-c", code).splitlines()[-1] == ""
