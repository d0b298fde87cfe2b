"""A generative adversarial network: two networks, one that draws and one that tells drawings from data (E39)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from tinydiff import ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array
from tinydiff.files import PathLike
from tinydiff.models.digit_nets import DigitDecoder, DigitEncoder
from tinydiff.models.trained import load_trained
from tinydiff.nn import Module
from tinydiff.rng import Rng


@dataclass(frozen=True)
class GANConfig:
    """What a GAN is made of.

    size: height and width of the images. latent: how many numbers z an image is drawn from. width: see DigitEncoder.
    gamma: how strongly the discriminator is kept flat around real images. sigma: over which distance that is measured.

    Raises ValueError for a latent below 1, a negative gamma or a sigma that is not positive.
    """

    size: int = 28
    latent: int = 64
    width: int = 32
    gamma: float = 1.0
    sigma: float = 0.1

    def __post_init__(self) -> None:
        if self.latent < 1 or self.gamma < 0 or not self.sigma > 0:
            raise ValueError(f"a GAN needs latent >= 1, gamma >= 0 and sigma > 0, got {self}")


class GAN(Module):
    """A generator G(z), z ~ N(0, I), and a discriminator D(x), large where x looks real."""

    kind = "gan"

    def __init__(self, config: GANConfig, rng: Rng):
        self.config = config
        self.generator = DigitDecoder(config.size, config.latent, config.width, rng.at(0))
        self.discriminator = DigitEncoder(config.size, 1, config.width, rng.at(1))

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA).

        path: the checkpoint, or the folder it is in. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(GANConfig(**fields), Rng(0)))

    def loss(self, x: Array, rng: Rng) -> Tensor:
        """One draw of both losses, whose sum has the gradient of each for the network that minimises it.

            L_D = E[softplus(-D(x))] + E[softplus(D(G(z)))] + γ/2 E[((D(x + σ u) - D(x)) / σ)²],  u ~ N(0, I)
            L_G = E[softplus(-D(G(z)))]

        In L_D the drawings are given, in L_G the discriminator is. The last term of L_D is near γ/2 E|∇D(x)|², since
        the mean square of u·∇D is |∇D|²: first derivatives suffice. Without it the two never settle.
        x: (B, size, size, 1), float32 in [-1, 1]. rng: the stream of this step.
        Goodfellow et al. 2014, sec. 3 (the loss of G that does not saturate); Mescheder et al. 2018, eq. 9 (R1), here
        by differences, much as in Lin et al. 2025.
        """
        gamma, sigma, B = self.config.gamma, self.config.sigma, len(x)
        drawn = self.generator(Tensor(rng.at(0).normal((B, self.config.latent), x.dtype)))
        moved = x + sigma * rng.at(1).normal_like(x)

        judged = self.discriminator(ops.concat([Tensor(x), Tensor(moved), drawn.detach()], axis=0))
        real, near, fake = judged[:B], judged[B : 2 * B], judged[2 * B :]
        slope = (near - real) / sigma
        loss_D = (softplus(-real) + softplus(fake) + gamma / 2 * slope * slope).mean()

        with frozen(self.discriminator):
            loss_G = softplus(-self.discriminator(drawn)).mean()
        return loss_D + loss_G

    def sample(self, n: int, rng: Rng) -> Array:
        """Draw n images, G(z), in one pass: (n, size, size, 1), float32 in [-1, 1]. ValueError for n < 1."""
        if n < 1:
            raise ValueError(f"the number of images must be at least 1, got {n}")
        with no_grad():
            return self.generator(Tensor(rng.normal((n, self.config.latent)))).data


@contextlib.contextmanager
def frozen(module: Module) -> Iterator[None]:
    """What is computed within this context has gradients for the module's inputs, but none for its parameters."""
    parameters = [p for p in module.parameters().values() if p.requires_grad]
    for p in parameters:
        p.requires_grad = False
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad = True


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), which no x overflows."""
    return ops.relu(x) + ops.log(1.0 + ops.exp(-ops.absolute(x)))
