"""A U-Net trained as one column of the Karras table, and sampled as any of them (E22)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tinydiff.autograd import Tensor
from tinydiff.backend import Array, beside, captured
from tinydiff.diffusion import squared_error
from tinydiff.diffusion.edm import COLUMNS, Column, Denoiser, preconditioned, probability_flow, training_pair
from tinydiff.files import PathLike
from tinydiff.models.trained import load_trained
from tinydiff.nn import Module, UNet, UNetConfig
from tinydiff.rng import Rng


@dataclass(frozen=True)
class KarrasConfig:
    """Which U-Net, images of which height and width in pixels, and which column of the table it is trained as.

    sigma_data: the standard deviation of the data's pixels, which "edm" asks for. Raises ValueError for a column that
    is not in the table, or a sigma_data that is not > 0.
    """

    unet: UNetConfig
    size: tuple[int, int] = (28, 28)
    column: str = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.column not in COLUMNS:
            raise ValueError(f"the column must be one of {', '.join(COLUMNS)}, got {self.column!r}")
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be > 0, got {self.sigma_data}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        return cls(**fields | {"unet": UNetConfig(**fields["unet"])})

    def table_column(self) -> Column:
        """The column itself."""
        return Column.edm(sigma_data=self.sigma_data) if self.column == "edm" else COLUMNS[self.column]()


class KarrasDiffusion(Module):
    """The network F of `preconditioned`, with its column: called as model(x, c_noise), it gives F(x; c_noise)."""

    kind = "karras"

    def __init__(self, config: KarrasConfig, rng: Rng):
        self.config = config
        self.unet = UNet(config.unet, rng)
        self.column = config.table_column()

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA), ready to sample.

        path: the checkpoint, or the folder it is in. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(KarrasConfig.from_dict(fields), Rng(0)))

    def __call__(self, x: Array, c_noise: np.ndarray) -> Tensor:
        """F(x; c_noise) for x (B, H, W, C) and c_noise (B,)."""
        return self.unet(Tensor(x), beside(c_noise, x))

    def draw(self, y: Array, rng: Rng) -> tuple[Array, ...]:
        """All that a step of training draws: `training_pair` for sigma of the column's distribution, on y's device.

        y: images (B, H, W, C), float32 in [-1, 1]. rng: the stream of this step. (E22; Karras et al. 2022, eq. 8)
        """
        sigma, eps = self.column.draw_sigma(rng.at(0), len(y)), rng.at(1).normal_like(y)
        x, c_noise, target, weight = training_pair(y, sigma, eps, self.column)
        return x, beside(c_noise, y), target, weight

    def loss_of(self, x: Array, c_noise: Array, target: Array, weight: Array) -> Tensor:
        """The loss of what `draw` gave."""
        return squared_error(self(x, c_noise), target, weight)

    def denoiser(self) -> Denoiser:
        """D(x; sigma), for any of the samplers in `diffusion.edm`."""
        self.eval()

        @captured
        def network(x: Array, c_noise: Array) -> Array:
            return self(x, c_noise).data

        return preconditioned(lambda x, c_noise: network(x, beside(c_noise, x)), self.column)

    def sample(
        self, n: int, rng: Rng, N: int, column: Column | None = None, solver: str | None = None
    ) -> Iterator[Array]:
        """Draw n images by `probability_flow` in N steps, yielding each state, (n, H, W, C) float32.

        column: whose sampling to use, the model's own if None. Raises ValueError as `probability_flow` does, and for
        n < 1. Equal rng, equal x_T.
        """
        if n < 1:
            raise ValueError(f"the number of images must be at least 1, got {n}")
        x_T = rng.normal((n, *self.config.size, self.config.unet.channels))
        return probability_flow(self.denoiser(), x_T, column or self.column, N, solver)
