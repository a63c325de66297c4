"""What our steps are measured against: GPT-2 and its heads as users write them, without anything done for speed."""

import torch
import torch.nn as nn
from torch.nn import functional as F

N_DATA = 1_000_000  # tokens of a training set, the N of KL / N


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd, bias=False), nn.LayerNorm(n_embd, bias=False)
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.mlp_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        heads = [
            t.view(B, T, self.n_head, -1).transpose(1, 2)
            for t in self.c_attn(self.ln_1(x)).split(C, dim=2)
        ]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    """A GPT in the way of nanoGPT. head: plain | dense_bce | torchbnn | torchbnn_dense_bce, as in PlainHead."""

    def __init__(
        self, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, head: str
    ):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.lm_head = PlainHead(head, vocab_size, n_embd)
        if not head.startswith("torchbnn"):  # its weights are a pair, which the embedding is not
            self.lm_head.linear.weight = self.wte.weight

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x), targets)


class PlainHead(nn.Module):
    """kind: plain (cross-entropy), dense_bce (a one-hot target), torchbnn (its layer and its KL), or both of these."""

    def __init__(self, kind: str, vocab_size: int, n_embd: int):
        super().__init__()
        self.divergence = None
        if kind.startswith("torchbnn"):
            import torchbnn

            self.linear = torchbnn.BayesLinear(0, 0.1, n_embd, vocab_size, bias=False)
            self.divergence = torchbnn.BKLLoss(reduction="sum")
        else:
            self.linear = nn.Linear(n_embd, vocab_size, bias=False)
        self.nll = dense_bce if kind.endswith("dense_bce") else F.cross_entropy

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.nll(self.linear(x).flatten(0, 1), targets.flatten())
        return (
            loss
            if self.divergence is None
            else loss + self.divergence(self.linear).squeeze() / N_DATA
        )


def dense_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy with a one-hot target (N, V), summed over V."""
    one_hot = torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), 1.0)
    return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum") / len(targets)
