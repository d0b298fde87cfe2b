"""Stable Diffusion: a text, denoising in latent space, a picture (E28).

prompt ── CLIP's text tower ── states τ_θ(y)
                                   │
z_T ~ N(0, I) ───────────── guided denoising ── z_0 ── decoder ── image
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from tinydiff.backend import Array, to_device, to_numpy
from tinydiff.diffusion import Prediction, Sampling, Schedule, guided, repaint, sdedit
from tinydiff.diffusion.inpaint import as_mask
from tinydiff.diffusion.samplers import Denoise
from tinydiff.files import PathLike
from tinydiff.models.clip import CLIP
from tinydiff.models.latent_diffusion import LatentDiffusion
from tinydiff.models.pixel_diffusion import USUAL_SAMPLING
from tinydiff.models.text_diffusion import Condition, told_texts
from tinydiff.models.trained import warn_of_another
from tinydiff.models.vae import VAE
from tinydiff.rng import Rng

USUAL_GUIDANCE = 3.0
"""s of E35, unless told otherwise."""

REPAINT = 5, 4
"""How far RePaint goes back, and how often it walks each stretch."""


class StableDiffusion:
    """An autoencoder, a text encoder, and a U-Net that draws latents for texts.

    Each method that draws yields the latents on their way from noise; `decode` makes pictures of any of them, and the
    last is the result. prompts: one text an image. guidance: s of E35; 1 is none. negative: what is not wanted,
    by default the empty text, which stands for any picture. rng: equal rng, equal z_T.
    """

    def __init__(self, vae: VAE, clip: CLIP, unet: LatentDiffusion):
        """Raises ValueError for parts that do not fit one another; warns if the U-Net was trained with others."""
        drawn, made = unet.config.unet.channels, vae.config.latent
        told, said = unet.config.unet.context, clip.config.text.width
        if drawn != made or told != said:
            raise ValueError(
                f"the U-Net draws latents of {drawn} channels and reads texts of width {told}; "
                f"the autoencoder makes latents of {made}, CLIP's texts have width {said}"
            )
        warn_of_another("autoencoder", vae, unet.config.autoencoder, "U-Net")
        warn_of_another("text encoder", clip, unet.config.text_encoder, "U-Net")
        self.vae, self.clip, self.unet = vae, clip, unet

    @classmethod
    def load(cls, vae: PathLike = "vae", clip: PathLike = "clip", unet: PathLike = "latent_diffusion") -> Self:
        """The model made of these trained parts, by default the shipped ones. Raises CheckpointError as each does."""
        return cls(VAE.load(vae), CLIP.load(clip), LatentDiffusion.load(unet))

    @classmethod
    def of_run(cls, run: PathLike | None, unet: PathLike | None = None) -> Self:
        """The model of a run of train_text_to_image.py, its folder; None for the shipped one. unet: another U-Net."""
        folder = pathlib.Path(run) if run is not None else pathlib.Path()
        return cls.load(folder / "vae", folder / "clip", unet or folder / "latent_diffusion")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        height, width = self.unet.config.size
        return height * self.vae.factor, width * self.vae.factor

    def text(self, prompts: str | Sequence[str]) -> Condition:
        """τ_θ(y): the states of the tokens of each prompt, and which of them are there."""
        return told_texts(self.clip, prompts)

    def encode(self, images: Array) -> Array:
        """z_0 of images (n, H, W, 3), float32 in [-1, 1]. Raises ValueError for images of another size."""
        if images.shape[1:] != (*self.size, 3):
            raise ValueError(f"this model takes images (n, {self.size[0]}, {self.size[1]}, 3), got {images.shape}")
        return self.vae.encode(to_device(images))

    def decode(self, z: Array) -> np.ndarray:
        """Pictures of latents: (n, H, W, 3), float32 in [-1, 1], on the host."""
        return to_numpy(self.vae.decode(z))

    def text_to_image(
        self,
        prompts: Sequence[str],
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = USUAL_GUIDANCE,
        negative: str = "",
    ) -> Iterator[Array]:
        """Draw what the prompts say, from z_T ~ N(0, I) (E28; Rombach et al. 2022)."""
        return self.unet.sample(self.text(prompts), rng, how, guidance=guidance, negative=self.text(negative))

    def image_to_image(
        self,
        images: Array,
        prompts: Sequence[str],
        rng: Rng,
        strength: float = 0.6,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = USUAL_GUIDANCE,
        negative: str = "",
    ) -> Iterator[Array]:
        """Redraw images (n, H, W, 3) as the prompts say, by SDEdit on their latents (E36).

        strength: in [0, 1], how much of them may change. Raises ValueError for another strength or size.
        """
        z_0, denoise = self.encode(images), self._denoiser(prompts, len(images), guidance, negative)

        def sampler(denoise: Denoise, z_t: Array, schedule: Schedule, rng: Rng) -> Iterator[Array]:
            steps = max(1, round(strength * how.steps_of(self.unet.schedule.T)))
            return dataclasses.replace(how, steps=min(steps, schedule.T)).states(denoise, z_t, schedule, rng)

        return sdedit(denoise, z_0, self.unet.schedule, rng, strength, sampler)

    def inpaint(
        self,
        images: Array,
        mask: Array,
        prompts: Sequence[str],
        rng: Rng,
        steps: int = 50,
        guidance: float = USUAL_GUIDANCE,
        negative: str = "",
    ) -> Iterator[Array]:
        """Paint what is missing of images (n, H, W, 3) as the prompts say, by RePaint on their latents (E36).

        mask: (H, W), or (n, H, W, 1), 1 where they are known. A latent counts as known if all of its pixels are; what
        is decoded holds the known pixels nearly, and `with_known` puts them back. Raises ValueError for another size.
        """
        z_0, denoise = self.encode(images), self._denoiser(prompts, len(images), guidance, negative)
        known = self._latents_known(mask, images)
        z_T = self.unet.noise(len(images), rng.at(0))
        return repaint(denoise, z_T, self.unet.schedule, rng.at(1), z_0, known, steps, *REPAINT)

    def interpolate(
        self,
        first: str,
        last: str,
        n: int,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = USUAL_GUIDANCE,
    ) -> Iterator[Array]:
        """Draw n pictures on the way from one prompt to another, all from one z_T.

        ε = (1 − w) ε_θ(z_t, t, first) + w ε_θ(z_t, t, last), w = 0, ..., 1. It is the outputs that are mixed, since two
        texts may have different numbers of tokens. Raises ValueError for n < 2.
        """
        if n < 2:
            raise ValueError(f"there are at least 2 pictures from one prompt to another, got {n}")
        one, other = (self._denoiser([prompt], n, guidance) for prompt in (first, last))
        z_T = self.unet.noise(1, rng.at(0)).repeat(n, axis=0)
        w = to_device(np.linspace(0, 1, n, dtype=np.float32)[:, None, None, None])

        def denoise(z_t: Array, t: int) -> Prediction:
            a, b = one(z_t, t), other(z_t, t)
            return Prediction(guided(b.x0, a.x0, w), guided(b.eps, a.eps, w))

        return itertools.chain([z_T], how.states(denoise, z_T, self.unet.schedule, rng.at(1)))

    def _denoiser(self, prompts: Sequence[str], n: int, guidance: float, negative: str = "") -> Denoise:
        return self.unet.denoiser(self.text(prompts).repeated(n), guidance, self.text(negative).repeated(n))

    def _latents_known(self, mask: Array, images: Array) -> Array:
        """The mask of the latents (n or 1, h, w, 1): whether all pixels of each are known."""
        f, known = self.vae.factor, to_numpy(as_mask(mask, to_device(images)))
        n, H, W, _ = known.shape
        whole = known.reshape(n, H // f, f, W // f, f, 1).all(axis=(2, 4))
        return np.broadcast_to(whole, (len(images), H // f, W // f, 1))


def with_known(painted: np.ndarray, images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The painted pictures (n, H, W, 3), the known pixels of the images put back exactly. mask: as for `inpaint`."""
    return np.where(as_mask(mask, images), images, painted)
