"""Models: networks put together with the diffusion they are trained for."""

from tinydiff.models.pixel_diffusion import PixelDiffusion, PixelDiffusionConfig

__all__ = ["PixelDiffusion", "PixelDiffusionConfig"]
