"""Randomness as an argument: a seeded stream with named children, so that equal seeds give equal bits.

Nothing in tinydiff reads global random state. A function that draws takes an `Rng`. A child stream is named by
integers, `rng.at(step)`, and depends on nothing but the seed and that name; a training run that is resumed at
step 1000 therefore draws what it would have drawn had it never stopped, with no generator state to save.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array


class Rng:
    """A stream of random numbers on one device.

    seed: a whole number >= 0. device: "cpu", "cuda" or None for the device in use (backend.device()).
    Raises ValueError for a negative seed. The streams of the two devices differ; on one device the same seed gives
    the same bits.
    """

    def __init__(self, seed: int = 0, device: str | None = None, *, path: tuple[int, ...] = ()):
        if seed < 0 or any(p < 0 for p in path):
            raise ValueError(f"a seed and the names of its streams must be whole numbers >= 0, got {seed} {path}")
        self.seed, self.path = int(seed), tuple(int(p) for p in path)
        self.device = backend.resolve_device(device)
        self._generator: Any = None

    def __repr__(self) -> str:
        return f"Rng(seed={self.seed}, path={self.path}, device={self.device!r})"

    def at(self, *names: int) -> Rng:
        """The child stream with this name; two names give independent streams, one name always the same."""
        return type(self)(self.seed, self.device, path=(*self.path, *names))

    @property
    def _seeds(self) -> np.random.SeedSequence:
        """The name is the spawn key: as part of the entropy, where zeros are padding, (0,) and (0, 0) would be one."""
        return np.random.SeedSequence(self.seed, spawn_key=self.path)

    @property
    def generator(self) -> Any:
        """The NumPy or CuPy generator underneath, made at the first draw."""
        if self._generator is None:
            self._generator = backend.random_generator(self._seeds, self.device)
        return self._generator

    def normal(self, shape: tuple[int, ...], dtype: Any = np.float32, std: float = 1.0) -> Array:
        """Draws from N(0, std² I): an array of this shape, float32 or float64."""
        draws = self.generator.standard_normal(shape, dtype=dtype)
        return draws if std == 1 else draws * std

    def normal_like(self, x: Array) -> Array:
        """Draws from N(0, I) in the shape and dtype of x."""
        return self.normal(tuple(x.shape), x.dtype)

    def uniform(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Draws from U[0, 1): an array of this shape, float32 or float64."""
        return self.generator.random(shape, dtype=dtype)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Array:
        """Whole numbers low <= n < high, int64."""
        return self.generator.integers(low, high, shape, dtype=np.int64)

    def permutation(self, n: int) -> np.ndarray:
        """The numbers 0..n-1 in random order, int64, always on the host (it orders the data, which lives there)."""
        return np.random.Generator(np.random.PCG64(self._seeds)).permutation(n)


class Blank(Rng):
    """A stream whose normal draws are zeros, for a model that is only counted, or whose weights will be loaded.

    On the host, the zeros take no memory until something is written over them, so that a model of any size can be made.
    """

    def normal(self, shape: tuple[int, ...], dtype: Any = np.float32, std: float = 1.0) -> Array:
        """Zeros of this shape, float32 or float64."""
        return backend.to_device(np.zeros(shape, dtype), self.device)
