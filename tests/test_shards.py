"""engine/data/shards.py: splits in many files, and their checks."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.batches import Batches, BlockOrder
from engine.data.tokenizer import ByteTokenizer
from engine.data.tokens import TokenFile
from tests.helpers import output_of, refusal, run, words, write_dataset, write_nanogpt


def sharded(folder: Path, **splits: list[np.ndarray]) -> Path:
    """Shards without a meta file, numbered from 0."""
    names = {}
    for split, shards in splits.items():
        names |= {f"{split}_{i:06d}": ids for i, ids in enumerate(shards)}
    return write_nanogpt(folder, names)


def described(folder: Path) -> Path:
    """Shards of 700 bytes as our writer leaves them, with a meta.json."""
    texts = {"train": [words(900)], "val": [words(50)]}
    write_dataset(folder, texts, ByteTokenizer(), shard_tokens=700)
    return folder


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


TEXT = np.array(list(words(900).encode()))
# one shard is too short for a block of 16, one has a single token
SHARDS = np.split(TEXT, [700, 790, 791, 2291, 2307])
LENGTHS = [len(shard) for shard in SHARDS]


def test_files_are_read_in_the_order_of_their_numbers(tmp_path):
    shards = {f"fineweb_train_{number}": [number, 7] for number in (10, 9, 100)}
    file = TokenFile(write_nanogpt(tmp_path / "d", shards), "train")
    assert file[:].tolist() == [9, 7, 10, 7, 100, 7]
    assert file.rows(np.array([0, 3]), 3).tolist() == [[9, 7, 10], [7, 100, 7]]


def test_rows_and_slices_continue_in_the_next_shard(tmp_path):
    file = TokenFile(sharded(tmp_path / "d", train=SHARDS), "train")
    assert len(file) == len(TEXT)
    assert file[:].tolist() == TEXT.tolist()
    for length in (1, 17, 93, 1000):
        starts = np.arange(0, len(TEXT) - length, 29)
        expected = TEXT[starts[:, None] + np.arange(length)]
        assert (file.rows(starts, length) == expected).all()
    assert file[690:800].tolist() == TEXT[690:800].tolist()
    assert file[7:7].size == 0


@pytest.mark.parametrize("other", ["train", "other_train_000001", "train_000001"])
def test_two_sets_of_files_for_one_split_are_refused_by_name(tmp_path, other):
    names = ("fineweb_train_000001", "fineweb_val_000000", other)
    folder = write_nanogpt(tmp_path / "d", dict.fromkeys(names, TEXT))
    assert f"{other}.bin" in refusal(TokenFile, folder, "train")
    assert len(TokenFile(folder, "val")) == len(TEXT)


def test_a_shard_that_is_missing_or_has_another_size_is_named(tmp_path):
    folder = described(tmp_path / "d")
    path = folder / "train_000003.bin"
    for damage in (lambda: os.truncate(path, 100), path.unlink):
        damage()
        assert path.name in refusal(TokenFile, folder, "train")


def test_a_bad_id_ends_training_with_its_file_and_position(tmp_path):
    bad = np.append(TEXT, 300)
    folder = sharded(tmp_path / "d", train=[TEXT, bad, TEXT], val=[TEXT])
    message = refusal(run, folder, tmp_path / "out", max_iters=2, vocab_size=257)
    assert "train_000001.bin" in message and "300" in message and f"{len(TEXT):,}" in message


def test_a_split_whose_shards_are_all_shorter_than_a_block_is_refused(tmp_path):
    folder = sharded(tmp_path / "d", train=[TEXT[:10], TEXT[:20]])
    file = TokenFile(folder, "train")
    file.check(257, block_size=19)
    assert "--block_size=19" in refusal(file.check, 257, block_size=20)


def test_the_fingerprint_depends_on_names_first_and_last_pages_and_stated_hashes(tmp_path):
    folder = described(tmp_path / "d")
    last = max(folder.glob("train_*.bin"))
    changes = [
        (folder / "meta.json").unlink,
        lambda: flip(last, 2),
        lambda: flip(last, -1),
        lambda: last.rename(folder / "train_000099.bin"),
    ]
    for change in changes:
        before = TokenFile(folder, "train").fingerprint
        assert TokenFile(folder, "train").matches(before)
        change()
        assert not TokenFile(folder, "train").matches(before)


def slow_epoch(lengths: list[int], block_size: int, seed: int, epoch: int) -> list[int]:
    """The starts of an epoch's blocks by the rule, written out."""
    rng = np.random.default_rng((seed, epoch, len(lengths)))
    starts = []
    for shard in rng.permutation(len(lengths)).tolist():
        length = lengths[shard]
        if length > block_size:
            rng = np.random.default_rng((seed, epoch, shard))
            n = max(1, (length - 1) // block_size - 1)
            offset = rng.integers(min(length - n * block_size, block_size))
            blocks = offset + block_size * rng.permutation(n)
            starts += (sum(lengths[:shard]) + blocks).tolist()
    return starts


@pytest.mark.parametrize("lengths", [LENGTHS, [1000]])
@pytest.mark.parametrize("block_size", [1, 16, 89, 500, 999])
def test_an_epoch_visits_shard_by_shard_each_block_once(block_size, lengths):
    order = BlockOrder(lengths, block_size, seed=3)
    ends = np.cumsum(lengths)
    for epoch in range(3):
        starts = [order.start(epoch, k) for k in range(order.n_blocks)]
        assert starts == slow_epoch(lengths, block_size, 3, epoch)
        starts = np.sort(starts)
        assert (np.diff(starts) >= block_size).all()
        # the last target is in the shard of the first token
        first = np.searchsorted(ends, starts, "right")
        last = np.searchsorted(ends, starts + block_size, "right")
        assert (first == last).all()


def test_batches_follow_the_epochs_in_whatever_order_they_are_read(tmp_path):
    file = TokenFile(sharded(tmp_path / "d", train=SHARDS), "train")
    expected = []
    for epoch in range(3):
        expected += slow_epoch(LENGTHS, 16, 5, epoch)
    batches = Batches(file, 4, 16, seed=5)
    for i in (0, 1, 99, 3, 98, 47, 2):  # 98 and 99 are of the third epoch
        assert batches.starts(i).tolist() == expected[4 * i : 4 * i + 4]


MEMORY = """
import os, sys
import numpy as np
from engine.data.batches import Batches
from engine.data.tokens import TokenFile

def resident() -> float:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

before = resident()
shards, one = [TokenFile(folder, "train") for folder in sys.argv[1:]]
assert len(shards) == 10_000 * 100_000_000
shards.check(50257, 1024)
shards.fingerprint
batches = Batches(shards, 4, 1024, seed=0)
for i in np.random.default_rng(0).integers(0, 3 * batches.n_blocks // 4, 100).tolist():
    batches[i]
print(resident() - before, len(os.listdir("/proc/self/fd")))
batches = Batches(one, 4, 64, seed=0)
batches[0]
before = resident()
for i in range(1, 10_000):
    batches[i]
one.counts(50257)
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_thousand_shards_and_a_file_of_a_gigabyte_are_read_in_flat_memory(tmp_path):
    n = 100_000_000
    (tmp_path / "shards").mkdir()
    for i in range(10_000):  # sparse: a hole takes no space on the disk
        path = tmp_path / "shards" / f"train_{i:06d}.bin"
        path.touch()
        os.truncate(path, 2 * n)
    one = write_nanogpt(tmp_path / "one", {"train": []})
    os.truncate(one / "train.bin", 1 << 30)
    printed = output_of(sys.executable, "-c", MEMORY, path.parent, one)
    of_shards, n_open, of_one = map(float, printed.split())
    assert of_shards < 80 and of_one < 64  # MB
    assert n_open < 64


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_ids_of_4_or_8_bytes_are_refused_with_the_repair(dtype, tmp_path):
    ids = np.random.default_rng(0).zipf(1.2, 4000) % 50257  # some often, most of them rarely
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    assert "uint16" in refusal(TokenFile, tmp_path, "train")
