"""A damaged file in a data set, a run or a transformers folder ends in one line that names it, with
nothing written; and nothing runs in files made to run code when they are read.
"""

import io
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.base.files import read_json, write_json
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
    write_json(root / "openai" / "config.json", GPT2)
    save_file({"wte.weight": torch.zeros(27, 32)}, root / "openai" / "model.safetensors")
    (root / "words" / "train.top.labels").touch()
    write_json(root / "words" / "train.top.labels.json", LABELS)
    return root


@pytest.fixture
def folder(good, tmp_path, monkeypatch) -> Path:
    copy = shutil.copytree(good, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


TRAIN = ["train.py", *flags(**TINY | {"dataset": "words", "out_dir": "new", "max_iters": 2})]
RESUME = [*TRAIN, "--init_from=resume", "--out_dir=words_run"]
SAMPLE = ["sample.py", "--device=cpu", "--start=the"]
SAMPLE_RUN = [*SAMPLE, "--out_dir=words_run"]
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
    ("words/meta.json", NESTED),
    ("words/meta.json", None),
    ("bpe_run/tokenizer.json", b"{}"),
    ("bpe_run/tokenizer.json", b"\xff"),
    ("words/train.top.labels.json", {"tokens": 0}),
    ("openai/config.json", b"[]"),
    ("openai/config.json", {"model_type": "llama"}),
    ("openai/config.json", {"n_layer": -1}),
    ("openai/config.json", b'{"model_type": "gpt2"}'),
    ("openai/model.safetensors", b"\x10" + NESTED),
    ("openai/model.safetensors", None),
]


@pytest.mark.parametrize("name, change", CASES)
def test_a_damaged_file_is_named_in_one_line(folder, name, change):
    path = folder / name
    if change is None:
        path.unlink()
        path.mkdir()
    elif isinstance(change, dict):
        write_json(path, read_json(path) | change)
    else:
        path.write_bytes(change)
    script, *argv = COMMANDS[name]
    named = "train.top.labels" if "labels" in name else name
    assert named in refused(script, argv, folder)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model": 5}, "ckpt_00000001.pt"),
        ({"model": {}}, "transformer.wte.weight"),
        ({"model_config": {"n_layer": "x"}}, "n_layer"),
        ({"model_config": {"n_embd": 2**18, "n_head": 1}}, "n_embd"),
        ({"optimizer": ...}, "--init_from=words_run"),
    ],
)
def test_a_checkpoint_with_other_contents_is_refused(folder, changes, named):
    path = folder / "words_run" / "ckpt_00000001.pt"
    state = torch.load(path, weights_only=True) | changes
    torch.save({name: part for name, part in state.items() if part is not ...}, path)
    script, *argv = RESUME if "optimizer" in changes else SAMPLE_RUN
    assert named in refused(script, argv, folder)


MARK = "mark.txt"  # the payloads write it in the folder where the script runs


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


SYSTEM = Call(os.system, f"echo ran > {MARK}")


def zipped(payload, is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


# torch's function that reads a whole file without checks
TORCH = Call(torch.storage._load_from_bytes, zipped(SYSTEM))
FORMATS = {
    "zip": zipped,
    "legacy": partial(zipped, is_zip=False),
    "pickle": pickle.dumps,
}

TRAPS = [
    (SYSTEM, "zip", "ckpt_00000001.pt", RESUME),
    (SYSTEM, "legacy", "ckpt.pt", SAMPLE_RUN),
    (SYSTEM, "pickle", "ckpt.pt", [*TRAIN, "--init_from=words_run"]),
    (TORCH, "zip", "ckpt_00000001.pt", ["evaluate.py", "--out_dir=words_run", "--device=cpu"]),
    (TORCH, "legacy", "ckpt_00000001.pt", SAMPLE_RUN),
]


@pytest.mark.parametrize("payload, form, name, command", TRAPS)
def test_no_checkpoint_runs_code(folder, payload, form, name, command):
    (folder / "words_run" / "ckpt_00000001.pt").unlink()
    state = {"model": {}, "model_args": {}, "model_config": {}, "config": payload}
    trap = FORMATS[form](state)
    if form == "pickle":
        pickle.loads(trap)
    else:
        torch.load(io.BytesIO(trap), weights_only=False)
    assert Path(MARK).exists(), "a reader without checks runs the trap"
    Path(MARK).unlink()
    (folder / "words_run" / name).write_bytes(trap)
    script, *argv = command
    assert f"words_run/{name}" in refused(script, argv, folder)
    assert not Path(MARK).exists()


@pytest.mark.parametrize(
    "name, command",
    [
        ("words/meta.pkl", TRAIN),
        ("words_run/meta.pkl", SAMPLE_RUN),
        ("words/train.bin", TRAIN),
        ("openai/pytorch_model.bin", [*TRAIN, "--init_from=openai"]),
    ],
)
def test_no_other_file_runs_code(folder, name, command):
    path = folder / name
    trap = pickle.dumps({"vocab_size": 3, "itos": SYSTEM})
    (folder / "openai" / "model.safetensors").unlink()
    if path.suffix == ".pkl":
        path.with_suffix(".json").unlink()
    path.write_bytes(trap)
    script, *argv = command
    refused(script, argv, folder)
    assert not Path(MARK).exists()
