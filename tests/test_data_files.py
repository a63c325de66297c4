"""engine/data/tokens.py and scan.py: damaged token files, the one pass over them, and memory while they are read."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import engine.data.scan
from engine.base.errors import UserError
from engine.data.labels import identity
from engine.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from engine.data.tokens import Batches, TokenFile
from tests.helpers import ROOT, run, words, write_dataset, write_nanogpt, write_words

V = GPT2Tokenizer.vocab_size
TEXT = (
    np.random.default_rng(0).zipf(1.2, 4000) % V
)  # ids as text has them: some often, most of them rarely


@pytest.fixture(autouse=True)
def remember_at_once(monkeypatch):
    monkeypatch.setattr(engine.data.scan, "SETTLED", 0)


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """The sizes of the files that were read as a whole."""
    sizes, scan = [], engine.data.scan._scan
    monkeypatch.setattr(
        engine.data.scan, "_scan", lambda *a: sizes.append(a[2]["size"]) or scan(*a)
    )
    return sizes


def plain(folder: Path, ids, dtype: str = "<u2") -> TokenFile:
    """A data set without a meta file whose ids were written with that dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(ids).astype(dtype).tofile(folder / "train.bin")
    return TokenFile(folder, "train")


def memory(file: TokenFile) -> Path:
    return file.path.with_name(".train.scanned.json")


def flip(path: Path, place: int) -> None:
    """Change one bit, and no size."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flipped_bit_is_refused_by_name_before_anything_is_trained(tmp_path, split, capsys):
    data = write_words(tmp_path / "data")
    run(data, tmp_path / "first", max_iters=1)  # and so the undamaged file is remembered
    flip(data / f"{split}.bin", 100)
    capsys.readouterr()
    with pytest.raises(
        UserError, match=rf"{split}\.bin is damaged or another file: its sha256 .* prepare it again"
    ):
        run(data, tmp_path / "second", max_iters=1)
    assert not (tmp_path / "second").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8", "<u8", "<f4", "<f8"])
def test_numbers_of_another_type_are_refused_by_name_with_the_line_that_mends_them(tmp_path, dtype):
    file = plain(tmp_path, TEXT, dtype)
    with pytest.raises(
        UserError, match=r"train\.bin holds .* data, not uint16 .* write it anew: (.*)"
    ) as error:
        file.check(V)
    how = (
        str(error.value)
        .split("write it anew: ")[1]
        .replace("NEW_FILE", repr(str(tmp_path / "val.bin")))
    )
    exec(how, {"numpy": np})
    assert TokenFile(tmp_path, "val").ids.tolist() == TEXT.tolist()


def test_a_npy_file_is_refused_by_name_whatever_the_vocabulary(tmp_path):
    with open(tmp_path / "train.bin", "wb") as file:
        np.save(file, TEXT.astype("<u2"))
    for vocab_size in (67, V, 1 << 16):
        with pytest.raises(UserError, match=r"train\.bin holds \.npy data.*numpy\.load\("):
            TokenFile(tmp_path, "train").check(vocab_size)


def test_wrong_numbers_say_their_type_in_a_small_vocabulary_too_where_they_do_not_fit_it(tmp_path):
    with pytest.raises(UserError, match="holds float32 data"):
        plain(tmp_path, np.arange(1, 1000) % 65, "<f4").check(65)


@pytest.mark.parametrize(
    ("ids", "vocab_size"),
    [
        (TEXT, V),
        (np.zeros(1000), V),
        (np.full(1000, 17000), V),  # a float's upper half, but not its lower one
        (np.tile([5, 0], 1000), 65),  # lines of one character: int32 would look the same
        (np.tile([7, 0, 0, 0], 500), 65),
        (np.tile([0, 9], 1000), V),
        (
            np.where(np.arange(2000) % 2, 0, TEXT[:2000]) + (np.arange(2000) == 1501),
            V,
        ),  # one word between all the "!"
        (np.tile([50, 0], 20), V),  # too short to know
        (TEXT % 2, 2),
    ],
)
def test_what_may_be_text_is_never_refused(tmp_path, ids, vocab_size):
    plain(tmp_path, ids).check(vocab_size)


def test_ids_that_are_stated_to_be_32_bits_wide_are_read_so(tmp_path):
    (tmp_path / "meta.json").write_text(
        json.dumps({"tokenizer": {}, "vocab_size": V, "dtype": "uint32"})
    )
    plain(tmp_path, TEXT, "<u4").check(V)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_scan_finds_hash_and_counts_over_all_chunks(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(engine.data.scan, "CHUNK", 300)
    (tmp_path / "meta.json").write_text(
        json.dumps({"tokenizer": {}, "vocab_size": V, "dtype": dtype})
    )
    file = plain(tmp_path, TEXT, dtype)
    assert file.counts(V).tolist() == np.bincount(TEXT, minlength=V).tolist()
    assert (
        file.sha256
        == hashlib.sha256(file.path.read_bytes()).hexdigest()
        == identity(file)["tokens_sha256"]
    )


def test_an_id_too_high_to_be_counted_is_refused_as_any_other(tmp_path):
    (tmp_path / "meta.json").write_text(
        json.dumps({"tokenizer": {}, "vocab_size": 1 << 20, "dtype": "uint32"})
    )
    with pytest.raises(UserError, match="holds token id 4000000000, outside the vocabulary"):
        plain(tmp_path, [1, 4_000_000_000, 2], "<u4").check(1 << 20)


def test_a_file_is_read_once_and_then_remembered_by_all_who_open_it(tmp_path, scans):
    file = plain(tmp_path, TEXT)
    file.check(V)
    counts, sha256 = file.counts(V), file.sha256
    file.check(V, block_size=16)
    again = TokenFile(tmp_path, "train")
    again.check(V)
    assert again.sha256 == sha256 and again.counts(V).equal(counts) and len(scans) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".train.scanned.json", "train.bin"]


def test_training_reads_each_file_once_and_a_second_run_none(tmp_path, scans):
    data = write_words(tmp_path / "data")
    run(data, tmp_path / "first", max_iters=1)
    assert sorted(scans) == sorted(
        (data / f"{split}.bin").stat().st_size for split in ("train", "val")
    )
    run(data, tmp_path / "second", max_iters=1)
    assert len(scans) == 2


@pytest.mark.parametrize("how", ["contents", "touched", "replaced", "dtype"])
def test_a_memory_of_what_has_changed_since_is_not_believed(tmp_path, scans, how):
    file = plain(tmp_path, TEXT)
    file.check(V)
    before = file.path.stat()
    if how == "contents":
        flip(file.path, 6)
        os.utime(
            file.path, ns=(before.st_atime_ns, before.st_mtime_ns)
        )  # the time of its last change cannot be set
    elif how == "touched":
        os.utime(file.path)
    elif how == "replaced":
        (tmp_path / "new").write_bytes(file.path.read_bytes()[::-1])
        os.replace(tmp_path / "new", file.path)
    else:
        (tmp_path / "meta.json").write_text(
            json.dumps({"tokenizer": {}, "vocab_size": 1 << 32, "dtype": "uint32"})
        )
    now = TokenFile(tmp_path, "train")
    assert now.sha256 == hashlib.sha256(now.path.read_bytes()).hexdigest() and len(scans) == 2


def test_a_damaged_memory_is_ignored_and_written_again(tmp_path, scans):
    file = plain(tmp_path, TEXT)
    file.check(V)
    good, counts = memory(file).read_text(), file.counts(V)
    other = json.loads(good)
    other["scan"]["sha256"] = other["scan"]["sha256"][::-1]
    for bad in ("", "{", "[]", "null", '{"scan": 1, "check": 2}', good[:-9], json.dumps(other)):
        memory(file).write_text(bad)
        scans.clear()
        again = TokenFile(tmp_path, "train")
        assert again.counts(V).equal(counts) and again.sha256 == file.sha256 and len(scans) == 1
        assert json.loads(memory(file).read_text())["scan"]["sha256"] == file.sha256


def test_a_folder_that_cannot_be_written_to_is_read_each_time_and_no_error(
    tmp_path, scans, monkeypatch
):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    plain(tmp_path, TEXT).check(V)
    TokenFile(tmp_path, "train").check(V)
    assert len(scans) == 2 and [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def test_a_refused_file_is_not_remembered(tmp_path):
    for dtype, vocab_size, block_size in (("<u2", 67, 1), ("<i4", V, 1), ("<u2", V, 4000)):
        file = plain(tmp_path, TEXT, dtype)
        with pytest.raises(UserError):
            file.check(vocab_size, block_size)
        assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def test_a_file_that_has_just_changed_is_not_remembered_as_it_may_change_at_the_same_file_time(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(engine.data.scan, "SETTLED", 60 * 10**9)
    file = plain(tmp_path, TEXT)
    file.check(V)
    assert not memory(file).exists()


def test_a_file_cut_short_while_it_is_read_is_refused_by_name(tmp_path):
    file = plain(tmp_path, TEXT)
    batches = Batches(file, 8, 16, seed=0)
    batches[0]
    os.truncate(file.path, 1000)
    for read in (lambda: [batches[i] for i in range(40)], lambda: file.ids, lambda: file.sha256):
        with pytest.raises(
            UserError, match=r"train\.bin changed while it was read; .* start again or resume"
        ):
            read()


def test_a_file_put_in_the_place_of_one_that_is_read_changes_nothing(tmp_path):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"train": np.arange(1000)}), "train")
    os.replace(plain(tmp_path / "other", [7] * 3).path, file.path)
    assert (file.ids == np.arange(1000)).all() and Batches(file, 1, 990, seed=0)[0][0].max() > 900


def test_data_that_evaluate_py_only_counts_is_checked_too(tmp_path):
    write_dataset(tmp_path, {"train": [words(99)]}, ByteTokenizer())
    flip(tmp_path / "train.bin", 9)
    with pytest.raises(UserError, match="damaged or another file"):
        TokenFile(tmp_path, "train").frequencies(257)


GROWTH = """
import sys
import numpy as np
from engine.data.labels import identity
from engine.data.tokens import Batches, TokenFile

def resident() -> float:
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

file = TokenFile(sys.argv[1], "train")
if sys.argv[2] == "scan":
    before = resident()
    file.check(50257)
else:
    batches = Batches(file, 4, 64, seed=0)
    batches[0]
    before, seen = resident(), 0
    for i in range(10_000):
        seen += int(batches[i][0].max() > 0)
    assert seen > 100
print(resident() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"
)
@pytest.mark.parametrize("what", ["batches", "scan"])
def test_reading_a_gigabyte_takes_less_than_64_mb_of_memory(tmp_path, what):
    size, rng = 1 << 30, np.random.default_rng(0)
    with open(
        tmp_path / "train.bin", "wb"
    ) as file:  # sparse: it takes no more of the disk than what is written
        file.truncate(size)
        for place in rng.integers(0, size // 2 - 4096, 2000):
            file.seek(2 * int(place))
            file.write(rng.integers(1, 50257, 4096).astype("<u2").tobytes())
    result = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) < 64
