"""The helper that compares arrays fails on wrong input: all other tests stand on that."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Tensor

X = np.array([[1.0, 2.0], [3.0, 4.0]])


def test_it_passes_what_is_close():
    assert_close(X, X)
    assert_close(Tensor(X), X)
    assert_close(X + 3e-9, X, rtol=1e-9)  # relative to the largest element, 4
    assert_close(X + 1e-9, X, atol=2e-9)
    assert_close(np.empty((0, 3)), np.empty((0, 3)))
    assert_close(np.array([True]), np.array([True]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (X[:1], "shape"),
        (X[None], "shape"),
        (X[:, :1], "shape"),
        (X.astype(np.float32), "dtype"),
        (X + 5e-9, "largest error"),
        (X * [[1, 1], [1, 1.1]], r"at \(1, 1\)"),
        (-X, "largest error"),
        (X * [[1, 1], [np.nan, 1]], "largest error"),
        (X * [[1, 1], [1, np.inf]], "largest error"),
    ],
)
def test_it_fails_what_is_not(wrong, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(wrong, X, rtol=1e-9)


def test_not_a_number_is_no_match_even_for_itself():
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(np.array([np.nan]), np.array([np.nan]), rtol=1, atol=1)
