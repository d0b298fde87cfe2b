"""DALL-E 2: from a text to an embedding of an image, and from there to the image (E29, E33, E34; Ramesh et al. 2022).

    p(x | y) = p(x | z_i, y) p(z_i | y)                                                            (E29; section 2, eq. 1)

text y ── CLIP's text tower ── z_t ── prior ── z_i ── decoder ── 32 x 32 ── upsampler ── 64 x 64

The prior is p(z_i | y), see prior.py and autoregressive_prior.py; the upsampler is in cascade.py. Here are the decoder,

z_i ──┬── linear ─── added to the embedding of t ─────┐
      └── linear ─── tokens ──┐                       │
caption ── CLIP's text tower ─┴─ states ── context ── U-Net ── ε_θ(x_t, t, z_i, y)

and the whole. An image has two coordinates: z_i says what CLIP sees in it, and x_T, found by DDIM backwards, all the
rest. To change one and keep the other is to vary, to blend and to edit images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from tinydiff import checkpoint, ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, beside, to_device, to_numpy
from tinydiff.diffusion import Sampling, ddim_inverse, last, q_sample, slerp
from tinydiff.files import PathLike
from tinydiff.models.autoregressive_prior import AutoregressivePrior
from tinydiff.models.cascade import Upsampler, larger
from tinydiff.models.clip import CLIP
from tinydiff.models.pixel_diffusion import USUAL_SAMPLING
from tinydiff.models.prior import DiffusionPrior, told_captions, unit_rows, z_t_of
from tinydiff.models.text_diffusion import Condition, TextDiffusion, TextDiffusionConfig, check_share, told_texts
from tinydiff.models.trained import warn_of_another
from tinydiff.nn import Linear
from tinydiff.rng import Rng

USUAL_GUIDANCE = 2.0
"""s of E35, unless told otherwise."""

UPSAMPLING_STEPS = 27
"""The upsampler is run in as many steps as the decoder, but in no more than these (Ramesh et al. 2022, Table 3)."""

PRIORS: dict[str, type[DiffusionPrior | AutoregressivePrior]] = {
    model.kind: model for model in (DiffusionPrior, AutoregressivePrior)
}

# ----------------------------------------------------------------------------------------- the decoder


@dataclass(frozen=True)
class DecoderConfig(TextDiffusionConfig):
    """What a Decoder is made of.

    unet: the network's sizes, with unet.vector as many numbers as an embedding has. tokens: how many tokens of context
    it becomes. text_drop, image_drop: the shares of captions that are replaced by the empty one, and of embeddings that
    are replaced by 0, in training, so that guidance has something to move away from (E35). The others: see
    TextDiffusionConfig, which raises what this does; ValueError also for a U-Net that takes no text or no embedding, or
    less than one token.
    """

    text_drop: float = 0.5
    image_drop: float = 0.1
    tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("image embeddings", self.image_drop)
        if not (self.unet.context and self.unet.vector):
            raise ValueError(
                "a decoder needs a U-Net with a context, the width of a text's states, and a vector, the numbers of an "
                f"image embedding; got {self.unet.context} and {self.unet.vector}"
            )
        if self.tokens < 1:
            raise ValueError(f"an image embedding becomes 1 token of context or more, got {self.tokens}")


class Decoder(TextDiffusion):
    """ε_θ(x_t, t, z_i, y): diffusion on pixels, told the CLIP embedding z_i of the image that is wanted, and a caption.

    Condition.vector is z_i, (B, unet.vector), of length 1; 0 or None for none. The network is told √d z_i, d numbers of
    unit variance.
    """

    kind = "decoder"
    configured_by: ClassVar[type[TextDiffusionConfig]] = DecoderConfig
    config: DecoderConfig

    def __init__(self, config: DecoderConfig, rng: Rng):
        super().__init__(config, rng)
        unet = config.unet
        assert unet.context is not None and unet.vector is not None
        self.image_tokens = Linear(unet.vector, config.tokens * unet.context, rng)

    def __call__(self, x_t: Array, t: Array, told: Condition) -> Tensor:
        """The network's output for x_t (B, H, W, C) at the times t (B,).

        Raises ValueError without texts, and for image embeddings of another shape.
        """
        told = self.completed(told)
        z_i = self._scaled(told.vector, x_t)
        context, mask = self._with_image_tokens(told, z_i)
        return self.unet(Tensor(x_t), beside(t, x_t), context=context, mask=mask, vector=z_i)

    def completed(self, told: Condition) -> Condition:
        """What is told, with z_i = 0 where none is (E33). Raises ValueError without texts."""
        if told.states is None:
            raise ValueError("a decoder is told a text, if only the empty one")
        if told.vector is not None:
            return told
        shape = len(told.states), self.config.unet.vector
        return dataclasses.replace(told, vector=array_module(told.states).zeros(shape, told.states.dtype))

    def _scaled(self, z_i: Array, x_t: Array) -> Tensor:
        """√d z_i, (B, d), for z_i of length 1."""
        shape = len(x_t), self.config.unet.vector or 0
        if z_i.shape != shape:
            raise ValueError(f"a decoder is told image embeddings {shape}, got {z_i.shape}")
        return Tensor(math.sqrt(shape[1]) * z_i)

    def _with_image_tokens(self, told: Condition, z_i: Tensor) -> tuple[Tensor, Array | None]:
        """The states of the texts, then the tokens of the images, (B, M + tokens, context), and which are there."""
        states = self.read(told)
        assert states is not None
        B, n, module = len(z_i), self.config.tokens, array_module(told.states)
        context = ops.concat([states, self.image_tokens(z_i).reshape(B, n, -1)], axis=1)
        if told.mask is None:
            return context, None
        return context, module.concatenate([told.mask, module.ones((B, n), bool)], axis=1)

    def hide_some(self, told: Condition, empty: Condition, rng: Rng) -> Condition:
        """Replace shares of the captions by the empty one and of the z_i by 0, each on its own (E33)."""
        told = super().hide_some(told, empty, rng)
        if told.vector is None:
            raise ValueError("a decoder learns from image embeddings, but was told none")
        return told.some_replaced(Condition(vector=0 * told.vector[:1]), self.config.image_drop, rng.at(3))


# ------------------------------------------------------------------------------------------- the whole


class DallE2:
    """CLIP, a prior, a decoder, and an upsampler or none.

    Each method that draws yields the images on their way from noise: first the decoder's, then the upsampler's, of
    which the last are the result; `pictures` brings any of them to one size. guidance: s of E35, for the decoder; 1 is
    none. negative: the caption of what is not wanted. rng: equal rng, equal noise.
    """

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior | AutoregressivePrior | None,
        decoder: Decoder,
        upsampler: Upsampler | None = None,
    ):
        """Raises ValueError for parts that do not fit one another; warns of a part that was trained with another CLIP.

        prior: None leaves it out, and takes the embedding of the text for that of an image.
        """
        said = clip.config.text.width, clip.config.embedding
        self._check_fit("decoder", said, (decoder.config.unet.context, decoder.config.unet.vector))
        warn_of_another("CLIP", clip, decoder.config.text_encoder, "decoder")
        if prior is not None:
            self._check_fit("prior", said, (prior.config.context, prior.config.embedding))
            warn_of_another("CLIP", clip, prior.config.text_encoder, "prior")
        if upsampler is not None and upsampler.config.low_size != decoder.config.size:
            small, low = decoder.config.size, upsampler.config.low_size
            raise ValueError(f"the decoder draws {small[0]} x {small[1]}, the upsampler takes {low[0]} x {low[1]}")
        self.clip, self.prior, self.decoder, self.upsampler = clip, prior, decoder, upsampler

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
        upsampler: PathLike | None = "upsampler",
    ) -> Self:
        """The model made of these trained parts, by default the shipped ones; None leaves one out.

        prior: of either kind. Raises CheckpointError as each does.
        """
        return cls(
            CLIP.load(clip),
            None if prior is None else load_prior(prior),
            Decoder.load(decoder),
            None if upsampler is None else Upsampler.load(upsampler),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        return (self.decoder if self.upsampler is None else self.upsampler).config.size

    def steps_of(self, how: Sampling) -> int:
        """How many steps the decoder and the upsampler take together. Raises ValueError unless they are in 1..T."""
        small = how.steps_of(self.decoder.schedule.T)
        return small if self.upsampler is None else small + min(small, UPSAMPLING_STEPS)

    def pictures(self, x: Array) -> np.ndarray:
        """Images of either stage at the size of the last, (n, H, W, 3), float32 in [-1, 1], on the host."""
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
        given, the upsampler starts all images from one noise too, so that they differ in what was told alone.
        """
        told, nothing = self._told(z_i, captions), told_texts(self.clip, negative)
        small = self.decoder.sample(told, rng.at(0), how, guidance=guidance, negative=nothing, x_T=x_T)
        return small if self.upsampler is None else self._and_larger(self.upsampler, small, rng.at(1), how, x_T is None)

    def _told(self, z_i: Array | None, captions: str | Sequence[str]) -> Condition:
        texts = told_texts(self.clip, captions)
        return texts if z_i is None else dataclasses.replace(texts.repeated(len(z_i)), vector=z_i)

    def _and_larger(
        self, upsampler: Upsampler, states: Iterator[Array], rng: Rng, how: Sampling, each_its_noise: bool
    ) -> Iterator[Array]:
        """The decoder's states, then the upsampler's, which is shown the last of them."""
        for x in states:
            yield x
        n, steps = len(x), min(how.steps_of(self.decoder.schedule.T), UPSAMPLING_STEPS)
        x_T = None if each_its_noise else upsampler.noise(1, rng.at(1)).repeat(n, axis=0)
        yield from upsampler.upsample(x, rng.at(0), dataclasses.replace(how, steps=steps), x_T=x_T)

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
        guidance: float = USUAL_GUIDANCE,
        x_T: Array | None = None,
    ) -> Iterator[Array]:
        """Draw another image of the embedding of each (E34; Ramesh et al. 2022, section 3.1).

        What z_i holds stays, the rest is drawn anew. images: (n, H, W, 3), float32 in [-1, 1]. x_T: that of `invert`,
        with a `how` that adds noise (DDIM with eta between 0 and 1), varies less the smaller eta is.
        """
        return self.draw(self.image_embedding(images), "", rng, how, guidance, x_T=x_T)

    def interpolate(
        self,
        images: Array,
        n: int,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = USUAL_GUIDANCE,
    ) -> Iterator[Array]:
        """Draw n images on the way from one to another, all from one x_T (E34; Ramesh et al. 2022, section 3.2).

            z_i = slerp(z_i^(1), z_i^(2), w),   w = 0, ..., 1

        images: the two, (2, H, W, 3), float32 in [-1, 1]. Raises ValueError for n < 2 or another number of images.
        """
        if n < 2 or len(images) != 2:
            raise ValueError(f"there are 2 images or more from one to another, of 2, got {n} of {len(images)}")
        z_i = self.image_embedding(images)
        return self._along(arc(z_i[:1], z_i[1:], n), rng, how, guidance)

    def text_diff(
        self,
        image: Array,
        old: str,
        new: str,
        n: int,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        guidance: float = USUAL_GUIDANCE,
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
        return self._along(arc(self.image_embedding(image), z_d[None], n, far), rng, how, guidance, x_T)

    def _along(self, z_i: Array, rng: Rng, how: Sampling, guidance: float, x_T: Array | None = None) -> Iterator[Array]:
        x_T = self.decoder.noise(1, rng.at(2)) if x_T is None else x_T
        return self.draw(z_i, "", rng, how, guidance, x_T=x_T.repeat(len(z_i), axis=0))

    def invert(self, images: Array, rng: Rng, steps: int = 50, guidance: float = 1.0) -> Array:
        """x_T from which DDIM's decoder draws these images of their own z_i: DDIM backwards (E34, E36).

        An image is then (z_i, x_T): what CLIP sees of it, and the rest. Where pixels agree, as on a plain background,
        there is no noise to follow, and so it begins with a little, a fiftieth of the way: see `ddim_inverse`.
        images: (n, H, W, 3), float32 in [-1, 1], of the decoder's size. Returns the like. (Ramesh et al. 2022, section 3)
        """
        told = self._told(self.image_embedding(images), "")
        nothing = told_texts(self.clip, "").repeated(len(told))
        schedule = self.decoder.schedule
        start = schedule.T // 50
        noised = q_sample(to_device(images), start, rng.normal(images.shape), schedule)
        denoise = self.decoder.denoiser(told, guidance, nothing)
        return last(ddim_inverse(denoise, noised, schedule, rng, steps, start=start))


def load_prior(path: PathLike) -> DiffusionPrior | AutoregressivePrior:
    """The prior of either kind in a training run's checkpoint, or the shipped "prior" or "autoregressive_prior".

    Raises CheckpointError if there is none.
    """
    return PRIORS.get(checkpoint.kind_of(path), DiffusionPrior).load(path)


def arc(start: Array, end: Array, n: int, far: float = 1.0) -> Array:
    """n points on the arc from one embedding towards another, (1, d) each: slerp(start, end, w), w = 0, ..., far."""
    w = np.linspace(0, far, n, dtype=np.float32)
    return slerp(start.repeat(n, axis=0), end.repeat(n, axis=0), w)
