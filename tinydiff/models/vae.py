"""The first stage of latent diffusion (E23): an autoencoder that leaves out of an image what the eye does not miss.

x ── encoder ── mean, variance ── z ── decoder ── x̂
(512, 512, 3)                (64, 64, 4)          (512, 512, 3)

Rombach et al. 2022, section 3.1 and appendix G.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from tinydiff import ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, array_module, to_device
from tinydiff.files import PathLike
from tinydiff.models.trained import load_trained
from tinydiff.nn import Conv2d, Downsample, GroupNorm, Module, ResBlock, SelfAttention, Upsample
from tinydiff.nn.module import Parameter
from tinydiff.rng import Rng

REGULARISATIONS = ("kl", "vq")


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of an autoencoder, and what keeps its latents in bounds.

    channels: of the images; base: width of the finest level; multipliers: each level's width over base; blocks:
    ResBlocks a level of the encoder (one more in the decoder); latent: channels of z; groups: of GroupNorm; attention:
    whether pixels look at each other in the two middles; patch: turn patch x patch pixels into one before the first
    level, which is faster by about patch²; regularisation: "kl", which draws z from a Gaussian and keeps that near
    N(0, I), or "vq", which moves each pixel of z to the nearest of `codes` learned vectors; scale: what z is multiplied
    by so that its variance is 1 (E24), which `VAE.measure_scale` finds.

    Raises ValueError for sizes below 1, groups that do not divide base, another regularisation, or a scale that is not
    positive.
    """

    channels: int = 3
    base: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    latent: int = 4
    groups: int = 8
    attention: bool = True
    patch: int = 2
    regularisation: str = "kl"
    codes: int = 512
    scale: float = 1.0

    def __post_init__(self) -> None:
        sizes = (self.channels, self.base, self.blocks, self.latent, self.groups, self.patch, self.codes)
        if not self.multipliers or min(*sizes, *self.multipliers) < 1:
            raise ValueError(f"a VAE needs at least one level, and sizes of at least 1, got {self}")
        if self.base % self.groups:
            raise ValueError(f"groups ({self.groups}) must divide base ({self.base})")
        if self.regularisation not in REGULARISATIONS:
            known = ", ".join(REGULARISATIONS)
            raise ValueError(f"the regularisation must be one of {known}, got {self.regularisation!r}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"the scale of the latents must be positive, got {self.scale}")

    @property
    def factor(self) -> int:
        """f: how many pixels, along each side, become one of z."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.base * m for m in self.multipliers)


CONFIGS = {
    "f4": VAEConfig(),
    "f8": VAEConfig(multipliers=(1, 2, 2)),
    "stable-diffusion": VAEConfig(base=128, multipliers=(1, 2, 4, 4), blocks=2, groups=32, patch=1, scale=0.18215),
}
"""Two for small images, by how much smaller z is; and that of Stable Diffusion 1.x, 83,653,863 parameters, f = 8."""


class Encoder(Module):
    """Images (B, H, W, channels) -> (B, H/f, W/f, outputs): levels of ResBlocks, each half the size, and the middle."""

    def __init__(self, config: VAEConfig, outputs: int, rng: Rng):
        widths, self.patch = config.widths, config.patch
        self.conv_in = Conv2d(config.channels * config.patch**2, widths[0], rng)
        self.down: list[ResBlock | Downsample] = []
        inputs = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(ResBlock(inputs, width, None, rng, groups=config.groups))
                inputs = width
            if level < len(widths) - 1:
                self.down.append(Downsample(width, rng))
        self.middle = _middle(config, rng)
        self.norm_out = GroupNorm(inputs, config.groups, silu=True)
        self.conv_out = Conv2d(inputs, outputs, rng)

    def __call__(self, x: Tensor) -> Tensor:
        h = self.conv_in(ops.space_to_depth(x, factor=self.patch))
        for layer in (*self.down, *self.middle):
            h = layer(h)
        return self.conv_out(self.norm_out(h))


class Decoder(Module):
    """The way back, z (B, h, w, latent) -> images (B, f h, f w, channels)."""

    def __init__(self, config: VAEConfig, rng: Rng):
        widths, self.patch = config.widths, config.patch
        self.conv_in = Conv2d(config.latent, widths[-1], rng)
        self.middle = _middle(config, rng)
        self.up: list[ResBlock | Upsample] = []
        inputs = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(ResBlock(inputs, width, None, rng, groups=config.groups))
                inputs = width
            if level > 0:
                self.up.append(Upsample(width, rng))
        self.norm_out = GroupNorm(inputs, config.groups, silu=True)
        self.conv_out = Conv2d(inputs, config.channels * config.patch**2, rng)

    def __call__(self, z: Tensor) -> Tensor:
        return self.last(self.features(z))

    def features(self, z: Tensor) -> Tensor:
        """All but the last layer."""
        h = self.conv_in(z)
        for layer in (*self.middle, *self.up):
            h = layer(h)
        return self.norm_out(h)

    def last(self, h: Tensor) -> Tensor:
        """The last layer: from features to pixels."""
        return ops.depth_to_space(self.conv_out(h), factor=self.patch)


def _middle(config: VAEConfig, rng: Rng) -> list[ResBlock | SelfAttention]:
    """What the coarsest level has beside its blocks: a ResBlock, attention, a ResBlock."""
    width, groups = config.widths[-1], config.groups
    blocks = [ResBlock(width, width, None, rng, groups=groups) for _ in range(2)]
    attention = [SelfAttention(width, rng, heads=1, groups=groups)] if config.attention else []
    return [blocks[0], *attention, blocks[1]]


class Codebook(Module):
    """Vectors e_1, ..., e_K, the only ones a decoder sees: each pixel of z becomes the nearest (E23, "vq").

    van den Oord et al. 2017, section 3.1 and 3.2.
    """

    COMMITMENT = 0.25
    """How strongly z is drawn to its vector, over how strongly the vector is drawn to z."""

    def __init__(self, codes: int, channels: int, rng: Rng):
        self.weight = Parameter(rng.normal((codes, channels)))

    def nearest(self, z: Array) -> Array:
        """Which vector is nearest to each pixel: argmin_k |z - e_k|². z: (..., channels). Gives int64 (...)."""
        e = self.weight.data
        return ((e * e).sum(axis=1) - 2 * z @ e.T).argmin(axis=-1)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest vectors, shaped as z, and the loss that brings both together:

            L = |sg(z) - e|² + 0.25 |z - sg(e)|²,  the mean over all elements; sg lets no gradient through

        The first result's gradient passes to z as if nothing had been replaced (straight through).
        """
        e = ops.take_rows(self.weight, rows=self.nearest(z.data))
        loss = ops.mse_loss(e, z.detach()) + self.COMMITMENT * ops.mse_loss(z, e.detach())
        return z + (e.data - z.data), loss


class VAE(Module):
    """Encoder and decoder, and z between them, of f² times fewer pixels than the image.

    `encode` and `decode` are for use: scaled latents, images in [-1, 1]. `posterior`, `draw` and `decoder` are for
    training, on tensors.
    """

    kind = "vae"

    def __init__(self, config: VAEConfig, rng: Rng):
        self.config = config
        outputs = config.latent * (2 if config.regularisation == "kl" else 1)
        self.encoder, self.decoder = Encoder(config, outputs, rng.at(0)), Decoder(config, rng.at(1))
        self.conv_moments = Conv2d(outputs, outputs, rng.at(2), kernel=1)
        self.conv_z = Conv2d(config.latent, config.latent, rng.at(3), kernel=1)
        self.codebook = Codebook(config.codes, config.latent, rng.at(4)) if config.regularisation == "vq" else None

    @staticmethod
    def load(path: PathLike) -> VAE:
        """The model in a training run's checkpoint, with the averaged weights (EMA), and without its discriminator.

        path: the checkpoint, the folder it is in, or the name of a shipped one, "vae". Raises CheckpointError if it
        cannot be read.
        """
        return load_trained(path, VAE.kind, lambda fields: VAE(VAEConfig(**fields), Rng(0)), without="discriminator")

    @property
    def factor(self) -> int:
        """f: how many pixels, along each side, become one of z."""
        return self.config.factor

    # For use

    def encode(self, images: Array) -> Array:
        """z = scale · mean of q(z given x), of variance 1 (E24). With a codebook: before the nearest vector is taken.

        images: (B, H, W, channels), float32 in [-1, 1], H and W divisible by f. Gives (B, H/f, W/f, latent), float32.
        Raises ValueError for another shape.
        """
        self._check(images)
        return self._of_each(lambda x: self.mean(x) * self.config.scale, images)

    def decode(self, z: Array) -> Array:
        """The images of scaled latents, x̂ = D(z / scale), limited to [-1, 1].

        z: (B, h, w, latent), float32. Gives (B, f h, f w, channels). Raises ValueError for another shape.
        """
        if z.ndim != 4 or z.shape[3] != self.config.latent or 0 in z.shape:
            raise ValueError(f"the decoder takes latents (B, h, w, {self.config.latent}), got {tuple(z.shape)}")
        return self._of_each(lambda z: ops.clip(self._decoded(z / self.config.scale), low=-1, high=1), z)

    def measure_scale(self, images: Array) -> float:
        """Find the scale with which the latents of these images have variance 1, and keep it in the configuration.

            scale = 1 / std(z), over all of z's elements, before any scale     (E24)

        images: as `encode` takes them. Returns the scale. Raises ValueError if the latents are all alike.
        """
        z = self.encode(images)
        std = float(z.std()) / self.config.scale
        if not std > 0:
            raise ValueError("the latents of these images are all alike: there is no scale to give them")
        self.config = dataclasses.replace(self.config, scale=1 / std)
        return self.config.scale

    def _of_each(self, function: Callable[[Tensor], Tensor], items: Array, batch: int = 64) -> Array:
        """What a function gives for these items, a few at a time, and with no gradients."""
        items = to_device(items, self.conv_z.weight.device)
        with no_grad():
            pieces = [function(Tensor(items[i : i + batch])).data for i in range(0, len(items), batch)]
        return pieces[0] if len(pieces) == 1 else array_module(items).concatenate(pieces)

    def _decoded(self, z: Tensor) -> Tensor:
        """The images of latents as they come from an encoder."""
        return self.decoder(self.conv_z(self.codebook(z)[0] if self.codebook is not None else z))

    # For training

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z given x), each (B, h, w, latent), not scaled.

        x: images as `encode` takes them. The log variance is limited to [-30, 20]. Raises ValueError for another shape,
        or if z is chosen from a codebook, where it has no variance.
        """
        if self.codebook is not None:
            raise ValueError("with a codebook there is no posterior: z is the nearest vector")
        moments, c = self._moments(x), self.config.latent
        return moments[..., :c], ops.clip(moments[..., c:], low=-30, high=20)

    def mean(self, x: Tensor) -> Tensor:
        """What the encoder says of images, before chance or the codebook, not scaled: (B, h, w, latent)."""
        return self._moments(x)[..., : self.config.latent]

    def draw(self, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """What the decoder is shown of the images x in training, (B, h, w, latent), and the price of it:

            kl:  z = mean + exp(log_variance / 2) ε,   KL(q(z given x) to N(0, I)) / D, nats a dimension of x
            vq:  z = the nearest vectors,              `Codebook`'s loss

        D = H W channels. rng: the stream that ε is drawn from. (E23; Kingma & Welling 2014, eq. 10)
        """
        if self.codebook is not None:
            z, price = self.codebook(self.mean(x))
            return self.conv_z(z), price
        mean, log_variance = self.posterior(x)
        z = mean + ops.exp(log_variance * 0.5) * rng.normal_like(mean.data)
        return self.conv_z(z), ops.kl_standard_normal(mean, log_variance) / (x.size // len(x))

    def _moments(self, x: Tensor) -> Tensor:
        self._check(x)
        return self.conv_moments(self.encoder(x))

    def _check(self, x: Tensor | Array) -> None:
        f, channels, shape = self.factor, self.config.channels, tuple(x.shape)
        if len(shape) != 4 or shape[3] != channels or shape[1] % f or shape[2] % f or 0 in shape:
            raise ValueError(f"the VAE takes images (B, H, W, {channels}) with H and W divisible by {f}, got {shape}")
