"""Ops that pick elements: NumPy's indexing, rows of a table."""

from __future__ import annotations

from typing import Any

from tinydiff import backend
from tinydiff.autograd import Tensor, op
from tinydiff.backend import Array, array_module


@op
def _getitem(x: Array, *, index: Any) -> Any:
    def vjp(g: Array) -> Array:
        dx = array_module(x).zeros_like(x)
        if _is_basic(index):
            dx[index] = g
        else:
            array_module(x).add.at(dx, index, g)
        return dx

    return x[index], vjp


def getitem(x: Tensor, index: Any) -> Tensor:
    """x[index] with NumPy's rules; a repeated index adds up its gradients."""
    parts = index if isinstance(index, tuple) else (index,)
    raw = tuple(p.data if isinstance(p, Tensor) else p for p in parts)
    return _getitem(x, index=raw if isinstance(index, tuple) else raw[0])


def _is_basic(index: Any) -> bool:
    """Whether an index has only slices and numbers, so that no element is picked twice."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, (int, slice)) for p in parts)


@op
def take_rows(table: Array, *, rows: Array) -> Any:
    """The rows of a table (N, D) picked by whole numbers of any shape (...) in 0..N-1: (..., D).

    Raises IndexError for a row outside the table.
    """
    xp = array_module(table, rows)
    if (found := backend.value_range(rows)) and not (0 <= found[0] and found[1] < len(table)):
        raise IndexError(f"rows must be in 0..{len(table) - 1}, got {found[0]}..{found[1]}")

    def vjp(g: Array) -> Array:
        d_table = xp.zeros_like(table)
        xp.add.at(d_table, rows, g)
        return d_table

    return table[rows], vjp
