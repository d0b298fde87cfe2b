"""Picking elements: the gradient goes back to where each came from, and adds up where one was picked twice."""

import numpy as np
import pytest

from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Tensor, backend, ops


def device_index(index):
    """An index with its NumPy arrays moved to the device in use."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(backend.to_device(p) if isinstance(p, np.ndarray) else p for p in parts)


def picked(shape, index):
    """x[index] by looking up, for each place of the result, where it comes from."""

    def reference(x):
        places = np.arange(x.size).reshape(x.shape)[index]
        return np.array([x.ravel()[p] for p in places.ravel()]).reshape(places.shape)

    return Case("getitem", (shape,), reference, call=lambda op, x: op(x, device_index(index)))


ROWS = np.array([[3, 0, 3], [1, 3, 2]])

CASES = [
    picked((4, 3), 2),
    picked((4, 3), -1),
    picked((5,), 3),
    picked((4, 3), (slice(1, 3), slice(None, None, -1))),
    picked((4, 3), (slice(None, None, 2), None, 1)),
    picked((2, 3, 4), (..., 0)),
    picked((4, 3), np.array([0, 2, 2, 1, 2])),
    picked((4, 3), (np.array([0, 0, 3]), np.array([1, 1, 2]))),
    picked((4, 3), (slice(None), np.array([2, 2]))),
    picked((4, 3), np.array([True, False, True, True])),
    picked((2, 2), np.array([[True, False], [True, True]])),
    Case("take_rows", ((4, 3),), lambda t: np.array([[t[i] for i in row] for row in ROWS]), settings={"rows": ROWS}),
    Case("take_rows", ((5, 1),), lambda t: t[2], settings={"rows": np.array(2)}),
]


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


def test_an_index_may_be_a_tensor(device):
    x = (
        Tensor(np.arange(4.0), requires_grad=True)
        if device.startswith("cpu")
        else Tensor([0.0, 1, 2, 3], requires_grad=True)
    )
    y = x[Tensor([1, 1, 3])]
    y.sum().backward()
    assert y.numpy().tolist() == [1, 1, 3] and backend.to_numpy(x.grad).tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("rows", [[0, 4], [-1, 0]])
def test_rows_outside_the_table_are_named(rows, device):
    with pytest.raises(IndexError, match=rf"take_rows\(\(4, 2\)\): rows must be in 0\.\.3, got {rows[0]}\.\.{rows[1]}"):
        ops.take_rows(Tensor(backend.to_device(np.zeros((4, 2)))), rows=backend.to_device(np.array(rows)))


def test_an_index_out_of_range_names_the_op():
    with pytest.raises(IndexError, match=r"getitem\(\(3,\)\)"):
        Tensor([1.0, 2.0, 3.0])[5]
