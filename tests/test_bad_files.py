"""A damaged file in a data set, a run or a transformers folder ends in one line that names it, and
nothing written.
"""

import json
import re
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


TRAIN = ["train.py", *flags(**TINY | {"dataset": "words", "out_dir": "new", "max_iters": 2})]
SAMPLE = ["sample.py", "--device=cpu", "--start=the"]
COMMANDS = {
    "data": TRAIN,
    "labels": [*TRAIN, "--labels=top"],
    "run": [*SAMPLE, "--out_dir=words_run"],
    "bpe": [*SAMPLE, "--out_dir=bpe_run"],
    "evaluate": ["evaluate.py", "--device=cpu", "--out_dir=bpe_run"],
    "openai": [*SAMPLE, "--out_dir=openai"],
    "from openai": [*TRAIN, "--init_from=openai"],
    "from run": [*TRAIN, "--init_from=words_run"],
    "resume": [*TRAIN, "--init_from=resume", "--out_dir=words_run"],
}
META, RUN_META, TOKENIZER = "words/meta.json", "words_run/meta.json", "bpe_run/tokenizer.json"
CONFIG, WEIGHTS, ABOUT = (
    "openai/config.json",
    "openai/model.safetensors",
    "words/train.top.labels.json",
)
OTHER_BPE = {"model": {"type": "BPE", "vocab": {"\u65e5": 0}, "merges": []}}
NESTED = b"[" * 100_000
NO_META = "does not describe a data set"

# file, its new contents (fields of a JSON object, or bytes; None: a folder in its place), who reads
# it, the message
CASES = [
    (META, {"vocab_size": "65"}, "data", NO_META),
    (META, {"tokenizer": "char"}, "data", NO_META),
    (META, b"", "data", "meta.json is damaged"),
    (META, NESTED, "data", "meta.json is damaged"),
    (META, {"vocab_size": 1 << 31}, "data", "out of memory|of 2147483648"),
    (META, None, "data", "Is a directory: 'words/meta.json'"),
    (RUN_META, {"tokenizer": {"kind": "none"}}, "run", "names an unknown tokenizer 'none'"),
    (TOKENIZER, b"{}", "bpe", "is no byte-level BPE"),
    (TOKENIZER, b"\xff", "bpe", "is no byte-level BPE"),
    (TOKENIZER, OTHER_BPE, "evaluate", "is no byte-level BPE"),
    (TOKENIZER, None, "bpe", "tokenizer.json is no byte-level BPE"),
    (ABOUT, {"tokens": 0}, "labels", "made for other data"),
    (ABOUT, b"\xff", "labels", "labels.json is damaged"),
    (CONFIG, b"[]", "openai", CONFIG),
    (CONFIG, NESTED, "openai", CONFIG),
    (CONFIG, {"model_type": "llama"}, "openai", "has model_type = 'llama'"),
    (CONFIG, {"n_layer": -1}, "openai", "does not describe a GPT-2"),
    (CONFIG, b'{"model_type": "gpt2"}', "from openai", "n_layer"),
    (WEIGHTS, b"", "openai", "model.safetensors is damaged"),
    (WEIGHTS, b"\x10" + NESTED, "openai", "model.safetensors is damaged"),
    (WEIGHTS, None, "from openai", "model.safetensors is missing"),
]
CHECKPOINTS = [
    ({"model": 5}, "run", "is not a good checkpoint: it holds no model"),
    (
        {"model": {}},
        "run",
        "the checkpoint does not describe a GPT-2: it has no transformer.wte.weight",
    ),
    ({"model_config": {"n_layer": "x"}}, "run", "n_layer wants int"),
    (
        {"model_config": {"n_embd": 2**18, "n_head": 1}},
        "run",
        "n_embd = 262144 must",
    ),
    ({"optimizer": ...}, "resume", "holds weights without the state of their training"),
    (
        {"model_config": ..., "model_args": {}},
        "run",
        "the checkpoint does not describe a GPT-2: it has no ",
    ),
]


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "change", "reader", "message"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_damaged_file_is_named_in_one_line(
    folder, monkeypatch, capsys, name, change, reader, message
):
    path = folder / name
    if change is None:
        path.unlink()
        path.mkdir()
    else:
        if isinstance(change, dict):
            change = json.dumps(json.loads(path.read_text()) | change).encode()
        path.write_bytes(change)
    script, *argv = COMMANDS[reader]
    assert re.search(message, refused(script, argv, folder, monkeypatch, capsys))


@pytest.mark.parametrize(("changes", "reader", "message"), CHECKPOINTS)
def test_a_checkpoint_with_other_contents_is_refused_in_one_line(
    folder, monkeypatch, capsys, changes, reader, message
):
    (path,) = (folder / "words_run").glob("ckpt_*.pt")
    state = torch.load(path, weights_only=True) | changes
    torch.save({name: part for name, part in state.items() if part is not ...}, path)
    script, *argv = COMMANDS[reader]
    assert re.search(message, refused(script, argv, folder, monkeypatch, capsys))
