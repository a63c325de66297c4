"""engine/data/shards.py and describe.py: splits in many files, llm.c's files, and their checks."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import engine.data.describe
from engine.base.errors import UserError, run_main
from engine.data.batches import Batches, BlockOrder
from engine.data.tokens import TokenFile
from tests.helpers import ROOT, run, words, write_nanogpt

MAGIC = 20240520


def headed(path: Path, ids, version: int = 1, n: int | None = None) -> None:
    """A file as llm.c's dev/data scripts write it, or with another header."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, version, len(ids) if n is None else n
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(ids).astype("<u2").tobytes())


def sharded(folder: Path, **splits: list[np.ndarray]) -> Path:
    """Shards without a meta file, numbered from 0."""
    names = {}
    for split, shards in splits.items():
        names |= {f"{split}_{i:06d}": ids for i, ids in enumerate(shards)}
    return write_nanogpt(folder, names)


def described(folder: Path, **splits: list[np.ndarray]) -> Path:
    """Shards of bytes as our writer leaves them, with a meta.json."""
    sharded(folder, **splits)
    about = {split: {"shards": []} for split in splits}
    for path in sorted(folder.glob("*.bin")):
        data = path.read_bytes()
        shard = {
            "file": path.name,
            "tokens": len(data) // 2,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        about[path.name.split("_")[0]]["shards"].append(shard)
    meta = {
        "tokenizer": {"kind": "byte"},
        "vocab_size": 257,
        "dtype": "uint16",
        "splits": about,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


TEXT = np.frombuffer(words(900).encode(), np.uint8).astype(int)
# one shard is too short for a block of 16, one has a single token
SHARDS = np.split(TEXT, np.cumsum([700, 90, 1, 1500, 16]))
LENGTHS = [len(shard) for shard in SHARDS]


@pytest.mark.parametrize("name", ["train.bin", "fineweb_train_000001.bin"])
def test_a_file_with_llm_cs_header_holds_the_tokens_after_it(tmp_path, name):
    headed(tmp_path / name, TEXT)
    file = TokenFile(tmp_path, "train")
    assert file.ids.tolist() == TEXT.tolist()
    assert file.rows(np.array([0, 5]), 9).tolist() == [TEXT[:9].tolist(), TEXT[5:14].tolist()]
    assert file.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    for number, ids in ((10, [5, 6]), (9, [3, 4]), (100, [7])):
        headed(tmp_path / f"fineweb_train_{number}.bin", ids)
    assert TokenFile(tmp_path, "train").ids.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("how", [sharded, described])
def test_rows_and_slices_continue_in_the_next_shard(tmp_path, how):
    file = TokenFile(how(tmp_path / "d", train=SHARDS), "train")
    assert len(file) == len(TEXT)
    assert file.ids.tolist() == TEXT.tolist()
    for length in (1, 17, 93, 1000):
        starts = np.random.default_rng(length).integers(0, len(TEXT) - length, 50)
        expected = TEXT[starts[:, None] + np.arange(length)]
        assert (file.rows(starts, length) == expected).all()
    for where in (slice(690, 800), slice(-3, None), slice(7, 7), slice(2800, 9999)):
        assert file[where].tolist() == TEXT[where].tolist()


@pytest.mark.parametrize("changes", [{"n": len(TEXT) + 1}, {"n": 0}, {"version": 2}])
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, changes):
    headed(tmp_path / "train_000001.bin", TEXT, **changes)
    with pytest.raises(UserError, match=r"train_000001\.bin"):
        TokenFile(tmp_path, "train")


@pytest.mark.parametrize("other", ["train", "other_train_000001", "train_000001"])
def test_two_sets_of_files_for_one_split_are_refused_by_name(tmp_path, other):
    names = ("fineweb_train_000001", "fineweb_val_000000", other)
    folder = write_nanogpt(tmp_path / "d", dict.fromkeys(names, TEXT))
    with pytest.raises(UserError, match=rf"{other}\.bin"):
        TokenFile(folder, "train")
    assert len(TokenFile(folder, "val")) == len(TEXT)


def test_a_shard_that_is_missing_or_has_another_size_is_named(tmp_path):
    folder = described(tmp_path / "d", train=SHARDS)
    path = folder / "train_000003.bin"
    for damage in (lambda: os.truncate(path, 100), path.unlink):
        damage()
        with pytest.raises(UserError, match=path.name):
            TokenFile(folder, "train")


def test_a_bad_id_ends_training_with_its_file_and_position(tmp_path):
    folder = sharded(tmp_path / "d", train=[TEXT, np.append(TEXT, 300), TEXT], val=[TEXT])
    with pytest.raises(UserError, match=rf"train_000001\.bin .*300.* {len(TEXT):,}"):
        run(folder, tmp_path / "out", max_iters=2, vocab_size=257)


def test_a_split_whose_shards_are_all_shorter_than_a_block_is_refused(tmp_path):
    file = TokenFile(sharded(tmp_path / "d", train=[TEXT[:10], TEXT[:20]]), "train")
    file.check(257, block_size=19)
    with pytest.raises(UserError, match="20 tokens.*--block_size=19"):
        file.check(257, block_size=20)


def test_the_sha256_of_old_checkpoints_is_that_of_the_shards_hashes(tmp_path):
    folder = described(tmp_path / "d", train=SHARDS)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*"))]
    expected = hashlib.sha256("\n".join(hashes[1:]).encode()).hexdigest()  # without meta.json
    assert TokenFile(folder, "train").matches(expected)
    (folder / "meta.json").unlink()
    assert TokenFile(folder, "train").matches(expected)


def test_the_fingerprint_depends_on_names_first_and_last_pages_and_stated_hashes(tmp_path):
    folder = described(tmp_path / "d", train=SHARDS)
    last = folder / "train_000005.bin"
    changes = [
        (folder / "meta.json").unlink,
        lambda: flip(last, 2),
        lambda: flip(last, -1),
        lambda: os.rename(last, folder / "train_000006.bin"),
    ]
    for change in changes:
        before = TokenFile(folder, "train").fingerprint
        assert TokenFile(folder, "train").matches(before)
        change()
        assert not TokenFile(folder, "train").matches(before)


def slow_epoch(lengths: list[int], block_size: int, seed: int, epoch: int) -> list[int]:
    """The starts of an epoch's blocks by the rule, written out."""
    order = np.random.default_rng((seed, epoch, len(lengths))).permutation(len(lengths))
    starts = []
    for shard in order.tolist():
        length = lengths[shard]
        if length > block_size:
            rng = np.random.default_rng((seed, epoch, shard))
            n = max(1, (length - 1) // block_size - 1)
            offset = rng.integers(min(length - n * block_size, block_size))
            blocks = offset + block_size * rng.permutation(n)
            starts += (sum(lengths[:shard]) + blocks).tolist()
    return starts


@pytest.mark.parametrize("lengths", [LENGTHS, [1000]])
@pytest.mark.parametrize("block_size", [1, 16, 89, 500, 998, 999])
def test_an_epoch_visits_shard_by_shard_each_block_once(block_size, lengths):
    order = BlockOrder(lengths, block_size, seed=3)
    for epoch in range(3):
        starts = [order.start(epoch, k) for k in range(order.n_blocks)]
        assert starts == slow_epoch(lengths, block_size, 3, epoch)
        for begin, length in zip(order.begins, lengths, strict=True):
            blocks = [start for start in starts if begin <= start < begin + length]
            if not blocks:
                assert length <= block_size
                continue
            # next to each other, and nearly all of the shard
            assert sorted(blocks) == list(range(min(blocks), max(blocks) + 1, block_size))
            assert max(blocks) + block_size < begin + length
            assert (len(blocks) + 2) * block_size > length - 1


def test_batch_i_is_the_same_whatever_was_read_before(tmp_path):
    file = TokenFile(sharded(tmp_path / "d", train=SHARDS), "train")
    forward = Batches(file, 4, 16, seed=5)
    expected = [forward[i][0].tolist() for i in range(100)]  # over two epochs
    backward = Batches(file, 4, 16, seed=5)
    found = [backward[i][0].tolist() for i in reversed(range(100))]
    assert found[::-1] == expected
    assert Batches(file, 4, 16, seed=5)[99][0].tolist() == expected[99]
    assert Batches(file, 4, 16, seed=6)[99][0].tolist() != expected[99]


@pytest.fixture
def describe(monkeypatch, capsys):
    """Runs the command; its exit code and output."""

    def run_command(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["engine.data.describe", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            run_main(engine.data.describe.main)
            sys.exit(0)
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    return run_command


def test_splits_sizes_and_damaged_files_are_printed(tmp_path, describe):
    folder = described(tmp_path / "d", train=SHARDS, val=[TEXT[:300]])
    code, printed = describe(folder)
    assert code == 0
    for what in (f"{len(TEXT):,}", "uint16", "6 files", "val: 300", "257"):
        assert what in printed
    damaged = ("train_000003.bin", "val_000000.bin")
    for name in damaged:
        flip(folder / name, 9)
    code, printed = describe(folder)
    assert code == 2 and printed.count("sha256") == 2
    assert all(name in printed for name in damaged)


def test_ids_outside_the_vocabulary_are_found(tmp_path, describe):
    code, printed = describe(write_nanogpt(tmp_path / "d", {"train": [1, 60000]}))
    assert code == 2 and "60000" in printed


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["nowhere"]])
def test_a_mistake_is_one_line(argv, describe):
    code, printed = describe(*argv)
    assert code == 2 and printed.count("\n") == 1


MEMORY = """
import json, os, sys
import numpy as np
from engine.data.batches import Batches
from engine.data.tokens import TokenFile

def resident() -> float:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

about = {"start": -resident()}
shards = TokenFile(sys.argv[1], "train")
shards.check(50257, 1024)
shards.fingerprint
batches = Batches(shards, 4, 1024, seed=0)
batches[0]
about["start"] += resident()
about["growth"] = -resident()
for i in np.random.default_rng(0).integers(0, 3 * batches.n_blocks // 4, 100).tolist():
    batches[i]
about["files"] = len(os.listdir("/proc/self/fd"))
one = TokenFile(sys.argv[2], "train")
batches = Batches(one, 4, 64, seed=0)
for i in range(10_000):
    batches[i]
one.counts(50257)
about["growth"] += resident()
print(json.dumps(about | {"tokens": len(shards)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_thousand_shards_and_a_file_of_a_gigabyte_are_read_in_flat_memory(tmp_path):
    n, n_shards = 100_000_000, 10_000
    shards, one = tmp_path / "shards", tmp_path / "one"
    for i in range(n_shards):  # sparse: a hole takes no space on the disk
        path = shards / f"train_{i:06d}.bin"
        headed(path, [], n=n)
        os.truncate(path, 1024 + 2 * n)
    write_nanogpt(one, {"train": []})
    os.truncate(one / "train.bin", 1 << 30)
    command = [sys.executable, "-c", MEMORY, str(shards), str(one)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    about = json.loads(done.stdout)
    assert about["tokens"] == n * n_shards
    assert about["start"] < 64  # MB
    assert about["growth"] < 64
    assert about["files"] < 64
