"""Convolution layers, channels last: of images and of sequences; changes of resolution."""

from __future__ import annotations

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.nn.init import constant, fan_in_normal
from tinydiff.nn.module import Module
from tinydiff.rng import Rng


class Conv2d(Module):
    """A k x k convolution of images (B, H, W, inputs): (B, H', W', outputs).

    The padding is (k - 1) // 2 unless given, which keeps the size for odd k and stride 1. `zero` starts the kernel at
    zero. A call may add a bias of each image's own, (B, outputs): where a time embedding enters.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rng: Rng,
        *,
        kernel: int = 3,
        stride: int = 1,
        padding: int | None = None,
        zero: bool = False,
    ):
        self.stride, self.padding = stride, (kernel - 1) // 2 if padding is None else padding
        self.weight = fan_in_normal((kernel, kernel, inputs, outputs), kernel * kernel * inputs, rng, float(not zero))
        self.bias = constant(0, outputs, rng.device)

    def __call__(self, x: Tensor, image_bias: Tensor | None = None) -> Tensor:
        bias = self.bias if image_bias is None else self.bias + image_bias
        return ops.conv2d(x, self.weight, bias, stride=self.stride, padding=self.padding)


class Conv1d(Module):
    """A convolution of sequences (B, L, inputs), its k taps `dilation` apart: (B, L, outputs) (E38).

    Zeros around the sequence keep its length; each output sees as far to both sides, so k must be odd. `zero` starts
    the kernel at zero. A call may add a bias of each sequence's own, (B, outputs). Raises ValueError for an even k.
    """

    def __init__(self, inputs: int, outputs: int, rng: Rng, *, kernel: int = 3, dilation: int = 1, zero: bool = False):
        if kernel % 2 == 0:
            raise ValueError(f"a kernel that sees as far to both sides has an odd number of taps, got {kernel}")
        self.dilation, self.padding = dilation, (kernel - 1) // 2 * dilation
        self.weight = fan_in_normal((kernel, inputs, outputs), kernel * inputs, rng, float(not zero))
        self.bias = constant(0, outputs, rng.device)

    def __call__(self, x: Tensor, sequence_bias: Tensor | None = None) -> Tensor:
        bias = self.bias if sequence_bias is None else self.bias + sequence_bias
        return ops.conv1d(x, self.weight, bias, dilation=self.dilation, padding=self.padding)


class Downsample(Module):
    """Halve the resolution by a 3 x 3 convolution with stride 2; an odd height or width is rounded up."""

    def __init__(self, channels: int, rng: Rng):
        self.conv = Conv2d(channels, channels, rng, stride=2)

    def __call__(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(Module):
    """Double the resolution: repeat each pixel, then smooth with a 3 x 3 convolution."""

    def __init__(self, channels: int, rng: Rng):
        self.conv = Conv2d(channels, channels, rng)

    def __call__(self, x: Tensor) -> Tensor:
        return self.conv(ops.upsample_nearest(x))
