"""The denoiser ε_θ(x_t, t) for points in the plane: what the U-Net is for images, small enough to train in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, value_range
from tinydiff.nn.embedding import Embedding, TimeEmbedding
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module
from tinydiff.rng import Rng

WAVES = 4
"""How many sines and cosines, each twice as fine as the one before, an MLP sees of each coordinate."""


@dataclass(frozen=True)
class MLPConfig:
    """The sizes of an MLP: coordinates of a point, width of the layers, blocks of two, and class labels or None.

    Raises ValueError for a size below 1, or an odd width: a time has as many sines as cosines.
    """

    channels: int = 2
    width: int = 128
    blocks: int = 3
    classes: int | None = None

    def __post_init__(self) -> None:
        if min(self.channels, self.width, self.blocks, self.classes or 1) < 1 or self.width % 2:
            raise ValueError(f"an MLP needs sizes of at least 1 and an even width, got {self}")


class MLP(Module):
    """ε_θ(x_t, t) of points, optionally told a class label: h ← h + W' SiLU(W SiLU(h) + emb), a few times.

    emb is what a block is told of the time and the class. The output starts at zero. A label of -1 stands for no label
    (E35), as does `label=None`.
    """

    def __init__(self, config: MLPConfig, rng: Rng):
        self.config, width = config, config.width
        self.time = TimeEmbedding(width, width, rng)
        self.label = Embedding(config.classes + 1, width, rng) if config.classes else None
        self.into = Linear(config.channels * (1 + 2 * WAVES), width, rng)
        self.blocks = [Block(width, rng) for _ in range(config.blocks)]
        self.out = Linear(width, config.channels, rng, zero=True)

    def __call__(self, x: Tensor, t: Array, label: Array | None = None) -> Tensor:
        """x: (B, channels); t: (B,) times; label: (B,) whole numbers in -1..classes-1. Gives (B, channels).

        Raises ValueError for points of another shape, times or labels that are not one a point, or unknown labels.
        """
        self._check(x, t, label)
        emb = self.time(t)
        if self.label is not None:
            emb = emb + self.label((array_module(t).full(len(x), -1) if label is None else label) + 1)
        emb = ops.silu(emb)
        h = self.into(waves(x))
        for block in self.blocks:
            h = block(h, emb)
        return self.out(ops.silu(h))

    def _check(self, x: Tensor, t: Array, label: Array | None) -> None:
        channels, classes = self.config.channels, self.config.classes or 0
        if x.ndim != 2 or x.shape[1] != channels:
            raise ValueError(f"the MLP takes points (B, {channels}), got {x.shape}")
        for name, value in (("times", t), ("labels", label)):
            if value is not None and getattr(value, "shape", None) != (len(x),):
                raise ValueError(f"the {name} must be an array ({len(x)},), one for each point, got {value}")
        if label is not None and not classes:
            raise ValueError("a label was given to an MLP without classes")
        found = None if label is None else value_range(label)
        if found and not (-1 <= found[0] and found[1] < classes):
            raise ValueError(f"labels must be in -1..{classes - 1}, got {label}")


def waves(x: Tensor) -> Tensor:
    """[x, sin(2^i x), cos(2^i x)] for i < WAVES: without them a network of few layers sees only coarse figures.

    x: (B, D), about as large as N(0, I). Returns (B, D (1 + 2 WAVES)). (Tancik et al. 2020)
    """
    angles = ops.concat([x * 2.0**i for i in range(WAVES)])
    return ops.concat([x, ops.sin(angles), ops.cos(angles)])


class Block(Module):
    """h + W' SiLU(W SiLU(h) + Linear(emb)): a ResBlock for points. W' starts at zero, so that the block starts as h."""

    def __init__(self, width: int, rng: Rng):
        self.inner, self.emb = Linear(width, width, rng), Linear(width, width, rng)
        self.outer = Linear(width, width, rng, zero=True)

    def __call__(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.outer(ops.silu(self.inner(ops.silu(h)) + self.emb(emb)))
