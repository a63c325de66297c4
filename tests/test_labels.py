"""Teacher labels: what the teacher predicts, stored exactly, and what training makes of them."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import augmentation.teacher_labels
from augmentation.teacher_labels import main
from engine.base.files import write_json
from engine.data.batches import Batches
from engine.data.labels import LabelFile, unpack
from engine.data.tokens import TokenFile
from engine.runs.checkpoint import load_model
from tests.helpers import (
    assert_near,
    contents,
    flags,
    records,
    refusal,
    run,
    same_weights,
    write_bytes,
    write_nanogpt,
    write_words,
)

K, T, V = 5, 16, 64  # labels, block_size, the teacher's vocabulary


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def file(data):
    return TokenFile(data, "train")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A run whose vocabulary is padded beyond the tokenizer's."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    run(data, folder, vocab_size=V, max_iters=60, eval_interval=60)
    return folder


@pytest.fixture(scope="module")
def label(data, teacher):
    """Runs the script in this process and opens what it wrote."""

    def make(name: str, **options) -> LabelFile:
        fixed = {"name": name, "teacher": teacher, "device": "cpu", "dtype": "float32"}
        options = {"dataset": data, "k": K} | options | fixed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["teacher_labels.py", *flags(**options)])
            main()
        file = TokenFile(data, "train")
        return LabelFile(file, name)

    return make


@pytest.fixture(scope="module")
def top(label):
    return label("top")


def dense(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """ids, weights (..., K) -> (..., V) float64; an id that appears twice counts twice."""
    zeros = torch.zeros(*ids.shape[:-1], V, dtype=torch.float64)
    return zeros.scatter_add_(-1, ids, weights.double())


def test_top_k_labels_are_the_teachers_likeliest_ids_renormalised(file, teacher, top):
    model = load_model(teacher)
    ids = torch.from_numpy(file[:].astype(np.int64))
    n = len(file)
    for position in [*range(40), *range(n - 25, n - 1)]:
        # the window that labels this position in its last half, or the first window
        window = max(0, -(-(position - T + 1) // (T // 2)))
        context = ids[None, window * T // 2 : position + 1]
        with torch.no_grad():
            log_probs = model.log_probs(context)[0, -1, : file.vocab_size]
        values, expected = log_probs.topk(K)
        found, weights = unpack(top.rows[position])
        assert found.tolist() == expected.tolist()
        torch.testing.assert_close(weights, values.softmax(-1), rtol=1e-3, atol=1e-6)
    assert not top.rows[-1].any()  # nothing follows the last token


@pytest.fixture(scope="module")
def sampled(top) -> None:
    """Labels of the first positions, as an earlier version drew them from the teacher."""
    path = top.path.with_name("train.sampled.labels")
    rows = top.rows.copy()
    rows[2000:] = 0
    rows.tofile(path)
    about = top.about | {"mode": "sample"}
    path.with_name(f"{path.name}.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    "name, mode, weight",
    [
        ("top", "soft", 0.3),
        ("top", "soft", 1.0),
        ("sampled", "soft", 0.3),
        ("sampled", "set", 0.3),
    ],
)
def test_labels_are_the_true_token_and_the_teachers_mixed_or_as_a_set(
    file, top, sampled, name, mode, weight
):
    labels = LabelFile(file, name, mode, weight)
    ids, stored = unpack(labels.rows)
    batches = Batches(file, 200, T, 3, labels)
    _, targets, weights = batches[0]
    positions = torch.from_numpy(batches.starts(0))[:, None] + torch.arange(T)
    y = torch.from_numpy(file[:].astype(np.int64))[positions + 1]
    assert torch.equal(targets[..., 0], y)
    one_hot = torch.nn.functional.one_hot(y, V).double()
    teacher = dense(ids[positions], stored[positions])
    total = teacher.sum(-1, keepdim=True)
    is_used = total > 0
    if name == "top":  # used only if the true token is one of the K
        is_used = (teacher * one_hot).sum(-1, keepdim=True) > 0
    assert 0 < is_used.sum() < is_used.numel()
    mixed = (1 - weight) * one_hot + weight * teacher / total.clamp(min=0.5)
    expected = torch.where(is_used, mixed, one_hot)
    if mode == "set":
        expected = (teacher + one_hot > 0).double()
    assert_near(dense(targets, weights), expected, 2e-7)


def test_interrupted_labelling_is_continued_to_the_same_bytes(file, label, monkeypatch):
    options = {"batch_size": 4}
    whole = label("whole", **options)
    assert whole.rows[:-1, 1].any(-1).all()
    write_json = augmentation.teacher_labels.write_json

    def stopping(path, about):
        write_json(path, about)
        if about["done"] == 21:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(augmentation.teacher_labels, "write_json", stopping)
        with pytest.raises(KeyboardInterrupt):
            label("parts", **options)
    assert "% done" in refusal(LabelFile, file, "parts")
    with open(file.path.with_name("train.parts.labels"), "r+b") as rows:
        rows.seek(4 * K * 22 * T // 2)
        rows.write(b"\xff" * 100)  # written, but not yet counted
    parts = label("parts", **options)
    assert parts.path.read_bytes() == whole.path.read_bytes()
    assert parts.about == whole.about


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "../top"}, "letters"),
        ({"k": 40}, "k = 40"),
        ({"dataset": "bytes"}, "tokenizer"),
        ({"dataset": "high"}, "70"),
        ({"k": 3}, "its k is"),
        ({"name": "alien"}, "json"),
    ],
)
def test_a_mistake_in_labelling_is_refused_and_nothing_changes(
    data, label, top, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    write_bytes(tmp_path / "bytes")
    write_nanogpt(tmp_path / "high", {"train": [70] * 100})
    (data / "train.alien.labels").write_text("mine")
    before = contents(data)
    assert message in refusal(label, **{"name": "top"} | options)
    assert contents(data) == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 1000}, "999"),
        ({"tokens_sha256": "0" * 64}, "tokens_sha256"),
        ({"k": 6}, "size"),
    ],
)
def test_training_refuses_labels_that_are_absent_or_do_not_fit(
    data, top, tmp_path, changes, message
):
    assert "teacher_labels.py" in refusal(run, data, tmp_path / "new", labels="absent")
    write_json(data / "train.other.labels.json", top.about | changes)
    shutil.copy(top.path, data / "train.other.labels")
    assert message in refusal(run, data, tmp_path / "new", labels="other")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("weights", ["point", "bayes"])
def test_training_on_labels_learns_and_resumes_bit_for_bit(data, top, tmp_path, weights):
    options = {"labels": "top", "weights": weights, "dropout": 0.1}
    options |= {"eval_interval": 20, "max_iters": 40}
    whole = run(data, tmp_path / "whole", **options)
    half = {"max_iters": 20, "lr_decay_iters": 40}
    run(data, tmp_path / "parts", **options | half)
    resumed = run(data, tmp_path / "parts", **options, init_from="resume")
    assert same_weights(resumed, whole)
    first, *_, last = records(tmp_path / "whole", "val_nll")
    assert last["val_nll"] < first["val_nll"] - 0.1


@pytest.mark.parametrize(
    "row, value",
    [(0, 60000), (1, 0x7E00)],  # an id that is too high, and nan
)
def test_damaged_labels_are_refused(file, top, row, value):
    rows = top.rows.copy()
    rows[30, row, 1] = value
    path = top.path.with_name("train.damaged.labels")
    rows.tofile(path)
    path.with_name(f"{path.name}.json").write_text(json.dumps(top.about))
    labels = LabelFile(file, "damaged")
    assert "damaged;" in refusal(labels.targets, torch.zeros(1, 40).long(), np.array([0]))
