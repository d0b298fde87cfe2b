"""Samplers: from noise x_T to data x_0. Each is a generator that yields every state on the way.

A sampler takes `denoise(x_t, t) -> Prediction(x0, eps)`, t one whole number; `denoiser` makes one of a
network. Progress bars, film strips and GIFs are consumers of the states; `last` is the shortest. Bad
arguments raise at the first state.

    sampler      calls of the network, for N steps    order    draws noise on the way
    ddpm         N                                             yes
    ddim         N                                    1        if eta > 0
    heun         2 N - 1                              2        no
    dpm_solver   N                                    2        no

Order: twice the steps divide the distance from the end of the probability flow by 2 to that power, once the steps are
shorter than the flow's bends. None of them divides by sqrt(alpha_bar_T), which `Schedule.zero_terminal_snr` makes 0.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array
from tinydiff.diffusion.gaussian import (
    Prediction,
    check_trajectory,
    chosen_variance,
    learned_log_variance,
    log_density,
    posterior,
    predict,
    q_sample,
    target_of,
)
from tinydiff.diffusion.schedule import Schedule
from tinydiff.rng import Rng

Denoise = Callable[[Array, int], Prediction]

Clip = bool | float
"""How x_0 is kept within [-1, 1], where images lie: not at all, by cutting it off there, or at this percentile."""


def denoiser(
    model: Callable[[Array, np.ndarray], Any],
    schedule: Schedule,
    target: str = "eps",
    clip: Clip = True,
    learned_variance: bool = False,
) -> Denoise:
    """Make denoise(x_t, t) -> Prediction(x0, eps) of a network that outputs eps, x_0 or v.

    model(x_t, t): takes x_t (B, ...) and t (B,) int64 on the host, as in training; gives a Tensor or array shaped
    as x_t. No gradient is recorded. target: what it outputs, see `predict`.
    clip: keep x_0 in [-1, 1], where images lie, and recompute eps from it, so that the two still make up x_t. At
    large t a small error in eps is a large one in x_0, and without the clip the next steps would build on an x_0
    far from anything the network has seen. Set it to False for data with no such bounds. A number is the percentile of
    `dynamic_threshold`, which takes the place of the clip.
    learned_variance: the network's last axis is twice as long as x_t's, the second half being the v of E13, scaled to
    [-1, 1] as a network likes it.
    """

    def denoise(x_t: Array, t: int) -> Prediction:
        with no_grad():
            output = model(x_t, np.full(len(x_t), t))
        output, v = output.data if isinstance(output, Tensor) else output, None
        if learned_variance:
            output, v = split_variance(output)
        x0, eps, _ = predict(output, x_t, t, schedule, target)
        if clip is not False:
            x0 = x0.clip(-1, 1) if clip is True else dynamic_threshold(x0, clip)
            x0, eps, _ = predict(x0, x_t, t, schedule, "x0")
        return Prediction(x0, eps, v)

    return denoise


def dynamic_threshold(x_0: Array, percentile: float) -> Array:
    """Dynamic thresholding: bring each image back into [-1, 1] by its own measure.

        s = max(1, the percentile of |x_0| over the pixels of the image),   x_0 <- clip(x_0, -s, s)/s

    Strong guidance drives x_0 far beyond [-1, 1]. Cut off there, more and more of an image is saturated; divided by s,
    its pixels keep their differences. x_0: (B, ...). percentile: in [0, 100]; at 100 nothing is cut off. Returns the
    like of x_0, in [-1, 1]. (E37; Saharia et al. 2022, section 2.3)
    """
    module, each = backend.array_module(x_0), (-1, *[1] * (x_0.ndim - 1))
    s = module.percentile(abs(x_0).reshape(len(x_0), -1), percentile, axis=1)
    s = module.maximum(s, 1).astype(x_0.dtype).reshape(each)
    return x_0.clip(-s, s) / s


def split_variance(output: Any) -> tuple[Any, Any]:
    """Part the output of a network with a learned variance: what it predicts, and v in [0, 1] if it keeps to [-1, 1].

    output: (B, ..., 2 C). Returns two (B, ..., C). Raises ValueError for an odd last axis.
    (E13; Nichol & Dhariwal 2021, section 3.1)
    """
    if output.shape[-1] % 2:
        raise ValueError(f"a network with a learned variance has an even number of outputs, got {output.shape[-1]}")
    C = output.shape[-1] // 2
    return output[..., :C], (output[..., C:] + 1) / 2


def ddpm(
    denoise: Denoise,
    x_T: Array,
    schedule: Schedule,
    rng: Rng,
    variance: str | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
) -> Iterator[Array]:
    """Algorithm 2: ancestral sampling, yielding x_{T-1}, ..., x_0.

        z ~ N(0, I) if t > 1, else z = 0
        x_{t-1} = (x_t - beta_t/sqrt(1 - alpha_bar_t) eps_theta(x_t, t))/sqrt(alpha_t) + sigma_t z

    x_T: (B, ...), drawn from N(0, I). variance: sigma_t² is "posterior" (beta_tilde_t), "beta" (beta_t), or "learned"
    (between the two, as the network says; E13); by default "learned" if the network learned one, else "posterior".
    steps, spacing: the times visited, see `timesteps`; by default all T. With fewer, alpha_t and beta_t are those of
    `Schedule.respaced`. Calls the network once a step.
    The slide's "x_t - eps_theta = x_{t-1}" is a loose picture of the step, not the step.
    Raises ValueError for another variance, if the network did not learn one, and for bad steps or spacing.
    (E19, E15, E13; Ho et al. 2020, Algorithm 2)
    """
    times = timesteps(schedule.T, schedule.T if steps is None else steps, spacing)
    visited = schedule.respaced(times)
    x_t = x_T
    for i, t in zip(range(visited.T, 0, -1), times, strict=True):
        prediction = denoise(x_t, t)
        mean, _ = posterior(x_t, prediction.x0, i, visited)  # the same mean as above (E12), even where alpha_T = 0
        z = rng.normal_like(x_t) if i > 1 else 0
        x_t = mean + reverse_sigma(prediction, i, visited, variance) * z
        yield x_t


def reverse_sigma(prediction: Prediction, t: int, schedule: Schedule, variance: str | None) -> Any:
    """The standard deviation sigma_t of `ddpm`'s step (E13): a number, or one for each number of x_t if it was learned.

    variance: as in `ddpm`. Raises ValueError for another, or if the network did not learn one.
    """
    variance = chosen_variance(prediction, variance)
    if variance != "learned":
        return schedule.reverse_variance(variance)[t].item() ** 0.5
    log_variance = learned_log_variance(prediction.v, t, schedule)
    return backend.array_module(log_variance).exp(log_variance / 2)


def ddim(
    denoise: Denoise,
    x_T: Array,
    schedule: Schedule,
    rng: Rng,
    steps: int,
    eta: float = 0.0,
    spacing: str = "trailing",
) -> Iterator[Array]:
    """DDIM: sample in fewer steps than the T of training, yielding the state after each, the last being x_0.

        x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma²) eps + sigma z,   z ~ N(0, I)
        sigma = eta sqrt((1 - alpha_bar_s)/(1 - alpha_bar_t)) sqrt(1 - alpha_bar_t/alpha_bar_s)

    where x_0 and eps are denoised from x_t, and s < t is the next time. eta = 0 draws no noise: x_T alone decides
    the sample. eta = 1 is `ddpm` with the posterior variance, in the same steps. Calls the network once a step.
    x_T: (B, ...), drawn from N(0, I). steps, spacing: the times visited, see `timesteps`.
    Raises ValueError for eta outside [0, 1], and for bad steps or spacing. (Song et al. 2021, eq. 12 and 16)
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    x_t = x_T
    for t, s in itertools.pairwise([*timesteps(schedule.T, steps, spacing), 0]):
        x_0, eps, _ = denoise(x_t, t)
        alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        noise_t, noise_s = schedule.one_minus_alpha_bar[t].item(), schedule.one_minus_alpha_bar[s].item()
        sigma = eta * (noise_s / noise_t * (1 - alpha_bar_t / alpha_bar_s)) ** 0.5
        x_t = alpha_bar_s**0.5 * x_0 + max(noise_s - sigma**2, 0) ** 0.5 * eps
        if sigma > 0:
            x_t = x_t + sigma * rng.normal_like(x_t)
        yield x_t


def heun(
    denoise: Denoise, x_T: Array, schedule: Schedule, rng: Rng, steps: int, spacing: str = "trailing"
) -> Iterator[Array]:
    """Heun's second-order method for the probability flow, yielding the state after each step, the last being x_0.

        phi_t = arctan(sqrt(1 - alpha_bar_t)/sqrt(alpha_bar_t)),   d x/d phi = v(x, t)
        x_s = x_t + (phi_s - phi_t) (v(x_t, t) + v(x_s', s))/2,    x_s' being DDIM's step from x_t

    v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 is the velocity of x_t as it turns, by the angle phi, from
    data at phi = 0 to noise at phi = pi/2. Nothing in it is infinite at either end, as x_t/sqrt(alpha_bar_t) and
    sqrt(1 - alpha_bar_t)/sqrt(alpha_bar_t), other authors' variables, are where alpha_bar_T is 0, and nearly where it
    is nearly 0. The last step, to s = 0, where no network was trained, is DDIM's alone.
    x_T: (B, ...), drawn from N(0, I). rng: not used. steps, spacing: the times visited, see `timesteps`.
    Calls the network 2 steps - 1 times. Raises ValueError for bad steps or spacing.
    Use this one with a `Schedule`, at whose whole times t the network was trained; `edm.probability_flow` is for a
    network that takes any noise level sigma, along the time steps of a `Column`.
    (Karras et al. 2022, Algorithm 1, in the angle of Salimans & Ho 2022, appendix D)
    """
    phi = np.arctan2(np.sqrt(schedule.one_minus_alpha_bar), np.sqrt(schedule.alpha_bar))
    x_t = x_T
    for t, s in itertools.pairwise([*timesteps(schedule.T, steps, spacing), 0]):
        x_0, eps, _ = denoise(x_t, t)
        x_s = q_sample(x_0, s, eps, schedule)
        if s > 0:
            v_t = target_of(x_0, eps, t, schedule, "v")
            x_0, eps, _ = denoise(x_s, s)
            v_s = target_of(x_0, eps, s, schedule, "v")
            x_s = x_t + (phi[s] - phi[t]).item() * (v_t + v_s) / 2
        x_t = x_s
        yield x_t


def dpm_solver(
    denoise: Denoise, x_T: Array, schedule: Schedule, rng: Rng, steps: int, spacing: str = "trailing"
) -> Iterator[Array]:
    """DPM-Solver++(2M): the probability flow in second order, at one call of the network a step.

        h = lambda_s - lambda_t,   lambda_t = log(sqrt(alpha_bar_t)/sqrt(1 - alpha_bar_t))
        D = x_0 + h/(2 h_before) (x_0 - x_0_before)
        x_s = sqrt(1 - alpha_bar_s)/sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_s) (1 - exp(-h)) D

    D continues the line through this x_0 and that of the step before to the middle of the step. A step that is at
    least twice as long as the one before, too far to continue a line, takes D = x_0, as DDIM does: so does the first,
    which has none before, and the last, where h is infinite.
    x_T: (B, ...), drawn from N(0, I). rng: not used. steps, spacing: the times visited, see `timesteps`.
    Yields the state after each step, the last being x_0. Raises ValueError for bad steps or spacing.
    (Lu et al. 2022, "DPM-Solver++", Algorithm 2)
    """
    noise, half_log_snr = np.sqrt(schedule.one_minus_alpha_bar), schedule.half_log_snr
    x_t, x_0_before, h_before = x_T, x_T, 0.0
    for t, s in itertools.pairwise([*timesteps(schedule.T, steps, spacing), 0]):
        D = x_0 = denoise(x_t, t).x0
        h = (half_log_snr[s] - half_log_snr[t]).item()
        if h < 2 * h_before:
            D = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
        x_t = (noise[s] / noise[t]).item() * x_t - math.sqrt(schedule.alpha_bar[s]) * math.expm1(-h) * D
        x_0_before, h_before = x_0, h
        yield x_t


def timesteps(T: int, steps: int, spacing: str = "trailing") -> list[int]:
    """Which of the times T..1 a sampler visits, in falling order; x_0 comes after the last.

        "trailing":  T, T - T/steps, ..., T/steps    starts from the pure noise of t = T (Lin et al. 2023)
        "leading":   ..., 1 + T//steps, 1            ends at 1, starts short of T, as the first DDIM code did
        "linspace":  T, ..., 1                       both ends; T alone for one step

    Returns `steps` different whole numbers in 1..T.
    Raises ValueError for steps outside 1..T or another spacing.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"the number of steps must lie in 1..T = 1..{T}, got {steps}")
    if spacing == "trailing":
        return [T - i * T // steps for i in range(steps)]
    if spacing == "leading":
        return [1 + i * (T // steps) for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(t) for t in np.linspace(T, 1, steps).tolist()]
    raise ValueError(f"spacing must be 'trailing', 'leading' or 'linspace', got {spacing!r}")


def last(states: Iterable[Array]) -> Array:
    """Run a sampler to its end and return the last state, x_0. Raises ValueError if there is none."""
    final = deque(states, maxlen=1)
    if not final:
        raise ValueError("expected at least one state, got none")
    return final[0]


def reverse_log_density(
    trajectory: Sequence[Array], denoise: Denoise, schedule: Schedule, variance: str = "beta"
) -> Array:
    """log p_theta(x_{0:T}) = log p(x_T) + sum_t log p_theta(x_{t-1} | x_t) in nats for each sample.

        p(x_T) = N(0, I),   p_theta(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t² I)

    trajectory: x_0, x_1, ..., x_T, each (B, ...). Returns (B,).
    Raises ValueError if there are not T + 1 states, and for variance "posterior", whose sigma_1 = 0 leaves x_0 no
    density. (E8; Ho et al. 2020, eq. 1)
    """
    check_trajectory(trajectory, schedule)
    sigma_squared = schedule.reverse_variance(variance)
    total = log_density(trajectory[-1], 0.0, 1.0)
    for t in range(schedule.T, 0, -1):
        x_prev, x_t = trajectory[t - 1], trajectory[t]
        mean, _ = posterior(x_t, denoise(x_t, t).x0, t, schedule)
        total = total + log_density(x_prev, mean, sigma_squared[t].item())
    return total


# ------------------------------------------------------------------------------------ choosing among them


SAMPLERS: dict[str, Callable[[Denoise, Array, Schedule, Rng, Sampling], Iterator[Array]]] = {
    "ddpm": lambda d, x_T, s, rng, how: ddpm(d, x_T, s, rng, how.variance, how.steps_of(s.T), how.spacing),
    "ddim": lambda d, x_T, s, rng, how: ddim(d, x_T, s, rng, how.steps_of(s.T), how.eta, how.spacing),
    "heun": lambda d, x_T, s, rng, how: heun(d, x_T, s, rng, how.steps_of(s.T), how.spacing),
    "dpm": lambda d, x_T, s, rng, how: dpm_solver(d, x_T, s, rng, how.steps_of(s.T), how.spacing),
}
SPACINGS = ("trailing", "leading", "linspace")
VARIANCES = ("posterior", "beta", "learned")
USUAL_STEPS = {"ddim": 50, "heun": 25, "dpm": 25}
"""In how many steps a sampler is run that nobody told; "ddpm" takes all T."""


@dataclass(frozen=True)
class Sampling:
    """How a trained model draws: which sampler, along which times, and the choices that one sampler alone has.

    sampler: a name in SAMPLERS. steps: 1..T; by default all T for "ddpm", else as many as USUAL_STEPS says.
    spacing: see `timesteps`. eta: for "ddim", in [0, 1]. variance: for "ddpm", in VARIANCES, or None, see there.
    clip: True, False or a percentile in (0, 100], for the `denoiser`: a model's `sample` passes it on, and who makes a
    denoise of their own has chosen already. Raises ValueError for a value that is not among these, and for an eta or
    variance given to a sampler that takes none.
    """

    sampler: str = "ddim"
    steps: int | None = None
    spacing: str = "trailing"
    eta: float = 0.0
    variance: str | None = None
    clip: Clip = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("sampler", self.sampler, tuple(SAMPLERS)),
            ("spacing", self.spacing, SPACINGS),
            ("variance", self.variance or VARIANCES[0], VARIANCES),
        ):
            if value not in known:
                raise ValueError(f"the {name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        if not isinstance(self.clip, bool) and not 0 < self.clip <= 100:
            raise ValueError(f"to clip is True, False or a percentile in (0, 100], got {self.clip}")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is for the sampler ddim, got eta {self.eta} for {self.sampler}")
        if self.variance and self.sampler != "ddpm":
            raise ValueError(f"a variance is for the sampler ddpm, got {self.variance} for {self.sampler}")

    def steps_of(self, T: int) -> int:
        """How many steps a model of T steps is drawn from in. Raises ValueError unless they are in 1..T."""
        if self.steps is None:
            return min(USUAL_STEPS.get(self.sampler, T), T)
        if not 1 <= self.steps <= T:
            raise ValueError(f"the number of steps must be in 1..{T}, the T of this model, got {self.steps}")
        return self.steps

    def states(self, denoise: Denoise, x_T: Array, schedule: Schedule, rng: Rng) -> Iterator[Array]:
        """The states that the chosen sampler yields, after each of `steps_of(schedule.T)` steps.

        denoise clips x_0 as it was made to, whatever `clip` is here.
        """
        return SAMPLERS[self.sampler](denoise, x_T, schedule, rng, self)
