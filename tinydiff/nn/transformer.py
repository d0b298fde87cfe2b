"""The transformer: tokens that look at each other, for image towers, texts and the prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module
from tinydiff.nn.norm import LayerNorm
from tinydiff.rng import Rng


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), a rougher approximation of x Φ(x) than `ops.gelu` (Hendrycks & Gimpel 2016)."""
    return ops.silu(x * 1.702) * (1 / 1.702)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": ops.gelu, "quick-gelu": quick_gelu}


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a transformer.

    width: of the tokens; layers: how many blocks; heads: of attention; ratio: the MLP's hidden width over width;
    causal: whether a token sees only itself and earlier ones; activation: the MLP's, "gelu", or "quick-gelu" as in
    CLIP's published weights. Raises ValueError for sizes below 1, another activation, or if the heads do not divide the
    width.
    """

    width: int = 256
    layers: int = 6
    heads: int = 4
    ratio: int = 4
    causal: bool = False
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self.ratio) < 1:
            raise ValueError(f"a transformer needs sizes of at least 1, got {self}")
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"the activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


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
        places = array_module(x.data).arange(x.shape[1])
        earlier = places[:, None] >= places
        return earlier if keys is None else earlier & keys


class TransformerBlock(Module):
    """h = x + Linear(attention(Q, K, V)), then h + MLP(LayerNorm(h)), with Q, K and V linear in LayerNorm(x).

    MLP(h) = Linear(f(Linear(h))) with f the activation. x: (B, N, width); visible: boolean, broadcast to (B, heads, N,
    N), whether a token sees another. The branches do not start at zero, or two towers of a fresh CLIP would pass on
    their embeddings alone; their last weights are smaller by 1/√(2 layers) (Radford et al. 2019, §2.3), so that all
    2 layers of them together add as much as the tokens began with.
    """

    def __init__(self, config: TransformerConfig, rng: Rng):
        width, hidden, scale = config.width, config.ratio * config.width, (2 * config.layers) ** -0.5
        self.heads, self.activation = config.heads, ACTIVATIONS[config.activation]
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.qkv = Linear(width, 3 * width, rng)
        self.out = Linear(width, width, rng, scale=scale)
        self.inner, self.outer = Linear(width, hidden, rng), Linear(hidden, width, rng, scale=scale)

    def __call__(self, x: Tensor, visible: Array | None = None) -> Tensor:
        x = x + self.out(ops.self_attention(self.qkv(self.norm1(x)), visible, heads=self.heads))
        return x + self.outer(self.activation(self.inner(self.norm2(x))))
