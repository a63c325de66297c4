"""Generating and comparing texts: what the attention sees, the draw of a token, and a text token by token."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from heads import Prediction
    from model import GPT


class KVCache:
    """Keys and values of all layers, allocated once for `size` tokens: (2, L, B, H, size, C / H)."""

    def __init__(self, n_layer: int, size: int):
        self.n_layer, self.size, self.kv = n_layer, size, None
        self.length = 0  # tokens held so far

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Write k, v (B, H, t, C / H) behind what the layer holds; returns all its keys and values, no mask."""
        if self.kv is None:  # only now batch size and dtype (autocast) are known
            B, H, _, n_embd = k.shape
            self.kv = k.new_zeros(
                2, self.n_layer, B, H, self.size, n_embd
            )  # a mask would not hide a NaN
        end = self.length + k.size(2)
        self.kv[0, layer, :, :, self.length : end] = k
        self.kv[1, layer, :, :, self.length : end] = v
        return self.kv[0, layer, :, :, :end], self.kv[1, layer, :, :, :end], None


class OneToken:
    """A KVCache for one new token at a position that is a tensor (1,).

    All of the cache is shown, with a mask over what is not held: no shape changes from token to token, and one graph,
    compiled once and recorded as a CUDA graph, serves the whole text.
    """

    def __init__(self, kv: torch.Tensor, position: torch.Tensor):
        self.kv, self.position = kv, position

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write k, v (B, H, 1, C / H); returns all keys and values of the layer and the mask (1, size)."""
        keys, values = self.kv[0, layer], self.kv[1, layer]
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v)
        return (
            keys,
            values,
            torch.arange(keys.size(2), device=keys.device).unsqueeze(0) <= self.position,
        )


class Branches:
    """In place of a KVCache: each row holds a context and several texts behind it that do not see each other.

    The context is read once, and padding is that of whole rows alone. branch (B, T): 0 for the context, 1, 2 ... for
    the texts, -1 for padding at the end; positions (B, T): of each token in its own text, context included.
    """

    def __init__(self, branch: torch.Tensor, positions: torch.Tensor):
        own = branch.unsqueeze(1) == branch.unsqueeze(2)
        self.positions, self.mask = (
            positions,
            ((branch.unsqueeze(1) == 0) | own).tril().unsqueeze(1),
        )

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """k, v (B, H, T, C / H) as they are, and who sees whom: (B, 1, T, T)."""
        return k, v, self.mask


def draw(
    log_probs: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """log_probs (B, V) -> a token for each row, (B, 1), from the distribution tempered, then cut by top_k and top_p.

    The inverse of the cumulated probabilities at a uniform number: a twentieth of torch.multinomial's time on a CPU.
    """
    if temperature < 1e-30:  # 0, or what would divide to nan
        return log_probs.argmax(-1, keepdim=True)
    ids = None
    if 0 < top_k < log_probs.size(-1):
        log_probs, ids = log_probs.topk(top_k)
    elif top_p < 1:
        log_probs, ids = log_probs.sort(descending=True)
    probs = ((log_probs - log_probs.amax(-1, keepdim=True)) / temperature).softmax(
        -1
    )  # the likeliest stays finite
    # in float32 a vocabulary's sum is off by more than its rare tokens' shares (MPS knows nothing wider)
    below = probs.cumsum(-1, dtype=torch.float32 if probs.device.type == "mps" else torch.float64)
    total = below[:, -1:]
    if top_p < 1:  # the token that crosses top_p stays, so one always does
        total = below.gather(
            -1, (below < top_p).sum(-1, keepdim=True).clamp(max=below.size(-1) - 1)
        )
    u = (
        torch.rand(len(below), 1, dtype=below.dtype, device=below.device) * total
    )  # below total: the last one counts
    drawn = torch.searchsorted(
        below, u, right=True
    )  # the first sum above u: never a token of probability 0
    return drawn if ids is None else ids.gather(-1, drawn)


@torch.no_grad()
def stream(
    model: "GPT",
    idx: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,  # divides the log-probabilities; 0 always takes the likeliest token
    top_k: int = 0,  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0,  # keep the likeliest tokens that together have this probability
    # draws of the output weights per prediction (0: their mean); the others stay at their mean
    n_samples: int = 0,
    # draw ids below this only (a padded vocabulary has more than its tokenizer); 0: all
    n_ids: int = 0,
    use_cache: bool = True,  # False reads the whole context again for every token
    uncertain: bool = False,  # tell what is not known about each token
) -> Iterator[tuple[torch.Tensor, "Prediction | None"]]:
    """Prompts (B, T) -> each new token (B, 1) and, if uncertain, the prediction (B, 1, ...) that it was drawn from.

    Past block_size the window slides by one: every token then has a new (learned) position, so nothing cached stays
    valid, and each step reads the last block_size tokens again.
    """
    B, n_prompt = idx.shape
    block_size, n_tokens = model.config.block_size, n_prompt + max_new_tokens
    size = (
        block_size if model.compiled_step else min(block_size, n_tokens)
    )  # each size is a graph of its own
    cache = KVCache(model.config.n_layer, size) if use_cache else None
    new, text = idx, torch.cat([idx, idx.new_empty(B, max_new_tokens)], dim=1)
    for end in range(n_prompt, n_tokens):
        if cache is None or cache.length in (0, block_size):
            if cache:
                cache.length = 0
            x = model.hidden(text[:, max(0, end - block_size) : end], cache)[:, -1:]
        elif model.compiled_step:
            torch._dynamo.mark_static_address(cache.kv)  # a CUDA graph may then write to it
            position = torch.full((1,), cache.length, device=idx.device)
            x = model.compiled_step(
                new, cache.kv, position
            ).clone()  # the graph's next run overwrites its result
            cache.length += 1
        else:
            x = model.hidden(new, cache)
        prediction = model.lm_head.predict(x, n_samples) if uncertain else None
        log_probs = prediction.log_probs if uncertain else model.lm_head.log_probs(x, n_samples)
        new = draw(log_probs[:, -1, : n_ids or None], temperature, top_k, top_p)
        text[:, end : end + 1] = new
        yield new, prediction
