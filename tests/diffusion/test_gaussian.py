"""E1, E2, E4, E12, E15: every reference here knows only the betas, one number at a time."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng, Tensor
from tinydiff.diffusion import (
    Schedule,
    forward_log_density,
    forward_marginal,
    forward_step,
    forward_trajectory,
    learned_log_variance,
    log_density,
    mean_slope,
    posterior,
    predict,
    q_sample,
    reverse_mean,
    target_of,
)

from .common import PROPERTY, alpha_bar, batches, each_t, quiet, schedules, within

N = 4000  # draws in a statistical test
TARGETS = ("eps", "x0", "v")


# ------------------------------------------------------------------------------------ the forward process


@PROPERTY
@given(st.floats(1e-4, 0.999), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 1000))
def test_forward_step_has_its_mean_and_variance(beta, shape, seed):
    """E1, for any beta in (0, 1) and any shape: over 4000 draws, within 5 standard errors."""
    x_prev = np.random.default_rng(seed).normal(size=shape)
    draws = forward_step(np.broadcast_to(x_prev, (N, *shape)), 1, quiet([beta]), Rng(seed))
    within(draws.mean(axis=0), math.sqrt(1 - beta) * x_prev, math.sqrt(beta / N))
    within(draws.var(axis=0, ddof=1), beta, beta * math.sqrt(2 / (N - 1)))


@PROPERTY
@given(schedules(max_T=6), st.floats(-2, 2), st.integers(0, 1000))
def test_trajectory_density_is_the_joint_gaussian(schedule, x_0, seed):
    """E2: x_1..x_T given x_0 are jointly Gaussian with Cov(x_s, x_t) = (1 - abar_s) sqrt(abar_t/abar_s), s <= t."""
    x = np.random.default_rng(seed).normal(size=(2, schedule.T))
    times = range(1, schedule.T + 1)
    mean = np.array([math.sqrt(alpha_bar(schedule, t)[0]) * x_0 for t in times])
    covariance = np.empty((schedule.T, schedule.T))
    for s in times:
        for t in times:
            (first, noise), (later, _) = alpha_bar(schedule, min(s, t)), alpha_bar(schedule, max(s, t))
            covariance[s - 1, t - 1] = noise * math.sqrt(later / first)
    root = np.linalg.cholesky(covariance)
    z = np.linalg.solve(root, (x - mean).T)
    expected = -(z**2).sum(axis=0) / 2 - np.log(np.diag(root)).sum() - schedule.T / 2 * math.log(2 * math.pi)
    trajectory = [np.full((2, 1), x_0), *x.T[:, :, None]]
    np.testing.assert_allclose(forward_log_density(trajectory, schedule), expected, rtol=1e-5, atol=1e-6)


@PROPERTY
@given(batches(arrays=2))
def test_trajectory_density_sums_over_steps_and_dimensions(batch):
    """E2: the log-density is the sum of log N(x_t; sqrt(1 - beta_t) x_{t-1}, beta_t), one number at a time."""
    schedule, _, x_0, x = batch
    trajectory = [x_0, *(x + t / 7 for t in range(schedule.T))]
    expected = np.zeros(len(x_0))
    for t in range(1, schedule.T + 1):
        beta = float(schedule.beta[t])
        for i in np.ndindex(x_0.shape):
            z = (trajectory[t][i] - math.sqrt(1 - beta) * trajectory[t - 1][i]) / math.sqrt(beta)
            expected[i[0]] += math.log(NormalDist().pdf(0) / math.sqrt(beta)) - z**2 / 2
    np.testing.assert_allclose(forward_log_density(trajectory, schedule), expected, rtol=1e-9, atol=1e-9)


def test_log_density_of_nothing_random():
    with pytest.raises(ValueError, match="variance > 0, got 0"):
        log_density(np.zeros((2, 3)), np.zeros((2, 3)), 0.0)
    with pytest.raises(ValueError, match="has 11 states, got 3"):
        forward_log_density([np.zeros((2, 3))] * 3, Schedule.linear(10))


@PROPERTY
@given(batches(first=0, arrays=2))
def test_marginal_composes_the_steps(batch):
    """E4: t steps of E1 have exactly this mean and variance; t = 0 gives x_0 back."""
    schedule, t, x_0, eps = batch
    x_t, (mean, std) = q_sample(x_0, t, eps, schedule), forward_marginal(x_0, t, schedule)
    std = np.broadcast_to(std, x_0.shape)
    for b, steps in enumerate(each_t(t, len(x_0))):
        composed, variance = x_0[b], 0.0
        for beta in schedule.beta[1 : steps + 1].tolist():
            composed, variance = math.sqrt(1 - beta) * composed, (1 - beta) * variance + beta
        np.testing.assert_allclose(mean[b], composed, rtol=1e-10)
        np.testing.assert_allclose(std[b], math.sqrt(variance), rtol=1e-10)
        np.testing.assert_allclose(x_t[b], composed + math.sqrt(variance) * eps[b], rtol=1e-10, atol=1e-12)
        if steps == 0:
            np.testing.assert_array_equal(x_t[b], x_0[b])


@PROPERTY
@given(schedules(max_T=8), st.floats(-2, 2), st.integers(0, 1000))
def test_simulated_chains_have_the_marginal(schedule, x_0, seed):
    """E4 and E2: 4000 chains of E1 steps, at every t within 5 standard errors."""
    chains = list(forward_trajectory(np.full((N, 1), x_0), schedule, Rng(seed)))
    assert len(chains) == schedule.T
    for t, x_t in enumerate(chains, start=1):
        signal, variance = alpha_bar(schedule, t)
        within(x_t.mean(), math.sqrt(signal) * x_0, math.sqrt(variance / N))
        within(x_t.var(ddof=1), variance, variance * math.sqrt(2 / (N - 1)))


def test_equal_seeds_give_equal_trajectories():
    x_0, schedule = np.ones((2, 3), np.float32), Schedule.linear(20)
    one, two, other = (list(forward_trajectory(x_0, schedule, Rng(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


# --------------------------------------------------------------------------------------- one step backward


@PROPERTY
@given(batches(arrays=2))
def test_posterior_is_bayes_rule(batch):
    """E12: q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), a product of two Gaussians."""
    schedule, t, x_0, x_t = batch
    mean, variance = posterior(x_t, x_0, t, schedule)
    variance = np.broadcast_to(variance, x_t.shape)
    for b, step in enumerate(each_t(t, len(x_0))):
        beta = float(schedule.beta[step])
        signal, noise = alpha_bar(schedule, step - 1)
        if step == 1:  # x_{t-1} is x_0 itself
            np.testing.assert_allclose(mean[b], x_0[b], rtol=1e-9)
            assert (variance[b] == 0).all()
            continue
        precision = (1 - beta) / beta + 1 / noise  # of the likelihood, as a function of x_{t-1}, and of the prior
        pull = math.sqrt(1 - beta) / beta * x_t[b] + math.sqrt(signal) / noise * x_0[b]
        np.testing.assert_allclose(mean[b], pull / precision, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(variance[b], 1 / precision, rtol=1e-9)


@PROPERTY
@given(batches(arrays=2))
def test_both_forms_of_the_posterior_mean_agree(batch):
    """E12 and E15: from x_0, and from the noise that made x_t."""
    schedule, t, x_0, eps = batch
    x_t = q_sample(x_0, t, eps, schedule)
    from_x0, _ = posterior(x_t, x_0, t, schedule)
    # At t = T the noise form divides a small difference by sqrt(alpha_T), which may be 0.03.
    np.testing.assert_allclose(reverse_mean(x_t, eps, t, schedule), from_x0, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------ what the network predicts


@PROPERTY
@given(batches(arrays=2))
def test_targets_are_their_formulas(batch):
    """E15: eps, x_0 and v = sqrt(abar) eps - sqrt(1 - abar) x_0."""
    schedule, t, x_0, eps = batch
    np.testing.assert_array_equal(target_of(x_0, eps, t, schedule, "eps"), eps)
    np.testing.assert_array_equal(target_of(x_0, eps, t, schedule, "x0"), x_0)
    v = target_of(x_0, eps, t, schedule, "v")
    for b, step in enumerate(each_t(t, len(x_0))):
        signal, noise = alpha_bar(schedule, step)
        np.testing.assert_allclose(v[b], math.sqrt(signal) * eps[b] - math.sqrt(noise) * x_0[b], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.cosine])
@pytest.mark.parametrize("target", TARGETS)
def test_round_trip_at_every_t(make, target):
    """E15: from the target back to x_0 and eps, for every t in 1..T of the shipped schedules, in one mixed batch."""
    schedule = make(1000)
    t = np.arange(1, 1001)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 1000, 3))
    x_t = q_sample(x_0, t, eps, schedule)
    x0, noise, _ = predict(target_of(x_0, eps, t, schedule, target), x_t, t, schedule, target)
    np.testing.assert_allclose(x0, x_0, atol=1e-10)
    np.testing.assert_allclose(noise, eps, atol=1e-10)


@PROPERTY
@given(batches(arrays=2), st.sampled_from(TARGETS), st.sampled_from(TARGETS))
def test_round_trip_through_any_pair_of_targets(batch, target, other):
    """E15: output for one target -> prediction -> output for another target -> the same prediction."""
    schedule, t, output, x_t = batch
    guess = predict(output, x_t, t, schedule, target)
    again = predict(target_of(guess.x0, guess.eps, t, schedule, other), x_t, t, schedule, other)
    # The size of what is added up, times rounding, times the worse of the two magnifications that follow.
    scale = (np.abs(guess.x0).max() + np.abs(guess.eps).max() + 1) / min(
        schedule.alpha_bar[-1] ** 0.5, schedule.beta[1:].min() ** 0.5
    )
    np.testing.assert_allclose(again.x0, guess.x0, rtol=1e-9, atol=1e-14 * scale)
    np.testing.assert_allclose(again.eps, guess.eps, rtol=1e-9, atol=1e-14 * scale)
    np.testing.assert_allclose(q_sample(guess.x0, t, guess.eps, schedule), x_t, atol=1e-14 * scale)


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.cosine])
@pytest.mark.parametrize("target", TARGETS)
def test_predictions_are_stable_in_float32_at_both_ends(make, target):
    """E15: whatever the output, the predicted x_0 and eps still make up x_t, to float32 rounding."""
    schedule = make(1000)
    rng = np.random.default_rng(0)
    for t in (1, 2, 999, 1000):
        output, x_t = rng.normal(size=(2, 100)).astype(np.float32)
        x0, eps, _ = predict(output, x_t, t, schedule, target)
        assert x0.dtype == eps.dtype == np.float32 and np.isfinite(x0).all() and np.isfinite(eps).all()
        signal, noise = schedule.alpha_bar[t] ** 0.5, (1 - schedule.alpha_bar[t]) ** 0.5
        np.testing.assert_allclose(signal * x0.astype(float) + noise * eps.astype(float), x_t, atol=2e-6)


def normal_density(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def kl_from_gaussian(density, grid):
    """The divergence of a density on a grid from the Gaussian with its mean and variance, in nats."""
    step = grid[1] - grid[0]
    mean = (density * grid).sum() * step
    variance = (density * (grid - mean) ** 2).sum() * step
    best = normal_density(grid, mean, variance)
    return (density * np.log((density + 1e-300) / (best + 1e-300))).sum() * step


def test_the_exact_reverse_is_nearly_gaussian_for_small_beta():
    """E9: q(x_{t-1} | x_t) of data in two clusters, by Bayes' rule on E1, nears a Gaussian faster than beta nears 0."""
    grid = np.linspace(-4, 4, 4001)
    clusters = (normal_density(grid, -1, 0.1) + normal_density(grid, 1, 0.1)) / 2
    divergences = []
    for beta in (0.3, 0.1, 0.03, 0.01, 0.003):
        mean, std = forward_marginal(grid, 1, quiet([beta]))
        reverses = [clusters * normal_density(x_t, mean, std**2) for x_t in (-1.0, -0.3, 0.0, 0.5)]
        reverses = [reverse / reverse.sum() / (grid[1] - grid[0]) for reverse in reverses]
        divergences.append(max(kl_from_gaussian(reverse, grid) for reverse in reverses))
    assert all(later < earlier for earlier, later in itertools.pairwise(divergences))
    assert divergences[0] > 0.1 and divergences[-1] < divergences[0] / 100


@PROPERTY
@given(batches(arrays=3), st.sampled_from(TARGETS))
def test_the_slope_of_the_mean(batch, target):
    """E12, E15: an error in the output, whatever the target, moves the mean of x_{t-1} by slope times the error."""
    schedule, t, x_0, eps, error = batch
    x_t = q_sample(x_0, t, eps, schedule)
    right = target_of(x_0, eps, t, schedule, target)
    means = [
        posterior(x_t, predict(output, x_t, t, schedule, target).x0, t, schedule)[0]
        for output in (right, right + error)
    ]
    slope = np.reshape(mean_slope(t, schedule, target), (-1, *[1] * (x_0.ndim - 1)))
    largest = np.abs(means[1]).max() + np.abs(slope).max()
    np.testing.assert_allclose(means[1] - means[0], slope * error, rtol=1e-7, atol=1e-9 * largest)


@PROPERTY
@given(batches(arrays=1))
def test_a_learned_variance_lies_between_the_fixed_ones(batch):
    """E13: sigma² = beta^v beta_tilde^(1 - v), a geometric mean; beta_tilde_1 = 0 is replaced by beta_tilde_2."""
    schedule, t, v = batch
    sigma_squared = np.exp(learned_log_variance(v, t, schedule))
    for row, exponent, time in zip(sigma_squared, v, each_t(t, len(v)), strict=True):
        beta, at = schedule.beta[time], max(time, 2)
        if schedule.T == 1:
            beta_tilde = beta
        else:
            beta_tilde = schedule.beta[at] * alpha_bar(schedule, at - 1)[1] / alpha_bar(schedule, at)[1]
        np.testing.assert_allclose(row, beta**exponent * beta_tilde ** (1 - exponent), rtol=1e-9)


# -------------------------------------------------------------------------------- kinds of arrays, bad input


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("t", [3, np.array([1, 10])])
def test_dtype_is_kept(dtype, t):
    schedule, x = Schedule.linear(10), np.ones((2, 3), dtype)
    results = [
        q_sample(x, t, x, schedule),
        forward_step(x, t, schedule, Rng(0)),
        *forward_marginal(x, t, schedule)[:1],
        *posterior(x, x, t, schedule)[:1],
        reverse_mean(x, x, t, schedule),
        target_of(x, x, t, schedule, "v"),
        *(value for target in TARGETS for value in predict(x, x, t, schedule, target)[:2]),
        learned_log_variance(x, t, schedule),
    ]
    assert {value.dtype for value in results} == {np.dtype(dtype)}


@pytest.mark.parametrize("t", [3, np.array([1, 10])])
def test_tensors_give_what_arrays_give(t):
    schedule = Schedule.linear(10)
    a, b = np.random.default_rng(0).normal(size=(2, 2, 3, 4))
    ta, tb = Tensor(a), Tensor(b)
    pairs = [
        (q_sample(ta, t, tb, schedule), q_sample(a, t, b, schedule)),
        (posterior(ta, tb, t, schedule)[0], posterior(a, b, t, schedule)[0]),
        (reverse_mean(ta, tb, t, schedule), reverse_mean(a, b, t, schedule)),
        *zip(predict(ta, tb, t, schedule, "v")[:2], predict(a, b, t, schedule, "v")[:2], strict=True),
        (learned_log_variance(ta, t, schedule), learned_log_variance(a, t, schedule)),
    ]
    for tensor, array in pairs:
        np.testing.assert_array_equal(tensor.data, array)


@pytest.mark.parametrize("t", [0, 11])
def test_t_outside_its_range(t):
    schedule, x = Schedule.linear(10), np.ones((2, 3))
    calls = [
        lambda: forward_step(x, t, schedule, Rng(0)),
        lambda: posterior(x, x, t, schedule),
        lambda: reverse_mean(x, x, t, schedule),
        lambda: predict(x, x, t, schedule),
        lambda: target_of(x, x, t, schedule),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"t must lie in 1\.\.10 .* got {t}"):
            call()
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.10 .* got 11"):
        q_sample(x, 11, x, schedule)


def test_shapes_that_do_not_fit():
    schedule, x, y = Schedule.linear(10), np.ones((2, 3)), np.ones((2, 1))
    calls = [
        lambda: q_sample(x, 1, y, schedule),
        lambda: posterior(x, y, 1, schedule),
        lambda: reverse_mean(x, y, 1, schedule),
        lambda: predict(x, y, 1, schedule),
        lambda: target_of(x, y, 1, schedule),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"must have one shape, got \(2, 3\) and \(2, 1\)"):
            call()


def test_unknown_target():
    schedule, x = Schedule.linear(10), np.ones((2, 3))
    for call in (predict, target_of, lambda _, __, *rest: mean_slope(*rest)):
        with pytest.raises(ValueError, match="'eps', 'x0' or 'v', got 'score'"):
            call(x, x, 1, schedule, "score")


@pytest.mark.parametrize("t", [10, np.array([1, 10, 4])])
def test_eps_tells_nothing_at_a_zero_terminal_snr(t):
    """There every x_0 agrees with x_t = eps; v = -x_0, and x_0 itself, still say all."""
    zero, x = Schedule.linear(10).zero_terminal_snr(), np.ones((3, 2))
    for function in (lambda: predict(x, x, t, zero, "eps"), lambda: reverse_mean(x, x, t, zero)):
        with pytest.raises(ValueError, match=r"eps does not tell x_0 at t = 10.*'v' or 'x0'"):
            function()
    assert np.isfinite(predict(x, x, np.array([1, 9, 4]), zero, "eps").x0).all()
    last = predict(0.3 * x, x, 10, zero, "v")
    np.testing.assert_allclose(last.x0, -0.3 * x)
    np.testing.assert_allclose(last.eps, x)
    np.testing.assert_allclose(predict(0.3 * x, x, 10, zero, "x0").eps, x)
    mean, variance = posterior(x, 0.3 * x, 10, zero)
    np.testing.assert_allclose(mean, math.sqrt(zero.alpha_bar[9]) * 0.3 * x)
    np.testing.assert_allclose(variance, 1 - zero.alpha_bar[9])
