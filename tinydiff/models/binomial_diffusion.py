"""Diffusion of bits (E21): a network that guesses images or sequences of bits from what noise left of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tinydiff import ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, beside, captured, to_device
from tinydiff.diffusion import binomial, draw_t
from tinydiff.diffusion.binomial import BinomialSchedule
from tinydiff.files import PathLike
from tinydiff.models.trained import load_trained
from tinydiff.nn import Linear, Module, TimeEmbedding, UNet, UNetConfig
from tinydiff.rng import Rng

LONGEST = 1000
"""What the network is told for t = T, whatever T is; its time embedding is made for 1000 steps."""


@dataclass(frozen=True)
class BinomialDiffusionConfig:
    """What a BinomialDiffusion is made of.

    size: height and width of the images, in bits; a sequence is an image of height 1. unet: the network's sizes,
    without classes or context; or None for a BitNetwork of this width, which suits short sequences. T: the number of
    diffusion steps. Raises ValueError for T < 1, a size below 1, an odd width, and a U-Net that asks for more than an
    image.
    """

    size: tuple[int, int]
    unet: UNetConfig | None = None
    width: int = 128
    T: int = 200

    def __post_init__(self) -> None:
        if min(self.T, self.width, *self.size) < 1 or self.width % 2:
            raise ValueError(f"steps and sizes must be at least 1, and the width even, got {self}")
        u = self.unet
        if u and (u.channels != 1 or u.classes or u.context or u.extra or u.outputs):
            raise ValueError(f"a model of bits is told only x_t, of one channel, and t, and gives as many; got {u}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        return cls(**fields | {"unet": fields["unet"] and UNetConfig(**fields["unet"])})


class BitNetwork(Module):
    """A network of two hidden layers that sees all bits of a sequence at once: x (B, ...), t (B,) -> as x."""

    def __init__(self, bits: int, width: int, rng: Rng):
        self.time = TimeEmbedding(width, width, rng)
        self.first, self.second = Linear(bits, width, rng), Linear(width, width, rng)
        self.out = Linear(width, bits, rng, zero=True)

    def __call__(self, x: Tensor, t: Array, rng: Rng | None = None) -> Tensor:
        h = ops.silu(self.first(x.reshape(len(x), -1)) + self.time(t))
        return self.out(ops.silu(self.second(h))).reshape(x.shape)


class BinomialDiffusion(Module):
    """A network that turns coin tosses into bits like those it was shown: its training loss, samples, and their bound.

    Called as model(x_t, t) it gives the log-odds that each bit of x_0 is 1, judged by the other bits of x_t.
    """

    kind = "binomial"

    def __init__(self, config: BinomialDiffusionConfig, rng: Rng):
        self.config = config
        bits = config.size[0] * config.size[1]
        self.network = UNet(config.unet, rng) if config.unet else BitNetwork(bits, config.width, rng)
        self.schedule = BinomialSchedule.even(config.T)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA), ready to sample.

        path: the checkpoint, or the folder it is in. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(BinomialDiffusionConfig.from_dict(fields), Rng(0)))

    def __call__(self, x_t: Array, t: Array, rng: Rng | None = None) -> Tensor:
        """The log-odds of x_0 (B, H, W, 1) for bits x_t (B, H, W, 1) at the times t (B,) in 1..T; rng: for dropout."""
        x = Tensor(2 * x_t - 1)
        return self.network(x, to_device(t, x.device) * (LONGEST / self.config.T), rng=rng)

    def loss(self, x_0: Array, rng: Rng) -> Tensor:
        """One draw of the bound, in bits for each bit of x_0: one t an image stands for all T, each equally likely.

            L = T KL(q(x_{t-1} | x_t, x_0) to p_theta(x_{t-1} | x_t)),   x_t drawn from q(x_t | x_0)

        x_0: (B, H, W, 1), float32, 0 or 1. rng: the stream of this step. Raises ValueError for x_0 that is not bits.
        (E21; Sohl-Dickstein et al. 2015, eq. 14)
        """
        return self.loss_of(*self.draw(x_0, rng), rng=rng.at(2))

    def draw(self, x_0: Array, rng: Rng) -> tuple[Array, Array, Array, Array, Array]:
        """All that `loss` draws and looks up, the arguments of `loss_of`, on x_0's device; raises the same."""
        t = draw_t(rng.at(0), len(x_0), self.schedule.T, stratified=True)
        x_t = binomial.q_sample(x_0, t, self.schedule, rng.at(1))
        return x_t, beside(t, x_0), x_0, *binomial.evidence(x_t, t, self.schedule)

    def loss_of(
        self, x_t: Array, t: Array, x_0: Array, likelihood: Array, alpha_bar_prev: Array, rng: Rng | None = None
    ) -> Tensor:
        """The loss of what `draw` gave, the same each time unless rng is given, for dropout."""
        kl = binomial.reverse_kl(self(x_t, t, rng), x_0, likelihood, alpha_bar_prev)
        return kl.mean() * (self.schedule.T / math.log(2))

    def sample(self, n: int, rng: Rng, *, steps: int | None = None) -> Iterator[Array]:
        """Draw n images from coin tosses, yielding x_T first, then each state down to x_0 (eq. 4–5 of the 2015 paper).

        steps: 1..T, by default T; see `coarser`. Each state is (n, H, W, 1), float32, 0 or 1.
        Raises ValueError for n < 1 or steps outside 1..T.
        """
        if n < 1:
            raise ValueError(f"the number of samples must be at least 1, got {n}")
        denoise, schedule = self.coarser(steps)
        shape = (n, *self.config.size, 1)
        x_T = (rng.at(0).uniform(shape) < 0.5).astype(np.float32)
        return itertools.chain([x_T], binomial.ancestral(denoise, x_T, schedule, rng.at(1)))

    def bound(self, x_0: Array, rng: Rng, *, steps: int | None = None) -> np.ndarray:
        """The terms L_0..L_T of the bound on -log p_theta(x_0), in nats for each image: (steps + 1, B), on the host.

        x_0: (B, H, W, 1), float32, 0 or 1. steps: 1..T, by default T; see `coarser`; each is a model of its own, and
        so has a bound of its own. Raises ValueError for steps outside 1..T, and x_0 that is not bits. (E21)
        """
        denoise, schedule = self.coarser(steps)
        return binomial.bound(x_0, denoise, schedule, rng)

    def coarser(self, steps: int | None = None) -> tuple[binomial.Denoise, BinomialSchedule]:
        """The network as denoise(x_t, t), and the schedule to use it with, of `steps` steps, T by default.

        The even schedule in n steps is the one in T steps seen only now and then: alpha_bar is 1 - i/n after i of them,
        as it is after t = i T/n. Raises ValueError for steps outside 1..T.
        """
        steps = self.config.T if steps is None else steps
        if not 1 <= steps <= self.config.T:
            raise ValueError(f"the number of steps must be in 1..{self.config.T}, the T of this model, got {steps}")
        self.eval()

        @captured
        def network(x_t: Array, t: Array) -> Array:
            return self(x_t, t).data

        def denoise(x_t: Array, i: int) -> Array:
            t = np.full(len(x_t), i * self.config.T / steps)
            with no_grad():
                return network(x_t, beside(t, x_t))

        return denoise, BinomialSchedule.even(steps)
