"""The fused loss: from hidden states to a loss and its gradients, without all logits in memory.

    logits = x @ weight.T [+ bias] [+ shift.x @ shift.weight.T]
    loss = mean over the positions of normaliser(logits) + of_labels(logits at the labels)

Forward takes one chunk of positions at a time. A matrix product makes the chunk's logits,
torch.func differentiates the two functions of the likelihood, and further products turn the
gradient of the logits into those of x, weight and the rest. Backward only scales these gradients.
So a likelihood is written as a loss alone. Under torch.compile the functions between the products
are compiled; the products are library calls anyway.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# bytes of fp32 logits in a chunk: on a CPU few, but enough to keep a matrix product fast
LOGITS_BYTES_PRODUCT = {"cpu": 1 << 26}
# bytes of those that eager code differentiates at a time: what a CPU's cache holds
LOGITS_BYTES_CACHE = {"cpu": 1 << 24}
LOGITS_BYTES_ELSEWHERE = 1 << 27  # on other devices


class LowRankLogits(NamedTuple):
    """x @ weight.T, kept as its two factors."""

    x: Tensor  # (..., K)
    weight: Tensor  # (V, K)

    def at(self, ids: Tensor) -> Tensor:
        """ids (..., J) -> the logits of these ids (..., J)."""
        rows = to_float32(F.embedding(ids, self.weight))
        return (to_float32(self.x).unsqueeze(-2) * rows).sum(-1)

    def mean(self) -> Tensor:
        """The mean over the vocabulary, (...)."""
        return self.x @ self.weight.mean(0)


class Options(NamedTuple):
    likelihood: Any  # see heads/likelihoods.py
    vocab_size: int  # of the unpadded weight
    compiled: bool
    with_grad: bool
    center: float | None


class Tensors(NamedTuple):
    """The inputs that have gradients, or those gradients."""

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
    center: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss, a scalar in nats, and with a center the mean of (weight - center)^2.

    x (..., C), weight (V, C), bias (V,); targets (..., K) with label_weights (..., K), or None if
    all are 1. The shift is that of Jensen's bound: it raises the logits, but not in the terms that
    are linear in the labels' logits. Differentiable once. Under autocast the products are in its
    dtype; the likelihood, the bias, a shift of rank one and sums over chunks are in fp32. The mean
    square is for a KL: here its gradient saves a pass over the weights.
    """
    compiled, with_grad = torch.compiler.is_compiling(), torch.is_grad_enabled()
    options = Options(likelihood, len(weight), compiled, with_grad, center)
    targets = targets.flatten(0, -2)
    if label_weights is not None:
        label_weights = label_weights.flatten(0, -2)
    shift_x, shift_weight = None, None
    if shift is not None:
        shift_x, shift_weight = shift.x.flatten(0, -2), shift.weight
    tensors = (x.flatten(0, -2), weight, bias, shift_x, shift_weight)
    return _apply(options, targets, label_weights, *tensors)


def plain_loss(
    likelihood, logits: Tensor, targets: Tensor, label_weights: Tensor | None = None
) -> Tensor:
    """The same loss of given logits (..., V), for each position (...)."""
    at_labels = logits.gather(-1, targets)
    return likelihood.normaliser(logits) + likelihood.of_labels(at_labels, label_weights)


def rows_per_chunk(budget: dict[str, int], x: Tensor, vocab_size: int) -> int:
    """How many rows of logits fit into the device's budget, rounded down to a power of two.

    In half precision four times as many, since each chunk's gradients are then added up in a pass
    of their own. In float16 at most 4096, whose summed gradients stay within its range.
    """
    rows = budget.get(x.device.type, LOGITS_BYTES_ELSEWHERE) // (vocab_size * 4)
    if x.element_size() < 4:
        rows *= 4
    if x.dtype == torch.float16:
        rows = min(rows, 1 << 12)
    return 1 << max(0, rows.bit_length() - 1)


def mean_square(weight: Tensor, center: float) -> Tensor:
    """mean((weight - center)^2) of a matrix.

    By the norms of its rows: one fp32 norm of 50,304 x 768 numbers is 0.3 % too small on a CPU,
    and square().mean() takes ten times as long.
    """
    if center:
        weight = weight - center
    return torch.linalg.vector_norm(weight, dim=1).square().mean() / weight.size(1)


def to_float32(t: Tensor) -> Tensor:
    """t in float32, or as it is if that is wider."""
    return t.float() if t.element_size() < 4 else t


def pad_rows(weight: Tensor, x: Tensor) -> Tensor:
    """weight (V, K), if x is on CUDA with rows of zeros up to a multiple of 64, for tensor cores.

    The logits of these rows are cut off again before anything reads them.
    """
    if x.is_cuda and len(weight) % 64:
        return F.pad(weight, (0, 0, 0, -len(weight) % 64))
    return weight


@torch._disable_dynamo  # torch.compiler.disable, but imported when first called
def _apply(*arguments) -> tuple[Tensor, Tensor | None]:
    return _LinearLoss.apply(*arguments)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, targets, label_weights, *tensors):
        given = Tensors(*tensors)
        grads = Tensors(*(_new_gradient(t, options.with_grad) for t in given))
        factors = _in_product_dtype(given)
        n_positions, padded_size = len(given.x), len(factors.weight)
        n_rows = rows_per_chunk(LOGITS_BYTES_PRODUCT, factors.x, padded_size)
        # one buffer for all chunks: malloc would return memory of this size to the system
        buffer = factors.x.new_empty(min(n_rows, n_positions), padded_size)
        total = 0.0
        with torch.autocast(given.x.device.type, enabled=False):
            for start in range(0, n_positions, n_rows):
                rows = slice(start, start + n_rows)
                weights = None if label_weights is None else label_weights[rows]
                loss = _chunk(options, factors, grads, buffer, rows, targets[rows], weights)
                total = total + loss
        with_square = options.center is not None
        ctx.save_for_backward(given.weight if with_square else None, *grads)
        ctx.options, ctx.n_positions = options, n_positions
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        square = mean_square(given.weight, options.center) if with_square else None
        return total / n_positions, square

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_square):
        weight, *sums = ctx.saved_tensors
        options, scale = ctx.options, grad_loss / ctx.n_positions
        grads = []
        for name, total, dtype in zip(Tensors._fields, sums, ctx.dtypes, strict=True):
            if total is None:
                grads.append(None)
            elif name == "weight" and options.center is not None:
                add_square = _compiled(_add_square) if options.compiled else _add_square
                factor = grad_square * 2 / weight.numel()
                grads.append(add_square(total, scale, weight, options.center, factor).to(dtype))
            else:
                grads.append((total * scale).to(dtype))
        return None, None, None, *grads


def _new_gradient(t, with_grad) -> Tensor | None:
    """Memory for a gradient summed over the positions, at least fp32.

    The gradients of the sum: those of the mean would vanish in float16.
    """
    if t is None or not (with_grad and t.requires_grad):
        return None
    return torch.empty_like(t, dtype=to_float32(t[:0]).dtype)


def _in_product_dtype(given) -> Tensors:
    """The factors of the products, padded and in the dtype to multiply in.

    The bias and a shift of rank one stay as they are: they join the fp32 logits.
    """
    x, weight, bias, shift_x, shift_weight = given
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if shift_x is not None:
        shift_weight = pad_rows(shift_weight, x)
        if shift_x.size(1) > 1:
            shift_x, shift_weight = shift_x.to(dtype), shift_weight.to(dtype)
    return Tensors(x.to(dtype), pad_rows(weight.to(dtype), x), bias, shift_x, shift_weight)


def _chunk(
    options,
    factors,
    grads,
    buffer,
    rows,
    targets,
    label_weights,
) -> Tensor:
    """The loss of some rows, summed over them. Adds its gradients to `grads`."""
    x, weight, bias, shift_x, shift_weight = factors
    x, is_first = x[rows], rows.start == 0
    logits = torch.mm(x, weight.t(), out=buffer[: len(x)])
    shift = None if shift_x is None else LowRankLogits(shift_x[rows], shift_weight)
    rank_one = shift if shift is not None and shift.x.size(1) == 1 else None

    loss, grad_labels, grad_shift = _label_loss(
        options, logits, bias, shift, targets, label_weights
    )
    if shift is not None and rank_one is None:
        logits.addmm_(shift.x, shift_weight.t())
    loss, grad_logits, grad_rank_one = _normaliser_loss(options, logits, bias, rank_one, loss)
    if not options.with_grad:
        return loss

    if shift is not None:
        if grads.shift_x is not None:
            by_labels = grad_shift.unsqueeze(-1) * F.embedding(targets, shift_weight)
            by_normaliser = grad_logits @ shift_weight if rank_one is None else grad_rank_one
            grads.shift_x[rows] = by_normaliser + by_labels.sum(1)
        if grads.shift_weight is not None:
            # before the labels enter grad_logits: p is lost in the bf16 number nearest to p - 1
            _accumulate(grads.shift_weight.t(), shift.x.t(), grad_logits, is_first)
            by_labels = grad_shift.unsqueeze(-1) * to_float32(shift.x).unsqueeze(1)
            grads.shift_weight.index_put_((targets,), by_labels, accumulate=True)

    row_ids = torch.arange(len(x), device=x.device).unsqueeze(-1)
    grad_labels = grad_labels.to(grad_logits.dtype)
    grad_logits.index_put_((row_ids, targets), grad_labels, accumulate=True)
    if grads.x is not None:
        grads.x[rows] = grad_logits @ weight
    if grads.weight is not None:
        _accumulate(grads.weight, grad_logits.t(), x, is_first)
    if grads.bias is not None:  # a product: in bf16 sum(0, dtype=float32) takes 7 times as long
        ones = torch.ones(1, len(x), dtype=grad_logits.dtype, device=x.device)
        _accumulate(grads.bias.unsqueeze(0), ones, grad_logits, is_first)
    return loss


def _accumulate(total, a, b, is_first) -> None:
    """total += a @ b without the rows and columns of padding; the first time = instead of +=."""
    n_rows, n_columns = total.shape
    a = a.to(b.dtype)
    if total.dtype == b.dtype and (n_rows, n_columns) == (a.size(0), b.size(1)):
        total.addmm_(a, b, beta=0 if is_first else 1)  # beta = 0 does not read total
    elif is_first:
        total.copy_((a @ b)[:n_rows, :n_columns])
    else:
        total += (a @ b)[:n_rows, :n_columns]


def _label_loss(
    options,
    logits,
    bias,
    shift,
    targets,
    label_weights,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The labels' part of a chunk's loss, summed; gradients by their logits and shift (n, K)."""
    likelihood = options.likelihood
    z = to_float32(logits[:, : options.vocab_size].gather(1, targets))
    if bias is not None:
        z = z + bias[targets]

    def loss(z, raised):
        linear_part = likelihood.label_coefficient * raised
        if label_weights is not None:
            linear_part = linear_part * label_weights
        return likelihood.of_labels(z + raised, label_weights).sum() + linear_part.sum()

    raised = torch.zeros_like(z) if shift is None else shift.at(targets)
    gradients, value = torch.func.grad_and_value(loss, (0, 1))(z, raised)
    return value, *gradients


def _normaliser_loss(
    options,
    logits,
    bias,
    rank_one,
    loss,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add the normalisers' sum to the loss; its gradients by the logits (n, V) and rank_one.x.

    The gradient may take the memory of the logits.
    """
    if options.compiled:
        function, n_rows = _compiled(_normaliser), len(logits)
    else:
        function = _normaliser
        n_rows = rows_per_chunk(LOGITS_BYTES_CACHE, to_float32(logits[:0]), options.vocab_size)
    arguments = (options.likelihood, options.with_grad, options.vocab_size)
    grads_rank_one = []
    for start in range(0, len(logits), n_rows):
        rows = slice(start, start + n_rows)
        block = logits[rows]
        factors = (None, None) if rank_one is None else (rank_one.x[rows], rank_one.weight)
        value, grad_block, grad_rank_one = function(*arguments, block, bias, *factors)
        loss = loss + value
        grads_rank_one.append(grad_rank_one)
        if options.with_grad and len(block) == len(logits):
            logits = grad_block
        elif options.with_grad:
            block.copy_(grad_block)
    if rank_one is None or not options.with_grad:
        return loss, logits, None
    return loss, logits, torch.cat(grads_rank_one)


def _normaliser(likelihood, with_grad, vocab_size, logits, bias, shift_x, shift_weight):
    """The normalisers' sum, and its gradients by the logits (n, padded V) and shift_x (n, 1)."""

    def loss(logits, shift_x):
        z = to_float32(logits[:, :vocab_size])
        if bias is not None:
            z = z + bias
        if shift_x is not None:
            z = z + shift_x * shift_weight[:vocab_size].squeeze(-1)
        return likelihood.normaliser(z).sum()

    if not with_grad:
        return loss(logits, shift_x), None, None
    if shift_x is None:
        gradient, value = torch.func.grad_and_value(loss)(logits, None)
        return value, gradient, None
    gradients, value = torch.func.grad_and_value(loss, (0, 1))(logits, shift_x)
    return value, *gradients


def _add_square(total, scale, weight, center, factor):
    return total * scale + (weight - center) * factor


@functools.cache  # on first use: importing torch.compile takes longer than importing torch
def _compiled(function):
    return torch.compile(function)
