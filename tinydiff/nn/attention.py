"""Attention layers: every pixel looks at every other (self), or at the tokens of a text (cross)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
        check_heads(channels, heads)
        self.heads = heads
        self.norm = GroupNorm(channels, groups)
        self.qkv = Linear(channels, 3 * channels, rng)
        self.out = Linear(channels, channels, rng, zero=True)

    def __call__(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, H * W, 3 * C)
        return x + self.out(ops.self_attention(qkv, heads=self.heads)).reshape(B, H, W, C)


class CrossAttention(Module):
    """Linear(attention(Q, K, V)), Q linear in x, K and V linear in a context (E27; Rombach et al. 2022, section 3.3).

    x: tokens (B, N, channels), as the pixels of an image; context: (B, M, context_channels), as those of a text; mask:
    (B, M) boolean, False for tokens that are padding and must have no influence. Gives (B, N, channels).
    Raises ValueError unless the heads divide the channels.
    """

    seen: list[Array] | None = None
    """Where its weights are kept, while it is `watched`."""

    def __init__(self, channels: int, context_channels: int, rng: Rng, *, heads: int):
        check_heads(channels, heads)
        self.heads = heads
        self.q = Linear(channels, channels, rng, bias=False)
        self.k = Linear(context_channels, channels, rng, bias=False)
        self.v = Linear(context_channels, channels, rng, bias=False)
        self.out = Linear(channels, channels, rng)

    def __call__(self, x: Tensor, context: Tensor, mask: Array | None = None) -> Tensor:
        if self.seen is not None:
            self.seen.append(self.weights(x, context, mask))
        q, k, v = (split_heads(h, self.heads) for h in (self.q(x), self.k(context), self.v(context)))
        return self.out(merge_heads(ops.attention(q, k, v, _keys(mask))))

    def weights(self, x: Tensor, context: Tensor, mask: Array | None = None) -> Array:
        """softmax(Q Kᵀ/√d): how much each token of x listens to each of the context, (B, heads, N, M), rows summing
        to 1. The layer itself never has them all at once; they are for looking at."""
        q, k = split_heads(self.q(x), self.heads), split_heads(self.k(context), self.heads)
        scores = q @ k.transpose(0, 1, 3, 2) * (q.shape[-1] ** -0.5)
        keys = _keys(mask)
        return ops.softmax(scores if keys is None else ops.where(keys, scores, -1e30)).data


@contextlib.contextmanager
def watched(module: Module) -> Iterator[list[Array]]:
    """Within this context, the weights of every CrossAttention inside a module are kept: a list that grows as it runs.

    Each of them is what `CrossAttention.weights` gives, in the order of the calls.
    """
    seen: list[Array] = []
    layers = list(_cross_attentions(module))
    for layer in layers:
        layer.seen = seen
    try:
        yield seen
    finally:
        for layer in layers:
            layer.seen = None


def _cross_attentions(module: Module) -> Iterator[CrossAttention]:
    if isinstance(module, CrossAttention):
        yield module
    for _, child in module.children():
        yield from _cross_attentions(child)


def _keys(mask: Array | None) -> Array | None:
    """The mask of a context (B, M), to be broadcast to (B, heads, N, M)."""
    return None if mask is None else mask[:, None, None, :]


def check_heads(channels: int, heads: int) -> None:
    """Raise ValueError unless the heads divide the channels."""
    if channels % heads:
        raise ValueError(f"the number of heads must divide the number of channels, got {heads} and {channels}")
