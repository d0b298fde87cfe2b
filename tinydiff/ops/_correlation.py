"""Two ways to turn the convolution of a few images into matrix products: windows in rows, and Winograd's.

Each works in buffers that stay in the cache and are used again for the next few images. conv.py asks of a way:

    kernel(weight)               the weight as this way wants it
    way(x, weight_shape, ...)    the buffers for a block of n images like x
    .correlate(images, kernel)   the convolution of the n images, written to `out`
    .gradient(images, g)         what the images and their outputs' gradient add to the gradient of the kernel
    weight_gradient(total)       the sum of those as the gradient of the weight
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array, array_module


def choose_way(x: Array, weight_shape: Any, stride: int, spread: int) -> type[Windows] | type[Winograd]:
    """Winograd's way where it is the faster: 3 x 3, stride 1, channels enough, on the CPU; exact float64 never."""
    kh, kw, C, Co = weight_shape
    fits = (kh, kw, stride, spread) == (3, 3, 1, 1) and min(C, Co) >= 16
    return Winograd if fits and x.dtype == np.float32 and array_module(x) is np else Windows


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
    """Each output pixel's window, the kh x kw x C inputs that it sees, becomes a row of a matrix."""

    def __init__(self, x: Array, weight_shape: Any, size: Any, stride: int, offset: Any, spread: int, n: int):
        xp, (kh, kw, C, _), (H, W) = array_module(x), weight_shape, size
        self.n = n
        self._frame = _Frame(x, ((H - 1) * stride + kh, (W - 1) * stride + kw), offset, spread, n)
        sb, sy, sx, sc = self._frame.pixels.strides
        self._view = xp.lib.stride_tricks.as_strided(
            self._frame.pixels, (n, H, W, kh, kw, C), (sb, sy * stride, sx * stride, sy, sx, sc)
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
        array_module(images).matmul(self._windows(images), kernel, out=out.reshape(-1, out.shape[3]))

    def gradient(self, images: Array, g: Array) -> Array:
        """What the images and their outputs' gradient g add to the gradient of the kernel."""
        return self._windows(images).T @ g.reshape(-1, g.shape[3])

    def _windows(self, images: Array) -> Array:
        """The windows of the images: (n H W, kh kw C)."""
        self._frame.fill(images)
        self._rows[...] = self._view
        n, H, W, kh, kw, C = self._rows.shape
        return self._rows.reshape(n * H * W, kh * kw * C)


# F(4, 3) of Winograd (1980), after Lavin & Gray (2016): six products for four outputs of three taps, where the direct
# way takes twelve. Outputs and taps are the coefficients of polynomials, known by their values at 0, 1, -1, 2, -2, ∞.
_BT = np.array(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
     [0, 4, 0, -5, 0, 1]], np.float32,
)  # fmt: skip
_G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32) / np.float32(24)
_AT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)


class Winograd:
    """A 3 x 3 convolution of stride 1 with half the multiplications: y = Aᵀ [(G w) ⊙ (Bᵀ d)] along the rows of pixels.

    Four neighbouring outputs y need six inputs d: a tile. ⊙ multiplies entry by entry, for each of the six a matrix
    product over channels; the kernel's three rows are three such products, added up. As the formula is linear in y, w
    and d alike, the gradient with respect to w is Gᵀ [(A g) ⊙ (Bᵀ d)]. Buffers have the six entries first, then rows
    of pixels, so that all tiles a row of the kernel meets are one matrix.
    """

    def __init__(self, x: Array, weight_shape: Any, size: Any, stride: int, offset: Any, spread: int, n: int):
        (_, _, C, Co), (H, W) = weight_shape, size
        self.n, self._size, tiles = n, size, -(-W // 4)
        self._frame = _Frame(x, (H + 2, 4 * tiles + 2), offset, spread, n)
        sb, sy, sx, sc = self._frame.pixels.strides
        self._view = np.lib.stride_tricks.as_strided(
            self._frame.pixels, (6, H + 2, n, tiles, C), (sx, sy, sb, 4 * sx, sc)
        )
        self._d, self._bt_d = np.empty((2, *self._view.shape), x.dtype)
        self._products = np.empty((2, 6, H * n * tiles, Co), x.dtype)
        self._y = np.zeros((4, H, n, tiles, Co), x.dtype)

    @staticmethod
    def bytes_per_image(weight_shape: Any, size: Any, itemsize: int) -> int:
        """The memory of the buffers for one image."""
        (_, _, C, Co), (H, W) = weight_shape, size
        return 6 * -(-W // 4) * (2 * C * (H + 2) + 2 * Co * H) * itemsize

    @staticmethod
    def kernel(weight: Array) -> Array:
        """G w for each row of the kernel: (3, 6, C, C')."""
        _, _, C, Co = weight.shape
        return np.matmul(_G, weight.reshape(3, 3, C * Co)).reshape(3, 6, C, Co)

    @staticmethod
    def weight_gradient(total: Array, weight_shape: Any) -> Array:
        """Gᵀ times the sum over all blocks: the gradient of the weight."""
        return np.matmul(_G.T, total.reshape(3, 6, -1)).reshape(weight_shape)

    def correlate(self, images: Array, kernel: Array, out: Array) -> None:
        """The convolution of the block's images, written to out (n, H, W, C')."""
        total, product = self._products
        for u, tiles in enumerate(self._transformed(images)):
            np.matmul(tiles, kernel[u], out=product if u else total)
            total += product if u else 0
        np.matmul(_AT, total.reshape(6, -1), out=self._y.reshape(4, -1))
        for pixels, y in self._columns(out):
            pixels[...] = y

    def gradient(self, images: Array, g: Array) -> Array:
        """What the images and their outputs' gradient g add to the gradient of the kernel."""
        for pixels, y in self._columns(g):
            y[...] = pixels
        a_g = np.matmul(_AT.T, self._y.reshape(4, -1)).reshape(6, -1, g.shape[3])
        return np.stack([tiles.swapaxes(1, 2) @ a_g for tiles in self._transformed(images)])

    def _transformed(self, images: Array) -> list[Array]:
        """Bᵀ d for the tiles that each row of the kernel meets: three arrays (6, H n tiles, C)."""
        self._frame.fill(images)
        self._d[...] = self._view
        np.matmul(_BT, self._d.reshape(6, -1), out=self._bt_d.reshape(6, -1))
        H, C = self._size[0], self._d.shape[4]
        return [self._bt_d[:, u : u + H].reshape(6, -1, C) for u in range(3)]

    def _columns(self, images: Array) -> list[tuple[Array, Array]]:
        """Every fourth column of pixels of (n, H, W, C') images, beside its place in y, for each of the four."""
        each = [images[:, :, c::4].swapaxes(0, 1) for c in range(4)]
        return [(pixels, self._y[c, :, :, : pixels.shape[2]]) for c, pixels in enumerate(each)]


def blocks(way: Any, x: Array, start: int, stop: int, weight_shape: Any, size: Any, *geometry: Any) -> Any:
    """Cut the images start..stop into blocks that fit in the cache: yields (slice, buffers) for each."""
    most = backend.items_per_block(x, way.bytes_per_image(weight_shape, size, x.dtype.itemsize))
    block: Any = None
    for i in range(start, stop, most):
        n = min(most, stop - i)
        if block is None or block.n != n:
            block = way(x, weight_shape, size, *geometry, n)
        yield slice(i, i + n), block
