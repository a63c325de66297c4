"""engine/evaluation.py against the slow formulas, and evaluate.py's table, JSON and plot."""

import contextlib
import dataclasses
import json
import math
import runpy
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from engine.checkpoint import load_model
from engine.distributed import Processes
from engine.evaluation import N_BINS, eval_batches, evaluate, mean_loss, set_scores, whole_split
from engine.logger import read_records
from engine.tokenizer import load_tokenizer
from engine.tokens import TokenFile
from heads import HeadConfig, Prediction, entropy
from model import GPT, GPTConfig
from tests.helpers import HEADS, ROOT, flags, run, write_bytes, write_nanogpt, write_words

CPU = Processes(torch.device("cpu"))
V, T = 67, 16


def tiny_gpt(weights: str = "point", likelihood: str = "categorical", seed: int = 0) -> GPT:
    """An untrained model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    head = HeadConfig(weights=weights, likelihood=likelihood, n_data=500)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=32, head=head)).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> TokenFile:
    """16 blocks and 5 tokens of what a tiny_gpt itself would say: its accuracy is then neither 0 nor 1."""
    torch.manual_seed(0)
    text = tiny_gpt().generate(torch.tensor([[5]]), 16 * T + 5)[0].numpy()
    assert len(text) == 16 * T + 6
    return TokenFile(write_nanogpt(tmp_path_factory.mktemp("data") / "d", {"val": text}), "val")


def slow_scores(model: GPT, file: TokenFile) -> dict[str, float]:
    """The definitions, a token at a time in float64."""
    ids, scores, tops = file.ids.astype(int), [], []
    for start in range(0, len(ids) - 1, T):
        x = torch.tensor(ids[start : min(start + T, len(ids) - 1)])
        for p, target in zip(
            model.log_probs(x[None])[0].exp().double().detach().numpy(), ids[start + 1 :], strict=False
        ):
            onehot = np.eye(V)[target]
            scores.append(
                (-math.log(p[target]), np.sum((p - onehot) ** 2), -np.sum(p * np.log(p)), target == p.argmax())
            )
            tops.append((p.max(), target == p.argmax()))
    nll, brier, entropy, accuracy = np.mean(scores, axis=0)
    ece = 0.0
    for i in range(N_BINS):
        inside = [(c, right) for c, right in tops if i / N_BINS <= c < (i + 1) / N_BINS or (i == N_BINS - 1 and c == 1)]
        if inside:
            confidence, accuracy_here = np.mean(inside, axis=0)
            ece += len(inside) / len(tops) * abs(confidence - accuracy_here)
    values = {"nll": nll, "brier": brier, "entropy": entropy, "accuracy": accuracy, "ece": ece}
    return values | {"perplexity": math.exp(nll), "n_tokens": len(tops)}


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluate_agrees_with_the_definitions_at_every_batch_size(file, weights, likelihood, batch_size):
    model = tiny_gpt(weights, likelihood)
    found = evaluate(model, whole_split(file, T, batch_size), CPU.device)
    expected = slow_scores(model, file)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found["n_tokens"] == len(file) - 1


def test_the_synthetic_model_is_neither_always_right_nor_always_wrong(file):
    scores = slow_scores(tiny_gpt(), file)
    assert 0.1 < scores["accuracy"] < 0.9 and 0.1 < scores["entropy"] < math.log(V)


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
def test_the_whole_split_has_every_target_exactly_once_behind_its_own_context(tmp_path, n):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": np.arange(n)}), "val")
    for batch_size in (1, 3, 16):
        batches = list(whole_split(file, T, batch_size))
        assert sorted(target for _, y in batches for target in y.flatten().tolist()) == list(range(1, n))
        assert all((y == x + 1).all() for x, y in batches)


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_mean_loss_is_the_nll_of_log_probs_and_the_loss_of_training(file, weights, likelihood):
    model = tiny_gpt(weights, likelihood)
    batches = eval_batches(file, T, batch_size=3, n_batches=100)
    found = mean_loss(model, batches, file, CPU, torch.autocast("cpu", enabled=False))
    assert found["val_nll"] == pytest.approx(evaluate(model, blocks_of(file, batches), CPU.device)["nll"], rel=1e-6)
    x, y = (torch.cat(parts) for parts in zip(*blocks_of(file, batches), strict=True))
    assert len(x) == 16
    assert found["val_loss"] == pytest.approx(model(x, y).item(), rel=1e-5)


def blocks_of(file: TokenFile, batches: list[np.ndarray]):
    ids = torch.from_numpy(file.ids.astype(np.int64))
    for starts in batches:
        yield torch.stack([ids[s : s + T] for s in starts]), torch.stack([ids[s + 1 : s + T + 1] for s in starts])


def test_mean_loss_goes_back_to_training_mode(file):
    model = tiny_gpt().train()
    mean_loss(model, eval_batches(file, T, 3, 1), file, CPU, torch.autocast("cpu", enabled=False))
    assert model.training


def test_evaluation_batches_are_distinct_blocks_spread_over_the_split(tmp_path):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": np.arange(1000)}), "val")
    starts = np.concatenate(eval_batches(file, T, batch_size=4, n_batches=3)).tolist()
    assert len(set(starts)) == 12 and starts == sorted(starts) and all(start % T == 0 for start in starts)
    assert starts[0] == 0 and starts[-1] > 0.9 * 999 - T
    everything = np.concatenate(eval_batches(file, T, batch_size=4, n_batches=500))
    assert everything.tolist() == list(range(0, 62 * T, T))


class Oracle(torch.nn.Module):
    """A model that is told the distribution of each token: hidden states are the log-probabilities themselves."""

    def __init__(self, log_probs: torch.Tensor):
        super().__init__()
        self.table = log_probs
        self.lm_head = torch.nn.Module()
        self.lm_head.predict = lambda hiddens, n_samples: Prediction(hiddens[0], entropy(hiddens[0]), None)
        self.lm_head.likelihood = None
        self.kl, self.bayes_layers = lambda: 0.0, list

    def hiddens(self, x: torch.Tensor, n_samples: int) -> list[torch.Tensor]:
        return [self.table[x]]


def oracle_scores(sharpness: float) -> dict[str, float]:
    """The scores of 60,000 tokens drawn from known distributions, as predicted with logits times `sharpness`."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(500, 10)
    x = torch.randint(500, (60, 1000))
    y = torch.multinomial(logits.softmax(-1)[x.flatten()], 1).view_as(x)
    return evaluate(Oracle((sharpness * logits).log_softmax(-1)), [(x, y)], torch.device("cpu"))


def test_a_perfectly_calibrated_prediction_has_no_calibration_error():
    scores = oracle_scores(sharpness=1.0)
    assert scores["ece"] < 0.01 and scores["nll"] == pytest.approx(scores["entropy"], abs=0.01)


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_an_over_or_underconfident_prediction_has_a_calibration_error(sharpness):
    assert oracle_scores(sharpness)["ece"] > 0.1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A softmax and a Bayes-Sig run on words by bytes."""
    root = tmp_path_factory.mktemp("runs")
    data = write_bytes(root / "data")
    run(data, root / "softmax", eval_interval=10)
    run(data, root / "bayes_sigmoid", eval_interval=10, weights="bayes", likelihood="sigmoid")
    return root


def evaluate_py(monkeypatch, **options) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags(device="cpu", **options)])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def png_size(path) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has the right checksum."""
    data, names, at = path.read_bytes(), [], 8
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunk, crc = data[at + 4 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        assert struct.unpack(">I", crc)[0] == zlib.crc32(chunk)
        names.append(chunk[:4])
        at += 12 + length
    assert names[0] == b"IHDR" and names[-1] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_evaluate_py_writes_the_contract_for_every_run_and_a_plot(runs, monkeypatch, capsys):
    evaluate_py(monkeypatch, out_dir=f"{runs}/softmax,{runs}/bayes_sigmoid/", split="val")
    output = capsys.readouterr().out
    softmax, bayes = (json.loads((runs / name / "eval_val.json").read_text()) for name in ("softmax", "bayes_sigmoid"))
    shared = {"nll", "perplexity", "n_tokens", "ece", "brier", "entropy"}
    bayesian = {"mutual_information", "log_sum_sigma", "kl", "kl_weight"}
    assert shared <= softmax.keys() and not bayesian & softmax.keys()
    assert shared | bayesian <= bayes.keys()
    file = TokenFile(runs / "data", "val")
    for found in (softmax, bayes):
        assert found["n_tokens"] == len(file) - 1
        assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
        assert found["bits_per_byte"] == pytest.approx(found["nll"] / math.log(2))  # a token is a byte here
        assert f"{found['nll']:.4f}" in output
    assert softmax["nll"] == pytest.approx(
        evaluate(load_model(runs / "softmax"), whole_split(file, T, 5), CPU.device)["nll"]
    )
    lines = output.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["run", "unigram", "softmax", "bayes_sigmoid"]
    assert min(png_size(runs / "val_nll.png")) > 300


def test_evaluate_py_gives_the_same_numbers_at_every_batch_size(runs, monkeypatch):
    found = []
    for batch_size in (1, 16):
        evaluate_py(monkeypatch, out_dir=runs / "bayes_sigmoid", split="test", batch_size=batch_size)
        found.append(json.loads((runs / "bayes_sigmoid" / "eval_test.json").read_text()))
    numbers = [{name: v for name, v in f.items() if not isinstance(v, str)} for f in found]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-7)


def test_posterior_samples_change_the_prediction_of_bayesian_heads_alone(runs):
    file, scores = TokenFile(runs / "data", "val"), {}
    for name in ("softmax", "bayes_sigmoid"):
        model = load_model(runs / name)
        scores[name] = [evaluate(model, whole_split(file, T, 16), CPU.device, n_samples=n)["nll"] for n in (0, 4)]
    assert scores["softmax"][0] == scores["softmax"][1]
    assert scores["bayes_sigmoid"][0] != scores["bayes_sigmoid"][1]
    assert scores["bayes_sigmoid"][0] == pytest.approx(scores["bayes_sigmoid"][1], rel=0.05)


def test_a_run_with_another_tokenizer_than_the_data_is_refused(runs, tmp_path, monkeypatch, capsys):
    words = write_words(tmp_path / "words")
    with pytest.raises(SystemExit) as exit_:
        evaluate_py(monkeypatch, out_dir=runs / "softmax", dataset=words)
    assert exit_.value.code == 2 and "another tokenizer" in capsys.readouterr().err


def test_a_checkpoint_file_alone_can_be_evaluated_and_sampled(runs, monkeypatch, capsys):
    checkpoint = runs / "softmax" / "ckpt_00000030.pt"
    evaluate_py(monkeypatch, out_dir=checkpoint, dataset=runs / "data", split="test")
    assert "ckpt_00000030.pt" in capsys.readouterr().out
    argv = flags(init_from=checkpoint, start="the ", num_samples=1, max_new_tokens=5, device="cpu")
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("the ")


def test_the_plot_goes_where_it_is_told_to(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "softmax", tmp_path / "softmax")
    evaluate_py(monkeypatch, out_dir=tmp_path / "softmax", split="test", plot=tmp_path / "plots" / "curve.png")
    assert png_size(tmp_path / "plots" / "curve.png") and not (tmp_path / "softmax" / "val_nll.png").exists()


def test_a_run_folder_has_its_tokenizer(runs):
    assert load_tokenizer(runs / "softmax").describe() == {"kind": "byte"}


@pytest.mark.parametrize("estimator", ["local", "sample"])
def test_an_evaluation_with_noise_in_its_loss_repeats_itself(tmp_path, estimator):
    file = TokenFile(write_words(tmp_path), "val")
    model = tiny_gpt("bayes")
    model.lm_head.weights.config = dataclasses.replace(model.config.head, estimator=estimator)
    batches = eval_batches(file, model.config.block_size, batch_size=4, n_batches=3)
    first, second = (mean_loss(model, batches, file, CPU, contextlib.nullcontext()) for _ in range(2))
    assert first == second and first["val_loss"] > first["val_nll"]


def test_a_line_that_a_killed_run_left_unfinished_is_passed_over(tmp_path):
    whole = [{"step": 1, "tokens": 8, "val_nll": 2.5}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(whole[0]) + '\n{"step": 2, "tok')
    assert read_records(tmp_path / "metrics.jsonl") == whole and read_records(tmp_path / "none.jsonl") == []


def test_a_model_with_more_ids_than_its_tokenizer_draws_only_those_of_the_tokenizer():
    model = tiny_gpt()
    idx = model.generate(torch.zeros(4, 1, dtype=torch.long), 50, n_ids=5)
    assert idx.max() < 5 <= model.generate(torch.zeros(4, 1, dtype=torch.long), 50).max()


def test_set_scores_are_scikit_learns_average_precision_and_the_definition_of_recall():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    scores, V = torch.randn(40, 30).round(decimals=1), 30  # rounded: ties
    ids = torch.stack([torch.randperm(V)[:5] for _ in range(40)])
    ids[:10, 4] = ids[:10, 0]  # a repeated id counts once: its second column is no member
    members = torch.ones(40, 5)
    members[:10, 4], members[10:20, 2] = 0, 0
    dense = torch.zeros(40, V).scatter_reduce(-1, ids, members, "amax")
    found = set_scores(scores, ids, members)
    expected = metrics.label_ranking_average_precision_score(dense.numpy(), scores.numpy())
    assert found["lrap"].mean().item() == pytest.approx(expected, rel=1e-6)
    distinct = torch.randn(40, V)  # without ties the K best are a set
    best = torch.zeros(40, V).scatter(-1, distinct.topk(5).indices, 1.0)
    recall = set_scores(distinct, ids, members)["recall_at_k"]
    torch.testing.assert_close(recall, (best * dense).sum(-1) / dense.sum(-1))
