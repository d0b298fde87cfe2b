"""E16, E17, E18: the loss, its weights, and what the slide's misprint would do to it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng, Tensor
from tinydiff.diffusion import (
    Schedule,
    draw_t,
    min_snr_weight,
    posterior,
    predict,
    q_sample,
    reverse_mean,
    simple_loss,
    target_of,
    vlb_weight,
)

from .common import PROPERTY, alpha_bar, batches, each_t, within

TARGETS = ("eps", "x0", "v")


def constant(output):
    """A network that always gives this output."""
    return lambda x_t, t: Tensor(output)


@PROPERTY
@given(batches(arrays=2), st.sampled_from(TARGETS))
def test_perfect_network_has_no_loss(batch, target):
    """E17."""
    schedule, t, x_0, eps = batch
    perfect = constant(target_of(x_0, eps, t, schedule, target))
    assert simple_loss(perfect, x_0, t, eps, schedule, target).item() == 0


@PROPERTY
@given(batches(arrays=3), st.booleans())
def test_simple_loss_is_the_mean_squared_error(batch, weighted):
    """E17, one number at a time; with a weight, each sample's error counts that often."""
    schedule, t, x_0, eps, output = batch
    weight = np.linspace(0.5, 2, len(x_0)) if weighted else None
    total = 0.0
    for i in np.ndindex(x_0.shape):
        total += (output[i] - eps[i]) ** 2 * (weight[i[0]] if weighted else 1)
    loss = simple_loss(constant(output), x_0, t, eps, schedule, weight=weight)
    assert isinstance(loss, Tensor) and loss.shape == ()
    np.testing.assert_allclose(loss.item(), total / x_0.size, rtol=1e-10)


@PROPERTY
@given(batches(arrays=2), st.sampled_from(TARGETS))
def test_network_sees_x_t_and_t(batch, target):
    """E17: with the bars. x_t by the product of alphas, one number at a time."""
    schedule, t, x_0, eps = batch
    seen = []

    def network(x_t, t):
        seen.extend([x_t, t])
        return Tensor(x_t)

    simple_loss(network, x_0, t, eps, schedule, target)
    x_t, given_t = seen
    assert given_t is t
    for b, step in enumerate(each_t(t, len(x_0))):
        signal, noise = alpha_bar(schedule, step)
        np.testing.assert_allclose(x_t[b], math.sqrt(signal) * x_0[b] + math.sqrt(noise) * eps[b], atol=1e-9)


def test_slide_misprint_is_another_training_problem():
    """E17 as printed, sqrt(alpha_t) for sqrt(alpha_bar_t): at t = T the network would see an almost clean image."""
    schedule = Schedule.linear(1000)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 5000, 1))
    seen = []
    simple_loss(lambda x_t, t: seen.append(x_t) or Tensor(x_t), x_0, 1000, eps, schedule)
    misprint = math.sqrt(1 - 0.02) * x_0 + math.sqrt(0.02) * eps

    def correlation(x_t):
        return np.corrcoef(x_t.ravel(), x_0.ravel())[0, 1]

    assert correlation(misprint) > 0.98
    assert abs(correlation(seen[0])) < 5 / math.sqrt(5000)


def test_blind_network_has_loss_one():
    """E17: || eps - 0 ||² averages to 1, within 5 standard errors."""
    x_0, eps = np.zeros((20000, 2)), Rng(0).normal((20000, 2), np.float64)
    loss = simple_loss(constant(np.zeros_like(eps)), x_0, 5, eps, Schedule.linear(10)).item()
    within(loss, 1, math.sqrt(2 / eps.size))


@PROPERTY
@given(batches(arrays=3), st.sampled_from(TARGETS))
def test_loss_gradient(batch, target):
    """The gradient with respect to the output is 2 weight (output - target)/size."""
    schedule, t, x_0, eps, guess = batch
    output, weight = Tensor(guess, requires_grad=True), np.arange(1.0, len(x_0) + 1)
    simple_loss(lambda x_t, t: output, x_0, t, eps, schedule, target, weight).backward()
    wanted = target_of(x_0, eps, t, schedule, target)
    factor = 2 * weight.reshape(-1, *[1] * (x_0.ndim - 1)) / x_0.size
    np.testing.assert_allclose(output.grad, factor * (guess - wanted), rtol=1e-10, atol=1e-14)


@PROPERTY
@given(batches(arrays=3), st.sampled_from(["beta", "posterior"]))
def test_vlb_weight_turns_the_simple_loss_into_the_kl(batch, variance):
    """E16: weight · L_simple is the part of KL(q(x_{t-1} | x_t, x_0) to p_theta(x_{t-1} | x_t)) that theta decides.

    The KL of N(m, a I) to N(n, c I) is, per dimension, (log(c/a) + a/c - 1 + (m - n)²/c)/2.
    """
    schedule, t, x_0, eps, guess = batch
    t = np.maximum(t, 2) if np.ndim(t) else max(t, 2)
    if schedule.T < 2:
        return
    x_t = q_sample(x_0, t, eps, schedule)
    mean, a = posterior(x_t, x_0, t, schedule)
    steps = np.array(each_t(t, len(x_0))).reshape(-1, *[1] * (x_0.ndim - 1))
    c = schedule.beta[steps] if variance == "beta" else a

    def kl(n):
        return ((np.log(c / a) + a / c - 1 + (mean - n) ** 2 / c) / 2).mean()

    theta = kl(reverse_mean(x_t, guess, t, schedule))
    perfect = kl(mean)
    loss = simple_loss(constant(guess), x_0, t, eps, schedule, weight=vlb_weight(t, schedule, variance))
    np.testing.assert_allclose(loss.item(), theta - perfect, rtol=1e-6, atol=1e-9 * (1 + perfect))


def test_vlb_weight_of_the_first_step():
    """sigma_1 = 0 with the posterior variance: the term of t = 1 is L_0, which has another formula."""
    schedule = Schedule.linear(10)
    assert math.isfinite(vlb_weight(1, schedule, "beta"))
    with pytest.raises(ValueError, match=r"t must lie in 2\.\.10 .* got 1"):
        vlb_weight(1, schedule, "posterior")
    with pytest.raises(ValueError, match="'posterior' or 'beta', got 'learned'"):
        vlb_weight(2, schedule, "learned")


@PROPERTY
@given(batches(arrays=3), st.floats(0.1, 20))
def test_min_snr_weighs_the_error_in_x0_alike_for_every_target(batch, gamma):
    """Hang et al. 2023: min(SNR, gamma) || x_0 - x_0' ||², whatever the network outputs."""
    schedule, t, x_0, eps, wrong = batch
    x_t = q_sample(x_0, t, eps, schedule)
    guess = predict(wrong, x_t, t, schedule, "x0")
    expected = 0.0
    for b, step in enumerate(each_t(t, len(x_0))):
        signal, noise = alpha_bar(schedule, step)
        expected += min(signal / noise, gamma) * ((wrong[b] - x_0[b]) ** 2).sum() / x_0.size
    for target in TARGETS:
        output = constant(target_of(guess.x0, guess.eps, t, schedule, target))
        weight = min_snr_weight(t, schedule, gamma, target)
        loss = simple_loss(output, x_0, t, eps, schedule, target, weight).item()
        np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-14)  # errors below rounding of x_t


def test_draw_t_is_uniform_from_one_to_T():
    """E18: every t in 1..T as often as any other, within 5 standard errors, and on the host."""
    t = draw_t(Rng(0), 50000, 10)
    assert type(t) is np.ndarray and t.dtype == np.int64 and t.shape == (50000,)
    counts = np.bincount(t, minlength=12)
    assert counts[0] == counts[11] == 0
    within(counts[1:11] / 50000, 0.1, math.sqrt(0.1 * 0.9 / 50000))
    np.testing.assert_array_equal(t, draw_t(Rng(0), 50000, 10))


@pytest.mark.parametrize("n", [1, 7, 50, 64])
def test_draw_t_stratified(n):
    """One t from each of n equal parts of 1..T, and every t equally often over many batches."""
    T, counts = 50, np.zeros(52)
    for seed in range(600):
        t = draw_t(Rng(seed), n, T, stratified=True)
        part = T / n * np.arange(n + 1)
        assert t.dtype == np.int64 and (t - 1 < part[1:]).all() and (t > part[:-1]).all()
        counts += np.bincount(t, minlength=52)
    expected = 600 * n / T
    assert counts[0] == counts[51] == 0 and np.abs(counts[1:51] - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(dtype):
    schedule, x, t = Schedule.linear(10), np.ones((2, 3), dtype), np.array([1, 10])
    for weight in (None, 0.5, min_snr_weight(t, schedule)):
        assert simple_loss(constant(x), x, t, x, schedule, weight=weight).dtype == dtype


def test_bad_input():
    schedule, x = Schedule.linear(10), np.ones((2, 3))
    with pytest.raises(ValueError, match=r"shape of x_t, \(2, 3\), got \(3,\)"):
        simple_loss(constant(np.ones(3)), x, 1, x, schedule)
    with pytest.raises(ValueError, match=r"one number a sample, \(2,\) for x \(2, 3\), got \(3,\)"):
        simple_loss(constant(x), x, 1, x, schedule, weight=np.ones(3))
    for t in (0, 11):
        with pytest.raises(ValueError, match=r"t must lie in"):
            simple_loss(constant(x), x, t, x, schedule)
    with pytest.raises(ValueError, match="'eps', 'x0' or 'v', got 'score'"):
        simple_loss(constant(x), x, 1, x, schedule, "score")
    with pytest.raises(ValueError, match="'eps', 'x0' or 'v', got 'score'"):
        min_snr_weight(1, schedule, target="score")
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        min_snr_weight(1, schedule, gamma=0)


def test_min_snr_weight_at_a_zero_terminal_snr():
    """min(SNR, gamma)/SNR tends to 1 as SNR falls to 0; an error in x_0 counts for nothing there."""
    zero = Schedule.linear(10).zero_terminal_snr()
    with np.errstate(all="raise"):
        weights = {target: min_snr_weight(10, zero, target=target) for target in TARGETS}
    assert weights == {"eps": 1, "x0": 0, "v": 0}
