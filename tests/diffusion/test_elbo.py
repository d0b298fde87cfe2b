"""E11, E13, E14: the terms of the bound against numerical integration, sums over all grey levels, and each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng, Tensor, backend
from tinydiff.diffusion import (
    Schedule,
    discretised_log_likelihood,
    gaussian_kl,
    learned_log_variance,
    posterior,
    predict,
    q_sample,
    target_of,
    variance_bound,
    variance_bound_arrays,
)
from tinydiff.gradcheck import gradcheck

from .common import PROPERTY

LEVELS = np.arange(256) / 127.5 - 1


def density(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


@PROPERTY
@given(*(st.floats(-2, 2) for _ in range(4)))
def test_kl_is_the_integral(mean_1, log_variance_1, mean_2, log_variance_2):
    """E14: integral of p log(p/q) by the trapezoidal rule, which is exact to rounding for such smooth functions."""
    x = np.linspace(mean_1 - 40, mean_1 + 40, 20001)
    p = density(x, mean_1, math.exp(log_variance_1))
    log_q = -((x - mean_2) ** 2) / (2 * math.exp(log_variance_2)) - (math.log(2 * math.pi) + log_variance_2) / 2
    log_p = -((x - mean_1) ** 2) / (2 * math.exp(log_variance_1)) - (math.log(2 * math.pi) + log_variance_1) / 2
    expected = np.trapezoid(p * (log_p - log_q), x)
    kl = gaussian_kl(np.array([mean_1]), log_variance_1, mean_2, np.array(log_variance_2))
    np.testing.assert_allclose(kl.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_kl_with_one_variance_is_the_deck_s_form():
    m_1, m_2, log_variance = np.random.default_rng(0).normal(size=(3, 5))
    kl = gaussian_kl(m_1, log_variance, m_2, log_variance)
    np.testing.assert_allclose(kl.numpy(), (m_1 - m_2) ** 2 / (2 * np.exp(log_variance)), rtol=1e-12)


def level_probability(x_0, mean, sigma):
    """How much of N(mean, sigma²) lies within half a level of the grey level x_0, by math.erfc."""
    lower, upper = ((x_0 + side / 255 - mean) / sigma / math.sqrt(2) for side in (-1, 1))
    lower, upper = -math.inf if x_0 == -1 else lower, math.inf if x_0 == 1 else upper
    if lower > 0:  # on the right of the mean it is 1 - erfc that is small: take the mirror image
        lower, upper = -upper, -lower
    return (math.erfc(-upper) - math.erfc(-lower)) / 2


@PROPERTY
@given(st.floats(-1.2, 1.2), st.floats(-14, 2))
def test_the_levels_share_out_all_probability(mean, log_variance):
    """E11: the sum over the 256 levels is 1."""
    log_p = discretised_log_likelihood(LEVELS, np.full(256, mean), np.full(256, log_variance)).numpy()
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-11)


@pytest.mark.parametrize("sigma", [0.03, 0.1, 1.0])
def test_the_decoder_against_the_error_function(sigma):
    """Each level's probability, down to 1e-300, relative to itself."""
    mean = 0.05
    log_p = discretised_log_likelihood(LEVELS, np.full(256, mean), np.full(256, 2 * math.log(sigma))).numpy()
    expected = [level_probability(x, mean, sigma) for x in LEVELS]
    np.testing.assert_allclose(log_p, np.log(expected), rtol=1e-9)


def test_the_decoder_in_float32_keeps_small_probabilities():
    """Five sigma off on either side, and where p itself is far below what float32 can hold."""
    x, log_variance = LEVELS[[70, 190, 0]], np.full(3, 2 * math.log(0.004))
    mean = np.add(x, [0.02, -0.02, 1.0])
    exact = discretised_log_likelihood(x, mean, log_variance).numpy()
    rounded = discretised_log_likelihood(*(a.astype(np.float32) for a in (x, mean, log_variance)))
    assert rounded.dtype == np.float32 and np.isclose(exact[0], exact[1]) and -12 < exact[0] < -10
    assert -math.log(math.sqrt(2 * math.pi) * 249.02) - 249.02**2 / 2 == pytest.approx(exact[2], rel=1e-4)
    np.testing.assert_allclose(rounded.numpy(), exact, rtol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_decoder_s_gradient_stays_finite(dtype, device):
    """At every level, with the mean and variance of a network that is far off."""
    x_0 = backend.to_device(np.repeat(LEVELS, 12).astype(dtype))
    wild = np.array([(m, v) for m in (-30.0, -1.0, 0.3, 50.0) for v in (-16.0, -5.0, 4.0)], dtype)
    mean, log_variance = (Tensor(backend.to_device(np.tile(a, 256)), requires_grad=True) for a in wild.T)
    discretised_log_likelihood(x_0, mean, log_variance).sum().backward()
    for gradient in (mean.grad, log_variance.grad):
        assert np.isfinite(backend.to_numpy(gradient)).all()


def test_the_decoder_s_gradient():
    x_0 = LEVELS[[0, 3, 100, 255]]
    mean, log_variance = np.add(x_0, [0.1, -0.02, 0.01, -0.3]), np.array([-6.0, -8.0, -11.0, -2.0])
    assert gradcheck(lambda m, v: discretised_log_likelihood(x_0, m, v), mean, log_variance, rng=Rng(0)) <= 1e-6


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_the_bound_that_trains_the_variance(target):
    """E13, E11: as from the posterior and the network's mean and variance, in float64, one number at a time."""
    schedule, rng = Schedule.cosine(50), np.random.default_rng(0)
    x_0 = LEVELS[rng.integers(0, 256, (6, 4))]
    eps, v, error = rng.normal(size=(3, 6, 4))
    t, v, error = np.array([1, 2, 25, 50, 1, 49]), v * 0.3 + 0.5, 0.1 * error
    x_t = q_sample(x_0, t, eps, schedule)
    x_0_theta = predict(target_of(x_0, eps, t, schedule, target) + error, x_t, t, schedule, target).x0
    (q_mean, q_variance), (mean, _) = (posterior(x_t, x, t, schedule) for x in (x_0, x_0_theta))
    variance = np.exp(learned_log_variance(v, t, schedule))
    terms = []
    for i, j in np.ndindex(x_0.shape):
        m, s = mean[i, j], variance[i, j] ** 0.5
        if t[i] == 1:
            terms.append(-math.log(level_probability(x_0[i, j], m, s)))
        else:
            s_q = float(q_variance[i, 0]) ** 0.5
            terms.append(math.log(s / s_q) + (s_q**2 + (q_mean[i, j] - m) ** 2) / (2 * s**2) - 0.5)
    found = variance_bound(error, v, t, *variance_bound_arrays(x_0, t, schedule, target))
    np.testing.assert_allclose(found.item(), np.mean(terms), rtol=1e-7)


def test_the_variance_is_trained_where_it_is_wrong():
    """The gradient pushes v up where the mean is off by more than the variance allows, and down where it is exact."""
    schedule, t = Schedule.cosine(50), np.array([20, 20])
    x_0 = LEVELS[[[100], [100]]]
    v = Tensor(np.full((2, 1), 0.5), requires_grad=True)
    variance_bound(np.array([[0.0], [30.0]]), v, t, *variance_bound_arrays(x_0, t, schedule, "eps")).backward()
    assert v.grad[0] > 0 > v.grad[1]
