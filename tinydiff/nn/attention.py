"""Attention layers on images: every pixel looks at every other (self), or at the tokens of a text (cross)."""

from __future__ import annotations

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module
from tinydiff.nn.norm import GroupNorm
from tinydiff.rng import Rng


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads d) -> (B, heads, N, d)."""
    B, N, C = x.shape
    return x.reshape(B, N, heads, C // heads).transpose(0, 2, 1, 3)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads d)."""
    B, heads, N, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, N, heads * d)


class SelfAttention(Module):
    """x + Linear(attention(Q, K, V)), with Q, K and V linear in GroupNorm(x) (E20; Ho et al. 2020, App. B).

    x: images (B, H, W, channels). Raises ValueError unless the heads divide the channels. The output starts at zero.
    """

    def __init__(self, channels: int, rng: Rng, *, heads: int, groups: int):
        _check_heads(channels, heads)
        self.heads = heads
        self.norm = GroupNorm(channels, groups)
        self.qkv = Linear(channels, 3 * channels, rng)
        self.out = Linear(channels, channels, rng, zero=True)

    def __call__(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, H * W, 3 * C)
        return x + self.out(ops.self_attention(qkv, heads=self.heads)).reshape(B, H, W, C)


class CrossAttention(Module):
    """x + Linear(attention(Q, K, V)), Q linear in GroupNorm(x), K and V linear in a context (E27; Rombach et al. 2022).

    x: images (B, H, W, channels); context: (B, M, context_channels) tokens; mask: (B, M) boolean, False for tokens
    that are padding and must have no influence. Raises ValueError unless the heads divide the channels.
    """

    def __init__(self, channels: int, context_channels: int, rng: Rng, *, heads: int, groups: int):
        _check_heads(channels, heads)
        self.heads = heads
        self.norm = GroupNorm(channels, groups)
        self.q = Linear(channels, channels, rng)
        self.k = Linear(context_channels, channels, rng)
        self.v = Linear(context_channels, channels, rng)
        self.out = Linear(channels, channels, rng, zero=True)

    def __call__(self, x: Tensor, context: Tensor, mask: Array | None = None) -> Tensor:
        B, H, W, C = x.shape
        q = split_heads(self.q(self.norm(x).reshape(B, H * W, C)), self.heads)
        k, v = split_heads(self.k(context), self.heads), split_heads(self.v(context), self.heads)
        h = ops.attention(q, k, v, None if mask is None else mask[:, None, None, :])
        return x + self.out(merge_heads(h)).reshape(B, H, W, C)


def _check_heads(channels: int, heads: int) -> None:
    if channels % heads:
        raise ValueError(f"the number of heads must divide the number of channels, got {heads} and {channels}")
