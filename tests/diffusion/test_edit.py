"""E36: SDEdit's two ends, DDIM there and back for Gaussian data, and arcs between noises."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng, backend
from tinydiff.diffusion import (
    Sampling,
    Schedule,
    ddim,
    ddim_inverse,
    ddpm,
    denoiser,
    last,
    q_sample,
    sdedit,
    slerp,
    start_time,
    timesteps,
)

from .common import PROPERTY, alpha_bar, gaussian_data, ideal_x0, schedules

SPACINGS = ("trailing", "leading", "linspace")
SAMPLERS = {
    "ddpm": ddpm,
    "ddim": lambda d, x, s, rng: ddim(d, x, s, rng, steps=min(5, s.T)),
    "a choice": Sampling("ddpm").states,
}


def wavy(schedule):
    return denoiser(lambda x_t, t: np.sin(2 * x_t + int(t[0])), schedule, "x0", clip=False)


# ----------------------------------------------------------------------------------------------- SDEdit


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_gives_the_image_back(sampler):
    image = np.random.default_rng(0).normal(size=(2, 3, 3, 1)).astype(np.float32)
    schedule = Schedule.cosine(30)
    states = list(sdedit(wavy(schedule), image, schedule, Rng(0), 0.0, SAMPLERS[sampler]))
    assert len(states) == 1
    np.testing.assert_array_equal(states[0], image)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_1_is_plain_sampling(sampler):
    """Where alpha_bar_T = 0 the image leaves no trace at all, and the states are those of the sampler from eps."""
    image = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
    schedule = Schedule.linear(30).zero_terminal_snr()
    x_T, *states = sdedit(wavy(schedule), image, schedule, Rng(4), 1.0, SAMPLERS[sampler])
    rng = Rng(4)
    np.testing.assert_array_equal(x_T, rng.normal_like(image))
    for a, b in zip(states, SAMPLERS[sampler](wavy(schedule), x_T, schedule, rng), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@PROPERTY
@given(schedules(), st.floats(0, 1), st.integers(0, 1000))
def test_sdedit_is_the_sampler_from_there_on(schedule, strength, seed):
    """The states of ddpm from x_t = q_sample(image, t, eps): Algorithm 2 from t on, line by line."""
    image = np.random.default_rng(seed).normal(size=(2, 3))
    rng, t = Rng(seed), round(strength * schedule.T)
    x = q_sample(image, t, rng.normal_like(image), schedule)
    states = sdedit(wavy(schedule), image, schedule, Rng(seed), strength, ddpm)
    np.testing.assert_array_equal(next(states), x)
    for s in range(t, 0, -1):
        (_, noise), (before, noise_before) = alpha_bar(schedule, s), alpha_bar(schedule, s - 1)
        beta, x_0 = schedule.beta[s], np.sin(2 * x + s)
        mean = (math.sqrt(before) * beta * x_0 + math.sqrt(1 - beta) * noise_before * x) / noise
        x = mean + math.sqrt(beta * noise_before / noise) * (rng.normal_like(x) if s > 1 else 0)
        np.testing.assert_allclose(next(states), x, rtol=1e-6, atol=1e-8)
    assert next(states, None) is None


def test_more_strength_keeps_less_of_the_image():
    """For data N(0, I) the result's correlation with the image is alpha_bar_t, over 20,000 numbers."""
    schedule = Schedule.cosine(100)
    image = np.random.default_rng(0).normal(size=(1, 20000))
    denoise = denoiser(lambda x_t, t: schedule.alpha_bar[t[0]] ** 0.5 * x_t, schedule, "x0", clip=False)
    sampler = functools.partial(ddpm, variance="beta")  # exact for these data
    for strength in (0.2, 0.5, 0.8):
        x_0 = last(sdedit(denoise, image, schedule, Rng(1), strength, sampler))
        kept = np.corrcoef(x_0.ravel(), image.ravel())[0, 1]
        assert abs(kept - schedule.alpha_bar[round(100 * strength)]) < 0.03
        assert abs(x_0.var() - 1) < 0.04


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_bad_strength(strength):
    schedule, image = Schedule.linear(10), np.zeros((1, 2))
    with pytest.raises(ValueError, match=rf"strength must lie in \[0, 1\], got {strength}"):
        last(sdedit(wavy(schedule), image, schedule, Rng(0), strength, ddpm))
    with pytest.raises(ValueError, match="strength"):
        start_time(strength, 10)


# --------------------------------------------------------------------------------- DDIM there and back


@pytest.mark.parametrize("start", [0, 1, 13])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_inverse_line_by_line(spacing, start):
    """Song et al. 2021, eq. 12 with sigma = 0, upwards: the guess is made where the step starts, at t = 1 for x_0."""
    schedule, x = Schedule.linear(30), np.random.default_rng(0).normal(size=(2, 3))
    states = ddim_inverse(wavy(schedule), x, schedule, Rng(0), 7, spacing, start)
    times = [max(start, 1), *(t for t in timesteps(30, 7, spacing)[::-1] if t > start)]
    for s, t in itertools.pairwise(times):
        (signal_s, noise_s), (signal_t, noise_t) = alpha_bar(schedule, s), alpha_bar(schedule, t)
        x_0 = np.sin(2 * x + s)
        eps = (x - math.sqrt(signal_s) * x_0) / math.sqrt(noise_s)
        x = math.sqrt(signal_t) * x_0 + math.sqrt(noise_t) * eps
        np.testing.assert_allclose(next(states), x, rtol=1e-7)
    assert next(states, None) is None


@pytest.mark.parametrize("seed", range(3))
def test_there_and_back_errs_less_with_more_steps(seed):
    """For Gaussian data and the exact denoiser the error of the round trip falls as 1/steps, roughly."""
    mean, covariance = gaussian_data(3, seed)
    schedule = Schedule.cosine(800)
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    x_0 = np.random.default_rng(seed).multivariate_normal(mean, covariance, 5)

    def error(steps):
        x_T = last(ddim_inverse(denoise, x_0, schedule, Rng(0), steps))
        return np.abs(last(ddim(denoise, x_T, schedule, Rng(0), steps)) - x_0).max()

    errors = [error(steps) for steps in (25, 50, 100, 200, 400)]
    assert all(b < 0.7 * a for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.05


def test_the_noise_found_is_noise():
    """For Gaussian data, DDIM's x_T of draws from the data is N(0, I): mean 0 and covariance I over 4000 draws."""
    mean, covariance = gaussian_data(3, 1)
    schedule = Schedule.cosine(400)
    denoise = denoiser(ideal_x0(schedule, mean, covariance), schedule, "x0", clip=False)
    x_0 = np.random.default_rng(0).multivariate_normal(mean, covariance, 4000)
    x_T = last(ddim_inverse(denoise, x_0, schedule, Rng(0), 200))
    assert np.abs(x_T.mean(axis=0)).max() < 0.08 and np.abs(np.cov(x_T.T) - np.eye(3)).max() < 0.1


def test_an_inverse_without_a_step_is_refused():
    schedule = Schedule.cosine(10)
    with pytest.raises(ValueError, match="none of the times visited lies above the start, 5"):
        last(ddim_inverse(denoiser(lambda x, t: x, schedule, "v"), np.ones((1, 2)), schedule, Rng(0), 1, "leading", 5))


def test_slerp_of_weights_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one weight, or one a sample, \(2,\), got \(3,\)"):
        slerp(np.ones((2, 4)), np.ones((2, 4)), np.zeros(3))


def test_bad_steps_of_the_inverse():
    schedule, x = Schedule.linear(10), np.zeros((1, 2))
    with pytest.raises(ValueError, match=r"1\.\.10, got 11"):
        last(ddim_inverse(wavy(schedule), x, schedule, Rng(0), 11))
    with pytest.raises(ValueError, match="got 'even'"):
        last(ddim_inverse(wavy(schedule), x, schedule, Rng(0), 5, "even"))
    for start in (-1, 10):
        with pytest.raises(ValueError, match=rf"0\.\.9, got {start}"):
            last(ddim_inverse(wavy(schedule), x, schedule, Rng(0), 5, start=start))


# ------------------------------------------------------------------------------------------------ slerp


@PROPERTY
@given(st.integers(0, 10000), st.floats(0, 1), st.sampled_from([np.float32, np.float64]), st.integers(2, 5))
def test_slerp_keeps_the_length_and_shares_the_angle(seed, w, dtype, D):
    a, b = np.random.default_rng(seed).normal(size=(2, 3, D, 2)).astype(dtype)
    b *= np.sqrt((a**2).sum(axis=(1, 2), keepdims=True) / (b**2).sum(axis=(1, 2), keepdims=True))
    kept = a.copy(), b.copy()
    np.testing.assert_array_equal(slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(slerp(a, b, 1.0), b)
    np.testing.assert_array_equal(kept, (a, b))
    x = slerp(a, b, w)
    assert x.dtype == dtype and x.shape == a.shape
    rtol = 1e-4 if dtype == np.float32 else 1e-9
    length = [np.linalg.norm(v.reshape(3, -1).astype(float), axis=1) for v in (a, b, x)]
    np.testing.assert_allclose(length[2], length[0], rtol=rtol)

    def angle(p, q):
        cos = (p.reshape(3, -1).astype(float) * q.reshape(3, -1)).sum(axis=1) / length[0] ** 2
        return np.arccos(np.clip(cos, -1, 1))

    np.testing.assert_allclose(angle(a, x), w * angle(a, b), atol=2e-3 if dtype == np.float32 else 1e-6)
    np.testing.assert_allclose(angle(x, b), (1 - w) * angle(a, b), atol=2e-3 if dtype == np.float32 else 1e-6)


def test_slerp_takes_a_weight_for_each_sample():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4))
    x = slerp(a, b, np.array([0.0, 0.3, 1.0]))
    np.testing.assert_array_equal(x[[0, 2]], [a[0], b[2]])
    np.testing.assert_allclose(x[1:2], slerp(a[1:2], b[1:2], 0.3))


def test_slerp_of_a_point_and_itself_is_that_point():
    a = np.random.default_rng(0).normal(size=(2, 5))
    np.testing.assert_allclose(slerp(a, a, 0.3), a)
    np.testing.assert_allclose(slerp(a, 3 * a, 0.5), 2 * a)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.ones((1, 2)), np.ones((1, 3)), r"one shape, got \(1, 2\) and \(1, 3\)"),
        (np.zeros((1, 2)), np.ones((1, 2)), "no arc to or from 0"),
        (np.ones((1, 2)), np.zeros((1, 2)), "no arc to or from 0"),
        (np.ones((1, 2)), -2 * np.ones((1, 2)), "opposite"),
    ],
)
def test_slerp_without_an_arc(a, b, words):
    with pytest.raises(ValueError, match=words):
        slerp(a, b, 0.5)


def test_on_a_device(device):
    schedule = Schedule.cosine(10)
    a, b = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
    denoise = denoiser(lambda x_t, t: x_t, schedule, "v")
    for function in (
        lambda a, b: slerp(a, b, np.array([0.3, 0.7])),
        lambda a, b: last(ddim_inverse(denoise, a, schedule, Rng(0), 5)),
    ):
        there = function(backend.to_device(a), backend.to_device(b))
        assert backend.device_of(there) == backend.device()
        np.testing.assert_allclose(backend.to_numpy(there), function(a, b), rtol=1e-5, atol=1e-6)
    x = last(sdedit(denoise, backend.to_device(a), schedule, Rng(0), 0.5, ddpm))
    assert backend.device_of(x) == backend.device() and np.isfinite(backend.to_numpy(x)).all()
