"""Normalisation: GroupNorm, with SiLU in the same pass if asked, and LayerNorm.

Both compute x̂ = (x − mean) / √(variance + eps) over a set of elements and then x̂ γ + β. The work goes a few images at
a time, so that the passes over an image find it in the cache; sums over pixels are products with a row of ones, which
run at the matrix product's speed.
"""

from __future__ import annotations

import functools
from typing import Any

from tinydiff import backend
from tinydiff.autograd import op
from tinydiff.backend import Array, array_module


@op
def group_norm(x: Array, gamma: Array, beta: Array, *, groups: int, eps: float = 1e-5, silu: bool = False) -> Any:
    """GroupNorm (Wu & He 2018): each image's channels are normalised in groups, over all its pixels.

    x: (B, ..., C), gamma and beta: (C,), `groups` divides C; gives x's shape, or SiLU of it when `silu`.
    Raises ValueError for shapes that do not fit.
    """
    C = x.shape[-1]
    if C % groups or gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"{groups} groups must divide the {C} channels, and gamma and beta be ({C},)")
    xp, images = array_module(x), x.reshape(len(x), -1, C)
    y, moments = xp.empty_like(images), xp.empty((2, len(x), 1, C), x.dtype)
    n = backend.items_per_block(x, 2 * images[0].nbytes)

    def work(start: int, stop: int) -> None:
        for i in range(start, stop, n):
            block = slice(i, min(i + n, stop))
            moments[:, block] = mean, rstd = _moments(images[block], groups, eps)
            scale = rstd * gamma
            z = xp.multiply(images[block], scale, out=y[block])
            z += beta - mean * scale
            if silu:
                _silu(z)

    backend.parallel(work, len(x), on=x)
    return y.reshape(x.shape), lambda g: _group_norm_vjp(g, x, gamma, beta, moments, groups, silu)


def _moments(images: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """Each image's and channel's mean and 1/√(variance + eps) over its group: two arrays (n, 1, C)."""
    mean = _group_mean(_pixel_mean(images), groups)
    centred = images - mean
    centred *= centred
    variance = _group_mean(_pixel_mean(centred), groups)
    return mean, 1 / array_module(images).sqrt(variance + eps)


def _pixel_mean(images: Array) -> Array:
    """(n, pixels, C) -> (n, 1, C)."""
    pixels = images.shape[1]
    return array_module(images).full((1, pixels), 1 / pixels, images.dtype) @ images


def _group_mean(x: Array, groups: int) -> Array:
    """Replace each channel of (n, 1, C) by the mean over its group."""
    n, _, C = x.shape
    means = x.reshape(n, 1, groups, -1).mean(axis=-1, keepdims=True)
    return array_module(x).broadcast_to(means, (n, 1, groups, C // groups)).reshape(n, 1, C)


def _silu(z: Array) -> None:
    """Replace z by z sigmoid(z) = z/2 (1 + tanh(z/2)), in place."""
    z *= 0.5
    z += z * array_module(z).tanh(z)


def _group_norm_vjp(g: Array, x: Array, gamma: Array, beta: Array, moments: Array, groups: int, silu: bool) -> Any:
    """dx = (h − mean(h) − x̂ mean(h x̂)) / √(variance + eps) with h = γ dz, means over the group, z = x̂ γ + β."""
    xp, images, g_images = (
        array_module(x),
        x.reshape(len(x), -1, x.shape[-1]),
        g.reshape(len(x), -1, x.shape[-1]),
    )
    dx = xp.empty_like(images)
    n = backend.items_per_block(x, 4 * images[0].nbytes)

    def work(start: int, stop: int) -> Array:
        d_affine = xp.zeros((2, x.shape[-1]), x.dtype)
        for i in range(start, stop, n):
            block = slice(i, min(i + n, stop))
            mean, rstd = moments[:, block]
            x_hat = xp.subtract(images[block], mean, out=dx[block])
            x_hat *= rstd
            dz = _silu_vjp(g_images[block], x_hat * gamma + beta) if silu else g_images[block]
            dz_mean, dz_x_mean = _pixel_mean(dz), _pixel_mean(dz * x_hat)
            d_affine += xp.concatenate([dz_x_mean, dz_mean], axis=1).sum(axis=0)
            x_hat *= -rstd * _group_mean(dz_x_mean * gamma, groups)
            x_hat -= rstd * _group_mean(dz_mean * gamma, groups)
            x_hat += dz * (rstd * gamma)
        return d_affine * images.shape[1]

    d_gamma, d_beta = functools.reduce(lambda a, b: a + b, backend.parallel(work, len(x), on=x))
    return dx.reshape(x.shape), d_gamma, d_beta


def _silu_vjp(g: Array, z: Array) -> Array:
    """g σ (1 + z (1 − σ)), writing over z; σ = sigmoid(z) = (1 + tanh(z/2))/2."""
    s = 0.5 * z
    array_module(z).tanh(s, out=s)
    s *= 0.5
    s += 0.5
    z -= z * s
    z += 1
    z *= s
    z *= g
    return z


@op
def layer_norm(x: Array, gamma: Array, beta: Array, *, eps: float = 1e-5) -> Any:
    """LayerNorm (Ba et al. 2016): normalise each vector along the last axis. x: (..., C), gamma and beta: (C,)."""
    C = x.shape[-1]
    if gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"gamma and beta must be ({C},)")
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = 1 / array_module(x).sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    x_hat = centred * rstd

    def vjp(g: Array) -> Any:
        h = g * gamma
        dx = rstd * (h - h.mean(axis=-1, keepdims=True) - x_hat * (h * x_hat).mean(axis=-1, keepdims=True))
        return dx, (lambda: backend.sum_rows(g * x_hat)), (lambda: backend.sum_rows(g))

    return x_hat * gamma + beta, vjp
