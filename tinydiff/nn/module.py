"""Module: a layer that holds parameters and other modules, and names them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from tinydiff.autograd import Tensor
from tinydiff.backend import Array, to_device


class Parameter(Tensor):
    """A tensor that is trained: a leaf with requires_grad=True."""

    __slots__ = ()

    def __init__(self, data: Any):
        super().__init__(data, requires_grad=True)


class Module:
    """A layer. Its parameters are the Parameters among its attributes, then those of the Modules among them.

    Each item of a list or tuple counts as an attribute, so that `model.levels[1].conv.weight` has the name
    "levels.1.conv.weight". A subclass defines __init__, which makes the attributes, and __call__, which uses them.
    """

    training = True

    def children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly inside this one, with their names."""
        return ((name, value) for name, value in _named(vars(self)) if isinstance(value, Module))

    def parameters(self) -> dict[str, Parameter]:
        """All parameters by name, in a fixed order."""
        own = {name: value for name, value in _named(vars(self)) if isinstance(value, Parameter)}
        for name, child in self.children():
            own |= {f"{name}.{rest}": p for rest, p in child.parameters().items()}
        return own

    def count_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.size for p in self.parameters().values())

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of all parameters on the host, by name."""
        return {name: p.numpy().copy() for name, p in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Set all parameters by name, in place, keeping each one's dtype and device.

        Raises ValueError, and changes nothing, if a name is missing or unknown or a shape differs.
        """
        parameters = self.parameters()
        problems = [f"missing {name}" for name in parameters if name not in state]
        problems += [f"unknown {name}" for name in state if name not in parameters]
        problems += [
            f"{name} is {p.shape} here and {state[name].shape} there"
            for name, p in parameters.items()
            if name in state and state[name].shape != p.shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"the state is of another model: {'; '.join(problems[:5])}{more}")
        for name, p in parameters.items():
            p[...] = to_device(state[name], p.device)

    def train(self, mode: bool = True) -> Self:
        """Switch this module and all inside it to training; returns the module."""
        self.training = mode
        for _, child in self.children():
            child.train(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation, which turns dropout off; returns the module."""
        return self.train(False)

    def to(self, target: str | type | np.dtype) -> Self:
        """Move all parameters to a device ("cpu", "cuda", "auto"), or convert them to a dtype; returns the module."""
        for p in self.parameters().values():
            p.data = to_device(p.data, target) if isinstance(target, str) else p.data.astype(target, copy=False)
            p.grad = None
        return self

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters().values():
            p.grad = None


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values by name, and in place of a list or tuple its items."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            yield from _named({f"{name}.{i}": item for i, item in enumerate(value)})
        else:
            yield name, value
