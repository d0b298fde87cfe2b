"""One formula, evaluated in blocks or as one kernel: the same result as the plain formula."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import backend
from tinydiff.formula import elementwise

RNG = np.random.default_rng(0)


@elementwise
def swish(xp, x):
    return x / (1 + xp.exp(-x))


@elementwise
def sum_and_difference(xp, a, b, factor):
    return a + factor * b, a - b


B = backend.BLOCK
SHAPES = [
    ((5,), (5,)),
    ((B,), (B,)),
    ((B + 1,), (B + 1,)),
    ((2, B + 3), (2, B + 3)),
    ((B // 2, 5), (B // 2, 5)),
    ((7, B // 4), (B // 4,)),
    ((7, B // 4), (7, 1)),
    ((7, B // 4), (1, B // 4)),
    ((B // 4,), (7, 1)),
    ((7, 1, B // 40), (10, 1)),
    ((1, 3, B), (1, 1, 1)),
    ((3 * B,), ()),
]


@pytest.mark.parametrize(("a", "b"), SHAPES, ids=str)
def test_blocks_give_the_plain_formula(a, b, workers):
    a, b = RNG.normal(size=a).astype(np.float32), RNG.normal(size=b).astype(np.float32)
    for first, second in ((a, b), (b, a)):
        actual = sum_and_difference(first, second, 0.5)
        for got, expected in zip(actual, (first + 0.5 * second, first - second), strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize("shape", [(5 * B + 3,), (50, B // 9), (50, 3, B // 9)])
def test_no_step_of_a_formula_sees_more_than_a_block(shape, workers):
    """Or than one row of the leading axis, where a row is larger."""
    seen = []

    @elementwise
    def watched(xp, x, y):
        seen.append(x.size)
        return x + y

    x = np.broadcast_to(np.float32(1), shape)
    assert_close(watched(x, 1.0), np.full(shape, 2, np.float32))
    assert sum(seen) == x.size and max(seen) <= max(B, x[0].size)


@pytest.mark.parametrize("order", ["every second", "transposed", "backwards", "read-only"])
def test_blocks_of_arrays_with_gaps(order, workers):
    x = RNG.normal(size=(700, 1000)).astype(np.float32)
    x = {
        "every second": x[:, ::2],
        "transposed": x.T,
        "backwards": x[::-1],
        "read-only": np.broadcast_to(x[:1], x.shape),
    }[order]
    assert_close(swish(x), x / (1 + np.exp(-x)))
    out = np.zeros((700, 2000), np.float32)[:, ::2] if order == "backwards" else np.zeros(x.shape[::-1], np.float32).T
    assert swish(x, out=out) is out
    assert_close(out, x / (1 + np.exp(-x)))


def test_results_of_an_array_without_gaps_may_go_to_one_with_gaps(workers):
    x = RNG.normal(size=(700, 1000)).astype(np.float32)
    out = np.zeros((700, 2000), np.float32)[:, ::2]
    assert swish(x, out=out) is out
    assert_close(out, x / (1 + np.exp(-x)))


@pytest.mark.parametrize("n", [10, B + 5, 5 * B + 1])
def test_results_may_be_written_over_arguments(n, workers):
    a, b = RNG.normal(size=(2, n))
    expected = a + 0.5 * b, a - b
    assert sum_and_difference(a, b, 0.5, out=(b, a))[0] is b  # even with the two exchanged
    assert_close(b, expected[0])
    assert_close(a, expected[1])
    one = b.reshape(-1, 1)
    plain = one / (1 + np.exp(-one))
    swish(one, out=one)
    assert_close(b[:, None], plain)


def test_a_formula_is_fused_once_for_each_kind_of_arguments(device):
    x = backend.to_device(np.linspace(-3, 3, 60).astype(np.float32).reshape(6, 10))
    host = backend.to_numpy(x)
    assert_close(swish(x), host / (1 + np.exp(-host)), rtol=1e-6)
    assert_close(swish(x[:, 0]), host[:, 0] / (1 + np.exp(-host[:, 0])), rtol=1e-6)
    first, second = sum_and_difference(x, x[0], 2.0)
    assert_close(first, host + 2 * host[0], rtol=1e-6)
    sum_and_difference(x, first, 1.0, out=(first, second))
    assert_close(second, host - (host + 2 * host[0]), rtol=1e-6)
