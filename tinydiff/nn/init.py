"""How weights start."""

from __future__ import annotations

import numpy as np

from tinydiff.backend import to_device
from tinydiff.nn.module import Parameter
from tinydiff.rng import Rng


def fan_in_normal(shape: tuple[int, ...], fan_in: int, rng: Rng, zero: bool = False) -> Parameter:
    """Weights drawn from N(0, 1/fan_in), which keeps the variance of what passes through (LeCun et al. 1998), or zeros.

    fan_in: how many inputs each output sums.
    """
    scale = 0.0 if zero else fan_in**-0.5
    return Parameter(rng.normal(shape) * scale)


def constant(value: float, length: int, device: str | None = None) -> Parameter:
    """A vector of one value: biases and shifts start at 0, scales at 1. device: by default the one in use."""
    return Parameter(to_device(np.full(length, value, np.float32), device))
