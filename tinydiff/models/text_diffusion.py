"""Diffusion told a text: what GLIDE, Imagen, the decoder of DALL-E 2 and Stable Diffusion have in common (E27, E35).

They differ in what is drawn, pictures or latents, and in what their U-Net is told beside the text, a `Condition`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, array_module, beside, captured
from tinydiff.diffusion import Sampling, classifier_free, denoiser, draw_t, q_sample, squared_error, target_of
from tinydiff.diffusion.samplers import Clip, Denoise
from tinydiff.files import PathLike
from tinydiff.models.pixel_diffusion import SCHEDULES, TARGETS, USUAL_SAMPLING, schedule_for
from tinydiff.models.trained import load_trained
from tinydiff.nn import Module, Transformer, TransformerConfig, UNet, UNetConfig
from tinydiff.rng import Rng

AT_ONCE = 32
"""So many images are guided by one pass of a doubled batch; of more, it takes more memory and no less time."""


@dataclass(frozen=True)
class Condition:
    """What a network is told of B images; None for what it is not told.

    states: of the tokens of each text, τ_θ(y), (B, M, context), float32. mask: which of them are there, (B, M), bool,
    False for padding. vector: (B, vector), float32, told a U-Net beside the time, such as the z_i of a decoder; and a
    prior as the captions' z_t. shown: a second image, (B, H, W, extra), float32.
    """

    states: Array | None = None
    mask: Array | None = None
    vector: Array | None = None
    shown: Array | None = None

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """The four of them: Condition(*told.arrays) is told again."""
        return self.states, self.mask, self.vector, self.shown

    def __len__(self) -> int:
        """Of how many images it tells. Raises ValueError if it tells nothing."""
        for array in self.arrays:
            if array is not None:
                return len(array)
        raise ValueError("this condition tells nothing, and so not of how many images")

    def taken(self, rows: Array | slice) -> Condition:
        """What is told of some of the images, by their numbers, each as often as it is named."""
        return Condition(*(None if array is None else array[rows] for array in self.arrays))

    def repeated(self, n: int) -> Condition:
        """What is told of one image, told of n. Raises ValueError for more than one, unless there are n already."""

        def each(array: Array | None) -> Array | None:
            if array is None or len(array) == n:
                return array
            if len(array) != 1:
                raise ValueError(f"{n} images are told one thing, or one each, got {len(array)}")
            return array_module(array).repeat(array, n, axis=0)

        return Condition(*map(each, self.arrays))

    def tells_like(self, other: Condition) -> bool:
        """Whether both tell the same things, of as many images, and by as many tokens."""
        mine, others = ([None if a is None else a.shape for a in told.arrays] for told in (self, other))
        return mine == others

    def joined(self, other: Condition) -> Condition:
        """What is told of these images, followed by what the other, which `tells_like` this, tells of its own."""
        pairs = zip(self.arrays, other.arrays, strict=True)
        return Condition(*(None if a is None else array_module(a).concatenate([a, b]) for a, b in pairs))

    def replaced(self, where: Array, other: Condition) -> Condition:
        """The same, but for the images of `where`, (B,) bool, what the other tells; what that does not tell stays.

        other: of B images, or of one, in place of each. Raises ValueError if it tells what is not told here.
        """

        def each(mine: Array | None, others: Array | None) -> Array | None:
            if others is None:
                return mine
            if mine is None:
                raise ValueError("nothing can be replaced by what was not told")
            chosen = where.reshape(-1, *[1] * (mine.ndim - 1))
            return array_module(mine).where(chosen, others, mine)

        return Condition(*map(each, self.arrays, other.arrays))

    def some_replaced(self, other: Condition, share: float, rng: Rng) -> Condition:
        """The same, but for a random share of the images what the other tells, so that guidance can move away (E35)."""
        return self.replaced(rng.uniform((len(self),)) < share, other)


class TextEncoder(Protocol):
    """What reads the texts, such as CLIP: texts as tokens and where they are, and these as states (B, M, width)."""

    def tokens(self, captions: Sequence[str]) -> tuple[Array, Array]: ...
    def text_states(self, ids: Array, mask: Array) -> Tensor: ...


def told_texts(encoder: TextEncoder, texts: str | Sequence[str]) -> Condition:
    """τ_θ(y): the states of the tokens of each text, and which of them are there (E27)."""
    ids, mask = encoder.tokens([texts] if isinstance(texts, str) else texts)
    with no_grad():
        return Condition(encoder.text_states(ids, mask).data, mask)


@dataclass(frozen=True)
class TextDiffusionConfig:
    """What a TextDiffusion is made of.

    unet: the network's sizes; unet.context is the width of a text's states. size: height and width of what is drawn. T,
    schedule, target: see PixelDiffusionConfig. text_drop: the share of texts that are replaced by the empty one in
    training, so that guidance has something to move away from (E35). text_layers: blocks of a transformer that reads
    the states before the U-Net does, and is trained with it. CLIP's text tower is causal: "a red circle" does not know
    yet what it is left of. Here each token sees all (Kong et al. 2024, section 4.2, call it a token refiner); Stable
    Diffusion has none. text_encoder: the fingerprint of the one that it was trained with, to which states mean what
    they mean to it; empty if not known.

    Raises ValueError for a name that is not known, a share outside [0, 1], a negative number of layers, or layers for
    the text of a U-Net that takes none.
    """

    unet: UNetConfig
    size: tuple[int, int] = (32, 32)
    T: int = 1000
    schedule: str = "cosine"
    target: str = "v"
    text_drop: float = 0.1
    text_layers: int = 0
    text_encoder: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (("schedule", self.schedule, SCHEDULES), ("target", self.target, TARGETS)):
            if value not in known:
                raise ValueError(f"the {name} must be one of {', '.join(known)}, got {value!r}")
        check_share("texts", self.text_drop)
        if self.text_layers < 0 or (self.text_layers and self.unet.context is None):
            raise ValueError(
                f"the number of layers for the text must be at least 0, and 0 without a context, got {self.text_layers}"
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        return cls(**fields | {"unet": UNetConfig(**fields["unet"])})


def check_share(of: str, share: float) -> None:
    """Raise ValueError unless the share of things that are dropped is in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of dropped {of} must be in [0, 1], got {share}")


class TextDiffusion(Module):
    """ε_θ(x_t, t, τ_θ(y)): a U-Net that attends to a text, and draws pictures in [-1, 1].

    On its own it is the base model of GLIDE and Imagen (Nichol et al. 2022; Saharia et al. 2022). Its subclasses draw
    latents, or are told more.
    """

    kind = "text-diffusion"
    configured_by: ClassVar[type[TextDiffusionConfig]] = TextDiffusionConfig
    bounded: ClassVar[bool] = True
    """Whether what is drawn lies in [-1, 1], so that it may be clipped."""
    config: TextDiffusionConfig

    def __init__(self, config: TextDiffusionConfig, rng: Rng):
        self.config = config
        self.unet = UNet(config.unet, rng)
        width, layers = config.unet.context or 0, config.text_layers
        self.reader = Transformer(TransformerConfig(width, layers, config.unet.heads), rng) if layers else None
        self.schedule = schedule_for(config.schedule, config.T, config.target)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA), ready to sample.

        path: see `checkpoint.find`. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(cls.configured_by.from_dict(fields), Rng(0)))

    def __call__(self, x_t: Array, t: Array, told: Condition) -> Tensor:
        """The network's output for x_t (B, H, W, C) at the times t (B,), told of B images."""
        vector, extra = (None if a is None else Tensor(a) for a in (told.vector, told.shown))
        context = self.read(told)
        return self.unet(Tensor(x_t), beside(t, x_t), context=context, mask=told.mask, extra=extra, vector=vector)

    def read(self, told: Condition) -> Tensor | None:
        """The states of the texts as the U-Net sees them, (B, M, context): as they are, or after its own layers."""
        if told.states is None or self.reader is None:
            return None if told.states is None else Tensor(told.states)
        return self.reader(Tensor(told.states), told.mask)

    def loss(self, x_0: Array, rng: Rng, told: Condition, empty: Condition) -> Tensor:
        """One draw of the training loss (E17, E27; Rombach et al. 2022, eq. 3).

            L = || ε − ε_θ(x_t, t, τ_θ(y)) ||²,   x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε

        or as much for another target, averaged over batch and pixels; some texts are replaced by the empty one.
        x_0: (B, H, W, C), float32. rng: the stream of this step. told: of B images; empty: of the text "".
        """
        return self.loss_of(*self.draw(x_0, rng, told, empty))

    def draw(self, x_0: Array, rng: Rng, told: Condition, empty: Condition) -> tuple[Array | None, ...]:
        """All that `loss` draws and looks up, the arguments of `loss_of`: x_t, t, what is wanted, what is told."""
        s = self.schedule
        t = draw_t(rng.at(0), len(x_0), s.T, stratified=True)
        eps = rng.at(1).normal_like(x_0)
        wanted = target_of(x_0, eps, t, s, self.config.target)
        return q_sample(x_0, t, eps, s), beside(t, x_0), wanted, *self.hide_some(told, empty, rng).arrays

    def hide_some(self, told: Condition, empty: Condition, rng: Rng) -> Condition:
        """Replace a share of the texts by the empty one, so that the model learns to do without (E35)."""
        return told.some_replaced(empty, self.config.text_drop, rng.at(2))

    def loss_of(self, x_t: Array, t: Array, wanted: Array, *told: Array | None) -> Tensor:
        """The loss of what `draw` gave."""
        return squared_error(self(x_t, t, Condition(*told)), wanted)

    def denoiser(
        self, told: Condition, guidance: float = 1.0, negative: Condition | None = None, clip: Clip = True
    ) -> Denoise:
        """The network as the samplers take it: denoise(x_t, t) -> Prediction.

            ε = ε_θ(x_t, t, negative) + s (ε_θ(x_t, t, told) − ε_θ(x_t, t, negative))            (E35)

        told, negative: of each x_t of the batch. negative: the empty text, or what is not wanted. guidance: s; 1 is
        none. clip: see Clip; it does not count where there are no bounds. Raises ValueError for guidance that is not
        finite, or without something to move away from.
        """
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}")
        if guidance != 1 and negative is None:
            raise ValueError(f"guidance {guidance} needs something to move away from, such as the empty text")
        self.eval()
        told, away = self.completed(told), self.completed(told if negative is None else negative)
        at_once = guidance != 1 and told.tells_like(away) and len(told) <= AT_ONCE
        model = classifier_free(
            lambda x_t, t: self(x_t, t, told),
            lambda x_t, t: self(x_t, t, away),
            guidance,
            both=self.both(told, away) if at_once else None,
        )
        network = captured(lambda x_t, t: model(x_t, t).data)
        clip = clip if self.bounded else False
        return denoiser(lambda x_t, t: network(x_t, beside(t, x_t)), self.schedule, self.config.target, clip)

    def completed(self, told: Condition) -> Condition:
        """What is told, with zeros for what this model may go without; here there is nothing that it may."""
        return told

    def both(self, told: Condition, away: Condition) -> Callable[[Array, Array], tuple[Tensor, Tensor]]:
        """Make (x_t, t) -> ε_θ(x_t, t, told), ε_θ(x_t, t, away), by one pass of a doubled batch.

        For eight images or fewer a processor takes an eighth to a third less time than for two passes.
        """
        both = told.joined(away)

        def outputs(x_t: Array, t: Array) -> tuple[Tensor, Tensor]:
            n, twice = len(x_t), array_module(x_t).concatenate
            output = self(twice([x_t, x_t]), twice([t, t]), both)
            return output[:n], output[n:]

        return outputs

    def noise(self, n: int, rng: Rng) -> Array:
        """x_T for n images: draws from N(0, I), (n, H, W, C) float32."""
        return rng.normal((n, *self.config.size, self.config.unet.channels))

    def sample(
        self,
        told: Condition,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        *,
        guidance: float = 1.0,
        negative: Condition | None = None,
        x_T: Array | None = None,
    ) -> Iterator[Array]:
        """Draw what is told, yielding x_T first, then each state down to x_0 (E19).

        told, guidance, negative: as `denoiser` takes them, negative also once for all. how: the sampler and its steps.
        x_T: the noise to start from, by default `noise` of this rng: equal rng, equal x_T, whatever is told. Raises
        ValueError for more steps than T, for noise or what is told of another number of images.
        """
        n = len(told)
        negative = None if negative is None else negative.repeated(n)
        denoise = self.denoiser(told, guidance, negative, how.clip)
        x_T = self.noise(n, rng.at(0)) if x_T is None else x_T
        if len(x_T) != n:
            raise ValueError(f"{n} images start from as much noise, got x_T of {len(x_T)}")
        return itertools.chain([x_T], how.states(denoise, x_T, self.schedule, rng.at(1)))
