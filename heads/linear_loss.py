"""Hidden states to a loss and its gradients, a piece of the positions at a time: (positions, V) logits never exist.

    logits = x weightᵀ [+ added.x added.weightᵀ] [+ bias]       loss = normaliser(logits) + of_labels(logits at labels)

For each piece the logits are one matrix product; the likelihood's two functions, differentiated by torch.func, turn
them into their own gradient; two more products make that the gradients of x and weight. All of it happens in forward;
backward scales, and adds the gradient of the weights' mean square. So a likelihood is written once, as a loss. Inside
torch.compile the pass over the logits is compiled; the products are the libraries' own anyway.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

# bytes of fp32 logits at a time: on a CPU as few as keep a matrix product fast, elsewhere as many as keep it busy
LOGITS_BYTES_PRODUCT = {"cpu": 1 << 26}
LOGITS_BYTES_CACHE = {
    "cpu": 1 << 24
}  # of those that become gradients at a time where nothing is compiled: what a cache holds
ELSEWHERE = 1 << 27


class LowRankLogits(NamedTuple):
    """x weightᵀ, kept as its factors: no (..., V) tensor of it exists."""

    x: torch.Tensor  # (..., K)
    weight: torch.Tensor  # (V, K)

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (..., J) -> its entries there (..., J)."""
        return (self.x.unsqueeze(-2) * F.embedding(ids, self.weight)).sum(-1)

    def mean(self) -> torch.Tensor:
        """Averaged over all V, (...)."""
        return self.x @ self.weight.mean(0)


def linear_loss(
    likelihood,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    added: LowRankLogits | None,
    targets: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    center: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (..., C), weight (V, C), bias (V,), targets (..., K) with label_weights (..., K), None for all 1 -> the loss
    averaged over positions, a scalar in nats; and given a center the mean of (weight - center)^2. Differentiable once.

    The mean square is what a KL wants of the weights. Its gradient costs a pass over (V, C) less here, where that of
    the loss is scaled, than anywhere else.

    likelihood: normaliser(logits (n, V)) -> (n,) and of_labels(logits (n, K), label_weights) -> (n,), both in fp32.
    Under autocast the products are in its dtype; bias, sums over pieces and an `added` of one column are not.
    """
    added_x, added_weight = (
        (None, None) if added is None else (added.x.flatten(0, -2), added.weight)
    )
    factors = (x.flatten(0, -2), weight, bias, added_x, added_weight)
    tokens = (
        targets.flatten(0, -2),
        None if label_weights is None else label_weights.flatten(0, -2),
    )
    options = (likelihood, torch.compiler.is_compiling(), torch.is_grad_enabled(), center)
    return _apply(*options, *tokens, *factors)


def plain_loss(
    likelihood,
    logits: torch.Tensor,
    targets: torch.Tensor,
    label_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same of logits (..., V) that are at hand -> (...)."""
    return likelihood.normaliser(logits) + likelihood.of_labels(
        logits.gather(-1, targets), label_weights
    )


def rows_per_chunk(budget: dict[str, int], x: torch.Tensor, vocab_size: int) -> int:
    """How many rows of logits the device's budget allows: a power of two, so that pieces are alike. In half the
    precision four times as many: there the sum over pieces, in fp32, is a pass of its own for each."""
    most = (
        budget.get(x.device.type, ELSEWHERE)
        // (vocab_size * 4)
        * (4 if x.element_size() < 4 else 1)
    )
    most = (
        min(most, 1 << 12) if x.dtype == torch.float16 else most
    )  # more rows' slopes may add up beyond its range
    return 1 << max(0, most.bit_length() - 1)


@torch._disable_dynamo  # torch.compiler.disable, but imported when first called
def _apply(*arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _LinearLoss.apply(*arguments)


class _Factors(NamedTuple):
    """What the logits are made of, or the gradients of all that."""

    x: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    added_x: torch.Tensor | None
    added_weight: torch.Tensor | None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, likelihood, compiled, with_grad, center, targets, label_weights, *factors):
        given = _Factors(*factors)
        # gradients are those of the sum over positions (in float16 those of the mean would vanish), and wide
        wanted = [with_grad and t is not None and t.requires_grad for t in given]
        grads = _Factors(
            *(
                torch.empty_like(t, dtype=to_float32(t[:0]).dtype) if w else None
                for t, w in zip(given, wanted, strict=True)
            )
        )
        x, weight, bias, added_x, added_weight = _in_product_dtype(given)
        total, n, narrow = (
            0.0,
            rows_per_chunk(LOGITS_BYTES_PRODUCT, x, len(weight)),
            added_x is not None and added_x.size(1) == 1,
        )
        # gradients of what joins the logits later: bias (V,), and added_weight (V, 1)
        joined = None
        if grads.bias is not None or (narrow and grads.added_weight is not None):
            joined = torch.empty(
                1 + narrow,
                len(given.weight),
                dtype=to_float32(given.weight[:0]).dtype,
                device=x.device,
            )
        # one buffer: malloc's default gives memory of this size back, and a new one has its pages faulted in
        buffer = x.new_empty(min(n, len(x)), len(weight))
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), n):
                piece, added = slice(i, i + n), None
                logits = torch.mm(x[piece], weight.t(), out=buffer[: len(x) - i])
                if narrow:
                    added = LowRankLogits(added_x[piece], added_weight)
                elif added_x is not None:
                    logits.addmm_(added_x[piece], added_weight.t())
                labels = targets[piece], None if label_weights is None else label_weights[piece]
                part, slopes, by_added = _slopes(
                    likelihood,
                    compiled,
                    any(wanted),
                    len(given.weight),
                    logits,
                    bias,
                    added,
                    *labels,
                )
                total = total + part
                if grads.x is not None:
                    grads.x[piece] = slopes @ weight
                if grads.added_x is not None:
                    grads.added_x[piece] = by_added if narrow else slopes @ added_weight
                if grads.weight is not None:
                    _add(grads.weight, slopes.t(), x[piece], first=i == 0)
                if grads.added_weight is not None and not narrow:
                    _add(grads.added_weight, slopes.t(), added_x[piece], first=i == 0)
                if (
                    joined is not None
                ):  # a product: sum(0, dtype=float32) of bf16 takes seven times as long
                    ones = torch.ones(len(slopes), 1, dtype=slopes.dtype, device=slopes.device)
                    columns = (
                        torch.cat([ones, added_x[piece].to(slopes.dtype)], 1) if narrow else ones
                    )
                    _add(joined, columns.t(), slopes, first=i == 0)
                del slopes  # before the next come
        if grads.bias is not None:
            grads.bias.copy_(joined[0])
        if grads.added_weight is not None and narrow:
            grads.added_weight.copy_(joined[1:].t())
        ctx.save_for_backward(None if center is None else given.weight, *grads)
        ctx.dtypes, ctx.n = [None if t is None else t.dtype for t in given], len(x)
        ctx.center, ctx.compiled = center, compiled
        return total / len(x), None if center is None else _mean_square(given.weight, center)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, by_square):
        weight, *sums = ctx.saved_tensors
        scale, grads = gradient / ctx.n, []
        for name, total in zip(_Factors._fields, sums, strict=True):
            if name == "weight" and ctx.center is not None and total is not None:
                scaled = _compiled(_scaled) if ctx.compiled else _scaled
                grads.append(
                    scaled(total, scale, weight, ctx.center, by_square * 2 / weight.numel())
                )
            else:
                grads.append(None if total is None else total * scale)
        return *[None] * 6, *(
            None if t is None else t.to(dtype) for t, dtype in zip(grads, ctx.dtypes, strict=True)
        )


def _in_product_dtype(given: _Factors) -> _Factors:
    """The factors in the dtype to multiply in; bias and a single added column, which join later, as they are.

    On CUDA the weights are padded to a multiple of 64 rows, which the tensor cores want: no other code knows of them.
    """
    x, weight, bias, added_x, added_weight = given
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    x, weight = x.to(dtype), weight.to(dtype)
    if added_x is not None and added_x.size(1) > 1:
        added_x, added_weight = added_x.to(dtype), added_weight.to(dtype)
    if x.is_cuda and len(weight) % 64:
        padding = (0, 0, 0, -len(weight) % 64)
        weight = F.pad(weight, padding)
        added_weight = None if added_weight is None else F.pad(added_weight, padding)
    return _Factors(x, weight, bias, added_x, added_weight)


def _add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total += a b without what the padding adds to its shape; the first time = instead."""
    rows, columns = total.shape
    if total.dtype == b.dtype and (rows, columns) == (a.size(0), b.size(1)):
        total.addmm_(a, b, beta=0 if first else 1)  # beta = 0 does not read what was there
    elif first:
        total.copy_((a @ b)[:rows, :columns])
    else:
        total += (a @ b)[:rows, :columns]


def _slopes(
    likelihood, compiled, with_grad, vocab_size, logits, bias, added, targets, label_weights
):
    """The loss of a piece, summed over its positions, and the gradients of that by its logits (n, V), which they give
    their memory to, and by added.x (n, 1)."""
    rows = torch.arange(len(targets), device=targets.device).unsqueeze(-1)
    at_labels = to_float32(logits[:, :vocab_size].gather(1, targets))  # refuses an id outside
    at_labels = at_labels if bias is None else at_labels + bias[targets]
    at_labels = at_labels if added is None else at_labels + added.of(targets)
    of_labels = torch.func.grad_and_value(lambda z: likelihood.of_labels(z, label_weights).sum())
    slopes_at_labels, total = of_labels(at_labels)
    n = len(logits) if compiled else rows_per_chunk(LOGITS_BYTES_CACHE, at_labels, vocab_size)
    normaliser, by_added = _compiled(_normaliser) if compiled else _normaliser, []
    for i in range(0, len(logits), n):
        block = logits[i : i + n]
        added_block = (None, None) if added is None else (added.x[i : i + n], added.weight)
        slopes, by_added_block, part = normaliser(
            likelihood, with_grad, vocab_size, block, bias, *added_block
        )
        by_added.append(by_added_block)
        total = total + part
        if with_grad and n >= len(logits):
            logits = slopes
        elif with_grad:
            block.copy_(slopes)
    if with_grad:
        logits.index_put_((rows, targets), slopes_at_labels.to(logits.dtype), accumulate=True)
        if added is not None:
            by_labels = (slopes_at_labels * F.embedding(targets, added.weight).squeeze(-1)).sum(
                -1, keepdim=True
            )
            return total, logits, torch.cat(by_added) + by_labels
    return total, logits, None


def _normaliser(likelihood, with_grad, vocab_size, logits, bias, added_x, added_weight):
    """The gradients of the normalisers' sum by the products (n, V) and by added_x (n, 1), and that sum."""

    def total(products, added_x):
        z = to_float32(products[:, :vocab_size])
        z = z if bias is None else z + bias
        z = z if added_x is None else z + added_x * added_weight[:vocab_size].squeeze(-1)
        return likelihood.normaliser(z).sum()

    if not with_grad:
        return None, None, total(logits, added_x)
    slopes, value = torch.func.grad_and_value(total, (0,) if added_x is None else (0, 1))(
        logits, added_x
    )
    return slopes[0], None if added_x is None else slopes[1], value


def _mean_square(weight: torch.Tensor, center: float) -> torch.Tensor:
    norm = torch.linalg.vector_norm(weight - center if center else weight)  # a pass without a copy
    return norm.square() / weight.numel()


def _scaled(total, scale, weight, center, by_square):
    return total * scale + (weight - center) * by_square


@functools.cache  # when first used: torch.compile itself takes longer to import than all of torch
def _compiled(function):
    return torch.compile(function)


def to_float32(logits: torch.Tensor) -> torch.Tensor:
    """The same in float32 where they are in less."""
    return logits.float() if logits.element_size() < 4 else logits
