"""Products of matrices against three loops."""

import itertools

import numpy as np
import pytest

from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import ops


def product(a, b):
    """(..., N, K) times (..., K, M), each element a sum."""
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    a, b = np.broadcast_to(a, (*shape[:-2], *a.shape[-2:])), np.broadcast_to(b, (*shape[:-2], *b.shape[-2:]))
    y = np.zeros(shape)
    for place in itertools.product(*map(range, shape)):
        *batch, i, j = place
        y[place] = sum(a[(*batch, i, k)] * b[(*batch, k, j)] for k in range(a.shape[-1]))
    return y


SHAPES = [
    ((1, 1), (1, 1)), ((2, 3), (3, 4)), ((7, 5), (5, 1)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 3)),
    ((3, 4), (2, 4, 2)), ((1, 3, 4), (5, 4, 2)), ((2, 1, 3, 2), (3, 2, 4)), ((4, 2, 2, 3), (1, 3, 3)),
]  # fmt: skip
LARGE = [((130, 257), (257, 129)), ((9, 64, 80), (80, 96)), ((9, 64, 80), (9, 80, 96)), ((64, 80), (9, 80, 96))]

CASES = [
    *(Case("matmul", pair, product, terms=4) for pair in SHAPES),
    *(Case("matmul", pair, lambda a, b: np.einsum("...nk,...km->...nm", a, b), terms=20) for pair in LARGE),
    Case("linear", ((5, 3), (3, 2), (2,)), lambda x, w, b: product(x, w) + b, terms=4),
    Case("linear", ((1, 2, 3, 4), (4, 5), (5,)), lambda x, w, b: product(x, w) + b, terms=4),
    Case("linear", ((4,), (4, 3)), lambda x, w: product(x[None], w)[0], terms=4),
    Case("linear", ((600, 70), (70, 65), (65,)), lambda x, w, b: np.einsum("nk,km->nm", x, w) + b, terms=20),
]


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


@pytest.mark.parametrize(
    ("op", "shapes", "message"),
    [
        (ops.matmul, [(2, 3), (2, 3)], r"matmul\(\(2, 3\), \(2, 3\)\)"),
        (ops.matmul, [(3,), (3, 2)], r"matmul\(\(3,\), \(3, 2\)\).*two axes"),
        (ops.linear, [(2, 3), (4, 2)], r"linear\(\(2, 3\), \(4, 2\)\).*4 rows, got 3"),
        (ops.linear, [(2, 3), (3, 2), (3,)], r"linear\(\(2, 3\), \(3, 2\), \(3,\)\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(op, shapes, message):
    with pytest.raises(ValueError, match=message):
        op(*map(np.zeros, shapes))
