"""The diffusion prior of DALL-E 2: CLIP's embedding of an image, drawn for a caption (E30, E32).

    p(x | y) = p(x | z_i, y) p(z_i | y)                              (E29; Ramesh et al. 2022, eq. 1)

x is an image, y its caption, z_i the embedding of x. The prior is the second factor; the decoder, which draws an image
of a z_i, is the first. A caption leaves much open, and so the prior has to draw and not only to translate: the
embedding z_t that CLIP has of the text is one vector, and no image's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from tinydiff import ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, array_module, beside, captured
from tinydiff.diffusion import Sampling, classifier_free, denoiser, draw_t, last, q_sample, squared_error
from tinydiff.diffusion.samplers import Denoise
from tinydiff.files import PathLike
from tinydiff.models.clip import CLIP
from tinydiff.models.pixel_diffusion import SCHEDULES, schedule_for
from tinydiff.models.text_diffusion import Condition
from tinydiff.models.trained import load_trained
from tinydiff.nn import Linear, Module, Parameter, TimeEmbedding, Transformer, TransformerConfig
from tinydiff.rng import Rng

SMALL_PRIOR = TransformerConfig(96, 3, 4, causal=True)
"""A transformer that learns captions of shapes in ten minutes."""

PRIOR_SAMPLING = Sampling("ddpm", 64)
"""How the paper draws an embedding: Algorithm 2, in 64 steps (Ramesh et al. 2022, App. C)."""


def told_captions(clip: CLIP, texts: Sequence[str]) -> Condition:
    """What a prior is told of captions: the states of their tokens, which are there, and as vector their z_t.

    z_t: (B, embedding), float32 of length 1. Raises as `CLIP.tokens`.
    """
    ids, mask = clip.tokens(texts)
    with no_grad():
        states = clip.text_states(ids, mask)
        return Condition(states.data, mask, clip.embed_states(states, mask).data)


def z_t_of(captions: Condition) -> Array:
    """CLIP's embeddings of captions, (B, embedding). Raises ValueError if they are not told."""
    if captions.vector is None:
        raise ValueError("a prior is told the embeddings of captions, z_t, as told_captions gives them")
    return captions.vector


@dataclass(frozen=True)
class PriorConfig:
    """What both priors are made of.

    transformer: its sizes; it must be causal. context: the width of a text's states. embedding: d, how many numbers
    CLIP has for an image or a text. text_drop: the share of captions that are replaced by the empty one in training,
    so that guidance has something to move away from (E35). text_encoder: the fingerprint of the CLIP whose embeddings
    it learned to draw; empty if not known.

    Raises ValueError for a transformer that is not causal, sizes below 1, or a share outside [0, 1].
    """

    transformer: TransformerConfig = SMALL_PRIOR
    context: int = 128
    embedding: int = 128
    text_drop: float = 0.1
    text_encoder: str = ""

    def __post_init__(self) -> None:
        if not self.transformer.causal:
            raise ValueError(f"a prior needs a causal transformer, got {self.transformer}")
        if min(self.context, self.embedding) < 1:
            raise ValueError(f"a prior needs sizes of at least 1, got {self}")
        if not 0 <= self.text_drop <= 1:
            raise ValueError(f"the share of dropped captions must be in [0, 1], got {self.text_drop}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        return cls(**fields | {"transformer": TransformerConfig(**fields["transformer"])})


class Prefix(Module):
    """The tokens with which both priors begin: those of the caption, then one for z_t. Gives (B, M + 1, width).

    They need no position embeddings: CLIP's states know their places, and what is a text's token and what is not, the
    linear layer of each kind can say in its bias.
    """

    def __init__(self, config: PriorConfig, rng: Rng):
        self.states = Linear(config.context, config.transformer.width, rng)
        self.z_t = Linear(config.embedding, config.transformer.width, rng)

    def __call__(self, captions: Condition) -> Tensor:
        z_t = z_t_of(captions)
        told = self.z_t(Tensor(z_t * math.sqrt(z_t.shape[-1])))
        return ops.concat([self.states(Tensor(captions.states)), as_tokens(told)], axis=1)


def as_tokens(x: Tensor) -> Tensor:
    """One token each: (B, width) -> (B, 1, width)."""
    return x.reshape(len(x), 1, -1)


def mask_with(mask: Array, tokens: int) -> Array:
    """The mask of a text's tokens (B, M), and of so many after them that are all there: (B, M + tokens)."""
    module = array_module(mask)
    return module.concatenate([mask, module.ones((len(mask), tokens), bool)], axis=1)


@dataclass(frozen=True)
class DiffusionPriorConfig(PriorConfig):
    """What a DiffusionPrior is made of: see PriorConfig, and T steps of the schedule of this name (E6, E7).

    Raises ValueError as PriorConfig, and for a schedule that is not known.
    """

    T: int = 1000
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"the schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")


DALLE_2_PRIOR = DiffusionPriorConfig(TransformerConfig(2048, 24, 32, causal=True), context=1024, embedding=1024)
"""That of DALL-E 2: a transformer of 1.2 billion parameters, on CLIP ViT-H/16 (Ramesh et al. 2022, Table 3)."""


class DiffusionPrior(Module):
    """A causal transformer that predicts the embedding z_i of a caption's image out of a noised one (E30).

        tokens:  the caption's,  z_t,  the time t,  z_i^(t),  a learned query
        output:  at the query's place, the guess of z_i itself and not of the noise

    A token sees those before it, and the query comes last: it has seen them all. Inside, embeddings are √d times
    unit vectors, so that their numbers are about as large as the noise. (Ramesh et al. 2022, section 2.2)
    """

    kind = "diffusion-prior"

    def __init__(self, config: DiffusionPriorConfig, rng: Rng):
        self.config, width = config, config.transformer.width
        self.prefix = Prefix(config, rng)
        self.time = TimeEmbedding(width, width, rng)
        self.into = Linear(config.embedding, width, rng)
        self.query = Parameter(rng.normal((1, 1, width)))
        self.transformer = Transformer(config.transformer, rng)
        self.out = Linear(width, config.embedding, rng)
        self.schedule = schedule_for(config.schedule, config.T, "x0")

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA), ready to sample.

        path: see `checkpoint.find`. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(DiffusionPriorConfig.from_dict(fields), Rng(0)))

    def __call__(self, noised: Array, t: Array, captions: Condition) -> Tensor:
        """The guess of √d z_i, (B, d), for noised embeddings (B, d) at the times t (B,) and B captions."""
        B, width = len(noised), self.config.transformer.width
        own = [as_tokens(self.time(beside(t, noised))), as_tokens(self.into(Tensor(noised)))]
        query = ops.broadcast_to(self.query, shape=(B, 1, width))
        tokens = ops.concat([self.prefix(captions), *own, query], axis=1)
        return self.out(self.transformer(tokens, mask_with(captions.mask, 4))[:, -1])

    def loss(self, z_i: Array, rng: Rng, captions: Condition, empty: Condition) -> Tensor:
        """One draw of the training loss (E30; Ramesh et al. 2022, eq. 2).

            L = ‖ f_θ(z_i^(t), t, y) − z_i ‖²,   z_i^(t) = √ᾱ_t z_i + √(1 − ᾱ_t) ε,   both z_i times √d

        averaged over batch and numbers; some captions are replaced by the empty one. z_i: (B, d), float32 of length 1.
        rng: the stream of this step. captions: of these B images; empty: of "".
        """
        return self.loss_of(*self.draw(z_i, rng, captions, empty))

    def draw(self, z_i: Array, rng: Rng, captions: Condition, empty: Condition) -> tuple[Array | None, ...]:
        """All that `loss` draws, the arguments of `loss_of`: z_i^(t), t, √d z_i, what is told of the captions."""
        x_0 = z_i * math.sqrt(self.config.embedding)
        t = draw_t(rng.at(0), len(x_0), self.schedule.T, stratified=True)
        noised = q_sample(x_0, t, rng.at(1).normal_like(x_0), self.schedule)
        told = captions.some_replaced(empty, self.config.text_drop, rng.at(2))
        return noised, beside(t, x_0), x_0, *told.arrays

    def loss_of(self, noised: Array, t: Array, wanted: Array, *captions: Array | None) -> Tensor:
        """The loss of what `draw` gave."""
        return squared_error(self(noised, t, Condition(*captions)), wanted)

    def denoiser(self, captions: Condition, guidance: float, empty: Condition) -> Denoise:
        """The network as the samplers take it: denoise(z_i^(t), t) -> Prediction, guided as E35 says.

        captions, empty: one for each embedding of the batch. guidance: s; 1 is none. Raises ValueError for guidance
        that is not finite.
        """
        check_guidance(guidance)
        self.eval()
        model = classifier_free(lambda z, t: self(z, t, captions), lambda z, t: self(z, t, empty), guidance)
        network = captured(lambda noised, t: model(noised, t).data)
        return denoiser(lambda z, t: network(z, beside(t, z)), self.schedule, "x0", clip=False)

    def candidates(
        self,
        captions: Condition,
        rng: Rng,
        how: Sampling = PRIOR_SAMPLING,
        *,
        n: int = 1,
        guidance: float = 1.0,
        empty: Condition,
    ) -> Array:
        """Draw n embeddings z_i for each of B captions: (n, B, d), float32 of length 1.

        how: the sampler and its steps; embeddings have no bounds, and nothing is clipped. guidance: s of E35, away from
        the empty caption; 1 is none. Equal rng, equal first embeddings, however many there are.
        Raises ValueError for n below 1, more steps than T, and as `denoiser`.
        """
        denoise = self.denoiser(captions, guidance, empty.repeated(len(captions)))

        def one(rng: Rng) -> Array:
            noise = rng.at(0).normal((len(captions), self.config.embedding))
            return unit_rows(last(how.states(denoise, noise, self.schedule, rng.at(1))))

        return several(n, one, rng)

    def sample(
        self,
        captions: Condition,
        rng: Rng,
        how: Sampling = PRIOR_SAMPLING,
        *,
        guidance: float = 1.0,
        candidates: int = 2,
        empty: Condition,
    ) -> Array:
        """Draw z_i for B captions: of several candidates, the one nearest to z_t (E32). (B, d), float32 of length 1.

        Takes and raises what `candidates` does.
        """
        drawn = self.candidates(captions, rng, how, n=candidates, guidance=guidance, empty=empty)
        return most_aligned(drawn, z_t_of(captions))


def check_guidance(guidance: float) -> None:
    """Raise ValueError unless guidance is a finite number."""
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance}")


def unit_rows(x: Array) -> Array:
    """x / ‖x‖ along the last axis."""
    return x / array_module(x).sqrt((x * x).sum(axis=-1, keepdims=True))


def several(n: int, one: Callable[[Rng], Array], rng: Rng) -> Array:
    """What one(rng.at(0)), ..., one(rng.at(n - 1)) give, along a new first axis. Raises ValueError for n below 1."""
    if n < 1:
        raise ValueError(f"the number of candidates must be at least 1, got {n}")
    drawn = [one(rng.at(i)) for i in range(n)]
    return array_module(drawn[0]).stack(drawn)


def most_aligned(candidates: Array, z_t: Array) -> Array:
    """For each caption, of its candidates the z_i whose dot product with z_t is the largest (E32).

        z_i = argmax over z_i^(1), ..., z_i^(n) of z_i^(j) · z_t

    candidates: (n, B, d). z_t: (B, d). Returns (B, d). Source: Ramesh et al. 2022, section 2.2.
    """
    best = (candidates * z_t).sum(axis=-1).argmax(axis=0)
    return candidates[best, array_module(z_t).arange(len(z_t))]
