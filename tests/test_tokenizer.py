"""Tokenizers: text and ids and back, kept in data sets and runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, models

from engine.base.errors import UserError
from engine.data.corpus import tokenizer_in
from engine.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    byte_level,
    incremental_decoder,
    load_tokenizer,
)
from engine.gpt2.exporting import transformers_tokenizer
from tests.helpers import flags, refusal, run, run_script, words, write_nanogpt, write_words

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
    if kind == "bpe":
        return BPETokenizer.train([TEXT], 300)
    if kind == "char":
        return CharTokenizer(sorted(set(TEXT)), eot=True)
    return ByteTokenizer()


def test_a_bpe_learns_from_words_of_bounded_length():
    tokenizer = BPETokenizer.train([words(300), "ACGT" * 100_000], 300)  # minutes if uncut
    assert tokenizer.encode("ACGT" * 5000).size < 100
    assert tokenizer.decode(tokenizer.encode("a ship of ACGT" * 500)) == "a ship of ACGT" * 500


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char", "byte"])
def test_decoding_gives_the_text_back_whole_or_token_by_token(kind):
    tokenizer = make(kind)
    for text in [TEXT[:200]] if kind == "char" else STRANGE:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(map(incremental_decoder(tokenizer), ids)) == text


def test_a_character_of_several_tokens_is_returned_with_the_last_of_them():
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("aé€"), tokenizer.eot, 98]
    found = list(map(incremental_decoder(tokenizer), ids))
    assert found == ["a", "", "é", "", "", "€", "<|endoftext|>", "b"]


def take_tiktoken_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tiktoken knows no encoding and may not fetch one."""

    def fetch(path):
        pytest.fail(f"tiktoken fetches {path}")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no_cache"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", fetch)


@pytest.fixture
def gpt2(tmp_path_factory):
    """GPT-2's BPE, and a folder that keeps it."""
    tokenizer, folder = make("gpt2"), tmp_path_factory.mktemp("gpt2")
    tokenizer.save(folder)
    return tokenizer, folder


def test_gpt2s_bpe_from_a_folder_gives_tiktokens_ids(gpt2, tmp_path, monkeypatch):
    expected, folder = gpt2
    take_tiktoken_away(monkeypatch, tmp_path)
    found = GPT2Tokenizer.load(folder)
    everything = "".join(chr(i) for i in range(0, 0x11000, 7) if not 0xD800 <= i < 0xE000)
    for text in (*STRANGE, TEXT, everything):
        ids = found.encode(text)
        assert np.array_equal(ids, expected.encode(text)) and found.decode(ids) == text
    assert found.token_bytes() == expected.token_bytes()
    assert (found.vocab_size, found.eot) == (50257, 50256)
    assert found.describe() == {"kind": "gpt2"}  # which older folders hold


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_a_tokenizer_that_transformers_saved_gives_the_same_ids(kind, tmp_path):
    import transformers

    ours = make(kind)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=transformers_tokenizer(ours), eos_token="<|endoftext|>"
    )
    theirs(["a b c", "d"], truncation=True, max_length=2)  # which it saves too
    theirs.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    assert isinstance(found, BPETokenizer)
    assert (found.vocab_size, found.eot) == (ours.vocab_size, ours.eot)
    assert found.token_bytes() == ours.token_bytes()
    for text in (TEXT, *STRANGE):
        ids = found.encode(text)
        assert np.array_equal(ids, ours.encode(text)) and found.decode(ids) == text


def test_a_tokenizer_of_the_tokenizers_library_is_used_unless_it_lacks_bytes(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<pad>", "<|endoftext|>"])
    theirs.save(path)
    ours = tokenizer_in(str(tmp_path))
    assert ours.eot == 1
    for text in [TEXT, *STRANGE[:-2]]:
        assert ours.encode(text).tolist() == theirs.encode(text).ids
    others = [
        CharTokenizer("abc"),  # its letters stand for bytes too
        BPETokenizer(byte_level(models.BPE({"a": 0}, []))),
    ]
    for other in others:
        transformers_tokenizer(other).save(path)
        assert "tokenizer.json" in refusal(load_tokenizer, tmp_path)


@pytest.mark.parametrize("damage", ["letter", "numbers", "nested"])
def test_a_damaged_gpt2_json_is_refused_in_one_line(gpt2, tmp_path, damage):
    good = (gpt2[1] / "gpt2.json").read_bytes()
    damaged = {
        "letter": good.replace(b"the", b"teh", 1),
        "numbers": b"[1, 2]",
        "nested": b"[" * 100_000,
    }
    (tmp_path / "gpt2.json").write_bytes(damaged[damage])
    assert "gpt2.json" in refusal(load_tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_a_run_folder_alone_is_enough_to_sample(kind, tmp_path, monkeypatch, capsys):
    """The data set is gone, the run has moved, tiktoken has nothing."""
    write_words(tmp_path / "data", make(kind))
    take_tiktoken_away(monkeypatch, tmp_path)
    run(tmp_path / "data", tmp_path / "run", max_iters=1, n_embd=8)
    assert (tmp_path / "run" / "gpt2.json").exists() == (kind == "gpt2")
    shutil.rmtree(tmp_path / "data")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    options = {"out_dir": tmp_path / "moved", "device": "cpu", "start": "the sea"}
    options |= {"num_samples": 1, "max_new_tokens": 3}
    run_script("sample.py", *flags(**options))
    assert "the sea" in capsys.readouterr().out


def test_data_without_a_tokenizer_trains_with_gpt2s_vocabulary_and_without_tiktoken(
    tmp_path, monkeypatch, capsys
):
    take_tiktoken_away(monkeypatch, tmp_path)
    ids = np.random.default_rng(0).integers(0, 50257, 500)
    data = write_nanogpt(tmp_path / "data", {"train": ids, "val": ids})
    model = run(data, tmp_path / "run", max_iters=1, n_embd=4, batch_size=1)
    assert model.config.vocab_size == 50257
    assert "GPT-2's" in capsys.readouterr().out
