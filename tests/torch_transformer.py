"""The transformer of nn/transformer.py written independently in PyTorch, to compare results and speed with.

Needs torch, which tinydiff itself never does.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tinydiff.nn import Transformer, TransformerConfig


class TorchTransformerBlock(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, hidden = config.width, config.ratio * config.width
        self.heads, self.causal = config.heads, config.causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, mask):
        B, N, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, N, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if mask is None:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            earlier = torch.ones(N, N, dtype=torch.bool).tril() if self.causal else torch.tensor(True)
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :] & earlier)
        x = x + self.out(h.transpose(1, 2).reshape(B, N, width))
        return x + self.outer(F.gelu(self.inner(self.norm2(x)), approximate="tanh"))


class TorchTransformer(nn.Module):
    """Takes x (B, N, width) and a mask (B, N), True where a token counts, or None."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([TorchTransformerBlock(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def torch_name(name: str) -> str:
    """The name in TorchTransformer of one of our parameters."""
    return name.replace("gamma", "weight").replace("beta", "bias")


def to_torch_layout(array) -> torch.Tensor:
    """Our matrices are (in, out); PyTorch's are (out, in)."""
    return torch.from_numpy(array.T.copy())


def twin(model: Transformer, dtype=torch.float32) -> TorchTransformer:
    """A TorchTransformer with the same weights."""
    peer = TorchTransformer(model.config).to(dtype)
    peer.load_state_dict({torch_name(n): to_torch_layout(a) for n, a in model.state_dict().items()})
    return peer
