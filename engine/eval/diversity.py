"""How varied is what a model writes? Self-BLEU, distinct-n and repetition, of continuations of real beginnings.

The prompt is never judged, only what follows it up to end-of-text. Words are what white space parts, whatever the
tokenizer. All of these numbers depend on the amount of text: compare runs on the same prompts, lengths and settings.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from engine.base.distributed import seed_micro_batch
from engine.base.errors import UserError
from engine.data.tokenizer import Tokenizer
from engine.data.tokens import TokenFile
from engine.eval.generation import stream

ORDERS = (1, 2, 3, 4)  # of distinct-n
REPEATS, PHRASE = 3, 2  # a loop is a phrase of so many tokens at least, so many times at least
SEARCHED = 1 << 26  # tokens that are looked through for documents
Words = list[str]


def prompts(file: TokenFile, tokenizer: Tokenizer, n: int, length: int) -> torch.Tensor:
    """(n, length) int64: the beginnings of n documents, evenly spaced over the split; where there are too few that are
    longer (or the split is too large to look through), evenly spaced places. The same ones for every run."""
    if n < 1 or length < 1:
        raise UserError(
            f"{n} prompts of {length} tokens: at least one prompt and one token are needed"
        )
    n_places = len(file) - length + 1
    if n_places < n:
        raise UserError(
            f"{file.path} has {len(file):,} tokens, too few for {n} prompts of {length}"
        )
    starts = np.arange(n) * n_places // n
    if tokenizer.eot is not None and len(file) <= SEARCHED:
        ends = np.flatnonzero(file.ids == tokenizer.eot)
        before, end = np.append(-1, ends), np.append(ends, len(file))  # of each document
        documents = before[end - before - 1 > length] + 1
        if len(documents) >= n:
            starts = documents[np.arange(n) * len(documents) // n]
    return torch.from_numpy(file.rows(starts, length).astype(np.int64))


@torch.no_grad()
def continuations(
    model: torch.nn.Module,
    prompts: torch.Tensor,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    n_samples: int = 0,
    seed: int = 1337,
    n_ids: int = 0,
    eot: int | None = None,
    desc: str | None = None,
) -> list[list[int]]:
    """What the model writes behind each of the prompts (n, T), cut at end-of-text (eot), which is not part of it.

    The text follows from (seed, batch_size) and the options, which are stream's; with temperature = 0, from the
    model alone. desc: the name of a progress bar.
    """
    model.eval()
    device, found = next(model.parameters()).device, []
    options = {"temperature": temperature, "top_k": top_k, "n_samples": n_samples, "n_ids": n_ids}
    with tqdm(
        total=len(prompts), desc=desc, leave=False, disable=None if desc else True
    ) as bar:  # None: not in a file
        for i, some in enumerate(prompts.split(batch_size)):
            seed_micro_batch(seed, i)
            tokens, ended = [], torch.zeros(len(some), 1, dtype=torch.bool, device=device)
            for token, _ in stream(model, some.to(device), max_new_tokens, **options):
                tokens.append(token)
                if eot is not None and (ended := ended | (token == eot)).all():
                    break
            rows = torch.cat(tokens, dim=1).tolist()
            found += [row[: row.index(eot)] if eot in row else row for row in rows]
            bar.update(len(some))
    return found


def diversity(
    texts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> dict[str, float | str | None]:
    """texts: the continuations; token_ids: their ids. All numbers of this module, None where they are not defined (of
    no text, or of too few words), and the amount of text that they are of."""
    words = [text.split() for text in texts]
    n = len(texts)
    result = {"n_texts": n, "n_words": sum(map(len, words)), "n_tokens": sum(map(len, token_ids))}
    result["empty"] = (
        sum(not text for text in words) / n if n else None
    )  # the share of texts without a word
    result |= self_bleu(texts) | {f"distinct_{k}": distinct(words, k) for k in ORDERS}
    repeated = [1 - share for text in words if (share := distinct([text], 4)) is not None]
    result["repetition"] = sum(repeated) / len(repeated) if repeated else None
    return result | {"loops": sum(map(ends_in_a_loop, token_ids)) / n if n else None}


def distinct(texts: Sequence[Words], n: int) -> float | None:
    """The share of distinct ones among all n-grams of words of all texts together (Li et al. 2016, A
    Diversity-Promoting Objective Function for Neural Conversation Models). It falls with the amount of text.

    1 - distinct of one text alone, at n = 4, is seq-rep-4 (Welleck et al. 2020, Neural Text Generation with
    Unlikelihood Training): the share of its 4-grams that it has written before. `repetition` is the mean of that.
    """
    ngrams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def ends_in_a_loop(ids: Sequence[int]) -> bool:
    """Whether it ends in a phrase, of two tokens or more, three times or more (Holtzman et al. 2020, The Curious Case
    of Neural Text Degeneration). By tokens: the last word may be cut in the middle."""
    ids = list(ids)
    tails = (ids[-REPEATS * length :] for length in range(PHRASE, len(ids) // REPEATS + 1))
    return any(tail == tail[: len(tail) // REPEATS] * REPEATS for tail in tails)


def self_bleu(texts: Sequence[str]) -> dict[str, float | str | None]:
    """The mean over texts of the BLEU-4 of a text against all the others (Zhu et al. 2018, Texygen), 0 ... 100: low is
    diverse. Texts without a word are left out.

    BLEU is sacrebleu's of a sentence, with its tokenizer (13a), its smoothing (exp: the k-th order without a match has
    2^-k of one) and effective order (a text of fewer than four tokens has fewer orders). An n-gram matches as often as
    it occurs in the text and in one of the others: its own count or the second highest of all texts', whichever is
    less. So the time grows with the texts and not with their pairs.
    """
    from sacrebleu.metrics import BLEU
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    texts, bleu = [text for text in texts if text.strip()], BLEU(effective_order=True)
    if len(texts) < 2:
        return {"self_bleu": None, "self_bleu_signature": None}
    bleu.num_refs = len(texts) - 1  # for the signature alone
    counted = [
        extract_all_word_ngrams(bleu.tokenizer(text.rstrip()), 1, bleu.max_ngram_order)
        for text in texts
    ]
    lengths, most = Counter(length for _, length in counted), {}
    for ngrams, _ in counted:
        for ngram, count in ngrams.items():
            first, second = most.get(ngram, (0, 0))
            most[ngram] = (count, first) if count > first else (first, max(second, count))
    scores = []
    for ngrams, length in counted:
        correct, total = [0] * bleu.max_ngram_order, [0] * bleu.max_ngram_order
        for ngram, count in ngrams.items():
            total[len(ngram) - 1] += count
            correct[len(ngram) - 1] += min(count, most[ngram][1])
        others = (other for other, n in lengths.items() if other != length or n > 1)
        closest = min(others, key=lambda other: (abs(other - length), other))
        scores.append(
            bleu.compute_bleu(
                correct, total, length, closest, bleu.smooth_method, effective_order=True
            ).score
        )
    return {
        "self_bleu": sum(scores) / len(scores),
        "self_bleu_signature": str(bleu.get_signature()),
    }
