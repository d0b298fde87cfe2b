"""A case: one op on arrays of one shape, beside a slow and plain formula for what it should give.

Each test module of this folder has a table of cases and two tests, of the values and of the gradients, that are the
same for all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend, ops
from tinydiff.gradcheck import gradcheck

TOLERANCE = {np.float64: 1e-13, np.float32: 2e-6}  # of the largest element; times Case.terms for long sums


@dataclass(frozen=True)
class Case:
    """One op, on which arrays, and what it should give.

    op: its name in tinydiff.ops. inputs: for each argument the shape of an array of random numbers from `domain`, or
    an array of whole numbers or truth values, which is handed over as it is. reference: what to compute from the NumPy
    arrays. settings: the op's keyword arguments. call: how to call the op, where its arguments are not just tensors.
    kinks: points around which no random number falls, as no finite difference can be taken across them. terms: how many
    rounding errors add up, about. draws: whether the op draws random numbers, others in float32 than in float64.
    """

    op: str
    inputs: tuple[Any, ...]
    reference: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Tensor] = lambda op, *args, **settings: op(*args, **settings)
    domain: tuple[float, float] = (-2.0, 2.0)
    kinks: tuple[float, ...] = ()
    terms: float = 1.0
    draws: bool = False

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, i)) if isinstance(i, tuple) else str(i.dtype) for i in self.inputs)
        settings = "_".join(f"{k}={v}" for k, v in self.settings.items() if isinstance(v, (int, float, bool, tuple)))
        return f"{self.op}-{shapes or 'scalar'}" + f"-{settings}" * bool(settings)

    def arrays(self, dtype: type) -> list[np.ndarray]:
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        return [i if isinstance(i, np.ndarray) else self._draw(rng, i).astype(dtype) for i in self.inputs]

    def _draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.uniform(*self.domain, shape)
        for kink in self.kinks:
            near = np.abs(x - kink) < 0.01
            x[near] += 0.02
        return x

    def apply(self, *args: Any) -> Tensor:
        settings = {k: backend.to_device(v) if isinstance(v, np.ndarray) else v for k, v in self.settings.items()}
        return self.call(getattr(ops, self.op), *args, **settings)


def each(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


def check_values(case: Case) -> None:
    """The op gives the reference's values, shape and dtype, in both precisions, and leaves its inputs alone."""
    for dtype in (np.float64, np.float32):
        arrays = case.arrays(dtype)
        tensors = [Tensor(backend.to_device(a)) for a in arrays]
        expected = np.asarray(case.reference(*(a.astype(np.float64) if a.dtype == dtype else a for a in arrays)))
        assert_close(case.apply(*tensors), expected.astype(dtype), rtol=TOLERANCE[dtype] * case.terms)
        for tensor, array in zip(tensors, case.arrays(dtype), strict=True):
            assert_close(tensor, array)


def check_gradients(case: Case) -> None:
    """The gradient is the finite difference's; arrays with gaps in memory change nothing, nor does float32 beyond its
    rounding, and gradients have their argument's dtype."""
    arrays = case.arrays(np.float64)
    wanted = [a.dtype == np.float64 for a in arrays]

    def function(*floats: Tensor) -> Tensor:
        left = iter(floats)
        return case.apply(
            *(next(left) if w else Tensor(backend.to_device(a)) for a, w in zip(arrays, wanted, strict=True))
        )

    floats = [backend.to_device(a) for a, w in zip(arrays, wanted, strict=True) if w]
    assert gradcheck(function, *floats, rng=Rng(1)) <= 1e-6

    plain = _gradients(function, floats)
    scale = max(float(np.abs(p).max()) for p in plain)
    for dtype, gaps in [(np.float64, True), *([] if case.draws else [(np.float32, False)])]:
        results = _gradients(function, [a.astype(dtype) for a in floats], gaps)
        for actual, expected in zip(results, plain, strict=True):
            assert_close(actual, expected.astype(dtype), atol=10 * TOLERANCE[dtype] * case.terms * scale)


def _gradients(function: Callable[..., Tensor], arrays: list[Any], gaps: bool = False) -> list[np.ndarray]:
    """The value and the gradients along one direction; with gaps, everything handed over is a view with strides."""
    space_out = _with_gaps if gaps else lambda a: a
    tensors = [Tensor(space_out(a), requires_grad=True) for a in arrays]
    y = function(*tensors)
    g = backend.to_device(np.cos(np.arange(y.size, dtype=np.float64)).reshape(y.shape).astype(y.dtype))
    y.backward(space_out(g))
    assert all(t.grad is not None and t.grad.shape == t.shape for t in tensors)
    return [backend.to_numpy(a) for a in (y.data, *(t.grad for t in tensors))]


def _with_gaps(a: Any) -> Any:
    """The same numbers as a view: axes in the other order in memory, every second element, the last axis backwards."""
    if a.ndim == 0:
        return a
    xp = backend.array_module(a)
    memory = xp.full(tuple(2 * n for n in a.shape[::-1]), np.nan, dtype=a.dtype)
    view = memory.transpose()[tuple(slice(None, None, 2) for _ in a.shape)][..., ::-1]
    view[...] = a
    return view
