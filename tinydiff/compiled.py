"""Elementwise formulas compiled for the processor, by Numba, which the extra "fast" installs; without it, NumPy does.

The formula stays the one that NumPy evaluates and CuPy fuses. Here it is given numbers instead of arrays, and functions
of this module in place of NumPy's: one loop then does all its steps on each element while it is in a register. Numba
has no vector code of its own for the exponential; the one below is a polynomial that the compiler can turn into such.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba import types as kinds
from numba.extending import intrinsic

jit: Any = functools.partial(  # sums may be reordered; NaN and infinity stay what they are
    njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "arcp", "nsz"}
)
f32, i32 = np.float32, np.int32

# ------------------------------------------------------------------ what a formula finds in its argument xp


def _bitcast(context: Any, bits: Any) -> Any:
    """How to make the float32 whose bits are those of an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return kinds.float32(kinds.int32), generate


_float_of_bits: Any = intrinsic(_bitcast)


@jit
def exp(x: Any) -> Any:
    """e^x = 2^n e^r with |r| <= ½ log 2, to two units in the last place; x is limited to [-87, 88].

    The polynomial is Cephes' (Moshier 1989).
    """
    x = f32(-87.0) if x < f32(-87.0) else x
    x = f32(88.0) if x > f32(88.0) else x
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)  # log 2 in two parts, the first of few bits
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * r * r + r + f32(1.0)) * _float_of_bits((i32(n) + i32(127)) * i32(1 << 23))


@jit
def tanh(x: Any) -> Any:
    """(e^2x − 1)/(e^2x + 1), to 1e-7."""
    return f32(1.0) - f32(2.0) / (exp(x + x) + f32(1.0))


@jit
def sqrt(x: Any) -> Any:
    """The square root."""
    return np.sqrt(x)


# --------------------------------------------------------------------------------------- a formula's loop


@functools.cache
def loop_of(formula: Callable[..., Any], inputs: int, places: tuple[int, ...]) -> Callable[..., None]:
    """A compiled loop(arrays, numbers) that evaluates formula(xp, *arrays[:inputs], *numbers) for each element.

    arrays: float32, (N, R, W) or with 1 for N or R, without gaps; the results go to those at `places`, which have the
    full shape and may be among the inputs.
    """
    number_formula, xp = jit(_in_float32(formula)), sys.modules[__name__]
    rows, items = _each(max(inputs - 1, *places) + 1, _row), _each(inputs, _item)
    put, single = _put(places), len(places) == 1

    @jit
    def loop_over_row(arrays: Any, numbers: Any, W: int) -> None:
        for i in range(W):
            value = number_formula(xp, *(items(arrays, i, 0) + numbers))
            put(arrays, i, (value,) if single else value)

    full = places[0]

    @jit
    def loop(arrays: Any, numbers: Any) -> None:
        N, R, W = arrays[full].shape
        for n in range(N):
            for r in range(R):
                loop_over_row(rows(arrays, n, r), numbers, W)

    return loop


def _in_float32(formula: Callable[..., Any]) -> Callable[..., Any]:
    """The formula with its literals as float32: a Python number would make Numba compute in float64."""
    code = formula.__code__
    constants = tuple(f32(c) if isinstance(c, float) else c for c in code.co_consts)
    return types.FunctionType(code.replace(co_consts=constants), formula.__globals__, formula.__name__)


@jit
def _row(array: Any, n: int, r: int) -> Any:
    """Row r of image n, or the only one, where an array is broadcast."""
    return array[min(n, array.shape[0] - 1), min(r, array.shape[1] - 1)]


@jit
def _item(row: Any, i: int, _: int) -> Any:
    return row[i]


def _each(count: int, one: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function (arrays, i, j) -> the tuple of one(array, i, j) for the first `count` of the arrays."""
    if count == 0:
        return jit(lambda arrays, i, j: ())
    before, last = _each(count - 1, one), count - 1
    return jit(lambda arrays, i, j: (*before(arrays, i, j), one(arrays[last], i, j)))


def _put(places: tuple[int, ...]) -> Callable[..., Any]:
    """A compiled function (rows, i, values) that writes each value to element i of the row at its place."""
    if not places:
        return jit(lambda rows, i, values: None)
    before, place, last = _put(places[:-1]), places[-1], len(places) - 1

    @jit
    def put(rows: Any, i: int, values: Any) -> None:
        before(rows, i, values)
        rows[place][i] = values[last]

    return put
