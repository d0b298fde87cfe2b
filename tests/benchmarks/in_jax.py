"""What JAX does in its row: the training step of the U-Net, compiled as one, from the same weights and inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tests.benchmarks import ours
from tests.benchmarks.side import Step
from tests.jax_unet import adam, unet
from tinydiff.nn import UNetConfig


def unet_step(batch: int = 64, size: int = 32, config: UNetConfig = ours.UNET) -> Step:
    """A training step of a U-Net: forward, mean squared error, backward, Adam; gives the loss."""
    x, eps, t = map(jnp.asarray, ours.images(batch, size))
    p = {name: jnp.asarray(array) for name, array in ours.unet(config).state_dict().items()}
    zeros = jax.tree.map(jnp.zeros_like, p)
    state, n = (p, zeros, zeros), 0

    @jax.jit
    def train(state, n):
        loss, g = jax.value_and_grad(lambda p: ((unet(p, config, x, t) - eps) ** 2).mean())(state[0])
        return loss, adam(*state, g, n, 1e-3)

    def step() -> float:
        nonlocal state, n
        n += 1
        loss, state = train(state, n)
        return float(jax.block_until_ready((loss, state))[0])

    return step
