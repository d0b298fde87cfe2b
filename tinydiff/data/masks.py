"""Masks for inpainting: 1 where an image is known, 0 where it is to be painted."""

from __future__ import annotations

import numpy as np

from tinydiff.backend import to_numpy
from tinydiff.rng import Rng

PARTS = ("left", "right", "top", "bottom", "centre", "all")
"""The parts of an image that `without` can hide."""

SHARES = {"rectangle": 0.3, "half": 0.3, "strokes": 0.3, "all": 0.1}
"""How often `random_masks` draws a mask of each kind."""

STROKES = 4


def without(part: str, size: tuple[int, int]) -> np.ndarray:
    """The mask that hides one part: a half of the image, the middle (half its height and width), or all of it.

    part: a name in PARTS. size: height and width. Returns bool (H, W), False where hidden.
    Raises ValueError for another part.
    """
    if part not in PARTS:
        raise ValueError(f"the part to hide must be one of {', '.join(PARTS)}, got {part!r}")
    y, x = _coordinates(size)
    inside = {
        "left": x < 0,
        "right": x > 0,
        "top": y < 0,
        "bottom": y > 0,
        "centre": (abs(x) < 0.25) & (abs(y) < 0.25),
        "all": np.ones_like(x * y, bool),
    }
    return np.broadcast_to(~inside[part], size)


def random_masks(rng: Rng, n: int, size: tuple[int, int]) -> np.ndarray:
    """n masks to train on, each of a kind drawn by SHARES.

    rectangle: hidden inside it, or outside, its sides 0.2 to 0.8 of the image's; half: one side of a line near the
    middle, in any direction; strokes: hidden under some thick lines; all: nothing is known, as when sampling freely.
    Returns float32 (n, H, W, 1) of 0 and 1, on the host. (E36; GLIDE, Nichol et al. 2022, section 2.4)
    """
    y, x = _coordinates(size)
    kind = np.searchsorted(np.cumsum(list(SHARES.values())), _uniform(rng.at(0), n).reshape(n), side="right")
    hidden = np.stack(
        [
            _rectangles(_uniform(rng.at(1), n, 5), y, x),
            _halves(_uniform(rng.at(2), n, 2), y, x),
            _strokes(_uniform(rng.at(3), n, 4 * STROKES + 1), y, x),
            np.ones((n, *size), bool),
        ]
    )
    chosen = hidden[np.minimum(kind, len(hidden) - 1), np.arange(n)]  # the shares may add up to a little less than 1
    return (~chosen).astype(np.float32)[..., None]


def _rectangles(u: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """u: (5, n, 1, 1) in [0, 1): the centre, the sides, and whether the inside or the outside is hidden."""
    high, wide = 0.1 + 0.3 * u[2], 0.1 + 0.3 * u[3]
    inside = (abs(y - u[0] + 0.5) < high) & (abs(x - u[1] + 0.5) < wide)
    return inside ^ (u[4] < 0.5)


def _halves(u: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """u: (2, n, 1, 1) in [0, 1): the line's direction, and its distance from the middle, up to 0.15."""
    angle = 2 * np.pi * u[0]
    return y * np.sin(angle) + x * np.cos(angle) > 0.3 * u[1] - 0.15


def _strokes(u: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """u: (4 STROKES + 1, n, 1, 1) in [0, 1): the strokes' ends, anywhere, and their thickness."""
    width = 0.03 + 0.07 * u[-1]
    hidden = np.zeros(np.broadcast_shapes(u[0].shape, y.shape, x.shape), bool)
    for y_0, x_0, y_1, x_1 in (u[:-1] - 0.5).reshape(STROKES, 4, *u.shape[1:]):
        dy, dx = y_1 - y_0, x_1 - x_0
        along = ((y - y_0) * dy + (x - x_0) * dx) / (dy**2 + dx**2 + 1e-12)
        along = along.clip(0, 1)  # the nearest point of the stroke, from its one end to its other
        hidden |= (y - y_0 - along * dy) ** 2 + (x - x_0 - along * dx) ** 2 < width**2
    return hidden


def _coordinates(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels' centres lie, (H, 1) down and (1, W) across, the image being the square from -1/2 to 1/2."""
    y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in size)
    return y[:, None], x[None, :]


def _uniform(rng: Rng, n: int, draws: int = 1) -> np.ndarray:
    """Draws from U[0, 1), on the host: (draws, n, 1, 1), to go with the pixels."""
    return to_numpy(rng.uniform((n, draws), np.float64)).T[:, :, None, None]
