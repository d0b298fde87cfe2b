"""Optimisers: SGD, Adam and AdamW, the schedule of their learning rate, and a moving average of the weights.

An optimiser lays all parameters out in one vector, of which each parameter is then a view. Its update is one
elementwise formula over that vector, in place: one pass through memory for a model of any number of layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tinydiff.backend import Array, array_module, device_of, to_device, to_numpy
from tinydiff.formula import elementwise
from tinydiff.nn.module import Parameter


class Optimiser:
    """What all optimisers share: the vector of parameters, and the step.

    parameters: from Module.parameters(); all of one dtype, on one device. Their data become views of `vector`, matrices
    and kernels first, then vectors (biases and scales, which weight decay spares). Moving or converting the model
    afterwards would cut it off: do that before. Raises ValueError for no parameters or mixed dtypes.
    """

    def __init__(self, parameters: Mapping[str, Parameter]):
        if len({p.dtype for p in parameters.values()}) != 1:
            raise ValueError("an optimiser needs parameters, all of one dtype")
        self.parameters = dict(sorted(parameters.items(), key=lambda item: item[1].ndim < 2))
        first = next(iter(self.parameters.values()))
        self._xp = array_module(first.data)
        self.vector = self._xp.concatenate([p.data.reshape(-1) for p in self.parameters.values()])
        self.gradient = self._xp.zeros_like(self.vector)
        self.matrices = sum(p.size for p in self.parameters.values() if p.ndim >= 2)
        self.count = 0
        self._point_parameters()

    def _point_parameters(self) -> None:
        """Make each parameter a view of its piece of the vector."""
        self._views = [piece.reshape(p.shape) for p, piece in self.pieces(self.vector)]
        for p, view in zip(self.parameters.values(), self._views, strict=True):
            p.data = view

    def move_to(self, memory: Array) -> None:
        """Lay the parameters out in another vector, such as memory that several processes see."""
        memory[...] = self.vector
        self.vector = memory
        self._point_parameters()

    def pieces(self, vector: Array) -> Iterator[tuple[Parameter, Array]]:
        """Each parameter with its piece of a vector laid out as the parameters are."""
        start = 0
        for p in self.parameters.values():
            yield p, vector[start : start + p.size]
            start += p.size

    def step(self, lr: float, max_norm: float = math.inf) -> float:
        """Update the parameters once from their gradients, then forget the gradients.

        lr: the learning rate; max_norm: if the gradient's norm over all parameters is larger, it is scaled down to this
        (Pascanu et al. 2013). Returns the norm before. Raises FloatingPointError, with weights and memory as they were,
        if it is not finite, naming the first parameter whose gradient is not; RuntimeError if a parameter was cut off.
        """
        self._check_views()
        self.gather()
        return self.step_along_gradient(lr, max_norm)

    def gather(self) -> None:
        """Copy the parameters' gradients into the vector `gradient`, then forget them."""
        for p, piece in self.pieces(self.gradient):
            piece[...] = 0 if p.grad is None else p.grad.reshape(-1)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Leave the parameters without gradients."""
        for p in self.parameters.values():
            p.grad = None

    def step_along_gradient(self, lr: float, max_norm: float = math.inf) -> float:
        """The step that `step` takes, from what `gather` left in `gradient`."""
        self._check_views()
        norm = float(self.gradient @ self.gradient) ** 0.5
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient of {self._first_bad()} is not finite")
        self.count += 1
        self._update(lr, min(1.0, max_norm / norm) if norm else 1.0)
        for p in self.parameters.values():
            p.mark_changed()
        return norm

    def _check_views(self) -> None:
        for (name, p), view in zip(self.parameters.items(), self._views, strict=True):
            if p.data is not view:
                raise RuntimeError(
                    f"{name} was moved, converted, replaced or given to another optimiser since this one was made; "
                    "make the optimiser afterwards"
                )

    def _first_bad(self) -> str:
        for name, (_, piece) in zip(self.parameters, self.pieces(self.gradient), strict=True):
            if not bool(self._xp.isfinite(piece).all()):
                return name
        return "all parameters together (its square overflows)"

    def _update(self, lr: float, scale: float) -> None:
        """Change `vector` in place by a step of rate lr along `gradient` times scale."""
        raise NotImplementedError

    def _memory(self) -> dict[str, Array]:
        """The vectors that it remembers between steps, by name."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, np.ndarray]:
        """What the optimiser remembers between steps, on the host."""
        return _state(self.count, self._memory())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what state_dict gave. Raises ValueError, with nothing changed, if it is of another optimiser or model."""
        self.count = _load(state, self._memory())


class SGD(Optimiser):
    """Gradient descent with momentum: u ← μ u + g, θ ← θ − lr u."""

    def __init__(self, parameters: Mapping[str, Parameter], *, momentum: float = 0.0):
        super().__init__(parameters)
        self.momentum, self.velocity = momentum, self._xp.zeros_like(self.vector)

    def _update(self, lr: float, scale: float) -> None:
        arrays = self.vector, self.velocity
        _sgd(*arrays, self.gradient, lr, scale, self.momentum, out=arrays)

    def _memory(self) -> dict[str, Array]:
        return {"velocity": self.velocity}


class Adam(Optimiser):
    """Adam (Kingma & Ba 2015): m ← β₁ m + (1−β₁) g, v ← β₂ v + (1−β₂) g², θ ← θ − lr m̂ / (√v̂ + ε).

    m̂ = m/(1−β₁ⁿ) and v̂ = v/(1−β₂ⁿ) undo the start from zero; n counts the steps.
    """

    weight_decay = 0.0

    def __init__(
        self, parameters: Mapping[str, Parameter], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        super().__init__(parameters)
        self.betas, self.eps = betas, eps
        self.m, self.v = self._xp.zeros_like(self.vector), self._xp.zeros_like(self.vector)

    def _update(self, lr: float, scale: float) -> None:
        if self.weight_decay:
            self.vector[: self.matrices] *= 1 - lr * self.weight_decay
        beta1, beta2 = self.betas
        arrays = self.vector, self.m, self.v
        rate, root = lr / (1 - beta1**self.count), (1 - beta2**self.count) ** 0.5
        numbers = scale, beta1, 1 - beta1, beta2, 1 - beta2, rate * root, self.eps * root
        _adam(*arrays, self.gradient, *numbers, out=arrays)

    def _memory(self) -> dict[str, Array]:
        return {"m": self.m, "v": self.v}


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): first θ ← θ − lr λ θ, for matrices and kernels."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(parameters, betas=betas, eps=eps)
        self.weight_decay = weight_decay


# These work in place: on a large model each pass through memory counts.


@elementwise
def _sgd(xp: Any, theta: Array, u: Array, g: Array, lr: float, scale: float, momentum: float) -> Any:
    u *= momentum
    u += scale * g
    theta -= lr * u
    return theta, u


@elementwise
def _adam(
    xp: Any,
    theta: Array,
    m: Array,
    v: Array,
    g: Array,
    scale: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    rate: float,
    eps: float,
) -> Any:
    g = scale * g
    m *= beta1
    m += rest1 * g
    v *= beta2
    g *= g
    g *= rest2
    v += g
    change = xp.sqrt(v)
    change += eps
    change = m / change
    change *= rate
    theta -= change
    return theta, m, v


def _state(count: int, memory: Mapping[str, Array]) -> dict[str, np.ndarray]:
    return {"count": np.asarray(count), **{name: to_numpy(x).copy() for name, x in memory.items()}}


def _load(state: Mapping[str, Any], memory: Mapping[str, Array]) -> int:
    """Write a state into the vectors of its names, if all of them fit, and return its count."""
    wanted = {"count": (), **{name: x.shape for name, x in memory.items()}}
    found = {name: state[name].shape if name in state else "nothing" for name in wanted}
    if found != wanted:
        raise ValueError(f"the state is of another optimiser or model: expected {wanted}, got {found}")
    for name, x in memory.items():
        x[...] = to_device(state[name], device_of(x))
    return int(state["count"])


def warmup_cosine(step: int, steps: int, peak: float, warmup: int = 0, final: float = 0.0) -> float:
    """The learning rate of step 1..steps: a straight rise to `peak` over `warmup` steps, then half a cosine to `final`.

    Raises ValueError for a step outside 1..steps.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"the step must be in 1..{steps}, got {step}")
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


class EMA:
    """An exponential moving average of the weights, which samples better than the weights themselves.

    average ← d average + (1 − d) θ, with d = min(decay, (1 + n)/(10 + n)) at the n-th update, so that the random start
    is soon forgotten. Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, optimiser: Optimiser, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay must be in [0, 1), got {decay}")
        self.optimiser, self.decay, self.count = optimiser, decay, 0
        self.average = optimiser.vector.copy()

    def update(self) -> None:
        """Take in the weights as they are now."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        _move_towards(self.average, self.optimiser.vector, 1 - decay, out=self.average)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model's parameters are the averages."""
        own = self.optimiser.vector.copy()
        self.optimiser.vector[...] = self.average
        try:
            yield
        finally:
            self.optimiser.vector[...] = own

    def state_dict(self) -> dict[str, np.ndarray]:
        """The average and the number of updates, on the host."""
        return _state(self.count, {"average": self.average})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what state_dict gave. Raises ValueError, with nothing changed, if it is of another model."""
        self.count = _load(state, {"average": self.average})


@elementwise
def _move_towards(xp: Any, a: Array, b: Array, fraction: float) -> Array:
    change = b - a
    change *= fraction
    a += change
    return a
