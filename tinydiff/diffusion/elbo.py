"""The variational bound on -log p(x_0), term by term (E10, E11, E13, E14, E16).

Functions of Tensors, which train a network; arrays count as Tensors without a gradient. All is in nats.
"""

from __future__ import annotations

import math
from typing import Any

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.diffusion.gaussian import mean_slope
from tinydiff.diffusion.schedule import Schedule, at, per_sample

HALF_LEVEL = 1 / 255
"""Half the distance of neighbouring grey levels, when 0..255 is scaled to [-1, 1]."""


def gaussian_kl(mean_1: Any, log_variance_1: Any, mean_2: Any, log_variance_2: Any) -> Tensor:
    """KL(N(m_1, s_1²) to N(m_2, s_2²)) = (s_1²/s_2² + (m_1 - m_2)²/s_2² - 1 + log s_2² - log s_1²)/2 for each number.

    With one variance s² for both it is (m_1 - m_2)²/(2 s²), the deck's form. The arguments are arrays or Tensors that
    broadcast, or numbers; at least one is an array. Returns a Tensor >= 0 of their common shape. (E14)
    """
    ratio = ops.exp(log_variance_1 - log_variance_2)
    distance = (mean_1 - mean_2) ** 2 * ops.exp(-log_variance_2)
    return (ratio + distance - 1.0 + log_variance_2 - log_variance_1) * 0.5


def discretised_log_likelihood(x_0: Any, mean: Any, log_variance: Any) -> Tensor:
    """log p(x_0 | x_1) of grey levels: how much of N(mean, sigma²) lies within half a level of each pixel.

        p = Phi((x_0 + 1/255 - mean)/sigma) - Phi((x_0 - 1/255 - mean)/sigma)

    where the intervals of -1 and 1, black and white, reach to infinity, so that the 256 levels share out all of it.
    Computed by logarithms, which stay finite and exact however far off the mean is.
    x_0: (B, ...), the levels -1, -1 + 2/255, ..., 1. mean, log_variance: broadcast to it. Returns a Tensor like x_0.
    (E11; Ho et al. 2020, eq. 13)
    """
    per_sigma = ops.exp(log_variance * -0.5)
    off = x_0 - mean
    left = -ops.absolute(off)  # by symmetry: on the left of its mean the logarithm of Phi has all its digits
    black, white = x_0 < HALF_LEVEL - 1, x_0 > 1 - HALF_LEVEL
    upper = ops.where(black, off, ops.where(white, -off, left)) + HALF_LEVEL
    log_upper = ops.log_normal_cdf(upper * per_sigma)
    log_lower = ops.log_normal_cdf((left - HALF_LEVEL) * per_sigma)
    within = log_upper + ops.log(1.0 - ops.exp(log_lower - log_upper))
    return ops.where(black | white, log_upper, within)


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
