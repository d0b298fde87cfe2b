"""Dropout: which elements go is up to the stream; that the rest is scaled, and how many go, is not."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Rng, Tensor, backend, ops

P = 0.3


def dropped(x, p=P):
    """The kept elements are those where the stream's uniform numbers are at least p."""
    dtype = np.float32 if np.array_equal(x, x.astype(np.float32)) else np.float64
    kept = backend.to_numpy(Rng(5).uniform(x.shape, dtype)) >= p
    return np.where(kept, x / (1 - p), 0)


CASES = [
    Case("dropout", (shape,), dropped, settings={"p": P}, call=lambda op, x, p: op(x, p=p, rng=Rng(5)), draws=True)
    for shape in [(1,), (7, 3), (2, 3, 3, 4)]
]


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
def test_the_share_that_goes_is_p_and_the_mean_stays(p, device):
    x = Tensor(backend.to_device(np.ones((200, 100), np.float32)), requires_grad=True)
    y = ops.dropout(x, p=p, rng=Rng(0))
    y.sum().backward()
    values = y.numpy()
    error = 5 * np.sqrt(p * (1 - p) / values.size)  # five standard errors
    assert abs(np.mean(values == 0) - p) <= error
    assert set(np.unique(values)) <= {np.float32(0), np.float32(1) / np.float32(1 - p)}
    assert_close(x.grad, values)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_probability_outside_its_range_is_named(p):
    with pytest.raises(ValueError, match=rf"dropout\(\(2,\)\): .*\[0, 1\), got {p}"):
        ops.dropout(Tensor([1.0, 2.0]), p=p, rng=Rng(0))
