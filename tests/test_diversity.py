"""Self-BLEU and distinct-n of continuations, and the prompts they follow."""

from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch

from engine.base.errors import UserError
from engine.data.tokenizer import ByteTokenizer
from engine.data.tokens import TokenFile
from engine.eval.diversity import continuations, diversity, prompts, self_bleu
from tests.helpers import WORDS, tiny_gpt, write_dataset

EOT = ByteTokenizer.eot
TOKENIZER = SimpleNamespace(eot=EOT, vocab_size=60, decode=list)


@pytest.fixture
def texts() -> list[str]:
    """40 texts of 1 to 8 words, with punctuation."""
    rng = np.random.default_rng(0)
    words = [*WORDS, "sea,", "ship."]
    return [" ".join(rng.choice(words, n)) for n in rng.integers(1, 9, 40)]


def test_self_bleu_is_the_mean_of_sacrebleus_sentences_without_empty_texts(texts):
    scores = []
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1 :]
        scores.append(sacrebleu.sentence_bleu(text, others).score)
    assert self_bleu([*texts, "", " \n"]) == pytest.approx(np.mean(scores), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_n_is_the_share_of_distinct_n_grams(texts, n):
    ngrams = []
    for text in texts:
        words = text.split()
        ngrams += [" ".join(words[i : i + n]) for i in range(len(words))]
    ngrams = [ngram for ngram in ngrams if ngram.count(" ") == n - 1]
    expected = len(set(ngrams)) / len(ngrams)
    assert diversity(texts)[f"distinct_{n}"] == pytest.approx(expected)


@pytest.mark.parametrize("texts", [[], ["\n", "a b"], ["one", "two"]])
def test_scores_that_little_text_does_not_have_are_none(texts):
    result = diversity(texts)
    assert (result["distinct_1"] is None) == (result["n_words"] == 0)
    assert (result["self_bleu"] is None) == (texts != ["one", "two"])


def test_a_continuation_begins_after_the_prompt_and_ends_at_end_of_text(monkeypatch):
    def scripted(model, ids, max_new_tokens, **options):
        """first id + 100, + 101, ..., and end-of-text after as many tokens as that id"""
        i = torch.arange(max_new_tokens)
        first = ids[:, :1]
        continuation = torch.where(first == i, EOT, first + 100 + i)
        return torch.cat([ids, continuation], dim=1)

    monkeypatch.setattr("engine.eval.diversity.generate", scripted)
    ids = torch.tensor([[3, 50], [0, 51], [9, 52]])
    expected = [[103, 104, 105], [], [109, 110, 111, 112, 113]]
    assert continuations(tiny_gpt(), TOKENIZER, ids, 5) == expected


def test_prompts_begin_documents_if_enough_are_long_enough_and_are_evenly_spaced_if_not(tmp_path):
    documents = [letter + " document" + "x" * (i % 3) * 9 for i, letter in enumerate("abcdefghi")]
    write_dataset(tmp_path, {"test": documents}, ByteTokenizer())
    file = TokenFile(tmp_path, "test")
    assert prompts(file, EOT, 3, 15)[:, 0].tolist() == [*b"beh"]  # of the six with 19 or 28
    assert prompts(file, EOT, 3, 19)[:, 0].tolist() == [*b"cfi"]  # something follows a prompt
    starts = np.arange(7) * (len(file) - 14) // 7
    expected = [file.ids[start : start + 15].tolist() for start in starts]
    assert prompts(file, EOT, 7, 15).tolist() == expected
    with pytest.raises(UserError):
        prompts(file, EOT, 5, len(file))
