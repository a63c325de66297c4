"""What generating and comparing texts needs beside the model: what its attention sees, and the draw of a token."""

import torch


class KVCache:
    """Keys and values of all layers, allocated once for `size` tokens: (2, L, B, H, size, C / H)."""

    def __init__(self, n_layer: int, size: int):
        self.n_layer, self.size, self.kv = n_layer, size, None
        self.length = 0  # tokens held so far

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Write k, v (B, H, t, C / H) behind what the layer holds; returns all its keys and values, no mask."""
        if self.kv is None:  # only now batch size and dtype (autocast) are known
            B, H, _, n_embd = k.shape
            self.kv = k.new_zeros(2, self.n_layer, B, H, self.size, n_embd)  # a mask would not hide a NaN
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

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write k, v (B, H, 1, C / H); returns all keys and values of the layer and the mask (1, size)."""
        keys, values = self.kv[0, layer], self.kv[1, layer]
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v)
        return keys, values, torch.arange(keys.size(2), device=keys.device).unsqueeze(0) <= self.position


class Branches:
    """In place of a KVCache: each row holds a context and several texts behind it that do not see each other.

    The context is read once, and padding is that of whole rows alone. branch (B, T): 0 for the context, 1, 2 ... for
    the texts, -1 for padding at the end; positions (B, T): of each token in its own text, context included.
    """

    def __init__(self, branch: torch.Tensor, positions: torch.Tensor):
        own = branch.unsqueeze(1) == branch.unsqueeze(2)
        self.positions, self.mask = positions, ((branch.unsqueeze(1) == 0) | own).tril().unsqueeze(1)

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """k, v (B, H, T, C / H) as they are, and who sees whom: (B, 1, T, T)."""
        return k, v, self.mask


def draw(log_probs: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
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
    probs = ((log_probs - log_probs.amax(-1, keepdim=True)) / temperature).softmax(-1)  # the likeliest stays finite
    # in float32 a vocabulary's sum is off by more than its rare tokens' shares (MPS knows nothing wider)
    below = probs.cumsum(-1, dtype=torch.float32 if probs.device.type == "mps" else torch.float64)
    total = below[:, -1:]
    if top_p < 1:  # the token that crosses top_p stays, so one always does
        total = below.gather(-1, (below < top_p).sum(-1, keepdim=True).clamp(max=below.size(-1) - 1))
    u = torch.rand(len(below), 1, dtype=below.dtype, device=below.device) * total  # below total: the last one counts
    drawn = torch.searchsorted(below, u, right=True)  # the first sum above u: never a token of probability 0
    return drawn if ids is None else ids.gather(-1, drawn)
