"""engine/data/tokens.py and batches.py: token files, their checks, and the order of batches."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch

import engine.data.batches
import engine.data.tokens
from engine.data.batches import Batches
from engine.data.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer
from engine.data.tokens import TokenFile, gather
from tests.helpers import refusal, run, words, write_dataset, write_nanogpt

CPU = torch.device("cpu")


def plain(folder, ids, dtype: str = "<u2") -> TokenFile:
    """A data set without a meta file whose ids were written with that dtype."""
    np.asarray(ids).astype(dtype).tofile(folder / "train.bin")
    return TokenFile(folder, "train")


@pytest.fixture
def numbered(tmp_path) -> TokenFile:
    """A file whose token i is i."""
    return plain(tmp_path, np.arange(1000))


def test_y_is_x_one_token_later(numbered):
    batches = Batches(numbered, 4, 16, seed=0)
    x, y = batches[3]
    assert x.tolist() == (batches.starts(3)[:, None] + np.arange(16)).tolist()
    assert torch.equal(y, x + 1)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    x, y = gather(numbered, np.array([989]), 10)
    assert x[0, 0] == 989
    assert y[0, -1] == 999  # the end of the file


def test_prefetching_reads_one_batch_ahead_and_none_that_is_not_wanted(numbered):
    batches = Batches(numbered, 2, 5, seed=1)
    read = []

    def numbers():
        for i in (3, 0, 7):
            read.append(i)
            yield i

    prefetched = batches.prefetched(numbers(), CPU)
    for i, n_read in ((3, 2), (0, 3), (7, 3)):
        x, y = next(prefetched)
        assert len(read) == n_read
        expected_x, expected_y = batches[i]
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    assert next(prefetched, None) is None


def test_an_error_in_the_prefetching_thread_is_raised_for_its_batch(numbered, monkeypatch):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(engine.data.batches, "gather", fail)
    batches = Batches(numbered, 2, 5, seed=1)
    prefetched = batches.prefetched(range(3), CPU)
    with pytest.raises(OSError, match="the disk is gone"):
        next(prefetched)


# "sea" has the last ids of a vocabulary that two bytes cannot hold
RARE = map(chr, range(0x20000, 0x30000))
MANY = CharTokenizer([*RARE, *"aes"])


@pytest.mark.parametrize(
    "tokenizer, n_bytes",
    [
        (ByteTokenizer(), 2),
        (MANY, 4),
    ],
)
def test_ids_take_two_bytes_if_they_fit_and_else_four(tmp_path, tokenizer, n_bytes):
    write_dataset(tmp_path, {"train": ["sea"]}, tokenizer)
    assert (tmp_path / "train.bin").stat().st_size == 3 * n_bytes
    ids = TokenFile(tmp_path, "train")[:]
    assert ids.tolist() == tokenizer.encode("sea").tolist()


def test_meta_json_holds_counts_and_hashes(tmp_path):
    documents = {"train": ["été", "", "b"], "val": ["c"]}
    meta = write_dataset(tmp_path, documents, ByteTokenizer())
    data = (tmp_path / "train.bin").read_bytes()
    # end-of-text between documents, not at either end
    expected = [*"été".encode(), 256, ord("b")]
    assert np.frombuffer(data, "<u2").tolist() == expected
    assert meta["vocab_size"] == 257
    shard = {"file": "train.bin", "tokens": 7, "sha256": hashlib.sha256(data).hexdigest()}
    assert meta["splits"]["train"] == {"documents": 2, "tokens": 7, "shards": [shard]}


@pytest.mark.parametrize("size", [0, 5, 18])
def test_a_file_with_another_size_than_its_ids_is_refused_by_name(tmp_path, size):
    write_dataset(tmp_path, {"train": ["a long text"]}, ByteTokenizer())
    os.truncate(tmp_path / "train.bin", size)
    message = refusal(TokenFile, tmp_path, "train")
    assert "train.bin" in message and "prepare" in message


def test_an_id_outside_the_vocabulary_is_refused_with_its_position(tmp_path):
    file = plain(tmp_path, [0] * 95 + [67] + [0] * 4)
    file.check(vocab_size=68)
    assert file[:].max() == 67
    file.check(vocab_size=67)
    file.rows(np.array([0, 96]), 4)  # all but the bad one can be read
    for read in (
        lambda: file.rows(np.array([0, 80]), 20),
        lambda: file[90:],
        lambda: file.counts(67),
    ):
        message = refusal(read)
        assert "train.bin" in message and "67, at position 95" in message


def test_counts_are_bincounts_and_frequencies_add_half_an_occurrence(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.data.tokens, "CHUNK", 100)
    ids = np.random.default_rng(0).integers(0, 60, 999)
    file = plain(tmp_path, ids)
    counts = np.bincount(ids, minlength=67)
    assert file.counts(67).tolist() == counts.tolist()
    expected = (counts + 0.5) / (999 + 67 / 2)
    assert np.allclose(file.frequencies(67), expected, rtol=1e-12)


def test_a_missing_split_is_refused_with_the_others_or_the_command_to_make_it(numbered, tmp_path):
    assert "train" in refusal(TokenFile, tmp_path, "test")
    message = refusal(TokenFile, "wikitext_of_mine", "train")
    for advice in (
        f"{os.getcwd()}/wikitext_of_mine",
        "python data/wikitext/prepare.py",
        "--dataset",
    ):
        assert advice in message


def test_a_nanogpt_folder_with_characters_trains_unmodified(tmp_path):
    text = words(2000)
    itos = dict(enumerate(sorted(set(text))))
    stoi = {char: i for i, char in itos.items()}
    ids = np.array([stoi[char] for char in text])
    folder = write_nanogpt(tmp_path / "d", {"train": ids, "val": ids})
    meta = {"vocab_size": len(stoi), "itos": itos, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    model = run(folder, tmp_path / "out", max_iters=2)
    assert model.config.vocab_size == len(stoi)
    # the run keeps its tokenizer
    assert load_tokenizer(tmp_path / "out").decode(ids) == text


GPT2S = np.random.default_rng(0).zipf(1.2, 4000) % 50257  # some ids often, most of them rarely


@pytest.mark.parametrize(
    "ids",
    [
        GPT2S,
        np.zeros(1000),
        np.append(np.tile([50, 0], 1000), [50, 9]),
        np.tile([50, 0], 20),  # too short to know
    ],
)
def test_ids_that_may_be_text_are_not_taken_for_wider_integers(tmp_path, ids):
    plain(tmp_path, ids).check(50257)


def test_a_file_cut_short_while_it_is_used_is_refused_by_name(numbered):
    batches = Batches(numbered, 8, 16, seed=0)
    batches[0]
    os.truncate(numbered.path, 1000)
    for read in (lambda: batches[1], lambda: numbered[:]):
        assert "train.bin" in refusal(read)
