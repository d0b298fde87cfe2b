"""Cascades: small images made larger by diffusion that is shown them (E37; Ho et al. 2022; Saharia et al. 2022).

small image ── noise of level s ── each pixel repeated ──┐
                              s ── added to the embedding of t ── U-Net ── ε_θ(x_t, t, small image, s)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tinydiff.backend import Array, array_module, device_of, to_device
from tinydiff.diffusion import Sampling, q_sample
from tinydiff.models.pixel_diffusion import USUAL_SAMPLING
from tinydiff.models.text_diffusion import Condition, TextDiffusion, TextDiffusionConfig
from tinydiff.nn.embedding import sinusoidal
from tinydiff.rng import Rng

UPSAMPLING_STEPS = 27
"""Steps of an upsampler at the most: most is decided in the small image already (Ramesh et al. 2022, Table 3)."""

NOTHING = Condition()
"""Of a text, as DALL-E 2's upsamplers."""


@dataclass(frozen=True)
class UpsamplerConfig(TextDiffusionConfig):
    """What an Upsampler is made of.

    unet: the network's sizes; unet.extra as many channels as the images have, unet.vector how many sines and cosines
    tell it s, an even number; with unet.context it is told a text too, as Imagen's (DALL-E 2's are not). size: height
    and width of the large images. factor: how many times smaller the small ones are. S: the largest level of noise in
    training, in 0..T. The others: see TextDiffusionConfig, which raises what this does; ValueError also for another
    unet.extra or unet.vector, a factor that is below 2 or does not divide the size, or an S that is not in 0..T.
    """

    size: tuple[int, int] = (64, 64)
    factor: int = 2
    S: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        unet = self.unet
        if unet.extra != unet.channels or unet.vector is None or unet.vector % 2:
            raise ValueError(
                f"an upsampler needs unet.extra = {unet.channels}, for the small image, and an even unet.vector, for "
                f"the level of its noise; got {unet.extra} and {unet.vector}"
            )
        if self.factor < 2 or any(pixels % self.factor for pixels in self.size):
            raise ValueError(f"the factor must be at least 2 and divide the size {self.size}, got {self.factor}")
        if not 0 <= self.S <= self.T:
            raise ValueError(f"the largest level of noise must be in 0..T = 0..{self.T}, got {self.S}")

    @property
    def low_size(self) -> tuple[int, int]:
        """Height and width of the small images."""
        return self.size[0] // self.factor, self.size[1] // self.factor


class Upsampler(TextDiffusion):
    """ε_θ(x_t, t, low_s, s): diffusion on large images, shown a small one, which was made noisy on purpose.

        low_s = √ᾱ_s low + √(1 − ᾱ_s) ε,   s ~ Uniform({0, ..., S}) in training

    What a model drew is never quite like the small images of the data. Noise hides the difference, and a network that
    knows how much there is (s) learns what to trust in an image and what to make up (noise-conditioning augmentation;
    Ho et al. 2022, section 4; Saharia et al. 2022, section 2.4).
    """

    kind = "upsampler"
    configured_by: ClassVar[type[TextDiffusionConfig]] = UpsamplerConfig
    config: UpsamplerConfig

    def draw(
        self, x_0: Array, rng: Rng, told: Condition = NOTHING, empty: Condition = NOTHING
    ) -> tuple[Array | None, ...]:
        """As TextDiffusion's; the small images are those of the large ones, made smaller."""
        s = rng.at(4).integers(0, self.config.S + 1, (len(x_0),))
        told = self.shown(smaller(x_0, self.config.factor), s, rng.at(5), told)
        return super().draw(x_0, rng, told, empty)

    def shown(self, low: Array, s: int | Array, rng: Rng, told: Condition = NOTHING) -> Condition:
        """What is told, and the small images with noise of level s, and s.

        low: (B, H/factor, W/factor, C), float32 in [-1, 1]. s: one number or (B,), in 0..T.
        """
        noisy = q_sample(low, s, rng.normal_like(low), self.schedule)
        levels = array_module(low).broadcast_to(to_device(s, device_of(low)), (len(low),))
        features = sinusoidal(levels, self.config.unet.vector or 0).astype(low.dtype)
        return dataclasses.replace(told, vector=features, shown=larger(noisy, self.config.factor))

    def upsample(
        self,
        low: Array,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        *,
        level: int | None = None,
        told: Condition = NOTHING,
    ) -> Iterator[Array]:
        """Draw large images of small ones, yielding x_T first, then each state down to x_0.

        low: (n, H/factor, W/factor, C), float32 in [-1, 1]. level: s, in 0..S; 0 trusts every pixel, and a sixth of S,
        the default, hides the flaws of an image that a model drew. told: the texts, if unet.context. Raises ValueError
        for another level, images of another size, and as `sample` does.
        """
        expected = (*self.config.low_size, self.config.unet.channels)
        if low.ndim != 4 or low.shape[1:] != expected:
            raise ValueError(f"this upsampler takes images (n, {', '.join(map(str, expected))}), got {low.shape}")
        low, level = to_device(low), self.level_of(level)
        return self.sample(self.shown(low, level, rng.at(2), told.repeated(len(low))), rng, how)

    def level_of(self, level: int | None) -> int:
        """The level of noise that was asked for, or the usual one, S/6. Raises ValueError if it is not in 0..S."""
        level = self.config.S // 6 if level is None else level
        if not 0 <= level <= self.config.S:
            raise ValueError(f"the level of noise must be in 0..{self.config.S}, got {level}")
        return level


def smaller(x: Array, factor: int) -> Array:
    """Images (B, H, W, C) as (B, H/factor, W/factor, C): the mean of each factor x factor pixels."""
    B, H, W, C = x.shape
    return x.reshape(B, H // factor, factor, W // factor, factor, C).mean(axis=(2, 4))


def larger(x: Array, factor: int) -> Array:
    """Images (B, H, W, C) as (B, factor H, factor W, C), each pixel repeated."""
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def upsampling(how: Sampling, T: int) -> Sampling:
    """How to sample a later stage of a cascade, whose first is sampled thus in up to T steps: in as many, or fewer."""
    return dataclasses.replace(how, steps=min(how.steps_of(T), UPSAMPLING_STEPS))


def count_states(stages: Sequence[TextDiffusion], how: Sampling) -> int:
    """How many states these stages of a cascade yield, sampled thus. Raises ValueError for more steps than T."""
    T = stages[0].schedule.T
    return 1 + how.steps_of(T) + sum(1 + upsampling(how, T).steps_of(later.schedule.T) for later in stages[1:])


def reads(stage: TextDiffusion) -> bool:
    """Whether a model is told the text."""
    return stage.config.unet.context is not None


def check_cascade(stages: Sequence[TextDiffusion]) -> None:
    """Raise ValueError unless each stage is shown what the one before it draws."""
    for before, upsampler in itertools.pairwise(stages):
        assert isinstance(upsampler, Upsampler)
        drawn = *before.config.size, before.config.unet.channels
        shown = *upsampler.config.low_size, upsampler.config.unet.channels
        if drawn != shown:
            raise ValueError(f"an upsampler is shown pictures of {shown}; the model before it draws {drawn}")


def and_larger(
    upsamplers: Sequence[Upsampler],
    states: Iterator[Array],
    told: Condition,
    rng: Rng,
    how: Sampling,
    *,
    level: int | None = None,
    alike: bool = False,
) -> Iterator[Array]:
    """The states in which a first model draws, then those in which each upsampler, shown the last, draws on.

    told: the texts, for those upsamplers that read. level: of the noise on what each is shown, see
    `Upsampler.upsample`. alike: whether all images get the same noise, so that they differ in what they are shown
    alone. Raises ValueError for another level, now.
    """
    levels = [upsampler.level_of(level) for upsampler in upsamplers]

    def each_state() -> Iterator[Array]:
        for low in states:
            yield low
        for i, upsampler in enumerate(upsamplers):
            also, stream = told.repeated(len(low)) if reads(upsampler) else NOTHING, rng.at(i)
            for x in _upsampled(upsampler, low, also, stream, how, levels[i], alike):
                yield x
            low = x

    return each_state()


def _upsampled(
    upsampler: Upsampler, low: Array, told: Condition, rng: Rng, how: Sampling, level: int, alike: bool
) -> Iterator[Array]:
    """The states of one upsampler; alike: each image by itself, all from one noise."""
    if not alike:
        return upsampler.upsample(low, rng, how, level=level, told=told)
    some = (slice(i, i + 1) for i in range(len(low)))
    one_by_one = [upsampler.upsample(low[i], rng, how, level=level, told=told.taken(i)) for i in some]
    return (array_module(low).concatenate(each) for each in zip(*one_by_one, strict=True))
