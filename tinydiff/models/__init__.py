"""Models: networks put together with the diffusion they are trained for."""

from tinydiff.models.diffwave import DiffWave, DiffWaveConfig
from tinydiff.models.karras import KarrasConfig, KarrasDiffusion
from tinydiff.models.pixel_diffusion import PixelDiffusion, PixelDiffusionConfig

__all__ = [
    "DiffWave", "DiffWaveConfig", "KarrasConfig", "KarrasDiffusion", "PixelDiffusion", "PixelDiffusionConfig",
]  # fmt: skip
