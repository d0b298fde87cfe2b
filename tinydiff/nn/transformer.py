"""The transformer: tokens that look at each other, for image towers, texts and the prior."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, to_device
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module
from tinydiff.nn.norm import LayerNorm
from tinydiff.rng import Rng


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a transformer.

    width: of the tokens; layers: how many blocks; heads: of attention; ratio: the MLP's hidden width over width;
    causal: whether a token sees only itself and earlier ones. Raises ValueError for sizes below 1, or if the heads do
    not divide the width.
    """

    width: int = 256
    layers: int = 6
    heads: int = 4
    ratio: int = 4
    causal: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self.ratio) < 1:
            raise ValueError(f"a transformer needs sizes of at least 1, got {self}")
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")


class Transformer(Module):
    """Blocks one after the other, then LayerNorm (Vaswani et al. 2017; Xiong et al. 2020, fig. 1b).

    x: (B, N, width); mask: (B, N) boolean, False for tokens that are padding and must have no influence (what comes out
    in their places means nothing). Gives (B, N, width). It knows no places: position embeddings are the caller's.
    Raises ValueError for an x or a mask of another shape.
    """

    def __init__(self, config: TransformerConfig, rng: Rng):
        self.config = config
        self.blocks = [TransformerBlock(config, rng) for _ in range(config.layers)]
        self.norm = LayerNorm(config.width)

    def __call__(self, x: Tensor, mask: Array | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[2] != self.config.width:
            raise ValueError(f"the transformer takes tokens (B, N, {self.config.width}), got {x.shape}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != bool):
            raise ValueError(f"the mask must be boolean and {x.shape[:2]}, got {mask.dtype} and {mask.shape}")
        visible = self._visible(x, mask)
        for block in self.blocks:
            x = block(x, visible)
        return self.norm(x)

    def _visible(self, x: Tensor, mask: Array | None) -> Array | None:
        """Which token (second to last axis) sees which (last), to be broadcast to (B, heads, N, N); None if all do."""
        keys = None if mask is None else mask[:, None, None, :]
        if not self.config.causal:
            return keys
        earlier = to_device(np.tri(x.shape[1], dtype=bool), x.device)
        return earlier if keys is None else earlier & keys


class TransformerBlock(Module):
    """h = x + Linear(attention(Q, K, V)), then h + MLP(LayerNorm(h)), with Q, K and V linear in LayerNorm(x).

    MLP(h) = Linear(GELU(Linear(h))). x: (B, N, width); visible: boolean, broadcast to (B, heads, N, N), whether a token
    sees another. The branches do not start at zero, or two towers of a fresh CLIP would pass on their embeddings alone;
    their last weights are smaller by 1/√(2 layers) (Radford et al. 2019, §2.3), so that all 2 layers of them together
    add as much as the tokens began with.
    """

    def __init__(self, config: TransformerConfig, rng: Rng):
        width, hidden, scale = config.width, config.ratio * config.width, (2 * config.layers) ** -0.5
        self.heads = config.heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.qkv = Linear(width, 3 * width, rng)
        self.out = Linear(width, width, rng, scale=scale)
        self.inner, self.outer = Linear(width, hidden, rng), Linear(hidden, width, rng, scale=scale)

    def __call__(self, x: Tensor, visible: Array | None = None) -> Tensor:
        x = x + self.out(ops.self_attention(self.qkv(self.norm1(x)), visible, heads=self.heads))
        return x + self.outer(ops.gelu(self.inner(self.norm2(x))))
