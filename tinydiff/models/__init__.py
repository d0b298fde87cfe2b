"""Models: networks put together with what they are trained for."""

from tinydiff.models.classifier import Classifier, ClassifierConfig
from tinydiff.models.karras import KarrasConfig, KarrasDiffusion
from tinydiff.models.pixel_diffusion import PixelDiffusion, PixelDiffusionConfig

__all__ = [
    "Classifier", "ClassifierConfig", "KarrasConfig", "KarrasDiffusion", "PixelDiffusion", "PixelDiffusionConfig",
]  # fmt: skip
