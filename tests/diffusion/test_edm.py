"""E22: every entry of the table against numbers worked out by hand, and its samplers on data with a known answer."""

import dataclasses
import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng, Tensor, ops
from tinydiff.diffusion import (
    Column,
    Prediction,
    Schedule,
    churned,
    denoiser,
    denoising_loss,
    from_ddpm,
    last,
    noise_levels,
    preconditioned,
    probability_flow,
)
from tinydiff.diffusion.edm import COLUMNS, SOLVERS, training_pair

from .common import PROPERTY, gaussian_data, ideal_x0, schedules, within

each_column = pytest.mark.parametrize("name", COLUMNS)
LEVELS = st.floats(0.003, 80)  # noise levels that lie in every column

# ------------------------------------------------------------------------------------------------ the table

# By hand, to 6 digits or more: {sigma: (c_skip, c_out, c_in, c_noise, lambda)}.
PRECONDITIONING = {
    "vp": {0.5: (1, -0.5, 0.894427191, 144.669105620, 4), 2.0: (1, -2, 0.447213595, 396.793801779, 0.25)},
    "ve": {0.5: (1, 0.5, 1, -1.386294361, 4), 2.0: (1, 2, 1, 0, 0.25), 80.0: (1, 80, 1, 3.688879454, 1.5625e-4)},
    # The paper lists the u_j: 20291, 642, 321, 214, 160, 128, 106, 92, 80, ..., 0.0064 for j = 0, ..., 8, ..., 999.
    "iddpm": {
        20291.0: (1, -20291, 4.92829333e-5, 999, 2.42880750e-9),
        160.0: (1, -160, 6.24987794e-3, 995, 3.90625e-5),
        80.0: (1, -80, 1.24990235e-2, 991, 1.5625e-4),
        0.0064: (1, -0.0064, 0.999979521, 0, 24414.0625),
    },
    "edm": {
        0.5: (0.5, 0.353553391, 1.414213562, -0.173286795, 8),
        2.0: (0.058823529, 0.485071250, 0.485071250, 0.173286795, 4.25),
    },
}
TIME_STEPS = {  # t_0, t_1, t_2 for N = 3, and the noise levels sigma(t) there
    "vp": ([1, 0.5005, 0.001], [152.166970284, 3.422244763, 0.010485993]),
    "ve": ([10000, 2, 0.0004], [100, 1.414213562, 0.02]),
    "edm": ([80, 2.515218976, 0.002], [80, 2.515218976, 0.002]),
}


@pytest.mark.parametrize(("name", "sigma"), [(name, sigma) for name in COLUMNS for sigma in PRECONDITIONING[name]])
def test_preconditioning_by_hand(name, sigma):
    column, expected = COLUMNS[name](), PRECONDITIONING[name][sigma]
    functions = (column.c_skip, column.c_out, column.c_in, column.c_noise, column.loss_weight)
    np.testing.assert_allclose([f(sigma) for f in functions], expected, rtol=1e-7, atol=1e-9)
    for function, value in zip(functions, expected, strict=True):  # and for arrays
        np.testing.assert_allclose(np.broadcast_to(function(np.array([sigma, 1.0])), 2)[0], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TIME_STEPS)
def test_time_steps_by_hand(name):
    times, sigmas = TIME_STEPS[name]
    np.testing.assert_allclose(COLUMNS[name]().times(3), [*times, 0], rtol=1e-9)
    np.testing.assert_allclose(COLUMNS[name]().sigmas(3), [*sigmas, 0], rtol=1e-6)


def test_schedule_and_scaling_by_hand():
    t = np.array([0.001, 0.5, 1])
    np.testing.assert_allclose(Column.vp().sigma(t), [0.0104859927868, 3.412918309069, 152.166970284], rtol=1e-10)
    np.testing.assert_allclose(Column.vp().s(t), [0.9999450265111, 0.281182880797, 0.006571586495], rtol=1e-9)
    assert Column.ve().sigma(0.09) == 0.3 and Column.ve().s(7.0) == 1
    for column in (Column.iddpm(), Column.edm()):
        assert column.sigma(0.3) == 0.3 and column.s(0.3) == 1
    assert [COLUMNS[name]().solver for name in COLUMNS] == ["euler", "euler", "euler", "heun"]


def test_vp_is_the_integral_of_its_stochastic_differential_equation():
    """dx = -beta(t) x/2 dt + sqrt(beta(t)) dw has s = exp(-int beta/2), sigma² = int beta/s², summed here in steps."""
    edges = np.linspace(0, 0.8, 200_001)
    beta = 0.1 + (20 - 0.1) * (edges[1:] + edges[:-1]) / 2
    integral = np.cumsum(beta) * (edges[1] - edges[0])
    s_squared = np.exp(-(integral - beta * (edges[1] - edges[0]) / 2))  # in the middle of each step
    np.testing.assert_allclose(Column.vp().s(0.8), np.exp(-integral[-1] / 2), rtol=1e-6)
    np.testing.assert_allclose(Column.vp().sigma(0.8) ** 2, (beta / s_squared).sum() * (edges[1] - edges[0]), rtol=1e-6)


@each_column
@PROPERTY
@given(st.floats(0.01, 0.99))
def test_derivatives_are_those_of_sigma_and_s(name, t):
    column, h = COLUMNS[name](), 1e-5 * t
    np.testing.assert_allclose(column.sigma_dot(t), (column.sigma(t + h) - column.sigma(t - h)) / (2 * h), rtol=1e-7)
    np.testing.assert_allclose(column.s_dot(t), (column.s(t + h) - column.s(t - h)) / (2 * h), rtol=1e-6, atol=1e-9)


@each_column
@PROPERTY
@given(N=st.integers(2, 200))
def test_time_steps_fall_to_zero(name, N):
    column = COLUMNS[name]()
    times, sigmas = column.times(N), column.sigmas(N)
    assert times.shape == (N + 1,) and times[-1] == sigmas[-1] == 0
    assert (np.diff(times) < 0).all() and (np.diff(sigmas) < 0).all()


def naive_u(M, C_1=0.001, C_2=0.008):
    """The paper's recursion for iDDPM's noise levels, as it stands in the table."""
    alpha_bar = [math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2 for j in range(M + 1)]
    u = [0.0] * (M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1)
    return u


@pytest.mark.parametrize("M", [10, 100, 1000])
def test_iddpm_levels_are_the_recursion(M):
    u, column = naive_u(M), Column.iddpm(Schedule.cosine(M), j_0=0)
    np.testing.assert_allclose(column.times(M), u, rtol=1e-9)  # N = M takes each of them
    np.testing.assert_allclose(noise_levels(Schedule.cosine(M))[::-1], u, rtol=1e-9)
    for j in range(M):
        assert column.c_noise(u[j]) == M - 1 - j
    assert column.c_noise(u[M - 1] / 9) == 0  # u_M = 0 is no level to be asked at
    halfway = [(a + b) / 2 + (a - b) * side for a, b in itertools.pairwise(u[:M]) for side in (0.01, -0.01)]
    nearest = [M - 1 - min(range(M), key=lambda j, s=s: abs(u[j] - s)) for s in halfway]
    np.testing.assert_array_equal(column.c_noise(np.array(halfway)), nearest)


def test_iddpm_levels_of_the_paper():
    """The list in its appendix C.3.4."""
    u = [*noise_levels(Schedule.cosine(1000))[:0:-1]]
    assert [round(v) for v in u[:10]] == [20291, 642, 321, 214, 160, 128, 107, 92, 80, 71]  # it rounds 106.94 down
    assert f"{u[-1]:.4f}" == "0.0064"


def test_iddpm_time_steps():
    u = naive_u(1000)
    for N in (2, 3, 10, 992):
        expected = [u[math.floor(8 + (1000 - 1 - 8) / (N - 1) * i + 0.5)] for i in range(N)]
        np.testing.assert_allclose(Column.iddpm().times(N), [*expected, 0], rtol=1e-9)


# ------------------------------------------------------------------------------------------- noise to train on


def uniform_of(name, sigma):
    """The distribution function of each column's noise, worked out anew: U[0, 1] if sigma is drawn from it."""
    if name == "vp":  # t of sigma by bisection
        low, high = np.zeros_like(sigma), np.ones_like(sigma)
        for _ in range(60):
            t = (low + high) / 2
            above = np.exp(19.9 / 2 * t**2 + 0.1 * t) - 1 > sigma**2
            low, high = np.where(above, low, t), np.where(above, t, high)
        return (low - 1e-5) / (1 - 1e-5)
    if name == "ve":
        return np.log(sigma / 0.02) / np.log(100 / 0.02)
    return np.array([NormalDist(-1.2, 1.2).cdf(math.log(s)) for s in sigma])


@pytest.mark.parametrize("name", ["vp", "ve", "edm"])
def test_noise_is_drawn_from_the_distribution(name):
    """Kolmogorov and Smirnov: the largest gap of the distribution functions, at 4000 draws below 2/sqrt(4000)."""
    draws = COLUMNS[name]().draw_sigma(Rng(0), 4000)
    assert draws.shape == (4000,) and draws.dtype == np.float64
    ordered = np.sort(uniform_of(name, draws))
    assert np.abs(ordered - (np.arange(4000) + 0.5) / 4000).max() < 2 / math.sqrt(4000)
    np.testing.assert_array_equal(draws, COLUMNS[name]().draw_sigma(Rng(0), 4000))


def test_iddpm_noise_is_any_level_but_zero():
    draws, u = Column.iddpm(Schedule.cosine(10), j_0=0).draw_sigma(Rng(0), 4000), naive_u(10)
    counts = np.array([np.isclose(draws, level, rtol=1e-9).sum() for level in u])
    assert counts[10] == 0 and counts.sum() == 4000
    within(counts[:10], 400, math.sqrt(4000 * 0.1 * 0.9))


# ------------------------------------------------------------------------------- preconditioning and the loss


@PROPERTY
@given(LEVELS, st.floats(0.1, 3))
def test_edm_follows_from_first_principles(sigma, sigma_data):
    """Unit variance into the network and out of it, errors amplified as little as can be, equal weight for all noise.

    For y of variance sigma_data² and n of variance sigma², independent: Var of a y + b n is a² sigma_data² + b² sigma².
    """
    column = Column.edm(sigma_data=sigma_data)
    c_skip, c_out, c_in = column.c_skip(sigma), column.c_out(sigma), column.c_in(sigma)

    def target_variance(c_skip):  # of y - c_skip (y + n)
        return (1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2

    assert math.isclose(c_in**2 * (sigma_data**2 + sigma**2), 1)
    assert math.isclose(target_variance(c_skip), c_out**2)
    others = np.linspace(-0.5, 1.5, 201)
    assert (target_variance(others) >= c_out**2 * (1 - 1e-12)).all()
    assert math.isclose(column.loss_weight(sigma) * c_out**2, 1)


@each_column
@pytest.mark.parametrize("sigma", [0.1, 1.0, 30.0])
def test_the_network_sees_and_answers_unit_variance(name, sigma):
    """20,000 draws of data of unit variance: input, target and weight. VE alone does not scale its input."""
    column = Column.edm(sigma_data=1.0) if name == "edm" else COLUMNS[name]()
    y, eps = np.random.default_rng(0).normal(size=(2, 20_000))
    x, _, target, weight = training_pair(y, sigma, eps, column)
    expected = 1 + sigma**2 if name == "ve" else 1.0
    within(x.var(), expected, expected * math.sqrt(2 / 20_000))
    within(target.var(), 1, math.sqrt(2 / 20_000))
    assert math.isclose(weight, 1)


@each_column
@PROPERTY
@given(st.lists(LEVELS, min_size=3, max_size=3), st.integers(0, 1000))
def test_loss_is_the_weighted_error_of_the_denoiser(name, sigmas, seed):
    """lambda || D(y + n; sigma) - y ||², one sample at a time, for D written out."""
    column, sigma = COLUMNS[name](), np.array(sigmas)
    y, eps = np.random.default_rng(seed).normal(size=(2, 3, 2, 2))

    def F(x, c):
        return np.sin(x) + c.reshape(-1, 1, 1) / 7

    total = 0.0
    for b, s in enumerate(sigmas):
        x = y[b] + s * eps[b]
        output = F((column.c_in(s) * x)[None], np.array([column.c_noise(s)]))[0]
        D = column.c_skip(s) * x + column.c_out(s) * output
        np.testing.assert_allclose(preconditioned(F, column)(y + sigma[:, None, None] * eps, sigma)[b], D, rtol=1e-9)
        total += column.loss_weight(s) * ((D - y[b]) ** 2).mean() / 3
    loss = denoising_loss(lambda x, c: Tensor(F(x, c)), y, sigma, eps, column)
    np.testing.assert_allclose(loss.item(), total, rtol=1e-7)


@each_column
def test_a_perfect_network_has_no_loss(name):
    column, (y, eps) = COLUMNS[name](), np.random.default_rng(0).normal(size=(2, 4, 3))
    sigma = column.draw_sigma(Rng(1), 4)
    _, _, target, _ = training_pair(y, sigma, eps, column)
    assert denoising_loss(lambda x, c: Tensor(target), y, sigma, eps, column).item() == 0
    D = preconditioned(lambda x, c: target, column)
    np.testing.assert_allclose(D(y + sigma[:, None] * eps, sigma), y, rtol=1e-9, atol=1e-9)


@each_column
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_network_gets_one_c_noise_a_sample_and_records_nothing(name, dtype):
    weight, seen, column = Tensor(np.ones(2, dtype), requires_grad=True), [], COLUMNS[name]()

    def F(x, c):
        output = ops.mul(x, weight)
        seen.append((x.dtype, c, output.requires_grad))
        return output

    out = preconditioned(F, column)(np.ones((3, 2), dtype), 0.7)
    ((seen_dtype, c, recorded),) = seen
    assert type(out) is np.ndarray and out.dtype == seen_dtype == dtype and not recorded
    np.testing.assert_allclose(c, [column.c_noise(0.7)] * 3)
    x, _, target, w = training_pair(np.ones((2, 3), dtype), np.array([0.1, 2.0]), np.ones((2, 3), dtype), column)
    assert x.dtype == target.dtype == w.dtype == dtype


# ------------------------------------------------------------------------------------------------ samplers


def exact_denoiser(mean, covariance):
    """D(x; sigma) = E[y | y + n = x] for data y ~ N(mean, covariance): conditioning a joint Gaussian."""

    def D(x, sigma):
        gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(len(mean)))
        return mean + (x - mean) @ gain.T

    return D


def exact_flow(x, mean, covariance, start, end):
    """Where the probability flow carries x from noise level start to end: each axis keeps its place in the Gaussian."""
    values, axes = np.linalg.eigh(covariance)
    return mean + (x - mean) @ axes * np.sqrt((values + end**2) / (values + start**2)) @ axes.T


def fine(name):
    """The column, with iDDPM's levels so dense that rounding to them does not spoil the order of the solver."""
    return Column.iddpm(Schedule.cosine(40_000), j_0=320) if name == "iddpm" else COLUMNS[name]()


@each_column
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_solvers(name, solver, order):
    """With D exact, four times the steps leave a quarter of Euler's error, a sixteenth of Heun's, at t_{N-1}.

    (The last step, from t_{N-1} to 0, has one length whatever N, so its error stays.)
    """
    mean, covariance = gaussian_data(2, 0)
    x_T, column = np.random.default_rng(1).normal(size=(20, 2)), fine(name)
    errors = []
    for N in (100, 400):
        times = column.times(N)
        start, end = float(column.sigma(times[0])), float(column.sigma(times[-2]))
        *_, x, _ = probability_flow(exact_denoiser(mean, covariance), x_T, column, N, solver)
        exact = exact_flow(start * x_T, mean, covariance, start, end)
        errors.append(np.abs(x / column.s(times[-2]) - exact).max())
    assert abs(math.log(errors[0] / errors[1], 4) - order) < 0.2, errors


@each_column
@pytest.mark.parametrize("solver", SOLVERS)
def test_algorithm_1_line_by_line(name, solver):
    column, x, calls = COLUMNS[name](), np.random.default_rng(0).normal(size=(3, 2)), []

    def D(x, sigma):
        calls.append(sigma)
        return np.tanh(x) * (1 + sigma) / (2 + sigma)

    t = column.times(5)
    states = list(probability_flow(D, x, column, 5, solver))
    assert len(states) == 5 and len(calls) == (5 if solver == "euler" else 9)
    assert all(type(sigma) is float for sigma in calls)

    def derivative(x, t):
        sigma, s = column.sigma(t), column.s(t)
        first = (column.sigma_dot(t) / sigma + column.s_dot(t) / s) * x
        return first - column.sigma_dot(t) * s / sigma * D(x / s, sigma)

    x = column.sigma(t[0]) * column.s(t[0]) * x
    for i in range(5):
        d = derivative(x, t[i])
        x_next = x + (t[i + 1] - t[i]) * d
        if solver == "heun" and i < 4:
            x_next = x + (t[i + 1] - t[i]) * (d / 2 + derivative(x_next, t[i + 1]) / 2)
        x = x_next
        np.testing.assert_allclose(states[i], x, rtol=1e-9)


def test_each_column_uses_its_own_solver():
    x_T = np.random.default_rng(0).normal(size=(3, 2))
    for name in COLUMNS:
        column = COLUMNS[name]()
        states = [last(probability_flow(lambda x, sigma: np.sin(x), x_T, column, 4, s)) for s in (None, column.solver)]
        np.testing.assert_array_equal(*states)


@pytest.mark.parametrize("S_churn", [1.2, 9.0])  # less and more than the bound on gamma
@pytest.mark.parametrize("levels", [None, noise_levels(Schedule.cosine(50))[1:]])
def test_algorithm_2_line_by_line(levels, S_churn):
    S_tmin, S_tmax, S_noise = 0.5, 20.0, 1.007
    t = Column.edm(sigma_min=0.13, sigma_max=70).sigmas(6)
    x, rng = np.random.default_rng(0).normal(size=(3, 2)), Rng(5)

    def D(x, sigma):
        return np.tanh(x) * (1 + sigma) / (2 + sigma)

    def known(sigma):
        return sigma if levels is None else min(levels, key=lambda level: abs(level - sigma))

    states = list(churned(D, x, t, Rng(5), S_churn, S_tmin, S_tmax, S_noise, levels))
    t = [known(sigma) for sigma in t[:-1]] + [0]
    x = t[0] * x
    for i in range(6):
        gamma = min(S_churn / 6, math.sqrt(2) - 1) if S_tmin <= t[i] <= S_tmax else 0
        t_hat = known(t[i] + gamma * t[i])
        noise = rng.normal_like(x) if t_hat > t[i] else 0
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * S_noise * noise
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + (x - D(x, t[i + 1])) / t[i + 1] / 2)
        np.testing.assert_allclose(states[i], x, rtol=1e-9)
    assert len(states) == 6


def test_no_churn_is_the_flow():
    x_T, column = np.random.default_rng(0).normal(size=(3, 2)), Column.edm()
    D = exact_denoiser(*gaussian_data(2, 0))
    for a, b in zip(churned(D, x_T, column.sigmas(7), Rng(0)), probability_flow(D, x_T, column, 7), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def moments_are(samples, mean, covariance):
    """Assert mean and covariance of samples (n, D), each entry within 5 standard errors."""
    n, variances = len(samples), np.diag(covariance)
    within(samples.mean(axis=0), mean, np.sqrt(variances / n))
    errors = np.sqrt((covariance**2 + np.outer(variances, variances)) / n)
    within(np.cov(samples.T), covariance, errors)


@pytest.mark.parametrize("S_churn", [0.0, 10.0, 80.0])
def test_samples_have_the_moments_of_the_data(S_churn):
    mean, covariance = gaussian_data(3, 1)
    x_T = np.random.default_rng(0).normal(size=(4000, 3))
    sigmas = Column.edm().sigmas(60)
    x = last(churned(exact_denoiser(mean, covariance), x_T, sigmas, Rng(1), S_churn))
    moments_are(x, mean, covariance)


@each_column
def test_every_column_samples_the_data(name):
    mean, covariance = gaussian_data(3, 1)
    x_T = np.random.default_rng(0).normal(size=(4000, 3))
    moments_are(
        last(probability_flow(exact_denoiser(mean, covariance), x_T, COLUMNS[name](), 200, "heun")), mean, covariance
    )


def test_a_row_may_be_another_columns():
    """VE's network and noise with EDM's noise levels (t = sigma² there): the flow is the same."""
    edm = Column.edm()
    mixed = dataclasses.replace(Column.ve(), time_steps=lambda N: edm.time_steps(N) ** 2, solver="heun")
    np.testing.assert_allclose(mixed.sigmas(9), edm.sigmas(9), rtol=1e-12)
    mean, covariance = gaussian_data(2, 0)
    x_T = np.random.default_rng(0).normal(size=(5, 2))
    *_, x, _ = probability_flow(exact_denoiser(mean, covariance), x_T, mixed, 800)
    np.testing.assert_allclose(x, exact_flow(80 * x_T, mean, covariance, 80, 0.002), atol=5e-4)


@each_column
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_samplers_keep_the_dtype_their_input_and_the_seed(name, dtype):
    column, x_T = COLUMNS[name](), Rng(0).normal((2, 4, 4, 1), dtype)
    kept, D = x_T.copy(), preconditioned(lambda x, c: np.tanh(x), column)
    runs = [list(churned(D, x_T, column.sigmas(5), Rng(seed), S_churn=2)) for seed in (1, 1, 2)]
    states = [*runs[0], *probability_flow(D, x_T, column, 5)]
    assert all(state.dtype == dtype and state.shape == x_T.shape for state in states)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    np.testing.assert_array_equal(x_T, kept)


# ------------------------------------------------------------------------- a network that was trained the DDPM way


@PROPERTY
@given(schedules())
def test_noise_levels_are_those_of_the_marginal(schedule):
    """x_t / sqrt(alpha_bar_t) = x_0 + sigma_t eps."""
    assert noise_levels(schedule)[0] == 0
    for t in range(1, schedule.T + 1):
        alpha_bar = math.prod(1 - float(b) for b in schedule.beta[1 : t + 1])
        assert math.isclose(noise_levels(schedule)[t], math.sqrt(1 / alpha_bar - 1), rel_tol=1e-6)


def test_ddpm_model_with_no_signal_at_T():
    """alpha_bar_T = 0: the last noise level is infinite, and D is asked at T - 1 for whatever is large."""
    schedule, asked = Schedule.cosine(20).zero_terminal_snr(), []
    levels = noise_levels(schedule)
    assert np.isinf(levels[20]) and np.isfinite(levels[:20]).all()
    D = from_ddpm(lambda x_t, t: Prediction(asked.append(t) or x_t, x_t), schedule)
    x = D(np.ones((1, 2)), 1e9)
    assert asked == [19] and np.isfinite(x).all()


def test_ddpm_model_as_a_denoiser():
    """At each sigma_t the ideal network of Algorithm 1 is the exact D; in between it is asked at the nearest t."""
    schedule, (mean, covariance) = Schedule.linear(100), gaussian_data(3, 0)
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    D, exact, asked = from_ddpm(denoise, schedule), exact_denoiser(mean, covariance), []
    x = np.random.default_rng(0).normal(size=(4, 3))
    for t, sigma in enumerate(noise_levels(schedule)[1:], start=1):
        np.testing.assert_allclose(D(sigma * x, sigma), exact(sigma * x, sigma), rtol=1e-7)
        from_ddpm(lambda x_t, t: asked.append(t) or denoise(x_t, t), schedule)(x, sigma * (1 - 1e-9 * t))
        assert asked[-1] == t and isinstance(asked[-1], int)


def test_ddpm_model_sampled_the_edm_way():
    """The samples of its ideal network have the data's moments, with churn, in a fifteenth of the steps."""
    schedule, (mean, covariance) = Schedule.linear(1000), gaussian_data(3, 1)
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    x_T = np.random.default_rng(0).normal(size=(4000, 3))
    levels = noise_levels(schedule)[1:]
    sigmas = Column.edm(sigma_min=levels[0], sigma_max=80).sigmas(60)
    for known in (levels, None):
        x = last(churned(from_ddpm(denoise, schedule), x_T, sigmas, Rng(1), S_churn=20, levels=known))
        moments_are(x, mean, covariance)


def test_iddpm_column_is_the_ddpm_model():
    """A network that predicts eps, at t = c_noise + 1, through the third column or through `from_ddpm`."""
    schedule = Schedule.linear(50)
    column = Column.iddpm(schedule, j_0=0)
    D = preconditioned(lambda x, c: np.sin(x + c[0]), column)
    other = from_ddpm(denoiser(lambda x_t, t: np.sin(x_t + t[0] - 1), schedule, "eps", clip=False), schedule)
    x = np.random.default_rng(0).normal(size=(4, 3))
    for sigma in noise_levels(schedule)[1:].tolist():
        np.testing.assert_allclose(D(sigma * x, sigma), other(sigma * x, sigma), rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_columns():
    for sigma_min, sigma_max in ((0, 1), (2, 1), (1, 1), (-1, 1), (1, math.inf), (math.nan, 1)):
        for column in (Column.ve, Column.edm):
            with pytest.raises(ValueError, match="0 < sigma_min < sigma_max, got"):
                column(sigma_min, sigma_max)
    for wrong in ({"sigma_data": 0.0}, {"rho": -1.0}, {"P_std": 0.0}):
        with pytest.raises(ValueError, match="sigma_data, rho and P_std must be > 0, got"):
            Column.edm(**wrong)
    for j_0 in (-1, 9):
        with pytest.raises(ValueError, match=rf"0\.\.M-2 = 0\.\.8, got {j_0}"):
            Column.iddpm(Schedule.cosine(10), j_0)
    with pytest.raises(ValueError, match="with alpha_bar_T = 0 one is infinite"):
        Column.iddpm(Schedule.cosine(10).zero_terminal_snr(), 0)
    with pytest.raises(ValueError, match="8 noise levels from j_0 = 2 on, got N = 9"):
        Column.iddpm(Schedule.cosine(10), 2).times(9)
    with pytest.raises(ValueError, match="'euler' or 'heun', got 'rk4'"):
        dataclasses.replace(Column.edm(), solver="rk4")


@each_column
def test_too_few_steps(name):
    for N in (1, 0, -3):
        with pytest.raises(ValueError, match=f"N >= 2, got N = {N}"):
            COLUMNS[name]().times(N)


def test_bad_arguments_of_the_samplers():
    D, x, sigmas = exact_denoiser(*gaussian_data(2, 0)), np.ones((3, 2)), Column.edm().sigmas(4)
    with pytest.raises(ValueError, match="N >= 2, got N = 1"):
        last(probability_flow(D, x, Column.edm(), 1))
    with pytest.raises(ValueError, match="'euler' or 'heun', got 'rk4'"):
        last(probability_flow(D, x, Column.edm(), 4, "rk4"))
    for wrong in (sigmas[:-1], sigmas[::-1], [1.0, 0.0], [2.0, 2.0, 0.0], [sigmas], [3.0, math.nan, 0.0]):
        with pytest.raises(ValueError, match=r"sigma_0 > \.\.\. > sigma_N = 0"):
            last(churned(D, x, wrong, Rng(0)))
    for wrong in ({"S_churn": -1.0}, {"S_noise": -1.0}, {"S_churn": math.nan}):
        with pytest.raises(ValueError, match="S_churn and S_noise must be at least 0, got"):
            last(churned(D, x, sigmas, Rng(0), **wrong))
    with pytest.raises(ValueError, match=r"levels that D knows must be > 0, got 0\.0"):
        last(churned(D, x, sigmas, Rng(0), levels=noise_levels(Schedule.cosine(10))))
    with pytest.raises(ValueError, match="S_tmin must not be more than S_tmax, got 3 and 2"):
        last(churned(D, x, sigmas, Rng(0), S_tmin=3, S_tmax=2))


def test_bad_noise():
    y = np.ones((2, 3))
    for sigma in (0.0, -1.0, math.inf, math.nan, np.array([1.0, 0.0])):
        with pytest.raises(ValueError, match="sigma must be > 0 and finite, got"):
            preconditioned(lambda x, c: x, Column.edm())(y, sigma)
        with pytest.raises(ValueError, match="sigma must be > 0 and finite, got"):
            training_pair(y, sigma, y, Column.edm())
    with pytest.raises(ValueError, match="one number a sample"):
        training_pair(y, np.ones(3), y, Column.edm())
    with pytest.raises(ValueError, match=r"y and eps must have one shape, got \(2, 3\) and \(2,\)"):
        training_pair(y, 1.0, y[:, 0], Column.edm())


def test_noise_outside_the_schedule():
    schedule = Schedule.linear(1000)
    D = from_ddpm(denoiser(lambda x_t, t: x_t, schedule), schedule)
    for sigma in (0.002, 200.0, 0.0, math.nan):
        with pytest.raises(ValueError, match=r"from sigma_1 = 0\.01 to sigma_T = 157\..*, got sigma = "):
            D(np.ones((2, 3)), sigma)
