"""Who imports whom: an import goes down, and heavy packages are imported where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT, TINY, flags, write_nanogpt

LEVELS = {
    "train": 4,
    "engine.start": 3.5,
    "engine.finetune": 3.25,
    "engine.saver": 3.5,
    "engine.checkpoint": 3,
    "engine.budget": 0,
    "engine.snapshot": 0,
    "engine.pretrained": 2,
    "engine.endings": 2,
    "engine.exporting": 3,
    "engine.card": 2,
    "engine.summary": 2,
    "engine.summary_pictures": 1.75,
    "engine.study_logs": 1.5,
    "engine.report": 2,
    "engine.ensemble": 3.25,
    "engine.run": 3.5,
    "engine.screen": 3.75,
    "engine.reading": 1.5,
    "engine.examine": 3.5,
    "engine.pictures": 1,
    "model": 1,
    "engine.evaluation": 1,
    "engine.metrics": 0.5,
    "engine.texts": 0.5,
    "engine.table": 1,
    "engine.diversity": 1,
    "heads": 0,
    "engine.config": 0,
    "engine.distributed": 0,
    "engine.tokens": 0,
    "engine.labels": 0,
    "engine.tokenizer": -1,
    "engine.optim": 0,
    "engine.logger": 0,
    "engine.corpus": 2,
    "engine.writer": 1,
    "engine.encoding": 0,
    "engine.splits": 0,
    "engine.sources": -1,
    "engine.formats": -2,
    "likelihoods": -1,
    "weights": -2,
    "engine.gpt2_bpe": -2,
    "engine.generation": 0,
    "engine.linear_loss": -3,
    "engine.draws": -3,
    "engine.sharding": -1,
    "engine.watch": -1,
    "engine.files": -2.5,
    "engine.studies": -3,
    "engine.contents": -1,
    "engine.order": -1,
    "engine.row": -1,
    "engine.shards": -1.5,
    "engine.scan": -2,
    "engine.errors": -3,
}
SCRIPT = 5  # every other file at the top, and those of the folders below
SCRIPTS = ("data/*/*.py", "augmentation/*.py", "bench/*.py")
NEIGHBOURS = {  # the imports within level 0; none of them closes a circle
    ("engine.labels", "engine.tokens"),
    ("engine.logger", "engine.distributed"),
}
OURS = {path.stem for path in ROOT.glob("*.py")}
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *(p for pattern in SCRIPTS for p in ROOT.glob(pattern))])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def level_of(module: str) -> int:
    if module.startswith("engine."):
        assert module in LEVELS, f"give {module} a level in tests/test_layering.py and in the table of the design"
    return LEVELS.get(module, SCRIPT)


def imports_of(path: Path) -> set[str]:
    """Our modules that a file imports, wherever in it (but for the names of types, which nothing runs)."""
    found, tree = set(), ast.parse(path.read_text())
    typing_only = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    ignored = {id(inner) for node in typing_only for inner in ast.walk(node)}
    for node in (node for node in ast.walk(tree) if id(node) not in ignored):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"engine.{alias.name}" for alias in node.names] if node.module == "engine" else [node.module]
            found |= set(names)
    return {name for name in found if name in OURS or name.startswith("engine.")}


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "__init__"], ids=module_of)
def test_imports_go_down(path):
    module = module_of(path)
    upward = {
        name for name in imports_of(path) if level_of(name) >= level_of(module) and (module, name) not in NEIGHBOURS
    }
    assert upward == set()


def test_the_table_names_what_exists():
    found = {module_of(path) for path in FILES}
    assert set(LEVELS) - found <= {"engine.linear_loss"}
    assert {"train", "sample", "evaluate", "data.text.prepare"} <= found


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
    step = f"import sys, train; sys.argv[1:] = {tiny!r}; train.main(out_dir={str(tmp_path / 'out')!r})"
    assert imported(step, heavy - {"torch._dynamo"}) == []


def imported(code: str, packages: set[str]) -> list[str]:
    """Which of the packages have been imported behind the code."""
    code += f"; print(*sorted({packages!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1].split()
