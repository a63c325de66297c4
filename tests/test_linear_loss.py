"""heads/linear_loss.py: a piece at a time, against all logits at once, gradcheck and torch's own
chunked loss.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from heads import Head, HeadConfig, linear_loss
from heads.linear_loss import plain_loss
from tests.helpers import HEADS, compiling, tiny_head
from tests.test_heads import C, V, batch

OPTIONS = [(w, likelihood, {"logit_bias": "uniform"}) for w, likelihood in HEADS]
OPTIONS += [("bayes", likelihood, {"posterior": "full"}) for likelihood in ("smooth", "sigmoid")]
OPTIONS += [
    ("bayes", "categorical", {"posterior": p, "estimator": "sample"}) for p in ("row", "full")
]
OPTIONS += [
    ("bayes", "sigmoid", {"pos_weight": 3.0, "sum_penalty": 0.2}),
    ("point", "sigmoid", {"pos_weight": 0.5}),
]
every_head = pytest.mark.parametrize(("weights", "likelihood", "options"), OPTIONS, ids=str)


@pytest.fixture
def small_pieces(monkeypatch):
    """Four rows of logits at a time, two in a block."""
    monkeypatch.setattr(linear_loss, "LOGITS_BYTES_PRODUCT", {"cpu": 4 * V * 4})
    monkeypatch.setattr(linear_loss, "LOGITS_BYTES_CACHE", {"cpu": 2 * V * 4})


def whole_loss(
    head: Head, x: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """data_loss from all logits at once, left to autograd."""
    x, weight, shift = head.weights.loss_terms(x)
    logits = x @ weight.T + (0.0 if head.bias is None else head.bias)
    logits = logits + (0.0 if shift is None else shift.x @ shift.weight.T)
    targets = targets if labels is not None else targets.unsqueeze(-1)
    loss = plain_loss(head.likelihood, logits, targets, labels)
    if shift is not None:
        raised = shift.at(targets) * (1.0 if labels is None else labels)
        loss = (
            loss
            + head.likelihood.label_coefficient * raised.sum(-1)
            + head.likelihood.mean_coefficient * shift.mean()
        )
    return loss.mean()


def loss_and_gradients(
    loss, head: Head, x: torch.Tensor, *tokens: torch.Tensor
) -> list[torch.Tensor]:
    torch.manual_seed(0)  # of the estimator that draws
    value = loss(x, *tokens)
    return [
        value,
        *torch.autograd.grad(value, [x, *(p for p in head.parameters() if p.requires_grad)]),
    ]


def soft_labels(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three ids and their weights; the first id stands there twice."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(V, (*shape, 3), generator=generator)
    ids[..., 2] = ids[..., 0]
    return ids, torch.rand(*shape, 3, generator=generator).softmax(-1)


@every_head
@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    weights, likelihood, options, soft, small_pieces
):
    head, (x, targets) = (
        tiny_head(weights, likelihood, **options),
        batch(3, 5),
    )  # 15 positions: the last piece is short
    x.requires_grad_()
    tokens = soft_labels(3, 5) if soft else (targets,)
    ours = loss_and_gradients(head.data_loss, head, x, *tokens)
    whole = loss_and_gradients(lambda *inputs: whole_loss(head, *inputs), head, x, *tokens)
    for a, b in zip(ours, whole, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= 1e-5 * b.norm()


@every_head
def test_gradients_are_the_differences_of_the_loss_in_float64(
    weights, likelihood, options, small_pieces
):
    head, (x, targets) = tiny_head(weights, likelihood, **options).double(), batch(5)
    parameters = list(head.parameters())

    def loss(x, *_):
        torch.manual_seed(0)
        return head.data_loss(x, targets)

    assert torch.autograd.gradcheck(
        loss, (x.double().requires_grad_(), *parameters), fast_mode=True
    )


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            self.elements = max(
                self.elements, tensor.numel() if isinstance(tensor, torch.Tensor) else 0
            )
        return result


@every_head
def test_no_tensor_is_larger_than_a_piece_of_the_logits_or_the_weights(
    weights, likelihood, options, small_pieces
):
    head, (x, targets) = tiny_head(weights, likelihood, **options), batch(8, 25)
    with Largest() as largest:
        head.loss(x.requires_grad_(), targets).backward()
    assert largest.elements <= max(4 * V, V * C, 200 * C)
    with Largest() as largest, torch.no_grad():
        head.loss(x, targets)
    assert largest.elements <= max(4 * V, V * C, 200 * C)


def test_softmax_is_torchs_own_chunked_linear_cross_entropy(small_pieces):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has it since 2.13")
    head, (x, targets) = tiny_head(), batch(15)
    ours = loss_and_gradients(head.data_loss, head, x.requires_grad_(), targets)

    def theirs(x, targets):
        return F.linear_cross_entropy(
            x, head.weights.weight, targets, options=torch.nn.LinearCrossEntropyOptions()
        )

    for a, b in zip(ours, loss_and_gradients(theirs, head, x, targets), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@every_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_are_fp32s_to_the_dtypes_precision(
    weights, likelihood, options, dtype, small_pieces
):
    head, (x, targets) = tiny_head(weights, likelihood, **options), batch(3, 5)
    full = loss_and_gradients(head.data_loss, head, x.requires_grad_(), targets)
    with torch.autocast("cpu", dtype):
        low = loss_and_gradients(head.data_loss, head, x, targets)
    assert low[0].item() == pytest.approx(full[0].item(), rel=0.02)
    for a, b in zip(low, full, strict=True):
        assert (
            a.dtype == b.dtype
            and (a - b).norm() < (0.03 if dtype is torch.bfloat16 else 0.01) * b.norm()
        )


@every_head
def test_in_float16_no_gradient_vanishes_however_many_positions_share_the_loss(
    weights, likelihood, options
):
    """Gradients of a mean over 2^16 positions are below float16's least number; a scaler cannot
    reach the logits'.
    """
    head, (x, targets) = tiny_head(weights, likelihood, **options), batch(1 << 16)
    full = loss_and_gradients(head.data_loss, head, x.requires_grad_(), targets)
    with torch.autocast("cpu", torch.float16):
        low = loss_and_gradients(head.data_loss, head, x, targets)
    for a, b in zip(low, full, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize(("weights", "likelihood"), HEADS)
def test_compiled_in_pieces_has_the_gradients_of_eager_in_both_dtypes(
    weights, likelihood, small_pieces
):
    head, (x, targets) = tiny_head(weights, likelihood, logit_bias="uniform"), batch(3, 4)
    x.requires_grad_()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        with compiling(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            compiled = loss_and_gradients(torch.compile(head.data_loss), head, x, targets)
            eager = loss_and_gradients(head.data_loss, head, x, targets)
        for a, b in zip(compiled, eager, strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


def test_backward_scales_with_the_gradient_that_comes_in_and_parameters_add_up():
    head, (x, targets) = tiny_head(), batch(3, 5)
    head.loss(x, targets).backward()
    once = head.weights.weight.grad.clone()
    (head.loss(x, targets) * 3).backward()
    torch.testing.assert_close(head.weights.weight.grad, 4 * once)


def test_a_retained_graph_gives_the_same_gradients_again_and_no_second_derivatives():
    head, (x, targets) = tiny_head(), batch(3, 5)
    loss = head.loss(x.requires_grad_(), targets)
    first, again = (torch.autograd.grad(2 * loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError):
        slope.sum().backward()


def test_weights_that_do_not_learn_get_no_gradient_and_none_is_computed(small_pieces):
    head, (x, targets) = tiny_head("bayes", "sigmoid"), batch(3, 5)
    full = loss_and_gradients(head.data_loss, head, x.requires_grad_(), targets)
    head.weights.requires_grad_(False)
    some = loss_and_gradients(head.data_loss, head, x, targets)
    torch.testing.assert_close(some, full[:3])  # the loss, x, the bias


@pytest.mark.parametrize("target", [-1, V])
def test_a_target_that_is_no_token_is_refused(target):
    head, (x, targets) = tiny_head(), batch(3, 5)
    with pytest.raises(RuntimeError, match="out of bounds"):
        head.loss(x, targets.clone().fill_(target))


def test_in_float16_slopes_that_add_up_over_many_positions_stay_finite():
    head, targets = tiny_head(), torch.zeros(1 << 16, dtype=torch.long)
    x = torch.randn(1 << 16, C, generator=torch.Generator().manual_seed(0)) + 3
    with torch.autocast("cpu", torch.float16):
        head.loss(x, targets).backward()
    assert torch.isfinite(head.weights.weight.grad).all()


@pytest.mark.parametrize(("posterior", "tolerance"), [("row", 5e-3), ("full", 0.04)])
@pytest.mark.parametrize("likelihood", ["categorical", "sigmoid"])
def test_in_bf16_the_gradient_of_log_std_keeps_the_probabilities_of_frequent_labels(
    likelihood, posterior, tolerance
):
    """Label by label p - 1 rounds p away: the bound's gradient must not take p from there."""
    torch.manual_seed(0)
    n_tokens = 8192
    head = Head(HeadConfig("bayes", likelihood, posterior=posterior, n_data=10**8), n_tokens, 32)
    frequencies = 1 / torch.arange(1, n_tokens + 1.0)
    targets = torch.multinomial(frequencies, 1024, replacement=True).view(2, -1)
    x, gradients = torch.randn(2, 512, 32), []
    for is_low in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            loss = head.data_loss(x, targets)
        gradients.append(torch.autograd.grad(loss, head.weights.log_std)[0])
    low, full = gradients
    assert (low - full).norm() < tolerance * full.norm()
