"""Generate text: draw the next token from a prediction, append it, repeat."""

from collections.abc import Iterator

import torch
from torch import Tensor

from heads import Prediction
from model import GPT, KVCache


def draw(
    log_probs: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """log_probs (B, V) -> one token per row, (B, 1). First temperature, then top_k, then top_p.

    It inverts the cumulative probabilities at a uniform number, which takes a twentieth of
    torch.multinomial's time on a CPU.
    """
    if temperature < 1e-30:  # 0, or so small that the division would give nan
        return log_probs.argmax(-1, keepdim=True)
    ids = None
    if 0 < top_k < log_probs.size(-1):
        log_probs, ids = log_probs.topk(top_k)
    elif top_p < 1:
        log_probs, ids = log_probs.sort(descending=True)
    # relative to the likeliest token, whose logit stays finite at any temperature
    relative = log_probs - log_probs.amax(-1, keepdim=True)
    probs = (relative / temperature).softmax(-1)
    # the error of a float32 sum over the vocabulary exceeds the probability of rare tokens
    # (MPS has no float64)
    dtype = torch.float32 if probs.is_mps else torch.float64
    cumulative = probs.cumsum(-1, dtype=dtype)
    total = cumulative[:, -1:]
    if top_p < 1:  # keep the token that crosses top_p, so at least one
        n_below = (cumulative < top_p).sum(-1, keepdim=True)
        last_kept = n_below.clamp(max=cumulative.size(-1) - 1)
        total = cumulative.gather(-1, last_kept)
    u = torch.rand(len(cumulative), 1, dtype=dtype, device=cumulative.device)
    # the first sum above: never a token of probability 0
    drawn = torch.searchsorted(cumulative, u * total, right=True)
    return drawn if ids is None else ids.gather(-1, drawn)


@torch.no_grad()
def generate(model: GPT, idx: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Prompts (B, T) -> prompts and continuations (B, T + max_new_tokens); options: see stream."""
    tokens = [new for new, _ in stream(model, idx, max_new_tokens, **options)]
    return torch.cat([idx, *tokens], dim=1)


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,  # divides the log-probabilities; 0 always takes the likeliest token
    top_k: int = 0,  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0,  # keep the likeliest tokens that together have this probability
    n_samples: int = 0,  # draws of the output weights per prediction; 0: their mean
    n_ids: int = 0,  # draw only ids below this (a padded vocabulary has more); 0: all
    use_cache: bool = True,  # False: read the whole context again for every token
    uncertain: bool = False,  # yield the predictions too
) -> Iterator[tuple[Tensor, Prediction | None]]:
    """Prompts (B, T) -> each new token (B, 1) and, if uncertain, its prediction (B, 1, ...).

    Beyond block_size the window slides by one token. Then every token has a new (learned) position
    and nothing cached is valid, so each step reads the last block_size tokens again.
    """
    block_size = model.config.block_size
    size = min(block_size, idx.size(1) + max_new_tokens)
    if model.compiled_step:  # each cache size would compile its own graph
        size = block_size
    cache = KVCache(model.config.n_layer, size) if use_cache else None
    text = new = idx[:, -block_size:]
    for _ in range(max_new_tokens):
        reads_window = cache is None or cache.length in (0, block_size)
        if reads_window:
            if cache is not None:
                cache.length = 0
            x = model.hidden(text, cache)[:, -1:]
        elif model.compiled_step:
            x = _compiled_step(model, new, cache)
        else:
            x = model.hidden(new, cache)
        prediction = None
        if uncertain:
            prediction = model.lm_head.predict(x, n_samples)
            log_probs = prediction.log_probs
        else:
            log_probs = model.lm_head.log_probs(x, n_samples)
        log_probs = log_probs[:, -1, : n_ids or None]
        new = draw(log_probs, temperature, top_k, top_p)
        text = torch.cat([text, new], dim=1)[:, -block_size:]
        yield new, prediction


class OneToken:
    """A KVCache's tensor for one new token at `position`, a tensor (1,).

    It returns the whole tensor and masks the empty part. So no shape changes from token to token,
    and one compiled graph (or CUDA graph) serves the whole text.
    """

    def __init__(self, kv: Tensor, position: Tensor):
        self.kv = kv
        self.position = position

    def positions(self, idx: Tensor) -> Tensor:
        return self.position

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v of the token. Returns the layer's keys and values, and a mask (1, size)."""
        keys, values = self.kv[:, layer]
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v)
        positions = torch.arange(keys.size(2), device=keys.device)
        mask = positions <= self.position
        return keys, values, mask.unsqueeze(0)


def token_step(model: GPT, token: Tensor, kv: Tensor, position: Tensor) -> Tensor:
    """model.hidden() of one token (B, 1), with shapes that never change."""
    return model.hidden(token, OneToken(kv, position))


def compile_step(model: GPT) -> None:
    """Compile token_step, on CUDA as one CUDA graph; stream() then uses it for cached tokens."""
    mode = "reduce-overhead" if model.transformer.wte.weight.is_cuda else None
    model.compiled_step = torch.compile(token_step, mode=mode, fullgraph=True, dynamic=False)


def _compiled_step(model, token, cache):
    torch._dynamo.mark_static_address(cache.kv)  # a CUDA graph may then write to it
    position = cache.positions(token)
    cache.length += 1
    hidden = model.compiled_step(model, token, cache.kv, position)
    return hidden.clone()  # the graph's next run overwrites its result
