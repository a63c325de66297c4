"""Teacher labels: made once, exactly what the teacher says, and what training makes of them."""

import gc
import hashlib
import json
import multiprocessing
import runpy
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch

from augmentation.teacher_labels import Options, Teacher, main
from engine.base.errors import UserError
from engine.base.files import exclusive_lock
from engine.data.batches import Batches
from engine.data.labels import LabelFile, unpack
from engine.data.tokenizer import ByteTokenizer, CharTokenizer
from engine.data.tokens import TokenFile
from engine.runs.checkpoint import load_model, read_newest
from tests.helpers import (
    ROOT,
    flags,
    records,
    run,
    same_weights,
    words,
    write_dataset,
    write_nanogpt,
)

K, T = 5, 16


def sentences(n: int, seed: int = 0) -> str:
    return words(n, seed).replace("harbour", "harbour.").replace("storm", "storm!\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = {"train": [sentences(1500)], "val": [sentences(300, seed=1)]}
    folder = tmp_path_factory.mktemp("data") / "sentences"
    write_dataset(folder, texts, CharTokenizer(sorted(set("".join(texts["train"]))), eot=True))
    return folder


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A run whose vocabulary is padded beyond the tokenizer's."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    run(data, folder, vocab_size=64, max_iters=60, eval_interval=60)
    return folder


@pytest.fixture(scope="module")
def label(data, teacher):
    """Runs the script in this process and opens what it wrote."""

    def make(name: str = "top", **options) -> LabelFile:
        known = {
            "teacher": teacher,
            "dataset": data,
            "name": name,
            "k": K,
            "device": "cpu",
            "dtype": "float32",
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["teacher_labels.py", *flags(**known | options)])
            main()
        return LabelFile(
            TokenFile(options.get("dataset", data), options.get("split", "train")), name
        )

    return make


@pytest.fixture(scope="module")
def top(label):
    return label("top")


def slow_log_probs(teacher, file: TokenFile, position: int) -> torch.Tensor:
    """(V,) of the tokenizer: what the teacher says behind a position, in the window that this
    position belongs to.
    """
    window = max(0, -(-(position - T + 1) // (T // 2)))
    context = torch.from_numpy(file.ids[window * T // 2 : position + 1].astype(np.int64))
    with torch.no_grad():
        return load_model(teacher).log_probs(context[None])[0, -1, : file.vocab_size]


def dense(ids: torch.Tensor, weights: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """ids, weights (..., K) -> (..., V) float64; what stands twice counts twice."""
    return torch.zeros(*ids.shape[:-1], vocab_size, dtype=torch.float64).scatter_add_(
        -1, ids, weights.double()
    )


def test_top_k_labels_are_the_teachers_likeliest_ids_renormalised(data, teacher, top):
    file = TokenFile(data, "train")
    n = len(file)
    for position in [*range(40), n // 2, *range(n - 25, n - 1)]:
        values, ids = slow_log_probs(teacher, file, position).topk(K)
        found_ids, found = unpack(top.rows[position])
        assert found_ids.tolist() == ids.tolist()
        torch.testing.assert_close(found, values.softmax(-1), rtol=1e-3, atol=1e-6)
    assert not top.rows[-1].any()  # nothing is behind the last token


def test_sampled_labels_are_in_expectation_the_teachers_distribution(data, teacher):
    labeller = Teacher(
        Options(str(teacher), str(data), "any", k=K, mode="sample", device="cpu", dtype="float32")
    )
    hidden, n = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), 20_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random((3 * n, K), np.float32))
    ids, weights = labeller.pick(hidden.repeat_interleave(n, 0), uniforms)
    mean = dense(torch.from_numpy(ids), torch.from_numpy(weights), 64).view(3, n, 64).mean(1)
    with torch.no_grad():
        p = labeller.model.lm_head.log_probs(hidden)[:, : labeller.n_ids].softmax(-1).double()
    assert set((weights * K).round(4).ravel().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert all(len(set(row[w > 0])) == (w > 0).sum() for row, w in zip(ids, weights, strict=True))
    assert not mean[:, labeller.n_ids :].any()
    assert ((mean[:, : labeller.n_ids] - p).abs() < 5 * (p * (1 - p) / (n * K)).sqrt() + 1e-6).all()


def test_a_share_of_the_positions_gets_the_labels_that_all_would_get(label, top):
    some = label("some", share=0.3)
    labelled = some.rows[:, 1].any(-1)
    assert labelled.mean() == pytest.approx(0.3, abs=0.03)
    assert (some.rows[labelled] == top.rows[labelled]).all() and not some.rows[~labelled].any()


def test_other_batch_sizes_make_the_same_samples(label):
    one, other = (
        label(f"sample{n}", mode="sample", max_tokens=300, batch_size=n).rows for n in (1, 7)
    )
    assert (one == other).mean() > 0.999 and (
        label("seed", mode="sample", max_tokens=300, seed=1).rows != one
    ).any()


def test_stride_of_a_whole_block_labels_every_position_once(label, top):
    rows = label("wide", stride=T).rows
    assert (rows[:T] == top.rows[:T]).all() and rows[:-1, 1].any(-1).all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mode", ["topk", "sample"])
def test_soft_labels_are_one_hot_and_teacher_mixed_where_the_teacher_speaks(
    data, label, weight, mode
):
    labels = label(f"first_{mode}", mode=mode, max_tokens=2000)
    labels.mode, labels.weight = "soft", weight
    file = TokenFile(data, "train")
    ids, stored = unpack(np.asarray(labels.rows))
    assert not stored[2000:].any() and (stored[:2000].sum(-1) - 1).abs().max() < 2e-3
    with_labels, without = Batches(file, 64, T, 3, labels), Batches(file, 64, T, 3)
    seen = 0
    for i in range(3):
        x, targets, weights = with_labels[i]
        plain_x, y = without[i]
        assert torch.equal(x, plain_x) and torch.equal(targets[..., 0], y)
        starts = without.starts(i)
        positions = torch.tensor(np.array(starts))[:, None] + torch.arange(T)
        teacher = dense(ids[positions], stored[positions], 64)
        total = teacher.sum(-1, keepdim=True)
        one_hot = torch.nn.functional.one_hot(y, 64).double()
        speaks = total > 0 if mode == "sample" else (teacher * one_hot).sum(-1, keepdim=True) > 0
        expected = torch.where(
            speaks, (1 - weight) * one_hot + weight * teacher / total.clamp(min=0.5), one_hot
        )
        torch.testing.assert_close(dense(targets, weights, 64), expected, rtol=0, atol=2e-7)
        assert (
            (weights >= 0).all() and weights.dtype == torch.float32 and targets.dtype == torch.int64
        )
        seen += int(speaks.sum())
    assert 0 < seen < 3 * 64 * T


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_label_is_in_expectation_the_truth_if_the_teacher_knows_the_ids_but_not_how_often(
    top, weight
):
    top.mode, top.weight, n = "soft", weight, 30
    ids, stored = unpack(top.rows[:n])
    q = dense(ids, stored / stored.sum(-1, keepdim=True), 64)
    rest = torch.where(
        q > 0, 0.0, torch.rand(n, 64, generator=torch.Generator().manual_seed(0)).double()
    )
    p = 0.3 * q + 0.7 * rest / rest.sum(
        -1, keepdim=True
    )  # the truth: 0.3 of the time it is one of the K
    of_each = [
        dense(*(t[0] for t in top.targets(torch.full((1, n), y), np.array([0]))), 64)
        for y in range(64)
    ]
    torch.testing.assert_close(
        torch.einsum("nv,vnw->nw", p, torch.stack(of_each)), p, rtol=0, atol=1e-6
    )


def test_labels_over_shards_are_those_over_one_file(data, label, tmp_path):
    meta, ids = json.loads((data / "meta.json").read_text()), TokenFile(data, "train").ids
    folder = write_nanogpt(
        tmp_path / "d",
        {f"train_{i}": part for i, part in enumerate(np.split(ids, [700, 701, 1500]))},
    )
    files = [
        {"file": path.name, "tokens": path.stat().st_size // 2}
        for path in sorted(folder.glob("*.bin"))
    ]
    for about in files:
        contents = (folder / about["file"]).read_bytes()
        about["sha256"] = hashlib.sha256(contents).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta | {"splits": {"train": {"shards": files}}}))
    one = label("one", max_tokens=2000)
    many = label("one", max_tokens=2000, dataset=folder)
    assert np.array_equal(one.rows, many.rows) and np.asarray(one.rows)[:2000].any()


@pytest.mark.parametrize("mode", ["topk", "sample"])
def test_a_set_has_the_true_token_and_each_of_the_teachers_once(data, label, mode):
    labels = label(f"first_{mode}", mode=mode, max_tokens=2000)
    labels.mode, repeated = "set", 0
    ids, stored = unpack(np.asarray(labels.rows))
    y = torch.from_numpy(TokenFile(data, "train").ids[None, 1:3001].astype(np.int64))
    targets, weights = labels.targets(y, np.array([0]))
    for i in range(3000):
        members = {y[0, i].item()} | {
            k.item() for k, w in zip(ids[i], stored[i], strict=True) if w > 0
        }
        expected = torch.zeros(64, dtype=torch.float64)
        expected[list(members)] = 1
        assert (
            torch.equal(dense(targets[0, i], weights[0, i], 64), expected) and weights[0, i, 0] == 1
        )
        repeated += len(members) < 1 + int((stored[i] > 0).sum())
    assert repeated > 50


def test_killed_again_and_again_it_ends_with_the_same_bytes(data, teacher, label):
    options = {"mode": "sample", "share": 0.7, "max_tokens": 6000, "batch_size": 4}
    whole = label("whole", **options)
    about, done = data / "train.parts.labels.json", 0
    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(
            target=label, args=["parts"], kwargs=options
        )
        process.start()
        before, deadline = done, time.monotonic() + 60
        while done <= before + 4 and time.monotonic() < deadline and process.is_alive():
            done = json.loads(about.read_text())["done"] if about.is_file() else 0
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(UserError, match=r"parts\.labels is .*% done; to finish it, run"):
            LabelFile(TokenFile(data, "train"), "parts")
    done = json.loads(about.read_text())["done"]
    with open(
        data / "train.parts.labels", "r+b"
    ) as file:  # rows that were written, but not yet counted
        file.seek(4 * K * (done + 2) * T // 2)
        file.write(b"\xff" * 100)
    parts = label("parts", **options)
    assert (
        10 <= done < whole.about["windows"] and parts.path.read_bytes() == whole.path.read_bytes()
    )
    assert parts.about == whole.about


def test_a_finished_set_stays_as_it_is(label, top, capsys):
    before = top.path.read_bytes(), top.about
    again = label("top")
    assert (again.path.read_bytes(), again.about) == before
    assert "is complete" in capsys.readouterr().out


def test_labels_of_the_val_split_judge_how_a_model_ranks_sets_and_a_teacher_ranks_its_own_first(
    data, teacher, label, monkeypatch, capsys
):
    label("own", split="val", stride=T)  # the very blocks that evaluate.py reads
    argv = {"out_dir": teacher, "split": "val", "labels": "own", "device": "cpu"}
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags(**argv)])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    found = json.loads((teacher / "eval_val.json").read_text())
    # the K likeliest are a set's members and lie before all others; only a true token beyond them
    # can lie further down
    assert (
        found["k"] == K + 1 and K / (K + 1) < found["recall_at_k"] <= 1 and 0.9 < found["lrap"] <= 1
    )
    assert "lrap" in capsys.readouterr().out


def test_of_two_processes_that_write_the_same_labels_the_second_is_refused(data, label):
    busy = pytest.raises(UserError, match="another process is writing")
    with exclusive_lock(data / "train.locked.labels", "busy"), busy:
        label("locked")
    label("locked", max_tokens=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../top"}, "cannot name labels; use letters"),
        ({"name": ""}, "give all of --teacher=RUN --dataset=DATA --name=NAME"),
        ({"mode": "top"}, "is not one of: topk, sample"),
        ({"share": 0}, "share = 0.0 must be"),
        ({"k": 0}, "k = 0 must be"),
        ({"k": 40}, "k = 40 is above 2., the vocabulary"),
        ({"stride": T + 1}, f"stride = {T + 1} is above {T}"),
        ({"teacher": "nowhere"}, "nowhere does not exist"),
        ({"dataset": "nowhere"}, r"train\.bin is missing"),
        ({"dataset": "bytes"}, "was trained with another tokenizer"),
        ({"dataset": "high"}, "holds token id 70, outside the vocabulary of 64"),
        ({"k": K + 1}, "its k is 5, here it is 6; give another --name, or delete"),
        ({"seed": 1}, "its seed is 1337, here it is 1; give another --name"),
        ({"teacher": "student"}, "its teacher_sha256 is "),
        ({"name": "alien"}, r"has no \.json next to it"),
        ({"name": "torn"}, "labels.json is damaged"),
    ],
)
def test_a_mistake_is_refused_and_nothing_changes(
    data, teacher, label, top, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "bytes", {"train": [words(9)]}, ByteTokenizer())
    write_nanogpt(tmp_path / "high", {"train": [70] * 100})
    if options.get("teacher") == "student":
        run(data, tmp_path / "student", vocab_size=64, max_iters=1)
    (data / "train.alien.labels").write_text("mine")
    (data / "train.torn.labels").write_text("")
    (data / "train.torn.labels.json").write_text('{"k": 5')
    before = {path: path.read_bytes() for path in data.iterdir()}
    gc.collect()  # the traceback of the case before keeps its files open, and locked
    with pytest.raises(UserError, match=message) as error:
        label(**options)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in data.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labels": "none"},
            r"train\.none\.labels or its \.json is missing; run .*teacher_labels\.py",
        ),
        ({"labels": "a.b"}, "'a.b' cannot name labels"),
        ({"labels": "top", "label_mode": "hard"}, "label_mode = 'hard' is not one of: soft, set"),
        ({"labels": "top", "label_mode": "set"}, "'set' needs .*--likelihood=sigmoid"),
        ({"labels": "top", "label_weight": 1.1}, "label_weight = 1.1 must be <= 1"),
        ({"labels": "large"}, "has ids up to 999, but vocab_size = 2"),
        (
            {"labels": "tokens"},
            "made for other data: its tokens_sha256 is .*; delete it and its .json, and run",
        ),
        ({"labels": "tokenizer"}, "made for other data: its tokenizer_sha256 is "),
        ({"labels": "short"}, "does not have the size"),
        ({"labels": "gone"}, "is missing; run"),
    ],
)
def test_training_refuses_labels_that_do_not_fit(data, top, tmp_path, options, message):
    about = top.about
    changes = {
        "large": {"vocab_size": 1000},
        "tokens": {"tokens_sha256": "0" * 64},
        "short": {"k": 6},
        "gone": {},
    }
    for name, change in (changes | {"tokenizer": {"tokenizer_sha256": "0" * 64}}).items():
        (data / f"train.{name}.labels.json").write_text(json.dumps(about | change))
        if name != "gone":
            (data / f"train.{name}.labels").write_bytes(top.path.read_bytes())
    with pytest.raises(UserError, match=message) as error:
        run(data, tmp_path / "new", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_a_vocabulary_beyond_16_bits_is_refused(tmp_path):
    folder = write_nanogpt(
        tmp_path / "large", {"train": [1, 0] * 100, "val": [1, 0] * 100}
    )  # as uint32 a 1 each
    (folder / "meta.json").write_text(
        '{"tokenizer": {"kind": "none"}, "vocab_size": 70000, "dtype": "uint32"}'
    )
    run(folder, tmp_path / "run", max_iters=1)
    with pytest.raises(UserError, match="the vocabulary has 70,000 ids, but a label has 16 bits"):
        Teacher(Options(str(tmp_path / "run"), str(folder), "any", device="cpu"))


def test_labels_of_a_folder_without_a_meta_file_know_its_tokens_by_their_hash(
    data, teacher, label, tmp_path
):
    ids = TokenFile(data, "train").ids
    plain = write_nanogpt(tmp_path / "plain", {"train": ids, "val": ids[:100]})
    label("plain", dataset=plain)
    ids = np.array(ids)
    ids[7] ^= 1
    ids.tofile(plain / "train.bin")
    with pytest.raises(UserError, match="made for other data: its tokens_sha256"):
        LabelFile(TokenFile(plain, "train"), "plain")


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("soft", {}),
        ("soft", {"likelihood": "sigmoid"}),
        ("set", {"likelihood": "sigmoid"}),
        ("soft", {"weights": "bayes", "kl_weight": 0.1}),
    ],
    ids=["softmax", "sigmoid", "sigmoid_set", "bayes"],
)
def test_every_head_learns_from_labels_and_resumes_bit_for_bit(data, top, tmp_path, mode, options):
    options = options | {
        "labels": "top",
        "label_mode": mode,
        "dropout": 0.1,
        "eval_interval": 20,
        "max_iters": 40,
    }
    whole = run(data, tmp_path / "whole", **options)
    run(data, tmp_path / "parts", **options | {"max_iters": 20, "lr_decay_iters": 40})
    assert same_weights(run(data, tmp_path / "parts", **options, init_from="resume"), whole)
    first, *_, last = records(tmp_path / "whole", "val_nll")
    assert last["val_nll"] < first["val_nll"] - 0.1


def test_labels_of_weight_0_train_as_none_do(data, top, tmp_path):
    run(data, tmp_path / "with", labels="top", label_weight=0)
    run(data, tmp_path / "without")
    a, b = (
        [record["loss"] for record in records(tmp_path / name, "loss")]
        for name in ("with", "without")
    )
    assert a == pytest.approx(b, rel=1e-4)


def test_a_run_older_than_labels_resumes(data, top, tmp_path):
    run(data, tmp_path / "run", max_iters=2)
    state = read_newest(tmp_path / "run")
    for name in ("labels", "label_mode", "label_weight"):
        del state["config"][name]
    torch.save(state, tmp_path / "run" / "ckpt_00000002.pt")
    run(data, tmp_path / "run", max_iters=4, init_from="resume")


def test_damaged_labels_are_refused(data, teacher, label, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    made = label("copy", dataset=folder)
    for place, value in (
        ((30, 0, 1), 60000),
        ((30, 1, 1), np.float16(-1).view(np.uint16)),
        ((30, 1, 1), 0x7E00),
    ):
        rows = np.memmap(made.path, "<u2", mode="r+", shape=made.rows.shape)
        before, rows[place] = (
            rows[place],
            value,
        )  # an id too high, a weight below 0, one that is no number
        with pytest.raises(UserError, match="damaged"):
            LabelFile(TokenFile(folder, "train"), "copy").targets(
                torch.zeros(1, 40, dtype=torch.int64), np.array([0])
            )
        rows[place] = before
