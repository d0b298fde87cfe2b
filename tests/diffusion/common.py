"""What the diffusion tests share: hypothesis strategies, and slow references that know only the betas."""

import math
import warnings
from fractions import Fraction

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tinydiff.diffusion import Schedule

# The same examples each time; no deadline, since a slow machine is no failure.
PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


def quiet(betas):
    """The schedule with these betas, without the warning that x_T still shows the data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Schedule.from_betas(betas)


def schedules(max_T=12, min_T=1):
    """Any valid schedule of at most max_T steps, the shipped ones among them."""
    betas = st.lists(st.floats(1e-6, 0.999), min_size=min_T, max_size=max_T).map(quiet)
    from_one = st.integers(min_T, max_T)
    from_two = st.integers(2, max_T)  # in one step these two would keep much of the signal
    shipped = [from_one.map(Schedule.cosine), from_one.map(Schedule.sigmoid)]
    return st.one_of(betas, *shipped, from_two.map(Schedule.linear), from_two.map(Schedule.scaled_linear))


@st.composite
def batches(draw, first=1, arrays=2):
    """A schedule, times (one number or one a sample) in first..T, and some float64 arrays of one shape (B, ...)."""
    schedule = draw(schedules())
    shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 3), max_size=3)))
    time = st.integers(first, schedule.T)
    t = draw(st.one_of(time, st.lists(time, min_size=shape[0], max_size=shape[0]).map(np.array)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return schedule, t, *(rng.normal(size=shape) for _ in range(arrays))


def each_t(t, batch):
    """The time of each sample, as a list of Python numbers."""
    return [int(t)] * batch if np.ndim(t) == 0 else [int(i) for i in t]


def alpha_bar(schedule, t):
    """prod_{i<=t} (1 - beta_i) and 1 minus it, in exact fractions, rounded once."""
    product = math.prod((1 - Fraction(float(b)) for b in schedule.beta[1 : t + 1]), start=Fraction(1))
    return float(product), float(1 - product)


def gaussian_data(dimension, seed):
    """A mean (D,) and covariance (D, D) for data x_0 ~ N(mean, covariance)."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(dimension, dimension)) / dimension**0.5
    return rng.normal(size=dimension), root @ root.T + 0.5 * np.eye(dimension)


def ideal_x0(schedule, mean, covariance):
    """A network that gives E[x_0 | x_t] for data N(mean, covariance): conditioning a joint Gaussian."""

    def network(x_t, t):
        signal, noise = alpha_bar_fast(schedule, int(np.ravel(t)[0]))
        total = signal * covariance + noise * np.eye(len(mean))
        gain = signal**0.5 * covariance @ np.linalg.inv(total)
        return mean + (x_t - signal**0.5 * mean) @ gain.T

    return network


def alpha_bar_fast(schedule, t):
    """alpha_bar in floats, for long schedules."""
    product = math.prod(1 - schedule.beta[1 : t + 1])
    return product, 1 - product


def within(measured, expected, standard_error, how_many=5):
    """Assert that a measured average lies within a number of standard errors of what is expected."""
    distance = np.max(np.abs(np.asarray(measured) - expected) / standard_error)
    assert distance < how_many, f"{distance:.1f} standard errors from what was expected"
