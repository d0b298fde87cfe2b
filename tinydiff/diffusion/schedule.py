"""Noise schedules (E3, E5–E7): one table per symbol, indexed by t = 0..T, where 0 is the data."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array

BETA_MAX = 0.999
"""The schedules' formulas are clipped here: at beta = 1 a step would wipe out its input (E7)."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """How much noise each step of the forward process adds, and every table that follows from it.

    beta: (T+1,) float64, beta_0 = 0 and 0 < beta_t < 1 for t = 1..T; usually made by `linear`, `cosine`, ..., or
    `from_betas`, which warns where x_T still shows the data (E5). Every table is (T+1,) float64 on the host;
    `at(table, t, x)` looks one up. beta_T may also be 1: then alpha_bar_T = 0, and x_T is nothing but noise, see
    `zero_terminal_snr`.
    Raises ValueError for T < 1, for another beta, and where an alpha_bar_t is too small for float32 arithmetic.
    """

    beta: np.ndarray

    def __post_init__(self) -> None:
        beta = np.array(self.beta, dtype=np.float64)  # a copy, so that nobody else can write to it
        if beta.ndim != 1 or len(beta) < 2 or beta[0] != 0:
            raise ValueError(f"beta must be [0, beta_1, ..., beta_T] with T >= 1, got an array of shape {beta.shape}")
        wrong = np.flatnonzero(~((beta[1:] > 0) & (beta[1:] < 1))) + 1
        if wrong.size and (wrong[0], beta[wrong[0]]) != (self.T, 1):
            raise ValueError(
                f"beta_t must lie inside (0, 1), and only beta_T may be 1, got beta_{wrong[0]} = {beta[wrong[0]]}"
            )
        beta.flags.writeable = False
        object.__setattr__(self, "beta", beta)
        if (smallest := self.alpha_bar[beta < 1].min()) < 1e-60:
            raise ValueError(
                f"alpha_bar_t must be at least 1e-60, for float32 to divide by its root; got {smallest:.1e}: "
                f"use fewer steps than T = {self.T}, or smaller betas"
            )

    @classmethod
    def from_betas(cls, betas: Iterable[float]) -> Schedule:
        """The schedule with the given beta_1..beta_T, each inside (0, 1). Warns where x_T still shows the data (E5)."""
        schedule = cls(np.concatenate([[0.0], np.asarray(list(betas), dtype=np.float64).reshape(-1)]))
        if schedule.terminal_kl() > 0.005:
            warnings.warn(
                f"alpha_bar_T = {schedule.alpha_bar[-1]:.3g} is not near 0: x_T is {schedule.terminal_kl():.2g} nats "
                "per dimension away from the N(0, I) that sampling starts from; use more steps or larger betas (E5)",
                stacklevel=2,
            )
        return schedule

    @classmethod
    def linear(cls, T: int = 1000) -> Schedule:
        """beta_t rises evenly from 1e-4 to 0.02 over T = 1000 steps (E6; Ho et al. 2020, section 4).

        For another T both ends are multiplied by 1000/T, so that alpha_bar_T stays near 4e-5 or falls below it.
        For T <= 20 the last betas would reach 1; they are clipped at 0.999. Raises ValueError for T < 1.
        """
        scale = 1000 / _checked_steps(T)
        return cls.from_betas(np.linspace(1e-4 * scale, 0.02 * scale, T).clip(max=BETA_MAX))

    @classmethod
    def cosine(cls, T: int = 1000) -> Schedule:
        """alpha_bar_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s) π/2), s = 0.008, beta_t clipped at 0.999.

        beta_t = 1 - alpha_bar_t/alpha_bar_{t-1}. Raises ValueError for T < 1.
        (E7; Nichol & Dhariwal 2021, eq. 17)
        """
        s = 0.008
        f = np.cos((np.arange(_checked_steps(T) + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
        return cls.from_betas(_betas(f).clip(max=BETA_MAX))

    @classmethod
    def scaled_linear(cls, T: int = 1000) -> Schedule:
        """sqrt(beta_t) rises evenly from sqrt(0.00085) to sqrt(0.012) over T = 1000 steps: Stable Diffusion's schedule.

        For another T both ends of beta are multiplied by 1000/T, as in `linear`. It keeps sqrt(alpha_bar_T) = 0.068
        of the image to the end, which `zero_terminal_snr` mends. Raises ValueError for T < 1.
        (Rombach et al. 2022; their code's "linear")
        """
        roots = np.linspace(0.00085**0.5, 0.012**0.5, _checked_steps(T))
        return cls.from_betas((roots**2 * 1000 / T).clip(max=BETA_MAX))

    @classmethod
    def sigmoid(cls, T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
        """alpha_bar falls from 1 to 0 along a piece of the S-shaped curve sigmoid(u) = 1/(1 + exp(-u)).

            alpha_bar_t = (sigmoid(end/tau) - sigmoid(u_t/tau))/(sigmoid(end/tau) - sigmoid(start/tau)),
            u_t = start + (end - start) t/T,   beta_t clipped at 0.999

        start, end: the piece of the curve. tau: a larger one straightens it, a smaller one makes it steep in the middle
        and flat at both ends. Raises ValueError for T < 1, start >= end or tau <= 0, and for a tau so small that some
        steps would add no noise.
        (Jabri et al. 2023, section 3; Chen 2023, Algorithm 1)
        """
        if not (start < end and tau > 0):
            raise ValueError(f"a sigmoid schedule needs start < end and tau > 0, got {start}, {end} and {tau}")
        u = np.linspace(start, end, _checked_steps(T) + 1)
        curve = np.tanh(u / (2 * tau))  # 2 sigmoid(u/tau) - 1, and it cannot overflow
        if not (np.diff(curve) > 0).all():
            raise ValueError(f"the sigmoid is flat near u = {start} or {end} with tau = {tau}: use a larger tau")
        return cls.from_betas(_betas(curve[-1] - curve).clip(max=BETA_MAX))

    def zero_terminal_snr(self) -> Schedule:
        """This schedule, shifted and stretched until alpha_bar_T = 0: sampling starts from what training ended with.

            sqrt(alpha_bar_t) <- (sqrt(alpha_bar_t) - sqrt(alpha_bar_T))
                                 sqrt(alpha_bar_1)/(sqrt(alpha_bar_1) - sqrt(alpha_bar_T))

        At t = T there is no signal left, so eps does not tell x_0, and a network must predict "v" or "x0". Without it,
        a network learns to read the image's brightness off x_T, where sampling then gives it none.
        Raises ValueError for T = 1, and for a first beta too small to be seen beside 1.
        (Lin et al. 2023, Algorithm 1)
        """
        if self.T == 1:
            raise ValueError("one step cannot be stretched between alpha_bar_1 and alpha_bar_T: expected T >= 2, got 1")
        root = np.sqrt(self.alpha_bar)
        stretched = (root[1:] - root[-1]) * root[1] / (root[1] - root[-1])
        return Schedule(np.append(0.0, _betas(np.append(1.0, stretched**2))))

    def shifted(self, ratio: float) -> Schedule:
        """This schedule with the noise `ratio` times as strong beside the signal: SNR_t <- SNR_t / ratio².

            alpha_bar_t <- alpha_bar_t / (alpha_bar_t + ratio² (1 - alpha_bar_t)),   beta_t clipped at 0.999

        What is large and plain shows through much noise, since many pixels say the same: on a schedule that suits 8 x 8
        latents, an image of 32 x 32 is decided in the last few steps. A ratio of 32/8 gives both the same time.
        Raises ValueError for a ratio that is not above 0. (Hoogeboom et al. 2023, "simple diffusion"; Chen 2023)
        """
        if not ratio > 0:
            raise ValueError(f"the ratio of the shift must be above 0, got {ratio}")
        alpha_bar = self.alpha_bar / (self.alpha_bar + ratio**2 * (1 - self.alpha_bar))
        return Schedule(np.append(0.0, _betas(alpha_bar).clip(max=BETA_MAX)))

    def respaced(self, times: Iterable[int]) -> Schedule:
        """The schedule of a chain that stops only at some of the times, to sample in fewer steps.

            beta_i = 1 - alpha_bar_{t_i}/alpha_bar_{t_{i-1}},   0 = t_0 < t_1 < t_2 < ...

        Its alpha_bar_i is this schedule's alpha_bar at t_i: what a network sees at its i-th time it saw in training at
        t_i. times: different whole numbers in 1..T, in any order, such as `timesteps` gives.
        Raises TypeError for other than whole numbers, ValueError for none, twice the same, or one outside 1..T.
        (Nichol & Dhariwal 2021, section 4)
        """
        kept = sorted(times)
        if not kept or len(set(kept)) < len(kept):
            raise ValueError(f"expected one or more different times, got {kept}")
        log_alpha = np.diff(lookup(self.log_alpha_bar, np.array(kept)), prepend=0.0)
        most = np.where(log_alpha == -np.inf, 1, np.nextafter(1, 0))  # lest rounding wipe out what little is left
        return Schedule(np.append(0.0, np.minimum(-np.expm1(log_alpha), most)))

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.beta) - 1

    @functools.cached_property
    def alpha(self) -> np.ndarray:
        """alpha_t = 1 - beta_t (E3)."""
        return 1 - self.beta

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar_t = prod_{i<=t} alpha_i: x_t keeps sqrt(alpha_bar_t) of x_0; alpha_bar_0 = 1 (E3)."""
        return np.cumprod(self.alpha)

    @functools.cached_property
    def log_alpha_bar(self) -> np.ndarray:
        """log alpha_bar_t, exact for any small beta; -inf where alpha_bar_T = 0."""
        with np.errstate(divide="ignore"):
            return np.cumsum(np.log1p(-self.beta))

    @functools.cached_property
    def one_minus_alpha_bar(self) -> np.ndarray:
        """1 - alpha_bar_t, the variance of the noise in x_t (E4); by logarithms, exact for any small beta."""
        return 0.0 - np.expm1(self.log_alpha_bar)

    @functools.cached_property
    def alpha_bar_prev(self) -> np.ndarray:
        """alpha_bar_{t-1}; nan at t = 0, which no step leads to."""
        return _previous(self.alpha_bar)

    @functools.cached_property
    def one_minus_alpha_bar_prev(self) -> np.ndarray:
        """1 - alpha_bar_{t-1}; nan at t = 0."""
        return _previous(self.one_minus_alpha_bar)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """beta_tilde_t = beta_t (1 - alpha_bar_{t-1})/(1 - alpha_bar_t); 0 at t = 1, nan at t = 0 (E12)."""
        return self.beta * self.one_minus_alpha_bar_prev / self.one_minus_alpha_bar

    @functools.cached_property
    def log_beta(self) -> np.ndarray:
        """log beta_t; -inf at t = 0 (E13)."""
        return np.append(-np.inf, np.log(self.beta[1:]))

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """log beta_tilde_t, where t = 1, whose beta_tilde is 0, takes the value of t = 2; nan at t = 0.

        (E13; Nichol & Dhariwal 2021, section 3.1)
        """
        first = self.posterior_variance[2] if self.T > 1 else self.beta[1]
        return np.log(np.concatenate([[np.nan, first], self.posterior_variance[2:]]))

    @functools.cached_property
    def snr(self) -> np.ndarray:
        """The signal-to-noise ratio alpha_bar_t/(1 - alpha_bar_t); infinite at t = 0."""
        return np.append(np.inf, self.alpha_bar[1:] / self.one_minus_alpha_bar[1:])

    @functools.cached_property
    def half_log_snr(self) -> np.ndarray:
        """lambda_t = log(sqrt(alpha_bar_t)/sqrt(1 - alpha_bar_t)); inf at t = 0, -inf where alpha_bar_T = 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.snr) / 2

    def reverse_variance(self, variance: str) -> np.ndarray:
        """The table of sigma_t² in p_theta(x_{t-1} | x_t), fixed to one of the deck's two choices (E13).

        variance: "posterior" for beta_tilde_t, exact where the data are one single point; "beta" for beta_t, exact
        where they are N(0, I). Returns (T+1,). Raises ValueError for another name. (Ho et al. 2020, section 3.2)
        """
        if variance not in ("posterior", "beta"):
            raise ValueError(f"variance must be 'posterior' or 'beta', got {variance!r}")
        return self.posterior_variance if variance == "posterior" else self.beta

    def terminal_kl(self, x_0: float | np.ndarray = 1.0) -> float:
        """KL(q(x_T | x_0) to N(0, I)) in nats per dimension: how far x_T still is from pure noise (E5).

            (alpha_bar_T x_0² - alpha_bar_T - log(1 - alpha_bar_T))/2, averaged over the entries of x_0

        x_0: any shape; 1, the default, is the farthest from 0 that a value in [-1, 1] can be.
        """
        alpha_bar, log_noise = self.alpha_bar[-1], math.log(self.one_minus_alpha_bar[-1])
        return float(np.mean(alpha_bar * np.square(x_0) - alpha_bar - log_noise) / 2)

    def __repr__(self) -> str:
        return (
            f"Schedule(T={self.T}, beta_1={self.beta[1]:.3g}, beta_T={self.beta[-1]:.3g}, "
            f"alpha_bar_T={self.alpha_bar[-1]:.3g})"
        )


def lookup(table: np.ndarray, t: int | Array, first: int = 1) -> Any:
    """Pick table[t] in float64 after checking that t lies in first..T.

    table: (T+1,). t: a whole number gives a float, an integer array a float64 host array of its shape. An array t
    on another device is copied to the host to be checked, and the host waits for it: keep t on the host.
    Raises TypeError if t is not whole, ValueError if it lies outside first..T.
    """
    index = backend.to_numpy(t)
    if index.dtype.kind not in "iu":
        raise TypeError(f"t must be a whole number or an array of them, got {index.dtype}")
    last = len(table) - 1
    wrong = index[(index < first) | (index > last)]
    if wrong.size:
        raise ValueError(f"t must lie in {first}..{last} for this schedule, got {wrong.flat[0]}")
    return table[index] if index.ndim else float(table[index])


def at(table: np.ndarray, t: int | Array, x: Any, first: int = 1) -> Any:
    """Pick table[t] in the form that multiplies x: a plain number, or one number a sample.

    table: (T+1,). t: a whole number, or integers (B,), in first..T. x: an array or Tensor of floats, (B, ...).
    Returns a float for one t (it widens no dtype), else (B, 1, 1, ...) in x's dtype and on x's device.
    Raises TypeError if t is not whole or x not floats, ValueError if t lies outside first..T or is not (B,).
    """
    if x.dtype.kind != "f":
        raise TypeError(f"x must hold floats (images: in [-1, 1]), got {x.dtype}")
    return per_sample(lookup(table, t, first), x)


def per_sample(values: Any, x: Any) -> Any:
    """Shape values (B,) as (B, 1, 1, ...), in x's dtype and on x's device: values * x scales each sample.

    values: (B,), or one number for all, which is returned as a float. x: an array or Tensor, (B, ...).
    Raises ValueError if values is neither.
    """
    if np.ndim(values) == 0:
        return float(values)
    if values.shape != x.shape[:1]:
        raise ValueError(f"expected one number a sample, {x.shape[:1]} for x {x.shape}, got {values.shape}")
    raw = x if backend.is_array(x) else x.data  # x may be a Tensor
    shaped = backend.to_numpy(values).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return backend.to_device(shaped, backend.device_of(raw))


def _checked_steps(T: int) -> int:
    if not isinstance(T, (int, np.integer)) or T < 1:
        raise ValueError(f"a schedule needs a whole number of steps T >= 1, got {T!r}")
    return T


def _betas(alpha_bar: np.ndarray) -> np.ndarray:
    """beta_t = 1 - alpha_bar_t/alpha_bar_{t-1} for t = 1..T, from alpha_bar (T+1,), up to a common factor."""
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _previous(table: np.ndarray) -> np.ndarray:
    """The table of entry t - 1 at t; nan at t = 0."""
    return np.append(np.nan, table[:-1])
