"""DALL-E 2: from a text to an embedding of an image, and from there to the image (E29, E34; Ramesh et al. 2022).

    p(x | y) = p(x | z_i, y) p(z_i | y)                                          (E29; section 2, eq. 1)

text y ── CLIP's text tower ── z_t ── prior ── z_i ── decoder ── small image ── upsampler ── image

The prior is p(z_i | y), the decoder p(x | z_i, y). An image then has two coordinates: z_i says what CLIP sees in it,
and x_T, found by DDIM backwards, all the rest. To change one and keep the other is to vary, blend and edit images.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from tinydiff import checkpoint
from tinydiff.backend import Array, to_device, to_numpy
from tinydiff.diffusion import Sampling, ddim_inverse, last, q_sample, slerp
from tinydiff.files import PathLike
from tinydiff.models.autoregressive_prior import AutoregressivePrior
from tinydiff.models.cascade import (
    Upsampler,
    and_larger,
    check_cascade,
    count_states,
    larger,
    reads,
    smaller,
    upsampling,
)
from tinydiff.models.clip import CLIP
from tinydiff.models.decoder import Decoder
from tinydiff.models.pixel_diffusion import USUAL_SAMPLING
from tinydiff.models.prior import DiffusionPrior, told_captions, unit_rows, z_t_of
from tinydiff.models.text_diffusion import Condition, TextDiffusion, told_texts
from tinydiff.models.trained import warn_of_another
from tinydiff.rng import Rng

Prior = DiffusionPrior | AutoregressivePrior

USUAL_GUIDANCE = 2.0
"""s of E35, unless told otherwise."""

UPSAMPLERS = ("upsampler",)
"""The shipped one, 32 to 64 pixels."""


class DallE2:
    """CLIP, a prior, a decoder, and upsamplers, each shown what the last one drew.

    Each method that draws yields the images on their way from noise: first the decoder's, then each upsampler's, of
    which the last are the result; `pictures` brings any of them to one size. guidance: s of E35, for the decoder; 1 is
    none. negative: the caption of what is not wanted. rng: equal rng, equal noise.
    """

    def __init__(
        self,
        clip: CLIP,
        prior: Prior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
    ):
        """Raises ValueError for parts that do not fit one another; warns of a part that was trained with another CLIP.

        prior: None leaves it out, and takes the embedding of the text for that of an image. An upsampler with a context
        is told the caption; the paper's are not, but they begin with 64 x 64 pixels, which leave less to be told.
        """
        said = clip.config.text.width, clip.config.embedding
        self._check_fit("decoder", said, (decoder.config.unet.context, decoder.config.unet.vector))
        warn_of_another("CLIP", clip, decoder.config.text_encoder, "decoder")
        if prior is not None:
            self._check_fit("prior", said, (prior.config.context, prior.config.embedding))
            warn_of_another("CLIP", clip, prior.config.text_encoder, "prior")
        check_cascade([decoder, *upsamplers])
        for upsampler in filter(reads, upsamplers):
            warn_of_another("CLIP", clip, upsampler.config.text_encoder, "upsampler")
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, tuple(upsamplers)

    @staticmethod
    def _check_fit(name: str, said: tuple[int, int], taken: tuple[int | None, int | None]) -> None:
        if taken != said:
            raise ValueError(
                f"CLIP has texts of width {said[0]} and embeddings of {said[1]} numbers; "
                f"the {name} takes {taken[0]} and {taken[1]}"
            )

    @classmethod
    def load(
        cls,
        clip: PathLike = "clip",
        prior: PathLike | None = "prior",
        decoder: PathLike = "decoder",
        upsamplers: Sequence[PathLike] = UPSAMPLERS,
    ) -> Self:
        """The model made of these trained parts, by default the shipped ones.

        prior: of either kind, or None for none. Raises CheckpointError as each does.
        """
        return cls(
            CLIP.load(clip),
            None if prior is None else load_prior(prior),
            Decoder.load(decoder),
            [Upsampler.load(upsampler) for upsampler in upsamplers],
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        return self.stages[-1].config.size

    @property
    def stages(self) -> tuple[TextDiffusion, ...]:
        """The models that draw images, in their order."""
        return self.decoder, *self.upsamplers

    def count_states(self, how: Sampling) -> int:
        """How many states each method that draws yields. Raises ValueError for more steps than T."""
        return count_states(self.stages, how)

    def pictures(self, x: Array) -> np.ndarray:
        """Images of any stage at the size of the last, (n, H, W, 3), float32 in [-1, 1], on the host."""
        factor = self.size[0] // x.shape[1]
        return to_numpy(larger(x.clip(-1, 1), factor))

    # ---------------------------------------------------------------------------------- text to image (E29)

    def text_to_image(
        self,
        prompts: Sequence[str],
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = USUAL_GUIDANCE,
        negative: str = "",
        candidates: int = 2,
    ) -> Iterator[Array]:
        """Draw what the prompts say: z_i ~ p(z_i | y), then x ~ p(x | z_i, y) (E29)."""
        z_i = self.embed(prompts, rng.at(0), candidates)
        return self.draw(z_i, prompts, rng.at(1), how, guidance, negative)

    def embed(self, prompts: Sequence[str], rng: Rng, candidates: int = 2) -> Array:
        """z_i ~ p(z_i | y), an embedding of an image for each prompt: (B, embedding), of length 1.

        Of several candidates, the one nearest to z_t is kept (E32). Without a prior, it is z_t itself.
        """
        captions = told_captions(self.clip, prompts)
        if self.prior is None:
            return z_t_of(captions)
        return self.prior.sample(captions, rng, candidates=candidates, empty=told_captions(self.clip, [""]))

    def draw(
        self,
        z_i: Array | None,
        captions: str | Sequence[str],
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = USUAL_GUIDANCE,
        negative: str = "",
        x_T: Array | None = None,
    ) -> Iterator[Array]:
        """x ~ p(x | z_i, y): draw images of their embeddings and captions (E33).

        z_i: (n, embedding); None leaves it open, so that the captions say all. captions: one each, or one for all; ""
        leaves that open. x_T: what the decoder starts from, (n, H, W, 3), by default noise of this rng. Where it is
        given, each upsampler starts all images from one noise too, so that they differ in what was told alone.
        """
        told, nothing = self._told(z_i, captions), told_texts(self.clip, negative)
        small = self.decoder.sample(told, rng.at(0), how, guidance=guidance, negative=nothing, x_T=x_T)
        fewer = upsampling(how, self.decoder.schedule.T)
        texts = dataclasses.replace(told, vector=None)
        return and_larger(self.upsamplers, small, texts, rng.at(1), fewer, alike=x_T is not None)

    def _told(self, z_i: Array | None, captions: str | Sequence[str]) -> Condition:
        texts = told_texts(self.clip, captions)
        return texts if z_i is None else dataclasses.replace(texts.repeated(len(z_i)), vector=z_i)

    # --------------------------------------------------------------------------------- manipulations (E34)

    def image_embedding(self, images: Array) -> Array:
        """z_i of images (n, H, W, 3), float32 in [-1, 1]: (n, embedding), on the device in use."""
        return to_device(self.clip.image_embedding(images))

    def text_embedding(self, texts: Sequence[str]) -> Array:
        """z_t of texts: (n, embedding), on the device in use."""
        return to_device(self.clip.text_embedding(texts))

    def variations(
        self,
        images: Array,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = 1.0,
        x_T: Array | None = None,
    ) -> Iterator[Array]:
        """Draw another image of the embedding of each (E34; Ramesh et al. 2022, section 3.1).

        What z_i holds stays, the rest is drawn anew. images: (n, H, W, 3), float32 in [-1, 1]. x_T: that of `invert`,
        for variations near the image: DDIM with eta = 0 gives the image itself, and more eta more of a change.
        """
        return self.draw(self.image_embedding(images), "", rng, how, guidance, x_T=x_T)

    def interpolate(
        self,
        images: Array,
        w: int | Sequence[float],
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = 1.0,
    ) -> Iterator[Array]:
        """Draw images on the way from one to another, all from one x_T (E34; Ramesh et al. 2022, section 3.2).

            z_i = slerp(z_i^(1), z_i^(2), w),   w = 0, ..., 1

        images: the two, (2, H, W, 3), float32 in [-1, 1]. w: how far along each is, or how many there are, at equal
        distances; see also `bisect`. Raises ValueError for fewer than 2, a w outside [0, 1], or other than two images.
        """
        places = np.linspace(0, 1, w) if isinstance(w, int) else np.asarray(w)
        if len(places) < 2 or len(images) != 2:
            raise ValueError(
                f"there are 2 images or more from one to another, of 2, got {len(places)} of {len(images)}"
            )
        if places.min() < 0 or places.max() > 1:
            raise ValueError(f"the way goes from w = 0 to 1, got {places.min():g} to {places.max():g}")
        z_i = self.image_embedding(images)
        return self._along(arc(z_i[:1], z_i[1:], places), rng, how, guidance)

    def bisect(
        self, images: Array, rng: Rng, how: Sampling = USUAL_SAMPLING, guidance: float = 1.0
    ) -> Iterator[tuple[float, Array]]:
        """Find out where the images of `interpolate` change, by drawing ever more of them: each w, with its image.

        First come the ends, w = 0 and 1, then always the middle of those neighbours whose images differ most. What
        changes at once from afar, a thing into another, is often smooth from near: the w of the first n, sorted,
        make `interpolate` walk in more even steps. There is no end; take as many as you want. images, rng, how,
        guidance: those of `interpolate`, of a sampler that adds no noise. Each image is the decoder's, (1, H, W, 3).
        """
        z_i, x_T, nothing = self.image_embedding(images), self.decoder.noise(1, rng.at(2)), told_texts(self.clip, "")

        def at(w: float) -> Array:
            told = self._told(arc(z_i[:1], z_i[1:], np.array([w])), "")
            return last(self.decoder.sample(told, rng.at(0), how, guidance=guidance, negative=nothing, x_T=x_T))

        found = [(0.0, at(0.0)), (1.0, at(1.0))]
        yield from found
        while True:
            jumps = [float(((after - before) ** 2).mean()) for (_, before), (_, after) in itertools.pairwise(found)]
            i = int(np.argmax(jumps))
            w = (found[i][0] + found[i + 1][0]) / 2
            found.insert(i + 1, (w, at(w)))
            yield found[i + 1]

    def text_diff(
        self,
        image: Array,
        old: str,
        new: str,
        n: int,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = 1.0,
        far: float = 0.5,
        x_T: Array | None = None,
    ) -> Iterator[Array]:
        """Draw n images on the way from one towards what a text changes, all from one x_T (E34).

            z_d = (z_t(new) − z_t(old)) / ‖z_t(new) − z_t(old)‖
            z_i = slerp(z_i, z_d, θ),   θ = 0, ..., far

        image: (1, H, W, 3), float32 in [-1, 1]. old: what it shows. new: what it shall show. far: in [0, 1]; the paper
        goes to 0.25 to 0.5. x_T: (1, H, W, 3), such as that of `invert`, which keeps the layout.
        Raises ValueError for equal texts or a far outside [0, 1]. (Ramesh et al. 2022, section 3.3)
        """
        if not 0 <= far <= 1:
            raise ValueError(f"how far to go must be in [0, 1], got {far}")
        if old == new:
            raise ValueError(f"two equal texts make no difference: {old!r}")
        z_old, z_new = self.text_embedding([old, new])
        z_d = unit_rows(z_new - z_old)
        places = np.linspace(0, far, n)
        return self._along(arc(self.image_embedding(image), z_d[None], places), rng, how, guidance, x_T)

    def _along(self, z_i: Array, rng: Rng, how: Sampling, guidance: float, x_T: Array | None = None) -> Iterator[Array]:
        x_T = self.decoder.noise(1, rng.at(2)) if x_T is None else x_T
        return self.draw(z_i, "", rng, how, guidance, x_T=x_T.repeat(len(z_i), axis=0))

    def invert(self, images: Array, rng: Rng, steps: int = 50, guidance: float = 1.0) -> Array:
        """x_T from which DDIM's decoder draws these images of their own z_i: DDIM backwards (E34, E36).

        An image is then (z_i, x_T): what CLIP sees of it, and the rest. Where pixels agree, as on a plain background,
        there is no noise to follow, and so it begins with a little, a fiftieth of the way: see `ddim_inverse`.
        images: (n, H, W, 3), float32 in [-1, 1], as CLIP sees them. Returns x_T of the decoder's size, to which the
        images are made smaller if need be. (Ramesh et al. 2022, section 3)
        """
        told = self._told(self.image_embedding(images), "")
        nothing = told_texts(self.clip, "").repeated(len(told))
        schedule = self.decoder.schedule
        start = schedule.T // 50
        small = smaller(to_device(images), images.shape[1] // self.decoder.config.size[0])
        noised = q_sample(small, start, rng.normal(small.shape), schedule)
        denoise = self.decoder.denoiser(told, guidance, nothing)
        return last(ddim_inverse(denoise, noised, schedule, rng, steps, start=start))


def load_prior(path: PathLike) -> Prior:
    """The prior of either kind in a training run's checkpoint, or the shipped "prior" or "autoregressive_prior".

    Raises CheckpointError if there is none.
    """
    kind = checkpoint.kind_of(path)
    return (AutoregressivePrior if kind == AutoregressivePrior.kind else DiffusionPrior).load(path)


def arc(start: Array, end: Array, w: np.ndarray) -> Array:
    """Points on the arc from one embedding to another, (1, d) each: slerp(start, end, w), (n, d), for w (n,)."""
    n = len(w)
    return slerp(start.repeat(n, axis=0), end.repeat(n, axis=0), w.astype(np.float32))
