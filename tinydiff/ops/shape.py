"""Ops that rearrange: reshape, transpose, concatenate, pad, change the resolution of an image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tinydiff.autograd import Tensor, op
from tinydiff.backend import Array, array_module


@op
def _reshape(x: Array, *, shape: tuple[int, ...]) -> Any:
    return x.reshape(shape), lambda g: g.reshape(x.shape)


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """x with another shape; one length may be -1. Raises ValueError if the number of elements does not fit."""
    return _reshape(x, shape=tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape)


@op
def _transpose(x: Array, *, axes: tuple[int, ...]) -> Any:
    back = tuple(axes.index(i) for i in range(len(axes)))
    return x.transpose(axes), lambda g: g.transpose(back)


def transpose(x: Tensor, *axes: int) -> Tensor:
    """x with its axes in this order; without arguments, in reverse order."""
    return _transpose(x, axes=tuple(a % x.ndim for a in axes) if axes else tuple(reversed(range(x.ndim))))


@op
def broadcast_to(x: Array, *, shape: tuple[int, ...]) -> Any:
    """x repeated along new axes and axes of length 1 to this shape, as a read-only view."""
    return array_module(x).broadcast_to(x, shape), lambda g: g


@op
def _concat(*arrays: Array, axis: int) -> Any:
    ends = list(itertools.accumulate(a.shape[axis] for a in arrays))

    def vjp(g: Array) -> tuple[Array, ...]:
        last = g.swapaxes(axis, -1)
        pieces = (last[..., e - a.shape[axis] : e] for e, a in zip(ends, arrays, strict=True))
        return tuple(piece.swapaxes(axis, -1) for piece in pieces)

    return array_module(*arrays).concatenate(arrays, axis), vjp


def concat(tensors: Sequence[Tensor], axis: int = -1) -> Tensor:
    """The tensors joined along an axis; their other axes must agree."""
    return _concat(*tensors, axis=axis)


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape joined along a new axis."""
    at = axis % (tensors[0].ndim + 1)
    return concat([t.reshape(*t.shape[:at], 1, *t.shape[at:]) for t in tensors], at)


@op
def pad(x: Array, *, widths: tuple[tuple[int, int], ...]) -> Any:
    """x with zeros added: widths gives (before, after) for each axis."""
    inside = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    return array_module(x).pad(x, widths), lambda g: g[inside]


@op
def upsample_nearest(x: Array, *, factor: int = 2) -> Any:
    """Repeat each pixel: (B, H, W, C) -> (B, f H, f W, C)."""
    B, H, W, C = x.shape
    xp, blocks = array_module(x), (B, H, factor, W, factor, C)
    y = xp.empty(blocks, x.dtype)
    y[...] = x[:, :, None, :, None, :]
    return y.reshape(B, H * factor, W * factor, C), lambda g: _sum_blocks(g.reshape(blocks))


@op
def downsample_average(x: Array, *, factor: int = 2) -> Any:
    """Average f x f pixels: (B, H, W, C) -> (B, H/f, W/f, C). Raises ValueError unless f divides H and W."""
    B, H, W, C = x.shape
    if H % factor or W % factor:
        raise ValueError(f"the factor {factor} must divide the image's height and width {H} x {W}")
    xp, blocks = array_module(x), (B, H // factor, factor, W // factor, factor, C)

    def vjp(g: Array) -> Array:
        dx = xp.empty(blocks, g.dtype)
        dx[...] = g[:, :, None, :, None, :] / factor**2
        return dx.reshape(x.shape)

    return _sum_blocks(x.reshape(blocks)) / factor**2, vjp


def _sum_blocks(x: Array) -> Array:
    """(B, H, f, W, f, C) -> (B, H, W, C), adding the f x f pixels of each block as whole images."""
    total = x[:, :, 0, :, 0] * 1
    for i, j in itertools.product(range(x.shape[2]), range(x.shape[4])):
        if (i, j) != (0, 0):
            total += x[:, :, i, :, j]
    return total


@op
def space_to_depth(x: Array, *, factor: int = 2) -> Any:
    """Turn f x f pixels into one with f² times the channels: (B, H, W, C) -> (B, H/f, W/f, f² C).

    Raises ValueError unless f divides H and W. depth_to_space undoes it.
    """
    return _to_depth(x, factor), lambda g: _to_space(g, factor)


@op
def depth_to_space(x: Array, *, factor: int = 2) -> Any:
    """Turn channels into f x f pixels: (B, H, W, f² C) -> (B, f H, f W, C). Raises ValueError unless f² divides C."""
    return _to_space(x, factor), lambda g: _to_depth(g, factor)


def _to_depth(x: Array, f: int) -> Array:
    B, H, W, C = x.shape
    if H % f or W % f:
        raise ValueError(f"the factor {f} must divide the image's height and width {H} x {W}")
    return x.reshape(B, H // f, f, W // f, f, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, H // f, W // f, f * f * C)


def _to_space(x: Array, f: int) -> Array:
    B, H, W, C = x.shape
    if C % f**2:
        raise ValueError(f"the factor squared, {f**2}, must divide the number of channels {C}")
    return x.reshape(B, H, W, f, f, C // f**2).transpose(0, 1, 3, 2, 4, 5).reshape(B, H * f, W * f, C // f**2)
