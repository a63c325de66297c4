"""Drawing tokens, and caching keys and values, against the slow way."""

import pytest
import torch

from engine.eval.generation import compile_step, draw, generate
from model import KVCache
from tests.helpers import assert_near, compiling, tiny_gpt

V = 67
START = torch.zeros(2, 3, dtype=torch.long)


@torch.no_grad()
def test_cached_hidden_states_predict_what_whole_contexts_do_in_bf16_too():
    model = tiny_gpt(std=0.3, bias=True)
    idx = torch.randint(V, (3, 16), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config.n_layer, 16)
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(idx[:, :5], cache)
        for end in range(6, 17):
            hidden = model.hidden(idx[:, end - 1 : end], cache)
            cached = model.lm_head.log_probs(hidden)
            whole = model.log_probs(idx[:, :end])[:, -1:]
            assert_near(cached, whole, 0.1)


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.9}, {"n_samples": 3}], ids=str)
def test_the_same_seed_gives_the_same_text_and_another_one_another(options):
    model = tiny_gpt("bayes", "sigmoid", std=0.3)
    texts = []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        texts.append(generate(model, START, 25, **options, use_cache=use_cache))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_a_compiled_step_writes_the_same_texts_with_one_graph():
    model = tiny_gpt(std=0.3)
    texts = []
    with compiling():
        for i in range(3):
            if i == 1:
                compile_step(model)
            torch.manual_seed(0)
            texts.append(generate(model, START, 20, top_k=20))  # past block_size
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def slow_probs(p, temperature, top_k, top_p):
    """p (V,) -> the kept tokens in the order in which draw sums them, and their probabilities."""
    probs = p.double() ** (1 / temperature)
    order = torch.arange(V)
    if 0 < top_k < V or top_p < 1:
        probs, order = probs.sort(descending=True)
    if top_k:
        probs = probs[:top_k]
    probs = probs / probs.sum()
    below = probs.cumsum(0) - probs
    probs = probs[below < top_p]
    return order.tolist(), probs / probs.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "top_k, top_p",
    [
        (0, 1.0),
        (1, 1.0),
        (7, 1.0),
        (99, 1.0),
        (0, 0.6),
        (0, 1e-9),
        (7, 0.6),
    ],
)
def test_draw_inverts_the_sums_of_the_kept_tokens_probabilities(
    monkeypatch, temperature, top_k, top_p
):
    # the last is the largest number that torch.rand can give
    us = [0.0, 1e-9, 0.1, 0.25, 0.5, 0.77, 0.999, 1 - 1e-9, 1 - 2**-53]
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(len(us), V, generator=generator).mul(3).softmax(-1)
    p[:, [0, 1, 5, 6, 7, 30, V - 2, V - 1]] = 0
    u_column = torch.tensor(us, dtype=torch.float64).unsqueeze(1)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, device: u_column)
    drawn = draw(p.log(), temperature, top_k, top_p).flatten().tolist()
    for row, u, token in zip(p, us, drawn, strict=True):
        order, probs = slow_probs(row, temperature, top_k, top_p)
        place = order.index(token)
        below = probs[:place].sum()
        assert probs[place] > 0
        assert below - 1e-6 <= u <= below + probs[place] + 1e-6  # float32 probabilities


def test_draw_reaches_each_rare_token_of_a_large_vocabulary(monkeypatch):
    """In float32, the sums up to two rare tokens would be the same number."""
    size = 50_304
    p = torch.ones(size)
    p[size // 2 :] = 1e-3
    p /= p.sum()
    n = torch.arange(1.0, 9.0).double()  # the last, the last but one, ...
    u = 1 - (n - 0.5) * p[-1].double()  # the middle of a token's interval
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: u.unsqueeze(1))
    drawn = draw(p.log().expand(8, -1)).flatten()
    assert drawn.tolist() == (size - n).tolist()
