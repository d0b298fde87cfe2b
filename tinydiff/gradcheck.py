"""Compare a gradient with finite differences along one random direction: the cost does not grow with the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff.autograd import Tensor, no_grad
from tinydiff.rng import Rng


def gradcheck(function: Callable[..., Tensor], *arrays: Any, rng: Rng, step: float = 1e-5) -> float:
    """The relative error of backward's derivative of u·f(x) along a random direction v.

    Backward gives the vector-Jacobian product uᵀJ; (uᵀJ) v is compared with the central difference of fourth order
    (8 [φ(h) − φ(−h)] − [φ(2h) − φ(−2h)]) / 12h of φ(h) = u·f(x + h v).

    arrays: the function's arguments, float64; the function gives a Tensor of any shape, and must be smooth within 2
    steps of them. Returns the absolute difference over the larger of the two magnitudes and of 1e-3 times the scale
    of the terms summed. Raises TypeError for arrays that are not float64.
    """
    if any(a.dtype != np.float64 for a in arrays):
        raise TypeError(f"gradcheck needs float64 arrays, got {[str(a.dtype) for a in arrays]}")
    directions = [rng.at(1, i).normal_like(a) for i, a in enumerate(arrays)]
    inputs = [Tensor(a.copy(), requires_grad=True) for a in arrays]
    value = function(*inputs)
    u = rng.at(0).normal_like(value.data)
    value.backward(u)
    terms = [(t.grad * v) for t, v in zip(inputs, directions, strict=True) if t.grad is not None]
    exact = float(sum(float(term.sum()) for term in terms))

    def phi(h: float) -> float:
        with no_grad():
            moved = [Tensor(a + h * v) for a, v in zip(arrays, directions, strict=True)]
            return float((u * function(*moved).data).sum())

    numeric = (8 * (phi(step) - phi(-step)) - (phi(2 * step) - phi(-2 * step))) / (12 * step)
    scale = sum(float((term**2).sum()) for term in terms) ** 0.5
    return abs(exact - numeric) / max(abs(exact), abs(numeric), 1e-3 * scale, 1e-12)
