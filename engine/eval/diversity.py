"""How varied is generated text? Self-BLEU, distinct-n and repetition of continuations.

The prompt is not judged, only what follows it up to end-of-text. Words are separated by white
space, whatever the tokenizer. These numbers depend on the amount of text: compare runs on the same
prompts, lengths and settings.
"""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from engine.base.distributed import seed_micro_batch
from engine.base.errors import UserError
from engine.data.tokens import TokenFile
from engine.eval.generation import generate
from engine.eval.texts import SEARCHED, document_bounds

LOOP_TOKENS, LOOP_REPEATS = 2, 3  # a loop is a phrase of at least so many tokens, repeated so often


def prompts(file: TokenFile, eot: int | None, n: int, length: int) -> torch.Tensor:
    """(n, length) int64: the beginnings of n documents, evenly spaced over the split.

    Where too few documents are longer than that, evenly spaced places; the same for every run."""
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
    prompts: torch.Tensor,
    max_new_tokens: int,
    eot: int | None = None,
    batch_size: int = 32,
    seed: int = 1337,
    **options: float,
) -> list[list[int]]:
    """The ids that the model generates after each prompt (n, T), up to end-of-text (eot).

    options: those of generation.stream. They, seed and batch size alone determine the text."""
    model.eval()
    device, found = next(model.parameters()).device, []
    batches = prompts.split(batch_size)
    for i, batch in enumerate(tqdm(batches, desc="continuations", leave=False, disable=None)):
        seed_micro_batch(seed, i)
        ids = generate(model, batch.to(device), max_new_tokens, **options)
        for row in ids[:, batch.size(1) :].tolist():
            found.append(row[: row.index(eot)] if eot in row else row)
    return found


def diversity(
    texts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> dict[str, float | str | None]:
    """All numbers of this module for some continuations, given as texts and as ids.

    None where a number is not defined, because there are too few words."""
    words = [text.split() for text in texts]
    repetition = [1 - share for text in words if (share := distinct([text], 4)) is not None]
    return {
        "n_texts": len(texts),
        "n_words": sum(map(len, words)),
        "n_tokens": sum(map(len, token_ids)),
        "empty": mean([not text for text in words]),
        **self_bleu(texts),
        **{f"distinct_{n}": distinct(words, n) for n in (1, 2, 3, 4)},
        "repetition": mean(repetition),
        "loops": mean([ends_in_a_loop(list(ids)) for ids in token_ids]),
    }


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def distinct(texts: Sequence[list[str]], n: int) -> float | None:
    """The share of distinct n-grams of words among those of all texts together (Li et al. 2016, A
    Diversity-Promoting Objective Function for Neural Conversation Models). It falls with length.

    For one text alone, 1 - distinct at n = 4 is seq-rep-4 (Welleck et al. 2020, Neural Text
    Generation with Unlikelihood Training); its mean over texts is `repetition`."""
    ngrams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def ends_in_a_loop(ids: list[int]) -> bool:
    """Whether it ends in a repeated phrase (Holtzman et al. 2020, The Curious Case of Neural Text
    Degeneration). By tokens: the last word may be cut in the middle."""
    for length in range(LOOP_TOKENS, len(ids) // LOOP_REPEATS + 1):
        if ids[-LOOP_REPEATS * length :] == ids[-length:] * LOOP_REPEATS:
            return True
    return False


def self_bleu(texts: Sequence[str]) -> dict[str, float | str | None]:
    """The mean BLEU-4 of each text against all the others (Zhu et al. 2018, Texygen), 0 to 100; low
    is varied. sacrebleu's sentence BLEU; its time grows with the square of the number of texts."""
    from sacrebleu.metrics import BLEU

    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        return {"self_bleu": None, "self_bleu_signature": None}
    bleu, scores = BLEU(effective_order=True), []
    for i, text in enumerate(texts):
        scores.append(bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score)
    return {"self_bleu": mean(scores), "self_bleu_signature": str(bleu.get_signature())}
