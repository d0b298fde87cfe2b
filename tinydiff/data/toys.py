"""Points in the plane: data that train in seconds, and whose distribution can be looked at.

draw(name, n, rng)   moons, spirals, swiss_roll, checkerboard, or mixture: eight Gaussians on a ring
GaussianMixture      of which every distribution that diffusion makes is known exactly

Each has mean near 0 and variance near 1, as diffusion's noise has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array
from tinydiff.rng import Rng


@dataclass(frozen=True, eq=False)
class Points:
    """Points and which part of the figure each lies on.

    x: float32 (n, 2) on the host. labels: int64 (n,) in 0..classes-1. classes: 1 for a figure in one piece.
    """

    x: np.ndarray
    labels: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.x)


def draw(name: str, n: int, rng: Rng) -> Points:
    """Draw n points of a figure, one of TOYS.

    Raises ValueError for another name or n < 1. On one device equal rng give equal points.
    """
    if name not in TOYS:
        raise ValueError(f"the figure must be one of {', '.join(TOYS)}, got {name!r}")
    if n < 1:
        raise ValueError(f"the number of points must be at least 1, got {n}")
    return TOYS[name](n, rng)


def moons(n: int, rng: Rng) -> Points:
    """Two half circles that reach into each other; label: which."""
    label, angle = _integers(rng.at(0), 2, n), math.pi * _uniform(rng.at(1), n)
    x, y = np.cos(angle) - 0.5, np.sin(angle) - 0.25
    sign = 1 - 2 * label
    return _points(sign * x, sign * y, label, 2, size=0.705, blur=0.07, rng=rng)


def spirals(n: int, rng: Rng) -> Points:
    """Two arms around each other, one turn each; label: which."""
    label, radius = _integers(rng.at(0), 2, n), np.sqrt(_uniform(rng.at(1), n))
    angle = 2 * math.pi * radius + math.pi * label
    return _points(radius * np.cos(angle), radius * np.sin(angle), label, 2, size=0.5, blur=0.03, rng=rng)


def swiss_roll(n: int, rng: Rng) -> Points:
    """One spiral of one and a half turns."""
    angle = 1.5 * math.pi * (1 + 2 * _uniform(rng.at(1), n))
    x, y = angle * np.cos(angle) - 2, angle * np.sin(angle) - 0.2
    return _points(x, y, np.zeros(n, np.int64), 1, size=6.79, blur=0.05, rng=rng)


def checkerboard(n: int, rng: Rng) -> Points:
    """The eight dark squares of a board of 4 x 4, evenly filled, with sharp edges; label: which square."""
    label = _integers(rng.at(0), 8, n)
    column = label // 2
    row = 2 * (label % 2) + column % 2
    x, y = column + _uniform(rng.at(1), n) - 2, row + _uniform(rng.at(3), n) - 2
    return _points(x, y, label, 8, size=(4 / 3) ** 0.5, blur=0, rng=rng)


def mixture(n: int, rng: Rng) -> Points:
    """Eight Gaussians on a ring, `GaussianMixture.ring()`; label: which."""
    return GaussianMixture.ring().draw(n, rng)


TOYS: dict[str, Callable[[int, Rng], Points]] = {
    "moons": moons,
    "spirals": spirals,
    "swiss_roll": swiss_roll,
    "checkerboard": checkerboard,
    "mixture": mixture,
}


def _points(
    x: np.ndarray, y: np.ndarray, label: np.ndarray, classes: int, *, size: float, blur: float, rng: Rng
) -> Points:
    """The points (x, y)/size, moved by Gaussian noise of standard deviation `blur`."""
    sharp = np.stack([x, y], axis=1) / size
    return Points((sharp + blur * _normal(rng.at(2), sharp.shape)).astype(np.float32), label, classes)


def _integers(rng: Rng, below: int, n: int) -> np.ndarray:
    return backend.to_numpy(rng.integers(0, below, (n,)))


def _uniform(rng: Rng, n: int) -> np.ndarray:
    return backend.to_numpy(rng.uniform((n,), np.float64))


def _normal(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    return backend.to_numpy(rng.normal(shape, np.float64))


# ------------------------------------------------------------------------------------ exactly known


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """p(x) = sum_k w_k N(x; m_k, s² I): the data set on which a network can be held against the truth.

    means: m_k, (K, D) floats. std: s > 0. weights: w_k > 0, (K,), scaled to sum 1; by default all equal.
    Raises ValueError for other shapes, a std or weight that is not > 0, or means that are not finite.
    """

    means: np.ndarray
    std: float
    weights: np.ndarray = field(default_factory=lambda: np.ones(0))

    def __post_init__(self) -> None:
        means = np.asarray(self.means, np.float64)
        if means.ndim != 2 or not means.size or not np.isfinite(means).all():
            raise ValueError(f"means must be finite numbers (K, D), got shape {means.shape}")
        weights = np.asarray(self.weights, np.float64) if np.size(self.weights) else np.ones(len(means))
        if weights.shape != means.shape[:1] or not (weights > 0).all() or not self.std > 0:
            raise ValueError(
                f"a mixture of {len(means)} needs as many weights > 0 and a std > 0, got {weights} and {self.std}"
            )
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "weights", weights / weights.sum())

    @classmethod
    def ring(cls, K: int = 8, std: float = 0.2) -> Self:
        """K equal Gaussians around the origin, as far out as gives both coordinates the variance 1 (for K > 2)."""
        angle = 2 * np.pi * np.arange(K) / K
        return cls(np.sqrt(2 * (1 - std**2)) * np.stack([np.cos(angle), np.sin(angle)], axis=1), std)

    def draw(self, n: int, rng: Rng) -> Points:
        """Draw n points, labelled 0..K-1 by the Gaussian that each comes from."""
        label = np.searchsorted(np.cumsum(self.weights)[:-1], _uniform(rng.at(0), n), side="right")
        x = self.means[label] + self.std * _normal(rng.at(1), (n, self.means.shape[1]))
        return Points(x.astype(np.float32), label.astype(np.int64), len(self.means))

    def part(self, k: int) -> GaussianMixture:
        """The Gaussian k alone: p(x | y = k)."""
        return GaussianMixture(self.means[k : k + 1], self.std)

    def noised(self, alpha_bar: float) -> GaussianMixture:
        """The distribution of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, a mixture again (E4)."""
        std = (alpha_bar * self.std**2 + 1 - alpha_bar) ** 0.5
        return GaussianMixture(alpha_bar**0.5 * self.means, std, self.weights)

    def logits(self, x: Any) -> Any:
        """m_k·x/s² - |m_k|²/(2 s²) + log w_k, whose softmax is p(y = k | x): the best classifier there is.

        x: (B, D), an array or a Tensor. Returns (B, K).
        """
        bias = np.log(self.weights) - (self.means**2).sum(axis=1) / (2 * self.std**2)
        return x @ _beside(self.means.T / self.std**2, x) + _beside(bias, x)

    def log_density(self, x: Array) -> Array:
        """log p(x) in nats. x: (B, D). Returns (B,)."""
        logits, D = self.logits(x), self.means.shape[1]
        largest = logits.max(axis=1)
        library = backend.array_module(x)
        log_sum = largest + library.log(library.exp(logits - largest[:, None]).sum(axis=1))
        return log_sum - (x**2).sum(axis=1) / (2 * self.std**2) - D / 2 * math.log(2 * math.pi * self.std**2)

    def score(self, x: Array) -> Array:
        """grad log p(x) = sum_k p(y = k | x) (m_k - x)/s²: the way to where points are denser. x and result: (B, D)."""
        logits = self.logits(x)
        p = backend.array_module(x).exp(logits - logits.max(axis=1, keepdims=True))
        p = p / p.sum(axis=1, keepdims=True)
        return (p @ _beside(self.means, x) - x) / self.std**2

    def best_eps(self, x_t: Array, alpha_bar: float) -> Array:
        """E[eps | x_t] = -sqrt(1 - alpha_bar) grad log p(x_t): the network that no training can better.

        x_t: (B, D), noised as alpha_bar says. Returns (B, D). (E17; Song & Ermon 2019)
        """
        return -((1 - alpha_bar) ** 0.5) * self.noised(alpha_bar).score(x_t)


def _beside(table: np.ndarray, x: Any) -> Array:
    """A table of this mixture in x's dtype and on x's device. x: an array or a Tensor."""
    return backend.to_device(table.astype(x.dtype), backend.device_of(x if backend.is_array(x) else x.data))
