"""Editing without training (E36): an image is taken part of the way to noise, or all of it, and back.

sdedit         adds noise up to a time t and samples from there: what the noise hides is drawn anew
ddim_inverse   finds the x_T from which `ddim` draws this image
slerp          a point between two x_T, as far from 0 as they are
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array
from tinydiff.diffusion.gaussian import q_sample
from tinydiff.diffusion.samplers import Denoise, timesteps
from tinydiff.diffusion.schedule import Schedule, per_sample
from tinydiff.rng import Rng

Sampler = Callable[[Denoise, Array, Schedule, Rng], Iterator[Array]]
"""A sampler whose other arguments are chosen: `ddpm` itself, or `functools.partial(ddim, steps=50)`."""


def sdedit(
    denoise: Denoise, image: Array, schedule: Schedule, rng: Rng, strength: float, sampler: Sampler
) -> Iterator[Array]:
    """SDEdit: an image like this one, yielding the noisy image x_t that it starts from, and then each state to x_0.

        t = round(strength T),   x_t = sqrt(alpha_bar_t) image + sqrt(1 - alpha_bar_t) eps

    and from there the sampler, which sees a schedule of t times. The noise hides details first, outlines last: a small
    strength keeps most of the image, strength 0 all of it (the image itself is all that is yielded), and strength 1 no
    more than a trace, sqrt(alpha_bar_T): that is plain sampling.
    image: (B, ...). strength: in [0, 1]. sampler: run as sampler(denoise, x_t, schedule of t times, rng).
    Raises ValueError for a strength outside [0, 1]. (E36; Meng et al. 2022, Algorithm 1)
    """
    t = start_time(strength, schedule.T)
    x_t = q_sample(image, t, rng.normal_like(image), schedule)
    yield x_t
    if t > 0:
        yield from sampler(denoise, x_t, schedule.respaced(range(1, t + 1)), rng)


def start_time(strength: float, T: int) -> int:
    """The time t = round(strength T), in 0..T. Raises ValueError for a strength outside [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength must lie in [0, 1], got {strength}")
    return round(strength * T)


def ddim_inverse(
    denoise: Denoise, x_s: Array, schedule: Schedule, rng: Rng, steps: int, spacing: str = "trailing", start: int = 0
) -> Iterator[Array]:
    """DDIM backwards: from data to the noise that `ddim` draws it from, yielding the state after each step, last x_T.

        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   x_0, eps denoised from x_s, s < t

    DDIM follows a differential equation, which can be followed either way; a step there and a step back differ only as
    the equation does between s and t, so that more steps come back closer to the image. No network was trained at
    s = 0, and the first step takes the image for x_1, which has next to no noise.
    x_s: (B, ...), the image itself, or `q_sample` of it at the time `start`. Where all images agree, as on a plain
    background, they have no noise to be followed upwards, and what is found is no N(0, I): start with a little.
    rng: not used. steps, spacing: the times visited, see `timesteps`, of which those above start are; take the same for
    the way back. Raises ValueError for bad steps or spacing, a start outside 0..T-1, or one that no time lies above.
    (E36; Song et al. 2021, section 4.3; Dhariwal & Nichol 2021, appendix F)
    """
    if not 0 <= start < schedule.T:
        raise ValueError(f"the start must be in 0..{schedule.T - 1}, got {start}")
    above = [t for t in reversed(timesteps(schedule.T, steps, spacing)) if t > start]
    if not above:
        raise ValueError(f"none of the times visited lies above the start, {start}: use more steps or another spacing")
    for s, t in itertools.pairwise([start, *above]):
        x_0, eps, _ = denoise(x_s, max(s, 1))
        x_s = q_sample(x_0, t, eps, schedule)
        yield x_s


def slerp(a: Array, b: Array, weight: float | np.ndarray) -> Array:
    """A point on the arc from a to b: between two draws of noise that is noise again, which their mean is not.

        (sin((1 - w) theta) a + sin(w theta) b)/sin theta,   cos theta = a·b/(|a| |b|)

    Where |a| = |b|, that is the length of all points between. The mean of two draws from N(0, I) has half their
    variance, and a model takes it for an image with little contrast.
    a, b: (B, ...), one arc a sample. weight: w, or one a sample (B,); 0 gives a, 1 gives b, both exactly.
    Raises ValueError if the two shapes differ, for weights that are not one a sample, for a zero a or b, and for
    opposite ones, which many arcs join.
    (Song et al. 2021, "DDIM", eq. 67; Shoemake 1985)
    """
    if a.shape != b.shape:
        raise ValueError(f"the ends must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if np.shape(weight) not in ((), a.shape[:1]):
        raise ValueError(f"expected one weight, or one a sample, {a.shape[:1]}, got {np.shape(weight)}")
    aa, bb, ab = _dot(a, a), _dot(b, b), _dot(a, b)
    if not (aa > 0).all() or not (bb > 0).all():
        raise ValueError("there is no arc to or from 0: an end has length 0")
    theta = np.arccos(np.clip(ab / np.sqrt(aa * bb), -1, 1))
    if (math.pi - theta < 1e-6).any():
        raise ValueError("the two ends are opposite, and many arcs join them")
    w = np.broadcast_to(weight, theta.shape)
    theta = np.maximum(theta, 1e-6)  # where a and b point the same way, the arc is a straight line
    of_a, of_b = np.sin((1 - w) * theta) / np.sin(theta), np.sin(w * theta) / np.sin(theta)
    return per_sample(of_a, a) * a + per_sample(of_b, b) * b


def _dot(a: Array, b: Array) -> np.ndarray:
    """The scalar product of each sample, float64 (B,) on the host."""
    product = a.reshape(len(a), -1).astype(np.float64) * b.reshape(len(b), -1)
    return backend.to_numpy(product.sum(axis=1))
