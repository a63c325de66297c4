"""The fused loss in chunks against the slow float64 formula, in half precision and compiled."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import peak_memory
from heads import Head, HeadConfig, linear_loss
from tests.helpers import (
    assert_close_in_norm,
    assert_same_loss,
    compiling,
    tiny_head,
    value_and_gradients,
)
from tests.test_heads import C, V, batch, smoothed

CASES = [
    ("point", "categorical", {}),
    ("point", "smooth", {"logit_bias": "uniform"}),
    ("point", "sigmoid", {"pos_weight": 0.5}),
    ("bayes", "categorical", {"logit_bias": "uniform"}),
    ("bayes", "smooth", {}),
    ("bayes", "smooth", {"posterior": "full"}),
    ("bayes", "sigmoid", {"posterior": "full", "logit_bias": "uniform"}),
    ("bayes", "sigmoid", {"pos_weight": 3.0, "sum_penalty": 0.2}),
    ("bayes", "categorical", {"posterior": "full", "estimator": "sample"}),
]
every_case = pytest.mark.parametrize("weights, likelihood, options", CASES, ids=str)


@pytest.fixture
def small_chunks(monkeypatch):
    """Four rows of logits per product, two in the cache."""
    monkeypatch.setattr(linear_loss, "LOGITS_BYTES_PRODUCT", {"cpu": 4 * V * 4})
    monkeypatch.setattr(linear_loss, "LOGITS_BYTES_CACHE", {"cpu": 2 * V * 4})


def slow_loss(head, x, target):
    """data_loss for a dense target (..., V), in float64; for a posterior Jensen's bound."""
    config = head.config
    parameters = {name: p.double() for name, p in head.named_parameters()}
    x, weight = x.double(), parameters["weights.weight"]
    mean = x @ weight.T + parameters.get("bias", 0.0)
    raised = mean
    if config.weights == "bayes":
        variance = (2 * parameters["weights.log_std"]).exp().expand_as(weight)
        raised = mean + x.square() @ variance.T / 2
    if config.likelihood != "sigmoid":
        target = smoothed(config.likelihood, target)
        return (raised.logsumexp(-1) - (target * mean).sum(-1)).mean()
    pos_weight = torch.tensor(config.pos_weight)
    losses = F.binary_cross_entropy_with_logits(
        raised, target, reduction="none", pos_weight=pos_weight
    )
    # what is linear in the logits has no variance
    losses = losses + pos_weight * target * (raised - mean)
    sums = (raised - pos_weight.log()).sigmoid().sum(-1)
    return (losses.sum(-1) + config.sum_penalty * (sums - 1).square()).mean()


@pytest.mark.parametrize("weights, likelihood, options", CASES[:-1], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_gradients_in_chunks_are_those_of_the_slow_float64_formula(
    weights, likelihood, options, soft, small_chunks
):
    head = tiny_head(weights, likelihood, **options)
    x, ids = batch(3, 5)  # 15 positions: the last chunk is short
    targets = [ids]
    dense = F.one_hot(ids, V).double()
    if soft:
        ids = torch.stack([ids, (ids + 1) % V, ids], -1)  # the first id twice
        labels = torch.rand(3, 5, 3).softmax(-1)
        targets = [ids, labels]
        dense = torch.zeros_like(dense).scatter_add(-1, ids, labels.double())
    loss = head.data_loss(x.requires_grad_(), *targets)
    assert loss.dtype == torch.float32
    assert_same_loss(loss, slow_loss(head, x, dense), [x, *head.parameters()])


def loss_and_gradients(loss, head, x, *targets):
    torch.manual_seed(0)  # of the estimator that draws
    return value_and_gradients(loss(x, *targets), [x, *head.parameters()])


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@every_case
def test_no_tensor_is_larger_than_a_chunk_of_the_logits_or_the_weights(
    weights, likelihood, options, small_chunks
):
    head = tiny_head(weights, likelihood, **options)
    x, targets = batch(8, 25)
    for with_grad in (True, False):
        with Largest() as largest, torch.set_grad_enabled(with_grad):
            loss = head.loss(x.requires_grad_(), targets)
            if with_grad:
                loss.backward()
        width = C + (0 if head.bias is None else 32)
        assert largest.elements <= max(4 * V, V * width, 200 * width)


@every_case
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.03), ("float16", 0.01)])
def test_under_autocast_gradients_are_fp32s_to_the_dtypes_precision(
    weights, likelihood, options, dtype, tolerance, small_chunks
):
    head = tiny_head(weights, likelihood, **options)
    x, targets = batch(3, 5)
    full = loss_and_gradients(head.data_loss, head, x.requires_grad_(), targets)
    with torch.autocast("cpu", getattr(torch, dtype)):
        low = loss_and_gradients(head.data_loss, head, x, targets)
    assert_close_in_norm(low, full, tolerance)
    assert all(gradient.dtype == torch.float32 for gradient in low)


@pytest.mark.parametrize(
    "weights, likelihood, offset",
    [
        ("point", "categorical", 0.0),
        ("point", "smooth", 3.0),
        ("bayes", "sigmoid", 0.0),
    ],
)
def test_in_float16_gradients_neither_vanish_nor_overflow_with_many_positions(
    weights, likelihood, offset
):
    """Gradients of a mean over 2^16 positions are below float16's least number, and a loss scaler
    cannot reach those of the logits; with an offset, sums over all positions are above 65,504."""
    head = tiny_head(weights, likelihood)
    x, targets = batch(1 << 16)
    if offset:
        x, targets = x + offset, torch.zeros_like(targets)
    full = loss_and_gradients(head.data_loss, head, x.requires_grad_(), targets)
    with torch.autocast("cpu", torch.float16):
        low = loss_and_gradients(head.data_loss, head, x, targets)
    assert_close_in_norm(low, full, 0.02)


@pytest.mark.parametrize(
    "likelihood, posterior, tolerance",
    [
        ("categorical", "row", 5e-3),
        ("sigmoid", "row", 5e-3),
        ("categorical", "full", 0.04),
    ],
)
def test_in_bf16_the_gradient_of_log_std_keeps_the_probabilities_of_frequent_labels(
    likelihood, posterior, tolerance
):
    """In bf16 p - 1 rounds p away: the bound's gradient must not take p from there."""
    torch.manual_seed(0)
    n_tokens = 8192
    config = HeadConfig("bayes", likelihood, posterior=posterior, n_data=10**8)
    head = Head(config, n_tokens, 32)
    frequencies = 1 / torch.arange(1, n_tokens + 1.0)
    targets = torch.multinomial(frequencies, 1024, replacement=True)
    x = torch.randn(1024, 32)
    gradients = []
    for is_low in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            loss = head.data_loss(x, targets)
        gradients.append(torch.autograd.grad(loss, head.weights.log_std))
    assert_close_in_norm(*gradients, tolerance)


@pytest.mark.parametrize("weights, likelihood", [("point", "smooth"), ("bayes", "sigmoid")])
def test_a_compiled_loss_has_the_gradients_of_the_eager_one(weights, likelihood, small_chunks):
    head = tiny_head(weights, likelihood, logit_bias="uniform", prior_std=0.5)
    x, targets = batch(3, 4)
    x.requires_grad_()
    for low, tolerance in ((False, 1e-5), (True, 0.01)):
        with compiling(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            compiled = loss_and_gradients(torch.compile(head.loss), head, x, targets)
            eager = loss_and_gradients(head.loss, head, x, targets)
        assert_close_in_norm(compiled, eager, tolerance)


def test_gradients_scale_with_the_gradient_of_the_loss():
    head = tiny_head()
    x, targets = batch(3, 5)
    loss = head.loss(x.requires_grad_(), targets)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, x)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("target", [-1, V])
def test_a_target_that_is_no_token_is_refused(target):
    x, targets = batch(3, 5)
    with pytest.raises(RuntimeError):
        tiny_head().loss(x, torch.full_like(targets, target))


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of CPU tensors")
@pytest.mark.parametrize("likelihood", ["categorical", "sigmoid"])
def test_in_bf16_a_chunk_of_logits_is_never_copied_to_float32(likelihood):
    """scatter_add_ did this, and a step of 50,304 ids took 12 % more time."""
    n_positions, n_embd, vocab_size = 2048, 16, 20000
    assert n_positions <= linear_loss.rows_per_chunk(
        linear_loss.LOGITS_BYTES_PRODUCT, torch.device("cpu"), vocab_size, torch.bfloat16
    )
    head = Head(HeadConfig(likelihood=likelihood), vocab_size, n_embd)
    x = torch.randn(1, n_positions, n_embd, requires_grad=True)
    targets = torch.randint(vocab_size, (1, n_positions))

    def case():
        with torch.autocast("cpu", torch.bfloat16):
            head.loss(x, targets)

    logits_bytes = n_positions * vocab_size * torch.bfloat16.itemsize
    assert peak_memory(case) < 2 * logits_bytes
