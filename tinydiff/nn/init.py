"""How weights start."""

from __future__ import annotations

import numpy as np

from tinydiff.backend import to_device
from tinydiff.nn.module import Parameter
from tinydiff.rng import Rng


def fan_in_normal(shape: tuple[int, ...], fan_in: int, rng: Rng, scale: float = 1.0) -> Parameter:
    """Weights drawn from N(0, scale²/fan_in): the outputs vary `scale` times as much as the inputs (LeCun et al. 1998).

    fan_in: how many inputs each output sums. A scale of 0 gives zeros.
    """
    return Parameter(rng.normal(shape, std=scale * fan_in**-0.5))


def constant(value: float, length: int, device: str | None = None) -> Parameter:
    """A vector of one value: biases and shifts start at 0, scales at 1. device: by default the one in use."""
    return Parameter(to_device(np.full(length, value, np.float32), device))
