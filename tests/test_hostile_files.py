"""Files made to run code when they are read: nothing in them runs."""

import builtins
import io
import os
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, TINY, flags, refused, run, write_words

MARK = "mark.txt"  # the payloads write it in the folder where the script runs


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "system": Call(os.system, f"echo ran > {MARK}"),
    "exec": Call(builtins.exec, f"open({MARK!r}, 'w').write('ran')"),
}


def zipped(payload, is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


# torch's function that reads a whole file without checks
PAYLOADS["torch"] = Call(torch.storage._load_from_bytes, zipped(PAYLOADS["system"]))
FORMATS = {
    "zip": zipped,
    "legacy": lambda payload: zipped(payload, is_zip=False),
    "pickle": pickle.dumps,
}
TRAIN = ["train.py", *flags(**TINY | {"dataset": "words", "out_dir": "new", "max_iters": 2})]
SAMPLE = ["sample.py", "--out_dir=run", "--device=cpu", "--start=the", "--max_new_tokens=2"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good")
    write_words(root / "words")
    run(root / "words", root / "run", max_iters=1)
    return root


@pytest.fixture
def folder(good, tmp_path, monkeypatch) -> Path:
    copy = shutil.copytree(good, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


TRAPS = [
    ("system", "zip", "ckpt_00000001.pt", SAMPLE),
    ("system", "legacy", "ckpt.pt", SAMPLE),
    ("system", "pickle", "ckpt.pt", [*TRAIN, "--init_from=run"]),
    ("exec", "zip", "ckpt_00000001.pt", [*TRAIN, "--init_from=resume", "--out_dir=run"]),
    ("exec", "pickle", "ckpt_00000001.pt", ["evaluate.py", "--out_dir=run", "--device=cpu"]),
    ("torch", "zip", "ckpt_00000001.pt", SAMPLE),
    ("torch", "legacy", "ckpt_00000001.pt", SAMPLE),
]


@pytest.mark.parametrize(("payload", "form", "name", "command"), TRAPS)
def test_no_checkpoint_runs_code(folder, monkeypatch, capsys, payload, form, name, command):
    (folder / "run" / "ckpt_00000001.pt").unlink()
    state = {"model": {}, "model_args": {}, "model_config": {}, "config": PAYLOADS[payload]}
    trap = FORMATS[form](state)
    if form == "pickle":
        pickle.loads(trap)
    else:
        torch.load(io.BytesIO(trap), weights_only=False)
    assert Path(MARK).exists(), "a reader without checks runs the trap"
    Path(MARK).unlink()
    (folder / "run" / name).write_bytes(trap)
    script, *argv = command
    assert f"run/{name}" in refused(script, argv, folder, monkeypatch, capsys)
    assert not Path(MARK).exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("words/meta.pkl", TRAIN),
        ("run/meta.pkl", SAMPLE),
        ("words/meta.json", TRAIN),
        ("words/train.bin", TRAIN),
        ("openai/pytorch_model.bin", [*TRAIN, "--init_from=openai"]),
    ],
)
def test_no_other_file_runs_code(folder, monkeypatch, capsys, name, command):
    path = folder / name
    trap = pickle.dumps({"vocab_size": 3, "itos": PAYLOADS["exec"]})
    if name == "words/train.bin":
        file = io.BytesIO()
        np.save(file, np.array([PAYLOADS["exec"]], dtype=object), allow_pickle=True)
        trap = file.getvalue()
    (folder / "openai").mkdir()
    (folder / "openai" / "config.json").write_text('{"model_type": "gpt2"}')
    if path.suffix == ".pkl":
        path.with_suffix(".json").unlink()
    path.write_bytes(trap)
    script, *argv = command
    refused(script, argv, folder, monkeypatch, capsys)
    assert not Path(MARK).exists()


def test_code_beside_a_transformers_model_is_not_run(folder, monkeypatch, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=27, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    config.auto_map = {"AutoModel": "modeling.Model"}
    other = folder / "other"
    GPT2LMHeadModel(config).save_pretrained(other)
    (other / "modeling.py").write_text(f"open({MARK!r}, 'w').write('ran')")
    (other / "pytorch_model.bin").write_bytes(pickle.dumps(PAYLOADS["exec"]))
    shutil.copy(folder / "run" / "meta.json", other)
    monkeypatch.setattr(sys, "argv", [*SAMPLE, "--init_from=other", "--num_samples=1"])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("the") and not Path(MARK).exists()
