"""Dropout."""

from __future__ import annotations

from typing import Any

from tinydiff.autograd import op
from tinydiff.backend import Array
from tinydiff.rng import Rng


@op
def dropout(x: Array, *, p: float, rng: Rng) -> Any:
    """Zero each element with probability p, 0 <= p < 1, and divide the others by 1 − p (Srivastava et al. 2014)."""
    if not 0 <= p < 1:
        raise ValueError(f"the probability must be in [0, 1), got {p}")
    kept = (rng.uniform(x.shape, x.dtype) >= p) / x.dtype.type(1 - p)
    return x * kept, lambda g: g * kept
