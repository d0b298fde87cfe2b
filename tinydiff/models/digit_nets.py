"""The two small networks that GAN and VAE are made of: from an image to numbers, and from numbers to an image."""

from __future__ import annotations

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.nn import Conv2d, GroupNorm, Linear, Module
from tinydiff.rng import Rng


class DigitEncoder(Module):
    """Three convolutions on patches of 2 x 2 pixels: images (B, size, size, 1) -> (B, outputs).

    The last two halve the image. width: channels of the first; the others have twice and four times as many. Raises
    ValueError unless 4 divides size.
    """

    def __init__(self, size: int, outputs: int, width: int, rng: Rng):
        check_size(size)
        widths = (4, width, 2 * width, 4 * width)
        self.convs = [Conv2d(widths[i], widths[i + 1], rng, stride=1 if i == 0 else 2) for i in range(3)]
        last = -(-size // 8)  # each stride rounds up
        self.out = Linear(last * last * widths[-1], outputs, rng)

    def __call__(self, x: Tensor) -> Tensor:
        h = ops.space_to_depth(x)
        for conv in self.convs:
            h = ops.silu(conv(h))
        return self.out(h.reshape(len(h), -1))


class DigitDecoder(Module):
    """The way back, to images in [-1, 1]: z (B, inputs) -> (B, size, size, 1).

    A linear layer makes size/4 x size/4 pixels of 2 width channels; channels are then turned into pixels twice.
    Raises ValueError unless 4 divides size and 8 the width.
    """

    def __init__(self, size: int, inputs: int, width: int, rng: Rng):
        check_size(size)
        self.shape = (size // 4, size // 4, 2 * width)
        self.first = Linear(inputs, size // 4 * (size // 4) * 2 * width, rng)
        self.norm1 = GroupNorm(2 * width, 8, silu=True)
        self.up = Conv2d(2 * width, 4 * width, rng)
        self.norm2 = GroupNorm(width, 8, silu=True)
        self.smooth = Conv2d(width, width, rng)
        self.norm3 = GroupNorm(width, 8, silu=True)
        self.out = Conv2d(width, 4, rng)

    def __call__(self, z: Tensor) -> Tensor:
        h = self.norm1(self.first(z).reshape(len(z), *self.shape))
        h = self.norm2(ops.depth_to_space(self.up(h)))
        h = self.norm3(self.smooth(h))
        return ops.tanh(ops.depth_to_space(self.out(h)))


def check_size(size: int) -> None:
    """Raise ValueError unless images of this height and width can be halved twice."""
    if size < 4 or size % 4:
        raise ValueError(f"the images' height and width must be a multiple of 4, got {size}")
