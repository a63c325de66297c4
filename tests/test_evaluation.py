"""engine/eval/evaluation.py against the slow formulas."""

import contextlib
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from engine.base.distributed import Processes
from engine.data.tokenizer import CharTokenizer
from engine.data.tokens import TokenFile
from engine.data.windows import eval_batches, windows
from engine.eval.evaluation import (
    NOISE_GROUP,
    evaluate,
    score_windows,
    set_scores,
)
from engine.eval.generation import generate
from engine.eval.table import flat
from engine.eval.texts import TextStats
from engine.eval.validation import N_BINS, mean_loss
from engine.runs.logger import read_records
from heads import HeadConfig, Prediction
from heads.draws import entropy
from model import GPT, GPTConfig
from tests.helpers import HEADS, scores, scores_of, write_nanogpt, write_words

CPU = Processes(torch.device("cpu"))
V, T = 67, 16


def tiny_gpt(weights: str = "point", likelihood: str = "categorical", seed: int = 0) -> GPT:
    """An untrained model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    head = HeadConfig(weights=weights, likelihood=likelihood, n_data=500)
    model = GPT(
        GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=32, head=head)
    ).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> TokenFile:
    """16 blocks and 5 tokens of what a tiny_gpt itself would say: its accuracy is then neither 0
    nor 1.
    """
    torch.manual_seed(0)
    text = generate(tiny_gpt(), torch.tensor([[5]]), 16 * T + 5)[0].numpy()
    assert len(text) == 16 * T + 6
    return TokenFile(write_nanogpt(tmp_path_factory.mktemp("data") / "d", {"val": text}), "val")


def slow_scores(model: GPT, file: TokenFile) -> dict[str, float]:
    """The definitions, a token at a time in float64."""
    ids, scores, tops = file.ids.astype(int), [], []
    for start in range(0, len(ids) - 1, T):
        x = torch.tensor(ids[start : min(start + T, len(ids) - 1)])
        for p, target in zip(
            model.log_probs(x[None])[0].exp().double().detach().numpy(),
            ids[start + 1 :],
            strict=False,
        ):
            onehot = np.eye(V)[target]
            scores.append(
                [
                    -math.log(p[target]),
                    np.sum((p - onehot) ** 2),
                    -np.sum(p * np.log(p)),
                    target == p.argmax(),
                ]
                + [p.max()]
            )
            tops.append((p.max(), target == p.argmax()))
    nll, brier, entropy, accuracy, mean_confidence = np.mean(scores, axis=0)
    ece = 0.0
    for i in range(N_BINS):
        inside = [
            (c, right)
            for c, right in tops
            if i / N_BINS <= c < (i + 1) / N_BINS or (i == N_BINS - 1 and c == 1)
        ]
        if inside:
            confidence, accuracy_here = np.mean(inside, axis=0)
            ece += len(inside) / len(tops) * abs(confidence - accuracy_here)
    values = {"nll": nll, "brier": brier, "entropy": entropy, "accuracy": accuracy, "ece": ece}
    values |= {"confidence": mean_confidence}
    return values | {"perplexity": math.exp(nll), "n_tokens": len(tops)}


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluate_agrees_with_the_definitions_at_every_batch_size(
    file, weights, likelihood, batch_size
):
    model = tiny_gpt(weights, likelihood)
    found = scores_of(model, file, batch_size)
    expected = slow_scores(model, file)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found["n_tokens"] == len(file) - 1


def test_the_synthetic_model_is_neither_always_right_nor_always_wrong(file):
    found = slow_scores(tiny_gpt(), file)
    assert 0.1 < found["accuracy"] < 0.9 and 0.1 < found["entropy"] < math.log(V)


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
def test_the_whole_split_has_every_target_exactly_once_behind_its_own_context(tmp_path, n):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": np.arange(n)}), "val")
    for batch_size in (1, 3, 16):
        batches = list(windows(file, T, batch_size))
        assert [target for batch in batches for target in batch.y.flatten().tolist()] == list(
            range(1, n)
        )
        assert all(
            (batch.y == batch.x + 1).all() and (batch.at == batch.y).all() for batch in batches
        )


@pytest.mark.parametrize("stride", [1, 5, 11, 16])
@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
def test_with_a_stride_every_target_counts_once_behind_at_least_the_rest_of_a_window(
    tmp_path, n, stride
):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": np.arange(n)}), "val")
    for batch_size in (1, 3, 16):
        batches = list(windows(file, T, batch_size, stride=stride))
        counted = [
            (y, y - x[0])
            for b in batches
            for x, ys in zip(b.x, b.y, strict=True)
            for y in ys[b.first :].tolist()
        ]
        assert [y for y, _ in counted] == list(range(1, n))
        assert all(context >= min(y, T - stride + 1) for y, context in counted)
        assert all(
            batch.at.flatten().tolist() == batch.y[:, batch.first :].flatten().tolist()
            for batch in batches
        )


def test_more_context_by_a_stride_is_what_the_model_says_of_those_windows(file):
    model, ids = tiny_gpt(), torch.from_numpy(file.ids.astype(np.int64))
    model.transformer.wpe.weight.data.mul_(
        30
    )  # as no untrained model is: where a token stands matters
    expected = []
    for end in range(1, len(ids)):  # with stride 1 each token has all the context there is
        log_probs = model.log_probs(ids[max(0, end - T) : end][None])[0, -1]
        expected.append(-log_probs[ids[end]].item())
    found = [scores_of(model, file, stride=stride)["nll"] for stride in (0, 1)]
    assert (
        found[1] == pytest.approx(np.mean(expected), rel=1e-5) and abs(found[0] - found[1]) > 1e-3
    )


@pytest.mark.parametrize("posterior", ["row", "full"])
@pytest.mark.parametrize("bayes_mlp", [False, True])
def test_the_draws_of_a_token_do_not_depend_on_what_else_is_in_its_batch(
    file, posterior, bayes_mlp
):
    torch.manual_seed(0)
    head = HeadConfig("bayes", n_data=500, posterior=posterior)
    model = GPT(GPTConfig(T, V, 1, 2, 32, bayes_mlp=bayes_mlp, head=head)).eval()
    for layer in model.bayes_layers():
        torch.nn.init.constant_(layer.log_std, -1.0)
    for stride in (0, 5):
        found = [flat(scores_of(model, file, n, n_samples=3, stride=stride)) for n in (1, 4, 16)]
        assert found[0]["mutual_information"] > 1e-3
        assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(
            found[0], rel=1e-5
        )


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_mean_loss_is_the_nll_of_log_probs_and_the_loss_of_training(file, weights, likelihood):
    model = tiny_gpt(weights, likelihood)
    batches = eval_batches(file, T, batch_size=3, n_batches=100)
    found = mean_loss(model, batches, file, CPU, torch.autocast("cpu", enabled=False))
    assert found["val_nll"] == pytest.approx(
        scores(model, *blocks_of(file, batches))["nll"], rel=1e-6
    )
    x, y = (torch.cat(parts) for parts in zip(*blocks_of(file, batches), strict=True))
    assert len(x) == 16
    assert found["val_loss"] == pytest.approx(model(x, y).item(), rel=1e-5)


def blocks_of(file: TokenFile, batches: list[np.ndarray]):
    ids = torch.from_numpy(file.ids.astype(np.int64))
    for starts in batches:
        yield (
            torch.stack([ids[s : s + T] for s in starts]),
            torch.stack([ids[s + 1 : s + T + 1] for s in starts]),
        )


def test_mean_loss_goes_back_to_training_mode(file):
    model = tiny_gpt().train()
    mean_loss(model, eval_batches(file, T, 3, 1), file, CPU, torch.autocast("cpu", enabled=False))
    assert model.training


def test_evaluation_batches_are_distinct_blocks_spread_over_the_split(tmp_path):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": np.arange(1000)}), "val")
    starts = np.concatenate(eval_batches(file, T, batch_size=4, n_batches=3)).tolist()
    assert (
        len(set(starts)) == 12
        and starts == sorted(starts)
        and all(start % T == 0 for start in starts)
    )
    assert starts[0] == 0 and starts[-1] > 0.9 * 999 - T
    everything = np.concatenate(eval_batches(file, T, batch_size=4, n_batches=500))
    assert everything.tolist() == list(range(0, 62 * T, T))


class Oracle(torch.nn.Module):
    """A model that is told the distribution of each token: hidden states are the log-probabilities
    themselves.
    """

    def __init__(self, log_probs: torch.Tensor):
        super().__init__()
        self.table = log_probs
        self.lm_head = torch.nn.Module()
        self.lm_head.predict = lambda hiddens, n_samples: Prediction(
            hiddens[0], entropy(hiddens[0]), None
        )
        self.lm_head.likelihood = None
        self.kl, self.bayes_layers = lambda: 0.0, list

    def hiddens(self, x: torch.Tensor, n_samples: int) -> list[torch.Tensor]:
        return [self.table[x]]


def oracle_scores(sharpness: float) -> dict[str, float]:
    """The scores of 60,000 tokens drawn from known distributions, as predicted with logits times
    `sharpness`.
    """
    torch.manual_seed(0)
    logits = 2 * torch.randn(500, 10)
    x = torch.randint(500, (60, 1000))
    y = torch.multinomial(logits.softmax(-1)[x.flatten()], 1).view_as(x)
    return scores(Oracle((sharpness * logits).log_softmax(-1)), (x, y))


def test_a_perfectly_calibrated_prediction_has_no_calibration_error():
    found = oracle_scores(sharpness=1.0)
    assert found["ece"] < 0.01 and found["nll"] == pytest.approx(found["entropy"], abs=0.01)


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_an_over_or_underconfident_prediction_has_a_calibration_error(sharpness):
    assert oracle_scores(sharpness)["ece"] > 0.1


@pytest.mark.parametrize("estimator", ["local", "sample"])
def test_an_evaluation_with_noise_in_its_loss_repeats_itself(tmp_path, estimator):
    file = TokenFile(write_words(tmp_path), "val")
    model = tiny_gpt("bayes")
    model.lm_head.weights.config = dataclasses.replace(model.config.head, estimator=estimator)
    batches = eval_batches(file, model.config.block_size, batch_size=4, n_batches=3)
    first, second = (
        mean_loss(model, batches, file, CPU, contextlib.nullcontext()) for _ in range(2)
    )
    assert first == second and first["val_loss"] > first["val_nll"]


def test_a_line_that_a_killed_run_left_unfinished_is_passed_over(tmp_path):
    whole = [{"step": 1, "tokens": 8, "val_nll": 2.5}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(whole[0]) + '\n{"step": 2, "tok')
    assert (
        read_records(tmp_path / "metrics.jsonl") == whole
        and read_records(tmp_path / "none.jsonl") == []
    )


def test_a_model_with_more_ids_than_its_tokenizer_draws_only_those_of_the_tokenizer():
    model = tiny_gpt()
    idx = generate(model, torch.zeros(4, 1, dtype=torch.long), 50, n_ids=5)
    assert idx.max() < 5 <= generate(model, torch.zeros(4, 1, dtype=torch.long), 50).max()


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


@pytest.mark.parametrize("stride", [0, 5])
def test_a_limit_takes_whole_windows_spread_over_the_split_and_all_there_is_where_it_is_large(
    file, stride
):
    whole = [b.at.tolist() for b in windows(file, T, 1, stride=stride)]
    full = [at for (at,) in whole][
        : (len(file) - 1 - T) // (stride or T) + 1
    ]  # what is left is shorter
    for limit in (1, 3, 7, len(full), len(full) + 1, 1000):
        batches = list(windows(file, T, 4, limit, stride))
        found = [at for batch in batches for at in batch.at.tolist()]
        expected = (
            [full[k * len(full) // limit] for k in range(limit)]
            if limit <= len(full)
            else sum(whole, [])
        )
        assert found == expected
        assert all(
            (batch.y[:, batch.first :].numpy() == file.ids[batch.at]).all() for batch in batches
        )


def test_neighbouring_tokens_share_their_draws_and_others_have_draws_of_their_own(tmp_path):
    file = TokenFile(write_nanogpt(tmp_path / "d", {"val": np.full(16 * T + 1, 7)}), "val")
    model = tiny_gpt("bayes")
    torch.nn.init.constant_(model.lm_head.weights.log_std, -1.0)
    (batch,) = windows(
        file, T, 16
    )  # all windows say the same, so only their noise tells them apart
    with torch.no_grad():
        nll = score_windows(model, batch, CPU.device, 2)["nll"].view(16, T)[
            :, :-1
        ]  # the last token is of the next group
    groups = nll.view(4, NOISE_GROUP // T, T - 1)
    torch.testing.assert_close(groups, groups[:, :1].expand_as(groups), rtol=1e-5, atol=0)
    apart = (groups[:, None, 0] - groups[None, :, 0]).abs().amax(-1)
    assert (apart > 1e-3).sum() == 12  # each of the four from each other one


@pytest.mark.parametrize("stride", [0, 5])
def test_bytes_and_words_are_those_of_the_targets_whatever_the_windows(file, stride):
    tokenizer = CharTokenizer(
        [" ", *"abcdé", *map(chr, range(0x66, 0x7B)), *map(chr, range(0x100, 0x128))]
    )  # 1 and 2 bytes
    text, targets = TextStats(tokenizer, torch.full((V,), 1 / V)), file.ids[1:]
    assert len(tokenizer.decode(file.ids[:1]).encode()) != len(
        tokenizer.decode(file.ids[-1:]).encode()
    )
    batches = windows(file, T, 3, stride=stride)
    result = evaluate(tiny_gpt(), batches, CPU, text=text).result()
    assert text.n_bytes == len(tokenizer.decode(targets).encode()) > len(targets)
    assert result["n_tokens"] == len(targets)
    assert text.n_words == len(tokenizer.decode(targets).split()) > 1
    assert result["unigram_nll"] == pytest.approx(math.log(V))


def test_what_an_evaluation_keeps_does_not_grow_with_the_text_and_is_never_v_wide(
    tmp_path, monkeypatch
):
    model, kept, widths = tiny_gpt("bayes"), [], []
    predict = model.lm_head.predict
    monkeypatch.setattr(
        model.lm_head, "predict", lambda x, n: widths.append(x[0].size(0)) or predict(x, n)
    )
    for n in (40 * T, 400 * T):
        file = TokenFile(write_nanogpt(tmp_path / f"{n}", {"val": np.arange(n) % V}), "val")
        for n_samples in (0, 2):
            tally = evaluate(model, windows(file, T, 16), CPU, n_samples=n_samples)
            kept.append({name: part.shape for name, part in tally.parts.items()})
    assert kept[0] == kept[1] == kept[2] == kept[3] and max(widths) <= 64
    assert not any(V in shape for shape in kept[0].values())
