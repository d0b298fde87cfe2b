"""Softmax, its logarithm, and attention."""

from __future__ import annotations

import math
from typing import Any

from tinydiff.autograd import Tensor, op
from tinydiff.backend import Array, array_module
from tinydiff.ops.elementwise import where
from tinydiff.ops.matmul import matmul


@op
def softmax(x: Array, *, axis: int = -1) -> Any:
    """e^x_i / Σ_j e^x_j along an axis; the largest x is subtracted first, so that nothing overflows."""
    xp = array_module(x)
    y = x - x.max(axis=axis, keepdims=True)
    xp.exp(y, out=y)
    y /= y.sum(axis=axis, keepdims=True)

    def vjp(g: Array) -> Array:
        gy = g * y
        gy -= y * gy.sum(axis=axis, keepdims=True)
        return gy

    return y, vjp


@op
def log_softmax(x: Array, *, axis: int = -1) -> Any:
    """x_i − log Σ_j e^x_j along an axis, without overflow."""
    xp = array_module(x)
    y = x - x.max(axis=axis, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return y, lambda g: g - xp.exp(y) * g.sum(axis=axis, keepdims=True)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Array | None = None) -> Tensor:
    """softmax(Q Kᵀ / √d) V (E27; Vaswani et al. 2017, eq. 1).

    q: (..., N, d), k: (..., M, d), v: (..., M, e); gives (..., N, e). mask: boolean, broadcast to (..., N, M); where
    it is False, the key has no influence on the query. A query must see at least one key.
    """
    scores = matmul(q * (1 / math.sqrt(q.shape[-1])), k.transpose(*range(k.ndim - 2), -1, -2))
    if mask is not None:
        scores = where(mask, scores, -1e30)
    return matmul(softmax(scores), v)
