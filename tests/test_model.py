"""model.py: GPT-2 as transformers computes it, generation as nanoGPT's loop does it, and training
that learns.
"""

import math

import pytest
import torch
import transformers

from engine.base.errors import UserError
from engine.base.optim import adamw
from engine.eval.generation import generate, stream
from engine.runs.checkpoint import load_model
from model import GPT, GPTConfig
from tests.helpers import HEADS, tiny_gpt

V = 67
every_head = pytest.mark.parametrize(("weights", "likelihood"), HEADS)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def tiny_gpt2(**options) -> transformers.GPT2LMHeadModel:
    """transformers' GPT-2 in the shape of tiny_gpt, every parameter random, the norms' and biases'
    too.
    """
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16, "vocab_size": V}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | ends | options)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(
            parameter, mean=float("ln_" in name and name.endswith("weight")), std=0.2
        )
    return model


@pytest.mark.parametrize("n_tokens", [1, 7, 16])
def test_logits_are_those_of_transformers_gpt2(tmp_path, n_tokens):
    theirs, idx = tiny_gpt2(), tokens(3, n_tokens)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with torch.no_grad():
        expected, logits = theirs(idx).logits, ours.lm_head.logits(ours.hidden(idx))
    assert expected.std() > 1  # a network that does something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_names_and_shapes_are_gpt2s(bias):
    theirs = {
        n: p.shape for n, p in tiny_gpt2().named_parameters() if bias or not n.endswith("bias")
    }
    ours = {
        n: p.shape for n, p in tiny_gpt(bias=bias).named_parameters()
    }  # the tied lm_head is not listed twice
    assert ours.keys() == theirs.keys()
    assert all(
        sorted(shape) == sorted(ours[name]) for name, shape in theirs.items()
    )  # theirs may be transposed


def test_qkv_bias_adds_the_attentions_input_bias_alone():
    biases = {n for n, _ in tiny_gpt(qkv_bias=True).named_parameters() if n.endswith("bias")}
    assert biases == {f"transformer.h.{layer}.attn.c_attn.bias" for layer in range(2)}


@every_head
@pytest.mark.parametrize("n_samples", [0, 2])
def test_a_prediction_depends_on_no_later_token(weights, likelihood, n_samples):
    model, idx = tiny_gpt(weights, likelihood, std=0.3), tokens(2, 16)
    for t in (0, 7, 14):
        changed = idx.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % V
        torch.manual_seed(0)
        before = model.log_probs(idx, n_samples)
        torch.manual_seed(0)
        after = model.log_probs(changed, n_samples)
        torch.testing.assert_close(before[:, : t + 1], after[:, : t + 1], atol=1e-5, rtol=0)
        assert (before[:, t + 1] - after[:, t + 1]).abs().max() > 0.1


@every_head
def test_tied_output_weights_are_the_embedding_and_untied_ones_are_not(weights, likelihood):
    tied, untied = tiny_gpt(weights, likelihood), tiny_gpt(weights, likelihood, tie_head=False)
    assert tied.lm_head.weights.weight is tied.transformer.wte.weight
    assert untied.lm_head.weights.weight is not untied.transformer.wte.weight
    n_tied, n_untied = (sum(p.numel() for p in model.parameters()) for model in (tied, untied))
    assert n_untied - n_tied == V * 32


def test_initial_weights_have_gpt2s_spread():
    model = tiny_gpt(n_layer=3, n_embd=128, bias=True, tie_head=False)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert (parameter == float("ln_" in name and name.endswith("weight"))).all()


@every_head
def test_training_starts_near_a_uniform_prediction(weights, likelihood):
    log_probs = tiny_gpt(weights, likelihood).log_probs(tokens(4, 16))
    nll = -log_probs.gather(-1, tokens(4, 16, seed=2).unsqueeze(-1)).mean().item()
    assert nll == pytest.approx(math.log(V), abs=0.05)


@every_head
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(weights, likelihood, dropout):
    results = []
    for gradient_checkpointing in (False, True):
        options = {"dropout": dropout, "gradient_checkpointing": gradient_checkpointing}
        model = tiny_gpt(weights, likelihood, **options).train()
        torch.manual_seed(3)
        loss = model(tokens(2, 16), tokens(2, 16, seed=2))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_dropout_acts_in_training_alone():
    model, idx = tiny_gpt(dropout=0.5), tokens(2, 16)
    assert torch.equal(model.hidden(idx), model.hidden(idx))
    model.train()
    assert not torch.equal(model.hidden(idx), model.hidden(idx))


def nanogpt_loop(
    model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float, top_k: int
) -> torch.Tensor:
    """nanoGPT's generate() on normalised log-probabilities; temperature 0 takes the likeliest."""
    for _ in range(max_new_tokens):
        log_probs = model.log_probs(idx[:, -model.config.block_size :])[:, -1]
        if temperature == 0:
            new = log_probs.argmax(-1, keepdim=True)
        else:
            scaled = log_probs / temperature
            v, _ = torch.topk(scaled, top_k)
            scaled[scaled < v[:, [-1]]] = -float("inf")
            probs = torch.softmax(scaled.double(), dim=-1)
            rank = probs.argsort(
                -1, descending=True
            )  # draw inverts the sums over the kept tokens, the likeliest first
            sums, u = (
                probs.gather(-1, rank).cumsum(-1),
                torch.rand(len(probs), 1, dtype=torch.float64),
            )
            new = rank.gather(-1, (sums <= u).sum(-1, keepdim=True))
        idx = torch.cat((idx, new), dim=1)
    return idx


@every_head
@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("n_prompt", [1, 9, 16, 21])
@torch.no_grad()
def test_cached_generation_is_nanogpts_loop_far_past_block_size(
    weights, likelihood, temperature, n_prompt
):
    model, idx = (
        tiny_gpt(weights, likelihood, std=0.3, bias=True, tie_head=False),
        tokens(3, n_prompt),
    )
    n_new = 60 if n_prompt == 9 else 20
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(
            generate(model, idx, n_new, temperature=temperature, top_k=20, use_cache=use_cache)
        )
    torch.manual_seed(5)
    results.append(nanogpt_loop(model, idx, n_new, temperature, top_k=20))
    assert results[0].shape == (3, n_prompt + n_new) and torch.equal(results[0][:, :n_prompt], idx)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert len(results[0][:, n_prompt:].unique()) > 5  # not one token for ever


@pytest.mark.parametrize("likelihood", ["categorical", "sigmoid"])
def test_posterior_samples_in_generation_are_the_same_with_and_without_cache(likelihood):
    model, idx, results = tiny_gpt("bayes", likelihood, std=0.3), tokens(2, 5), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(generate(model, idx, 30, n_samples=3, use_cache=use_cache))
    assert torch.equal(*results)


@torch.no_grad()
def test_stream_yields_each_token_with_the_prediction_that_it_was_drawn_from():
    model, idx = tiny_gpt("bayes", std=0.3), tokens(2, 5)
    assert all(prediction is None for _, prediction in stream(model, idx, 3))
    torch.manual_seed(0)
    for token, prediction in stream(model, idx, 20, temperature=0, n_samples=3, uncertain=True):
        assert token.shape == prediction.total.shape == prediction.epistemic.shape == (2, 1)
        assert torch.equal(token, prediction.log_probs[:, -1].argmax(-1, keepdim=True))
        x = model.hidden(idx[:, -16:])[:, -1:]
        torch.testing.assert_close(
            prediction.log_probs, model.lm_head.log_probs(x), atol=0.5, rtol=0
        )
        idx = torch.cat([idx, token], dim=1)


@every_head
def test_every_head_learns_a_batch_by_heart(weights, likelihood):
    torch.manual_seed(0)
    idx = torch.stack([torch.randperm(V)[:17] for _ in range(4)])
    x, y = idx[:, :-1], idx[:, 1:]
    model = tiny_gpt(
        weights, likelihood, label_smoothing=0.01, n_data=10**6, kl_weight=0.01
    ).train()
    optimizer = adamw(model, 1e-2, (0.9, 0.95), 0.0)
    first = model(x, y).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
    nll = -model.log_probs(x).gather(-1, y.unsqueeze(-1)).mean().item()
    assert nll < 0.1 and loss.item() < 0.3 * first


def test_impossible_shapes_are_refused_in_one_line_that_says_what_would_do():
    for options, wanted in (
        ({"n_embd": 32, "n_head": 5}, "must be a multiple of n_head"),
        ({"n_embd": 33, "n_head": 12}, "must be a multiple of n_head"),
        ({"dropout": 1.0}, "dropout"),
        ({"block_size": 0}, "block_size"),
    ):
        with pytest.raises(UserError, match=wanted) as refusal:
            GPTConfig(**options)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="vocab_size"):
        GPT(GPTConfig())


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="17 tokens do not fit into block_size = 16"):
        tiny_gpt().hidden(tokens(1, 17))
