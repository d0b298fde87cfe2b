"""E35: classifier-free guidance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Tensor
from tinydiff.diffusion import Schedule, classifier_free, guided, predict

from .common import PROPERTY


@PROPERTY
@given(st.floats(-3, 10), st.integers(0, 1000))
def test_guided_moves_from_the_unconditional_output(scale, seed):
    c, u = np.random.default_rng(seed).normal(size=(2, 3, 4))
    np.testing.assert_allclose(guided(c, u, scale), scale * c + (1 - scale) * u, atol=1e-12)


def test_scale_0_and_1():
    c, u = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(guided(c, u, 0.0), u)
    np.testing.assert_allclose(guided(c, u, 1.0), c, atol=1e-6)
    assert guided(c, u, 2.5).dtype == np.float32
    np.testing.assert_array_equal(guided(Tensor(c), Tensor(u), 2.5).data, guided(c, u, 2.5))


def test_classifier_free_calls_only_what_counts():
    calls = []

    def network(name, value):
        def output(x_t, t):
            calls.append((name, t))
            return value * x_t

        return output

    c, u = network("c", 3.0), network("u", 1.0)
    x = np.ones((2, 2))
    for scale, expected, called in [(1, 3.0, "c"), (0, 1.0, "u"), (2.0, 5.0, "cu"), (0.5, 2.0, "cu")]:
        calls.clear()
        np.testing.assert_allclose(classifier_free(c, u, scale)(x, 9), expected)
        assert "".join(name for name, _ in calls) == called and {t for _, t in calls} == {9}


def test_a_learned_variance_is_the_conditional_one():
    c, u = np.random.default_rng(0).normal(size=(2, 3, 4, 6))
    network = classifier_free(lambda x, t: Tensor(c), lambda x, t: Tensor(u), 3.0, learned_variance=True)
    guided_part, variance = np.split(network(None, 1).data, 2, axis=-1)
    np.testing.assert_allclose(guided_part, 3 * c[..., :3] - 2 * u[..., :3])
    np.testing.assert_array_equal(variance, c[..., 3:])


@pytest.mark.parametrize("target", ["x0", "v"])
def test_guiding_any_target_is_guiding_eps(target):
    """eps, x_0 and v are affine in one another, with the same x_t: the guided outputs stand for one prediction."""
    schedule, t = Schedule.linear(100), np.array([1, 40, 100])
    c, u, x_t = np.random.default_rng(0).normal(size=(3, 3, 5))
    whole = predict(guided(c, u, 4.0), x_t, t, schedule, target).eps
    parts = (predict(output, x_t, t, schedule, target).eps for output in (c, u))
    np.testing.assert_allclose(whole, guided(*parts, 4.0), rtol=1e-9, atol=1e-9)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(1, 3\)"):
        guided(np.zeros((2, 3)), np.zeros((1, 3)), 2.0)
