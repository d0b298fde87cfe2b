"""Sums, means and largest elements over axes."""

import itertools

import numpy as np
import pytest

from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Tensor, backend, ops


def over(combine):
    """The reduction by loops: combine the list of elements that fall together."""

    def reference(axis, keepdims, x):
        axes = range(x.ndim) if axis is None else [a % x.ndim for a in np.atleast_1d(axis)] if x.ndim else []
        kept = [1 if i in axes else n for i, n in enumerate(x.shape)]
        y = np.empty(kept)
        for place in itertools.product(*map(range, kept)):
            window = tuple(slice(None) if i in axes else slice(p, p + 1) for i, p in enumerate(place))
            y[place] = combine(x[window].ravel().tolist())
        return y if keepdims else y.reshape([n for i, n in enumerate(x.shape) if i not in axes])

    return reference


def mean(values):
    return sum(values) / len(values)


REFERENCE = {
    "sum": over(sum),
    "mean": over(mean),
    "max": over(max),
    "variance": over(lambda v: mean([(x - mean(v)) ** 2 for x in v])),
}
WAYS = [
    ((), None), ((5,), None), ((5,), 0), ((2, 3, 4), 1), ((2, 3, 4), -1), ((1, 3, 2), (0, 2)), ((2, 3, 1, 2), (-1, 1)),
    ((2, 3), (0, 1)),
]  # fmt: skip

CASES = [
    Case(
        op,
        (shape,),
        lambda x, r=reference, a=axis, k=keepdims: r(a, k, x),
        settings={"axis": axis, "keepdims": keepdims},
        call=lambda op, x, axis, keepdims: op(x, axis, keepdims),
    )
    for op, reference in REFERENCE.items()
    for shape, axis in WAYS
    for keepdims in (False, True)
]


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


@pytest.mark.parametrize(
    ("axis", "expected"), [(None, [[0, 1 / 3, 1 / 3], [0, 0, 1 / 3]]), (1, [[0, 0.5, 0.5], [0, 0, 1]])]
)
def test_equal_largest_elements_share_the_gradient(axis, expected, device):
    x = Tensor([[1.0, 3.0, 3.0], [0.0, 2.0, 3.0]], requires_grad=True)
    ops.max(x, axis).sum().backward()
    np.testing.assert_allclose(backend.to_numpy(x.grad), expected, rtol=1e-6)


def test_methods_are_the_ops():
    x = Tensor([[1.0, 2.0], [3.0, 5.0]])
    assert x.sum().item() == 11 and x.mean(axis=0).numpy().tolist() == [2, 3.5]
    assert x.sum(axis=1, keepdims=True).shape == (2, 1)
