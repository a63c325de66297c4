"""harness.py answers as lm-evaluation-harness' own model and hellaswag.py do, text by text."""

import json
from pathlib import Path

import pytest
import torch

import hellaswag
from engine.base.errors import UserError
from engine.data.tokenizer import BPETokenizer
from engine.eval.ensemble import load
from engine.runs.checkpoint import read_checkpoint
from tests.conftest import shared_data
from tests.helpers import refused, tiny_gpt
from tests.test_export import exported, save

WHY = "lm_eval is not installed: pip install 'lm_eval[hf]==0.4.13'"
lm_eval = pytest.importorskip("lm_eval", reason=WHY)
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason=WHY)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def items() -> list[dict]:
    path = shared_data("hellaswag/hellaswag_val.jsonl")
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    beyond_ascii = [item for item in items if not "".join(item["endings"]).isascii()]
    items = items[::400] + beyond_ascii[::9]
    for item in items:
        item["label"] = str(item["label"])  # as on the Hub
    return items


@pytest.fixture(scope="module")
def runs(items, tmp_path_factory) -> Path:
    """Two runs of other heads with one BPE, and the first exported."""
    root = tmp_path_factory.mktemp("runs")
    texts = [text for item in items for text in (item["ctx"], *item["endings"])]
    tokenizer = BPETokenizer.train(texts, 700)  # some items are too long for the model
    shape = {"vocab_size": tokenizer.vocab_size, "block_size": 128}
    softmax = tiny_gpt(std=0.3, logit_bias="unigram", **shape)
    bayes = tiny_gpt("bayes", "sigmoid", std=0.2, **shape)
    save(root / "softmax", softmax, tokenizer)
    save(root / "bayes", bayes, tokenizer)
    exported(root / "softmax", root / "gpt2")
    return root


def ours(runs: Path, *names: str, n_samples: int = 0):
    from harness import HarnessConfig, HarnessLM

    source = "+".join(str(runs / name) for name in names)
    return HarnessLM(HarnessConfig(source, n_samples=n_samples, device="cpu"))


@pytest.mark.parametrize(("name", "n_samples"), [("softmax", 0), ("bayes", -1), ("gpt2", 0)])
def test_hellaswag_has_the_scores_of_hellaswag_py(
    name, n_samples, items, runs, tmp_path, monkeypatch
):
    import datasets
    import lm_eval.tasks

    splits = dict.fromkeys(("train", "validation"), datasets.Dataset.from_list(items))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    task = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    lm = ours(runs, name, n_samples=n_samples)
    if name == "gpt2":  # the harness' own model
        lm = huggingface.HFLM(str(runs / name), device="cpu", batch_size=8)
    manager = lm_eval.tasks.TaskManager(include_path=task, include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=["hellaswag"], task_manager=manager)
    samples = sorted(found["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])

    source = tmp_path / "items.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    config = hellaswag.HellaSwagConfig(
        out_dir=str(runs / name),
        source=str(source),
        style="harness",
        n_samples=n_samples,
        device="cpu",
    )
    prepared = hellaswag.read_items(config)
    log_probs, lengths = hellaswag.score(config, read_checkpoint(runs / name), prepared)
    for expected, n_chars, sample in zip(log_probs, lengths, samples, strict=True):
        responses = [float(response[0]) for response in sample["filtered_resps"]]
        assert responses == pytest.approx(expected.tolist(), rel=1e-4)
        assert n_chars.tolist() == [len(choice) for choice in sample["doc"]["choices"]]
    labels = torch.tensor([item.label for item in prepared])
    for key, value in hellaswag.judge(log_probs, lengths, labels).items():
        if key.startswith("acc"):
            assert value == pytest.approx(found["results"]["hellaswag"][f"{key},none"])


def requests(kind: str, *arguments: tuple) -> list:
    return [lm_eval.api.instance.Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_every_request_is_answered_as_by_the_harness_own_model(items, runs):
    theirs = huggingface.HFLM(str(runs / "gpt2"), device="cpu", batch_size=1)
    lm = ours(runs, "softmax")
    contexts = [item["ctx"] for item in items[:4]]
    greedy = theirs.generate_until(
        requests("generate_until", *((context, {"max_gen_toks": 3}) for context in contexts))
    )
    pairs = [*zip(contexts, greedy, strict=True), (contexts[0], " a"), ("", "a man"), ("a ", "b")]
    asked = requests("loglikelihood", *pairs)
    found, expected = lm.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected])
    are_greedy = [is_greedy for _, is_greedy in found]
    assert are_greedy == [is_greedy for _, is_greedy in expected] and len(set(are_greedy)) == 2

    texts = [("".join(contexts * n),) for n in (1, 3)] + [("a",)]
    asked = requests("loglikelihood_rolling", *texts)
    assert lm.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked))

    stop = greedy[0][1:3]  # within the text
    options = [{"max_gen_toks": 3}, {"until": ["|", stop], "max_gen_toks": 9, "do_sample": False}]
    asked = requests("generate_until", *((contexts[0], option) for option in options))
    assert lm.generate_until(asked) == theirs.generate_until(asked)


def test_a_task_that_the_harness_does_not_know_is_named(runs, monkeypatch, capsys):
    assert "'lambda'" in refused("harness.py", ["--tasks=lambda"], runs, monkeypatch, capsys)


def test_an_ensemble_scores_by_the_mean_probability_and_cannot_generate(runs):
    lm = ours(runs, "softmax", "bayes", n_samples=-1)
    model, _ = load(lm.config.out_dir)
    context, ending = lm.tok_encode("a man"), lm.tok_encode(" is")
    idx = torch.tensor([context + ending])
    parts = [member.log_probs(idx[:, :-1], -1).exp() for member in model.members]
    log_probs = (sum(parts) / 2).log()[0, len(context) - 1 :]
    expected = log_probs.gather(1, idx[:, len(context) :].T).sum().item()
    ((found, _),) = lm.loglikelihood(requests("loglikelihood", ("a man", " is")))
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="ensemble"):
        lm.generate_until(requests("generate_until", ("a man", {"until": ["."]})))
