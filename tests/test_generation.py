"""Drawing tokens and caching what was read, against the distributions written the slow way."""

import math

import pytest
import torch

from engine.eval.generation import compile_step, draw, generate, stream, token_step
from model import KVCache
from tests.helpers import HEADS, tiny_gpt

V = 67
every_head = pytest.mark.parametrize(("weights", "likelihood"), HEADS)


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cached_hidden_states_predict_what_whole_contexts_do(weights, likelihood, dtype):
    model = tiny_gpt(weights, likelihood, std=0.3, bias=True)
    idx = torch.randint(V, (3, 16), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config.n_layer, 16)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model.hidden(idx[:, :5], cache)
        for end in range(6, 17):
            cached = model.lm_head.log_probs(model.hidden(idx[:, end - 1 : end], cache))
            whole = model.lm_head.log_probs(model.hidden(idx[:, :end])[:, -1:])
            torch.testing.assert_close(
                cached, whole, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0
            )
    assert cache.length == 16 and cache.kv.shape == (2, 2, 3, 4, 16, 8)


def test_the_cache_has_room_for_the_text_and_no_more_and_is_allocated_once(monkeypatch):
    model, caches, allocated = tiny_gpt(), [], set()
    hidden = model.hidden

    def watched(idx, cache):
        x = hidden(idx, cache)
        caches.append(cache)
        allocated.add(cache.kv.data_ptr())
        return x

    monkeypatch.setattr(model, "hidden", watched)
    generate(model, torch.zeros(2, 3, dtype=torch.long), 6)
    assert len(allocated) == 1 and caches[-1].kv.size(4) == 9 and caches[-1].length == 8
    caches.clear(), allocated.clear()
    generate(model, torch.zeros(2, 3, dtype=torch.long), 30)  # past block_size = 16
    assert len(allocated) == 1 and caches[-1].kv.size(4) == 16 and len(caches) == 30


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 20}, {"top_p": 0.9}, {"n_samples": 3}, {"n_samples": -1}], ids=str
)
def test_the_same_seed_gives_the_same_text_and_another_one_another(options):
    model, idx, texts = tiny_gpt("bayes", std=0.3), torch.zeros(3, 1, dtype=torch.long), []
    for seed, uncertain in ((1, False), (1, True), (2, False)):
        torch.manual_seed(seed)
        texts.append(
            torch.cat(
                [token for token, _ in stream(model, idx, 25, **options, uncertain=uncertain)],
                dim=1,
            )
        )
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("bayes_mlp", [False, True])
@torch.no_grad()
def test_the_step_of_fixed_shapes_is_the_cached_one(bayes_mlp):
    model = tiny_gpt("bayes", std=0.3, bias=True, bayes_mlp=bayes_mlp)
    idx, cache, fixed = (
        torch.randint(V, (3, 16)),
        KVCache(model.config.n_layer, 16),
        KVCache(model.config.n_layer, 16),
    )
    for filled in (cache, fixed):
        model.hidden(idx[:, :4], filled)
    for i in range(4, 16):
        expected = model.hidden(idx[:, i : i + 1], cache)
        torch.testing.assert_close(
            token_step(model, idx[:, i : i + 1], fixed.kv, torch.tensor([i])), expected
        )
    torch.testing.assert_close(fixed.kv, cache.kv)


def test_a_compiled_step_writes_the_same_texts_with_one_graph():
    model, idx, texts = tiny_gpt(std=0.3), torch.zeros(2, 3, dtype=torch.long), []
    for compiled in (False, True, True):
        if compiled and not model.compiled_step:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compile_step(model)
        torch.manual_seed(0)
        texts.append(generate(model, idx, 20, top_k=20))  # past block_size
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_tokens_that_were_yielded_stay_as_they_are():
    model, idx = tiny_gpt(std=0.3), torch.zeros(2, 1, dtype=torch.long)
    yielded, copies = [], []
    for token, _ in stream(model, idx, 20):
        yielded.append(token)
        copies.append(token.clone())
    assert torch.equal(torch.cat(yielded), torch.cat(copies))


def slow_probs(
    p: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> list[tuple[int, float]]:
    """The kept tokens of p (V,) with their probabilities, float64, in the order in which draw sums
    them up.
    """
    tempered = {
        token: math.log(value) / temperature
        for token, value in enumerate(p.double().tolist())
        if value > 0
    }
    most = max(tempered.values())
    kept = [(token, math.exp(value - most)) for token, value in tempered.items()]
    if top_k or top_p < 1:
        kept = sorted(kept, key=lambda pair: -pair[1])[: top_k or None]
    total, before, result = sum(share for _, share in kept), 0.0, []
    for token, share in kept:
        if before < top_p:
            result.append((token, share / total))
        before += share / total
    total = sum(share for _, share in result)
    return [(token, share / total) for token, share in result]


CUTS = [
    {"top_k": k, "top_p": p, "temperature": t}
    for k in (0, 1, 7)
    for p in (1.0, 0.6)
    for t in (1.0, 0.7)
]
U = [
    0.0,
    1e-9,
    0.1,
    0.25,
    0.5,
    0.77,
    0.999,
    1 - 1e-9,
    1 - 2**-53,
]  # the last is the largest that torch.rand can give


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("holes", [False, True])
def test_draw_is_the_inverse_of_the_kept_tokens_summed_up_in_float64(monkeypatch, options, holes):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(len(U), V, generator=generator).mul(3).softmax(-1)
    if holes:  # tokens of probability 0, also the first and the last ones
        p[:, [0, 1, 5, 6, 7, 30, V - 2, V - 1]] = 0
    u = torch.tensor(U, dtype=torch.float64).unsqueeze(1)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, device: u)
    for row, u_row, token in zip(p, U, draw(p.log(), **options).flatten().tolist(), strict=True):
        kept, below = slow_probs(row, **options), 0.0
        assert token in dict(kept)
        for candidate, share in kept:
            if candidate == token:
                assert below - 1e-6 <= u_row <= below + share + 1e-6  # float32 probabilities
                break
            below += share


def test_draw_gives_all_tokens_of_a_large_vocabulary_their_share():
    """Chi-square over bins of tokens, rare ones at the end of the sums, where float32 sums would
    lose them.
    """
    size, n = 50_304, 200
    p = torch.cat([torch.full((size // 2,), 1.0), torch.full((size // 2,), 1e-3)])
    p = (p / p.sum()).log().expand(n, -1)
    torch.manual_seed(0)
    drawn = torch.cat([draw(p) for _ in range(50)]).flatten()
    bins = (
        torch.tensor([0.25, 0.5, 0.75, 1.0]).mul(size / 2).long()
    )  # four of the frequent half, and the rare half
    counts = torch.bucketize(drawn, bins, right=True).bincount(minlength=5).double()
    expected = p[0].double().exp()
    expected = torch.stack([part.sum() for part in expected.tensor_split(bins)]) * len(drawn)
    assert ((counts - expected).square() / expected).sum() < 23.5  # 4 degrees of freedom: p = 1e-4
    rare = torch.full((size,), -40.0)  # all but nothing: 4e-18 each
    rare[-1] = 0.0
    assert (draw(rare.expand(n, -1)) == size - 1).all()


P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.84}, [1, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),  # of the three, renormalised: .47 .29 .24
        ({"top_k": 1}, [1]),
        ({"temperature": 0}, [1]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_draw_takes_the_kept_tokens_in_proportion(options, kept):
    torch.manual_seed(0)
    n = 20_000
    drawn = draw(P.log().expand(n, -1), **options).flatten().bincount(minlength=5) / n
    expected = torch.zeros(5)
    expected[kept] = P[kept] ** (1 / (options.get("temperature") or 1))
    expected /= expected.sum()
    assert set(drawn.nonzero().flatten().tolist()) == set(kept)
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


def test_a_model_in_training_mode_that_recomputes_its_blocks_generates_the_same_cached_or_not():
    model = tiny_gpt(std=0.3, gradient_checkpointing=True).train()
    idx = torch.tensor([[5, 5, 5]])
    cached, plain = (generate(model, idx, 8, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
