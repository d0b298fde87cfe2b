"""Normalisation: GroupNorm, with SiLU in the same pass if asked, and LayerNorm.

Both compute x̂ = (x − mean) / √(variance + eps) over a set of elements and then x̂ γ + β. The work goes a few images at
a time, so that the passes over an image find it in the cache. Sums over pixels are products with a row of ones, which
run at the matrix product's speed, and f neighbouring pixels are taken as one wide pixel, since NumPy is slow at
multiplying short rows by a common row; gamma, beta and the means are repeated to its width.
"""

from __future__ import annotations

import functools
from typing import Any

from tinydiff.autograd import op
from tinydiff.backend import Array, array_module, each_block, product, wide_pixels, widened
from tinydiff.formula import elementwise


@op
def group_norm(x: Array, gamma: Array, beta: Array, *, groups: int, eps: float = 1e-5, silu: bool = False) -> Any:
    """GroupNorm (Wu & He 2018): each image's channels are normalised in groups, over all its pixels.

    x: (B, ..., C), gamma and beta: (C,), `groups` divides C; gives x's shape, or SiLU of it when `silu`.
    Raises ValueError for shapes that do not fit.
    """
    C = x.shape[-1]
    if C % groups or gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"{groups} groups must divide the {C} channels, and gamma and beta be ({C},)")
    xp, images = array_module(x), wide_pixels(x)
    gamma, beta = (widened(v, images.shape[2]) for v in (gamma, beta))
    y, moments = xp.empty_like(images), xp.empty((2, len(x), 1, images.shape[2]), x.dtype)

    def work(block: slice) -> None:
        moments[0, block], moments[1, block] = mean, rstd = _moments(images[block], C, groups, eps)
        scale = rstd * gamma
        (_affine_silu if silu else _affine)(images[block], scale, beta - mean * scale, out=y[block])

    each_block(work, len(x), images[0].nbytes, on=x)
    return y.reshape(x.shape), lambda g: _group_norm_vjp(g, x, gamma, beta, moments, groups, silu)


def _group_norm_vjp(g: Array, x: Array, gamma: Array, beta: Array, moments: Array, groups: int, silu: bool) -> Any:
    """dx = (h − mean(h) − x̂ mean(h x̂)) / √(variance + eps) with h = γ dz, means over the group, z = x̂ γ + β."""
    xp, C, images, g_images = array_module(x), x.shape[-1], wide_pixels(x), wide_pixels(g)
    dx, width = xp.empty_like(images), images.shape[2]

    def work(block: slice) -> Array:
        x_block, dz, (mean, rstd) = images[block], g_images[block], moments[:, block]
        scale = rstd * gamma
        if silu:
            dz = _affine_silu_vjp(dz, x_block, scale, beta - mean * scale)
        dz_mean, dz_x_mean = _pixel_mean(dz), _pixel_mean(_times_centred(dz, x_block, mean)) * rstd
        h_mean, h_x_mean = (_group_mean(v * gamma, C, groups) for v in (dz_mean, dz_x_mean))
        slope = -(rstd**2) * h_x_mean
        _combined(dz, x_block, scale, slope, -rstd * h_mean - mean * slope, out=dx[block])
        return xp.stack([dz_x_mean.sum(axis=(0, 1)), dz_mean.sum(axis=(0, 1))])

    d_affine = sum(each_block(work, len(x), images[0].nbytes, on=x), start=xp.zeros((2, width), x.dtype))
    d_gamma, d_beta = d_affine.reshape(2, width // C, C).sum(axis=1) * images.shape[1]
    return dx.reshape(x.shape), d_gamma, d_beta


def _moments(images: Array, channels: int, groups: int, eps: float) -> tuple[Array, Array]:
    """Each image's and channel's mean and 1/√(variance + eps) over its group: two arrays (n, 1, f C)."""
    mean = _group_mean(_pixel_mean(images), channels, groups)
    variance = _group_mean(_pixel_mean(_centred_square(images, mean)), channels, groups)
    return mean, 1 / array_module(images).sqrt(variance + eps)


# SiLU is made of an exponential, as a hyperbolic tangent takes NumPy twice as long without AVX-512; where e^−z is
# infinite, one over it is 0, as it should be.


@elementwise
def _affine(xp: Any, x: Array, scale: Array, shift: Array) -> Array:
    z = x * scale
    z += shift
    return z


@elementwise
def _affine_silu(xp: Any, x: Array, scale: Array, shift: Array) -> Array:
    """z / (1 + e^−z)."""
    z = x * scale
    z += shift
    e = xp.exp(-z)
    e += 1.0
    z /= e
    return z


@elementwise
def _affine_silu_vjp(xp: Any, g: Array, x: Array, scale: Array, shift: Array) -> Array:
    """g d(z s)/dz = g s (1 + z − z s) with s = 1 / (1 + e^−z)."""
    z = x * scale
    z += shift
    s = xp.exp(-z)
    s += 1.0
    s = 1.0 / s
    slope = z * s
    z -= slope
    z += 1.0
    z *= s
    z *= g
    return z


@elementwise
def _centred_square(xp: Any, x: Array, mean: Array) -> Array:
    centred = x - mean
    centred *= centred
    return centred


@elementwise
def _times_centred(xp: Any, g: Array, x: Array, mean: Array) -> Array:
    centred = x - mean
    centred *= g
    return centred


@elementwise
def _combined(xp: Any, g: Array, x: Array, a: Array, b: Array, c: Array) -> Array:
    y = g * a
    y += x * b
    y += c
    return y


def _pixel_mean(images: Array) -> Array:
    """The mean over wide pixels, as a product with a row of ones: (n, N/f, f C) -> (n, 1, f C)."""
    rows = images.shape[1]
    return product(array_module(images).full((1, rows), 1 / rows, images.dtype), images)


def _group_mean(x: Array, channels: int, groups: int) -> Array:
    """Replace each channel of (n, 1, f C) by the mean over its group and its neighbours."""
    members = _members(array_module(x), x.shape[2], channels, groups, x.dtype)
    return product(product(x, members), members.T * (groups / x.shape[2]))


@functools.cache  # for ever: a CUDA graph goes on to read it
def _members(xp: Any, width: int, channels: int, groups: int, dtype: Any) -> Array:
    """Which group each channel of a wide pixel belongs to, as ones in a matrix (f C, groups)."""
    group = xp.arange(width) % channels // (channels // groups)
    return (group[:, None] == xp.arange(groups)).astype(dtype)


@op
def layer_norm(x: Array, gamma: Array, beta: Array, *, eps: float = 1e-5) -> Any:
    """LayerNorm (Ba et al. 2016): normalise each vector along the last axis. x: (..., C), gamma and beta: (C,)."""
    C = x.shape[-1]
    if gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"gamma and beta must be ({C},)")
    xp, rows = array_module(x), x.reshape(-1, C)
    y, (mean, rstd) = xp.empty(rows.shape, x.dtype), xp.empty((2, len(rows), 1), x.dtype)
    average = xp.full((C, 1), 1 / C, x.dtype)  # a product with it is the mean of each row

    def work(block: slice) -> None:
        mean[block] = product(rows[block], average)
        z = xp.subtract(rows[block], mean[block], out=y[block])
        rstd[block] = 1 / xp.sqrt(product(z * z, average) + eps)
        z *= rstd[block]
        z *= gamma
        z += beta

    each_block(work, len(rows), 2 * C * x.itemsize, on=x)
    return y.reshape(x.shape), lambda g: _layer_norm_vjp(g.reshape(-1, C), x, gamma, mean, rstd)


def _layer_norm_vjp(g: Array, x: Array, gamma: Array, mean: Array, rstd: Array) -> Any:
    """dx = (h − mean(h) − x̂ mean(h x̂)) / √(variance + eps) with h = g γ; dγ = Σ g x̂ and dβ = Σ g over all rows."""
    xp, C, rows = array_module(x), x.shape[-1], x.reshape(g.shape)
    dx, average_h = xp.empty(g.shape, x.dtype), (gamma / C)[:, None]  # g @ average_h is the mean of h

    def work(block: slice) -> Array:
        g_block, x_hat = g[block], xp.subtract(rows[block], mean[block])
        x_hat *= rstd[block]
        g_x = g_block * x_hat
        h = xp.multiply(g_block, gamma, out=dx[block])
        h -= product(g_block, average_h)
        x_hat *= product(g_x, average_h)
        h -= x_hat
        h *= rstd[block]
        ones = xp.ones((1, len(h)), x.dtype)
        return xp.concatenate([product(ones, g_x), product(ones, g_block)])

    d_affine = sum(each_block(work, len(g), 4 * C * x.itemsize, on=x), start=xp.zeros((2, C), x.dtype))
    return dx.reshape(x.shape), d_affine[0], d_affine[1]
