"""GPT-2 (Radford et al. 2019) with an exchangeable output head.

The backbone is exactly GPT-2: pre-LN blocks, the tanh form of GELU, learned positions, and GPT-2's
parameter names. The head (heads/) turns the final hidden states into a loss or a prediction.
Shapes: idx (B, T) token ids, x (B, T, C), keys and values (B, n_head, T, C / n_head).
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.base.errors import UserError
from engine.base.options import check_options
from heads import Head, HeadConfig, TokenScores
from heads.weights import BayesLayer, BayesLinear


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network; the defaults are GPT-2 124M."""

    block_size: Annotated[int, ">= 1", "<= 1e9"] = 1024  # context length in tokens
    # number of token ids; 0: as many as the data set's tokenizer has
    vocab_size: Annotated[int, ">= 0", "<= 4294967296"] = 0
    n_layer: Annotated[int, ">= 1", "<= 1e4"] = 12  # gpt2: 12, -medium: 24, -large: 36, -xl: 48
    # gpt2: 12, -medium: 16, -large: 20, -xl: 25; must divide n_embd
    n_head: Annotated[int, ">= 1", "<= 1e6"] = 12
    # gpt2: 768, -medium: 1024, -large: 1280, -xl: 1600
    n_embd: Annotated[int, ">= 1", "<= 1e5"] = 768
    # 0 for pretraining; try 0.1 or more for fine-tuning or small data
    dropout: Annotated[float, ">= 0", "< 1"] = 0.0
    # True: biases in all linear and norm layers, like GPT-2. False: a bit better and faster
    bias: bool = False
    # recompute each block in the backward pass: less memory, about a third more time
    gradient_checkpointing: bool = False
    # Bayesian MLPs, under any head, with the Bayesian head's options; bound acts as local there
    bayes_mlp: bool = False
    head: HeadConfig = HeadConfig()

    def __post_init__(self):
        check_options(self)
        if self.bayes_mlp and self.head.posterior == "torchbnn":
            raise UserError("bayes_mlp does not support torchbnn; use --posterior=row or full")
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}; change one"
            )


class KVCache:
    """Keys and values of all layers, for up to `size` tokens.

    The first call may add several tokens, each later call adds one. The model takes any object that
    has the methods positions() and extend().
    """

    def __init__(self, n_layer: int, size: int):
        self.n_layer = n_layer
        self.size = size
        self.kv = None  # allocated by the first extend(), which knows the batch size and the dtype
        self.length = 0  # tokens held so far

    def positions(self, idx: Tensor) -> Tensor:
        """The positions (T,) of the next tokens."""
        end = self.length + idx.size(1)
        return torch.arange(self.length, end, device=idx.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        """Append k, v of the new tokens. Returns all keys and values of the layer, and no mask."""
        if self.kv is None:
            B, n_head, _, head_size = k.shape
            # zeros, because the mask of a compiled step would not hide a NaN
            self.kv = k.new_zeros(2, self.n_layer, B, n_head, self.size, head_size)
        keys, values = self.kv[:, layer]
        start = self.length
        end = start + k.size(2)
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        if layer == self.n_layer - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end], None


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        n_embd = config.n_embd
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=config.bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        head_size = C // self.n_head
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, head_size)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)
        # without a mask, one new token sees all keys; several tokens start at position 0
        is_causal = mask is None and T > 1
        dropout = self.dropout if self.training else 0.0
        if q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad and T <= 512 and not cache:
            # PyTorch's backward alone takes longer than forward and backward of this formula
            # (bench/README.md)
            future = q.new_full((T, T), -math.inf).triu(1)
            scores = q / math.sqrt(head_size) @ k.mT + future
            y = F.dropout(scores.softmax(-1), dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)
        y = self.c_proj(y)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        linear = partial(BayesLayer, config.head) if config.bayes_mlp else nn.Linear
        n_embd = config.n_embd
        self.c_fc = linear(n_embd, 4 * n_embd, bias=config.bias)
        self.c_proj = linear(4 * n_embd, n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if x.is_cpu and torch.compiler.is_compiling():
            # the same by an exp, in half of tanh's time; the first factor is sqrt(8 / pi)
            x = x * torch.sigmoid(1.5957691216 * (x + 0.044715 * x**3))
        else:
            x = F.gelu(x, approximate="tanh")
        x = self.c_proj(x)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """forward() returns the loss, log_probs() the prediction, hidden() the input of the head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 2:
            raise UserError("vocab_size is needed to build a model")
        self.config = config
        self.compiled_step = None  # see engine/eval/generation.py
        self.mc_dropout = False  # whether sampling() also applies dropout
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.apply(self._init_weights)
        # as in GPT-2: 2 n_layer projections add to the residual stream; this keeps its variance
        std = 0.02 / math.sqrt(2 * config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std)
        self.lm_head = Head(config.head, config.vocab_size, config.n_embd)
        if config.head.tie_head:
            self.lm_head.weights.weight = self.transformer.wte.weight
        uniform = torch.full((config.vocab_size,), 1 / config.vocab_size)
        self.init_posteriors(uniform)

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> final hidden states (B, T, C). With a cache, idx continues its tokens."""
        T = idx.size(1)
        block_size = self.config.block_size
        if cache is not None:
            positions = cache.positions(idx)
        elif block_size >= T:
            positions = torch.arange(T, device=idx.device)
        else:
            raise ValueError(f"{T} tokens do not fit into block_size = {block_size}")
        token_embeddings = self.transformer.wte(idx)
        x = token_embeddings + self.transformer.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        recompute = self.config.gradient_checkpointing and self.training and cache is None
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x, cache)
        return self.transformer.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor, label_weights: Tensor | None = None) -> Tensor:
        """The loss, a scalar. targets (B, T), or (B, T, K) with label_weights (B, T, K)."""
        hidden = self.hidden(idx)
        data_loss = self.lm_head.data_loss(hidden, targets, label_weights)
        return data_loss + self.kl_loss()

    def scores(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, TokenScores]:
        """idx, targets (B, T) -> the loss, a scalar, and the scores of the tokens (B * T,)."""
        hidden = self.hidden(idx)
        data_loss = self.lm_head.data_loss(hidden, targets)
        return data_loss + self.kl_loss(), self.lm_head.scores(hidden, targets)

    def kl(self) -> Tensor | float:
        """KL(posterior || prior) of all Bayesian weights, in nats; 0.0 if there are none."""
        total = 0.0
        for layer in self.bayes_layers():
            total = total + layer.kl()
        return total

    def kl_loss(self) -> Tensor:
        """The KL term of the loss, nats per token."""
        return self.lm_head.kl_loss(self.kl())

    def bayes_layers(self) -> list[BayesLinear]:
        """The Bayesian layers: output weights and, with bayes_mlp, the layers of the MLPs."""
        return [module for module in self.modules() if isinstance(module, BayesLinear)]

    def log_probs(self, idx: Tensor, n_samples: int = 0) -> Tensor:
        """idx (B, T) -> log p(next token) at every position, (B, T, V), normalised over V."""
        hiddens = self.hiddens(idx, n_samples)
        return self.lm_head.log_probs(hiddens, n_samples)

    def hiddens(self, idx: Tensor, n_samples: int = 0) -> list[Tensor]:
        """The hidden states (B, T, C) for n_samples draws of all weights.

        One element for all draws, or one per draw if hidden layers are random (bayes_mlp,
        mc_dropout).
        """
        random_layers = self.config.bayes_mlp or self.mc_dropout
        if n_samples < 1 or not random_layers:
            return [self.hidden(idx)]
        with self.sampling():
            return [self.hidden(idx) for _ in range(n_samples)]

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Within this context, hidden() draws the weights of the hidden layers.

        Bayesian layers draw from their posterior. With mc_dropout, the blocks use dropout, which
        is a draw of the weights too (Gal & Ghahramani 2016).
        """
        was_training = self.training
        self.train(was_training or self.mc_dropout)
        layers = [module for module in self.modules() if isinstance(module, BayesLayer)]
        for layer in layers:
            layer.sampling = True
        try:
            yield
        finally:
            self.train(was_training)
            for layer in layers:
                layer.sampling = False

    def init_posteriors(self, frequencies: Tensor, only: Collection[str] | None = None) -> None:
        """Initialise the standard deviations of the posteriors around the current weights.

        frequencies (V,): how often each token occurs in the training text. only: the names of the
        parameters to initialise; None: all.
        """
        for name, layer in self.named_modules():
            if not isinstance(layer, BayesLinear):
                continue
            if only is not None and f"{name}.log_std" not in only:
                continue
            is_hidden = isinstance(layer, BayesLayer)  # then each token uses all outputs
            used = torch.ones(len(layer.weight)) if is_hidden else frequencies
            layer.init_from_frequencies(used)

    def flops_per_token(self) -> float:
        """FLOPs per training token, forward and backward: 6 N + 12 L C T (PaLM, appendix B).

        N leaves out parameters that are only looked up: the position embedding, and the token
        embedding if it is not tied.
        """
        config = self.config
        n_params = sum(p.numel() for p in self.parameters())
        n_params -= self.transformer.wpe.weight.numel()
        if not config.head.tie_head:
            n_params -= self.transformer.wte.weight.numel()
        attention = 12 * config.n_layer * config.n_embd * config.block_size
        return 6 * n_params + attention
