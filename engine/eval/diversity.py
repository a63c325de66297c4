"""How varied is generated text? Self-BLEU and distinct-n of continuations.

Only the text after the prompt counts, up to end-of-text. Words are separated by white space,
whatever the tokenizer. The scores depend on the amount of text: compare runs on the same prompts,
lengths and settings.
"""

import numpy as np
import torch
from tqdm import tqdm

from engine.base.distributed import seed_micro_batch
from engine.base.errors import UserError
from engine.data.tokenizer import Tokenizer
from engine.data.tokens import TokenFile
from engine.eval.generation import generate
from engine.eval.texts import SEARCHED, document_bounds

BATCH_SIZE = 32  # continuations at a time


def prompts(file: TokenFile, eot: int | None, n: int, length: int) -> torch.Tensor:
    """(n, length) int64: the first tokens of n documents, evenly spaced over the split.

    If too few documents are longer than that, the prompts start at evenly spaced positions. All
    runs get the same prompts."""
    n_places = len(file) - length + 1
    if n_places < n:
        raise UserError(
            f"{file.path} has {len(file):,} tokens, too few for {n} prompts of {length}"
        )
    starts = np.arange(n) * n_places // n
    if eot is not None and len(file) <= SEARCHED:
        begins, ends = document_bounds(file, eot)
        documents = begins[ends - begins > length]
        if len(documents) >= n:
            starts = documents[np.arange(n) * len(documents) // n]
    return torch.from_numpy(file.rows(starts, length).astype(np.int64))


@torch.no_grad()
def continuations(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompts: torch.Tensor,
    max_new_tokens: int,
    **options: float,
) -> list[str]:
    """The text that the model generates after each prompt (n, T), up to end-of-text.

    options: those of generation.stream. The same call gives the same text."""
    model.eval()
    device = next(model.parameters()).device
    eot = tokenizer.eot
    options["n_ids"] = tokenizer.vocab_size
    texts = []
    batches = prompts.split(BATCH_SIZE)
    for i, batch in enumerate(tqdm(batches, desc="continuations", leave=False, disable=None)):
        seed_micro_batch(1337, i)
        ids = generate(model, batch.to(device), max_new_tokens, **options)
        for row in ids[:, batch.size(1) :].tolist():
            end = row.index(eot) if eot in row else len(row)
            texts.append(tokenizer.decode(row[:end]))
    return texts


def diversity(texts: list[str]) -> dict[str, float | None]:
    """All scores of this module; None for a score that needs more words."""
    words = [text.split() for text in texts]
    result = {
        "n_texts": len(texts),
        "n_words": sum(map(len, words)),
        "self_bleu": self_bleu(texts),
    }
    for n in (1, 2, 3, 4):
        result[f"distinct_{n}"] = distinct(words, n)
    return result


def distinct(texts: list[list[str]], n: int) -> float | None:
    """The number of distinct n-grams of words in all texts, divided by the number of n-grams (Li et
    al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models).

    It falls with the amount of text."""
    ngrams = []
    for text in texts:
        for i in range(len(text) - n + 1):
            ngrams.append(tuple(text[i : i + n]))
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def self_bleu(texts: list[str]) -> float | None:
    """The mean of sacrebleu's sentence BLEU-4 of each text against all others (Zhu et al. 2018,
    Texygen), 0 to 100; low is varied.

    The time grows with the square of the number of texts."""
    from sacrebleu.metrics import BLEU

    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        return None
    bleu = BLEU(effective_order=True)
    scores = []
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1 :]
        scores.append(bleu.sentence_score(text, others).score)
    return sum(scores) / len(scores)
