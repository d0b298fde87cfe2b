"""Models: networks put together with the diffusion they are trained for."""

from tinydiff.models.binomial_diffusion import BinomialDiffusion, BinomialDiffusionConfig
from tinydiff.models.pixel_diffusion import PixelDiffusion, PixelDiffusionConfig

__all__ = ["BinomialDiffusion", "BinomialDiffusionConfig", "PixelDiffusion", "PixelDiffusionConfig"]
