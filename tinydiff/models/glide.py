"""GLIDE's editing: a text is painted into the part of an image that a mask hides (E36; Nichol et al. 2022)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Self

from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, to_device
from tinydiff.data.masks import random_masks
from tinydiff.diffusion import Sampling
from tinydiff.diffusion.inpaint import keep_known
from tinydiff.models.pixel_diffusion import USUAL_SAMPLING
from tinydiff.models.pixel_inpainting import check_known, check_shown, seeing_more, shown, with_new_inputs
from tinydiff.models.text_diffusion import Condition, TextDiffusion, TextDiffusionConfig
from tinydiff.rng import Rng

USUAL_GUIDANCE = 3.0
"""s of E35, unless told otherwise; GLIDE's own."""


class TextInpainting(TextDiffusion):
    """A TextDiffusion whose U-Net is shown, beside x_t, the image with its unknown pixels set to 0, and the mask.

    It is PixelInpainting told a text: the caption says what there is in the whole image, the known pixels show a part.
    Where it is shown nothing, it draws as a model without a second image does. (E36; Nichol et al. 2022, section 2.4)
    """

    kind = "text-inpainting"

    def __init__(self, config: TextDiffusionConfig, rng: Rng):
        check_shown(config.unet)
        super().__init__(config, rng)

    @classmethod
    def started_from(cls, base: TextDiffusion) -> Self:
        """The model to fine-tune: base's weights, and weights 0 for what base has never seen.

        At first its output is base's, whatever it is shown.
        """
        model = cls(dataclasses.replace(base.config, unet=seeing_more(base.config.unet)), Rng(0))
        model.load_state_dict(with_new_inputs(base.state_dict(), model.config.unet))
        return model

    def __call__(self, x_t: Array, t: Array, told: Condition) -> Tensor:
        """The network's output for x_t (B, H, W, C) at the times t (B,); if nothing is shown, it sees zeros."""
        if told.shown is None:
            nothing = array_module(x_t).zeros((*x_t.shape[:3], self.config.unet.extra), x_t.dtype)
            told = dataclasses.replace(told, shown=nothing)
        return super().__call__(x_t, t, told)

    def draw(self, x_0: Array, rng: Rng, told: Condition, empty: Condition) -> tuple[Array | None, ...]:
        """As TextDiffusion's; of each image another random part is shown."""
        seen = shown(x_0, random_masks(rng.at(4), len(x_0), self.config.size))
        return super().draw(x_0, rng, dataclasses.replace(told, shown=seen), empty)

    def inpaint(
        self,
        known: Array,
        mask: Array,
        told: Condition,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        *,
        guidance: float = 1.0,
        negative: Condition | None = None,
    ) -> Iterator[Array]:
        """Paint what is missing of n images so that they show what is told, yielding x_T first, x_0 last.

        known: (n, H, W, C), float32 in [-1, 1], whatever they hold where they are not known. mask: (H, W), or
        (n, H, W, 1), 1 where they are known. told, negative: of n images, or once for all. how, guidance: as `sample`
        takes them, and raises. x_0 holds the known pixels exactly.
        Raises ValueError for another mask, or images of another size.
        """
        check_known(known, self.config.size, self.config.unet)
        known, n = to_device(known), len(known)
        seen = shown(known, mask)

        def seeing(told: Condition) -> Condition:
            return dataclasses.replace(told.repeated(n), shown=seen)

        denoise = self.denoiser(seeing(told), guidance, None if negative is None else seeing(negative), how.clip)
        denoise = keep_known(denoise, known, mask, self.schedule)
        x_T = self.noise(n, rng.at(0))
        return itertools.chain([x_T], how.states(denoise, x_T, self.schedule, rng.at(1)))
