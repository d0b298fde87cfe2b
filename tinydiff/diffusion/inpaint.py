"""Inpainting without training (E36): a model of whole images paints what is missing of one.

A mask is 1 where the image is known and 0 where it is to be painted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array
from tinydiff.diffusion.gaussian import Prediction, forward_step, posterior, predict, q_sample
from tinydiff.diffusion.samplers import Denoise, timesteps
from tinydiff.diffusion.schedule import Schedule
from tinydiff.rng import Rng


def repaint(
    denoise: Denoise,
    x_T: Array,
    schedule: Schedule,
    rng: Rng,
    known: Array,
    mask: Array,
    steps: int | None = None,
    jump: int = 10,
    resamplings: int = 10,
    spacing: str = "trailing",
) -> Iterator[Array]:
    """RePaint: ancestral sampling in which the known part is put back at every step, yielding the state after each.

        x_{t-1}^known   = sqrt(alpha_bar_{t-1}) x_0 + sqrt(1 - alpha_bar_{t-1}) z,   x_0 the known image
        x_{t-1}^unknown ~ p_theta(x_{t-1} | x_t), with variance beta_tilde_t
        x_{t-1}         = m x_{t-1}^known + (1 - m) x_{t-1}^unknown

    The known part that is put in knows nothing of what was painted so far, and the two do not match. So the sampler
    goes back, x_t ~ q(x_t | x_{t-1}), and down again, which lets the painted part follow the known: see `resampled`.
    resamplings = 1 never goes back; that is plain replacement (Song et al. 2021, "Score-based", appendix I.2).

    x_T: (B, H, W, C), drawn from N(0, I). known: the images, of x_T's shape, whatever they hold where they are not
    known. mask: (H, W), or (B, H, W, 1), one an image; bool, or numbers 0 and 1. steps, spacing: the times visited, see
    `timesteps`; by default all T. The last state is x_0, and holds the known pixels exactly.
    Raises ValueError for another mask, known images of another shape, and bad steps, spacing, jump or resamplings.
    (E36; Lugmayr et al. 2022, Algorithm 1 and eq. 8)
    """
    kept = as_mask(mask, x_T)
    if known.shape != x_T.shape:
        raise ValueError(f"the known images must have the shape of x_T, {x_T.shape}, got {known.shape}")
    times = timesteps(schedule.T, schedule.T if steps is None else steps, spacing)
    visited = schedule.respaced(times)
    x_t = x_T
    for t, s in itertools.pairwise(resampled(visited.T, jump, resamplings)):
        if s > t:
            x_t = forward_step(x_t, s, visited, rng)
        else:
            mean, variance = posterior(x_t, denoise(x_t, times[-t]).x0, t, visited)
            z = rng.normal_like(x_t)  # one draw serves both parts, which lie at different pixels
            x_t = _combined(kept, q_sample(known, s, z, visited), mean + variance**0.5 * z)
        yield x_t


def resampled(N: int, jump: int = 10, resamplings: int = 10) -> list[int]:
    """The way of `repaint` through its times: N, N - 1, ..., 0, with stretches walked over and over.

    Where it comes to 1, 1 + jump, 1 + 2 jump, ... it goes back by `jump` times, so that it walks each stretch down to
    there `resamplings` times. With jump = 1 this is Algorithm 1, with U = resamplings.
    It takes N + (resamplings - 1) jump floor((N - 1)/jump) steps down, each a call of the network.
    Raises ValueError for jump or resamplings below 1. (Lugmayr et al. 2022, section 4.2 and appendix)
    """
    if min(jump, resamplings) < 1:
        raise ValueError(f"jump and resamplings must be at least 1, got {jump} and {resamplings}")
    left = dict.fromkeys(range(1, N - jump + 1, jump), resamplings - 1)
    way = [N]
    while (t := way[-1]) > 0:
        if left.get(t, 0) > 0:
            left[t] -= 1
            way += range(t + 1, t + jump + 1)
        else:
            way.append(t - 1)
    return way


def keep_known(denoise: Denoise, known: Array, mask: Array, schedule: Schedule) -> Denoise:
    """A denoise(x_t, t) that guesses the known pixels right, for any sampler and any model.

        x_0 <- m x_0^known + (1 - m) x_0,   eps such that both still make up x_t

    Whatever the sampler, its last state then holds the known pixels. On its own it tells the model nothing of them, but
    what the sampler mixes in; a model that was shown them (`PixelInpainting`) needs no more.
    known, mask: as for `repaint`. Raises ValueError for another mask. (E36; GLIDE's code, "denoised_fn")
    """
    kept = as_mask(mask, known)

    def denoise_unknown(x_t: Array, t: int) -> Prediction:
        x_0, _, v = denoise(x_t, t)
        x_0 = _combined(kept, known, x_0)
        return Prediction(x_0, predict(x_0, x_t, t, schedule, "x0").eps, v)

    return denoise_unknown


def as_mask(mask: Array, x: Array) -> Array:
    """A mask as bool (1, H, W, 1) or (B, H, W, 1) on the device of the images x (B, H, W, C).

    mask: (H, W) for all, or (B, H, W, 1), one an image; bool, or numbers that are all 0 or 1.
    Raises ValueError for other numbers or another size.
    """
    values = backend.to_numpy(mask)
    sizes = x.shape[1:3], (*x.shape[:3], 1)
    if x.ndim != 4 or values.shape not in sizes:
        raise ValueError(f"images {x.shape} take a mask {sizes[0]} or {sizes[1]}, got {values.shape}")
    if (wrong := values[~np.isin(values, (0, 1))]).size:
        raise ValueError(f"a mask is 1 where the image is known and 0 elsewhere, got {wrong[0]}")
    values = values.reshape(-1, *x.shape[1:3], 1).astype(bool)
    return backend.to_device(values, backend.device_of(x))


def _combined(kept: Array, known: Array, unknown: Array) -> Array:
    """m known + (1 - m) unknown in the dtype of unknown, even where the one that does not count is not finite."""
    return backend.array_module(unknown).where(kept, known.astype(unknown.dtype), unknown)
