"""Generate text: draw the next token from a prediction, append it, repeat."""

from collections.abc import Iterator

import torch
from torch import Tensor

from heads import Prediction
from model import GPT, KVCache


def draw(log_probs: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """log_probs (B, V) -> one token per row, (B, 1). First temperature, then top_k, then top_p.

    Inverts the cumulative probabilities at a uniform number: a twentieth of the time of
    torch.multinomial on a CPU.
    """
    if temperature < 1e-30:  # 0, or so small that the division would give nan
        return log_probs.argmax(-1, keepdim=True)
    ids = None
    if 0 < top_k < log_probs.size(-1):
        log_probs, ids = log_probs.topk(top_k)
    elif top_p < 1:
        log_probs, ids = log_probs.sort(descending=True)
    # relative to the likeliest token, whose logit stays finite at any temperature
    logits = (log_probs - log_probs.amax(-1, keepdim=True)) / temperature
    probs = logits.softmax(-1)
    # a float32 sum over the vocabulary is off by more than rare tokens have (MPS has no float64)
    dtype = torch.float32 if probs.device.type == "mps" else torch.float64
    cumulative = probs.cumsum(-1, dtype=dtype)
    total = cumulative[:, -1:]
    if top_p < 1:  # keep the token that crosses top_p, so at least one
        last_kept = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=cumulative.size(-1) - 1)
        total = cumulative.gather(-1, last_kept)
    u = torch.rand(len(cumulative), 1, dtype=dtype, device=cumulative.device) * total
    # the first sum above u: never a token of probability 0
    drawn = torch.searchsorted(cumulative, u, right=True)
    return drawn if ids is None else ids.gather(-1, drawn)


@torch.no_grad()
def generate(model: GPT, idx: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Prompts (B, T) -> prompts and continuations (B, T + max_new_tokens); options: see stream."""
    new_tokens = [token for token, _ in stream(model, idx, max_new_tokens, **options)]
    return torch.cat([idx, *new_tokens], dim=1)


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
    use_cache: bool = True,  # False reads the whole context again for every token
    uncertain: bool = False,  # yield the predictions too
) -> Iterator[tuple[Tensor, Prediction | None]]:
    """Prompts (B, T) -> each new token (B, 1) and, if uncertain, its prediction (B, 1, ...).

    Beyond block_size the window slides by one token. Then every token has a new (learned) position
    and nothing cached is valid, so each step reads the last block_size tokens again.
    """
    B, n_prompt = idx.shape
    block_size, n_tokens = model.config.block_size, n_prompt + max_new_tokens
    # each cache size would compile its own graph
    size = block_size if model.compiled_step else min(block_size, n_tokens)
    cache = KVCache(model.config.n_layer, size) if use_cache else None
    new = idx
    text = torch.cat([idx, idx.new_empty(B, max_new_tokens)], dim=1)
    for end in range(n_prompt, n_tokens):
        if cache is None or cache.length in (0, block_size):
            if cache:
                cache.length = 0
            x = model.hidden(text[:, max(0, end - block_size) : end], cache)[:, -1:]
        elif model.compiled_step:
            x = _compiled_step(model, new, cache)
        else:
            x = model.hidden(new, cache)
        prediction = model.lm_head.predict(x, n_samples) if uncertain else None
        log_probs = prediction.log_probs if uncertain else model.lm_head.log_probs(x, n_samples)
        new = draw(log_probs[:, -1, : n_ids or None], temperature, top_k, top_p)
        text[:, end : end + 1] = new
        yield new, prediction


def _compiled_step(model: GPT, token: Tensor, cache: KVCache) -> Tensor:
    torch._dynamo.mark_static_address(cache.kv)  # a CUDA graph may then write to it
    position = torch.full((1,), cache.length, device=token.device)
    cache.length += 1
    # a copy, since the graph's next run overwrites its result
    return model.compiled_step(token, cache.kv, position).clone()
