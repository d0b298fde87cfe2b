"""The U-Net ε_θ(x_t, t): down the resolutions, across, and up again, each level handing its features over (E20).

x_t ── conv ─ level 1 ───────────────────────────────── level 1 ─ norm, conv ── ε
                 └─ down ─ level 2 ───────── level 2 ─ up ─┘
                              └─ down ─ middle ─ up ─┘
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, value_range
from tinydiff.nn.attention import SelfAttention
from tinydiff.nn.conv import Conv2d, Downsample, Upsample
from tinydiff.nn.embedding import Embedding, TimeEmbedding
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module
from tinydiff.nn.norm import GroupNorm
from tinydiff.nn.resblock import ResBlock
from tinydiff.nn.spatial_transformer import SpatialTransformer
from tinydiff.rng import Rng


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a U-Net.

    channels: of the images; base: width of the first level; multipliers: each level's width over base; blocks:
    ResBlocks a level on the way down (one more on the way up); attention: the levels that attend, 0 the finest;
    heads, groups: of attention and of GroupNorm; dropout: within the ResBlocks; classes: how many class labels it can
    be told, or None; context: the width of the text tokens it can attend to, or None; patch: turn patch x patch pixels
    into one before the first level (Luhman & Luhman 2022), which is faster by about patch²; extra: channels of a second
    image that it is shown beside the noisy one; outputs: channels that it gives, None for as many as the images have;
    fourier: exponents n whose sin(2^n π x) and cos(2^n π x) are shown beside the image x (Kingma et al. 2021, App. C),
    since a network looks past differences as small as that of neighbouring grey levels, in which most bits lie; vector:
    how many numbers it is told beside the time, such as an embedding of the image that is wanted (E33), or None;
    pooled: whether it is told the mean of the text's tokens beside the time too, as Imagen's (E37; Saharia et al. 2022,
    section 2.1): what holds of the whole image, such as its background, need not be attended to from every place.

    Raises ValueError for sizes that do not fit one another, or pooled without a context.
    """

    channels: int = 1
    base: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (2,)
    heads: int = 1
    groups: int = 8
    dropout: float = 0.0
    classes: int | None = None
    context: int | None = None
    patch: int = 1
    extra: int = 0
    outputs: int | None = None
    fourier: tuple[int, ...] = ()
    vector: int | None = None
    pooled: bool = False

    def __post_init__(self) -> None:
        sizes = (self.channels, self.base, self.blocks, self.patch, self.outputs, self.vector, *self.multipliers)
        if not self.multipliers or any(n is not None and n < 1 for n in sizes) or self.extra < 0:
            raise ValueError(f"a U-Net needs at least one level, and sizes of at least 1, got {self}")
        if any(not 0 <= level < len(self.multipliers) for level in self.attention):
            raise ValueError(f"levels that attend must be in 0..{len(self.multipliers) - 1}, got {self.attention}")
        if self.base % 2:
            raise ValueError(f"base ({self.base}) must be even: a time has as many sines as cosines")
        if self.base % self.groups:
            raise ValueError(f"groups ({self.groups}) must divide base ({self.base})")
        if self.pooled and self.context is None:
            raise ValueError("without a context there are no tokens to tell the mean of")


class UNet(Module):
    """ε_θ(x_t, t), optionally told a class label, a vector and the tokens of a text, and shown a second image.

    The output has the input's shape, but for the channels if the configuration says so, and starts at zero. A label of
    -1 stands for no label (E35), as does `label=None`.
    """

    def __init__(self, config: UNetConfig, rng: Rng):
        self.config = config
        embedding, patch = 4 * config.base, config.patch**2
        shown = config.channels * (1 + 2 * len(config.fourier)) + config.extra
        widths = [config.base * m for m in config.multipliers]
        self.time = TimeEmbedding(config.base, embedding, rng)
        self.label = Embedding(config.classes + 1, embedding, rng) if config.classes else None
        self.vector = Linear(config.vector, embedding, rng) if config.vector else None
        self.pooled = Linear(config.context, embedding, rng) if config.pooled and config.context else None
        self.conv_in = Conv2d(shown * patch, widths[0], rng)

        self.down: list[Stage | Downsample] = []
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(Stage(config, level, skips[-1], rng))
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Downsample(width, rng))
                skips.append(width)

        self.middle = [
            Stage(config, len(widths) - 1, widths[-1], rng, attend=True),
            Stage(config, len(widths) - 1, widths[-1], rng, attend=False),
        ]

        self.up: list[Stage | Upsample] = []
        inputs = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(Stage(config, level, inputs + skips.pop(), rng))
                inputs = width
            if level > 0:
                self.up.append(Upsample(width, rng))

        self.norm_out = GroupNorm(widths[0], config.groups, silu=True)
        self.conv_out = Conv2d(widths[0], (config.outputs or config.channels) * patch, rng, zero=True)

    def __call__(
        self,
        x: Tensor,
        t: Array,
        label: Array | None = None,
        context: Tensor | None = None,
        mask: Array | None = None,
        rng: Rng | None = None,
        extra: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        """x: (B, H, W, channels); t: (B,) times; label: (B,) whole numbers in -1..classes-1; context: (B, M, context)
        tokens, with mask (B, M) False for padding; rng: for dropout while training; extra: (B, H, W, extra), the second
        image; vector: (B, vector). Gives (B, H, W, outputs). Raises ValueError for an image that cannot be halved as
        often as there are levels, times or labels that are not one an image, or a condition that the model does not
        know or lacks."""
        self._check(x, t, label, context, extra, vector)
        emb = self.time(t)
        if self.label is not None:
            emb = emb + self.label((array_module(t).full(len(x), -1) if label is None else label) + 1)
        if self.vector is not None and vector is not None:
            emb = emb + self.vector(vector)
        if self.pooled is not None and context is not None:
            emb = emb + self.pooled(mean_token(context, mask))
        emb = ops.silu(emb)

        h = x if extra is None else ops.concat([x, extra])
        if self.config.fourier:
            h = ops.concat([h, *fourier_features(x, self.config.fourier)])
        h = ops.space_to_depth(h, factor=self.config.patch) if self.config.patch > 1 else h
        h = self.conv_in(h)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, context, mask, rng) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, emb, context, mask, rng)
        for part in self.up:
            h = part(ops.concat([h, skips.pop()]), emb, context, mask, rng) if isinstance(part, Stage) else part(h)
        h = self.conv_out(self.norm_out(h))
        return ops.depth_to_space(h, factor=self.config.patch) if self.config.patch > 1 else h

    def _check(
        self,
        x: Tensor,
        t: Array,
        label: Array | None,
        context: Tensor | None,
        extra: Tensor | None,
        vector: Tensor | None,
    ) -> None:
        c = self.config
        factor = c.patch * 2 ** (len(c.multipliers) - 1)
        if x.ndim != 4 or x.shape[3] != c.channels or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"the U-Net takes images (B, H, W, {c.channels}) with H and W divisible by {factor}, got {x.shape}"
            )
        for name, value in (("times", t), ("labels", label)):
            if value is not None and getattr(value, "shape", None) != (len(x),):
                raise ValueError(f"the {name} must be an array ({len(x)},), one for each image, got {value}")
        if label is not None and c.classes is None:
            raise ValueError("a label was given to a U-Net without classes")
        found = None if label is None else value_range(label)
        if found and not (-1 <= found[0] and found[1] < (c.classes or 0)):
            raise ValueError(f"labels must be in -1..{(c.classes or 0) - 1}, got {label}")
        shape = None if extra is None else extra.shape
        if shape != ((*x.shape[:3], c.extra) if c.extra else None):
            raise ValueError(f"the U-Net's second image has {c.extra} channels and the size of {x.shape}, got {shape}")
        shape = None if vector is None else vector.shape
        if shape != ((len(x), c.vector) if c.vector else None):
            raise ValueError(f"the U-Net is told vectors of {c.vector} numbers, one for each of {x.shape}, got {shape}")
        width = None if context is None else context.shape[-1]
        if width != c.context:
            raise ValueError(f"the U-Net's context has width {c.context}, got {width}")


def mean_token(tokens: Tensor, mask: Array | None = None) -> Tensor:
    """The mean of the tokens that are there, (B, width). tokens: (B, M, width); mask: (B, M), False for padding."""
    if mask is None:
        return tokens.mean(axis=1)
    there = mask.astype(tokens.dtype)
    return (tokens * (there / there.sum(axis=1, keepdims=True))[..., None]).sum(axis=1)


def fourier_features(x: Tensor, exponents: tuple[int, ...]) -> list[Tensor]:
    """sin(2^n π x) and cos(2^n π x) for each exponent n, each shaped as x (Kingma et al. 2021, App. C)."""
    angles = [x * (2.0**n * math.pi) for n in exponents]
    return [wave(angle) for angle in angles for wave in (ops.sin, ops.cos)]


class Stage(Module):
    """A ResBlock, then where its level has it self-attention, or with a context a SpatialTransformer."""

    def __init__(self, config: UNetConfig, level: int, inputs: int, rng: Rng, attend: bool | None = None):
        c, width = config, config.base * config.multipliers[level]
        attend = level in c.attention if attend is None else attend
        self.block = ResBlock(inputs, width, 4 * c.base, rng, groups=c.groups, dropout=c.dropout)
        self.attention = self.text = None
        if attend and c.context:
            self.text = SpatialTransformer(width, c.context, rng, heads=c.heads, groups=c.groups)
        elif attend:
            self.attention = SelfAttention(width, rng, heads=c.heads, groups=c.groups)

    def __call__(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Array | None, rng: Rng | None) -> Tensor:
        h = self.block(x, emb, rng)
        h = self.attention(h) if self.attention else h
        return self.text(h, context, mask) if self.text and context is not None else h
