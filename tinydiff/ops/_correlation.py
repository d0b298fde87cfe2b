"""Two ways to turn the convolution of a few images into matrix products: windows in rows, and Winograd's.

Each works in buffers that stay in the cache and are used again for the next few images. conv.py asks of a way:

    kernel(weight)               the weight as this way wants it
    way(x, weight_shape, ...)    the buffers for a block of n images like x
    .correlate(images, kernel)   the convolution of the n images, written to `out`
    .gradient(images, g)         what the images and their outputs' gradient add to the gradient of the kernel
    weight_gradient(total)       the sum of those as the gradient of the weight
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array, array_module


def choose_way(
    x: Array, weight_shape: Any, size: Any, stride: int, spread: int, dilation: int = 1
) -> type[Windows] | type[Winograd]:
    """Winograd's way where it is the faster: 3 x 3, stride 1, in float32 on the CPU, with enough channels and tiles.

    Its kernel has four times the numbers: for a few tiles it is not worth making. float64 always goes the exact way.
    """
    kh, kw, C, Co = weight_shape
    fits = (kh, kw, stride, spread, dilation) == (3, 3, 1, 1, 1) and x.dtype == np.float32 and array_module(x) is np
    tiles = len(x) * -(-size[0] // 4) * -(-size[1] // 4)
    return Winograd if fits and min(C, Co) >= 16 and tiles >= 8 else Windows


class _Frame:
    """Zeros around n images, `spread` pixels between them, and `offset` above and to the left.

    Pixels that a negative offset puts outside are left out.
    """

    def __init__(self, x: Array, shape: tuple[int, int], offset: tuple[int, int], spread: int, n: int):
        H, W, C = x.shape[1:]
        self.pixels = array_module(x).zeros((n, *shape, C), x.dtype)
        self._top, self._left = (max(0, -(o // spread)) for o in offset)
        rows = slice(offset[0] + self._top * spread, max(0, offset[0] + (H - 1) * spread + 1), spread)
        columns = slice(offset[1] + self._left * spread, max(0, offset[1] + (W - 1) * spread + 1), spread)
        self._inside = self.pixels[:, rows, columns]

    def fill(self, images: Array) -> None:
        """Copy the images (n, H, W, C) into the frame."""
        h, w = self._inside.shape[1:3]
        self._inside[...] = images[:, self._top : self._top + h, self._left : self._left + w]


class Windows:
    """Each output pixel's window, the kh x kw x C inputs that it sees, `dilation` apart, becomes a row of a matrix."""

    def __init__(
        self, x: Array, weight_shape: Any, size: Any, stride: int, offset: Any, spread: int, dilation: int, n: int
    ):
        xp, (kh, kw, C, _), (H, W) = array_module(x), weight_shape, size
        self.n = n
        reach = ((H - 1) * stride + (kh - 1) * dilation + 1, (W - 1) * stride + (kw - 1) * dilation + 1)
        self._frame = _Frame(x, reach, offset, spread, n)
        sb, sy, sx, sc = self._frame.pixels.strides
        self._view = xp.lib.stride_tricks.as_strided(
            self._frame.pixels,
            (n, H, W, kh, kw, C),
            (sb, sy * stride, sx * stride, sy * dilation, sx * dilation, sc),
        )
        self._rows = xp.empty(self._view.shape, x.dtype)

    @staticmethod
    def bytes_per_image(weight_shape: Any, size: Any, itemsize: int) -> int:
        """The memory of the buffers for one image."""
        kh, kw, C, _ = weight_shape
        return size[0] * size[1] * kh * kw * C * itemsize

    @staticmethod
    def kernel(weight: Array) -> Array:
        """The weight as a matrix (kh kw C, C')."""
        return weight.reshape(-1, weight.shape[3])

    @staticmethod
    def weight_gradient(total: Array, weight_shape: Any) -> Array:
        """The matrix's gradient in the weight's shape."""
        return total.reshape(weight_shape)

    def correlate(self, images: Array, kernel: Array, out: Array) -> None:
        """The convolution of the block's images, written to out (n, H, W, C')."""
        backend.product(self._windows(images), kernel, out=out.reshape(-1, out.shape[3]))

    def gradient(self, images: Array, g: Array) -> Array:
        """What the images and their outputs' gradient g add to the gradient of the kernel."""
        return backend.product(self._windows(images).T, g.reshape(-1, g.shape[3]))

    def _windows(self, images: Array) -> Array:
        """The windows of the images: (n H W, kh kw C)."""
        self._frame.fill(images)
        self._rows[...] = self._view
        n, H, W, kh, kw, C = self._rows.shape
        return self._rows.reshape(n * H * W, kh * kw * C)


# F(4, 3) of Winograd (1980), after Lavin & Gray (2016): six products for four outputs of three taps, where the direct
# way takes twelve; along both axes, 36 and 144. Outputs and taps are the coefficients of polynomials, known by their
# values at 0, 1, -1, 2, -2, ∞.
_BT = np.array(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
     [0, 4, 0, -5, 0, 1]], np.float32,
)  # fmt: skip
_G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32) / np.float32(24)
_AT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)


class Winograd:
    """A 3 x 3 convolution of stride 1 with a quarter of the multiplications: y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ d B)] A.

    A tile of 4 x 4 neighbouring outputs y needs 6 x 6 inputs d. ⊙ multiplies entry by entry: for each of the 36 entries
    it is one matrix product over channels, in which all tiles are the rows. As the formula is linear in y, w and d
    alike, the gradient with respect to w is Gᵀ [(A g Aᵀ) ⊙ (Bᵀ d B)] G. Buffers have the entries' two axes first.
    """

    def __init__(
        self, x: Array, weight_shape: Any, size: Any, stride: int, offset: Any, spread: int, dilation: int, n: int
    ):
        (_, _, C, Co), (H, W) = weight_shape, size
        tiles = (n, -(-H // 4), -(-W // 4))
        self.n, self._N = n, math.prod(tiles)
        self._frame = _Frame(x, (4 * tiles[1] + 2, 4 * tiles[2] + 2), offset, spread, n)
        sb, sy, sx, sc = self._frame.pixels.strides
        self._view = np.lib.stride_tricks.as_strided(
            self._frame.pixels, (6, 6, *tiles, C), (sy, sx, sb, 4 * sy, 4 * sx, sc)
        )
        exact = (4 * tiles[1], 4 * tiles[2]) == (H, W)
        self._whole = None if exact else np.zeros((n, 4 * tiles[1], 4 * tiles[2], Co), x.dtype)
        self._memory = np.empty((3, 36 * self._N * max(C, Co)), x.dtype)

    @staticmethod
    def bytes_per_image(weight_shape: Any, size: Any, itemsize: int) -> int:
        """The memory of the two buffers for one image that a convolution keeps returning to."""
        (_, _, C, Co), (H, W) = weight_shape, size
        return 2 * 36 * -(-H // 4) * -(-W // 4) * max(C, Co) * itemsize

    @staticmethod
    def kernel(weight: Array) -> Array:
        """G w Gᵀ: (6, 6, C, C')."""
        return _both_axes(_G, np.ascontiguousarray(weight))

    @staticmethod
    def weight_gradient(total: Array, weight_shape: Any) -> Array:
        """Gᵀ times the sum over all blocks times G: the gradient of the weight."""
        return _both_axes(_G.T, total)

    def correlate(self, images: Array, kernel: Array, out: Array) -> None:
        """The convolution of the block's images, written to out (n, H, W, C')."""
        Co = out.shape[3]
        m = np.matmul(self._transformed(images), kernel, out=self._buffer(1, 6, 6, Co))
        y = _both_axes(_AT, m, self._buffer(0, 4, 6, Co), self._buffer(1, 4, 4, Co))
        tiles = _tiles(out if self._whole is None else self._whole)
        tiles[...] = y.reshape(tiles.shape)
        if self._whole is not None:
            out[...] = self._whole[:, : out.shape[1], : out.shape[2]]

    def gradient(self, images: Array, g: Array) -> Array:
        """What the images and their outputs' gradient g add to the gradient of the kernel."""
        _, H, W, Co = g.shape
        if self._whole is not None:
            self._whole[:, :H, :W] = g
            g = self._whole
        tiles, y = _tiles(g), self._buffer(0, 4, 4, Co)
        y.reshape(tiles.shape)[...] = tiles
        a_g = _both_axes(_AT.T, y, self._buffer(1, 6, 4, Co), self._buffer(2, 6, 6, Co))
        return np.matmul(self._transformed(images).swapaxes(2, 3), a_g)

    def _transformed(self, images: Array) -> Array:
        """Bᵀ d B for all tiles of the images: (6, 6, N, C)."""
        self._frame.fill(images)
        C = images.shape[3]
        d = self._buffer(0, 6, 6, C)
        d.reshape(self._view.shape)[...] = self._view
        return _both_axes(_BT, d, self._buffer(1, 6, 6, C), d)

    def _buffer(self, i: int, k: int, m: int, channels: int) -> Array:
        """The start of memory i as an array (k, m, N, channels)."""
        shape = (k, m, self._N, channels)
        return self._memory[i, : math.prod(shape)].reshape(shape)


def _both_axes(matrix: Array, x: Array, half: Array | None = None, out: Array | None = None) -> Array:
    """M x Mᵀ along the first two axes of x. half, out: where to write M x and the result, if not to new memory."""
    k, (n, m, *rest) = len(matrix), x.shape
    half = np.matmul(matrix, x.reshape(n, -1), out=None if half is None else half.reshape(k, -1))
    out = np.matmul(matrix, half.reshape(k, m, -1), out=None if out is None else out.reshape(k, k, -1))
    return out.reshape(k, k, *rest)


def _tiles(images: Array) -> Array:
    """Images of whole tiles (n, 4 h, 4 w, C) as a view (4, 4, n, h, w, C)."""
    n, H, W, C = images.shape
    return images.reshape(n, H // 4, 4, W // 4, 4, C).transpose(2, 4, 0, 1, 3, 5)


def blocks(way: Any, x: Array, start: int, stop: int, weight_shape: Any, size: Any, *geometry: Any) -> Any:
    """Cut the images start..stop into blocks that fit in the cache: yields (slice, buffers) for each."""
    most = backend.items_per_block(x, way.bytes_per_image(weight_shape, size, x.dtype.itemsize))
    block: Any = None
    for i in range(start, stop, most):
        n = min(most, stop - i)
        if block is None or block.n != n:
            block = way(x, weight_shape, size, *geometry, n)
        yield slice(i, i + n), block
