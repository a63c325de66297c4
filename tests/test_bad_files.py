"""A damaged file in a data set, a run or a transformers folder ends in one line that names it, and
nothing is written.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.data.tokenizer import BPETokenizer
from tests.helpers import TINY, WORDS, flags, refused, run, write_words

GPT2 = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "vocab_size": 27,
    "n_positions": 16,
}
LABELS = {"k": 8, "vocab_size": 27, "windows": 1, "done": 1}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Data by characters and by a BPE, a run on each, and a folder with GPT-2's config and too few
    weights.
    """
    root = tmp_path_factory.mktemp("good")
    write_words(root / "words")
    write_words(root / "bpe", BPETokenizer.train([" ".join(WORDS)], 300))
    for name in ("words", "bpe"):
        run(root / name, root / f"{name}_run", max_iters=1)
    (root / "openai").mkdir()
    (root / "openai" / "config.json").write_text(json.dumps(GPT2))
    save_file({"wte.weight": torch.zeros(27, 32)}, root / "openai" / "model.safetensors")
    (root / "words" / "train.top.labels").touch()
    (root / "words" / "train.top.labels.json").write_text(json.dumps(LABELS))
    return root


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "copy")


TRAIN = ["train.py", *flags(**TINY | {"dataset": "words", "out_dir": "new", "max_iters": 2})]
SAMPLE = ["sample.py", "--device=cpu", "--start=the"]
COMMANDS = {
    "words/meta.json": TRAIN,
    "words/train.top.labels.json": [*TRAIN, "--labels=top"],
    "bpe_run/tokenizer.json": ["evaluate.py", "--device=cpu", "--out_dir=bpe_run"],
    "openai/config.json": [*SAMPLE, "--out_dir=openai"],
    "openai/model.safetensors": [*TRAIN, "--init_from=openai"],
}
NESTED = b"[" * 100_000
# a file and its new contents: fields of a JSON object, or bytes; None: a folder in its place
CASES = [
    ("words/meta.json", {"vocab_size": "65"}),
    ("words/meta.json", b""),
    ("words/meta.json", NESTED),
    ("words/meta.json", None),
    ("bpe_run/tokenizer.json", b"{}"),
    ("bpe_run/tokenizer.json", b"\xff"),
    ("words/train.top.labels.json", {"tokens": 0}),
    ("words/train.top.labels.json", b"\xff"),
    ("openai/config.json", b"[]"),
    ("openai/config.json", {"model_type": "llama"}),
    ("openai/config.json", {"n_layer": -1}),
    ("openai/config.json", b'{"model_type": "gpt2"}'),
    ("openai/model.safetensors", b"\x10" + NESTED),
    ("openai/model.safetensors", None),
]


@pytest.mark.parametrize(("name", "change"), CASES)
def test_a_damaged_file_is_named_in_one_line(folder, monkeypatch, capsys, name, change):
    path = folder / name
    if change is None:
        path.unlink()
        path.mkdir()
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_bytes(change)
    script, *argv = COMMANDS[name]
    named = "train.top.labels" if "labels" in name else name
    assert named in refused(script, argv, folder, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": 5}, "ckpt_00000001.pt"),
        ({"model": {}}, "transformer.wte.weight"),
        ({"model_config": {"n_layer": "x"}}, "n_layer"),
        ({"model_config": {"n_embd": 2**18, "n_head": 1}}, "n_embd"),
        ({"optimizer": ...}, "--init_from=words_run"),
    ],
)
def test_a_checkpoint_with_other_contents_is_refused(folder, monkeypatch, capsys, changes, named):
    path = folder / "words_run" / "ckpt_00000001.pt"
    state = torch.load(path, weights_only=True) | changes
    torch.save({name: part for name, part in state.items() if part is not ...}, path)
    script, *argv = [*TRAIN, "--init_from=resume", "--out_dir=words_run"]
    if "optimizer" not in changes:
        script, *argv = [*SAMPLE, "--out_dir=words_run"]
    assert named in refused(script, argv, folder, monkeypatch, capsys)
