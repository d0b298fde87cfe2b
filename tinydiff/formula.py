"""Elementwise formulas: each is written once, and run by NumPy, by Numba or by CuPy."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array

SMALLEST_COMPILED = 1 << 13
"""Elements of a formula below which calling compiled code costs more than it saves."""


def elementwise(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Turn formula(xp, *arrays, *numbers) into a function of them that makes one pass through memory.

    The formula is written once, with operators and with functions of xp (exp, tanh, sqrt), and gives one array or a
    tuple of arrays in the broadcast shape of its arguments. NumPy evaluates it block by block in the cache, the blocks
    spread over the cores; Numba, where it is installed, compiles it (compiled.py); CuPy makes it one fused kernel.
    The function takes `out=`, an array or a tuple of arrays to write to, which may be among the arguments. A formula
    may work in place on what it has made itself, and on arguments that are always among `out` too. It writes numbers
    as 1.0, not as 1, and computes with them only beside an array: of numbers alone CuPy computes in half precision.
    Overflow gives infinity, without a warning.
    """

    @functools.cache
    def fused(xp: ModuleType) -> Callable[..., Any]:
        return xp.fuse(kernel_name=formula.__name__)(lambda *args: formula(xp, *args))

    @functools.wraps(formula)
    def run(*args: Any, out: Any = None) -> Any:
        xp = backend.array_module(*args)
        if xp is not np:
            return _write(out, fused(xp)(*args))
        size = max((a.size for a in args if isinstance(a, np.ndarray)), default=0)
        if size < SMALLEST_COMPILED <= backend.BLOCK:
            return _write(out, _evaluated(formula, args))
        shape = np.broadcast_shapes(*(a.shape for a in args if isinstance(a, np.ndarray)))
        compiles = _compiles(args, out, shape)
        if math.prod(shape) <= backend.BLOCK and not compiles:
            return _write(out, _evaluated(formula, args))
        outs = _as_tuple(out) if out is not None else _empty_results(formula, args, shape)
        (_run_compiled if compiles else _run_blocked)(formula, args, outs, shape)
        return out if out is not None else outs if len(outs) > 1 else outs[0]

    return run


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _evaluated(formula: Callable[..., Any], args: Any) -> Any:
    with np.errstate(over="ignore"):
        return formula(np, *args)


def _empty_results(formula: Callable[..., Any], args: Any, shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Arrays for what a formula will give, as many and of such dtypes as it gives for empty arrays."""
    values = formula(np, *(np.empty(0, a.dtype) if isinstance(a, np.ndarray) else a for a in args))
    return tuple(np.empty(shape, v.dtype) for v in _as_tuple(values))


def _write(out: Any, value: Any) -> Any:
    """Copy the results of a formula to the arrays that were given for them, if any, unless it worked there in place."""
    if out is None:
        return value
    for target, v in zip(_as_tuple(out), _as_tuple(value), strict=True):
        if not (v is target or _is_view_of_same(v, target)):
            target[...] = v
    return out


def _is_view_of_same(a: Array, b: Array) -> bool:
    """Whether two NumPy arrays are views of the same elements."""
    return getattr(a, "base", None) is not None and (a.ctypes.data, a.strides) == (b.ctypes.data, b.strides)


def _pieces(arrays: Any, shape: tuple[int, ...]) -> tuple[int, Callable[[int, int], list[Any]]]:
    """How many rows there are to share, and a function that gives each array's rows start..stop.

    A row is a single element where all arrays have the full shape and no gaps, else an item of the leading axis; what
    is broadcast along that is given whole.
    """
    if all(np.ndim(a) == 0 or (a.shape == shape and a.flags.c_contiguous) for a in arrays):
        arrays, shape = [a.reshape(-1) if np.ndim(a) else a for a in arrays], (math.prod(shape),)
    cut = [np.ndim(a) == len(shape) and a.shape[0] == shape[0] for a in arrays]
    return shape[0], lambda start, stop: [a[start:stop] if c else a for a, c in zip(arrays, cut, strict=True)]


def _run_blocked(formula: Callable[..., Any], args: Any, outs: tuple[Array, ...], shape: tuple[int, ...]) -> None:
    """Evaluate a formula by NumPy, over blocks that stay in the cache."""
    rows, pieces = _pieces((*args, *outs), shape)
    step = max(1, backend.BLOCK * rows // math.prod(shape))

    def work(start: int, stop: int) -> None:
        for i in range(start, stop, step):
            arrays = pieces(i, min(i + step, stop))
            _write(tuple(arrays[len(args) :]), _evaluated(formula, arrays[: len(args)]))

    backend.parallel(work, rows, 2 * step)


@functools.cache
def _compiler() -> ModuleType | None:
    """tinydiff.compiled, if Numba is installed and the variable TINYDIFF_COMPILED is not 0."""
    if os.environ.get("TINYDIFF_COMPILED") == "0" or importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module("tinydiff.compiled")


def _compiles(args: Any, out: Any, shape: tuple[int, ...]) -> bool:
    """Whether a formula of these arguments can be compiled: float32 without gaps, of one shape or (N or 1, R or 1, W),
    numbers last, and enough of them."""
    if math.prod(shape) < SMALLEST_COMPILED or _compiler() is None:
        return False
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    given = [*arrays, *(() if out is None else _as_tuple(out))]
    return (
        all(a.dtype == np.float32 and a.flags.c_contiguous for a in given)
        and all(isinstance(a, (int, float)) for a in args[len(arrays) :])
        and all(a.shape == shape or (len(shape) == a.ndim == 3 and a.shape[2] == shape[2]) for a in given)
    )


def _run_compiled(formula: Callable[..., Any], args: Any, outs: tuple[Array, ...], shape: tuple[int, ...]) -> None:
    """Evaluate a formula by its compiled loop, one range of elements or images a core."""
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    inputs, numbers, places = len(arrays), tuple(map(np.float32, args[len(arrays) :])), []
    for target in outs:
        same = [i for i, a in enumerate(arrays) if a is target]
        places.append(same[0] if same else len(arrays))
        arrays += [] if same else [target]
    loop = importlib.import_module("tinydiff.compiled").loop_of(formula, inputs, tuple(places))
    rows, pieces = _pieces(arrays, shape)

    def work(start: int, stop: int) -> None:
        loop(tuple(a.reshape((1,) * (3 - a.ndim) + a.shape) for a in pieces(start, stop)), numbers)

    backend.parallel(work, rows, max(1, 2 * backend.BLOCK * rows // math.prod(shape)))
