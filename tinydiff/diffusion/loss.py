"""The training loss of Algorithm 1 (E16–E18) and its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.diffusion.gaussian import q_sample, target_of
from tinydiff.diffusion.schedule import Schedule, lookup, per_sample
from tinydiff.rng import Rng


def draw_t(rng: Rng, n: int, T: int, stratified: bool = False, often: np.ndarray | None = None) -> np.ndarray:
    """Draw n times uniformly from 1..T: line 3 of Algorithm 1. Returns (n,) int64 on the host.

    stratified: cut 1..T into n equal parts and draw one time from each, in rising order: over many batches every time
    comes equally often, as without, but there is less chance in each batch. often: (T,), > 0, how often to draw each
    of 1..T instead, up to a factor; a loss averaged over such times is one weighted by it (importance sampling).
    (E18; Nichol & Dhariwal 2021, section 3.3)
    """
    if often is None and not stratified:
        return backend.to_numpy(rng.integers(1, T + 1, (n,)))
    place = backend.to_numpy(rng.uniform((n,), np.float64))
    if stratified:
        place = (np.arange(n) + place) / n
    share = np.arange(1, T + 1) / T if often is None else np.cumsum(often) / np.sum(often)
    return 1 + np.searchsorted(share, place, side="right").clip(max=T - 1)  # the last share may round to less than 1


def simple_loss(
    model: Callable[[Array, Any], Tensor],
    x_0: Array,
    t: int | Array,
    eps: Array,
    schedule: Schedule,
    target: str = "eps",
    weight: float | Array | None = None,
) -> Tensor:
    """The mean squared error of the network, the inner line of Algorithm 1.

        L_simple = || eps - eps_theta(x_t, t) ||²,   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

    averaged over the batch and all dimensions. The slide prints sqrt(alpha_t) for sqrt(alpha_bar_t): without the
    bars x_t is hardly noisy at any t, and the network never sees what sampling starts from.

    model(x_t, t): takes x_t (B, ...) and the t given here; gives a Tensor shaped as x_t. x_0, eps: (B, ...), x_0 in
    [-1, 1], eps drawn from N(0, I). t: one number or (B,), in 1..T. target: what the model outputs and the error is
    measured in, see `target_of`. weight: a factor for each sample's error, (B,), or one number for all, such as
    `min_snr_weight(t, schedule)`. Returns a scalar Tensor.
    Raises ValueError for another target, t outside 1..T, or shapes that do not fit.
    (E17 and E18; Ho et al. 2020, eq. 14 and Algorithm 1)
    """
    x_t = q_sample(x_0, t, eps, schedule)
    wanted = target_of(x_0, eps, t, schedule, target)
    output = model(x_t, t)
    if output.shape != wanted.shape:
        raise ValueError(f"the model's output must have the shape of x_t, {wanted.shape}, got {output.shape}")
    return squared_error(output, wanted, None if weight is None else per_sample(weight, output))


def squared_error(output: Tensor, wanted: Array, weight: float | Array | None = None) -> Tensor:
    """The mean of weight (output - wanted)², the last line of `simple_loss`, over the batch and all dimensions.

    output, wanted: (B, ...). weight: a number, or (B, 1, ...) on their device. Returns a scalar Tensor. (E17)
    """
    error = (output - wanted) ** 2
    return (error if weight is None else error * weight).mean()


def vlb_weight(t: int | Array, schedule: Schedule, variance: str = "beta") -> Any:
    """beta_t²/(2 sigma_t² alpha_t (1 - alpha_bar_t)): the factor of || eps - eps_theta ||² in the bound's L_{t-1}.

    variance: which sigma_t², see `Schedule.reverse_variance`. t: in 1..T, or 2..T for variance "posterior", where
    sigma_1 is 0 (the term of t = 1 is L_0, which has its own formula). Returns a float, or (B,) float64 on the host.
    Raises ValueError for t outside that range and for another variance. (E16; Ho et al. 2020, eq. 12)
    """
    s, sigma_squared = schedule, schedule.reverse_variance(variance)
    with np.errstate(divide="ignore", invalid="ignore"):  # at the times that `first` rules out
        weight = s.beta**2 / (2 * sigma_squared * s.alpha * s.one_minus_alpha_bar)
    return lookup(weight, t, first=2 if variance == "posterior" else 1)


def min_snr_weight(t: int | Array, schedule: Schedule, gamma: float = 5.0, target: str = "eps") -> Any:
    """How much step t counts, so that the many easy, almost clean steps do not drown the others.

        target "x0": min(SNR_t, gamma)
        target "eps": min(SNR_t, gamma)/SNR_t
        target "v": min(SNR_t, gamma)/(SNR_t + 1)       with SNR_t = alpha_bar_t/(1 - alpha_bar_t)

    All three weigh an error in x_0 by min(SNR_t, gamma). t: in 1..T. Returns a float, or (B,) float64 on the host.
    Raises ValueError for t outside 1..T, gamma <= 0, or another target. (Hang et al. 2023, section 3.4)
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    snr = schedule.snr
    with np.errstate(divide="ignore"):  # snr_T may be 0
        weights = {
            "x0": np.minimum(snr, gamma),
            "eps": np.minimum(1, gamma / snr),
            "v": np.minimum(snr, gamma) / (snr + 1),
        }
    if target not in weights:
        raise ValueError(f"target must be 'eps', 'x0' or 'v', got {target!r}")
    return lookup(weights[target], t)
