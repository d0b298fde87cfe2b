"""E36: RePaint line by line and for Gaussian data, whose conditional mean is known; known pixels come back exactly."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng, backend
from tinydiff.diffusion import Sampling, Schedule, ddim, denoiser, keep_known, last, q_sample, repaint, resampled
from tinydiff.diffusion.inpaint import as_mask

from .common import PROPERTY, alpha_bar, gaussian_data, ideal_x0, schedules

MASK = np.array([[1, 0, 1], [0, 0, 1]])


class NoNoise:
    """In place of an Rng: with it, a linear sampler gives the mean of what it gives with noise."""

    def normal_like(self, x):
        return np.zeros_like(x)


def of_vectors(network):
    """A network of images (B, 1, D, 1) from one of vectors (B, D)."""
    return lambda x_t, t: network(x_t.reshape(len(x_t), -1), t).reshape(x_t.shape)


def wavy(schedule):
    return denoiser(lambda x_t, t: np.sin(2 * x_t + int(t[0])), schedule, "x0", clip=False)


# --------------------------------------------------------------------------------------------- RePaint


@pytest.mark.parametrize("U", [1, 2, 4])
def test_algorithm_1_line_by_line(U):
    """Lugmayr et al. 2022, Algorithm 1, with its two loops, one pixel at a time."""
    schedule, rng = Schedule.linear(12), Rng(5)
    known, x = Rng(1).normal((2, 2, 3, 1), np.float64), Rng(0).normal((2, 2, 3, 1), np.float64)
    states = repaint(wavy(schedule), x, schedule, Rng(5), known, MASK, jump=1, resamplings=U)
    for t in range(12, 0, -1):
        for u in range(1, U + 1):
            z, x_0 = rng.normal_like(x), np.sin(2 * x + t)
            (signal, noise), (signal_before, noise_before) = alpha_bar(schedule, t), alpha_bar(schedule, t - 1)
            beta = schedule.beta[t]
            new = np.empty_like(x)
            for b, h, w in itertools.product(range(2), range(2), range(3)):
                at = b, h, w, 0
                eps = (x[at] - math.sqrt(signal) * x_0[at]) / math.sqrt(noise)
                mu = (x[at] - beta / math.sqrt(noise) * eps) / math.sqrt(1 - beta)
                painted = mu + math.sqrt(beta * noise_before / noise) * z[at]
                put_in = math.sqrt(signal_before) * known[at] + math.sqrt(noise_before) * z[at]
                new[at] = put_in if MASK[h, w] else painted
            x = new
            np.testing.assert_allclose(next(states), x, rtol=1e-7, atol=1e-9)
            if u < U and t > 1:
                x = math.sqrt(1 - beta) * x + math.sqrt(beta) * rng.normal_like(x)
                np.testing.assert_allclose(next(states), x, rtol=1e-7, atol=1e-9)
            if t == 1:
                break
    assert next(states, None) is None


@pytest.mark.parametrize("seed", range(3))
def test_many_resamplings_find_the_conditional_mean(seed):
    """For data N(mean, C) the painted part has the mean C_uk C_kk^-1 (known - mean_k) + mean_u.

    With 30 resamplings of 50 steps it is off by less than a sixth of what plain replacement is off by; more steps bring
    it closer. The chain is linear: run without noise it gives the mean over all draws, with no error of sampling.
    """
    mean, C = gaussian_data(4, seed)
    schedule, mask = Schedule.cosine(50), np.array([[1, 0, 1, 0]])
    denoise = denoiser(of_vectors(ideal_x0(schedule, mean, C)), schedule, "x0", clip=False)
    known = np.random.default_rng(seed).normal(size=(1, 1, 4, 1)) * 2
    k, u = [0, 2], [1, 3]
    expected = mean[u] + C[np.ix_(u, k)] @ np.linalg.inv(C[np.ix_(k, k)]) @ (known.ravel()[k] - mean[k])

    def off(resamplings):
        x = repaint(denoise, np.zeros_like(known), schedule, NoNoise(), known, mask, jump=1, resamplings=resamplings)
        return np.abs(last(x).ravel()[u] - expected).max()

    replaced, few, many = off(1), off(5), off(30)
    assert many < replaced / 6 and many < few < replaced and replaced > 0.08


def test_resampling_narrows_to_the_conditional_variance():
    """Two numbers with correlation 0.9: given the one, the other has variance 0.19; replacement leaves it near 0.29."""
    schedule, n = Schedule.cosine(50), 4000
    network = ideal_x0(schedule, np.zeros(2), np.array([[1, 0.9], [0.9, 1]]))
    denoise = denoiser(of_vectors(network), schedule, "x0", clip=False)
    known, mask = np.full((n, 1, 2, 1), 1.5), np.array([[True, False]])
    x_T = Rng(0).normal((n, 1, 2, 1), np.float64)

    def painted(jump, resamplings):
        return last(repaint(denoise, x_T, schedule, Rng(1), known, mask, None, jump, resamplings))[:, 0, 1, 0]

    replaced, resampled_ = painted(1, 1), painted(10, 10)
    assert abs(replaced.var() - 0.19) > 0.07 > 0.025 > abs(resampled_.var() - 0.19)
    assert abs(replaced.mean() - 1.35) > 0.35 > 0.12 > abs(resampled_.mean() - 1.35)


@PROPERTY
@given(schedules(), st.integers(0, 1000), st.data())
def test_known_pixels_come_back_exactly(schedule, seed, data):
    """In any schedule, for any mask, jump and number of resamplings, in both dtypes, whatever else `known` holds."""
    steps = data.draw(st.integers(1, schedule.T))
    jump, resamplings = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(seed)
    dtype, mask = rng.choice([np.float32, np.float64]), rng.random((2, 3, 4, 1)) < 0.5
    known = rng.normal(size=(2, 3, 4, 2)).astype(dtype)
    holed = np.where(mask, known, np.nan)
    x_T = rng.normal(size=known.shape).astype(dtype)
    states = list(repaint(wavy(schedule), x_T, schedule, Rng(seed), holed, mask, steps, jump, resamplings))
    assert len(states) == len(resampled(steps, jump, resamplings)) - 1
    assert all(x.dtype == dtype and np.isfinite(x).all() for x in states)
    kept = np.broadcast_to(mask, known.shape)
    np.testing.assert_array_equal(states[-1][kept], known[kept])


def test_nothing_known_is_ancestral_sampling():
    schedule, x_T = Schedule.cosine(20), Rng(0).normal((2, 2, 3, 1), np.float64)
    nothing = np.zeros((2, 3), bool)
    painted = repaint(wavy(schedule), x_T, schedule, Rng(3), x_T, nothing, 8, resamplings=1)
    free = Sampling("ddpm", 8, variance="posterior").states(wavy(schedule), x_T, schedule, Rng(3))
    for a, b in zip(painted, free, strict=True):
        np.testing.assert_allclose(a, b)


# ------------------------------------------------------------------------------------- the way of RePaint


def test_resampled_by_hand():
    assert resampled(4, jump=1, resamplings=1) == [4, 3, 2, 1, 0]
    assert resampled(3, jump=1, resamplings=2) == [3, 2, 3, 2, 1, 2, 1, 0]
    assert resampled(5, jump=2, resamplings=2) == [5, 4, 3, 4, 5, 4, 3, 2, 1, 2, 3, 2, 1, 0]
    assert resampled(2, jump=5, resamplings=9) == [2, 1, 0]


@PROPERTY
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 6))
def test_resampled_walks_each_stretch_so_often(N, jump, resamplings):
    way = resampled(N, jump, resamplings)
    assert way[0] == N and way[-1] == 0 and way.count(0) == 1
    assert {abs(a - b) for a, b in itertools.pairwise(way)} == {1}
    down = [a for a, b in itertools.pairwise(way) if b < a]
    stretches = (N - 1) // jump
    assert len(down) == N + (resamplings - 1) * jump * stretches
    for t in range(1, N + 1):
        assert down.count(t) == (resamplings if 1 < t <= 1 + jump * stretches else 1)


# ---------------------------------------------------------------------------------------------- keep_known


@PROPERTY
@given(schedules(), st.integers(0, 1000), st.sampled_from(["ddim", "ddpm", "heun", "dpm"]))
def test_any_sampler_keeps_what_its_denoiser_knows(schedule, seed, sampler):
    """The last state holds the known pixels, and every guess is a pair that makes up x_t."""
    rng = np.random.default_rng(seed)
    known, x_T = rng.normal(size=(2, 2, 2, 3, 1)).astype(np.float32)
    denoise = keep_known(wavy(schedule), known, MASK, schedule)

    def checked(x_t, t):
        x_0, eps, v = denoise(x_t, t)
        np.testing.assert_allclose(q_sample(x_0, t, eps, schedule), x_t, atol=1e-4)
        kept = MASK.astype(bool)[None, ..., None]
        np.testing.assert_array_equal(x_0, np.where(kept, known, wavy(schedule)(x_t, t).x0))
        assert v is None
        return x_0, eps, v

    x_0 = last(Sampling(sampler).states(denoise, x_T, schedule, Rng(seed)))
    np.testing.assert_array_equal(x_0[:, MASK == 1], known[:, MASK == 1])
    checked(x_T, schedule.T)


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((3, 2)), r"take a mask \(2, 3\) or \(1, 2, 3, 1\), got \(3, 2\)"),
        (np.ones((2, 2, 3, 1)), r"got \(2, 2, 3, 1\)"),
        (np.ones((1, 2, 3)), r"got \(1, 2, 3\)"),
        (np.full((2, 3), 255), "1 where the image is known and 0 elsewhere, got 255"),
        (np.full((2, 3), 0.5), "got 0.5"),
        (np.full((2, 3), np.nan), "got nan"),
    ],
)
def test_bad_masks(mask, words):
    schedule, x = Schedule.linear(10), np.zeros((1, 2, 3, 1))
    with pytest.raises(ValueError, match=words):
        last(repaint(wavy(schedule), x, schedule, Rng(0), x, mask))
    with pytest.raises(ValueError, match=words):
        keep_known(wavy(schedule), x, mask, schedule)


def test_bad_arguments():
    schedule, x = Schedule.linear(10), np.zeros((1, 2, 3, 1))
    for wrong, words in (
        ({"known": np.zeros((1, 2, 4, 1))}, r"shape of x_T, \(1, 2, 3, 1\), got \(1, 2, 4, 1\)"),
        ({"steps": 11}, r"1\.\.10, got 11"),
        ({"spacing": "even"}, "got 'even'"),
        ({"jump": 0}, "at least 1, got 0 and 10"),
        ({"resamplings": 0}, "at least 1, got 10 and 0"),
    ):
        with pytest.raises(ValueError, match=words):
            last(
                repaint(
                    **{"denoise": wavy(schedule), "x_T": x, "schedule": schedule, "rng": Rng(0), "known": x} | wrong,
                    mask=MASK,
                )
            )
    with pytest.raises(ValueError, match=r"images \(6,\) take a mask"):
        as_mask(np.ones(6), np.zeros(6))


def test_known_images_widen_no_dtype():
    """Known images in float64 leave a model of float32 in float32."""
    schedule, known = Schedule.cosine(6), np.zeros((2, 2, 3, 1))
    denoise, x_T = denoiser(lambda x_t, t: x_t, schedule, "v"), np.ones(known.shape, np.float32)
    assert {x.dtype for x in repaint(denoise, x_T, schedule, Rng(0), known, MASK)} == {np.dtype(np.float32)}
    kept = keep_known(denoise, known, MASK, schedule)
    assert {x.dtype for x in ddim(kept, x_T, schedule, Rng(0), 3)} == {np.dtype(np.float32)}


def test_on_a_device(device):
    """RePaint with an Rng that draws nothing gives on every device what NumPy gives."""

    class Quiet:
        def normal_like(self, x):
            return x * 0

    schedule = Schedule.cosine(10)
    known, x_T = np.random.default_rng(0).normal(size=(2, 2, 2, 3, 1)).astype(np.float32)
    denoise = denoiser(lambda x_t, t: x_t, schedule, "v")

    def painted(known, x_T):
        kept = keep_known(denoise, known, MASK, schedule)
        return last(repaint(denoise, x_T, schedule, Quiet(), known, MASK, 5, 2, 2)), last(
            ddim(kept, x_T, schedule, Quiet(), 5)
        )

    for there, here in zip(painted(backend.to_device(known), backend.to_device(x_T)), painted(known, x_T), strict=True):
        assert backend.device_of(there) == backend.device()
        np.testing.assert_allclose(backend.to_numpy(there), here, rtol=1e-5, atol=1e-6)
