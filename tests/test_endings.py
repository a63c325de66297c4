"""Endings score the same in padded batches as each alone, in float64, without padding."""

import pytest
import torch

from engine.eval.endings import score_endings
from tests.helpers import HEADS, tiny_gpt

LENGTHS = [  # of a context and its endings; the last two do not fit into block_size
    (5, [3, 1, 6, 2]),
    (2, [4, 4, 1, 9]),
    (9, [7, 2, 8, 5]),
    (1, [1, 1, 16, 15]),
    (14, [1, 2, 3, 8]),
    (3, [40, 14]),
]


def random_ids(n: int) -> list[int]:
    return torch.randint(67, (n,), generator=torch.Generator().manual_seed(n)).tolist()


ITEMS = [(random_ids(n), [random_ids(m) for m in lengths]) for n, lengths in LENGTHS]


def slow(model, n_samples: int) -> torch.Tensor:
    sums = []
    for context, endings in ITEMS:
        for ending in endings:
            ids = (context + ending)[-model.config.block_size - 1 :]
            log_probs = model.log_probs(torch.tensor([ids[:-1]]), n_samples)[0].double()
            of_next = log_probs[range(len(ids) - 1), ids[1:]]
            sums.append(of_next[-len(ending) :].sum().item())
    return torch.tensor(sums).double()


@pytest.mark.parametrize("weights, likelihood", HEADS)
@pytest.mark.parametrize("n_samples", [0, -1])
def test_endings_in_a_batch_score_as_each_alone(weights, likelihood, n_samples):
    model = tiny_gpt(weights, likelihood, std=0.3)
    found, _ = score_endings(model, ITEMS, 3, n_samples=n_samples)
    expected = slow(model.double(), n_samples)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-6)


def test_draws_do_not_depend_on_the_batch():
    model = tiny_gpt("bayes", std=0.3, bayes_mlp=True)
    first, second = (score_endings(model, ITEMS, size, n_samples=3)[0] for size in (2, 20))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
