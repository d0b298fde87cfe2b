"""Diffusion of bits: the second process of Sohl-Dickstein et al. 2015, each function beside its Gaussian twin (E21).

    forward     q(x_t | x_{t-1}) = Bernoulli(x_{t-1} (1 - beta_t) + 0.5 beta_t)
    backward    p_theta(x_{t-1} | x_t) = q(x_{t-1} | x_t, x_0 as the network guesses it)

In words: at step t each bit is, with probability beta_t, replaced by the toss of a fair coin. Bits are floats, 0 or 1,
in arrays (B, ...) of float32 or float64, and keep their dtype; t is one whole number, or integers (B,), one a sample,
in 1..T unless said otherwise. A Bernoulli distribution is given by its probability of a 1. All is in nats; divided by
log 2 it is in bits. The network's guess at x_0 comes as log-odds, log p/(1 - p), which lose no small probability.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, to_numpy
from tinydiff.diffusion.schedule import at
from tinydiff.rng import Rng

Denoise = Callable[[Array, int], Array]
"""denoise(x_t, t) -> log-odds that each bit of x_0 is 1, shaped as x_t, in the view of a network."""

SUREST = 70.0
"""Log-odds beyond this count as this, a probability of 4e-31, so that float32 holds it and its products."""

SMALLEST = 1e-37
"""What stands for 0 in a logarithm, so that 0 log 0 is 0."""


@dataclasses.dataclass(frozen=True, eq=False)
class BinomialSchedule:
    """How likely a step is to replace a bit by a coin's toss: beta_t, and what follows from it.

    beta: (T+1,) float64, beta_0 = 0 and 0 < beta_t <= 1. At beta_t = 1 nothing of the data is left.
    Raises ValueError for T < 1, or a beta outside (0, 1].
    """

    beta: np.ndarray

    def __post_init__(self) -> None:
        beta = np.array(self.beta, dtype=np.float64)  # a copy, so that nobody else can write to it
        if beta.ndim != 1 or len(beta) < 2 or beta[0] != 0:
            raise ValueError(f"beta must be [0, beta_1, ..., beta_T] with T >= 1, got an array of shape {beta.shape}")
        if wrong := [t for t in range(1, len(beta)) if not 0 < beta[t] <= 1]:
            raise ValueError(f"beta_t must lie in (0, 1], got beta_{wrong[0]} = {beta[wrong[0]]}")
        beta.flags.writeable = False
        object.__setattr__(self, "beta", beta)

    @classmethod
    def from_betas(cls, betas: Iterable[float]) -> BinomialSchedule:
        """The schedule with the given beta_1..beta_T."""
        return cls(np.array([0.0, *betas]))

    @classmethod
    def even(cls, T: int) -> BinomialSchedule:
        """beta_t = 1/(T - t + 1): every step erases the same share 1/T of the data, so that alpha_bar_t = 1 - t/T.

        The last step, beta_T = 1, leaves pure noise. Raises ValueError for T < 1.
        (E21; Sohl-Dickstein et al. 2015, section 2.4.1)
        """
        if T < 1:
            raise ValueError(f"a schedule needs a whole number of steps T >= 1, got {T}")
        return cls.from_betas(1 / (T - t + 1) for t in range(1, T + 1))

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.beta) - 1

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar_t = prod_{i<=t} (1 - beta_i): the probability that a bit was never replaced; alpha_bar_0 = 1."""
        return np.cumprod(1 - self.beta)

    @functools.cached_property
    def alpha_bar_prev(self) -> np.ndarray:
        """alpha_bar_{t-1}; nan at t = 0, which no step leads to."""
        return np.append(np.nan, self.alpha_bar[:-1])


# ------------------------------------------------------------------------------------ the forward process


def step_probability(x_prev: Any, t: int | Array, schedule: BinomialSchedule) -> Any:
    """q(x_t = 1 | x_{t-1}) = x_{t-1} (1 - beta_t) + 0.5 beta_t.

    It is also q(x_t | x_{t-1} = 1) if x_t takes the place of x_{t-1}: the step treats both alike.
    x_prev: x_{t-1}, (B, ...). Returns the same shape. (E21; Sohl-Dickstein et al. 2015, Table App. 1)
    """
    beta = at(schedule.beta, t, x_prev)
    return x_prev * (1 - beta) + 0.5 * beta


def forward_step(x_prev: Array, t: int | Array, schedule: BinomialSchedule, rng: Rng) -> Array:
    """Draw x_t from q(x_t | x_{t-1}), `step_probability`.

    x_prev: x_{t-1}, (B, ...). Returns x_t, the same shape. Raises ValueError for x_prev that is not bits. (E21)
    """
    _check_bits(x_prev)
    return draw_bits(step_probability(x_prev, t, schedule), rng)


def forward_trajectory(x_0: Array, schedule: BinomialSchedule, rng: Rng) -> Iterator[Array]:
    """Draw x_{1:T} from q(x_{1:T} | x_0) = prod_t q(x_t | x_{t-1}), yielding x_1, ..., x_T, each (B, ...) as x_0."""
    x_t = x_0
    for t in range(1, schedule.T + 1):
        x_t = forward_step(x_t, t, schedule, rng)
        yield x_t


def forward_marginal(x_0: Any, t: int | Array, schedule: BinomialSchedule) -> Any:
    """q(x_t = 1 | x_0) = alpha_bar_t x_0 + 0.5 (1 - alpha_bar_t): the bit, if it was never replaced, or a coin's toss.

    x_0: (B, ...); t in 0..T, and t = 0 gives x_0 back. Returns the same shape. (E21)
    """
    return _blend(x_0, at(schedule.alpha_bar, t, x_0, first=0))


def q_sample(x_0: Array, t: int | Array, schedule: BinomialSchedule, rng: Rng) -> Array:
    """Draw x_t from q(x_t | x_0), `forward_marginal`: jump from the data to step t at once.

    x_0: (B, ...). Returns x_t, the same shape. Raises ValueError for x_0 that is not bits. (E21)
    """
    _check_bits(x_0)
    return draw_bits(forward_marginal(x_0, t, schedule), rng)


def draw_bits(p: Array, rng: Rng) -> Array:
    """Draw each bit: 1 with probability p, else 0. p: (B, ...) in [0, 1]. Returns its shape and dtype."""
    return (rng.uniform(tuple(p.shape), p.dtype) < p).astype(p.dtype)


# --------------------------------------------------------------------------------------- one step backward


def posterior(x_t: Any, x_0: Any, t: int | Array, schedule: BinomialSchedule) -> Any:
    """q(x_{t-1} = 1 | x_t, x_0) by Bayes' rule, with l = q(x_t | x_{t-1} = 1) and m = q(x_{t-1} = 1 | x_0).

        l m/(l m + (1 - l) (1 - m))
        l = x_t (1 - beta_t) + 0.5 beta_t,   m = alpha_bar_{t-1} x_0 + 0.5 (1 - alpha_bar_{t-1})

    Of a network that guesses x_0 = 1 with probability x_0 in (0, 1), not by x_t's own bit but by all the others, it is
    p_theta(x_{t-1} = 1 | x_t), and the best there is if the guess is right: x_t's own bit, which is one more reading
    of x_{t-1}, comes in by l. (Austin et al. 2021, eq. 4, write the same for any number of symbols.)
    x_t, x_0: (B, ...). Returns the same shape. At t = 1 it is x_0, if x_0 is a bit. (E21)
    """
    return _posterior(x_0, *evidence(x_t, t, schedule))


def evidence(x_t: Array, t: int | Array, schedule: BinomialSchedule) -> tuple[Array, Any]:
    """What `posterior` takes from x_t and t: q(x_t | x_{t-1} = 1), shaped as x_t, and alpha_bar_{t-1} beside it."""
    return step_probability(x_t, t, schedule), at(schedule.alpha_bar_prev, t, x_t)


def _posterior(x_0: Any, likelihood: Any, alpha_bar_prev: Any) -> Any:
    prior = _blend(x_0, alpha_bar_prev)
    one, zero = likelihood * prior, (1 - likelihood) * (1 - prior)
    return one / (one + zero)


def _blend(x_0: Any, alpha_bar: Any) -> Any:
    return alpha_bar * x_0 + 0.5 * (1 - alpha_bar)


def probability(log_odds: Any) -> Tensor:
    """p = 1/(1 + exp(-log_odds)), exact and with its gradient also where it is tiny; 1 - p is `probability(-log_odds)`.

    log_odds: an array or a Tensor; beyond 70 it counts as 70. Returns a Tensor of its shape.
    """
    return ops.exp(-ops.log(1.0 + ops.exp(-ops.clip(log_odds, low=-SUREST, high=SUREST))))


def reverse_step(log_odds: Any, likelihood: Array, alpha_bar_prev: Any) -> tuple[Tensor, Tensor]:
    """p_theta(x_{t-1} = 1 | x_t), the posterior at the network's guess of x_0, and 1 minus it, both exact where tiny.

    log_odds: the network's output at x_t, (B, ...), a Tensor or an array. likelihood, alpha_bar_prev: as
    `evidence(x_t, t, schedule)` gives them. Returns two Tensors (B, ...). (E21)
    """
    p = _posterior(probability(log_odds), likelihood, alpha_bar_prev)
    return p, _posterior(probability(-log_odds), 1 - likelihood, alpha_bar_prev)  # 0 and 1 having changed places


def ancestral(denoise: Denoise, x_T: Array, schedule: BinomialSchedule, rng: Rng) -> Iterator[Array]:
    """Sample by the reverse process, yielding x_{T-1}, ..., x_0, each drawn from p_theta(x_{t-1} | x_t).

    x_T: (B, ...), bits of a fair coin. (E21; Sohl-Dickstein et al. 2015, eq. 4–5)
    """
    x_t = x_T
    for t in range(schedule.T, 0, -1):
        p, _ = reverse_step(denoise(x_t, t), *evidence(x_t, t, schedule))
        x_t = draw_bits(p.data, rng)
        yield x_t


# ------------------------------------------------------------------------------------------------ the bound


def bernoulli_kl(q: Any, p: Any, not_p: Any) -> Tensor:
    """KL(Bernoulli(q) to Bernoulli(p)) = q log q/p + (1 - q) log (1 - q)/(1 - p), where 0 log 0 = 0, of each bit.

    q, p, not_p: arrays or Tensors that broadcast; not_p is 1 - p, given for itself so that it may be tiny. (E21)
    """
    return q * (_log(q) - _log(p)) + (1.0 - q) * (_log(1.0 - q) - _log(not_p))


def _log(p: Any) -> Tensor:
    return ops.log(ops.maximum(p, SMALLEST))


def reverse_kl(log_odds: Any, x_0: Array, likelihood: Array, alpha_bar_prev: Any) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) to p_theta(x_{t-1} | x_t)) of each bit, to train a network with.

    At t = 1, where q is certain of x_0, it is -log p_theta(x_0 | x_1). x_0: (B, ...). The rest: see `reverse_step`.
    Returns a Tensor (B, ...). (E21, E11; Sohl-Dickstein et al. 2015, eq. 14)
    """
    q = _posterior(x_0, likelihood, alpha_bar_prev)
    return bernoulli_kl(q, *reverse_step(log_odds, likelihood, alpha_bar_prev))


def bound(x_0: Array, denoise: Denoise, schedule: BinomialSchedule, rng: Rng) -> np.ndarray:
    """The terms L_0, L_1, ..., L_T of a bound on -log p_theta(x_0), in nats for each sample.

        L_{t-1} = KL(q(x_{t-1} | x_t, x_0) to p_theta(x_{t-1} | x_t)),   L_T = KL(q(x_T | x_0) to a fair coin)

    where x_t is drawn once from q(x_t | x_0), for every t. The sum over T is at least -log p_theta(x_0) on average.
    x_0: (B, ...). Returns (T+1, B) float64 on the host. (E21, E11; Sohl-Dickstein et al. 2015, eq. 10–13)
    """
    terms = []
    for t in range(1, schedule.T + 1):
        x_t = q_sample(x_0, t, schedule, rng.at(t))
        terms.append(reverse_kl(denoise(x_t, t), x_0, *evidence(x_t, t, schedule)))
    x_T = forward_marginal(x_0, schedule.T, schedule)
    coin = array_module(x_0).full_like(x_0, 0.5)
    terms.append(bernoulli_kl(x_T, coin, coin))
    return np.stack([_per_sample(term.data) for term in terms])


def bound_of_2015(terms: np.ndarray, dimensions: int, schedule: BinomialSchedule) -> np.ndarray:
    """K, the lower bound on log p(x_0) as the paper prints it, in nats for each sample.

        K = -sum_{t=2..T} KL(q(x_{t-1} | x_t, x_0) to p_theta(x_{t-1} | x_t))
            + H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T)

    It differs from -sum(terms) in the last step, which the paper does not train but sets to the forward step read
    backwards, p(x_0 | x_1) = q(x_1 | x_0); this costs H_q(X_1 | X_0) where a trained step costs L_0.
    terms: (T+1, B), what `bound` gives. dimensions: bits of a sample. Returns (B,).
    (E21; Sohl-Dickstein et al. 2015, eq. 14 and App. B.2)
    """

    def entropy_given_x_0(t: int) -> float:
        p = (1 - schedule.alpha_bar[t]) / 2  # that the bit is not what it was
        return dimensions * -sum(r * math.log(r) for r in (p, 1 - p) if r > 0)

    entropy_of_x_T = dimensions * math.log(2)
    return -terms[1:-1].sum(axis=0) + entropy_given_x_0(schedule.T) - entropy_given_x_0(1) - entropy_of_x_T


def log_likelihood(x_0: Array, denoise: Denoise, schedule: BinomialSchedule, rng: Rng, trajectories: int) -> np.ndarray:
    """log p_theta(x_0), estimated by an average over forward trajectories, in nats for each sample.

        p_theta(x_0) = E_q(x_{1:T} | x_0) [ p(x_T) prod_t p_theta(x_{t-1} | x_t)/q(x_t | x_{t-1}) ]

    The average is right for p_theta(x_0) however few the trajectories; its logarithm is too low for few. For short
    chains: the longer, the more the product varies. x_0: (B, ...). Returns (B,) float64 on the host.
    Raises ValueError for less than one trajectory. (E21; Sohl-Dickstein et al. 2015, eq. 6–9)
    """
    if trajectories < 1:
        raise ValueError(f"an average needs at least 1 trajectory, got {trajectories}")
    log_weights = np.stack([_log_weight(x_0, denoise, schedule, rng.at(k)) for k in range(trajectories)])
    largest = log_weights.max(axis=0)
    return largest + np.log(np.exp(log_weights - largest).mean(axis=0))


def _log_weight(x_0: Array, denoise: Denoise, schedule: BinomialSchedule, rng: Rng) -> np.ndarray:
    """log p_theta(x_{0:T})/q(x_{1:T} | x_0) for one trajectory of each sample."""
    x_prev, total = x_0, _per_sample(array_module(x_0).full_like(x_0, -math.log(2)))  # log p(x_T)
    for t, x_t in enumerate(forward_trajectory(x_0, schedule, rng), start=1):
        p, not_p = reverse_step(denoise(x_t, t), *evidence(x_t, t, schedule))
        step = step_probability(x_prev, t, schedule)
        log_p = x_prev * _log(p) + (1 - x_prev) * _log(not_p)
        log_q = x_t * _log(step) + (1 - x_t) * _log(1 - step)
        total = total + _per_sample((log_p - log_q).data)
        x_prev = x_t
    return total


def _check_bits(x: Array) -> None:
    if not ((x == 0) | (x == 1)).all():
        raise ValueError(f"bits must be 0 or 1, got values from {float(x.min()):.3g} to {float(x.max()):.3g}")


def _per_sample(values: Array) -> np.ndarray:
    """The sum over all but the first axis, float64 on the host."""
    return to_numpy(values).astype(np.float64).reshape(len(values), -1).sum(axis=1)
