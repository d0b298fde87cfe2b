"""The variational bound on -log p_theta(x_0): as one average, term by term, and as a loss (E10, E11, E13, E14, E16).

All is in nats. What works on single numbers takes arrays or Tensors and gives Tensors, which train a network; what
evaluates a trained one gives arrays, one number a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tinydiff import backend, ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.diffusion.gaussian import (
    forward_log_density,
    forward_marginal,
    forward_trajectory,
    mean_slope,
    posterior,
    q_sample,
    reverse_log_variance,
)
from tinydiff.diffusion.samplers import Denoise, reverse_log_density
from tinydiff.diffusion.schedule import Schedule, at, per_sample
from tinydiff.rng import Rng

HALF_LEVEL = 1 / 255
"""Half the distance of neighbouring grey levels, when 0..255 is scaled to [-1, 1]."""

Decoder = Callable[[Any, Any, Any], Tensor]
"""log p(x_0 | x_1) of each number, from x_0, the mean and the log-variance: `discretised_log_likelihood` or another."""

# ------------------------------------------------------------------------------------ of single numbers


def gaussian_kl(mean_1: Any, log_variance_1: Any, mean_2: Any, log_variance_2: Any) -> Tensor:
    """KL(N(m_1, s_1²) to N(m_2, s_2²)) = (s_1²/s_2² + (m_1 - m_2)²/s_2² - 1 + log s_2² - log s_1²)/2 for each number.

    With one variance s² for both it is (m_1 - m_2)²/(2 s²), the deck's form. The arguments are arrays or Tensors that
    broadcast, or numbers; at least one is an array. Returns a Tensor >= 0 of their common shape. (E14)
    """
    log_ratio = log_variance_1 - log_variance_2
    distance = (mean_1 - mean_2) ** 2 * _exp(-log_variance_2)
    return ops.mul(_exp(log_ratio) - 1.0 - log_ratio + distance, 0.5)


def _exp(x: Any) -> Any:
    """e^x; of a number a number, which widens no dtype."""
    return math.exp(x) if isinstance(x, float) else ops.exp(x)


def gaussian_log_likelihood(x_0: Any, mean: Any, log_variance: Any) -> Tensor:
    """log N(x_0; mean, sigma²) of each number: the decoder for data that are real numbers, not grey levels.

    x_0: (B, ...). mean, log_variance: broadcast to it. Returns a Tensor like x_0. (E8)
    """
    return ops.mul((x_0 - mean) ** 2 * _exp(-log_variance) + log_variance + math.log(2 * math.pi), -0.5)


def discretised_log_likelihood(x_0: Any, mean: Any, log_variance: Any) -> Tensor:
    """log p(x_0 | x_1) of grey levels: how much of N(mean, sigma²) lies within half a level of each pixel.

        p = Phi((x_0 + 1/255 - mean)/sigma) - Phi((x_0 - 1/255 - mean)/sigma)

    where the intervals of -1 and 1, black and white, reach to infinity, so that the 256 levels share out all of it.
    Computed by logarithms, which stay finite and exact however far off the mean is.
    x_0: (B, ...), the levels -1, -1 + 2/255, ..., 1. mean, log_variance: broadcast to it. Returns a Tensor like x_0.
    (E11; Ho et al. 2020, eq. 13)
    """
    per_sigma = _exp(-0.5 * log_variance)
    off = x_0 - mean
    left = -ops.absolute(off)  # by symmetry: on the left of its mean the logarithm of Phi has all its digits
    black, white = x_0 < HALF_LEVEL - 1, x_0 > 1 - HALF_LEVEL
    upper = ops.where(black, off, ops.where(white, -off, left)) + HALF_LEVEL
    log_upper = ops.log_normal_cdf(upper * per_sigma)
    log_lower = ops.log_normal_cdf((left - HALF_LEVEL) * per_sigma)
    within = log_upper + ops.log(1.0 - ops.exp(log_lower - log_upper))
    return ops.where(black | white, log_upper, within)


# ------------------------------------------------------------------------------------ the bound, term by term


def bound_terms(
    x_0: Array,
    denoise: Denoise,
    schedule: Schedule,
    rng: Rng,
    variance: str | None = None,
    times: Iterable[int] | None = None,
    decoder: Decoder = discretised_log_likelihood,
) -> Iterator[Array]:
    """The terms whose sum bounds -log p_theta(x_0), yielding L_T, then L_{t-1} for t = T, ..., 2, and L_0.

        -log p_theta(x_0) <= E_q[L_T + sum_{t=2..T} L_{t-1} + L_0]

    each at one x_t drawn from q(x_t | x_0); equal rng, equal x_t, whichever other times there are.
    x_0: (B, ...), in [-1, 1] for the usual decoder. variance, decoder: see `bound_term`. times: which t to take after
    L_T, all by default; t = 1 gives L_0. Each term is (B,), in nats, summed over the dimensions of x_0.
    Raises as `bound_term` does. (E11; Ho et al. 2020, eq. 5)
    """
    yield prior_term(x_0, schedule)
    for t in range(schedule.T, 0, -1) if times is None else times:
        x_t = q_sample(x_0, t, rng.at(t).normal_like(x_0), schedule)
        yield bound_term(x_0, x_t, t, denoise, schedule, variance, decoder)


def prior_term(x_0: Array, schedule: Schedule) -> Array:
    """L_T = KL(q(x_T | x_0) to N(0, I)): (B,), in nats, for x_0 (B, ...). Nothing in it can be learned. (E11, E5)"""
    mean, std = forward_marginal(x_0, schedule.T, schedule)
    return _summed(gaussian_kl(mean, 2 * math.log(std), 0.0, 0.0))


def bound_term(
    x_0: Array,
    x_t: Array,
    t: int,
    denoise: Denoise,
    schedule: Schedule,
    variance: str | None = None,
    decoder: Decoder = discretised_log_likelihood,
) -> Array:
    """The bound's term of step t: L_{t-1} for t > 1, and L_0 for t = 1.

        L_{t-1} = KL(q(x_{t-1} | x_t, x_0) to p_theta(x_{t-1} | x_t)),   L_0 = -log p_theta(x_0 | x_1)

    p_theta is N(mu_theta, sigma_t²), and mu_theta is mu_tilde_t with the guessed x_0 in place of the true one.
    x_0, x_t: (B, ...). t: in 1..T. variance: which sigma_t², see `reverse_log_variance`. decoder: log p(x_0 | x_1).
    Returns (B,), in nats, summed over the dimensions of x_0. Raises ValueError for t outside 1..T, another variance, or
    "learned" if the network did not learn one.
    (E11, E12; Ho et al. 2020, eq. 5–7; the slide once writes q(x_t | x_{t+1}, x_0) here, an index too high)
    """
    prediction = denoise(x_t, t)
    mean, _ = posterior(x_t, prediction.x0, t, schedule)
    log_variance = reverse_log_variance(prediction, t, schedule, variance)
    if t == 1:
        return -_summed(decoder(x_0, mean, log_variance))
    mu_tilde, beta_tilde = posterior(x_t, x_0, t, schedule)
    return _summed(gaussian_kl(mu_tilde, math.log(beta_tilde), mean, log_variance))


def bits_per_dim(nats: Any, x_0: Array) -> Any:
    """Nats a sample as bits a dimension, the usual unit: nats/(D log 2), for x_0 (B, ...) with D numbers a sample."""
    return nats / (math.prod(x_0.shape[1:]) * math.log(2))


def _summed(terms: Tensor) -> Array:
    """The sum over all axes but the first, as an array."""
    return terms.data.sum(axis=tuple(range(1, terms.ndim)))


# ------------------------------------------------------------------------------------ the bound, along trajectories


def trajectory_bound(
    trajectory: Sequence[Array], denoise: Denoise, schedule: Schedule, variance: str = "beta"
) -> Array:
    """log q(x_{1:T} | x_0) - log p_theta(x_{0:T}), whose average over forward trajectories is the bound on -log p(x_0).

    trajectory: x_0, x_1, ..., x_T, each (B, ...), as `forward_trajectory` draws them. Returns (B,), in nats. Raises as
    `reverse_log_density` does. (E10; Ho et al. 2020, eq. 3)
    """
    return forward_log_density(trajectory, schedule) - reverse_log_density(trajectory, denoise, schedule, variance)


def log_likelihood(
    x_0: Array, denoise: Denoise, schedule: Schedule, rng: Rng, trajectories: int, variance: str = "beta"
) -> Array:
    """log p_theta(x_0), the model's probability as an average over forward trajectories.

        p_theta(x_0) = E_q[p_theta(x_{0:T})/q(x_{1:T} | x_0)]

    For small problems: the average of `trajectories` many ratios is right in the mean, but a few large ones dominate it
    where T or the dimension is large, and its logarithm is then too small. One trajectory gives minus the bound (E10).
    x_0: (B, ...). Returns (B,), in nats. All T + 1 states of all trajectories are in memory at once.
    Raises ValueError for fewer than one trajectory, else as `reverse_log_density`.
    (E21; Sohl-Dickstein et al. 2015, eq. 6–9)
    """
    if trajectories < 1:
        raise ValueError(f"the number of trajectories must be at least 1, got {trajectories}")
    mathematics = backend.array_module(x_0)
    repeated = mathematics.repeat(x_0, trajectories, axis=0)
    chains = [repeated, *forward_trajectory(repeated, schedule, rng)]
    log_ratio = -trajectory_bound(chains, denoise, schedule, variance).reshape(len(x_0), trajectories)
    largest = log_ratio.max(axis=1)
    return largest + mathematics.log(mathematics.exp(log_ratio - largest[:, None]).mean(axis=1))


# ------------------------------------------------------------------------------------ a loss for the variance


def variance_bound(
    error: Array, v: Any, t: Array, x_0: Array, slope: Array, log_beta: Array, log_beta_tilde: Array
) -> Tensor:
    """The bound's terms at the drawn times, in nats per dimension, as a loss for the variance alone (E13, E11).

        KL(q(x_{t-1} | x_t, x_0) to N(mu_theta, sigma_t²)) for t > 1,   -log p(x_0 | x_1) for t = 1
        log sigma_t² = v log beta_t + (1 - v) log beta_tilde_t

    error: the network's output less what it should be, (B, ...), without a gradient, so that the mean learns from
    L_simple and not from this. v: (B, ...), see `learned_log_variance`. t: (B,). The rest: `variance_bound_arrays`.
    Returns a scalar Tensor, the mean over all. (Nichol & Dhariwal 2021, section 3.1)
    """
    log_variance = v * log_beta + (1.0 - v) * log_beta_tilde
    mean_error = slope * error
    kl = gaussian_kl(0.0, log_beta_tilde, mean_error, log_variance)
    first = (t == 1).reshape(-1, *[1] * (x_0.ndim - 1))
    return ops.where(first, -discretised_log_likelihood(x_0, x_0 + mean_error, log_variance), kl).mean()


def variance_bound_arrays(x_0: Array, t: Array, schedule: Schedule, target: str) -> tuple[Array, ...]:
    """What `variance_bound` looks up for times t (B,) in 1..T and a network's target, on x_0's device.

    Returns x_0 itself (B, ...), and d mu_theta/d output, log beta_t, and log beta_tilde_t, each (B, 1, ...).
    """
    slope = per_sample(mean_slope(t, schedule, target), x_0)
    return x_0, slope, at(schedule.log_beta, t, x_0), at(schedule.posterior_log_variance, t, x_0)
