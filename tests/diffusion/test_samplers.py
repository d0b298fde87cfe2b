"""E8, E19, and the faster samplers: all against the ideal denoiser of Gaussian data, whose formula is known."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng, Tensor, ops
from tinydiff.diffusion import (
    Prediction,
    Sampling,
    Schedule,
    ddim,
    ddpm,
    denoiser,
    dpm_solver,
    dynamic_threshold,
    forward_step,
    heun,
    last,
    q_sample,
    reverse_log_density,
    timesteps,
)
from tinydiff.diffusion.samplers import SAMPLERS, SPACINGS, USUAL_STEPS

from .common import PROPERTY, alpha_bar, gaussian_data, ideal_x0, schedules, within

ALL = {
    "ddpm-posterior": lambda d, x, s, rng, steps, spacing="trailing": ddpm(d, x, s, rng, "posterior", steps, spacing),
    "ddpm-beta": lambda d, x, s, rng, steps, spacing="trailing": ddpm(d, x, s, rng, "beta", steps, spacing),
    "ddim-eta0": lambda d, x, s, rng, steps, spacing="trailing": ddim(d, x, s, rng, steps, 0.0, spacing),
    "ddim-eta0.5": lambda d, x, s, rng, steps, spacing="trailing": ddim(d, x, s, rng, steps, 0.5, spacing),
    "ddim-eta1": lambda d, x, s, rng, steps, spacing="trailing": ddim(d, x, s, rng, steps, 1.0, spacing),
    "heun": heun,
    "dpm": dpm_solver,
}
FLOW = ("ddim-eta0", "heun", "dpm")  # those that follow the probability flow and draw no noise


def standard_normal_network(schedule):
    """E[x_0 | x_t] for data N(0, I): every x_t is N(0, I), correlated with x_0 by sqrt(alpha_bar_t)."""
    return lambda x_t, t: math.sqrt(alpha_bar(schedule, int(t[0]))[0]) * x_t


# --------------------------------------------------------------------------- the whole way, for Gaussian data


# As many steps as make a sampler's own error half a standard error or less: more for one that adds noise.
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [*((name, 1000) for name in ALL if name.startswith("dd")), ("ddpm-posterior", 500), ("heun", 60), ("dpm", 60)],
)
@pytest.mark.parametrize("make", [Schedule.cosine, lambda T: Schedule.scaled_linear(T).zero_terminal_snr()])
def test_ideal_denoiser_gives_the_data(sampler, steps, make):
    """E19: with E[x_0 | x_t] exact, the samples have the data's mean and covariance, within 4 standard errors."""
    n, schedule = 10000, make(1000)
    mean, covariance = gaussian_data(2, seed=1)
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    samples = last(ALL[sampler](denoise, Rng(0).normal((n, 2), np.float64), schedule, Rng(1), steps))
    variances = np.diag(covariance)
    within(samples.mean(axis=0), mean, np.sqrt(variances / n), how_many=4)
    standard_error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    within(np.cov(samples.T), covariance, standard_error, how_many=4)


@pytest.mark.parametrize(("sampler", "order"), [("ddim-eta0", 1), ("heun", 2), ("dpm", 2)])
@pytest.mark.parametrize("make", [Schedule.cosine, Schedule.linear])
def test_order_of_convergence(sampler, order, make):
    """Twice the steps divide the error by 2^order, along the known flow of data N(mean, variance).

    The flow keeps (x - sqrt(alpha_bar) mean)/sqrt(alpha_bar variance + 1 - alpha_bar) of each sample. Followed from
    t = 8000 to t = 1000 of 8192: the steps near the data, where sigma grows as sqrt(t), have an order of their own.
    """
    mean, variance = 0.3, 0.25
    schedule = make(8192).respaced(range(1000, 8001))
    denoise = denoiser(ideal_x0(schedule, np.array([mean]), np.array([[variance]])), schedule, "x0", clip=False)
    x_T = np.array([[-2.0], [-1.0], [0.0], [0.5], [1.7]])

    def centre_and_width(t):
        signal, noise = schedule.alpha_bar[t], 1 - schedule.alpha_bar[t]
        return math.sqrt(signal) * mean, math.sqrt(signal * variance + noise)

    def error(steps):
        *_, x_1, _ = ALL[sampler](denoise, x_T, schedule, Rng(0), steps + 1, "linspace")
        (from_centre, from_width), (to_centre, to_width) = centre_and_width(schedule.T), centre_and_width(1)
        return np.abs(x_1 - to_centre - to_width * (x_T - from_centre) / from_width).max()

    errors = np.array([error(steps) for steps in (100, 200, 400)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.2)


@pytest.mark.parametrize(("sampler", "calls"), [(name, 13 if name == "heun" else 7) for name in ALL])
def test_calls_of_the_network(sampler, calls):
    schedule, seen = Schedule.cosine(40), []
    denoise = denoiser(lambda x_t, t: seen.append(int(t[0])) or x_t, schedule, "v")
    states = list(ALL[sampler](denoise, np.ones((1, 2)), schedule, Rng(0), 7))
    assert len(states) == 7 and len(seen) == calls
    assert sorted(set(seen), reverse=True) == timesteps(40, 7)


@PROPERTY
@given(schedules(min_T=2), st.integers(0, 1000), st.sampled_from(SPACINGS), st.booleans())
def test_no_sampler_divides_by_a_zero_terminal_snr(schedule, seed, spacing, clip):
    """Lin et al. 2023: with alpha_bar_T = 0, from a network that predicts v, in float32; a warning is an error."""
    zero = schedule.zero_terminal_snr()
    x_T = Rng(seed).normal((3, 2))
    denoise = denoiser(lambda x_t, t: np.sin(x_t), zero, "v", clip=clip)
    for sampler, steps in itertools.product(ALL.values(), {1, 2, zero.T}):
        with np.errstate(all="raise", under="ignore"):
            for state in sampler(denoise, x_T, zero, Rng(seed), steps, spacing):
                assert np.isfinite(state).all() and state.dtype == np.float32


@pytest.mark.parametrize("sampler", ALL)
def test_eps_tells_no_x0_at_a_zero_terminal_snr(sampler):
    zero = Schedule.cosine(10).zero_terminal_snr()
    denoise = denoiser(lambda x_t, t: x_t, zero, "eps")
    with pytest.raises(ValueError, match=r"eps does not tell x_0 at t = 10.*predict 'v' or 'x0'"):
        last(ALL[sampler](denoise, np.ones((1, 2)), zero, Rng(0), 5))


@PROPERTY
@given(schedules(), st.integers(0, 1000))
def test_ddpm_with_variance_beta_is_exact_for_normal_data(schedule, seed):
    """E19, E13: for data N(0, I) each step is then x_{t-1} = sqrt(alpha_t) x_t + sqrt(beta_t) z, and z = 0 at t = 1."""
    denoise = denoiser(standard_normal_network(schedule), schedule, "x0", clip=False)
    x = x_T = np.random.default_rng(seed).normal(size=(3, 2))
    states = list(ddpm(denoise, x_T, schedule, Rng(seed), "beta"))
    rng = Rng(seed)
    for t, state in zip(range(schedule.T, 0, -1), states, strict=True):
        beta = schedule.beta[t]
        x = math.sqrt(1 - beta) * x + (math.sqrt(beta) * rng.normal_like(x) if t > 1 else 0)
        np.testing.assert_allclose(state, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("v", "fixed"), [(0.0, "posterior"), (1.0, "beta")])
def test_ddpm_with_a_learned_variance_has_the_fixed_ones_as_its_ends(v, fixed):
    """E13, E19: the second half of the network's outputs, from -1 to 1, is where sigma² lies between the two."""
    schedule, x_T = Schedule.cosine(20), Rng(0).normal((6, 3), np.float64)
    knows = ideal_x0(schedule, *gaussian_data(3, seed=1))

    def network(x_t, t):
        return np.concatenate([knows(x_t, t), np.full_like(x_t, 2 * v - 1)], axis=-1)

    learned = denoiser(network, schedule, "x0", clip=False, learned_variance=True)
    plain = denoiser(knows, schedule, "x0", clip=False)
    for a, b in zip(
        ddpm(learned, x_T, schedule, Rng(1), "learned"), ddpm(plain, x_T, schedule, Rng(1), fixed), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    with pytest.raises(ValueError, match="'learned' needs a network that learned one"):
        last(ddpm(plain, x_T, schedule, Rng(1), "learned"))
    with pytest.raises(ValueError, match="even number of outputs, got 3"):
        denoiser(knows, schedule, learned_variance=True)(x_T, 1)


@PROPERTY
@given(schedules(), st.integers(0, 1000), st.sampled_from(SPACINGS), st.data())
def test_every_sampler_finds_a_single_point(schedule, seed, spacing, data):
    """If all data are one point c, then E[x_0 | x_t] = c, and any sampler with any steps ends there."""
    steps = data.draw(st.integers(1, schedule.T))
    point = np.random.default_rng(seed).normal(size=(2, 3))
    denoise = denoiser(lambda x_t, t: point, schedule, "x0", clip=False)
    x_T = np.random.default_rng(seed + 1).normal(size=(2, 3))
    for sampler in ALL.values():
        np.testing.assert_allclose(last(sampler(denoise, x_T, schedule, Rng(0), steps, spacing)), point, atol=1e-8)


@PROPERTY
@given(schedules(), st.integers(0, 1000), st.sampled_from(SPACINGS), st.data())
def test_ddim_with_eta_1_is_ddpm(schedule, seed, spacing, data):
    """Song et al. 2021: the same noise gives the same states as Algorithm 2 with the posterior variance."""
    steps = data.draw(st.integers(1, schedule.T))
    mean, covariance = gaussian_data(3, seed)
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    x_T = np.random.default_rng(seed).normal(size=(4, 3))
    for a, b in zip(
        ddpm(denoise, x_T, schedule, Rng(seed), steps=steps, spacing=spacing),
        ddim(denoise, x_T, schedule, Rng(seed), steps, eta=1, spacing=spacing),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7)


@PROPERTY
@given(schedules(), st.integers(0, 1000), st.floats(0, 1), st.sampled_from(SPACINGS), st.data())
def test_ddim_keeps_the_marginals(schedule, seed, eta, spacing, data):
    """Song et al. 2021, lemma 1: from x_t ~ q(x_t | x_0) and the true x_0, each step lands in q(x_s | x_0).

    The mean and variance of each state, carried through the steps in closed form: the sampler is linear in x_T and z.
    """
    steps = data.draw(st.integers(1, schedule.T))
    times = [*timesteps(schedule.T, steps, spacing), 0]
    x_0 = np.random.default_rng(seed).normal(size=(1, 1))
    denoise = denoiser(lambda x_t, t: np.broadcast_to(x_0, x_t.shape), schedule, "x0", clip=False)
    start = math.sqrt(schedule.alpha_bar[times[0]]) * x_0
    width = math.sqrt(schedule.one_minus_alpha_bar[times[0]])

    class UnitNoise:
        """In place of an Rng: at the n-th draw, row n gets 1 and all other rows 0."""

        drawn = 1

        def normal_like(self, x):
            self.drawn += 1
            return np.eye(len(x))[:, self.drawn : self.drawn + 1]

    # Row 0 starts at the mean, row 1 one standard deviation above it; row 2 + n feels only the n-th noise.
    x = np.vstack([start, start + width, *[start] * (steps + 1)])
    for s, state in zip(times[1:], ddim(denoise, x, schedule, UnitNoise(), steps, eta, spacing), strict=True):
        signal, noise = alpha_bar(schedule, s)
        np.testing.assert_allclose(state[0], math.sqrt(signal) * x_0[0], atol=1e-8)
        np.testing.assert_allclose(((state[1:] - state[0]) ** 2).sum(), noise, atol=1e-7)


def test_algorithm_2_line_by_line():
    """E19 for the plain deck recipe: an eps network, no clip, both variances, against the formula written out."""
    schedule, x_T = Schedule.linear(30), Rng(0).normal((2, 3), np.float64)
    for variance in ("posterior", "beta"):
        x, rng = x_T, Rng(5)
        denoise = denoiser(lambda x_t, t: np.sin(x_t + t[0]), schedule, clip=False)
        for t, state in zip(range(30, 0, -1), ddpm(denoise, x_T, schedule, Rng(5), variance), strict=True):
            beta, (_, noise), (_, before) = schedule.beta[t], alpha_bar(schedule, t), alpha_bar(schedule, t - 1)
            sigma = math.sqrt(beta if variance == "beta" else beta * before / noise)
            z = rng.normal_like(x) if t > 1 else np.zeros_like(x)
            x = (x - beta / math.sqrt(noise) * np.sin(x + t)) / math.sqrt(1 - beta) + sigma * z
            np.testing.assert_allclose(state, x, rtol=1e-9)


@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_fewer_steps_of_algorithm_2_line_by_line(variance, spacing):
    """Nichol & Dhariwal 2021, section 4: alpha and beta are those of the jump from one visited time to the next."""
    schedule, x, rng = Schedule.linear(30), Rng(0).normal((2, 3), np.float64), Rng(5)
    v, times = 0.3, timesteps(30, 7, spacing)

    def network(x_t, t):
        eps = np.sin(x_t + t[0])
        return np.concatenate([eps, np.full_like(eps, 2 * v - 1)], axis=-1) if variance == "learned" else eps

    denoise = denoiser(network, schedule, clip=False, learned_variance=variance == "learned")
    states = ddpm(denoise, x, schedule, Rng(5), variance, 7, spacing)
    for t, s, state in zip(times, [*times[1:], 0], states, strict=True):
        (signal, noise), (signal_before, before) = alpha_bar(schedule, t), alpha_bar(schedule, s)
        alpha = signal / signal_before
        beta = 1 - alpha
        beta_tilde = beta * before / noise
        sigma_squared = {"posterior": beta_tilde, "beta": beta, "learned": beta**v * beta_tilde ** (1 - v)}[variance]
        z = rng.normal_like(x) if s > 0 else 0
        x = (x - beta / math.sqrt(noise) * np.sin(x + t)) / math.sqrt(alpha) + math.sqrt(sigma_squared) * z
        np.testing.assert_allclose(state, x, rtol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_line_by_line(eta, spacing):
    """Song et al. 2021, eq. 12 and 16, for an eps network."""
    schedule, x = Schedule.linear(30), Rng(0).normal((2, 3), np.float64)
    denoise = denoiser(lambda x_t, t: np.sin(x_t + t[0]), schedule, clip=False)
    states, rng = ddim(denoise, x, schedule, Rng(5), 7, eta, spacing), Rng(5)
    for t, s, state in zip(timesteps(30, 7, spacing), [*timesteps(30, 7, spacing)[1:], 0], states, strict=True):
        (a_t, _), (a_s, _) = alpha_bar(schedule, t), alpha_bar(schedule, s)
        eps = np.sin(x + t)
        predicted = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
        z = rng.normal_like(x) if sigma > 0 else 0
        x = math.sqrt(a_s) * predicted + math.sqrt(1 - a_s - sigma**2) * eps + sigma * z
        np.testing.assert_allclose(state, x, rtol=1e-8)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_heun_line_by_line(steps, spacing):
    """Karras et al. 2022, Algorithm 1, for dx/dphi = v, phi the angle whose cosine is sqrt(alpha_bar)."""
    schedule, x = Schedule.linear(30), Rng(0).normal((2, 3), np.float64)

    def velocity(x, t):
        """The network's v, and with it the x_0 and eps of x = cos(phi) x_0 + sin(phi) eps, solved for both."""
        v, phi = np.sin(x + t), math.acos(math.sqrt(alpha_bar(schedule, t)[0]))
        return v, math.cos(phi) * x - math.sin(phi) * v, math.sin(phi) * x + math.cos(phi) * v, phi

    states = heun(
        denoiser(lambda x, t: np.sin(x + t[0]), schedule, "v", clip=False), x, schedule, Rng(0), steps, spacing
    )
    times = timesteps(30, steps, spacing)
    for t, s, state in zip(times, [*times[1:], 0], states, strict=True):
        v, x_0, eps, phi = velocity(x, t)
        if s == 0:
            x = x_0
        else:
            end = math.acos(math.sqrt(alpha_bar(schedule, s)[0]))
            v_end, *_ = velocity(math.cos(end) * x_0 + math.sin(end) * eps, s)
            x = x + (end - phi) * (v + v_end) / 2
        np.testing.assert_allclose(state, x, rtol=1e-8)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_dpm_solver_line_by_line(steps, spacing):
    """Lu et al. 2022 (++), Algorithm 2, with alpha, sigma, lambda and r as printed there, and D_i of a step too long.

    Their h_i, r_i = h_{i-1}/h_i; the first, the last and any step with r_i <= 1/2 are of first order.
    """
    schedule, x = Schedule.linear(30), Rng(0).normal((2, 3), np.float64)
    states = dpm_solver(
        denoiser(lambda x_t, t: np.sin(x_t + t[0]), schedule, "x0", clip=False), x, schedule, Rng(0), steps, spacing
    )
    times = [*timesteps(30, steps, spacing), 0]
    alpha, sigma = (np.sqrt([alpha_bar(schedule, t)[i] for t in times]) for i in (0, 1))
    lam = np.log(alpha[:-1]) - np.log(sigma[:-1])
    guesses, second_order = [], 0
    for i, state in zip(range(1, steps + 1), states, strict=True):
        guesses.append(np.sin(x + times[i - 1]))
        if i == steps:
            x = guesses[-1]
        else:
            h, D = lam[i] - lam[i - 1], guesses[-1]
            r = (lam[i - 1] - lam[i - 2]) / h if i > 1 else 0
            if r > 0.5:
                D = (1 + 1 / (2 * r)) * guesses[-1] - 1 / (2 * r) * guesses[-2]
                second_order += 1
            x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * D
        np.testing.assert_allclose(state, x, rtol=1e-8)
    assert steps < 7 or second_order >= steps // 2


# --------------------------------------------------------------------------------------------- timesteps


@PROPERTY
@given(st.integers(1, 2000), st.data(), st.sampled_from(SPACINGS))
def test_timesteps_are_different_and_in_range(T, data, spacing):
    steps = data.draw(st.integers(1, T))
    times = timesteps(T, steps, spacing)
    assert len(times) == steps and all(isinstance(t, int) for t in times)
    assert all(a > b for a, b in itertools.pairwise(times))
    assert times[0] <= T and times[-1] >= 1
    if spacing in ("trailing", "linspace"):
        assert times[0] == T
    if spacing == "leading" or (spacing == "linspace" and steps > 1):
        assert times[-1] == 1
    gaps = np.diff([*times, 0] if spacing == "trailing" else times)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_timesteps_by_hand():
    assert timesteps(1000, 5) == [1000, 800, 600, 400, 200]
    assert timesteps(1000, 5, "leading") == [801, 601, 401, 201, 1]
    assert timesteps(1000, 5, "linspace") == [1000, 750, 500, 251, 1]
    for spacing in SPACINGS:
        assert timesteps(7, 7, spacing) == [7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match=rf"1\.\.10, got {steps}"):
        timesteps(10, steps)


def test_bad_arguments_of_the_samplers():
    schedule, x = Schedule.linear(10), np.zeros((1, 2))
    denoise = denoiser(lambda x_t, t: x_t, schedule)
    with pytest.raises(ValueError, match="'trailing', 'leading' or 'linspace', got 'even'"):
        timesteps(10, 5, "even")
    for sampler in ALL.values():
        for steps in (0, 11):
            with pytest.raises(ValueError, match=rf"1\.\.10, got {steps}"):
                last(sampler(denoise, x, schedule, Rng(0), steps))
        with pytest.raises(ValueError, match="'trailing', 'leading' or 'linspace', got 'even'"):
            last(sampler(denoise, x, schedule, Rng(0), 5, "even"))
    for eta in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="eta must lie in"):
            last(ddim(denoise, x, schedule, Rng(0), steps=5, eta=eta))
    with pytest.raises(ValueError, match="'posterior' or 'beta', got 'fixed'"):
        last(ddpm(denoise, x, schedule, Rng(0), "fixed"))
    with pytest.raises(ValueError, match="'eps', 'x0' or 'v', got 'score'"):
        denoiser(lambda x_t, t: x_t, schedule, "score")(x, 1)
    with pytest.raises(ValueError, match=r"output and x_t must have one shape, got \(2,\) and \(1, 2\)"):
        denoiser(lambda x_t, t: x_t[0], schedule)(x, 1)
    with pytest.raises(ValueError, match="at least one state"):
        last([])


# ---------------------------------------------------------------------------------------------- Sampling


@pytest.mark.parametrize(
    ("how", "same"),
    [
        (Sampling("ddpm"), lambda d, x, s, rng: ddpm(d, x, s, rng)),
        (
            Sampling("ddpm", 6, "linspace", variance="beta"),
            lambda d, x, s, rng: ddpm(d, x, s, rng, "beta", 6, "linspace"),
        ),
        (Sampling(), lambda d, x, s, rng: ddim(d, x, s, rng, 50)),
        (Sampling("ddim", 7, "leading", eta=0.3), lambda d, x, s, rng: ddim(d, x, s, rng, 7, 0.3, "leading")),
        (Sampling("heun"), lambda d, x, s, rng: heun(d, x, s, rng, 25)),
        (Sampling("heun", 5, "linspace"), lambda d, x, s, rng: heun(d, x, s, rng, 5, "linspace")),
        (Sampling("dpm"), lambda d, x, s, rng: dpm_solver(d, x, s, rng, 25)),
        (Sampling("dpm", 5, "leading"), lambda d, x, s, rng: dpm_solver(d, x, s, rng, 5, "leading")),
    ],
)
def test_sampling_calls_the_sampler_of_its_name(how, same):
    schedule, x_T = Schedule.cosine(60), Rng(0).normal((2, 3))
    denoise = denoiser(lambda x_t, t: np.sin(x_t), schedule, "v")
    states = list(how.states(denoise, x_T, schedule, Rng(1)))
    assert len(states) == how.steps_of(60)
    np.testing.assert_array_equal(states, list(same(denoise, x_T, schedule, Rng(1))))


def test_usual_steps_fit_short_schedules():
    assert {name: Sampling(name).steps_of(9) for name in SAMPLERS} == dict.fromkeys(SAMPLERS, 9)
    assert {name: Sampling(name).steps_of(999) for name in SAMPLERS} == {"ddpm": 999, **USUAL_STEPS}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, heun, dpm, got 'euler'"),
        ({"spacing": "even"}, "spacing must be one of trailing, leading, linspace, got 'even'"),
        ({"sampler": "ddpm", "variance": "fixed"}, "variance must be one of posterior, beta, learned, got 'fixed'"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"eta": math.nan}, "eta must lie in"),
        ({"sampler": "heun", "eta": 0.5}, "eta is for the sampler ddim, got eta 0.5 for heun"),
        ({"variance": "beta"}, "variance is for the sampler ddpm, got beta for ddim"),
        ({"clip": 0.0}, r"True, False or a percentile in \(0, 100\], got 0.0"),
        ({"clip": 101}, r"True, False or a percentile in \(0, 100\], got 101"),
        ({"clip": math.nan}, r"percentile in \(0, 100\], got nan"),
    ],
)
def test_bad_sampling(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


@pytest.mark.parametrize("steps", [0, -2, 11])
def test_sampling_in_steps_that_the_model_has_not(steps):
    with pytest.raises(ValueError, match=rf"1\.\.10, the T of this model, got {steps}"):
        Sampling("dpm", steps).steps_of(10)


# ---------------------------------------------------------------------------------------------- denoiser


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("t", [1, 50, 100])
def test_clip_bounds_x0_and_keeps_the_pair_consistent(target, t):
    schedule = Schedule.cosine(100)
    x_t = Rng(0).normal((50, 4), np.float64)
    free = denoiser(lambda x_t, t: 3 * np.sin(5 * x_t), schedule, target, clip=False)(x_t, t)
    clipped = denoiser(lambda x_t, t: 3 * np.sin(5 * x_t), schedule, target)(x_t, t)
    assert isinstance(clipped, Prediction) and np.abs(free.x0).max() > 1
    np.testing.assert_array_equal(clipped.x0, np.minimum(np.maximum(free.x0, -1), 1))
    for guess in (free, clipped):
        np.testing.assert_allclose(q_sample(guess.x0, t, guess.eps, schedule), x_t, atol=1e-12)


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 40), st.floats(0, 100), st.floats(0.1, 10), st.integers(0, 1000))
def test_dynamic_threshold_is_the_formula(n, pixels, percentile, size, seed):
    """E37, image by image: the percentile between two of the sorted |x_0|, by how far it lies between them."""
    x_0 = size * np.random.default_rng(seed).normal(size=(n, pixels, 1))
    found = dynamic_threshold(x_0, percentile)
    assert np.abs(found).max() <= 1
    for image, before in zip(found, x_0, strict=True):
        ordered = sorted(abs(x) for x in before.ravel().tolist())
        low, between = divmod(percentile / 100 * (pixels - 1), 1)
        low, high = int(low), min(int(low) + 1, pixels - 1)
        s = max(1.0, ordered[low] + between * (ordered[high] - ordered[low]))
        expected = [max(-s, min(s, x)) / s for x in before.ravel().tolist()]
        np.testing.assert_allclose(image.ravel(), expected, rtol=1e-9)


def test_dynamic_threshold_leaves_what_lies_within_and_keeps_differences_without():
    within_bounds = np.linspace(-1, 1, 12).reshape(1, 3, 4)
    np.testing.assert_array_equal(dynamic_threshold(within_bounds, 99.5), within_bounds)
    x_0 = np.float32([[0.5, 2.0, 4.0]])
    np.testing.assert_array_equal(dynamic_threshold(x_0, 100), [[0.125, 0.5, 1.0]])
    assert dynamic_threshold(x_0, 90).dtype == np.float32


def test_a_denoiser_that_thresholds():
    """A percentile takes the place of the clip, and the pair stays consistent with x_t."""
    schedule, x_t = Schedule.cosine(100), Rng(0).normal((5, 8), np.float64)
    free, found = (denoiser(lambda x_t, t: 3 * np.sin(5 * x_t), schedule, "v", c)(x_t, 40) for c in (False, 80.0))
    np.testing.assert_array_equal(found.x0, dynamic_threshold(free.x0, 80.0))
    np.testing.assert_allclose(q_sample(found.x0, 40, found.eps, schedule), x_t, atol=1e-12)


def test_network_gets_one_t_a_sample_and_records_nothing():
    schedule, seen = Schedule.linear(10), []
    weight = Tensor(np.ones((1, 2), np.float32), requires_grad=True)

    def network(x_t, t):
        output = ops.mul(x_t, weight)
        seen.append((t, output.requires_grad))
        return output

    guess = denoiser(network, schedule)(np.ones((3, 2), np.float32), 7)
    ((t, recorded),) = seen
    np.testing.assert_array_equal(t, [7, 7, 7])
    assert t.dtype == np.int64 and not recorded
    assert type(guess.x0) is type(guess.eps) is np.ndarray


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_samplers_keep_the_dtype_and_repeat_by_seed(dtype):
    schedule, x_T = Schedule.cosine(12), Rng(0).normal((2, 4, 4, 1), dtype)
    denoise = denoiser(lambda x_t, t: np.tanh(x_t), schedule, "v")
    for name, sampler in ALL.items():
        one, two, other = (list(sampler(denoise, x_T, schedule, Rng(seed), 5)) for seed in (1, 1, 2))
        assert all(state.dtype == dtype and state.shape == x_T.shape for state in one)
        np.testing.assert_array_equal(one, two)
        assert np.array_equal(one, other) == (name in FLOW)


def test_samplers_do_not_change_their_input():
    schedule, x_T = Schedule.cosine(6), Rng(0).normal((2, 3))
    kept = x_T.copy()
    denoise = denoiser(lambda x_t, t: x_t, schedule)
    states = [state for sampler in ALL.values() for state in sampler(denoise, x_T, schedule, Rng(0), 3)]
    np.testing.assert_array_equal(x_T, kept)
    assert len({id(state) for state in states}) == len(states)


# -------------------------------------------------------------------------------------- E8, densities


def test_reverse_density_sums_over_steps():
    """E8: log p(x_T) + sum of log N(x_{t-1}; mu_theta, sigma_t²), one number at a time."""
    schedule, rng = Schedule.linear(6), np.random.default_rng(0)
    trajectory = list(rng.normal(size=(7, 2, 3)))
    density = reverse_log_density(trajectory, denoiser(lambda x, t: np.cos(x) + t[0], schedule, clip=False), schedule)
    for b in range(2):
        total = sum(math.log(NormalDist().pdf(x)) for x in trajectory[6][b])
        for t in range(1, 7):
            beta, (_, noise) = float(schedule.beta[t]), alpha_bar(schedule, t)
            for x_prev, x_t in zip(trajectory[t - 1][b], trajectory[t][b], strict=True):
                mean = (x_t - beta / math.sqrt(noise) * (math.cos(x_t) + t)) / math.sqrt(1 - beta)
                total += math.log(NormalDist().pdf(0)) - (x_prev - mean) ** 2 / beta / 2 - math.log(beta) / 2
        np.testing.assert_allclose(density[b], total, rtol=1e-10)


def test_reverse_density_of_normal_data_is_the_forward_density():
    """E8 and E2: for data N(0, I) the ideal reverse process is the forward process read backwards.

    p(x_T) prod p(x_{t-1} | x_t) = p(x_0) prod q(x_t | x_{t-1}), since the chain is stationary and reversible.
    """
    schedule, rng = Schedule.linear(25), Rng(3)
    trajectory = [rng.normal((4, 2), np.float64)]
    for t in range(1, 26):
        trajectory.append(forward_step(trajectory[-1], t, schedule, rng))
    denoise = denoiser(standard_normal_network(schedule), schedule, "x0", clip=False)
    log_q = np.zeros(4)
    for t in range(1, 26):
        beta = schedule.beta[t]
        residual = trajectory[t] - math.sqrt(1 - beta) * trajectory[t - 1]
        log_q += (-(residual**2) / (2 * beta) - math.log(2 * math.pi * beta) / 2).sum(axis=1)
    log_q += (-(trajectory[0] ** 2) / 2 - math.log(2 * math.pi) / 2).sum(axis=1)
    np.testing.assert_allclose(reverse_log_density(trajectory, denoise, schedule, "beta"), log_q, rtol=1e-8)


def test_reverse_density_of_bad_input():
    schedule = Schedule.linear(4)
    denoise = denoiser(lambda x_t, t: x_t, schedule)
    with pytest.raises(ValueError, match="has 5 states, got 2"):
        reverse_log_density([np.zeros((1, 2))] * 2, denoise, schedule)
    with pytest.raises(ValueError, match="variance > 0, got 0"):
        reverse_log_density([np.zeros((1, 2))] * 5, denoise, schedule, "posterior")
