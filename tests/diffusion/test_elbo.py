"""The bound (E10, E11, E13, E14, E16): its parts against numerical integration and sums over all grey levels, the whole
against Gaussian data, of which everything is known in closed form."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tinydiff import Rng, Tensor, backend
from tinydiff.diffusion import (
    Prediction,
    Schedule,
    bits_per_dim,
    bound_term,
    bound_terms,
    denoiser,
    discretised_log_likelihood,
    forward_trajectory,
    gaussian_kl,
    gaussian_log_likelihood,
    learned_log_variance,
    log_density,
    log_likelihood,
    posterior,
    predict,
    prior_term,
    q_sample,
    target_of,
    trajectory_bound,
    variance_bound,
    variance_bound_arrays,
    vlb_weight,
)
from tinydiff.gradcheck import gradcheck

from .common import PROPERTY, alpha_bar_fast, batches, gaussian_data, ideal_x0, quiet, within

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


def test_the_likelihood_of_real_numbers():
    x, mean = np.random.default_rng(0).normal(size=(2, 3, 4))
    log_p = gaussian_log_likelihood(x, mean, math.log(0.3)).numpy().sum(axis=1)
    np.testing.assert_allclose(log_p, log_density(x, mean, 0.3), rtol=1e-12)


# ------------------------------------------------------------------------------- one term


@PROPERTY
@given(batches(arrays=3), st.sampled_from(["posterior", "beta"]))
def test_a_term_is_the_weighted_error_of_the_noise(batch, variance):
    """E16: L_{t-1} = beta_t²/(2 sigma_t² alpha_t (1 - alpha_bar_t)) ||eps - eps_theta||², which is all of the KL for
    sigma_t² = beta_tilde_t; beta_t adds what the two variances differ by, whatever the network does."""
    schedule, t, x_0, eps, eps_theta = batch
    t = int(np.max(t))
    assume(t > 1)
    x_t = q_sample(x_0, t, eps, schedule)
    term = bound_term(x_0, x_t, t, lambda x, t: predict(eps_theta, x, t, schedule), schedule, variance)
    ratio = schedule.posterior_variance[t] / schedule.reverse_variance(variance)[t]
    of_variances = (ratio - 1 - math.log(ratio)) / 2 * x_0[0].size
    squared = ((eps - eps_theta) ** 2).reshape(len(x_0), -1).sum(axis=1)
    np.testing.assert_allclose(term, vlb_weight(t, schedule, variance) * squared + of_variances, rtol=1e-6)


def guess(x_0, v=None):
    """A denoiser that always guesses this x_0."""
    return lambda x_t, t: Prediction(x_0, None, v)


def test_a_perfect_guess_leaves_nothing_but_the_last_step():
    """The KL of a Gaussian to itself is 0, and L_0 is what of N(x_0, sigma_1²) lies within half a level of x_0."""
    schedule, x_0 = Schedule.cosine(20), LEVELS[np.random.default_rng(0).integers(1, 255, (2, 3))]
    _, *kls, last = bound_terms(x_0, guess(x_0), schedule, Rng(0))
    np.testing.assert_allclose(kls, 0, atol=1e-12)
    sigma = schedule.posterior_variance[2] ** 0.5
    np.testing.assert_allclose(last, -3 * math.log(math.erf(1 / 255 / sigma / math.sqrt(2))), rtol=1e-9)


def test_the_prior_s_term():
    """E5: that of the schedule's own report, for the dimensions together."""
    x_0 = np.random.default_rng(0).normal(size=(3, 2, 2))
    schedule = quiet([0.1, 0.2, 0.5])
    expected = [4 * schedule.terminal_kl(x) for x in x_0]
    np.testing.assert_allclose(prior_term(x_0, schedule), expected, rtol=1e-12)


@pytest.mark.parametrize("t", [1, 2, 5])
def test_which_variance(t):
    """E13: a learned one with v = 0 is beta_tilde_t, with v = 1 beta_t; by default it is what the network learned."""
    schedule, rng = Schedule.linear(10), np.random.default_rng(0)
    x_0 = LEVELS[rng.integers(0, 256, (3, 4))]
    x_t = q_sample(x_0, t, rng.normal(size=x_0.shape), schedule)
    terms = {
        name: bound_term(x_0, x_t, t, guess(0.9 * x_0, v), schedule, name if v is None else "learned")
        for name, v in [("posterior", None), ("beta", None), (0, np.zeros_like(x_0)), (1, np.ones_like(x_0))]
    }
    np.testing.assert_allclose(terms[0], terms["posterior"], rtol=1e-9)
    np.testing.assert_allclose(terms[1], terms["beta"], rtol=1e-9)
    assert not np.allclose(terms[0], terms[1], rtol=1e-3)
    for v, name in [(None, "posterior"), (np.ones_like(x_0), 1)]:
        np.testing.assert_array_equal(bound_term(x_0, x_t, t, guess(0.9 * x_0, v), schedule), terms[name])


def test_some_of_the_terms(device):
    """Which x_t is drawn for one t does not depend on which other t are asked for; float32 stays float32."""
    schedule, x_0 = Schedule.linear(10), backend.to_device(LEVELS[:6].reshape(2, 3).astype(np.float32))
    denoise = denoiser(lambda x_t, t: 0.1 * x_t, schedule)
    everything = [*bound_terms(x_0, denoise, schedule, Rng(0))]
    some = [*bound_terms(x_0, denoise, schedule, Rng(0), times=[7, 1])]
    assert len(everything) == 11 and all(term.dtype == np.float32 and term.shape == (2,) for term in everything)
    for term, same in zip(some, (everything[0], everything[4], everything[10]), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(term), backend.to_numpy(same))


def test_bits_per_dim():
    assert bits_per_dim(np.array([1, 2]) * math.log(2) * 6, np.zeros((2, 2, 3))) == pytest.approx([1.0, 2.0])


# ------------------------------------------------------------------------------- Gaussian data and the ideal denoiser


def expected_terms(schedule, mean, covariance, variance):
    """E_q of each term of the bound on Gaussian data, L_T first, by the covariance that x_0 has where x_t is known."""
    D, terms = len(mean), []
    for t in range(schedule.T, 0, -1):
        signal, noise = alpha_bar_fast(schedule, t)
        unknown = np.trace(
            np.linalg.inv(np.linalg.inv(covariance) + signal / noise * np.eye(D))
        )  # E||x_0 - E[x_0|x_t]||²
        signal_prev, noise_prev = alpha_bar_fast(schedule, t - 1)
        beta, beta_tilde = schedule.beta[t], schedule.beta[t] * noise_prev / noise
        if t == schedule.T:
            second_moment = np.trace(covariance) + mean @ mean
            terms.append((signal * second_moment + D * (noise - 1 - math.log(noise))) / 2)
        if t == 1:
            s = beta if variance == "beta" else schedule.posterior_variance[2]
            terms.append((unknown / s + D * math.log(2 * math.pi * s)) / 2)
        else:
            s = beta if variance == "beta" else beta_tilde
            shift = (signal_prev**0.5 * beta / noise) ** 2 * unknown
            terms.append((shift / s + D * (beta_tilde / s - 1 - math.log(beta_tilde / s))) / 2)
    return np.array(terms)


def entropy(covariance):
    """-E[log p(x_0)] of Gaussian data, in nats: below it no bound on average can be."""
    return np.linalg.slogdet(2 * math.pi * math.e * covariance)[1] / 2


def gaussian_problem(n, D=2):
    """n samples of Gaussian data, their mean and covariance."""
    mean, covariance = gaussian_data(D, seed=1)
    rng = np.random.default_rng(2)
    return rng.multivariate_normal(mean, covariance, n), mean, covariance


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_each_term_on_gaussian_data(variance):
    """E11: the average of each term within 5 standard errors of what it is in closed form."""
    schedule = quiet([0.02, 0.1, 0.3, 0.5, 0.7])
    x_0, mean, covariance = gaussian_problem(20_000)
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    terms = np.array([*bound_terms(x_0, denoise, schedule, Rng(0), variance, decoder=gaussian_log_likelihood)])
    error = terms.std(axis=1) / len(x_0) ** 0.5
    within(terms.mean(axis=1), expected_terms(schedule, mean, covariance, variance), error + 1e-12)


def test_the_average_over_trajectories_is_the_sum_of_the_terms():
    """E10 = E11: on the same data, where the sum is known in closed form."""
    schedule = quiet([0.02, 0.1, 0.3, 0.5, 0.7])
    x_0, mean, covariance = gaussian_problem(20_000)
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    bound = trajectory_bound([x_0, *forward_trajectory(x_0, schedule, Rng(0))], denoise, schedule, "beta")
    expected = expected_terms(schedule, mean, covariance, "beta").sum()
    within(bound.mean(), expected, bound.std() / len(x_0) ** 0.5)
    assert expected > entropy(covariance) + 0.05  # so far from tight that the two differ by many standard errors
    assert bound.std() / len(x_0) ** 0.5 < 0.01


def test_the_bound_approaches_the_entropy_as_steps_are_added():
    """E10: four times the steps leave about a quarter of the gap, in closed form and as the code finds it."""
    x_0, mean, covariance = gaussian_problem(2000)
    gaps = []
    for T in (25, 100, 400):
        schedule = Schedule.linear(T)
        denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
        terms = sum(bound_terms(x_0, denoise, schedule, Rng(0), "beta", decoder=gaussian_log_likelihood))
        off = x_0 - mean
        log_p = (
            -((off @ np.linalg.inv(covariance) * off).sum(axis=1) + np.linalg.slogdet(2 * math.pi * covariance)[1]) / 2
        )
        excess = terms + log_p  # sample by sample, so that the chance in x_0 falls out
        gaps.append(expected_terms(schedule, mean, covariance, "beta").sum() - entropy(covariance))
        within(excess.mean(), gaps[-1], excess.std() / len(x_0) ** 0.5)
    assert all(3 < before / after < 5 for before, after in itertools.pairwise(gaps))
    assert 0 < gaps[-1] < 0.05


# ------------------------------------------------------------------------------- the probability itself


def model_density(x_0, schedule, mean, covariance):
    """log p_theta(x_0) for one-dimensional Gaussian data and the ideal denoiser with sigma_t² = beta_t: the reverse
    steps are linear, so that every p_theta(x_t) is Gaussian; here is what becomes of its mean and variance."""
    m, v = 0.0, 1.0
    network = ideal_x0(schedule, mean, covariance)
    for t in range(schedule.T, 0, -1):
        at_0, at_1 = (
            float(posterior(x, network(x, t), t, schedule)[0][0, 0]) for x in (np.zeros((1, 1)), np.ones((1, 1)))
        )
        m, v = at_0 + (at_1 - at_0) * m, (at_1 - at_0) ** 2 * v + schedule.beta[t]
    return -((x_0[:, 0] - m) ** 2 / v + math.log(2 * math.pi * v)) / 2


def test_the_probability_as_an_average_over_trajectories():
    """E21 (Sohl-Dickstein et al., eq. 6-9): within 5 standard errors of p_theta(x_0), which is known."""
    schedule = quiet([0.1, 0.3, 0.5, 0.7])
    mean, covariance = np.array([0.4]), np.array([[0.5]])
    x_0 = np.array([[-1.0], [0.3], [2.0]])
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    n, exact = 20_000, model_density(x_0, schedule, mean, covariance)
    repeated = np.repeat(x_0, n, axis=0)
    ratios = np.exp(log_likelihood(repeated, denoise, schedule, Rng(4), 1).reshape(3, n) - exact[:, None])
    error = ratios.std(axis=1) / n**0.5
    within(log_likelihood(x_0, denoise, schedule, Rng(3), n), exact, error)
    assert (error < 0.02).all() and (np.log(ratios).mean(axis=1) < -0.01).all()  # Jensen's inequality


def test_one_trajectory_gives_the_bound():
    schedule, x_0 = quiet([0.1, 0.3]), np.array([[-1.0, 0.2], [0.3, 0.0]])
    chain = [x_0, *forward_trajectory(x_0, schedule, Rng(5))]
    denoise = denoiser(lambda x_t, t: 0.3 * x_t, schedule)
    one = log_likelihood(x_0, denoise, schedule, Rng(5), 1)
    np.testing.assert_allclose(one, -trajectory_bound(chain, denoise, schedule), rtol=1e-12)


# ------------------------------------------------------------------------------- a loss for the variance


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


# ------------------------------------------------------------------------------- bad input


def test_bad_input():
    schedule, x_0 = Schedule.linear(10), np.zeros((2, 3))
    for arguments, words in [
        ((1, "learned"), "needs a network that learned one"),
        ((1, "gamma"), "'posterior' or 'beta', got 'gamma'"),
        ((0, "beta"), "1..10 for this schedule, got 0"),
        ((11, "beta"), "1..10 for this schedule, got 11"),
    ]:
        with pytest.raises(ValueError, match=words):
            bound_term(x_0, x_0, arguments[0], guess(x_0), schedule, arguments[1])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        log_likelihood(x_0, guess(x_0), schedule, Rng(0), 0)
    with pytest.raises(ValueError, match="11 states, got 1"):
        trajectory_bound([x_0], guess(x_0), schedule)
