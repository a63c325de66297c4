"""engine/eval/diversity.py: what is judged is the continuation alone, and its numbers are those of
slow loops.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch

from engine.base.errors import UserError
from engine.data.tokenizer import ByteTokenizer, CharTokenizer
from engine.data.tokens import TokenFile
from engine.eval.diversity import (
    continuations,
    diversity,
    prompts,
    self_bleu,
)
from engine.eval.generation import generate
from tests.helpers import WORDS, tiny_gpt, write_dataset, write_words

EOT = ByteTokenizer.eot
# "decodes" ids to themselves
IDS = SimpleNamespace(eot=EOT, vocab_size=200, decode=list)


def random_texts(n: int, longest: int, seed: int = 0) -> list[str]:
    """Texts of 0 ... longest words, punctuation among them."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice([*WORDS, "sea,", "ship."], rng.integers(longest + 1))) for _ in range(n)
    ]


def slow_self_bleu(texts: list[str]) -> float:
    others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
    bleus = [sacrebleu.sentence_bleu(text, rest) for text, rest in zip(texts, others, strict=True)]
    return sum(bleu.score for bleu in bleus) / len(bleus)


@pytest.mark.parametrize("longest", [1, 3, 8, 40])
def test_self_bleu_is_the_mean_of_sacrebleus_sentences(longest):
    texts = [text for text in random_texts(40, longest, seed=longest) if text]
    assert self_bleu(texts) == pytest.approx(slow_self_bleu(texts), rel=1e-12)
    assert self_bleu([*texts, "", " \n"]) == pytest.approx(slow_self_bleu(texts), rel=1e-12)


def test_self_bleu_of_the_same_text_is_100_and_of_other_words_0():
    assert self_bleu(["the old man looked at the sea ."] * 3) == pytest.approx(100)
    assert self_bleu(["a b c d", "e f g h", "i j k l"]) == 0


def test_distinct_is_the_slow_formula():
    texts = random_texts(30, 12)
    result = diversity(texts)
    for n in (1, 2, 3, 4):
        seen, total = [], 0
        for text in texts:
            words = text.split()
            for i in range(len(words)):
                if len(words[i:]) >= n:
                    total += 1
                    if words[i : i + n] not in seen:
                        seen.append(words[i : i + n])
        assert result[f"distinct_{n}"] == pytest.approx(len(seen) / total)
    assert result["n_words"] == sum(len(text.split()) for text in texts)


@pytest.mark.parametrize(
    "texts", [[], [""], ["word"], ["", ""], ["word", ""], ["one", "two"], ["\n", "a b"]]
)
def test_of_little_text_every_number_is_a_number_or_none(texts):
    result = diversity(texts)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert all(
        value is None or isinstance(value, str) or math.isfinite(value) for value in result.values()
    )
    assert result["n_texts"] == len(texts) and (result["distinct_1"] is None) == (
        result["n_words"] == 0
    )


class Scripted(torch.nn.Module):
    """Writes, behind each prompt, its first id + 100, + 101 ..., and end-of-text after as many
    tokens as that id.
    """

    def __init__(self):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.zeros(1)), []

    def generate(self, idx, max_new_tokens, **options):
        self.asked.append(options)
        i, first = torch.arange(max_new_tokens), idx[:, :1]
        return torch.cat([idx, torch.where(first == i, EOT, first + 100 + i)], dim=1)


def test_the_prompt_is_no_part_of_a_continuation_and_end_of_text_ends_it(monkeypatch):
    monkeypatch.setattr("engine.eval.diversity.BATCH_SIZE", 2)
    monkeypatch.setattr("engine.eval.diversity.generate", Scripted.generate)
    model, ids = Scripted(), torch.tensor([[3, 50], [0, 51], [9, 52], [2, 53], [1, 54]])
    found = continuations(model, IDS, ids, 5, top_k=7)
    assert found == [[103, 104, 105], [], [109, 110, 111, 112, 113], [102, 103], [101]]
    assert len(model.asked) == 3 and model.asked[0]["top_k"] == 7 and model.asked[0]["n_ids"] == 200
    without_eot = SimpleNamespace(eot=None, vocab_size=200, decode=list)
    assert continuations(model, without_eot, ids[1:2], 2) == [[EOT, 101]]


@pytest.mark.parametrize("weights", ["point", "bayes"])
def test_the_same_call_writes_the_same_text(weights):
    model, ids = tiny_gpt(weights, std=0.3), torch.arange(10).view(5, 2)
    options = {
        "max_new_tokens": 20,
        "n_samples": 2 * (weights == "bayes"),
    }
    tokenizer = SimpleNamespace(eot=None, vocab_size=60, decode=list)
    first = continuations(model, tokenizer, ids, **options)
    torch.rand(3)
    assert continuations(model, tokenizer, ids, **options) == first
    assert [len(row) for row in first] == [20] * 5 and max(map(max, first)) < 60


def test_greedy_text_depends_on_the_model_alone(monkeypatch):
    ids = torch.arange(10).view(5, 2)
    greedy = []
    for batch_size in (1, 2, 5):
        monkeypatch.setattr("engine.eval.diversity.BATCH_SIZE", batch_size)
        # past block_size, too
        greedy.append(continuations(tiny_gpt(std=0.3), IDS, ids, 20, temperature=0))
    assert greedy[0] == greedy[1] == greedy[2]
    model = tiny_gpt(std=0.3)
    whole = generate(model, ids, 20, temperature=0, n_ids=200)
    assert greedy[0] == whole[:, 2:].tolist()


def test_prompts_are_the_beginnings_of_documents_where_enough_are_long_enough(tmp_path):
    documents = [
        f"{chr(97 + i)} document " + "x" * (i % 3) * 9 for i in range(12)
    ]  # 11, 20 or 29 bytes
    write_dataset(tmp_path, {"test": documents}, tokenizer := ByteTokenizer())
    file = TokenFile(tmp_path, "test")
    texts = [tokenizer.decode(row) for row in prompts(file, tokenizer.eot, 4, 15).tolist()]
    assert [text[0] for text in texts] == [
        "b",
        "e",
        "h",
        "k",
    ]  # every other one of the eight that have 20 or 29
    assert all(any(document.startswith(text) for document in documents) for text in texts)
    longer = prompts(file, tokenizer.eot, 4, 20)  # one of 20 bytes would leave nothing to continue
    assert longer[:, 0].tolist() == [*b"cfil"]
    nine = prompts(file, tokenizer.eot, 9, 15)
    apart = np.arange(9) * (len(file) - 14) // 9
    assert (
        nine.tolist() == [file.ids[start : start + 15].tolist() for start in apart]
        and nine.dtype == torch.int64
    )
    assert prompts(file, tokenizer.eot, 12, 10)[:, 0].tolist() == [
        ord(document[0]) for document in documents
    ]


def test_prompts_of_a_split_without_end_of_text_are_evenly_spaced(tmp_path):
    file, tokenizer = TokenFile(write_words(tmp_path), "test"), CharTokenizer("abc")
    found = prompts(file, tokenizer.eot, 5, 8)
    assert torch.equal(found, prompts(file, tokenizer.eot, 5, 8)) and found.shape == (5, 8)
    assert found[0].tolist() == file.ids[:8].tolist()
    for n, length in ((5, len(file)), (len(file), 2)):
        with pytest.raises(UserError):
            prompts(file, tokenizer.eot, n, length)
