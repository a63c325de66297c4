"""model.py: GPT-2 as transformers computes it, generation as nanoGPT does it, and training that
learns."""

import math

import pytest
import torch
import transformers

from engine.eval.generation import generate, stream
from heads import WEIGHTS, HeadConfig
from model import GPT, MLP, CausalSelfAttention, GPTConfig
from tests.helpers import HEADS, assert_near, compiling, refusal, tiny_gpt, value_and_gradients

V = 67
every_head = pytest.mark.parametrize("weights, likelihood", HEADS)


def tokens(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def tiny_gpt2(**options):
    """transformers' GPT-2 in the shape of tiny_gpt; every parameter is random."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16, "vocab_size": V}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | ends | options)).eval()
    for name, parameter in model.named_parameters():
        mean = float("ln_" in name and name.endswith("weight"))
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("n_samples", [0, 2])
def test_a_prediction_depends_on_no_later_token(n_samples):
    model, idx = tiny_gpt("bayes", "sigmoid", std=0.3), tokens(2, 16)
    for n in (1, 8, 15):
        changed = idx.clone()
        changed[:, n:] = (idx[:, n:] + 1) % V
        results = []
        for text in (idx, changed):
            torch.manual_seed(0)
            results.append(model.log_probs(text, n_samples))
        before, after = results
        assert_near(before[:, :n], after[:, :n])
        assert (before[:, n] - after[:, n]).abs().max() > 0.1


@pytest.mark.parametrize("tie_head", [True, False])
def test_tied_output_weights_are_the_embedding_and_untied_ones_are_not(tie_head):
    for weights in WEIGHTS:
        model = tiny_gpt(weights, tie_head=tie_head)
        assert (model.lm_head.weights.weight is model.transformer.wte.weight) == tie_head


@pytest.mark.parametrize("bayes_mlp", [False, True])
def test_initial_weights_have_gpt2s_spread(bayes_mlp):
    model = tiny_gpt(n_layer=3, n_embd=128, bias=True, tie_head=False, bayes_mlp=bayes_mlp)
    for name, parameter in model.named_parameters():
        if name.endswith("log_std"):
            continue
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert (parameter == float("ln_" in name and name.endswith("weight"))).all()


@every_head
def test_training_starts_near_a_uniform_prediction(weights, likelihood):
    model = tiny_gpt(weights, likelihood)
    _, scores = model.scores(tokens(4, 16), tokens(4, 16, seed=2))
    assert scores.nll.mean().item() == pytest.approx(math.log(V), abs=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.3},
        {"weights": "bayes", "bayes_mlp": True, "estimator": "local", "dropout": 0.2},
        {"weights": "bayes", "bayes_mlp": True, "estimator": "sample"},
    ],
    ids=str,
)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(options):
    results = []
    for gradient_checkpointing in (False, True):
        model = tiny_gpt(gradient_checkpointing=gradient_checkpointing, **options).train()
        torch.manual_seed(3)
        loss = model(tokens(2, 16), tokens(2, 16, seed=2))
        results.append(value_and_gradients(loss, model.parameters()))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n_tokens", [1, 5, 512, 513])
def test_training_in_bf16_has_the_attention_of_float32_and_its_gradients(n_tokens):
    """Up to 512 tokens by its formula, beyond by PyTorch's function."""
    torch.manual_seed(0)
    attention = CausalSelfAttention(GPTConfig(n_head=2, n_embd=32, vocab_size=9), 0)
    torch.nn.init.normal_(attention.c_attn.weight, std=0.3)  # scores far from 0
    x = torch.randn(2, n_tokens, 32, requires_grad=True)
    found = []
    for is_low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            y = attention(x)
        (gradient,) = torch.autograd.grad(y[:, n_tokens // 2].sum(), x)
        assert not gradient[:, n_tokens // 2 + 1 :].any()
        found.append((y.float(), gradient))
    for exact, low in zip(*found, strict=True):
        assert (low - exact).norm() < 0.04 * exact.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 0.02)])
def test_a_compiled_mlp_has_gpt2s_activation_and_its_gradient(dtype, tolerance):
    mlp = MLP(GPTConfig(n_head=2, n_embd=32, vocab_size=9))
    mlp.c_fc = mlp.c_proj = torch.nn.Identity()
    x = torch.linspace(-9, 9, 64, requires_grad=True)
    with compiling():
        y = torch.compile(mlp)(x.to(dtype))
    exact = transformers.activations.NewGELUActivation()(x)
    assert_near(y, exact, 2 * tolerance)
    assert_near(*(torch.autograd.grad(z.sum(), x)[0] for z in (y, exact)), tolerance)


@pytest.mark.parametrize("is_low", [False, True])
def test_dropout_drops_attention_weights_too(is_low):
    """Of one token each head sees itself alone, so without that weight the whole head is 0."""
    config = GPTConfig(n_head=2, n_embd=32, vocab_size=9, dropout=0.5)
    attention = CausalSelfAttention(config, 0)
    attention.c_proj = torch.nn.Identity()
    x = torch.randn(500, 1, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
        heads = attention(x).view(500, 2, 16)
    share = (heads == 0).all(-1).float().mean()
    assert share.item() == pytest.approx(0.5, abs=0.1)


def test_dropout_acts_in_training_alone():
    model, idx = tiny_gpt(dropout=0.5), tokens(2, 16)
    assert torch.equal(model.hidden(idx), model.hidden(idx))
    model.train()
    assert not torch.equal(model.hidden(idx), model.hidden(idx))


def nanogpt_loop(model, idx, max_new_tokens, temperature, top_k):
    """nanoGPT's generate() on normalised log-probabilities; temperature 0 takes the likeliest."""
    for _ in range(max_new_tokens):
        log_probs = model.log_probs(idx[:, -model.config.block_size :])[:, -1]
        if temperature == 0:
            new = log_probs.argmax(-1, keepdim=True)
        else:
            scaled = log_probs / temperature
            kept, _ = torch.topk(scaled, top_k)
            scaled[scaled < kept[:, [-1]]] = -float("inf")
            # draw() inverts the sums over the kept tokens, the likeliest first
            probs, rank = scaled.double().softmax(-1).sort(descending=True)
            u = torch.rand(len(probs), 1, dtype=torch.float64)
            n_below = (probs.cumsum(-1) <= u).sum(-1, keepdim=True)
            new = rank.gather(-1, n_below)
        idx = torch.cat((idx, new), dim=1)
    return idx


@pytest.mark.parametrize(
    "weights, likelihood, temperature, n_prompt",
    [
        ("point", "categorical", 0.7, 9),
        ("point", "sigmoid", 0, 1),
        ("bayes", "smooth", 0, 16),
        ("bayes", "sigmoid", 0.7, 21),
    ],
)
@torch.no_grad()
def test_cached_generation_is_nanogpts_loop_far_past_block_size(
    weights, likelihood, temperature, n_prompt
):
    model = tiny_gpt(weights, likelihood, std=0.3, bias=True, tie_head=False)
    idx = tokens(3, n_prompt)
    torch.manual_seed(5)
    expected = nanogpt_loop(model, idx, 40, temperature, top_k=20)
    assert len(expected[:, n_prompt:].unique()) > 5  # not always the same token
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {"temperature": temperature, "top_k": 20, "use_cache": use_cache}
        assert torch.equal(generate(model, idx, 40, **options), expected)


@torch.no_grad()
def test_stream_yields_each_token_with_the_prediction_that_it_was_drawn_from():
    model, idx = tiny_gpt("bayes", std=0.3), tokens(2, 5)
    assert all(prediction is None for _, prediction in stream(model, idx, 3))
    torch.manual_seed(0)
    for token, prediction in stream(model, idx, 20, temperature=0, n_samples=-1, uncertain=True):
        assert token.shape == prediction.total.shape == prediction.epistemic.shape == (2, 1)
        assert torch.equal(token, prediction.log_probs[:, -1].argmax(-1, keepdim=True))
        expected = model.log_probs(idx[:, -16:], -1)[:, -1:]
        assert_near(prediction.log_probs, expected, 1e-4)
        idx = torch.cat([idx, token], dim=1)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"n_embd": 33, "n_head": 12}, "n_head"),
        ({"dropout": 1.0}, "dropout"),
        ({"block_size": 0}, "block_size"),
        ({}, "vocab_size"),
        ({"bayes_mlp": True, "vocab_size": V}, "n_data"),
        ({"bayes_mlp": True, "head": HeadConfig(posterior="torchbnn")}, "torchbnn"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line_that_names_the_option(options, name):
    assert name in refusal(lambda: GPT(GPTConfig(**options)))


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="block_size"):
        tiny_gpt().hidden(tokens(1, 17))
