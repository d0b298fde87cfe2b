"""Ops that sum over axes: sum, mean, variance, and the largest element."""

from __future__ import annotations

import math
from typing import Any

from tinydiff.autograd import Tensor, op
from tinydiff.backend import Array, array_module

Axes = int | tuple[int, ...] | None


@op
def _sum(x: Array, *, axis: Axes, keepdims: bool) -> Any:
    xp, kept = array_module(x), _kept_shape(x.shape, axis)
    return x.sum(axis=axis, keepdims=keepdims), lambda g: xp.broadcast_to(g.reshape(kept), x.shape)


@op
def _mean(x: Array, *, axis: Axes, keepdims: bool) -> Any:
    xp, kept = array_module(x), _kept_shape(x.shape, axis)
    count = x.size // (math.prod(kept) or 1)
    return x.mean(axis=axis, keepdims=keepdims), lambda g: xp.broadcast_to(g.reshape(kept) / count, x.shape)


@op
def _max(x: Array, *, axis: Axes, keepdims: bool) -> Any:
    y = x.max(axis=axis, keepdims=True)

    def vjp(g: Array) -> Array:
        first = x == y
        return first * (g.reshape(y.shape) / first.sum(axis=axis, keepdims=True))

    return y if keepdims else y.reshape(x.max(axis=axis).shape), vjp


def sum(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The sum of x over an axis, several, or all; `keepdims` leaves them in place with length 1."""
    return _sum(x, axis=axis, keepdims=keepdims)


def mean(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The mean of x over an axis, several, or all."""
    return _mean(x, axis=axis, keepdims=keepdims)


def max(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The largest element over an axis, several, or all; equal ones share the gradient."""
    return _max(x, axis=axis, keepdims=keepdims)


def variance(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The mean squared deviation from the mean over an axis, several, or all (divided by N, not N − 1)."""
    deviation = x - mean(x, axis, keepdims=True)
    return mean(deviation * deviation, axis, keepdims)


def _kept_shape(shape: tuple[int, ...], axis: Axes) -> tuple[int, ...]:
    """The shape with the axes summed over left in place with length 1."""
    summed = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    gone = {a % len(shape) for a in summed} if shape else set()
    return tuple(1 if i in gone else n for i, n in enumerate(shape))
