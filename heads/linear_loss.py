"""The fused loss: from hidden states to a loss and its gradients, without all logits in memory.

    logits = x @ weight.T [+ bias] [+ shift.x @ shift.weight.T]
    loss = mean over the positions of normaliser(logits) + of_labels(logits at the labels)

Forward takes one chunk of positions at a time. A matrix product makes the chunk's logits,
torch.func differentiates the two functions of the likelihood, and further products turn the
gradient of the logits into those of x, weight and the other inputs. Backward only scales these
gradients. So a likelihood defines a loss but no gradient. torch.compile compiles the functions
between the products; the products are library calls.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# bytes of fp32 logits per chunk: few on a CPU, but enough for a fast matrix product
LOGITS_BYTES_PRODUCT = {"cpu": 1 << 26}
# bytes of these logits that eager code differentiates at a time: what a CPU's cache holds
LOGITS_BYTES_CACHE = {"cpu": 1 << 24}
LOGITS_BYTES_ELSEWHERE = 1 << 27  # on other devices


class LowRankLogits(NamedTuple):
    """x @ weight.T, kept as its two factors."""

    x: Tensor  # (..., K)
    weight: Tensor  # (V, K)

    def at(self, ids: Tensor) -> Tensor:
        """ids (..., J) -> the logits of these ids (..., J)."""
        weight = to_float32(F.embedding(ids, self.weight))
        x = to_float32(self.x).unsqueeze(-2)
        return (x * weight).sum(-1)

    def mean(self) -> Tensor:
        """The mean over the vocabulary, (...)."""
        return self.x @ self.weight.mean(0)


class Factors(NamedTuple):
    """The inputs of the loss that may have gradients, or these gradients."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    shift_x: Tensor | None
    shift_weight: Tensor | None


def linear_loss(
    likelihood,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: LowRankLogits | None,
    targets: Tensor,
    label_weights: Tensor | None = None,
) -> Tensor:
    """The loss, a scalar in nats.

    x (..., C), weight (V, C), bias (V,); targets (..., K) with label_weights (..., K), or None if
    all are 1. shift: the extra logits of Jensen's bound. They count in the normaliser, but not in
    terms that are linear in the labels' logits. It has first derivatives only. Under autocast the
    products use its dtype; the likelihood, the bias, adding a shift of rank one and sums over
    chunks use fp32.
    """
    x = x.flatten(0, -2)
    targets = targets.flatten(0, -2)
    if label_weights is not None:
        label_weights = label_weights.flatten(0, -2)
    shift_x, shift_weight = shift or (None, None)
    if shift is not None:
        shift_x = shift_x.flatten(0, -2)
    return _apply(
        likelihood,
        torch.compiler.is_compiling(),
        torch.is_grad_enabled(),
        targets,
        label_weights,
        x,
        weight,
        bias,
        shift_x,
        shift_weight,
    )


def plain_loss(
    likelihood,
    logits: Tensor,
    targets: Tensor,
    label_weights: Tensor | None = None,
) -> Tensor:
    """The same loss from given logits (..., V), for each position (...)."""
    normaliser = likelihood.normaliser(logits)
    at_labels = logits.gather(-1, targets)
    return normaliser + likelihood.of_labels(at_labels, label_weights)


def rows_per_chunk(
    budget: dict[str, int],
    device: torch.device,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """How many rows of logits fit into the device's budget, rounded down to a power of two.

    Four times as many in half precision, because adding up the gradients of a chunk then takes a
    separate pass. At most 4096 in float16, so that sums of gradients stay within its range.
    """
    n_rows = budget.get(device.type, LOGITS_BYTES_ELSEWHERE) // (vocab_size * 4)
    if dtype.itemsize < 4:
        n_rows *= 4
    if dtype == torch.float16:
        n_rows = min(n_rows, 1 << 12)
    return 1 << max(0, n_rows.bit_length() - 1)


def to_float32(t: Tensor) -> Tensor:
    """t in float32, or unchanged if its dtype is wider."""
    return t.float() if t.element_size() < 4 else t


def pad_rows(weight: Tensor, x: Tensor) -> Tensor:
    """weight (V, K); if x is on CUDA, padded with zeros to a multiple of 64 rows (tensor cores).

    The logits of the padding count nowhere: they are cut off, or masked by -inf.
    """
    n_missing = -len(weight) % 64
    if x.is_cuda and n_missing:
        return F.pad(weight, (0, 0, 0, n_missing))
    return weight


@torch._disable_dynamo  # torch.compiler.disable, but imported when first called
def _apply(*arguments):
    return _LinearLoss.apply(*arguments)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, likelihood, compiled, with_grad, targets, label_weights, *factors):
        given = Factors(*factors)
        sums = _Sums(likelihood, compiled, with_grad, given)
        n_positions = len(given.x)
        with torch.autocast(given.x.device.type, enabled=False):
            for start in range(0, n_positions, sums.n_rows):
                rows = slice(start, start + sums.n_rows)
                weights = None if label_weights is None else label_weights[rows]
                sums.add_chunk(rows, targets[rows], weights)
        ctx.save_for_backward(*sums.grads)
        ctx.n_positions = n_positions
        return sums.loss / n_positions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        scale = grad_loss / ctx.n_positions
        # autograd converts them to the inputs' dtypes
        grads = [None if total is None else total * scale for total in ctx.saved_tensors]
        return None, None, None, None, None, *grads


class _Sums:
    """The loss and its gradients, summed over the chunks so far."""

    def __init__(self, likelihood, compiled, with_grad, given):
        self.likelihood = likelihood
        self.compiled = compiled
        self.with_grad = with_grad
        x, weight, bias, shift_x, shift_weight = given
        self.vocab_size = len(weight)
        self.loss = 0.0
        device = x.device
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        # the bias's gradient is one more column of the weight's; fewer than 32 would be slower
        self.n_embd = x.size(1)
        n_ones = 0 if bias is None else 32
        self.x_and_ones = F.pad(x.to(dtype), (0, n_ones), value=1.0)
        if compiled and weight.is_cpu and dtype == torch.bfloat16:
            # its product takes two thirds of the time; an eager copy would take as long as it saves
            weight = _compiled(_by_columns)(weight, dtype)
        self.weight = pad_rows(weight.to(dtype), x)
        self.bias = bias
        if bias is not None:
            self.bias = F.pad(bias, (0, len(self.weight) - self.vocab_size))
        self.shift = None
        self.is_rank_one = False
        if shift_x is not None:
            self.is_rank_one = shift_x.size(1) == 1
            # a shift of rank one is added to the fp32 logits, any other in a matrix product
            shift_dtype = shift_x.dtype if self.is_rank_one else dtype
            shift_weight = pad_rows(shift_weight.to(shift_dtype), x)
            self.shift = LowRankLogits(shift_x.to(shift_dtype), shift_weight)

        padded_size = len(self.weight)
        self.n_rows = rows_per_chunk(LOGITS_BYTES_PRODUCT, device, padded_size, dtype)
        n_rows = min(self.n_rows, len(x))
        # one buffer for all chunks: malloc would return it to the system after each chunk
        self.buffer = self.x_and_ones.new_empty(n_rows, padded_size)

        # gradients of the sum over positions: those of the mean would vanish in float16
        self.by_token = self._new_gradient(given.weight, n_ones)
        self.grads = Factors(
            self._new_gradient(x),
            self.by_token[:, : self.n_embd],
            self.by_token[:, self.n_embd] if n_ones else None,
            self._new_gradient(shift_x),
            self._new_gradient(given.shift_weight),
        )

    def _new_gradient(self, t, n_more_columns=0):
        """Zeros for the gradient of t (n, K); without rows if none is wanted."""
        if t is None:
            return None
        n_rows = len(t) if self.with_grad else 0
        wide = torch.promote_types(t.dtype, torch.float32)
        return t.new_zeros(n_rows, t.size(1) + n_more_columns, dtype=wide)

    def add_chunk(self, rows, targets, label_weights):
        """Add the loss and the gradients of these rows; targets (n, K)."""
        x = self.x_and_ones[rows, : self.n_embd]
        shift = self.shift and LowRankLogits(self.shift.x[rows], self.shift.weight)
        logits = self.buffer[: len(x)]
        torch.mm(x, self.weight.t(), out=logits)

        grad_labels, grad_raised = self._add_label_loss(logits, shift, targets, label_weights)
        if shift is not None and not self.is_rank_one:
            logits.addmm_(shift.x, shift.weight.t())
        grad_logits = self._add_normaliser_loss(rows, logits, shift)
        if not self.with_grad:
            return

        if shift is not None:
            # before the labels' gradients are added: in bf16, p - 1 would lose p to rounding
            self._add_shift_gradients(rows, shift, targets, grad_logits, grad_raised)
        grad_labels = grad_labels.to(grad_logits.dtype)
        if x.is_cuda:
            grad_logits.scatter_add_(1, targets, grad_labels)
        else:  # in bf16, scatter_add_ would convert all logits to fp32 and back
            row_ids = torch.arange(len(x)).unsqueeze(1)
            grad_logits.index_put_((row_ids, targets), grad_labels, accumulate=True)
        self.grads.x[rows] = grad_logits @ self.weight
        _add_product(self.by_token, grad_logits.t(), self.x_and_ones[rows])

    def _add_label_loss(self, logits, shift, targets, label_weights):
        """Returns the gradients of the labels' logits and of the shift at the labels, (n, K)."""
        of_tokens = logits[:, : self.vocab_size]  # without padding: a target there is an error
        z = to_float32(of_tokens.gather(1, targets))
        if self.bias is not None:
            z = z + self.bias[targets]
        raised = torch.zeros_like(z) if shift is None else shift.at(targets)

        def loss(z):
            return self.likelihood.of_labels(z, label_weights).sum()

        gradient, value = torch.func.grad_and_value(loss)(z + raised)
        # a linear term needs no bound: undo the shift in -label_coefficient * label logits
        coefficient = torch.full_like(z, self.likelihood.label_coefficient)
        if label_weights is not None:
            coefficient = coefficient * label_weights
        value = value + (coefficient * raised).sum()
        self.loss = self.loss + value
        return gradient, gradient + coefficient

    def _add_normaliser_loss(self, rows, logits, shift):
        """Returns the gradient of the logits, of the normaliser alone.

        Eager code writes it over the logits.
        """
        n_rows = len(logits)
        if not self.compiled:
            n_rows = rows_per_chunk(LOGITS_BYTES_CACHE, logits.device, self.vocab_size)
        function = _compiled(_normaliser) if self.compiled else _normaliser
        for start in range(0, len(logits), n_rows):
            block = slice(start, start + n_rows)
            of_block = LowRankLogits(shift.x[block], shift.weight) if self.is_rank_one else None
            gradient, value = function(
                self.likelihood,
                self.with_grad,
                self.vocab_size,
                logits[block],
                self.bias,
                of_block,
            )
            self.loss = self.loss + value
            if self.with_grad and self.is_rank_one:  # a pair
                gradient, self.grads.shift_x[rows][block] = gradient
            if self.compiled:
                return gradient  # a copy would be one more pass
            if self.with_grad:
                logits[block] = gradient
        return logits

    def _add_shift_gradients(self, rows, shift, targets, grad_logits, grad_raised):
        by_x, by_weight = self.grads.shift_x, self.grads.shift_weight
        if not self.is_rank_one:
            scale = shift.weight.amax()  # without it, sums may exceed float16's range
            by_x[rows] = grad_logits @ (shift.weight / scale)
            by_x[rows] *= scale
        of_labels = grad_raised.unsqueeze(-1)
        by_x[rows] += (of_labels * F.embedding(targets, shift.weight)).sum(1)
        _add_product(by_weight.t(), shift.x.t(), grad_logits)
        of_labels = of_labels * to_float32(shift.x).unsqueeze(1)
        by_weight.index_put_((targets,), of_labels, accumulate=True)


def _add_product(total, a, b):
    """total += a @ b, without the padding's rows and columns."""
    a = a.to(b.dtype)
    n_rows, n_columns = total.shape
    is_padded = n_rows < len(a) or n_columns < b.size(1)
    if is_padded or total.dtype != b.dtype:
        total += (a @ b)[:n_rows, :n_columns]
    else:
        total.addmm_(a, b)


def _by_columns(weight, dtype):
    """An fp32 weight in bf16, column by column in memory."""
    return weight.t().to(dtype, memory_format=torch.contiguous_format).t()


def _normaliser(
    likelihood,
    with_grad,
    vocab_size,
    logits,
    bias,
    shift,
):
    """The gradient of the sum of the normalisers (None without with_grad), and the sum.

    The gradient is that of the logits (n, padded V); with a shift, a pair with that of shift.x
    (n, 1).
    """

    shift_x, shift_weight = shift or (None, None)

    def loss(logits, shift_x):
        n_columns = logits.size(1) if likelihood.ignores_minus_inf else vocab_size
        z = to_float32(logits[:, :n_columns])
        if bias is not None:
            z = z + bias[:n_columns]
        if shift is not None:
            z = z + shift_x * shift_weight[:n_columns].squeeze(-1)
        if n_columns > vocab_size:
            # not cut off: in whole rows, a GPU loads 16 bytes at a time instead of 2
            is_token = torch.arange(n_columns, device=z.device) < vocab_size
            z = z.where(is_token, -math.inf)
        return likelihood.normaliser(z).sum()

    if not with_grad:
        return None, loss(logits, shift_x)
    inputs = 0 if shift is None else (0, 1)
    return torch.func.grad_and_value(loss, inputs)(logits, shift_x)


@functools.cache  # on first use: importing torch.compile takes longer than importing torch
def _compiled(function):
    return torch.compile(function)
