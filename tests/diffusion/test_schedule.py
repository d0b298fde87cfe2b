"""E3, E5, E6, E7, later schedules, those made from another schedule, and the look-up of tables."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Tensor
from tinydiff.diffusion import Schedule
from tinydiff.diffusion.schedule import at

from .common import PROPERTY, alpha_bar, quiet, schedules


@PROPERTY
@given(schedules())
def test_alpha_bar_is_the_product_of_alphas_and_falls_from_one(schedule):
    """E3."""
    for t in range(schedule.T + 1):
        product, rest = alpha_bar(schedule, t)
        np.testing.assert_allclose(schedule.alpha_bar[t], product, rtol=1e-12)
        np.testing.assert_allclose(schedule.one_minus_alpha_bar[t], rest, rtol=1e-12)
    assert schedule.alpha_bar[0] == 1 and schedule.one_minus_alpha_bar[0] == 0
    assert (np.diff(schedule.alpha_bar) < 0).all() and (schedule.alpha_bar > 0).all()
    np.testing.assert_array_equal(schedule.alpha, 1 - schedule.beta)


def test_tiny_betas_keep_their_noise():
    """1 - alpha_bar computed as a difference would be 0 here."""
    schedule = quiet([1e-18, 3e-18])
    np.testing.assert_allclose(schedule.one_minus_alpha_bar, [0, 1e-18, 4e-18], rtol=1e-12)


@PROPERTY
@given(schedules())
def test_snr_and_previous_tables(schedule):
    for t in range(1, schedule.T + 1):
        signal, noise = alpha_bar(schedule, t)
        before, noise_before = alpha_bar(schedule, t - 1)
        np.testing.assert_allclose(schedule.snr[t], signal / noise, rtol=1e-10)
        np.testing.assert_allclose(schedule.alpha_bar_prev[t], before, rtol=1e-10)
        np.testing.assert_allclose(schedule.one_minus_alpha_bar_prev[t], noise_before, rtol=1e-10)
    assert schedule.snr[0] == np.inf and np.isnan(schedule.alpha_bar_prev[0])


@PROPERTY
@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=5), st.floats(-2, 2))
def test_terminal_kl_is_the_integral(betas, x_0):
    """E5: KL(q(x_T | x_0) to N(0, I)) by the trapezium rule on a fine grid."""
    schedule = quiet(betas)
    signal, noise = alpha_bar(schedule, schedule.T)
    mean, std = math.sqrt(signal) * x_0, math.sqrt(noise)
    z = np.linspace(-12, 12, 20001)
    x = mean + std * z
    log_q, log_p = -(z**2) / 2 - math.log(std), -(x**2) / 2
    kl = np.trapezoid(np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (log_q - log_p), z)
    np.testing.assert_allclose(schedule.terminal_kl(x_0), kl, rtol=1e-6, atol=1e-9)


def test_terminal_kl_averages_over_entries():
    schedule = Schedule.linear(100)
    x_0 = np.array([[0.5, -1.0], [0.0, 0.25]])
    one_by_one = [schedule.terminal_kl(v) for v in x_0.flat]
    np.testing.assert_allclose(schedule.terminal_kl(x_0), np.mean(one_by_one))


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.cosine, Schedule.sigmoid])
@pytest.mark.parametrize("T", [2, 5, 20, 21, 100, 1000, 4000])
def test_shipped_schedules_end_in_noise_without_a_warning(make, T):
    """E5: below a thousandth of a nat per dimension, for any number of steps but one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= make(T).terminal_kl() < 1e-3


def test_schedule_that_keeps_signal_warns_with_its_kl():
    """E5: alpha_bar_T = 0.5 gives KL = log(2)/2 = 0.35 nats."""
    with pytest.warns(UserWarning, match=r"alpha_bar_T = 0.5 is not near 0.* 0.35 nats"):
        Schedule.from_betas([0.5])


def test_linear_endpoints():
    """E6: Ho et al.'s schedule, and the same curve for other T."""
    schedule = Schedule.linear(1000)
    np.testing.assert_allclose(schedule.beta[[1, 1000]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(np.diff(schedule.beta[1:]), (0.02 - 1e-4) / 999, rtol=1e-9)
    np.testing.assert_allclose(schedule.alpha_bar[1000], 4e-5, rtol=0.02)
    np.testing.assert_allclose(Schedule.linear(250).beta[[1, 250]], [4e-4, 0.08], rtol=1e-12)
    assert Schedule.linear(10).beta.max() == 0.999


def test_cosine_follows_its_formula():
    """E7: alpha_bar_t = f(t)/f(0) up to the clip at the end."""
    T = 1000
    schedule = Schedule.cosine(T)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    np.testing.assert_allclose(schedule.alpha_bar[:T], np.array(f[:T]) / f[0], rtol=1e-9)
    assert schedule.beta[T] == 0.999 and schedule.beta.max() == 0.999


@pytest.mark.parametrize("T", [50, 100, 1000])
def test_cosine_loses_signal_more_slowly_than_linear(T):
    """E7, at every t/T in the middle; both ends are finite."""
    linear, cosine = Schedule.linear(T), Schedule.cosine(T)
    middle = slice(T // 10, 9 * T // 10 + 1)
    assert (cosine.alpha_bar[middle] > linear.alpha_bar[middle]).all()
    for table in (cosine.alpha_bar, cosine.snr[1:], cosine.posterior_variance[1:], 1 / cosine.alpha_bar):
        assert np.isfinite(table).all()


def test_scaled_linear_endpoints():
    """Stable Diffusion's schedule; its alpha_bar_T as in Lin et al. 2023, table 1, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = Schedule.scaled_linear(1000)
        assert all(Schedule.scaled_linear(T).terminal_kl() < 0.003 for T in (2, 5, 12, 13, 100, 4000))
    np.testing.assert_allclose(schedule.beta[[1, 1000]], [0.00085, 0.012], rtol=1e-12)
    np.testing.assert_allclose(np.diff(np.sqrt(schedule.beta[1:]), 2), 0, atol=1e-14)
    np.testing.assert_allclose(math.sqrt(schedule.alpha_bar[1000]), 0.068265, rtol=1e-4)
    np.testing.assert_allclose(Schedule.scaled_linear(250).beta[[1, 250]], [0.0034, 0.048], rtol=1e-12)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1), (0, 3, 0.7), (-3, 1, 0.3), (-3, 3, 50)])
def test_sigmoid_follows_its_formula(start, end, tau):
    """Chen 2023, Algorithm 1, up to the clip at the end; a large tau makes it a straight line."""
    T = 100
    schedule = Schedule.sigmoid(T, start, end, tau)
    s = [1 / (1 + math.exp(-(start + (end - start) * t / T) / tau)) for t in range(T + 1)]
    expected = [(s[T] - value) / (s[T] - s[0]) for value in s[:T]]
    np.testing.assert_allclose(schedule.alpha_bar[:T], expected, rtol=1e-8)
    assert schedule.beta[T] == 0.999
    if tau == 50:
        np.testing.assert_allclose(schedule.alpha_bar[:T], 1 - np.arange(T) / T, atol=1e-3)


@pytest.mark.parametrize(("start", "end", "tau"), [(3, -3, 1), (1, 1, 1), (-3, 3, 0), (-3, 3, -1), (math.nan, 3, 1)])
def test_bad_sigmoid(start, end, tau):
    with pytest.raises(ValueError, match=rf"start < end and tau > 0, got {start}, {end} and {tau}"):
        Schedule.sigmoid(10, start, end, tau)


@pytest.mark.parametrize(("start", "end"), [(-3, 3), (0, 3), (-3, 0)])
def test_a_sigmoid_that_is_flat_is_refused(start, end):
    with pytest.raises(ValueError, match=r"the sigmoid is flat near .* with tau = 0\.01: use a larger tau"):
        Schedule.sigmoid(100, start, end, 0.01)


@PROPERTY
@given(schedules(min_T=2))
def test_zero_terminal_snr_is_the_papers_algorithm(schedule):
    """Lin et al. 2023, Algorithm 1, one number at a time; alpha_bar_1 stays, alpha_bar_T is 0 to the last bit."""
    roots = [math.sqrt(alpha_bar(schedule, t)[0]) for t in range(1, schedule.T + 1)]
    first, last = roots[0], roots[-1]
    expected = [((root - last) * first / (first - last)) ** 2 for root in roots]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero = schedule.zero_terminal_snr()
        assert zero.log_alpha_bar[-1] == zero.half_log_snr[-1] == -math.inf
        assert not np.isnan(np.concatenate([zero.posterior_variance[1:], zero.posterior_log_variance[1:]])).any()
    np.testing.assert_allclose(zero.alpha_bar[1:], expected, rtol=1e-6, atol=1e-15)
    assert zero.alpha_bar[-1] == zero.snr[-1] == zero.terminal_kl() == 0
    assert zero.beta[-1] == zero.one_minus_alpha_bar[-1] == 1


def test_zero_terminal_snr_of_one_step():
    with pytest.raises(ValueError, match="T >= 2, got 1"):
        Schedule.cosine(1).zero_terminal_snr()


@PROPERTY
@given(st.integers(5, 50), st.floats(0.1, 8))
def test_shifted_divides_the_signal_over_noise(T, ratio):
    """Hoogeboom et al. 2023: log SNR moves by 2 log ratio, but where beta is clipped."""
    schedule = Schedule.linear(1000).respaced(range(1000 // T, 1001, 1000 // T))
    shifted = schedule.shifted(ratio)
    assert (shifted.beta < 0.999).all() and shifted.T == schedule.T
    np.testing.assert_allclose(np.log(shifted.snr[1:]), np.log(schedule.snr[1:]) - 2 * math.log(ratio), atol=1e-6)


def test_shifted_keeps_an_end_without_signal():
    assert Schedule.cosine(20).shifted(4).terminal_kl() < 1e-4
    for ratio in (0, -1, math.nan):
        with pytest.raises(ValueError, match="must be above 0"):
            Schedule.cosine(20).shifted(ratio)


@PROPERTY
@given(schedules(), st.data())
def test_respaced(schedule, data):
    """Nichol & Dhariwal 2021, section 4: the kept times have the alpha_bar they had, whatever their order."""
    times = data.draw(st.lists(st.integers(1, schedule.T), min_size=1, unique=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = schedule.respaced(times)
    assert few.T == len(times)
    before = 0
    for i, t in enumerate(sorted(times), 1):
        np.testing.assert_allclose(few.alpha_bar[i], alpha_bar(schedule, t)[0], rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(few.one_minus_alpha_bar[i], alpha_bar(schedule, t)[1], rtol=1e-10)
        alphas = [Fraction(1) - Fraction(float(beta)) for beta in schedule.beta[before + 1 : t + 1]]
        np.testing.assert_allclose(few.beta[i], float(1 - math.prod(alphas)), rtol=1e-9)
        before = t


def test_respaced_survives_rounding():
    """1 - beta_1 = 1e-18 is less than half a unit in the last place of 1."""
    few = quiet([0.999] * 12).respaced([6, 12])
    assert 0 < few.alpha_bar[2] < few.alpha_bar[1] < 2e-16


def test_respaced_keeps_a_zero_terminal_snr():
    zero = Schedule.linear(20).zero_terminal_snr()
    assert zero.respaced([20, 3, 10]).alpha_bar[-1] == 0
    assert zero.respaced([20]).beta.tolist() == [0, 1]
    np.testing.assert_allclose(zero.respaced(range(1, 21)).beta, zero.beta, rtol=1e-12)


@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        ([], ValueError, r"one or more different times, got \[\]"),
        ([3, 5, 3], ValueError, r"different times, got \[3, 3, 5\]"),
        ([0, 5], ValueError, r"1\.\.10 .*got 0"),
        ([5, 11], ValueError, r"1\.\.10 .*got 11"),
        ([2.5, 5], TypeError, "whole number"),
    ],
)
def test_bad_times_to_respace(times, error, message):
    with pytest.raises(error, match=message):
        Schedule.linear(10).respaced(times)


def test_reverse_variance_offers_both_choices():
    """E13."""
    schedule = Schedule.linear(50)
    assert schedule.reverse_variance("beta") is schedule.beta
    assert schedule.reverse_variance("posterior") is schedule.posterior_variance
    assert (schedule.posterior_variance[1:] < schedule.beta[1:]).all()
    with pytest.raises(ValueError, match="'posterior' or 'beta', got 'learned'"):
        schedule.reverse_variance("learned")


@pytest.mark.parametrize("T", [0, -3, 2.5, "10"])
@pytest.mark.parametrize("make", [Schedule.linear, Schedule.cosine, Schedule.scaled_linear, Schedule.sigmoid])
def test_too_few_steps(make, T):
    with pytest.raises(ValueError, match="T >= 1, got"):
        make(T)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_beta_outside_its_range(beta):
    with pytest.raises(ValueError, match=r"inside \(0, 1\), .*got beta_2"):
        Schedule.from_betas([0.1, beta, 0.2])


def test_other_bad_betas():
    with pytest.raises(ValueError, match="T >= 1"):
        Schedule.from_betas([])
    with pytest.raises(ValueError, match="beta must be"):
        Schedule(np.array([0.1, 0.2]))
    for betas in ([0.999] * 21, [0.999] * 200, [0.999] * 21 + [1]):
        with pytest.raises(ValueError, match="at least 1e-60"):
            Schedule.from_betas(betas)
    with pytest.raises(ValueError, match=r"only beta_T may be 1, got beta_1 = 1.0"):
        Schedule.from_betas([1, 1])


def test_the_last_beta_may_be_one():
    assert Schedule.from_betas([0.1, 1]).alpha_bar.tolist() == [1, 0.9, 0]


def test_a_schedule_cannot_be_changed():
    betas = np.array([0.0, 0.5, 0.9999])
    schedule = Schedule(betas)
    betas[1] = 0.1
    assert schedule.beta[1] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        schedule.beta[1] = 0.1
    with pytest.raises(AttributeError):
        schedule.beta = betas


def test_repr_says_what_matters():
    assert repr(Schedule.linear(1000)) == "Schedule(T=1000, beta_1=0.0001, beta_T=0.02, alpha_bar_T=4.04e-05)"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("wrap", [np.asarray, Tensor])
def test_look_up(dtype, wrap):
    """One t gives a number, t a sample gives (B, 1, 1, ...) in x's dtype."""
    table = np.arange(11) / 7
    x = wrap(np.zeros((3, 2, 5, 1), dtype))
    assert at(table, 4, x) == 4 / 7 and at(table, np.int32(4), x) == 4 / 7 and type(at(table, 4, x)) is float
    assert at(table, 0, x, first=0) == 0
    picked = at(table, np.array([3, 10, 1]), x)
    assert picked.shape == (3, 1, 1, 1) and picked.dtype == dtype
    np.testing.assert_array_equal(picked.ravel(), table[[3, 10, 1]].astype(dtype))


@pytest.mark.parametrize(
    ("t", "first", "message"),
    [
        (0, 1, r"1\.\.10 .*got 0"),
        (11, 1, r"1\.\.10 .*got 11"),
        (-1, 0, r"0\.\.10 .*got -1"),
        (np.array([1, 99, 3]), 1, r"1\.\.10 .*got 99"),
        (np.array([1, 2]), 1, r"\(3,\) for x \(3, 4\), got \(2,\)"),
        (np.array([[1], [2], [3]]), 1, r"got \(3, 1\)"),
    ],
)
def test_t_out_of_range_or_of_another_shape(t, first, message):
    with pytest.raises(ValueError, match=message):
        at(np.zeros(11), t, np.zeros((3, 4)), first)


def test_t_or_x_of_another_kind():
    with pytest.raises(TypeError, match=r"whole number.*float64"):
        at(np.zeros(11), 0.5, np.zeros(3))
    with pytest.raises(TypeError, match=r"floats \(images: in \[-1, 1\]\), got uint8"):
        at(np.zeros(11), 1, np.zeros(3, np.uint8))
