"""Convolution, channels last: images (B, H, W, C), kernels (kh, kw, C, C'); sequences (B, L, C), kernels (k, C, C').

A convolution is a matrix product: each output pixel is one row, the kh x kw x C inputs that it sees (a "window")
times the kernel as a (kh kw C) x C' matrix. Laying out all windows of a batch would take kh kw times the images'
memory, so the work goes a few images at a time: their windows stay in the cache and are forgotten after the product.

The gradient with respect to the images is again such a convolution, of the output's gradient with the kernel turned
by 180° and its channels swapped; strided, its pixels are first spread apart with zeros. That is also what a
transposed convolution computes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from tinydiff import backend
from tinydiff.autograd import op
from tinydiff.backend import Array, array_module
from tinydiff.ops._correlation import blocks, choose_way


@op
def conv2d(x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0) -> Any:
    """y[b, i, j] = bias + Σ_uv x[b, s i + u − p, s j + v − p] · weight[u, v], zero outside the image.

    x: (B, H, W, C), weight: (kh, kw, C, C'), bias: (C',), or (B, C') to give each image its own, or None;
    stride s >= 1, padding p >= 0.
    Gives (B, H', W', C') with H' = (H + 2p − kh) // s + 1. Raises ValueError for shapes that do not fit.
    """
    kh, kw = weight.shape[:2]
    _check(x, weight, weight.shape[2], stride, padding)
    size = tuple((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[1:3], (kh, kw), strict=True))
    if min(size) < 1:
        raise ValueError(f"an image of {x.shape[1]} x {x.shape[2]} is too small for a kernel of {kh} x {kw}")
    y = _correlate(x, weight, bias, size, stride, (padding, padding))

    def vjp(g: Array) -> tuple[Any, ...]:
        gradients = (
            lambda: _correlate(g, _turned(weight), None, x.shape[1:3], 1, (kh - 1 - padding, kw - 1 - padding), stride),
            lambda: _weight_gradient(x, g, weight.shape, stride, (padding, padding)),
            lambda: _bias_gradient(g, bias),
        )
        return gradients if bias is not None else gradients[:2]

    return y, vjp


@op
def conv1d(x: Array, weight: Array, bias: Array | None = None, *, dilation: int = 1, padding: int = 0) -> Any:
    """y[b, i] = bias + Σ_u x[b, i + d u − p] · weight[u], zero outside the sequence.

    Taps d >= 1 apart, the dilation, see far with few weights: the sound of (k − 1) d + 1 samples. A sequence is taken
    as an image of height 1.
    x: (B, L, C), weight: (k, C, C'), bias: (C',), or (B, C') to give each sequence its own, or None; padding p >= 0.
    Gives (B, L', C') with L' = L + 2p − (k − 1) d. Raises ValueError for shapes that do not fit.
    (E38; van den Oord et al. 2016, section 2.1)
    """
    if x.ndim != 3 or weight.ndim != 3 or x.shape[2] != weight.shape[1]:
        raise ValueError(f"x must be (B, L, C) and the kernel (k, C, C'), got {x.shape} and {weight.shape}")
    if dilation < 1 or padding < 0:
        raise ValueError(f"dilation must be >= 1 and padding >= 0, got {dilation} and {padding}")
    reach = (len(weight) - 1) * dilation
    size = (1, x.shape[1] + 2 * padding - reach)
    if size[1] < 1:
        raise ValueError(f"a sequence of {x.shape[1]} is too short for a kernel that spans {reach + 1}")
    image, kernel = x[:, None], weight[None]
    y = _correlate(image, kernel, bias, size, 1, (0, padding), dilation=dilation)

    def vjp(g: Array) -> tuple[Any, ...]:
        g = g[:, None]
        shape, turned = image.shape[1:3], _turned(kernel)
        gradients = (
            lambda: _correlate(g, turned, None, shape, 1, (0, reach - padding), dilation=dilation)[:, 0],
            lambda: _weight_gradient(image, g, kernel.shape, 1, (0, padding), dilation)[0],
            lambda: _bias_gradient(g, bias),
        )
        return gradients if bias is not None else gradients[:2]

    return y[:, 0], vjp


@op
def conv_transpose2d(x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0) -> Any:
    """The convolution that conv2d's gradient is: each input pixel adds its multiple of the kernel to the output.

    x: (B, H, W, C), weight: (kh, kw, C', C), bias: (C',) or None. Gives (B, H', W', C') with
    H' = (H − 1) s + kh − 2p, so that conv2d with the same kernel maps the output's shape back to x's. Raises
    ValueError for shapes that do not fit.
    """
    kh, kw = weight.shape[:2]
    _check(x, weight, weight.shape[3], stride, padding)
    size = tuple((n - 1) * stride + k - 2 * padding for n, k in zip(x.shape[1:3], (kh, kw), strict=True))
    if min(size) < 1:
        raise ValueError(f"a padding of {padding} leaves nothing of the output")
    y = _correlate(x, _turned(weight), bias, size, 1, (kh - 1 - padding, kw - 1 - padding), stride)

    def vjp(g: Array) -> tuple[Any, ...]:
        gradients = (
            lambda: _correlate(g, weight, None, x.shape[1:3], stride, (padding, padding)),
            lambda: _weight_gradient(g, x, weight.shape, stride, (padding, padding)),
            lambda: _bias_gradient(g, bias),
        )
        return gradients if bias is not None else gradients[:2]

    return y, vjp


def _check(x: Array, weight: Array, channels: int, stride: int, padding: int) -> None:
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError("images must be (B, H, W, C) and the kernel have four axes")
    if x.shape[3] != channels:
        raise ValueError(f"the kernel takes {channels} channels, the images have {x.shape[3]}")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride must be >= 1 and padding >= 0, got {stride} and {padding}")


def _turned(weight: Array) -> Array:
    """The kernel turned by 180°, its input and output channels swapped."""
    return weight[::-1, ::-1].swapaxes(2, 3)


def _correlate(
    x: Array,
    weight: Array,
    bias: Array | None,
    size: Any,
    stride: int,
    offset: tuple[int, int],
    spread: int = 1,
    dilation: int = 1,
) -> Array:
    """The windows of x times the kernel, plus the bias: (B, *size, C')."""
    B, (kh, kw, C, Co) = len(x), weight.shape
    y = array_module(x, weight).empty((B, *size, Co), x.dtype)
    if kh == kw == stride == spread == 1 and offset == (0, 0):
        y = backend.matmul(x.reshape(-1, C), weight.reshape(C, Co)).reshape(y.shape)
        return y if bias is None else _add_bias(y, bias)

    way = choose_way(x, weight.shape, size, stride, spread, dilation)
    kernel = way.kernel(weight)

    def work(start: int, stop: int) -> None:
        for some, block in blocks(way, x, start, stop, weight.shape, size, stride, offset, spread, dilation):
            block.correlate(x[some], kernel, y[some])
            if bias is not None:
                _add_bias(y[some], bias if bias.ndim == 1 else bias[some])

    backend.parallel(work, B, backend.items_per_core(math.prod(size) * weight.size), on=x, pieces_per_core=4)
    return y


def _add_bias(y: Array, bias: Array) -> Array:
    """Add one bias (C',) to all images, or each image's own (B, C'), in place."""
    rows, C = backend.wide_pixels(y), y.shape[3]
    rows += backend.widened(bias.reshape(-1, 1, C), rows.shape[2])
    return y


def _bias_gradient(g: Array, bias: Array) -> Array:
    if bias.ndim == 1:
        return backend.sum_rows(g)
    pixels = g.reshape(len(g), -1, g.shape[-1])
    return backend.product(array_module(g).ones((1, pixels.shape[1]), g.dtype), pixels)[:, 0]


def _weight_gradient(
    x: Array, g: Array, shape: tuple[int, ...], stride: int, offset: tuple[int, int], dilation: int = 1
) -> Array:
    """Σ over images and pixels of (window of x) ⊗ (gradient of the output pixel), in the kernel's shape."""
    kh, kw, C, Co = shape
    if kh == kw == stride == 1 and offset == (0, 0):
        return backend.matmul_transposed(x.reshape(-1, C), g.reshape(-1, Co)).reshape(shape)

    way = choose_way(x, shape, g.shape[1:3], stride, 1, dilation)

    def work(start: int, stop: int) -> Array:
        total: Any = 0
        for some, block in blocks(way, x, start, stop, shape, g.shape[1:3], stride, offset, 1, dilation):
            total += block.gradient(x[some], g[some])
        return total

    grain = backend.items_per_core(math.prod(g.shape[1:3]) * math.prod(shape))
    total = functools.reduce(lambda a, b: a + b, backend.parallel(work, len(x), grain, on=x, pieces_per_core=2))
    return way.weight_gradient(total, shape)
