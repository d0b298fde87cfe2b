"""Normalisation layers with a learned scale gamma (starts at 1) and shift beta (starts at 0)."""

from __future__ import annotations

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.nn.init import constant
from tinydiff.nn.module import Module


class GroupNorm(Module):
    """GroupNorm of (B, ..., channels) in `groups` groups, followed by SiLU in the same pass when `silu`.

    Raises ValueError unless the groups divide the channels.
    """

    def __init__(self, channels: int, groups: int, *, silu: bool = False):
        if channels % groups:
            raise ValueError(f"the number of groups must divide the number of channels, got {groups} and {channels}")
        self.groups, self.silu = groups, silu
        self.gamma = constant(1, channels)
        self.beta = constant(0, channels)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.gamma, self.beta, groups=self.groups, silu=self.silu)


class LayerNorm(Module):
    """LayerNorm of (..., channels) along the last axis."""

    def __init__(self, channels: int):
        self.gamma = constant(1, channels)
        self.beta = constant(0, channels)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.gamma, self.beta)
