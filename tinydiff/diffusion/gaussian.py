"""The Gaussians of diffusion: forward process, posterior, reverse mean, and what a network may predict.

Every function takes x as a NumPy or CuPy array or as a Tensor, float32 or float64, and keeps its dtype. t is one
whole number for the whole batch, or an integer array (B,), one a sample, in 1..T unless said otherwise; any other
t is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinydiff.backend import Array
from tinydiff.diffusion.schedule import Schedule, at, lookup
from tinydiff.rng import Rng

# ------------------------------------------------------------------------------------ the forward process


def forward_step(x_prev: Array, t: int | Array, schedule: Schedule, rng: Rng) -> Array:
    """Draw x_t from q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

    x_prev: x_{t-1}, (B, ...); t in 1..T. Returns x_t of the same shape. (E1; Ho et al. 2020, eq. 2)
    """
    alpha, beta = at(schedule.alpha, t, x_prev), at(schedule.beta, t, x_prev)  # alpha_t is 1 - beta_t
    return alpha**0.5 * x_prev + beta**0.5 * rng.normal_like(x_prev)


def forward_trajectory(x_0: Array, schedule: Schedule, rng: Rng) -> Iterator[Array]:
    """Draw x_{1:T} from q(x_{1:T} | x_0) = prod_t q(x_t | x_{t-1}), yielding x_1, ..., x_T.

    x_0: (B, ...), and so is each x_t. (E2; Ho et al. 2020, eq. 2)
    """
    x_t = x_0
    for t in range(1, schedule.T + 1):
        x_t = forward_step(x_t, t, schedule, rng)
        yield x_t


def forward_marginal(x_0: Any, t: int | Array, schedule: Schedule) -> tuple[Any, Any]:
    """The mean and standard deviation of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).

    x_0: (B, ...); t in 0..T, and t = 0 gives x_0 and 0.
    Returns the mean, shaped as x_0, and the standard deviation, a number or (B, 1, ...).
    (E4; Ho et al. 2020, eq. 4)
    """
    std = at(np.sqrt(schedule.one_minus_alpha_bar), t, x_0, first=0)
    return at(np.sqrt(schedule.alpha_bar), t, x_0, first=0) * x_0, std


def q_sample(x_0: Any, t: int | Array, eps: Any, schedule: Schedule) -> Any:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps: jump from the data to step t at once.

    x_0, eps: (B, ...), eps drawn from N(0, I); t in 0..T, and t = 0 gives x_0 back.
    Returns x_t of the same shape. Raises ValueError if the two shapes differ. (E4; Ho et al. 2020, eq. 4 and 14)
    """
    _check_same_shape("x_0 and eps", x_0, eps)
    mean, std = forward_marginal(x_0, t, schedule)
    return mean + std * eps


# --------------------------------------------------------------------------------------- one step backward


def posterior(x_t: Any, x_0: Any, t: int | Array, schedule: Schedule) -> tuple[Any, Any]:
    """The mean and variance of q(x_{t-1} | x_t, x_0) = N(mu_tilde_t, beta_tilde_t I).

        mu_tilde_t = (sqrt(alpha_bar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - alpha_bar_{t-1}) x_t)
                     / (1 - alpha_bar_t)
        beta_tilde_t = beta_t (1 - alpha_bar_{t-1})/(1 - alpha_bar_t), which is 0 at t = 1

    x_t, x_0: (B, ...). Returns the mean, shaped as x_t, and the variance, a number or (B, 1, ...).
    Raises ValueError if the two shapes differ. (E12; Ho et al. 2020, eq. 6–7)
    """
    _check_same_shape("x_t and x_0", x_t, x_0)
    s = schedule
    weight_0 = np.sqrt(s.alpha_bar_prev) * s.beta / s.one_minus_alpha_bar  # tables over all t, float64
    weight_t = np.sqrt(s.alpha) * s.one_minus_alpha_bar_prev / s.one_minus_alpha_bar
    mean = at(weight_0, t, x_t) * x_0 + at(weight_t, t, x_t) * x_t
    return mean, at(s.posterior_variance, t, x_t)


def reverse_mean(x_t: Any, eps: Any, t: int | Array, schedule: Schedule) -> Any:
    """(x_t - beta_t/sqrt(1 - alpha_bar_t) eps)/sqrt(alpha_t): the mean of x_{t-1}, from the noise in x_t.

    With the noise that made x_t it is mu_tilde_t in its second form (E12; 1 - alpha_t is beta_t); with a
    network's eps_theta(x_t, t) it is mu_theta (E15).

    x_t, eps: (B, ...). Returns the same shape. Raises ValueError if the two shapes differ, and where alpha_t is 0.
    (E12 and E15; Ho et al. 2020, eq. 10–11)
    """
    _check_same_shape("x_t and eps", x_t, eps)
    _check_signal(t, schedule)
    beta, noise = at(schedule.beta, t, x_t), at(np.sqrt(schedule.one_minus_alpha_bar), t, x_t)
    return (x_t - beta / noise * eps) / at(np.sqrt(schedule.alpha), t, x_t)


def learned_log_variance(v: Any, t: int | Array, schedule: Schedule) -> Any:
    """log sigma_t² = v log beta_t + (1 - v) log beta_tilde_t: a variance between the two fixed ones.

    v: (B, ...), 0 for beta_tilde_t and 1 for beta_t, the two ends between which the best variance lies; nothing keeps a
    network from going beyond. At t = 1, where beta_tilde_t is 0, that of t = 2 stands in. Returns v's shape.
    (E13; Nichol & Dhariwal 2021, eq. 15)
    """
    log_beta, log_beta_tilde = at(schedule.log_beta, t, v), at(schedule.posterior_log_variance, t, v)
    return v * log_beta + (1 - v) * log_beta_tilde


# ------------------------------------------------------------------------------ what the network predicts


class Prediction(NamedTuple):
    """A guess at what x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps is made of, each shaped as x_t.

    v: of a network that also learned the variance of its reverse step, what `learned_log_variance` takes, else None.
    """

    x0: Any
    eps: Any
    v: Any = None


def target_of(x_0: Any, eps: Any, t: int | Array, schedule: Schedule, target: str = "eps") -> Any:
    """What a network is trained to output: "eps", "x0", or "v", the blend of both that suits every t.

        v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0

    v is eps where x_t is all data and -x_0 where x_t is all noise: always the part that is hard to see in x_t.
    x_0, eps: (B, ...). Returns the same shape. Raises ValueError for another target, or if the two shapes differ.
    (E15; Salimans & Ho 2022, section 4)
    """
    _check_same_shape("x_0 and eps", x_0, eps)
    signal, noise = _signal_and_noise(t, x_0, schedule, target)
    if target == "eps":
        return eps
    if target == "x0":
        return x_0
    return signal * eps - noise * x_0


def predict(output: Any, x_t: Any, t: int | Array, schedule: Schedule, target: str = "eps") -> Prediction:
    """Turn the network's output at x_t into its guess of both x_0 and eps.

        target "eps":  x_0 = (x_t - sqrt(1 - alpha_bar_t) eps)/sqrt(alpha_bar_t)
        target "x0":   eps = (x_t - sqrt(alpha_bar_t) x_0)/sqrt(1 - alpha_bar_t)
        target "v":    x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v
                       eps = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v

    The first magnifies the network's error by up to 1/sqrt(alpha_bar_T), 20,000 for the cosine schedule; the
    second by up to 1/sqrt(1 - alpha_bar_1), about 150; "v" never magnifies it.
    output, x_t: (B, ...). Raises ValueError for another target, if the two shapes differ, and for "eps" where
    alpha_bar_t is 0. (E15; Salimans & Ho 2022, section 4)
    """
    _check_same_shape("output and x_t", output, x_t)
    signal, noise = _signal_and_noise(t, x_t, schedule, target)
    if target == "eps":
        _check_signal(t, schedule)
        return Prediction((x_t - noise * output) / signal, output)
    if target == "x0":
        return Prediction(output, (x_t - signal * output) / noise)
    return Prediction(signal * x_t - noise * output, noise * x_t + signal * output)


def mean_slope(t: int | Array, schedule: Schedule, target: str = "eps") -> Any:
    """How far the mean mu_theta of x_{t-1} moves when the network's output does: d mu_theta/d output.

        sqrt(alpha_bar_{t-1}) beta_t/(1 - alpha_bar_t) for target "x0", since mu_theta is mu_tilde_t at the guessed x_0;
        that times -sqrt(1 - alpha_bar_t)/sqrt(alpha_bar_t) for "eps", and times -sqrt(1 - alpha_bar_t) for "v"

    So mu_theta - mu_tilde_t, which the bound measures, is the slope times the error of the output.
    t: in 1..T. Returns a float, or (B,) float64 on the host. Raises ValueError for another target or t.
    (E12, E15 and E16; Ho et al. 2020, eq. 8–12)
    """
    s = schedule
    x0 = np.sqrt(s.alpha_bar_prev) * s.beta / s.one_minus_alpha_bar
    with np.errstate(divide="ignore"):  # alpha_bar_T may be 0
        eps = -np.sqrt(s.one_minus_alpha_bar / s.alpha_bar)
    factor = {"x0": 1.0, "eps": eps, "v": -np.sqrt(s.one_minus_alpha_bar)}
    if target not in factor:
        raise ValueError(f"target must be 'eps', 'x0' or 'v', got {target!r}")
    return lookup(x0 * factor[target], t)


def _signal_and_noise(t: int | Array, x: Any, schedule: Schedule, target: str) -> tuple[Any, Any]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for t in 1..T, after checking the target's name."""
    if target not in ("eps", "x0", "v"):
        raise ValueError(f"target must be 'eps', 'x0' or 'v', got {target!r}")
    return at(np.sqrt(schedule.alpha_bar), t, x), at(np.sqrt(schedule.one_minus_alpha_bar), t, x)


def reverse_log_variance(prediction: Prediction, t: int, schedule: Schedule, variance: str | None = None) -> Any:
    """log sigma_t² of p_theta(x_{t-1} | x_t): a number, or for a learned one an array shaped as x_t.

    variance: "posterior" for beta_tilde_t, "beta" for beta_t, "learned" for what the network says; by default as
    `chosen_variance` says. At t = 1, where beta_tilde_t = 0 would leave x_0 no probability, that of t = 2 stands in.
    Raises ValueError for another variance, or if the network did not learn one. (E8, E13; Ho et al. 2020, section 3.2)
    """
    variance = chosen_variance(prediction, variance)
    if variance == "learned":
        return learned_log_variance(prediction.v, t, schedule)
    schedule.reverse_variance(variance)  # raises for other names
    return lookup(schedule.log_beta if variance == "beta" else schedule.posterior_log_variance, t)


def chosen_variance(prediction: Prediction, variance: str | None) -> str:
    """The variance asked for, by default "learned" if the network learned one, else "posterior".

    Raises ValueError for "learned" if the network did not learn one. (E13)
    """
    if variance is None:
        return "posterior" if prediction.v is None else "learned"
    if variance == "learned" and prediction.v is None:
        raise ValueError("variance 'learned' needs a network that learned one; this one takes 'posterior' or 'beta'")
    return variance


# ---------------------------------------------------------------------------------------------- densities


def log_density(x: Any, mean: Any, variance: float) -> Any:
    """log N(x; mean, variance I) in nats for each sample, summed over its dimensions.

    x, mean: (B, ...); variance: one number. Returns (B,).
    Raises ValueError unless variance > 0: a single point (beta_tilde_1 = 0) has no density. (E2 and E8)
    """
    if not variance > 0:
        raise ValueError(f"a density needs a variance > 0, got {variance}")
    terms = -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))
    return terms.sum(axis=tuple(range(1, x.ndim)))


def forward_log_density(trajectory: Sequence[Any], schedule: Schedule) -> Any:
    """log q(x_{1:T} | x_0) = sum_t log N(x_t; sqrt(1 - beta_t) x_{t-1}, beta_t I) in nats for each sample.

    trajectory: x_0, x_1, ..., x_T, each (B, ...). Returns (B,).
    Raises ValueError if there are not T + 1 states. (E2; Ho et al. 2020, eq. 2)
    """
    check_trajectory(trajectory, schedule)
    total = 0.0
    for t in range(1, schedule.T + 1):
        x_prev, x_t = trajectory[t - 1], trajectory[t]
        alpha, beta = at(schedule.alpha, t, x_t), at(schedule.beta, t, x_t)
        total = total + log_density(x_t, alpha**0.5 * x_prev, beta)
    return total


def check_trajectory(trajectory: Sequence[Any], schedule: Schedule) -> None:
    """Raise ValueError unless the trajectory x_0..x_T has T + 1 states."""
    if len(trajectory) != schedule.T + 1:
        raise ValueError(f"a trajectory x_0..x_T has {schedule.T + 1} states, got {len(trajectory)}")


def _check_same_shape(names: str, a: Any, b: Any) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{names} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def _check_signal(t: int | Array, schedule: Schedule) -> None:
    """Raise ValueError where alpha_bar_t = 0: every x_0 agrees with an x_t that is nothing but noise, and its eps."""
    if np.any(lookup(schedule.alpha_bar, t) == 0):
        raise ValueError(
            f"eps does not tell x_0 at t = {schedule.T}, where this schedule has alpha_bar_t = 0 (zero terminal SNR): "
            "let the network predict 'v' or 'x0'"
        )
