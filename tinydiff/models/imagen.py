"""Imagen: a text encoder that was trained on text alone, a small picture, a large one (E37; Saharia et al. 2022).

prompt ── text encoder ── states τ_θ(y)
                              │
x_T ~ N(0, I) ───── guided denoising, dynamic thresholds ── small picture
                                                                 │ noise of level s
x_T ~ N(0, I) ──────────────────────── upsampler ────────── large picture
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from tinydiff.backend import Array
from tinydiff.diffusion import Sampling
from tinydiff.files import PathLike
from tinydiff.models.cascade import NOTHING, Upsampler, larger
from tinydiff.models.text_diffusion import Condition, TextDiffusion, told_texts
from tinydiff.models.text_encoder import TrainedTextEncoder, check_listens, load_text_encoder
from tinydiff.rng import Rng

PERCENTILE = 97.0
"""Of the numbers of x_0 without their signs, which is the dynamic threshold (Saharia et al. 2022, section 2.3)."""

IMAGEN_SAMPLING = Sampling(clip=PERCENTILE)

IMAGEN_GUIDANCE = 3.0
"""s of E35, unless told otherwise."""


class Imagen:
    """A text encoder, a model that draws small pictures for texts, and an upsampler."""

    def __init__(self, text_encoder: TrainedTextEncoder, base: TextDiffusion, upsampler: Upsampler):
        """Raises ValueError for parts that do not fit one another; warns if they were trained with another encoder."""
        config = upsampler.config
        if base.config.size != config.low_size or base.config.unet.channels != config.unet.channels:
            raise ValueError(
                f"the upsampler is shown pictures of {(*config.low_size, config.unet.channels)}; "
                f"the base model draws {(*base.config.size, base.config.unet.channels)}"
            )
        self.text_encoder, self.base, self.upsampler = text_encoder, base, upsampler
        for stage in (base, upsampler) if self._upsampler_reads else (base,):
            check_listens(stage, text_encoder)

    @property
    def _upsampler_reads(self) -> bool:
        """Whether the upsampler is told the text, too, as Imagen's own are."""
        return self.upsampler.config.unet.context is not None

    @classmethod
    def load(
        cls,
        text_encoder: PathLike = "text_encoder",
        base: PathLike = "runs/text_to_pixels",
        upsampler: PathLike = "upsampler",
    ) -> Self:
        """Imagen made of these trained parts; all but the base are shipped. Raises CheckpointError as each does.

        text_encoder: one trained on texts alone, or a CLIP, whichever the base model listened to in training.
        """
        return cls(load_text_encoder(text_encoder), TextDiffusion.load(base), Upsampler.load(upsampler))

    def text(self, prompts: str | Sequence[str]) -> Condition:
        """τ_θ(y): the states of the tokens of each prompt, and which of them are there."""
        return told_texts(self.text_encoder, prompts)

    def text_to_image(
        self,
        prompts: Sequence[str],
        rng: Rng,
        how: Sampling = IMAGEN_SAMPLING,
        guidance: float = IMAGEN_GUIDANCE,
        negative: str = "",
        level: int | None = None,
    ) -> Iterator[Array]:
        """Draw a picture of each prompt, yielding each state of the small ones, made large, then of the large ones.

        how: of both stages; how.clip is a percentile for dynamic thresholds, True for static ones. guidance: s of E35
        in the small pictures, away from `negative`. level: how much noise is put on the small pictures before they are
        shown to the upsampler, 0..S; see `Upsampler.upsample`. rng: equal rng, equal x_T. Raises ValueError for more
        steps than T, for another level, and as `TextDiffusion.sample` does.
        """
        told, level = self.text(prompts), self.upsampler.level_of(level)
        small = self.base.sample(told, rng.at(0), how, guidance=guidance, negative=self.text(negative))

        def stages() -> Iterator[Array]:
            for low in small:
                yield larger(low, self.upsampler.config.factor)
            also_told = told if self._upsampler_reads else NOTHING
            yield from self.upsampler.upsample(low, rng.at(1), how, level=level, told=also_told)

        return stages()
