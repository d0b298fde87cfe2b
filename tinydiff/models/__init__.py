"""Models: networks put together with the diffusion they are trained for."""

from tinydiff.models.karras import KarrasConfig, KarrasDiffusion
from tinydiff.models.pixel_diffusion import PixelDiffusion, PixelDiffusionConfig
from tinydiff.models.pixel_inpainting import PixelInpainting

__all__ = ["KarrasConfig", "KarrasDiffusion", "PixelDiffusion", "PixelDiffusionConfig", "PixelInpainting"]
