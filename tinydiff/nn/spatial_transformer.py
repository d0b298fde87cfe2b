"""SpatialTransformer: where the text enters the U-Net of latent diffusion."""

from __future__ import annotations

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.nn.attention import CrossAttention, check_heads
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module
from tinydiff.nn.norm import GroupNorm, LayerNorm
from tinydiff.rng import Rng


class SpatialTransformer(Module):
    """x + Linear(block(Linear(GroupNorm(x)))), each pixel a token of the block (E27; Rombach et al. 2022, App. E.2.1).

    x: images (B, H, W, channels); context: (B, M, context_channels) tokens; mask: (B, M) boolean, False for tokens
    that are padding and must have no influence. Raises ValueError unless the heads divide the channels. The last
    Linear starts at zero, so that the layer starts as nothing.
    """

    def __init__(self, channels: int, context_channels: int, rng: Rng, *, heads: int, groups: int):
        self.norm = GroupNorm(channels, groups)
        self.inner = Linear(channels, channels, rng)
        self.block = ContextBlock(channels, context_channels, rng, heads=heads)
        self.outer = Linear(channels, channels, rng, zero=True)

    def __call__(self, x: Tensor, context: Tensor, mask: Array | None = None) -> Tensor:
        B, H, W, C = x.shape
        tokens = self.inner(self.norm(x).reshape(B, H * W, C))
        return x + self.outer(self.block(tokens, context, mask)).reshape(B, H, W, C)


class ContextBlock(Module):
    """Three corrections of tokens in turn: by each other, by a context, and each by itself.

        h = x + Linear(attention(Q, K, V))          Q, K, V linear in LayerNorm(x)
        h = h + CrossAttention(LayerNorm(h), context)
        h = h + Linear(a * GELU(b))                 a, b linear in LayerNorm(h), 4 times as wide (Shazeer 2020)

    x: (B, N, channels); context: (B, M, context_channels), mask (B, M). Gives (B, N, channels). Its Q, K and V have no
    biases, as in Stable Diffusion.
    """

    def __init__(self, channels: int, context_channels: int, rng: Rng, *, heads: int):
        check_heads(channels, heads)
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = LayerNorm(channels), LayerNorm(channels), LayerNorm(channels)
        self.qkv = Linear(channels, 3 * channels, rng, bias=False)
        self.out = Linear(channels, channels, rng)
        self.cross = CrossAttention(channels, context_channels, rng, heads=heads)
        self.widen, self.narrow = Linear(channels, 8 * channels, rng), Linear(4 * channels, channels, rng)

    def __call__(self, x: Tensor, context: Tensor, mask: Array | None = None) -> Tensor:
        h = x + self.out(ops.self_attention(self.qkv(self.norm1(x)), heads=self.heads))
        h = h + self.cross(self.norm2(h), context, mask)
        wide, half = self.widen(self.norm3(h)), 4 * x.shape[2]
        return h + self.narrow(wide[..., :half] * ops.gelu(wide[..., half:]))
