"""Latent diffusion: the same diffusion, on the latents of an autoencoder, told a text (E24, E27)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tinydiff.models.text_diffusion import TextDiffusion, TextDiffusionConfig
from tinydiff.nn import UNetConfig


@dataclass(frozen=True)
class LatentDiffusionConfig(TextDiffusionConfig):
    """What a LatentDiffusion is made of.

    unet: the network's sizes, with unet.channels those of the latents. size: height and width of the latents.
    autoencoder: the fingerprint of the one that it was trained with, to which latents mean what they mean to it; empty
    if not known. The others: see TextDiffusionConfig, which raises what this does; ValueError also for a U-Net that
    takes no text.
    """

    size: tuple[int, int] = (8, 8)
    autoencoder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unet.context is None:
            raise ValueError("latent diffusion needs a U-Net with a context, the width of a text's states")


STABLE_DIFFUSION_1 = LatentDiffusionConfig(
    UNetConfig(4, base=320, multipliers=(1, 2, 4, 4), blocks=2, attention=(0, 1, 2), heads=8, groups=32, context=768),
    size=(64, 64),
    schedule="scaled-linear",
    target="eps",
)
"""That of Stable Diffusion 1.x, 859,520,964 parameters, on latents of images of 512 x 512."""


class LatentDiffusion(TextDiffusion):
    """ε_θ(z_t, t, τ_θ(y)): diffusion told a text, on latents z of unit variance (Rombach et al. 2022).

    What differs from diffusion on pixels: nothing is clipped, since latents have no bounds.
    """

    kind = "latent-diffusion"
    configured_by: ClassVar[type[TextDiffusionConfig]] = LatentDiffusionConfig
    bounded = False
    config: LatentDiffusionConfig
