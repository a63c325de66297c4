"""GPT-2 (Radford et al. 2019) with an exchangeable output head.

The backbone is GPT-2 to the letter: pre-LN blocks, GELU in its tanh form, learned positions, GPT-2's own names for the
parameters. What happens to the final hidden states is the head's business (heads.py).
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.base.errors import UserError, check_memory, check_ranges
from engine.eval.generation import Branches, KVCache, OneToken, stream
from heads import Head, HeadConfig, Prediction
from heads.weights import BayesLayer, BayesLinear


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network; the defaults are GPT-2 124M."""

    block_size: int = 1024  # context length in tokens
    vocab_size: int = 0  # number of token ids; 0: as many as the data set's tokenizer has
    n_layer: int = 12  # gpt2: 12, -medium: 24, -large: 36, -xl: 48
    n_head: int = 12  # gpt2: 12, -medium: 16, -large: 20, -xl: 25; must divide n_embd
    n_embd: int = 768  # gpt2: 768, -medium: 1024, -large: 1280, -xl: 1600
    dropout: float = 0.0  # 0 for pretraining; try 0.1 or more for fine-tuning or small data
    # biases in all linear and norm layers, as GPT-2 has; without is a bit better and faster
    bias: bool = False
    qkv_bias: bool = False  # with bias=False: a bias in the attention's c_attn alone
    # recompute each block in backward: less memory, about a third more time
    gradient_checkpointing: bool = False
    # Bayesian MLPs too (any head), with the Bayesian head's options; bound draws as local there
    bayes_mlp: bool = False
    head: HeadConfig = HeadConfig()

    def __post_init__(self):
        check_ranges(self, {"n_layer": (1, 10**4), "n_embd": (1, 10**6), "n_head": (1, 10**6)})
        check_ranges(self, {"block_size": (1, 10**9), "vocab_size": (0, 1 << 32)})
        n_parameters = (
            12 * self.n_layer * self.n_embd**2 + (self.vocab_size + self.block_size) * self.n_embd
        )
        what = f"a model of {n_parameters / 1e9:.1f} billion parameters"
        check_memory(4 * n_parameters, what, "lower --n_layer, --n_embd or --block_size")
        if self.vocab_size == 1:
            raise UserError(
                f"vocab_size = {self.vocab_size} must be at least 2, or 0 to take it from the data"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout = {self.dropout} must lie in [0, 1)")
        if self.bayes_mlp and self.head.posterior == "torchbnn":
            raise UserError("bayes_mlp has no torchbnn layers; use --posterior=row or full")
        if self.n_embd % self.n_head:
            near = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            best = sorted(near, key=lambda n: abs(n - self.n_head))[:2]
            raise UserError(
                f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}; "
                f"n_head could be {' or '.join(map(str, sorted(best)))}"
            )


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(
            config.n_embd, 3 * config.n_embd, bias=config.bias or config.qkv_bias
        )
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: torch.Tensor, cache: KVCache | OneToken | Branches | None = None
    ) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        k, v, mask = (k, v, None) if cache is None else cache.extend(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        # one new token sees everything before it; several at once start an empty cache, where plain causality is right
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1)
        return F.dropout(
            self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training
        )


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        linear = partial(BayesLayer, config.head) if config.bayes_mlp else nn.Linear
        self.c_fc = linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(
            self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training
        )


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, cache: KVCache | OneToken | Branches | None = None
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """forward gives the loss, log_probs the prediction, generate text; hidden is what the head works on."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 2:
            raise UserError("vocab_size is needed to build a model")
        self.config, self.compiled_step, self.mc_dropout = config, None, False
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(
                "c_proj.weight"
            ):  # so that the residual stream keeps its variance over 2 n_layer additions
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
        self.lm_head = Head(config.head, config.vocab_size, config.n_embd)
        if config.head.tie_head:
            self.lm_head.weights.weight = self.transformer.wte.weight
        self.init_posteriors(torch.full((config.vocab_size,), 1 / config.vocab_size))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """idx (B, T) token ids -> final hidden states (B, T, C). With a cache, one token goes behind what it holds."""
        start = cache.length if cache else 0
        if start and idx.size(1) > 1:
            raise ValueError(
                "several tokens can only start a cache; behind others they go one by one"
            )
        if start + idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{start + idx.size(1)} tokens do not fit into block_size = {self.config.block_size}"
            )
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start : start + idx.size(1)]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            if self.config.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        if cache:
            cache.length += idx.size(1)
        return self.transformer.ln_f(x)

    def hidden_at(
        self, idx: torch.Tensor, positions: torch.Tensor, cache: Branches | OneToken
    ) -> torch.Tensor:
        """idx (B, T) -> (B, T, C), each token at its position, seeing what the cache shows it."""
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def step(self, token: torch.Tensor, kv: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """hidden of one token (B, 1) behind `position` others, with the shapes of OneToken; for torch.compile."""
        return self.hidden_at(token, position, OneToken(kv, position))

    def compile_step(self) -> None:
        """Have the backbone read each cached token in one compiled graph, on CUDA launched as one CUDA graph."""
        mode = "reduce-overhead" if self.transformer.wte.weight.is_cuda else None
        self.compiled_step = torch.compile(self.step, mode=mode, fullgraph=True, dynamic=False)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor, label_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """idx (B, T), targets (B, T) or (B, T, K) with label_weights (B, T, K) -> what training minimises, a scalar."""
        loss = self.lm_head.loss(self.hidden(idx), targets, label_weights)
        hidden_kl = sum(
            (layer.kl() for layer in self.bayes_layers() if layer is not self.lm_head.weights), 0.0
        )
        return loss + self.lm_head.kl_loss(hidden_kl)

    def scores(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """idx, targets (B, T) -> the loss, a scalar, and (3, B * T): nats, confidence, correctness; see Head.scores."""
        hidden = self.hidden(idx)
        loss = self.lm_head.data_loss(hidden, targets) + self.kl_loss()
        return loss, self.lm_head.scores(hidden, targets)

    def kl(self) -> torch.Tensor | float:
        """KL(posterior || prior) of all Bayesian weights, in nats; 0.0 where there are none."""
        return sum((layer.kl() for layer in self.bayes_layers()), 0.0)

    def kl_loss(self) -> torch.Tensor:
        """The prior's part of the loss, nats per token."""
        return self.lm_head.kl_loss(self.kl())

    def bayes_layers(self) -> list[BayesLinear]:
        """The Bayesian layers, the head's output weights among them."""
        return [module for module in self.modules() if isinstance(module, BayesLinear)]

    def log_probs(self, idx: torch.Tensor, n_samples: int = 0) -> torch.Tensor:
        """idx (B, T) -> log p(next token) at every position, (B, T, V), normalised over V."""
        return self.lm_head.log_probs(self.hiddens(idx, n_samples), n_samples)

    def hiddens(
        self, idx: torch.Tensor, n_samples: int = 0, branches: Branches | None = None
    ) -> list[torch.Tensor]:
        """The hidden states (B, T, C) that n_samples draws of all weights need: one, or one per draw where these differ
        (bayes_mlp, mc_dropout)."""
        read = (
            partial(self.hidden_at, positions=branches.positions, cache=branches)
            if branches
            else self.hidden
        )
        if n_samples < 1 or not (self.config.bayes_mlp or self.mc_dropout):
            return [read(idx)]
        with self.sampling():
            return [read(idx) for _ in range(n_samples)]

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, the hidden Bayesian layers draw from their posterior, as they do in training, and with mc_dropout the
        blocks drop out: a draw of the weights too (Gal & Ghahramani 2016)."""
        was = self.training
        self.train(was or self.mc_dropout)
        layers = [layer for layer in self.bayes_layers() if isinstance(layer, BayesLayer)]
        for layer in layers:
            layer.sampling = True
        try:
            yield
        finally:
            self.train(was)
            for layer in layers:
                layer.sampling = False

    def init_posteriors(
        self, frequencies: torch.Tensor, only: Collection[str] | None = None
    ) -> None:
        """Start the posteriors' widths anew for the weights that are there: all, or those of the parameters `only`.

        frequencies: (V,), of the training text."""
        for name, layer in self.named_modules():
            if isinstance(layer, BayesLinear) and (only is None or f"{name}.log_std" in only):
                layer.init_from_frequencies(
                    torch.ones(len(layer.weight)) if isinstance(layer, BayesLayer) else frequencies
                )

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, **options) -> torch.Tensor:
        """idx (B, T) -> (B, T + max_new_tokens): the prompt and its continuation. Options: those of stream."""
        return torch.cat(
            [idx, *(token for token, _ in self.stream(idx, max_new_tokens, **options))], dim=1
        )

    def stream(
        self, idx: torch.Tensor, max_new_tokens: int, **options
    ) -> Iterator[tuple[torch.Tensor, Prediction | None]]:
        """generate token by token: see engine.eval.generation.stream, which also tells the options."""
        return stream(self, idx, max_new_tokens, **options)

    def flops_per_token(self) -> float:
        """Of one training token, forward and backward: 6 N + 12 L C T (PaLM, appendix B), N without what is looked up:
        the positions, and an embedding that is not the output weights too."""
        n_params = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        n_params -= 0 if self.config.head.tie_head else self.transformer.wte.weight.numel()
        return 6 * n_params + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
