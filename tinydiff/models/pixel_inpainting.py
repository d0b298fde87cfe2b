"""Inpainting by a model that is shown what is known (E36), in place of one that is made to agree with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Self

import numpy as np

from tinydiff.backend import Array, array_module, to_device
from tinydiff.data.masks import random_masks
from tinydiff.diffusion import Sampling
from tinydiff.diffusion.inpaint import as_mask, keep_known
from tinydiff.models.pixel_diffusion import USUAL_SAMPLING, PixelDiffusion, PixelDiffusionConfig
from tinydiff.nn import UNetConfig
from tinydiff.rng import Rng


class PixelInpainting(PixelDiffusion):
    """A PixelDiffusion whose U-Net is shown, beside x_t, the image with its unknown pixels set to 0, and the mask.

    It is trained on images of which a random part is hidden, each time another (`random_masks`); where all is hidden,
    it draws as a model without a second image does. (E36; GLIDE, Nichol et al. 2022, section 2.4)
    """

    kind = "pixel-inpainting"

    def __init__(self, config: PixelDiffusionConfig, rng: Rng):
        check_shown(config.unet)
        super().__init__(config, rng)

    @classmethod
    def started_from(cls, base: PixelDiffusion) -> Self:
        """The model to fine-tune: base's weights, and weights 0 for what base has never seen.

        At first its output is base's, whatever it is shown.
        """
        model = cls(dataclasses.replace(base.config, unet=seeing_more(base.config.unet)), Rng(0))
        model.load_state_dict(with_new_inputs(base.state_dict(), model.config.unet))
        return model

    def draw(self, x_0: Array, rng: Rng, label: Array | None = None) -> tuple[Array | None, ...]:
        """As PixelDiffusion's, with what the network is shown of each image after the channels of x_t."""
        x_t, *others = super().draw(x_0, rng, label)
        mask = random_masks(rng.at(4), len(x_0), self.config.size)
        return array_module(x_0).concatenate([x_t, shown(x_0, mask)], axis=-1), *others

    def inpaint(
        self,
        known: Array,
        mask: Array,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        *,
        guidance: float | None = None,
        label: int | np.ndarray | None = None,
    ) -> Iterator[Array]:
        """Paint what is missing of n images, yielding x_T first, then each state down to x_0.

        known: (n, H, W, C), float32 in [-1, 1], whatever they hold where they are not known. mask: (H, W), or
        (n, H, W, 1), 1 where they are known. label: what to paint, by default nothing in particular. how, guidance: as
        `sample` takes them, and raises. x_0 holds the known pixels exactly.
        Raises ValueError for another mask, or images of another size.
        """
        check_known(known, self.config.size, self.config.unet)
        known, n = to_device(known), len(known)
        denoise = self.denoiser(*self.told(n, label, guidance), how.clip, shown(known, mask))
        denoise, x_T = keep_known(denoise, known, mask, self.schedule), self.noise(n, rng.at(0))
        return itertools.chain([x_T], how.states(denoise, x_T, self.schedule, rng.at(1)))


def shown(known: Array, mask: Array) -> Array:
    """What the network sees of the images: their known pixels, 0 elsewhere, and the mask, (B, H, W, C + 1).

    known: (B, H, W, C), in [-1, 1]. mask: (H, W), or (B, H, W, 1), 1 where they are known.
    Raises ValueError for another mask.
    """
    module, kept = array_module(known), as_mask(mask, known)
    mask_of_each = module.broadcast_to(kept, (*known.shape[:3], 1)).astype(known.dtype)
    return module.concatenate([module.where(kept, known, 0).astype(known.dtype), mask_of_each], axis=-1)


def seeing_more(unet: UNetConfig) -> UNetConfig:
    """The sizes of a U-Net that is shown a masked image and the mask beside what it was made for."""
    return dataclasses.replace(unet, extra=unet.channels + 1)


def check_shown(unet: UNetConfig) -> None:
    """Raise ValueError unless a U-Net is shown as many further channels as `shown` gives."""
    if unet.extra != unet.channels + 1:
        raise ValueError(
            f"inpainting needs unet.extra = {unet.channels + 1}, for the masked image and the mask, got {unet.extra}"
        )


def check_known(known: Array, size: tuple[int, int], unet: UNetConfig) -> None:
    """Raise ValueError unless images are (n, H, W, C) of the size and channels that a model paints."""
    if known.ndim != 4 or known.shape[1:] != (*size, unet.channels):
        raise ValueError(f"the model paints images of {(*size, unet.channels)}, got {known.shape}")


def with_new_inputs(weights: dict[str, np.ndarray], unet: UNetConfig) -> dict[str, np.ndarray]:
    """The weights of a model whose U-Net is shown no second image, for one that is: 0 for the new unet.extra channels.

    weights: by name, as `state_dict` gives them, (3, 3, patch² channels, base) being the first kernel, which alone
    changes.
    """
    kernel = weights["unet.conv_in.weight"]
    by_pixel = kernel.reshape(*kernel.shape[:2], unet.patch**2, -1, kernel.shape[3])  # of each patch
    new = np.zeros((*by_pixel.shape[:3], unet.extra, kernel.shape[3]), kernel.dtype)
    of_x_t, of_waves = np.split(by_pixel, [unet.channels], axis=3)  # unet.fourier's come after the second image
    widened = np.concatenate([of_x_t, new, of_waves], axis=3)
    return weights | {"unet.conv_in.weight": widened.reshape(*kernel.shape[:2], -1, kernel.shape[3])}
