"""Latent diffusion: the same diffusion, on the latents of an autoencoder, told a text (E24, E27)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, beside, captured
from tinydiff.diffusion import Sampling, classifier_free, denoiser, draw_t, q_sample, squared_error, target_of
from tinydiff.diffusion.samplers import Denoise
from tinydiff.files import PathLike
from tinydiff.models.pixel_diffusion import SCHEDULES, TARGETS, USUAL_SAMPLING, schedule_for
from tinydiff.models.trained import load_trained
from tinydiff.nn import Module, Transformer, TransformerConfig, UNet, UNetConfig
from tinydiff.rng import Rng


@dataclass(frozen=True)
class Text:
    """What the U-Net is told of B texts: the states of their tokens, τ_θ(y), and which of them are there.

    states: (B, M, context), float32. mask: (B, M), bool, False for padding.
    """

    states: Array
    mask: Array

    def repeated(self, n: int) -> Text:
        """One text, n times. Raises ValueError for more texts than one, unless there are n already."""
        if len(self.states) == n:
            return self
        if len(self.states) != 1:
            raise ValueError(f"{n} images take one text, or one each, got {len(self.states)}")
        module = array_module(self.states)
        return Text(module.repeat(self.states, n, axis=0), module.repeat(self.mask, n, axis=0))


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """What a LatentDiffusion is made of.

    unet: the network's sizes, with unet.channels those of the latents and unet.context the width of a text's states.
    size: height and width of the latents. T, schedule, target: see PixelDiffusionConfig. text_drop: the share of texts
    that are replaced by the empty one in training, so that guidance has something to move away from (E35). text_layers:
    blocks of a transformer that reads the states before the U-Net does, and is trained with it. CLIP's text tower is
    causal: "a red circle" does not know yet what it is left of. Here each token sees all (Kong et al. 2024, section
    4.2, call it a token refiner); Stable Diffusion has none. autoencoder, text_encoder: the fingerprints of those that
    it was trained with, to which latents and states mean what they mean to it; empty if not known.

    Raises ValueError for a name that is not known, a U-Net that takes no text, a share outside [0, 1], or a negative
    number of layers.
    """

    unet: UNetConfig
    size: tuple[int, int] = (8, 8)
    T: int = 1000
    schedule: str = "cosine"
    target: str = "v"
    text_drop: float = 0.1
    text_layers: int = 0
    autoencoder: str = ""
    text_encoder: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (("schedule", self.schedule, SCHEDULES), ("target", self.target, TARGETS)):
            if value not in known:
                raise ValueError(f"the {name} must be one of {', '.join(known)}, got {value!r}")
        if self.unet.context is None:
            raise ValueError("latent diffusion needs a U-Net with a context, the width of a text's states")
        if not 0 <= self.text_drop <= 1:
            raise ValueError(f"the share of dropped texts must be in [0, 1], got {self.text_drop}")
        if self.text_layers < 0:
            raise ValueError(f"the number of layers for the text must be at least 0, got {self.text_layers}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        return cls(**fields | {"unet": UNetConfig(**fields["unet"])})


STABLE_DIFFUSION_1 = LatentDiffusionConfig(
    UNetConfig(4, base=320, multipliers=(1, 2, 4, 4), blocks=2, attention=(0, 1, 2), heads=8, groups=32, context=768),
    size=(64, 64),
    schedule="scaled-linear",
    target="eps",
)
"""That of Stable Diffusion 1.x, 859,520,964 parameters, on latents of images of 512 x 512."""


class LatentDiffusion(Module):
    """ε_θ(z_t, t, τ_θ(y)): a U-Net that attends to a text, on latents z of unit variance (Rombach et al. 2022).

    What differs from diffusion on pixels: the condition, and that nothing is clipped, since latents have no bounds.
    """

    kind = "latent-diffusion"

    def __init__(self, config: LatentDiffusionConfig, rng: Rng):
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
        return load_trained(path, cls.kind, lambda fields: cls(LatentDiffusionConfig.from_dict(fields), Rng(0)))

    def __call__(self, z_t: Array, t: Array, text: Text) -> Tensor:
        """The network's output for z_t (B, h, w, c) at the times t (B,), told B texts."""
        states = Tensor(text.states)
        if self.reader is not None:
            states = self.reader(states, text.mask)
        return self.unet(Tensor(z_t), beside(t, z_t), context=states, mask=text.mask)

    def loss(self, z_0: Array, rng: Rng, text: Text, empty: Text) -> Tensor:
        """One draw of the training loss (E24; Rombach et al. 2022, eq. 3).

            L = || ε − ε_θ(z_t, t, τ_θ(y)) ||²,   z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε

        or as much for another target, averaged over batch and latents; some texts are replaced by the empty one.
        z_0: (B, h, w, c), float32, of unit variance. rng: the stream of this step. text: of B texts; empty: of "".
        """
        return self.loss_of(*self.draw(z_0, rng, text, empty))

    def draw(self, z_0: Array, rng: Rng, text: Text, empty: Text) -> tuple[Array, ...]:
        """All that `loss` draws and looks up, the arguments of `loss_of`: z_t, t, what is wanted, states and mask."""
        module, s = array_module(z_0), self.schedule
        t = draw_t(rng.at(0), len(z_0), s.T, stratified=True)
        eps = rng.at(1).normal_like(z_0)
        dropped = rng.at(2).uniform((len(z_0),)) < self.config.text_drop
        states = module.where(dropped[:, None, None], empty.states, text.states)
        mask = module.where(dropped[:, None], empty.mask, text.mask)
        wanted = target_of(z_0, eps, t, s, self.config.target)
        return q_sample(z_0, t, eps, s), beside(t, z_0), wanted, states, mask

    def loss_of(self, z_t: Array, t: Array, wanted: Array, states: Array, mask: Array) -> Tensor:
        """The loss of what `draw` gave."""
        return squared_error(self(z_t, t, Text(states, mask)), wanted)

    def denoiser(self, text: Text, guidance: float, negative: Text) -> Denoise:
        """The network as the samplers take it: denoise(z_t, t) -> Prediction.

            ε = ε_θ(z_t, t, negative) + s (ε_θ(z_t, t, text) − ε_θ(z_t, t, negative))            (E35)

        text, negative: one for each z_t of the batch. negative: the empty text, or what is not wanted. guidance: s; 1
        is none. Raises ValueError for guidance that is not finite.
        """
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}")
        self.eval()
        model = classifier_free(lambda z, t: self(z, t, text), lambda z, t: self(z, t, negative), guidance)
        network = captured(lambda z_t, t: model(z_t, t).data)
        return denoiser(lambda z_t, t: network(z_t, beside(t, z_t)), self.schedule, self.config.target, clip=False)

    def noise(self, n: int, rng: Rng) -> Array:
        """z_T for n images: draws from N(0, I), (n, h, w, c) float32."""
        return rng.normal((n, *self.config.size, self.config.unet.channels))

    def sample(
        self, text: Text, rng: Rng, how: Sampling = USUAL_SAMPLING, *, guidance: float = 1.0, negative: Text
    ) -> Iterator[Array]:
        """Draw latents for texts, yielding z_T first, then each state down to z_0 (E19).

        text, guidance, negative: as `denoiser` takes them, negative also once for all. how: the sampler and its steps.
        Equal rng, equal z_T, whatever the text. Raises ValueError for more steps than T, or another number of texts.
        """
        n = len(text.states)
        denoise, z_T = self.denoiser(text, guidance, negative.repeated(n)), self.noise(n, rng.at(0))
        how = dataclasses.replace(how, clip=False)
        return itertools.chain([z_T], how.states(denoise, z_T, self.schedule, rng.at(1)))
