"""harness.py answers as lm-evaluation-harness' own model does, text by text."""

import math
from pathlib import Path

import pytest

import hellaswag
from engine.base.errors import UserError
from engine.data.tokenizer import BPETokenizer
from engine.runs.checkpoint import read_checkpoint
from tests.conftest import shared_data
from tests.helpers import refused, tiny_gpt
from tests.test_export import exported, save

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm_eval[hf]==0.4.13'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    lines = shared_data("hellaswag/hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()
    beyond_ascii = [line for line in lines if "\\u" in line]
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    path.write_text("\n".join(lines[::400] + beyond_ascii[::9]))
    return path


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory) -> Path:
    """Two runs of other heads with one BPE; some items are too long for them."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = BPETokenizer.train([source.read_text()], 700)
    shape = {"vocab_size": tokenizer.vocab_size, "block_size": 128, "std": 0.3}
    save(root / "softmax", tiny_gpt(logit_bias="unigram", **shape), tokenizer)
    save(root / "bayes", tiny_gpt("bayes", "sigmoid", **shape), tokenizer)
    return root


def ours(runs: Path, *names: str, n_samples: int = 0):
    from harness import HarnessConfig, HarnessLM

    source = "+".join(str(runs / name) for name in names)
    return HarnessLM(HarnessConfig(source, n_samples=n_samples, device="cpu"))


def answers(lm, kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return getattr(lm, kind)([Instance(kind, {}, one, 0) for one in arguments])


def test_every_request_is_answered_as_by_the_harness_own_model(source, runs, tmp_path):
    from lm_eval.models.huggingface import HFLM

    folder = exported(runs / "softmax", tmp_path / "gpt2")
    theirs = HFLM(str(folder), device="cpu", batch_size=1)
    lm = ours(runs, "softmax")
    text = source.read_text()
    contexts = [text[i : i + 90] for i in range(0, 900, 90)]

    for options in ({"max_gen_toks": 1}, {"until": ["|", "a"], "max_gen_toks": 9}):
        asked = [(context, options) for context in contexts]
        expected = answers(theirs, "generate_until", *asked)
        found = answers(lm, "generate_until", *asked)
        for one, other in zip(expected, found, strict=True):
            assert one.rstrip("\ufffd") == other.rstrip("\ufffd")  # half a character

    asked = [*zip(contexts, expected, strict=True), ("", "a man"), ("a ", "b")]
    expected = answers(theirs, "loglikelihood", *asked)
    found = answers(lm, "loglikelihood", *asked)
    assert [log_p for log_p, _ in found] == pytest.approx([log_p for log_p, _ in expected])
    are_greedy = [is_greedy for _, is_greedy in found]
    assert are_greedy == [is_greedy for _, is_greedy in expected]
    assert set(are_greedy) == {True, False}

    asked = [(text[:n],) for n in (1, 300, 3000)]
    expected = answers(theirs, "loglikelihood_rolling", *asked)
    assert answers(lm, "loglikelihood_rolling", *asked) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["softmax", "bayes"])
def test_endings_have_the_scores_of_hellaswag_py_item_by_item(source, runs, name):
    config = hellaswag.HellaSwagConfig(str(runs / name), source=str(source), device="cpu")
    items = hellaswag.read_items(config)
    expected, _ = hellaswag.score(config, read_checkpoint(runs / name), items)
    asked = [(context, ending) for context, endings, _ in items for ending in endings]
    found = [log_p for log_p, _ in answers(ours(runs, name), "loglikelihood", *asked)]
    assert found == pytest.approx(expected.flatten().tolist(), rel=1e-5)


def test_an_ensemble_scores_by_the_mean_probability_and_cannot_generate(runs):
    ensemble = ours(runs, "softmax", "bayes", n_samples=-1)
    members = (ours(runs, "softmax"), ours(runs, "bayes", n_samples=-1))
    probabilities = []
    for lm in (ensemble, *members):
        ((log_p, _),) = answers(lm, "loglikelihood", ("a man", " a"))
        probabilities.append(math.exp(log_p))
    found, *parts = probabilities
    assert found == pytest.approx(sum(parts) / 2, rel=1e-5)
    with pytest.raises(UserError, match="ensemble"):
        answers(ensemble, "generate_until", ("a man", {"until": ["."]}))


def test_a_task_that_the_harness_does_not_know_is_named(runs):
    assert "'lambda'" in refused("harness.py", ["--tasks=lambda"], runs)
