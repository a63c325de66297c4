"""Files made to run code when they are read: whoever reads them, nothing in them runs."""

import builtins
import io
import json
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

MARK = "mark.txt"  # what the payloads write, where the script runs
COMMAND = f"echo ran > {MARK}"


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def inner() -> bytes:
    """A whole file of torch's, for the function of torch that reads one without looking."""
    file = io.BytesIO()
    torch.save({"a": Call(os.system, COMMAND)}, file)
    return file.getvalue()


PAYLOADS = {
    "os.system": lambda: Call(os.system, COMMAND),
    "exec": lambda: Call(builtins.exec, f"open({MARK!r}, 'w').write('ran')"),
    "torch": lambda: Call(torch.storage._load_from_bytes, inner()),
}


def zipped(payload) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


def legacy(payload) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


FORMATS = {"zip": zipped, "legacy": legacy, "pickle": pickle.dumps}
TRAIN = ["train.py", *flags(**TINY | {"dataset": "words", "out_dir": "new", "max_iters": 2})]
SAMPLE = ["sample.py", "--out_dir=run", "--device=cpu", "--start=the", "--max_new_tokens=2"]
READERS = {
    "sample": SAMPLE,
    "resume": [*TRAIN, "--init_from=resume", "--out_dir=run"],
    "init_from": [*TRAIN, "--init_from=run"],
    "evaluate": ["evaluate.py", "--out_dir=run", "--device=cpu", "--dataset=words"],
}


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


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("form", FORMATS)
def test_the_traps_work_on_whoever_trusts_them(tmp_path, monkeypatch, payload, form):
    monkeypatch.chdir(tmp_path)
    data = FORMATS[form]({"model": {}, "config": PAYLOADS[payload]()})
    if form == "pickle":
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert Path(MARK).exists()


TRAPS = [(payload, form, "sample") for payload in PAYLOADS for form in FORMATS]
TRAPS += [("exec", "zip", reader) for reader in READERS if reader != "sample"]


@pytest.mark.parametrize(("payload", "form", "reader"), TRAPS)
@pytest.mark.parametrize("name", ["ckpt_00000001.pt", "ckpt.pt"])
def test_no_checkpoint_runs_code(folder, monkeypatch, capsys, name, form, payload, reader):
    for path in (folder / "run").glob("ckpt*.pt"):
        path.unlink()
    state = {"model": {}, "model_args": {}, "model_config": {}, "config": PAYLOADS[payload]()}
    (folder / "run" / name).write_bytes(FORMATS[form](state))
    script, *argv = READERS[reader]
    message = refused(script, argv, folder, monkeypatch, capsys)
    assert f"run/{name} is not a good checkpoint" in message
    assert not Path(MARK).exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("words/meta.pkl", TRAIN),
        ("run/meta.pkl", SAMPLE),
        ("words/meta.json", TRAIN),
        ("run/meta.json", SAMPLE),
        ("words/train.bin", TRAIN),
        ("words/train.top.labels.json", [*TRAIN, "--labels=top"]),
        ("openai/config.json", [*TRAIN, "--init_from=openai"]),
        ("openai/model.safetensors", [*TRAIN, "--init_from=openai"]),
        ("openai/pytorch_model.bin", [*TRAIN, "--init_from=openai"]),
        ("run/tokenizer.json", SAMPLE),
        ("run/gpt2.json", SAMPLE),
    ],
)
def test_no_other_file_runs_code(folder, monkeypatch, capsys, name, command):
    path = folder / name
    if path.parent.name == "openai":
        path.parent.mkdir()
        if path.suffix != ".bin":
            (path.parent / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
            (path.parent / "model.safetensors").write_bytes(b"")
    if path.name == "meta.pkl":
        path.with_suffix(".json").unlink()
    if kind := {"tokenizer.json": "bpe", "gpt2.json": "gpt2"}.get(path.name):
        (folder / "run" / "meta.json").write_text(
            json.dumps({"vocab_size": 27, "tokenizer": {"kind": kind}})
        )
    trap = PAYLOADS["exec"]()
    if path.suffix == ".bin":
        np.save(folder / "array.npy", np.array([trap], dtype=object), allow_pickle=True)
        shutil.move(folder / "array.npy", path)
    else:
        path.write_bytes(pickle.dumps({"vocab_size": 3, "itos": trap}))
    script, *argv = command
    refused(script, argv, folder, monkeypatch, capsys)
    assert not Path(MARK).exists()


def test_code_beside_a_transformers_model_is_not_looked_at(folder, monkeypatch, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=27, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "other")
    about = json.loads((folder / "other" / "config.json").read_text())
    code = f"open({MARK!r}, 'w').write('ran')"
    (folder / "other" / "config.json").write_text(
        json.dumps(about | {"auto_map": {"AutoModel": "modeling.Model"}})
    )
    (folder / "other" / "modeling.py").write_text(code)
    (folder / "other" / "pytorch_model.bin").write_bytes(pickle.dumps(PAYLOADS["exec"]()))
    shutil.copy(folder / "run" / "meta.json", folder / "other")
    monkeypatch.setattr(
        sys, "argv", ["sample.py", *SAMPLE[1:], "--init_from=other", "--num_samples=1"]
    )
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("the") and not Path(MARK).exists()
