"""The design space of diffusion models: four families as the columns of one table (E22; Karras et al. 2022).

Time is the noise itself: x = y + n is data y under noise n of standard deviation sigma, and a denoiser D(x; sigma)
guesses y. The symbols are the paper's: F is the network, t runs from t_0 (noise) down to t_N = 0 (data). Each row of
the table is a field of `Column`, and any row may be exchanged for another column's (`dataclasses.replace`): how a
network was trained does not say how it must be sampled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, to_numpy
from tinydiff.diffusion.loss import squared_error
from tinydiff.diffusion.samplers import Denoise
from tinydiff.diffusion.schedule import Schedule, per_sample
from tinydiff.rng import Rng

Function = Callable[[Any], Any]
"""Of one number, or of a float64 array on the host; a constant gives one number for both."""

Denoiser = Callable[[Array, float], Array]
"""D(x; sigma): the guess at the data in x (B, ...), whose noise has the standard deviation sigma."""

SOLVERS = ("euler", "heun")

# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True, eq=False)
class Column:
    """One column of the table: how to sample, what to put around the network, how to train it.

    solver: "euler" or "heun". time_steps: N -> t_0, ..., t_{N-1}, falling; `times` checks N and adds t_N = 0.
    sigma, s: the noise and the scale of x at time t, x = s(t) (y + n); sigma_dot, s_dot: their derivatives.
    c_skip, c_out, c_in, c_noise: functions of sigma, see `preconditioned`. draw_sigma(rng, n): n noise levels to train
    on, (n,) float64 on the host. loss_weight: lambda(sigma). Raises ValueError for another solver.
    (E22; Karras et al. 2022, Table 1, with every formula derived in appendices B.6 and C)
    """

    solver: str
    time_steps: Callable[[int], np.ndarray]
    sigma: Function
    sigma_dot: Function
    s: Function
    s_dot: Function
    c_skip: Function
    c_out: Function
    c_in: Function
    c_noise: Function
    draw_sigma: Callable[[Rng, int], np.ndarray]
    loss_weight: Function

    def __post_init__(self) -> None:
        _check_solver(self.solver)

    @classmethod
    def vp(
        cls, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, eps_t: float = 1e-5, M: int = 1000
    ) -> Self:
        """Variance preserving: DDPM in continuous time (Song et al. 2021; Karras et al. 2022, appendix C.1).

        sigma(t) = sqrt(e^(beta_d t²/2 + beta_min t) - 1),  s(t) = 1/sqrt(e^(beta_d t²/2 + beta_min t))
        t_i = 1 + i/(N-1) (eps_s - 1)
        c_skip = 1,  c_out = -sigma,  c_in = 1/sqrt(sigma² + 1),  c_noise = (M - 1) t of sigma(t) = sigma
        t ~ U(eps_t, 1),  lambda = 1/sigma²
        """

        def exponent(t: Any) -> Any:
            return beta_d * t**2 / 2 + beta_min * t

        def sigma(t: Any) -> Any:
            return np.sqrt(np.expm1(exponent(t)))

        def s(t: Any) -> Any:
            return np.exp(-exponent(t) / 2)

        def time_of(sigma: Any) -> Any:
            return (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(sigma**2)) - beta_min) / beta_d

        return cls(
            solver="euler",
            time_steps=lambda N: np.linspace(1, eps_s, N),
            sigma=sigma,
            sigma_dot=lambda t: (beta_d * t + beta_min) * (sigma(t) + 1 / sigma(t)) / 2,
            s=s,
            s_dot=lambda t: -(beta_d * t + beta_min) * s(t) / 2,
            c_skip=_constant(1.0),
            c_out=lambda sigma: -sigma,
            c_in=lambda sigma: 1 / np.sqrt(sigma**2 + 1),
            c_noise=lambda sigma: (M - 1) * time_of(sigma),
            draw_sigma=lambda rng, n: sigma(_uniform(rng, n, eps_t, 1)),
            loss_weight=lambda sigma: 1 / sigma**2,
        )

    @classmethod
    def ve(cls, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Self:
        """Variance exploding: NCSN in continuous time (Song et al. 2021; Karras et al. 2022, appendix C.2).

            sigma(t) = sqrt(t),  s(t) = 1,  t_i = sigma_max² (sigma_min²/sigma_max²)^(i/(N-1))
            c_skip = 1,  c_out = sigma,  c_in = 1,  c_noise = ln(sigma/2)
            ln sigma ~ U(ln sigma_min, ln sigma_max),  lambda = 1/sigma²

        Raises ValueError unless 0 < sigma_min < sigma_max.
        """
        _check_range(sigma_min, sigma_max)
        return cls(
            solver="euler",
            time_steps=lambda N: sigma_max**2 * (sigma_min**2 / sigma_max**2) ** np.linspace(0, 1, N),
            sigma=np.sqrt,
            sigma_dot=lambda t: 1 / (2 * np.sqrt(t)),
            s=_constant(1.0),
            s_dot=_constant(0.0),
            c_skip=_constant(1.0),
            c_out=lambda sigma: sigma,
            c_in=_constant(1.0),
            c_noise=lambda sigma: np.log(sigma / 2),
            draw_sigma=lambda rng, n: np.exp(_uniform(rng, n, math.log(sigma_min), math.log(sigma_max))),
            loss_weight=lambda sigma: 1 / sigma**2,
        )

    @classmethod
    def iddpm(cls, schedule: Schedule | None = None, j_0: int = 8) -> Self:
        """Improved DDPM, sampled by DDIM (Nichol & Dhariwal 2021; Karras et al. 2022, appendix C.3).

            sigma(t) = t,  s(t) = 1,  t_i = u_j with j = floor(j_0 + (M-1-j_0)/(N-1) i + 1/2)
            u_M = 0,  u_{j-1} = sqrt((u_j² + 1)/max(alpha_bar_{j-1}/alpha_bar_j, C_1) - 1)
            c_skip = 1,  c_out = -sigma,  c_in = 1/sqrt(sigma² + 1),  c_noise = M - 1 - argmin_j |u_j - sigma|
            sigma = u_j with j ~ U{0, ..., M-1},  lambda = 1/sigma²

        The paper's j counts down: u_j is the sigma_t of `noise_levels` at t = M - j, and the recursion is the cosine
        schedule's (E7), C_1 = 0.001 its clipping of beta, C_2 = 0.008 its s. So c_noise is t - 1.
        schedule: another of M steps than cosine(1000). j_0: how many of the noisiest levels sampling leaves out.
        Raises ValueError for j_0 outside 0..M-2 or alpha_bar_T = 0, and, when sampling, for N > M - j_0 time steps.
        """
        u = noise_levels(Schedule.cosine(1000) if schedule is None else schedule)[::-1]
        M = len(u) - 1
        if np.isinf(u[0]):
            raise ValueError(
                "this column trains on every noise level of its schedule; with alpha_bar_T = 0 one is infinite"
            )
        if not 0 <= j_0 <= M - 2:
            raise ValueError(f"j_0 must lie in 0..M-2 = 0..{M - 2}, got {j_0}")

        def time_steps(N: int) -> np.ndarray:
            if N > M - j_0:
                raise ValueError(f"there are {M - j_0} noise levels from j_0 = {j_0} on, got N = {N} time steps")
            return u[np.floor(np.linspace(j_0, M - 1, N) + 0.5).astype(int)]

        return cls(
            solver="euler",
            time_steps=time_steps,
            sigma=_itself,
            sigma_dot=_constant(1.0),
            s=_constant(1.0),
            s_dot=_constant(0.0),
            c_skip=_constant(1.0),
            c_out=lambda sigma: -sigma,
            c_in=lambda sigma: 1 / np.sqrt(sigma**2 + 1),
            c_noise=lambda sigma: M - 1.0 - _nearest(u[:M], sigma),
            draw_sigma=lambda rng, n: u[to_numpy(rng.integers(0, M, (n,)))],
            loss_weight=lambda sigma: 1 / sigma**2,
        )

    @classmethod
    def edm(
        cls,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        P_mean: float = -1.2,
        P_std: float = 1.2,
    ) -> Self:
        """The paper's own choices (Karras et al. 2022, sections 3 and 5, appendix B.6).

            sigma(t) = t,  s(t) = 1
            t_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
            c_skip = sigma_data²/(sigma² + sigma_data²),  c_out = sigma sigma_data/sqrt(sigma_data² + sigma²)
            c_in = 1/sqrt(sigma² + sigma_data²),  c_noise = ln(sigma)/4
            ln sigma ~ N(P_mean, P_std²),  lambda = (sigma² + sigma_data²)/(sigma sigma_data)²

        sigma_data: the standard deviation of the data's pixels.
        Raises ValueError unless 0 < sigma_min < sigma_max and sigma_data, rho and P_std are more than 0.
        """
        _check_range(sigma_min, sigma_max)
        if not min(sigma_data, rho, P_std) > 0:
            raise ValueError(f"sigma_data, rho and P_std must be > 0, got {sigma_data}, {rho} and {P_std}")
        return cls(
            solver="heun",
            time_steps=lambda N: np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), N) ** rho,
            sigma=_itself,
            sigma_dot=_constant(1.0),
            s=_constant(1.0),
            s_dot=_constant(0.0),
            c_skip=lambda sigma: sigma_data**2 / (sigma**2 + sigma_data**2),
            c_out=lambda sigma: sigma * sigma_data / np.sqrt(sigma_data**2 + sigma**2),
            c_in=lambda sigma: 1 / np.sqrt(sigma**2 + sigma_data**2),
            c_noise=lambda sigma: np.log(sigma) / 4,
            draw_sigma=lambda rng, n: np.exp(P_mean + P_std * to_numpy(rng.normal((n,), np.float64))),
            loss_weight=lambda sigma: (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2,
        )

    def times(self, N: int) -> np.ndarray:
        """t_0 > ... > t_{N-1} > t_N = 0, (N+1,) float64: N steps of a solver. Raises ValueError for N < 2. (E22)"""
        if N < 2:
            raise ValueError(f"the time steps t_0..t_N need N >= 2, got N = {N}")
        return np.append(self.time_steps(N), 0.0)

    def sigmas(self, N: int) -> np.ndarray:
        """The noise levels sigma(t_0) > ... > sigma(t_N) = 0, (N+1,) float64. Raises ValueError for N < 2. (E22)"""
        return self.sigma(self.times(N))


COLUMNS: dict[str, Callable[[], Column]] = {"vp": Column.vp, "ve": Column.ve, "iddpm": Column.iddpm, "edm": Column.edm}
"""The table, by the names of its columns."""


def _constant(value: float) -> Function:
    return lambda _: value


def _itself(value: Any) -> Any:
    return value


def _uniform(rng: Rng, n: int, low: float, high: float) -> np.ndarray:
    """n draws from U[low, high), float64 on the host."""
    return low + (high - low) * to_numpy(rng.uniform((n,), np.float64))


def _nearest(levels: np.ndarray, sigma: Any) -> Any:
    """argmin_j |levels_j - sigma|, for one sigma or an array of them."""
    return np.abs(levels - np.asarray(sigma)[..., None]).argmin(axis=-1)


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"noise levels need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")


def _check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"the solver must be 'euler' or 'heun', got {solver!r}")


# ------------------------------------------------------------------------- around the network, and training it


def preconditioned(F: Callable[[Array, np.ndarray], Any], column: Column) -> Denoiser:
    """Make the denoiser D of a network F.

        D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

    F(x, c): takes x (B, ...) and c (B,) float64 on the host; gives a Tensor or array shaped as x. No gradient is
    recorded. D takes x (B, ...) and sigma, one number or (B,), and returns an array of x's shape, dtype and device.
    D raises ValueError for a sigma that is not > 0 or not (B,). (E22; Karras et al. 2022, eq. 7)
    """

    def D(x: Array, sigma: float | np.ndarray) -> Array:
        sigma = _checked(sigma)
        c_skip, c_out, c_in = (per_sample(c(sigma), x) for c in (column.c_skip, column.c_out, column.c_in))
        with no_grad():
            output = F(c_in * x, np.full(len(x), column.c_noise(sigma)))
        return c_skip * x + c_out * (output.data if isinstance(output, Tensor) else output)

    return D


def training_pair(y: Array, sigma: Any, eps: Array, column: Column) -> tuple[Array, np.ndarray, Array, Any]:
    """What a network is shown, and what it should answer: its loss as a plain squared error.

        F sees c_in x and c_noise, with x = y + sigma eps
        F should be (y - c_skip x)/c_out, and counts lambda c_out²

    y: the data, (B, ...). eps: (B, ...), drawn from N(0, I). sigma: one number or (B,), such as `column.draw_sigma`.
    Returns c_in x (B, ...), c_noise (B,) float64 on the host, the target (B, ...), and the weight, a number or
    (B, 1, ...). In all four columns the weight is 1: they differ in what they ask, and at which noise.
    Raises ValueError for a sigma that is not > 0 or not (B,), or if y and eps differ in shape.
    (E22; Karras et al. 2022, eq. 8)
    """
    if y.shape != eps.shape:
        raise ValueError(f"y and eps must have one shape, got {tuple(y.shape)} and {tuple(eps.shape)}")
    sigma = _checked(sigma)
    c_skip, c_out = column.c_skip(sigma), column.c_out(sigma)
    x = y + per_sample(sigma, y) * eps
    # y - c_skip x, with the two parts of x apart: for a small sigma it is a small difference.
    target = per_sample((1 - c_skip) / c_out, y) * y - per_sample(c_skip * sigma / c_out, y) * eps
    weight = per_sample(column.loss_weight(sigma) * c_out**2, y)
    return per_sample(column.c_in(sigma), y) * x, np.full(len(y), column.c_noise(sigma)), target, weight


def denoising_loss(
    F: Callable[[Array, np.ndarray], Tensor], y: Array, sigma: Any, eps: Array, column: Column
) -> Tensor:
    """The training loss of every column, averaged over the batch and all dimensions.

        L = lambda(sigma) || D(y + n; sigma) - y ||²,   n = sigma eps,   D as in `preconditioned`

    F: as there, giving a Tensor. The other arguments, and what is raised: as in `training_pair`, by which it is
    computed. Returns a scalar Tensor. (E22; Karras et al. 2022, eq. 2 and 8)
    """
    x, c_noise, target, weight = training_pair(y, sigma, eps, column)
    return squared_error(F(x, c_noise), target, weight)


def _checked(sigma: Any) -> Any:
    """sigma in float64, one number or (B,), after a check that it is noise at all."""
    values = np.asarray(sigma, np.float64)
    if not ((values > 0) & np.isfinite(values)).all():
        raise ValueError(f"sigma must be > 0 and finite, got {sigma}")
    return values if values.ndim else float(values)


# ------------------------------------------------------------------------------------------------ samplers


def probability_flow(D: Denoiser, x_T: Array, column: Column, N: int, solver: str | None = None) -> Iterator[Array]:
    """Algorithm 1: solve the ODE that carries noise to data, yielding the state after each of N steps, x_N the last.

        dx/dt = (sigma'/sigma + s'/s) x - sigma' s/sigma D(x/s; sigma)       at the times t_0, ..., t_N of the column
        "euler": x_{i+1} = x_i + (t_{i+1} - t_i) d_i                         N evaluations of D, error like 1/N
        "heun":  x_{i+1} = x_i + (t_{i+1} - t_i) (d_i + d'_i)/2              2N - 1 evaluations, error like 1/N²

    where d is dx/dt at (x_i, t_i), and d' at Euler's guess of x_{i+1}; into t = 0, where sigma divides, Euler's guess
    stands. Use this one for a network that takes any noise level, along the time steps of a column; `samplers.heun` is
    for one that was trained at the whole times t of a `Schedule`.
    x_T: (B, ...), drawn from N(0, I), and scaled here by s(t_0) sigma(t_0). column: whose time steps, sigma(t)
    and s(t) to take; D may have been trained by another. N: >= 2. solver: the column's own if None.
    Raises ValueError for N < 2 or another solver. (E22; Karras et al. 2022, Algorithm 1 and eq. 4)
    """
    solver = column.solver if solver is None else solver
    _check_solver(solver)

    def slope(x: Array, t: float) -> Array:
        sigma, s = float(column.sigma(t)), float(column.s(t))  # floats widen no dtype
        growth, scaling = float(column.sigma_dot(t)) / sigma, float(column.s_dot(t)) / s
        return (growth + scaling) * x - growth * s * D(x / s, sigma)

    times = column.times(N).tolist()
    x = float(column.sigma(times[0]) * column.s(times[0])) * x_T
    for t, t_next in itertools.pairwise(times):
        x = _step(slope, x, t, t_next, solver)
        yield x


def _step(slope: Denoiser, x: Array, t: float, t_next: float, solver: str) -> Array:
    """One step of a solver from t to t_next, along dx/dt = slope(x, t), which does not exist at t = 0."""
    d = slope(x, t)
    euler = x + (t_next - t) * d
    if solver == "euler" or t_next == 0:
        return euler
    return x + (t_next - t) * (d + slope(euler, t_next)) / 2


def churned(
    D: Denoiser,
    x_T: Array,
    sigmas: Sequence[float] | np.ndarray,
    rng: Rng,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = math.inf,
    S_noise: float = 1.0,
    levels: np.ndarray | None = None,
) -> Iterator[Array]:
    """Algorithm 2: add a little noise, then take one Heun step down from there; yields the state after each of N steps.

        gamma = min(S_churn/N, sqrt(2) - 1) where S_tmin <= sigma_i <= S_tmax, else 0
        sigma_hat = (1 + gamma) sigma_i,   x_hat = x_i + sqrt(sigma_hat² - sigma_i²) S_noise z,   z ~ N(0, I)
        x_{i+1} = x_hat + (sigma_{i+1} - sigma_hat) (d + d')/2,   d = (x - D(x; sigma))/sigma at x_hat, d' at x_{i+1}

    The time is the noise level, sigma(t) = t and s(t) = 1, whatever D was trained with. S_churn = 0 draws nothing and
    is `probability_flow` with Heun's solver. New noise corrects the errors of earlier steps, at the price of its own.
    x_T: (B, ...), drawn from N(0, I), and scaled here by sigma_0. sigmas: sigma_0 > ... > sigma_N = 0, such as
    `column.sigmas(N)`. levels: the noise levels > 0 that D knows, where it knows only some: then each sigma_i and
    sigma_hat is the nearest of them. For a DDPM model they are `noise_levels(schedule)[1:]`.
    Raises ValueError for S_churn or S_noise below 0, S_tmin > S_tmax, sigmas that do not fall to 0, and levels not > 0.
    (E22; Karras et al. 2022, Algorithm 2; levels: appendix C.3.4)
    """
    sigmas = np.asarray(sigmas, np.float64)
    _check_churn(sigmas, S_churn, S_tmin, S_tmax, S_noise, levels)

    def known(sigma: Any) -> Any:
        return sigma if levels is None else levels[_nearest(levels, sigma)]

    def slope(x: Array, sigma: float) -> Array:
        return (x - D(x, sigma)) / sigma

    N = len(sigmas) - 1
    sigmas = [*known(sigmas[:-1]).tolist(), 0.0]
    x = sigmas[0] * x_T
    for sigma, sigma_next in itertools.pairwise(sigmas):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_tmin <= sigma <= S_tmax else 0.0
        sigma_hat = float(known(sigma + gamma * sigma))
        if sigma_hat > sigma:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * S_noise * rng.normal_like(x)
        x = _step(slope, x, sigma_hat, sigma_next, "heun")
        yield x


def _check_churn(
    sigmas: np.ndarray, S_churn: float, S_tmin: float, S_tmax: float, S_noise: float, levels: np.ndarray | None
) -> None:
    """Raise ValueError for what `churned` does not take."""
    if sigmas.ndim != 1 or len(sigmas) < 3 or sigmas[-1] != 0 or not (np.diff(sigmas) < 0).all():
        raise ValueError(f"expected sigma_0 > ... > sigma_N = 0 with N >= 2, got {sigmas}")
    if not (0 <= S_churn < math.inf and 0 <= S_noise < math.inf):
        raise ValueError(f"S_churn and S_noise must be at least 0, got {S_churn} and {S_noise}")
    if levels is not None and not (levels > 0).all():
        raise ValueError(f"the levels that D knows must be > 0, got {levels.min()}")
    if not S_tmin <= S_tmax:
        raise ValueError(f"S_tmin must not be more than S_tmax, got {S_tmin} and {S_tmax}")


# ------------------------------------------------------------------------- a network that was trained the DDPM way


def noise_levels(schedule: Schedule) -> np.ndarray:
    """sigma_t = sqrt((1 - alpha_bar_t)/alpha_bar_t): x_t/sqrt(alpha_bar_t) is x_0 under noise of this size.

    Returns (T+1,) float64, rising from sigma_0 = 0; sigma_T is infinite if alpha_bar_T = 0.
    (E22; Karras et al. 2022, appendix C.3.2)
    """
    with np.errstate(divide="ignore"):
        return np.sqrt(schedule.one_minus_alpha_bar / schedule.alpha_bar)


def from_ddpm(denoise: Denoise, schedule: Schedule) -> Denoiser:
    """Make D(x; sigma) of a model that was trained at t = 1..T, so that the samplers here can run it.

        x_t = x/sqrt(1 + sigma²),   t = argmin_t |sigma_t - sigma|,   D(x; sigma) = the x_0 that is denoised from x_t

    denoise, schedule: as for `ddim`, and sigma_t as in `noise_levels`. D takes one sigma for the batch, in
    [sigma_1, sigma_T], and raises ValueError outside: take `Column.edm(sigma_min=..., sigma_max=...)` inside it.
    (E22; Karras et al. 2022, appendix C.3.3)
    """
    levels = noise_levels(schedule)[1:]

    def D(x: Array, sigma: float) -> Array:
        if not levels[0] * (1 - 1e-6) <= sigma <= levels[-1] * (1 + 1e-6):
            raise ValueError(
                f"this schedule has noise levels from sigma_1 = {levels[0]:.4g} to sigma_T = {levels[-1]:.4g}, "
                f"got sigma = {sigma:.4g}"
            )
        t = 1 + int(_nearest(levels, sigma))
        return denoise(x / math.sqrt(1 + sigma**2), t).x0

    return D
