"""Elementwise ops, with broadcasting, and large enough to be cut into blocks."""

import math

import numpy as np
import pytest

from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Tensor, backend, ops

LARGE = (3, backend.BLOCK // 5, 2)  # more than a block, and no multiple of one
POSITIVE = (0.1, 3.0)


def one_by_one(formula):
    """A formula of numbers, applied to the broadcast arguments one element at a time."""
    return np.vectorize(formula, otypes=[np.float64])


def both(op, formula, **more):
    """A binary op: equal shapes, broadcast either way, a scalar, one image, more axes on one side."""
    shapes = [((2, 3), (2, 3)), ((4, 1, 3), (2, 1)), ((5,), (1, 2, 5)), ((), (2, 2)), ((1, 1), (3, 2))]
    return [Case(op, pair, formula, **more) for pair in shapes]


def one(op, formula, **more):
    """A unary op: a number, a vector, one small image."""
    return [Case(op, (shape,), one_by_one(formula), **more) for shape in [(), (7,), (1, 3, 2, 5)]]


def normal_cdf_by_tanh(x):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


CONDITION = np.array([[True], [False], [True]])

CASES = [
    *both("add", lambda a, b: a + b),
    *both("sub", lambda a, b: a - b),
    *both("mul", lambda a, b: a * b),
    *both("div", lambda a, b: a / b, domain=POSITIVE),
    *both("maximum", one_by_one(lambda a, b: a if a > b else b)),
    *both("minimum", one_by_one(lambda a, b: b if a > b else a)),
    *one("neg", lambda x: -x),
    *one("exp", math.exp),
    *one("log", math.log, domain=POSITIVE),
    *one("sqrt", math.sqrt, domain=POSITIVE),
    *one("sin", math.sin),
    *one("cos", math.cos),
    *one("tanh", math.tanh),
    *one("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
    *one("silu", lambda x: x / (1 + math.exp(-x))),
    *one("log_normal_cdf", lambda x: math.log(0.5 * math.erfc(-x / math.sqrt(2))), domain=(-9.0, 5.0)),
    *one("gelu", lambda x: x * normal_cdf_by_tanh(x)),
    *one("relu", lambda x: x if x > 0 else 0.0, kinks=(0,)),
    *one("absolute", lambda x: x if x > 0 else -x, kinks=(0,)),
    *one("clip", lambda x: min(max(x, -0.5), 1.0), settings={"low": -0.5, "high": 1.0}, kinks=(-0.5, 1)),
    *one("power", lambda x: x**3, settings={"exponent": 3}),
    *one("power", lambda x: x**-2.5, settings={"exponent": -2.5}, domain=POSITIVE),
    Case("where", (CONDITION, (3, 2), (3, 2)), one_by_one(lambda c, a, b: a if c else b)),
    Case("where", (CONDITION, (2,), ()), one_by_one(lambda c, a, b: a if c else b)),
]

LARGE_CASES = [
    Case("sigmoid", (LARGE,), lambda x: 1 / (1 + np.exp(-x))),
    Case("silu", (LARGE,), lambda x: x / (1 + np.exp(-x))),
    Case("gelu", (LARGE,), lambda x: x * (0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))),
]


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


@each(LARGE_CASES)
def test_more_than_one_block(case):
    check_values(case)
    check_gradients(case)


@pytest.mark.parametrize("op", [ops.tanh, ops.sigmoid, ops.silu, ops.gelu])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_stay_finite_far_from_zero(op, dtype, device):
    x = Tensor(backend.to_device(np.array([-1e4, -100, 0, 100, 1e4], dtype)), requires_grad=True)
    with np.errstate(over="raise", invalid="raise"):
        y = op(x)
        y.sum().backward()
    assert np.isfinite(y.numpy()).all() and np.isfinite(backend.to_numpy(x.grad)).all()


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_the_tails_of_the_normal_distribution_function(dtype, rtol, device):
    """Far left Φ(x) is φ(x)/|x| (1 − 1/x² + 3/x⁴ − ...), its logarithm's slope φ/Φ; far right log Φ(x) is −Φ(−x)."""
    left = np.array([-1e4, -1000, -200], dtype)
    x = Tensor(backend.to_device(np.concatenate([left, [2, 5, 12]]).astype(dtype)), requires_grad=True)
    with np.errstate(over="raise", invalid="raise"):
        y = ops.log_normal_cdf(x)
        y.sum().backward()
    a = left.astype(np.float64)
    series = 1 - a**-2 + 3 * a**-4 - 15 * a**-6
    expected = np.log(series / -a) - a**2 / 2 - math.log(2 * math.pi) / 2
    np.testing.assert_allclose(y.numpy()[:3], expected, rtol=rtol)
    np.testing.assert_allclose(backend.to_numpy(x.grad)[:3], -a / series, rtol=rtol)
    right = [math.log1p(-math.erfc(b / math.sqrt(2)) / 2) for b in (2, 5, 12)]
    np.testing.assert_allclose(y.numpy()[3:], right, rtol=rtol, atol=0)


def test_ties_have_one_gradient(device):
    x = Tensor([1.0, 0.0, -0.5], requires_grad=True)
    y = Tensor([1.0, 0.0, 1.0], requires_grad=True)
    (ops.maximum(x, y).sum() + ops.minimum(x, y).sum()).backward()
    assert backend.to_numpy(x.grad + y.grad).tolist() == [2, 2, 2]
    x.grad = None
    (ops.relu(x).sum() + ops.absolute(x).sum()).backward()
    assert backend.to_numpy(x.grad).tolist() == [2, 0, -1]


def test_operators_are_the_ops(device):
    a, b = np.array([[1.0, -2.0]], np.float32), np.array([[3.0], [0.5]], np.float32)
    x, y = Tensor(backend.to_device(a)), Tensor(backend.to_device(b))
    for actual, expected in [
        (x + y, a + b), (x - y, a - b), (x * y, a * b), (x / y, a / b), (-x, -a), (x**2, a**2), (y @ x, b @ a),
        (2 + x, 2 + a), (2 - x, 2 - a), (2 * x, 2 * a), (2 / x, 2 / a),
    ]:  # fmt: skip
        np.testing.assert_array_equal(actual.numpy(), expected)
        assert actual.dtype == np.float32
