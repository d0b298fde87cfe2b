"""Linear: a matrix product along the last axis."""

from __future__ import annotations

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.nn.init import constant, fan_in_normal
from tinydiff.nn.module import Module
from tinydiff.rng import Rng


class Linear(Module):
    """y = x W + b for x (..., inputs): (..., outputs).

    W is drawn from N(0, scale²/inputs), or is zero when `zero`, so that a residual branch starts as nothing; b is zero.
    """

    def __init__(
        self, inputs: int, outputs: int, rng: Rng, *, bias: bool = True, zero: bool = False, scale: float = 1.0
    ):
        self.weight = fan_in_normal((inputs, outputs), inputs, rng, 0.0 if zero else scale)
        self.bias = constant(0, outputs, rng.device) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias) if self.bias is not None else ops.linear(x, self.weight)
