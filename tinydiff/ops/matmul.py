"""Products of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.autograd import op
from tinydiff.backend import Array, array_module, each_block


@op
def matmul(a: Array, b: Array) -> Any:
    """a @ b for a (..., N, K) and b (..., K, M), their leading axes broadcast; both have two axes or more."""
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError("both arguments need two axes or more")
    return backend.matmul(a, b), lambda g: (
        lambda: backend.matmul(g, b.swapaxes(-1, -2)),
        lambda: backend.matmul(a.swapaxes(-1, -2), g),
    )


@op
def linear(x: Array, weight: Array, bias: Array | None = None) -> Any:
    """x W + b for x (..., K), W (K, M), b (M,) or None: (..., M)."""
    K, M = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"the last axis of x must have the weight's {K} rows, got {x.shape[-1]}")
    rows = x.reshape(-1, K)
    y = backend.matmul(rows, weight) if bias is None else _affine(rows, weight, bias)

    def vjp(g: Array) -> tuple[Any, ...]:
        g_rows = g.reshape(-1, M)
        gradients = (
            lambda: backend.matmul(g_rows, weight.T).reshape(x.shape),
            lambda: backend.matmul_transposed(rows, g_rows),
            lambda: backend.sum_rows(g_rows),
        )
        return gradients if bias is not None else gradients[:2]

    return y.reshape(*x.shape[:-1], M), vjp


def _affine(x: Array, weight: Array, bias: Array) -> Array:
    """x W + b for x (N, K), a block of rows at a time, so that b finds the products in the cache."""
    K, M = weight.shape
    y = array_module(x).empty((len(x), M), np.result_type(x.dtype, weight.dtype))

    def work(block: slice) -> None:
        some = backend.product(x[block], weight, out=y[block])
        some += bias

    each_block(work, len(x), M * y.itemsize, on=y, grain=max(1, 8 * backend.BLOCK // (K * M)))
    return y
