"""engine/data/shards.py: splits in many files, llm.c's files, thousands of shards, and the order of
their blocks.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.base.errors import UserError
from engine.data.batches import Batches, BlockOrder
from engine.data.labels import LabelFile, identity, pack, paths_of
from engine.data.tokens import TokenFile
from engine.data.windows import windows
from tests.helpers import (
    ROOT,
    records,
    run,
    same_weights,
    scores_of,
    tiny_gpt,
    words,
    write_nanogpt,
)

MAGIC = 20240520


def headed(path: Path, ids, **changes) -> Path:
    """A file as llm.c's dev/data scripts write it; changes: magic, version or n other than they
    should be.
    """
    header = np.zeros(256, "<i4")
    header[:3] = (
        changes.get("magic", MAGIC),
        changes.get("version", 1),
        changes.get("n", len(ids)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(ids).astype("<u2").tobytes())
    return path


def sharded(folder: Path, **splits: list[np.ndarray]) -> Path:
    """Shards without a meta file, numbered from 0."""
    names = {
        f"{split}_{i:06d}": ids for split, shards in splits.items() for i, ids in enumerate(shards)
    }
    return write_nanogpt(folder, names)


def described(
    folder: Path, vocab_size: int = 257, kind: str = "byte", **splits: list[np.ndarray]
) -> Path:
    """Shards as our writer leaves them, with a meta.json."""
    sharded(folder, **splits)
    about = {}
    for split in splits:
        paths = sorted(folder.glob(f"{split}_*.bin"))
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        sizes = [path.stat().st_size // 2 for path in paths]
        shards = [
            {"file": p.name, "tokens": n, "sha256": s}
            for p, n, s in zip(paths, sizes, sums, strict=True)
        ]
        about[split] = {"documents": 1, "tokens": sum(sizes), "bytes": sum(sizes), "shards": shards}
        about[split]["sha256"] = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    meta = {
        "tokenizer": {"kind": kind},
        "vocab_size": vocab_size,
        "dtype": "uint16",
        "splits": about,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def cut(ids: np.ndarray, *sizes: int) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(sizes))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


TEXT = np.frombuffer(words(900).encode(), np.uint8).astype(int)
SHARDS = cut(
    TEXT, 700, 90, 1, 1500, 16
)  # among them one too short for a block of 16, and one of one token


@pytest.mark.parametrize(
    "name", ["train.bin", "tiny_shakespeare_train.bin", "fineweb_train_000001.bin"]
)
def test_a_headed_file_holds_the_tokens_of_a_raw_one(tmp_path, name):
    headed(tmp_path / "headed" / name, TEXT)
    files = (
        TokenFile(tmp_path / "headed", "train"),
        TokenFile(write_nanogpt(tmp_path / "d", {"train": TEXT}), "train"),
    )
    for file in files:
        assert file.ids.tolist() == TEXT.tolist() and len(file) == len(TEXT)
        assert file.counts(257).tolist() == np.bincount(TEXT, minlength=257).tolist()
        assert file.rows(np.array([0, 5]), 9).tolist() == [TEXT[:9].tolist(), TEXT[5:14].tolist()]
    assert files[0].sha256 == hashlib.sha256((tmp_path / "headed" / name).read_bytes()).hexdigest()
    first, second = (Batches(file, 4, 16, seed=0)[3] for file in files)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shards_are_one_row_in_the_order_of_their_numbers(tmp_path):
    for number, ids in ((10, [5, 6]), (9, [3, 4]), (100, [7])):
        headed(tmp_path / f"fineweb_train_{number}.bin", ids)
    file = TokenFile(tmp_path, "train")
    assert file.ids[:].tolist() == [3, 4, 5, 6, 7] and len(file) == 5
    assert file.rows(np.array([0, 1]), 4).tolist() == [[3, 4, 5, 6], [4, 5, 6, 7]]


@pytest.mark.parametrize("how", [sharded, described])
def test_rows_and_ids_straddle_shards(tmp_path, how):
    file = TokenFile(how(tmp_path / "d", train=SHARDS), "train")
    assert len(file) == len(TEXT) and file.ids.tolist() == TEXT.tolist()
    for length in (1, 17, 93, 1000):
        starts = np.random.default_rng(length).integers(0, len(TEXT) - length, 50)
        assert (file.rows(starts, length) == TEXT[starts[:, None] + np.arange(length)]).all()
    assert (file[690:800] == TEXT[690:800]).all() and file[-3:].tolist() == TEXT[-3:].tolist()
    assert file[7:7].tolist() == [] and file[len(TEXT) - 3 : len(TEXT) + 5].size == 3


@pytest.mark.parametrize(
    "changes", [{"n": len(TEXT) + 1}, {"n": 0}, {"n": -1}, {"version": 0}, {"version": 2}]
)
def test_a_header_that_does_not_fit_its_file_is_refused_never_read_as_ids(tmp_path, changes):
    headed(tmp_path / "train_000001.bin", TEXT, **changes)
    with pytest.raises(UserError, match=r"train_000001\.bin is damaged or of another version"):
        TokenFile(tmp_path, "train")


def test_a_folder_whose_meta_json_says_that_there_is_no_header_is_believed(tmp_path):
    # the magic number, two ids
    np.array([55432, 308] + [1, 0] * 9, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin is damaged"):
        TokenFile(tmp_path, "train")
    meta = {"tokenizer": {"kind": "none"}, "vocab_size": 60000, "splits": {"train": {}}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert TokenFile(tmp_path, "train").ids[:3].tolist() == [55432, 308, 1]


def test_an_unknown_magic_number_makes_ids_and_these_are_checked(tmp_path):
    headed(tmp_path / "train.bin", TEXT, magic=20240522)  # llm.c's multiple-choice questions
    with pytest.raises(UserError, match="outside the vocabulary of 50257"):
        TokenFile(tmp_path, "train").counts(50257)


@pytest.mark.parametrize("other", ["train", "other_train_000001", "other_train", "train_000001"])
def test_files_that_may_each_be_the_split_are_refused_by_name(tmp_path, other):
    folder = write_nanogpt(
        tmp_path / "d", {"fineweb_train_000001": TEXT, "fineweb_val_000000": TEXT, other: TEXT}
    )
    with pytest.raises(
        UserError,
        match=rf"has .*{other}\.bin.*: which is the train split",
    ):
        TokenFile(folder, "train")
    assert len(TokenFile(folder, "val")) == len(TEXT)


@pytest.mark.parametrize(
    "change",
    [
        lambda shards: shards[0].update(file="../train_000000.bin"),
        lambda shards: shards[0].update(file="/etc/passwd"),
        lambda shards: shards[0].update(tokens=701),
    ],
)
def test_a_meta_json_with_wrong_shards_is_refused_in_a_line(tmp_path, change):
    folder = described(tmp_path / "d", train=SHARDS)
    meta = json.loads((folder / "meta.json").read_text())
    change(meta["splits"]["train"]["shards"])
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="prepare it again"):
        TokenFile(folder, "train")


def test_a_missing_shard_is_named(tmp_path):
    folder = described(tmp_path / "d", train=SHARDS)
    (folder / "train_000003.bin").unlink()
    with pytest.raises(UserError, match=r"train_000003\.bin is missing, but meta\.json names it"):
        TokenFile(folder, "train")
    with pytest.raises(UserError, match=r"val\.bin is missing; this data set has train"):
        TokenFile(folder, "val")


def test_a_bad_id_ends_training_by_name_when_it_is_read(tmp_path):
    folder = sharded(tmp_path / "d", train=[TEXT, np.append(TEXT, 300), TEXT], val=[TEXT])
    with pytest.raises(UserError, match=rf"train_000001\.bin .*300.* at position {len(TEXT):,}"):
        run(folder, tmp_path / "out", max_iters=2, vocab_size=257)
    file = TokenFile(folder, "train")
    file.check(257)
    with pytest.raises(UserError, match=r"train_000001\.bin holds token id 300"):
        list(windows(file, 16, 8))


def test_the_sha256_of_shards_is_stated_or_that_of_their_hashes(tmp_path):
    folder = described(tmp_path / "d", train=SHARDS)
    file = TokenFile(folder, "train")
    stated = json.loads((folder / "meta.json").read_text())["splits"]["train"]["sha256"]
    assert file.sha256 == stated == TokenFile(sharded(tmp_path / "e", train=SHARDS), "train").sha256
    assert file.matches(stated)


def test_the_fingerprint_depends_on_names_sizes_first_and_last_pages_and_stated_hashes(tmp_path):
    folder = described(tmp_path / "d", train=SHARDS)
    prints = [TokenFile(folder, "train").fingerprint for _ in range(2)]
    (folder / "meta.json").unlink()
    prints.append(TokenFile(folder, "train").fingerprint)
    flip(folder / "train_000003.bin", 2)
    prints.append(TokenFile(folder, "train").fingerprint)
    os.rename(folder / "train_000005.bin", folder / "train_000006.bin")
    prints.append(TokenFile(folder, "train").fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 4


def slow_epoch(lengths: list[int], block_size: int, seed: int, epoch: int) -> list[int]:
    """The starts of an epoch's blocks by the rule, written out."""
    order, starts = np.random.default_rng((seed, epoch, len(lengths))).permutation(len(lengths)), []
    for shard in order.tolist():
        if lengths[shard] >= block_size + 1:
            rng = np.random.default_rng((seed, epoch, shard))
            n = max(1, (lengths[shard] - 1) // block_size - 1)
            offset = rng.integers(min(lengths[shard] - 1 - n * block_size + 1, block_size))
            starts += (sum(lengths[:shard]) + offset + block_size * rng.permutation(n)).tolist()
    return starts


@pytest.mark.parametrize("block_size", [1, 16, 89, 500])
def test_an_epoch_goes_shard_by_shard_and_visits_each_block_of_each_once(block_size):
    lengths = [len(shard) for shard in SHARDS]
    order, begins = BlockOrder(lengths, block_size, 3), np.cumsum([0, *lengths])
    for epoch in range(4):
        starts = [order.start(epoch, k) for k in range(order.n_blocks)]
        assert starts == slow_epoch(lengths, block_size, 3, epoch)
        shards = (np.searchsorted(begins, starts, side="right") - 1).tolist()
        visits = [shard for i, shard in enumerate(shards) if i == 0 or shards[i - 1] != shard]
        assert sorted(visits) == [k for k, n in enumerate(lengths) if n > block_size]
        for shard in visits:
            mine = sorted(start for start, of in zip(starts, shards, strict=True) if of == shard)
            assert mine == list(range(mine[0], mine[0] + len(mine) * block_size, block_size))
            assert (
                mine[-1] + block_size < begins[shard + 1]
                and (len(mine) + 2) * block_size > lengths[shard] - 1
            )
    other = [
        BlockOrder(lengths, block_size, seed).start(epoch, 0)
        for seed in range(5)
        for epoch in range(5)
    ]
    assert len(set(other)) > 5


@pytest.mark.parametrize("seed", [0, 1337, (1 << 63) - 1])
def test_the_order_over_one_file_is_what_it_was_before_there_were_shards(tmp_path, seed):
    batches = Batches(
        TokenFile(write_nanogpt(tmp_path / "d", {"train": np.arange(1000)}), "train"), 1, 16, seed
    )
    n_blocks = (1000 - 1) // 16 - 1
    for epoch in (0, 1, 5):
        rng = np.random.default_rng((seed, epoch))
        offset = rng.integers(min(1000 - n_blocks * 16, 16))
        expected = (offset + 16 * rng.permutation(n_blocks)).tolist()
        assert [batches[epoch * n_blocks + k][0][0, 0].item() for k in range(n_blocks)] == expected


def test_any_batch_of_shards_is_the_same_whatever_was_read_before_and_two_processes_share_an_epoch(
    tmp_path,
):
    file = TokenFile(described(tmp_path / "d", train=SHARDS), "train")
    forward = [Batches(file, 1, 16, 5)[i][0].tolist() for i in range(60)]
    batches = Batches(file, 1, 16, 5)
    assert [batches[i][0].tolist() for i in reversed(range(60))] == forward[::-1]
    n = batches.n_blocks // 2 * 2
    halves = [
        {int(Batches(file, 1, 16, 5).starts(i)[0]) for i in range(rank, n, 2)} for rank in (0, 1)
    ]
    whole = [BlockOrder([len(shard) for shard in SHARDS], 16, 5).start(0, k) for k in range(n)]
    assert (
        not halves[0] & halves[1]
        and halves[0] | halves[1] == set(whole)
        and len(whole) == len(set(whole))
    )


def test_a_split_whose_shards_are_all_shorter_than_a_block_is_refused(tmp_path):
    file = TokenFile(described(tmp_path / "d", train=cut(TEXT[:50], 10, 20)), "train")
    file.check(257, 19)
    with pytest.raises(
        UserError,
        match=r"train\.bin has 20 tokens .*too few for one block of 20",
    ):
        file.check(257, 20)


def test_evaluation_over_shards_is_evaluation_over_one_file(tmp_path):
    model = tiny_gpt(std=0.3)
    ids = TEXT % 67
    files = [TokenFile(write_nanogpt(tmp_path / "one", {"val": ids}), "val")]
    files += [TokenFile(sharded(tmp_path / "many", val=cut(ids, 700, 90, 1, 1500, 16)), "val")]
    one, many = (scores_of(model, file) for file in files)
    assert one["n_tokens"] == many["n_tokens"] == len(ids) - 1 and one == many


def test_training_on_shards_resumes_bit_for_bit_and_learns(tmp_path):
    data = described(tmp_path / "d", train=SHARDS, val=[TEXT[:300], TEXT[300:500]])
    whole = run(data, tmp_path / "whole")
    run(data, tmp_path / "parts", max_iters=15, lr_decay_iters=30)
    assert same_weights(whole, run(data, tmp_path / "parts", init_from="resume", max_iters=30))
    scores = [record["val_nll"] for record in records(tmp_path / "whole", "val_nll")]
    assert scores[-1] < scores[0] - 0.5
    flip(data / "val_000001.bin", 9)
    meta = json.loads((data / "meta.json").read_text())
    meta["splits"]["val"] = json.loads(
        (described(tmp_path / "e", val=[TEXT[:300], TEXT[301:500]]) / "meta.json").read_text()
    )["splits"]["val"]
    (tmp_path / "e" / "val_000001.bin").replace(data / "val_000001.bin")
    (data / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"val\.bin holds other tokens than the run to resume"):
        run(data, tmp_path / "parts", init_from="resume", max_iters=40)


def test_teacher_labels_speak_of_positions_over_all_shards(tmp_path):
    data = described(tmp_path / "d", train=SHARDS)
    file = TokenFile(data, "train")
    about = {"k": 1, "vocab_size": 257, "windows": 1, "done": 1}
    rows, description = paths_of(file, "next")
    rows.write_bytes(pack((TEXT[:, None] + 1) % 257, np.ones((len(TEXT), 1))).tobytes())
    description.write_text(json.dumps(about | identity(file)))
    batches = Batches(file, 8, 16, 0, LabelFile(file, "next", weight=0.25))
    for i in range(20):
        x, targets, weights = batches[i]
        position = batches.starts(i)[:, None] + np.arange(16)
        assert (x.numpy() == TEXT[position]).all() and (
            targets[..., 0].numpy() == TEXT[position + 1]
        ).all()
        assert (targets[..., 1].numpy() == (TEXT[position] + 1) % 257).all()
        assert torch.allclose(weights, torch.tensor([0.75, 0.25]))


LOOK = """
import json, os, resource, sys, time
import numpy as np
from engine.data.batches import Batches
from engine.data.tokens import TokenFile

def resident() -> float:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

imported, began = resident(), time.perf_counter()
file = TokenFile(sys.argv[1], "train")
file.check(50257, 1024)
fingerprint = file.fingerprint
batches = Batches(file, 4, 1024, seed=0)
batches[0]
seconds, before = time.perf_counter() - began, resident()
for i in np.random.default_rng(0).integers(0, 3 * batches.n_blocks // 4, 100).tolist():
    batches[i]
about = {"tokens": len(file), "growth": resident() - before, "start": before - imported}
about["seconds"] = seconds
print(json.dumps(about | {"files": len(os.listdir("/proc/self/fd"))}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"
)
def test_ten_thousand_shards_of_100_million_tokens_open_and_read_in_flat_memory(tmp_path):
    n, n_shards = 100_000_000, 10_000
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, 1, n
    for i in range(n_shards):  # sparse: holes take no more of the disk than a name
        with open(tmp_path / f"train_{i:06d}.bin", "wb") as file:
            file.write(header.tobytes())
            file.truncate(2 * n + header.nbytes)
    command = [sys.executable, "-c", LOOK, str(tmp_path)]
    about = json.loads(
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    assert about["tokens"] == n * n_shards
    assert about["growth"] < 16 and about["start"] < 64  # MB
    assert about["files"] < 64
