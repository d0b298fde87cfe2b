"""Embeddings: vectors for whole numbers (learned) and for times (sines and cosines)."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, to_device
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module, Parameter
from tinydiff.rng import Rng


class Embedding(Module):
    """A table of `count` learned vectors, drawn from N(0, 1); rows are picked by whole numbers of any shape."""

    def __init__(self, count: int, channels: int, rng: Rng):
        self.weight = Parameter(rng.normal((count, channels)))

    def __call__(self, rows: Any) -> Tensor:
        return ops.take_rows(self.weight, rows=to_device(rows, self.weight.device))


def sinusoidal(t: Array, channels: int, longest: float = 10_000) -> Array:
    """[sin(t ω_i), cos(t ω_i)] with ω_i = longest^(−i/(channels/2)) (E20; Vaswani et al. 2017, §3.5).

    t: (B,) times; gives (B, channels) float64 in [-1, 1]. Raises ValueError for an odd number of channels.
    """
    if channels % 2:
        raise ValueError(f"a sinusoidal embedding needs an even number of channels, got {channels}")
    angles = t[:, None] * _frequencies(channels // 2, longest, array_module(t))
    return ops.concat([ops.sin(angles), ops.cos(angles)]).data


@functools.cache
def _frequencies(n: int, longest: float, library: ModuleType) -> Array:
    """longest^(−i/n) for i < n, kept in the arrays of a library: a captured function may not move them there."""
    return library.asarray(longest ** (-np.arange(n) / n))


class TimeEmbedding(Module):
    """The sinusoidal embedding of a time through a small network: t (B,) -> (B, outputs), for the blocks."""

    def __init__(self, channels: int, outputs: int, rng: Rng):
        self.channels = channels
        self.inner, self.outer = Linear(channels, outputs, rng), Linear(outputs, outputs, rng)

    def __call__(self, t: Array) -> Tensor:
        h = Tensor(sinusoidal(to_device(t, self.inner.weight.device), self.channels).astype(self.inner.weight.dtype))
        return self.outer(ops.silu(self.inner(h)))
