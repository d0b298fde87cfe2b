"""Imagen: a text encoder that was trained on text alone, a small picture, larger ones (E37; Saharia et al. 2022).

prompt ── text encoder ── states τ_θ(y) ────────────────────────────────┐
                              │                                         │
x_T ~ N(0, I) ───── guided denoising, dynamic thresholds ── 16 x 16     │
                                                              │ noise of level s
x_T ~ N(0, I) ───────────────────────── upsampler ───────── 32 x 32 ────┘
                                                              │ noise of level s
x_T ~ N(0, I) ───────────────────────── upsampler ───────── 64 x 64

Imagen's own go from 64 to 256 to 1024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from tinydiff.backend import Array
from tinydiff.diffusion import Sampling
from tinydiff.files import PathLike
from tinydiff.models.cascade import Upsampler, and_larger, check_cascade, count_states, larger, reads, upsampling
from tinydiff.models.text_diffusion import Condition, TextDiffusion, told_texts
from tinydiff.models.text_encoder import TrainedTextEncoder, check_listens, load_text_encoder
from tinydiff.rng import Rng

PERCENTILE = 97.0
"""Of the numbers of x_0 without their signs, which is the dynamic threshold (Saharia et al. 2022, section 2.3)."""

IMAGEN_SAMPLING = Sampling(clip=PERCENTILE)

IMAGEN_GUIDANCE = 3.0
"""s of E35, unless told otherwise."""

UPSAMPLERS = ("imagen_upsampler", "upsampler")
"""The shipped ones, 16 to 32 to 64 pixels."""


class Imagen:
    """A text encoder, a model that draws small pictures for texts, and upsamplers, each shown what the last one drew.

    An upsampler with a context is told the text, too, as Imagen's own are.
    """

    def __init__(self, text_encoder: TrainedTextEncoder, base: TextDiffusion, upsamplers: Sequence[Upsampler]):
        """Raises ValueError for parts that do not fit one another; warns if they were trained with another encoder."""
        self.text_encoder, self.base, self.upsamplers = text_encoder, base, tuple(upsamplers)
        check_cascade(self.stages)
        for stage in self.stages:
            if stage is base or reads(stage):
                check_listens(stage, text_encoder)

    @property
    def stages(self) -> tuple[TextDiffusion, ...]:
        """The models that draw, in their order."""
        return self.base, *self.upsamplers

    @classmethod
    def load(
        cls,
        text_encoder: PathLike = "text_encoder",
        base: PathLike = "imagen",
        upsamplers: Sequence[PathLike] = UPSAMPLERS,
    ) -> Self:
        """Imagen made of these trained parts, by default the shipped ones. Raises CheckpointError as each does.

        text_encoder: one trained on texts alone, or a CLIP, whichever the other models listened to in training.
        """
        return cls(load_text_encoder(text_encoder), TextDiffusion.load(base), [Upsampler.load(u) for u in upsamplers])

    def count_states(self, how: Sampling) -> int:
        """How many states `text_to_image` yields. Raises ValueError for more steps than T."""
        return count_states(self.stages, how)

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
        """Draw a picture of each prompt, yielding each state of the small ones, then of the larger, at one size.

        how: of all stages, see also `upsampling`; how.clip is a percentile for dynamic thresholds, True for static
        ones. guidance: s of E35 in the small pictures, away from `negative`. level: how much noise is put on each
        picture before an upsampler is shown it, 0..S; see `Upsampler.upsample`. rng: equal rng, equal x_T. Raises
        ValueError for more steps than T, for another level, and as `TextDiffusion.sample` does.
        """
        told = self.text(prompts)
        small = self.base.sample(told, rng.at(0), how, guidance=guidance, negative=self.text(negative))
        fewer = upsampling(how, self.base.schedule.T)
        states = and_larger(self.upsamplers, small, told, rng.at(1), fewer, level=level)
        size = self.stages[-1].config.size[0]
        return (larger(x, size // x.shape[1]) for x in states)
