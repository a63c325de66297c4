"""Endings in padded batches score as each alone, in float64, row by row."""

import pytest
import torch

from engine.eval.endings import score_endings
from tests.helpers import HEADS, tiny_gpt

V, BLOCK = 67, 16
every_head = pytest.mark.parametrize(("weights", "likelihood"), HEADS)


def random_items(*shapes: tuple[int, list[int]]) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids: contexts and endings of these lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(V, (n,), generator=generator).tolist()  # noqa: E731
    return [(ids(n), [ids(m) for m in lengths]) for n, lengths in shapes]


ITEMS = random_items(
    (5, [3, 1, 6, 2]), (2, [4, 4, 1, 9]), (9, [7, 2, 8, 5]), (14, [1, 2, 3, 8]), (1, [1, 1, 16, 15])
)


def apart(items):
    return [(context, [ending]) for context, endings in items for ending in endings]


@torch.no_grad()
def slow(model, items, n_samples: int = 0) -> torch.Tensor:
    """Each ending alone, a row without padding, in float64."""
    sums = []
    for context, (ending,) in apart(items):
        ids = (context + ending)[-(model.config.block_size + 1) :]
        log_probs = model.log_probs(torch.tensor([ids[:-1]]), n_samples)[0].double()
        of_next = log_probs[range(len(ids) - 1), ids[1:]]
        sums.append(of_next[-len(ending) :].sum())
    return torch.stack(sums)


@every_head
@pytest.mark.parametrize("n_samples", [0, -1])
def test_endings_in_a_batch_score_as_each_alone(weights, likelihood, n_samples):
    model = tiny_gpt(weights, likelihood, std=0.3, bias=True)
    together = score_endings(model, ITEMS, 3, n_samples=n_samples)
    torch.testing.assert_close(together, slow(model.double(), ITEMS, n_samples), atol=2e-5, rtol=0)
    alone = score_endings(model.float(), apart(ITEMS), 1, n_samples=n_samples)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_samples", [0, 3])
def test_draws_do_not_depend_on_the_batch_and_bayesian_mlps_draw_too(n_samples):
    model = tiny_gpt("bayes", std=0.3, bayes_mlp=True)
    first, second = (score_endings(model, ITEMS, size, n_samples=n_samples) for size in (2, 20))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_what_is_too_long_loses_its_beginning():
    model, (item,) = tiny_gpt(std=0.3), random_items((3, [40, 14]))
    context, (long, ending) = item
    whole = long[-BLOCK - 1 :]
    expected = score_endings(model, [(whole[:1], [whole[1:]]), (context, [ending])])
    torch.testing.assert_close(score_endings(model, [item]), expected)


def test_no_more_than_a_piece_of_the_logits_exists(monkeypatch):
    model, seen = tiny_gpt(std=0.3), []
    log_probs = model.lm_head.log_probs
    monkeypatch.setattr(
        model.lm_head, "log_probs", lambda x, n: seen.append(x[0].shape) or log_probs(x, n)
    )
    score_endings(model, random_items(*[(3, [5, 5, 5, 5])] * 40), 64)
    assert sum(n for n, _ in seen) == 800 and max(n for n, _ in seen) <= 64
