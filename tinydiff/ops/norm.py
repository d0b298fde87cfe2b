"""Normalisation: GroupNorm, with SiLU in the same pass if asked, and LayerNorm.

Both compute x̂ = (x − mean) / √(variance + eps) over a set of elements and then x̂ γ + β. The work goes a few images at
a time, so that the passes over an image find it in the cache. Sums over pixels are products with a row of ones, which
run at the matrix product's speed, and a few neighbouring pixels are taken as one wide pixel, since NumPy is slow at
multiplying short rows by a common row.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.autograd import op
from tinydiff.backend import Array, array_module
from tinydiff.ops._blocks import each_block


@op
def group_norm(x: Array, gamma: Array, beta: Array, *, groups: int, eps: float = 1e-5, silu: bool = False) -> Any:
    """GroupNorm (Wu & He 2018): each image's channels are normalised in groups, over all its pixels.

    x: (B, ..., C), gamma and beta: (C,), `groups` divides C; gives x's shape, or SiLU of it when `silu`.
    Raises ValueError for shapes that do not fit.
    """
    C = x.shape[-1]
    if C % groups or gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"{groups} groups must divide the {C} channels, and gamma and beta be ({C},)")
    xp, images = array_module(x), _wide_pixels(x)
    y, moments = xp.empty_like(images), xp.empty((2, len(x), C), x.dtype)

    def work(start: int, stop: int) -> None:
        for block in _blocks(images, start, stop):
            moments[0, block], moments[1, block] = mean, rstd = _moments(images[block], groups, C, eps)
            scale = rstd * gamma
            z = _affine(images[block], scale, beta - mean * scale, out=y[block], factor=-1 if silu else 1)
            if silu:  # z is −z here: z sigmoid(z) = −z / (−1 − e^−z)
                z /= xp.subtract(-1, _exp(z))

    backend.parallel(work, len(x), _grain(images), on=x)
    return y.reshape(x.shape), lambda g: _group_norm_vjp(g, x, gamma, beta, moments, groups, silu)


def _group_norm_vjp(g: Array, x: Array, gamma: Array, beta: Array, moments: Array, groups: int, silu: bool) -> Any:
    """dx = (h − mean(h) − x̂ mean(h x̂)) / √(variance + eps) with h = γ dz, means over the group, z = x̂ γ + β."""
    xp, C, images, g_images = array_module(x), x.shape[-1], _wide_pixels(x), _wide_pixels(g)
    dx, pixels = xp.empty_like(images), x[0].size // C

    def work(start: int, stop: int) -> Array:
        d_affine = xp.zeros((2, C), x.dtype)
        for block in _blocks(images, start, stop):
            mean, rstd = moments[:, block]
            centred = xp.subtract(images[block], _spread(mean, images), out=dx[block])
            dz = g_images[block]
            if silu:
                dz = _silu_vjp(dz, _affine(centred, rstd * gamma, xp.broadcast_to(beta, mean.shape), factor=-1))
            dz_mean, dz_x_mean = _pixel_mean(dz, C), _pixel_mean(dz * centred, C) * rstd
            d_affine += xp.stack([dz_x_mean.sum(axis=0), dz_mean.sum(axis=0)])
            _affine(
                centred,
                -(rstd**2) * _group_mean(dz_x_mean * gamma, groups),
                -rstd * _group_mean(dz_mean * gamma, groups),
                out=centred,
            )
            centred += dz * _spread(rstd * gamma, images)
        return d_affine * pixels

    d_gamma, d_beta = functools.reduce(lambda a, b: a + b, backend.parallel(work, len(x), _grain(images), on=x))
    return dx.reshape(x.shape), d_gamma, d_beta


def _silu_vjp(g: Array, minus_z: Array) -> Array:
    """g d(z s)/dz = g s (1 + z − z s) with s = sigmoid(z) = 1 / (1 + e^−z)."""
    xp, s = array_module(g), _exp(minus_z)
    s += 1
    xp.divide(1, s, out=s)
    slope = minus_z * s
    slope -= minus_z
    slope += 1
    slope *= s
    slope *= g
    return slope


def _exp(x: Array) -> Array:
    """e^x, and infinity without a warning where that is too large, as one over it is 0 then.

    SiLU is made of it rather than of a hyperbolic tangent, which takes NumPy twice as long without AVX-512.
    """
    with np.errstate(over="ignore"):
        return array_module(x).exp(x)


def _wide_pixels(x: Array) -> Array:
    """(B, ..., C) -> (B, N/f, f C) for the N pixels of each image, f a power of two that makes rows of about 256."""
    B, C = len(x), x.shape[-1]
    pixels, f = x[0].size // C, 1
    while pixels % (2 * f) == 0 and 2 * f * C <= 256:
        f *= 2
    return x.reshape(B, pixels // f, f * C)


def _spread(coefficients: Array, images: Array) -> Array:
    """A number for each image and channel (n, C), repeated for the neighbours in a wide pixel: (n, 1, f C)."""
    f = images.shape[2] // coefficients.shape[1]
    return array_module(images).tile(coefficients, (1, f))[:, None, :]


def _affine(images: Array, scale: Array, shift: Array, out: Array | None = None, factor: float = 1) -> Array:
    """factor (images scale + shift), with scale and shift (n, C)."""
    out = array_module(images).multiply(images, _spread(scale * factor, images), out=out)
    out += _spread(shift * factor, images)
    return out


def _blocks(images: Array, start: int, stop: int) -> list[slice]:
    """Runs of images that stay in the cache together; all at once on a CUDA device."""
    n = backend.items_per_block(images, images[0].nbytes)
    return [slice(i, min(i + n, stop)) for i in range(start, stop, n)]


def _grain(images: Array) -> int:
    """How many images make it worth having a second thread."""
    return max(1, backend.BLOCK // images[0].size)


def _moments(images: Array, groups: int, channels: int, eps: float) -> tuple[Array, Array]:
    """Each image's and channel's mean and 1/√(variance + eps) over its group: two arrays (n, C)."""
    mean = _group_mean(_pixel_mean(images, channels), groups)
    centred = images - _spread(mean, images)
    centred *= centred
    variance = _group_mean(_pixel_mean(centred, channels), groups)
    return mean, 1 / array_module(images).sqrt(variance + eps)


def _pixel_mean(images: Array, channels: int) -> Array:
    """Wide pixels (n, N/f, f C) -> (n, C)."""
    n, rows, width = images.shape
    means = array_module(images).full((1, rows), 1 / rows, images.dtype) @ images
    return means.reshape(n, width // channels, channels).mean(axis=1)


def _group_mean(x: Array, groups: int) -> Array:
    """Replace each channel of (n, C) by the mean over its group."""
    n, C = x.shape
    means = x.reshape(n, groups, C // groups).mean(axis=2)
    return array_module(x).repeat(means, C // groups, axis=1)


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
        mean[block] = rows[block] @ average
        z = xp.subtract(rows[block], mean[block], out=y[block])
        rstd[block] = 1 / xp.sqrt((z * z) @ average + eps)
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
        h -= g_block @ average_h
        x_hat *= g_x @ average_h
        h -= x_hat
        h *= rstd[block]
        ones = xp.ones((1, len(h)), x.dtype)
        return xp.concatenate([ones @ g_x, ones @ g_block])

    d_affine = sum(each_block(work, len(g), 4 * C * x.itemsize, on=x), start=xp.zeros((2, C), x.dtype))
    return dx.reshape(x.shape), d_affine[0], d_affine[1]
