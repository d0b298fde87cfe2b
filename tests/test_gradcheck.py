"""The gradient check finds what is wrong, however little of it is."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, backend, ops
from tinydiff.autograd import op
from tinydiff.gradcheck import gradcheck


def with_vjp(error):
    """x², with an error put into its gradient."""

    @op
    def square(x):
        return x * x, lambda g: error(2 * g * x)

    return square


X = np.random.default_rng(0).uniform(0.5, 2, (20, 10))


def one_wrong(g):
    g = g.copy()
    g[3, 4] *= 1.01
    return g


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "error",
    [
        lambda g: g * 1.00001, lambda g: -g, lambda g: 0 * g, lambda g: g + 1e-2, lambda g: g[::-1], one_wrong,
        lambda g: np.roll(g, 1, axis=1), lambda g: None,
    ],
)  # fmt: skip
def test_a_wrong_gradient_is_found(error, seed):
    square = with_vjp(error)
    assert gradcheck(lambda x: square(x) + 0 * x, X, rng=Rng(seed)) > 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_a_right_gradient_passes(seed):
    assert gradcheck(with_vjp(lambda g: g), X, rng=Rng(seed)) < 1e-6


def test_several_arguments_of_any_shape(device):
    arrays = [backend.to_device(a) for a in (X, X[0], np.array(0.7))]
    assert gradcheck(lambda a, b, c: ops.tanh(a * b) + c, *arrays, rng=Rng(0)) < 1e-9


def test_it_changes_none_of_its_arguments():
    before = X.copy()
    gradcheck(ops.exp, X, rng=Rng(0))
    assert_close(X, before)


def test_single_precision_is_refused():
    with pytest.raises(TypeError, match=r"needs float64 arrays, got \['float64', 'float32'\]"):
        gradcheck(ops.add, X, X.astype(np.float32), rng=Rng(0))
