"""engine/data/tokens.py and batches.py: token files, their checks, and the order of batches."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.data.batches
import engine.data.tokens
from engine.base.errors import UserError
from engine.data.batches import Batches
from engine.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from engine.data.tokens import TokenFile, gather
from tests.helpers import ROOT, run, words, write_dataset, write_nanogpt


@pytest.fixture
def numbered(tmp_path) -> TokenFile:
    """A file whose token i is i."""
    return TokenFile(write_nanogpt(tmp_path / "numbered", {"train": np.arange(1000)}), "train")


def epoch(batches: Batches, number: int) -> list[int]:
    """The first token of every block of an epoch (batch_size 1)."""
    return [
        batches[i][0][0, 0].item()
        for i in range(number * batches.n_blocks, (number + 1) * batches.n_blocks)
    ]


@pytest.mark.parametrize("block_size", [1, 7, 16, 333, 499, 500, 998, 999])
def test_an_epoch_visits_every_block_exactly_once_and_no_token_twice(numbered, block_size):
    batches = Batches(numbered, 1, block_size, seed=3)
    for number in range(3):
        starts = sorted(epoch(batches, number))
        assert starts == list(
            range(starts[0], starts[0] + block_size * batches.n_blocks, block_size)
        )
        assert 0 <= starts[0] < block_size and starts[-1] + block_size < len(numbered)
    assert block_size * (batches.n_blocks + 2) > len(numbered) - 1  # nearly all of the file


def test_batches_go_on_over_the_end_of_an_epoch_with_nothing_left_out(numbered):
    one, seven = Batches(numbered, 1, 16, seed=0), Batches(numbered, 7, 16, seed=0)
    rows = [row for i in range(30) for row in seven[i][0].tolist()]
    assert rows == [one[i][0][0].tolist() for i in range(210)] and 3 * one.n_blocks < 210


def test_a_batch_is_a_function_of_seed_and_i_whatever_was_read_before(numbered):
    def batches() -> Batches:
        return Batches(numbered, 4, 16, seed=5)

    forward = batches()
    expected = [forward[i][0].tolist() for i in range(40)]
    backward = batches()
    assert [backward[i][0].tolist() for i in reversed(range(40))] == expected[::-1]
    assert batches()[39][0].tolist() == expected[39]


def test_prefetched_batches_are_those_of_the_order_one_is_read_ahead_and_none_beyond(numbered):
    batches, read = Batches(numbered, 2, 5, seed=1), []
    plain = [batches[i] for i in (3, 0, 3, 7)]
    ahead = batches.prefetched((read.append(i) or i for i in (3, 0, 3, 7)), torch.device("cpu"))
    for n, expected in enumerate(plain):
        assert all(torch.equal(a, b) for a, b in zip(next(ahead), expected, strict=True))
        assert len(read) == min(n + 2, 4)
    assert next(ahead, None) is None
    assert next(batches.prefetched([], torch.device("cpu")), None) is None


def test_what_goes_wrong_in_the_reader_goes_wrong_where_its_batch_is_wanted(numbered, monkeypatch):
    batches = Batches(numbered, 2, 5, seed=1)
    monkeypatch.setattr(
        engine.data.batches, "gather", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone"))
    )
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches.prefetched(range(3), torch.device("cpu")))


def test_seeds_and_epochs_have_orders_of_their_own(numbered):
    orders = [epoch(Batches(numbered, 1, 16, seed), number) for seed in (0, 1) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert len({min(order) for order in orders}) > 1  # the blocks begin elsewhere too


def test_y_is_x_one_token_later(numbered):
    x, y = Batches(numbered, 4, 16, seed=0)[3]
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype
    assert (y == x + 1).all() and x.is_contiguous() and y.is_contiguous()


def test_gather_reads_the_last_block_to_the_end(numbered):
    x, y = gather(numbered, np.array([0, 989]), 10)
    assert (x[1, 0], y[1, -1]) == (989, 999)


# "sea" has the last ids of a vocabulary that two bytes cannot hold
MANY = CharTokenizer([*map(chr, range(0x20000, 0x30000)), *"aes"])


@pytest.mark.parametrize(("tokenizer", "dtype"), [(ByteTokenizer(), "uint16"), (MANY, "uint32")])
def test_ids_take_two_bytes_where_they_fit_and_four_where_not(tmp_path, tokenizer, dtype):
    meta = write_dataset(tmp_path, {"train": ["sea"]}, tokenizer)
    file = TokenFile(tmp_path, "train")
    assert meta["dtype"] == dtype == file.dtype.name
    assert (tmp_path / "train.bin").stat().st_size == 3 * file.dtype.itemsize
    assert file.ids.tolist() == tokenizer.encode("sea").tolist()


def test_meta_json_tells_counts_bytes_and_hashes(tmp_path):
    meta = write_dataset(tmp_path, {"train": ["été", "", "b"], "val": ["c"]}, ByteTokenizer())
    assert json.loads((tmp_path / "meta.json").read_text()) == meta and meta["vocab_size"] == 257
    data = (tmp_path / "train.bin").read_bytes()
    assert np.frombuffer(data, "<u2").tolist() == [
        *"été".encode(),
        256,
        ord("b"),
    ]  # no end-of-text at either end
    sha256 = hashlib.sha256(data).hexdigest()
    assert meta["splits"]["train"] == {"documents": 2, "tokens": 7, "bytes": 6, "sha256": sha256}


def test_an_interrupted_writer_leaves_what_was_there(tmp_path):
    write_dataset(tmp_path, {"train": ["old"], "val": ["old"]}, ByteTokenizer())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def documents():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, {"train": ["new text"], "val": documents()}, ByteTokenizer())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_split_of_an_earlier_preparation_does_not_survive_the_next(tmp_path):
    write_dataset(tmp_path, {"train": ["ab"], "val": ["ab"]}, CharTokenizer("ab"))
    write_dataset(tmp_path, {"train": ["new text"]}, ByteTokenizer())
    with pytest.raises(UserError, match=r"val\.bin is missing"):
        TokenFile(tmp_path, "val")
    (tmp_path / "val.bin").write_bytes(bytes(8))
    with pytest.raises(UserError, match=r"val\.bin is missing"):
        TokenFile(tmp_path, "val")


def test_two_bpes_trained_on_other_text_are_two_tokenizers(tmp_path):
    texts = ["the sea the ship the sea"] * 9, ["captain and harbour and captain"] * 9
    first, second = (BPETokenizer.train(text, 280) for text in texts)
    write_dataset(tmp_path, {"train": ["the sea"]}, first)
    assert load_tokenizer(tmp_path).describe() == first.describe() != second.describe()


def test_several_documents_need_an_end_of_text_token(tmp_path):
    with pytest.raises(UserError, match="end-of-text"):
        write_dataset(tmp_path, {"train": ["ab", "ba"]}, CharTokenizer("ab"))


def test_a_split_without_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="no text for the val split"):
        write_dataset(tmp_path, {"train": ["ab"], "val": [" "]}, ByteTokenizer())
    assert not (tmp_path / "meta.json").exists() and not (tmp_path / "val.bin").exists()


@pytest.mark.parametrize("size", [0, 1, 5])
def test_an_empty_or_odd_file_is_refused_by_name(tmp_path, size):
    (tmp_path / "train.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"train\.bin has {size} bytes.*prepare"):
        TokenFile(tmp_path, "train")


def test_a_truncated_file_is_refused_by_name(tmp_path):
    write_dataset(tmp_path, {"train": ["a long text"]}, ByteTokenizer())
    data = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(data[:-4])
    with pytest.raises(
        UserError, match=r"train\.bin holds 9 tokens, but meta\.json says 11; prepare"
    ):
        TokenFile(tmp_path, "train")


def test_a_broken_meta_json_is_refused_by_name(tmp_path):
    write_dataset(tmp_path, {"train": ["a long text"]}, ByteTokenizer())
    (tmp_path / "meta.json").write_text('{"dtype": "uint')
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
        TokenFile(tmp_path, "train")


def test_an_id_outside_the_vocabulary_is_refused_with_its_position_when_it_is_read(tmp_path):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"train": [0] * 95 + [67] + [0] * 4}), "train")
    file.check(vocab_size=68)
    assert file.ids.max() == 67
    file.check(vocab_size=67)
    file.rows(np.array([0, 96]), 4)
    for read in (lambda: file.rows(np.array([0, 80]), 20), lambda: file[90:], file.counts):
        with pytest.raises(
            UserError, match=r"train\.bin holds token id 67, .* of 67, at position 95"
        ):
            read() if read != file.counts else read(67)


def test_a_split_shorter_than_a_block_and_its_target_is_refused_with_both_sizes(numbered):
    numbered.check(vocab_size=1000, block_size=999)
    with pytest.raises(
        UserError, match=r"train\.bin has 1,000 tokens.*block of 1000.*--block_size=999"
    ):
        numbered.check(vocab_size=1000, block_size=1000)


def test_counts_are_bincounts_and_frequencies_sum_to_one(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.data.tokens, "CHUNK", 100)
    ids = np.random.default_rng(0).integers(0, 60, 999)
    file = TokenFile(write_nanogpt(tmp_path / "d", {"train": ids}), "train")
    counts = np.bincount(ids, minlength=67)
    assert file.counts(67).tolist() == counts.tolist()
    expected = (counts + 0.5) / (999 + 67 / 2)
    assert np.allclose(file.frequencies(67).numpy(), expected, rtol=1e-12)


def test_a_very_large_split_is_counted_in_chunks_from_all_of_it(tmp_path, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 60, 999)
    file = TokenFile(write_nanogpt(tmp_path / "d", {"train": ids}), "train")
    for name, value in {"COUNT_ALL": 500, "N_CHUNKS": 10, "CHUNK": 7}.items():
        monkeypatch.setattr(engine.data.tokens, name, value)
    chunks = ids[(np.arange(10) * 99)[:, None] + np.arange(7)]
    assert file.counts(67).tolist() == np.bincount(chunks.ravel(), minlength=67).tolist()


def test_a_missing_split_names_those_that_are_there_or_the_command_that_makes_them(
    tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="this data set has train"):
        TokenFile(write_nanogpt(tmp_path / "d", {"train": [1, 2]}), "test")
    monkeypatch.setattr(engine.data.tokens, "DATA_ROOT", tmp_path)
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "prepare.py").touch()
    for dataset in ("tales", "nowhere"):
        with pytest.raises(UserError, match=r"is missing; run python data/tales/prepare\.py"):
            TokenFile(dataset, "train")


def nanogpt_chars(folder, text: str):
    """The folder that nanoGPT's data/shakespeare_char/prepare.py leaves for a text."""
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    ids, cut = np.array([stoi[char] for char in text]), int(0.9 * len(text))
    write_nanogpt(folder, {"train": ids[:cut], "val": ids[cut:]})
    meta = {"vocab_size": len(stoi), "itos": {i: char for char, i in stoi.items()}, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_a_nanogpt_folder_with_characters_reads_and_trains_unmodified(tmp_path):
    text = words(2000)
    folder = nanogpt_chars(tmp_path / "d", text)
    file, tokenizer = TokenFile(folder, "val"), load_tokenizer(folder)
    assert file.vocab_size == tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(file.ids) == text[int(0.9 * len(text)) :]
    model = run(folder, tmp_path / "out", max_iters=2)
    assert model.config.vocab_size == len(set(text))
    assert (
        load_tokenizer(tmp_path / "out").describe() == tokenizer.describe()
    )  # the run has its tokenizer with it


def test_a_nanogpt_folder_without_meta_is_gpt2s_bpe_and_says_so(tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, 50257, 500)
    folder = write_nanogpt(tmp_path / "d", {"train": ids, "val": ids[:100]})
    assert TokenFile(folder, "train").vocab_size == 50257
    model = run(folder, tmp_path / "out", max_iters=1, n_embd=4, batch_size=1)
    assert model.config.vocab_size == 50257
    assert "no meta.json: its tokens are taken for GPT-2's" in capsys.readouterr().out


def test_a_meta_pkl_that_would_run_code_is_refused(tmp_path):
    folder = write_nanogpt(tmp_path / "d", {"train": [1, 2, 3]})
    (folder / "meta.pkl").write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    )
    with pytest.raises(UserError, match=r"meta\.pkl.*refused"):
        TokenFile(folder, "train")
    assert not (tmp_path / "ran").exists()


GPT2S = np.random.default_rng(0).zipf(1.2, 4000) % 50257  # some ids often, most of them rarely


def plain(folder, ids, dtype: str = "<u2") -> TokenFile:
    """A data set without a meta file whose ids were written with that dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(ids).astype(dtype).tofile(folder / "train.bin")
    return TokenFile(folder, "train")


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_wider_integers_are_refused(tmp_path, dtype):
    with pytest.raises(UserError, match="int32 or int64 .*uint16"):
        plain(tmp_path, GPT2S, dtype).check(50257)


@pytest.mark.parametrize(
    "ids",
    [
        GPT2S,
        np.zeros(1000),
        np.tile([0, 9], 1000),
        np.where(np.arange(2000) % 2, 0, GPT2S[:2000]) + (np.arange(2000) == 1501),
        np.tile([50, 0], 20),  # too short to know
    ],
)
def test_what_may_be_text_is_never_refused(tmp_path, ids):
    plain(tmp_path, ids).check(50257)


def test_lines_of_one_character_are_text_in_a_small_vocabulary(tmp_path):
    meta = {"tokenizer": {"kind": "none"}, "vocab_size": 65}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    plain(tmp_path, np.tile([5, 0], 1000)).check(65)


def test_a_file_cut_short_while_it_is_used_is_refused_by_name(tmp_path):
    file = plain(tmp_path, GPT2S)
    batches = Batches(file, 8, 16, seed=0)
    batches[0]
    os.truncate(file.path, 1000)
    for read in (lambda: batches[1], lambda: file.ids):
        with pytest.raises(UserError, match=r"train\.bin changed .* start again or resume"):
            read()


def test_a_fingerprint_tells_other_data_and_the_sha256_of_old_checkpoints_matches_too(tmp_path):
    file = plain(tmp_path, GPT2S)
    sha256 = hashlib.sha256(file.path.read_bytes()).hexdigest()
    assert file.sha256 == sha256 and file.matches(sha256) and file.matches(file.fingerprint)
    assert plain(tmp_path / "copy", GPT2S).fingerprint == file.fingerprint
    for other in (GPT2S[:-1], GPT2S[::-1]):
        found = plain(tmp_path / "other", other)
        assert not found.matches(file.fingerprint) and not found.matches(sha256)


MEMORY = """
import sys
import numpy as np
from engine.data.batches import Batches
from engine.data.tokens import TokenFile

def resident() -> float:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

file = TokenFile(sys.argv[1], "train")
batches = Batches(file, 4, 64, seed=0)
batches[0]
before = resident()
for i in range(10_000):
    batches[i]
batches_took = resident() - before
file.counts(50257)
print(batches_took, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_reading_and_counting_a_gigabyte_takes_less_than_64_mb_of_memory(tmp_path):
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(1 << 30)  # sparse
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert max(map(float, result.stdout.split())) < 64
