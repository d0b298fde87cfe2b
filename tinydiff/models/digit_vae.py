"""A variational autoencoder of digits: it learns to draw by learning to describe (E39; Kingma & Welling 2014)."""

from __future__ import annotations

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
class DigitVAEConfig:
    """What a DigitVAE is made of.

    size: height and width of the images. latent: how many numbers z describe one. width: see DigitEncoder. sigma: the
    standard deviation of a pixel around what the decoder draws; a smaller one asks for sharper images, and leaves less
    weight to having z look like noise.

    Raises ValueError for a latent below 1 or a sigma that is not positive.
    """

    size: int = 28
    latent: int = 16
    width: int = 32
    sigma: float = 0.4

    def __post_init__(self) -> None:
        if self.latent < 1 or not self.sigma > 0:
            raise ValueError(f"a VAE needs latent >= 1 and sigma > 0, got {self}")


class DigitVAE(Module):
    """An encoder q(z given x) = N(m(x), diag s²(x)) and a decoder p(x given z) = N(x̂(z), σ² I), with z ~ N(0, I)."""

    kind = "digit-vae"

    def __init__(self, config: DigitVAEConfig, rng: Rng):
        self.config = config
        self.encoder = DigitEncoder(config.size, 2 * config.latent, config.width, rng.at(0))
        self.decoder = DigitDecoder(config.size, config.latent, config.width, rng.at(1))

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA).

        path: the checkpoint, or the folder it is in. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(DigitVAEConfig(**fields), Rng(0)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z given x), each (B, latent), of images (B, size, size, 1) in [-1, 1]."""
        both = self.encoder(x)
        return both[:, : self.config.latent], both[:, self.config.latent :]

    def loss(self, x: Array, rng: Rng) -> Tensor:
        """One draw of the bound on -log p(x), in nats an image, less a constant.

            L = E_q[|x - x̂(z)|² / (2 σ²)] + KL(q(z given x) to N(0, I)),  z = m + s ε,  ε ~ N(0, I)

        x: (B, size, size, 1), float32 in [-1, 1]. rng: the stream of this step. The constant is D/2 log 2πσ², D the
        number of pixels. Kingma & Welling 2014, eq. 3 and 10.
        """
        mean, log_variance = self.encode(Tensor(x))
        z = mean + ops.exp(log_variance * 0.5) * rng.normal((len(x), self.config.latent), x.dtype)
        squared = ops.mse_loss(self.decoder(z), x) * (x.size // len(x))
        return squared / (2 * self.config.sigma**2) + ops.kl_standard_normal(mean, log_variance)

    def reconstruct(self, x: Array) -> Array:
        """What the decoder draws from the mean description of each image: same shape, in [-1, 1]."""
        with no_grad():
            return self.decoder(self.encode(Tensor(x))[0]).data

    def sample(self, n: int, rng: Rng) -> Array:
        """Draw n images, x̂(z), in one pass: (n, size, size, 1), float32 in [-1, 1]. ValueError for n < 1."""
        if n < 1:
            raise ValueError(f"the number of images must be at least 1, got {n}")
        with no_grad():
            return self.decoder(Tensor(rng.normal((n, self.config.latent)))).data
