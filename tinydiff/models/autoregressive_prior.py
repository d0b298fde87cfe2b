"""The autoregressive prior of DALL-E 2: an image embedding as a row of codes, drawn one after the other (E31)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from tinydiff import ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, array_module, to_device
from tinydiff.diffusion import classifier_free
from tinydiff.files import PathLike
from tinydiff.models.prior import (
    Prefix,
    PriorConfig,
    check_guidance,
    mask_with,
    most_aligned,
    several,
    unit_rows,
    z_t_of,
)
from tinydiff.models.text_diffusion import Condition
from tinydiff.models.trained import load_trained
from tinydiff.nn import Embedding, Linear, Module, Parameter, Transformer
from tinydiff.rng import Rng

# ---------------------------------------------------------------------------------- embeddings as codes


class PrincipalComponents(NamedTuple):
    """The directions along which rows (N, d) vary, the most first: z ≈ mean + y · directions.

    mean: (d,). directions: (d, d), a unit vector each row. variance: (d,), of the rows along each.
    """

    mean: np.ndarray
    directions: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> Self:
        """The eigenvectors of the rows' covariance. rows: (N, d), on the host. Raises ValueError for fewer than 2."""
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"principal components are of two rows (N, d) or more, got {rows.shape}")
        centred = rows.astype(np.float64) - (mean := rows.mean(axis=0, dtype=np.float64))
        variance, directions = np.linalg.eigh(centred.T @ centred / len(rows))
        return cls(mean, directions.T[::-1], variance[::-1].clip(0))

    def needed(self, share: float) -> int:
        """How many of them explain this share of the variance, 1 at least. ValueError unless 0 < share <= 1."""
        if not 0 < share <= 1:
            raise ValueError(f"the share of the variance to be explained must be in (0, 1], got {share}")
        explained = np.cumsum(self.variance) / self.variance.sum()
        return min(1 + int(np.searchsorted(explained, share)), len(explained))


class Codebook(Module):
    """An embedding as whole numbers: first how well it fits the text, then its principal components.

        values:  z_i · z_t,  then y = P (z_i − mean), the K components of most variance, the most first
        codes:   for each value, which of its levels is nearest; the levels of a value are its quantiles (b + ½)/bins

    so that over the data each code comes about equally often, however a value is distributed.

    Its numbers are fitted (`fit`) and not trained: nothing has a gradient. They are parameters so that a checkpoint
    holds them.
    """

    def __init__(self, config: AutoregressivePriorConfig, device: str):
        K, bins, d = config.components, config.bins, config.embedding
        self.mean, self.directions, self.levels = (
            Parameter(to_device(np.zeros(shape, np.float32), device)) for shape in ((d,), (K, d), (1 + K, bins))
        )

    def fit(self, z_i: np.ndarray, z_t: np.ndarray) -> None:
        """Find components and levels in the embeddings of N images and their captions, (N, d), on the host."""
        found, bins = PrincipalComponents.of(z_i), self.levels.shape[1]
        directions = found.directions[: len(self.directions)]
        values = np.column_stack([(z_i * z_t).sum(axis=1), (z_i - found.mean) @ directions.T])
        levels = np.quantile(values, (np.arange(bins) + 0.5) / bins, axis=0).T
        for parameter, array in ((self.mean, found.mean), (self.directions, directions), (self.levels, levels)):
            parameter[...] = to_device(array.astype(parameter.dtype), parameter.device)

    def codes(self, z_i: Array, z_t: Array) -> Array:
        """The codes of B embeddings, (B, d) each: (B, 1 + K) int64 in 0..bins-1."""
        module, levels = array_module(z_i), self.levels.data
        aligned = (z_i * z_t).sum(axis=-1, keepdims=True)
        values = module.concatenate([aligned, (z_i - self.mean.data) @ self.directions.data.T], axis=1)
        edges = (levels[:, 1:] + levels[:, :-1]) / 2  # (1 + K, bins - 1)
        return (values[:, :, None] >= edges).sum(axis=-1)

    def embeddings(self, codes: Array) -> Array:
        """The embeddings that codes (B, 1 + K) stand for, (B, d), of length 1."""
        levels = self.levels.data
        y = levels[array_module(codes).arange(1, len(levels)), codes[:, 1:]]  # (B, K)
        return unit_rows(self.mean.data + y @ self.directions.data)


# ------------------------------------------------------------------------------------------- the prior


@dataclass(frozen=True)
class AutoregressivePriorConfig(PriorConfig):
    """What an AutoregressivePrior is made of: see PriorConfig, and the Codebook's sizes.

    components: K, how many principal components of an embedding are kept (`PrincipalComponents.needed`); bins: how
    many codes there are for each. Raises ValueError as PriorConfig, for fewer bins than 2, and for components outside
    1..embedding.
    """

    components: int = 16
    bins: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1 <= self.components <= self.embedding and self.bins >= 2):
            raise ValueError(
                f"codes need 1 to {self.embedding} components and 2 bins, got {self.components} and {self.bins}"
            )


class AutoregressivePrior(Module):
    """A causal transformer that draws an embedding's codes one after the other (E31).

        p(c_1, ..., c_K | y, c_0) = ∏_k p(c_k | y, c_0, c_1, ..., c_{k-1})
        tokens:  the caption's,  z_t,  c_0,  c_1, ...,  c_{K-1}
        output:  at c_{k-1}'s place, the logits of c_k

    c_0 says how well image and caption fit, z_i · z_t. In training it is the pair's own; who draws asks for a good one.
    All codes share one table of token embeddings, to which that of their place is added. (Ramesh et al. 2022,
    section 2.2)
    """

    kind = "autoregressive-prior"

    def __init__(self, config: AutoregressivePriorConfig, rng: Rng):
        self.config, width = config, config.transformer.width
        self.codebook = Codebook(config, rng.device)
        self.prefix = Prefix(config, rng)
        self.tokens = Embedding(config.bins, width, rng)
        self.places = Parameter(rng.normal((config.components, width)))
        self.transformer = Transformer(config.transformer, rng)
        self.out = Linear(width, config.bins, rng)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA), ready to sample.

        path: see `checkpoint.find`. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(AutoregressivePriorConfig.from_dict(fields), Rng(0)))

    def __call__(self, codes: Array, captions: Condition) -> Tensor:
        """The logits (B, n, bins) of c_1, ..., c_n, told captions and c_0, ..., c_{n-1}, codes (B, n), n in 1..K."""
        n = codes.shape[1]
        tokens = ops.concat([self.prefix(captions), self.tokens(codes) + self.places[:n]], axis=1)
        states = self.transformer(tokens, mask_with(captions.mask, 1 + n))
        return self.out(states[:, -n:])

    def loss(self, z_i: Array, rng: Rng, captions: Condition, empty: Condition) -> Tensor:
        """One draw of the training loss: −log p(c_k | y, c_0, ..., c_{k-1}) in nats, averaged over batch and k (E31).

        z_i: (B, d), float32 of length 1. rng: the stream of this step, for which captions are replaced by the empty one
        alone. captions: of these B images; empty: of "".
        """
        return self.loss_of(*self.draw(z_i, rng, captions, empty))

    def draw(self, z_i: Array, rng: Rng, captions: Condition, empty: Condition) -> tuple[Array | None, ...]:
        """The arguments of `loss_of`: the codes of each pair, and what is told of its caption."""
        told = captions.some_replaced(empty, self.config.text_drop, rng)
        return self.codebook.codes(z_i, z_t_of(captions)), *told.arrays

    def loss_of(self, codes: Array, *captions: Array | None) -> Tensor:
        """The loss of what `draw` gave."""
        logits = self(codes[:, :-1], Condition(*captions))
        return ops.cross_entropy(logits.reshape(-1, self.config.bins), codes[:, 1:].reshape(-1))

    def candidates(
        self,
        captions: Condition,
        rng: Rng,
        temperature: float = 1.0,
        *,
        n: int = 1,
        guidance: float = 1.0,
        empty: Condition,
    ) -> Array:
        """Draw n embeddings z_i for each of B captions, code by code: (n, B, d), float32 of length 1.

            c_0 ~ Uniform(the upper half of all codes),   c_k ~ softmax(logits / temperature)

        temperature: below 1, what is likely anyway is preferred. guidance: s of E35, for the logits; 1 is none. Equal
        rng, equal first embeddings, however many there are.
        Raises ValueError for n below 1, a temperature that is not above 0, and guidance that is not finite.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"the temperature must be a finite number above 0, got {temperature}")
        check_guidance(guidance)
        self.eval()
        nothing, bins = empty.repeated(len(captions)), self.config.bins
        model = classifier_free(lambda c, _: self(c, captions), lambda c, _: self(c, nothing), guidance)

        def one(rng: Rng) -> Array:
            codes = rng.at(0).integers(bins // 2, bins, (len(captions), 1))
            for k in range(1, 1 + self.config.components):
                with no_grad():
                    logits = model(codes, k).data[:, -1] / temperature
                codes = array_module(codes).concatenate([codes, categorical(logits, rng.at(k))[:, None]], axis=1)
            return self.codebook.embeddings(codes)

        return several(n, one, rng)

    def sample(
        self,
        captions: Condition,
        rng: Rng,
        temperature: float = 1.0,
        *,
        guidance: float = 1.0,
        candidates: int = 2,
        empty: Condition,
    ) -> Array:
        """Draw z_i for B captions: of several candidates, the one nearest to z_t (E32). (B, d), float32 of length 1.

        Takes and raises what `candidates` does.
        """
        drawn = self.candidates(captions, rng, temperature, n=candidates, guidance=guidance, empty=empty)
        return most_aligned(drawn, z_t_of(captions))


def categorical(logits: Array, rng: Rng) -> Array:
    """A whole number for each row of logits (B, bins), drawn with the probabilities softmax(logits): (B,) int64."""
    below = ops.softmax(logits).data.cumsum(axis=-1)
    u = rng.uniform((len(logits), 1), logits.dtype) * below[:, -1:]  # which rounding may leave short of 1
    return (below <= u).sum(axis=-1).clip(max=logits.shape[-1] - 1)
