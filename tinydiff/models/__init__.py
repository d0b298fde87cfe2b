"""Models: networks put together with the diffusion they are trained for."""

from tinydiff.models.binomial_diffusion import BinomialDiffusion, BinomialDiffusionConfig
from tinydiff.models.karras import KarrasConfig, KarrasDiffusion
from tinydiff.models.pixel_diffusion import PixelDiffusion, PixelDiffusionConfig

__all__ = [
    "BinomialDiffusion",
    "BinomialDiffusionConfig",
    "KarrasConfig",
    "KarrasDiffusion",
    "PixelDiffusion",
    "PixelDiffusionConfig",
]
