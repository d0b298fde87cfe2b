"""What tinydiff does in each row: functions that build the work and give a Step, which does it once.

The same functions stand in in_torch.py (and the U-Net's step in in_jax.py), from the same weights and inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import runpy
from typing import Any

import numpy as np

from tests.benchmarks.side import Step
from tinydiff import Rng, Tensor, backend, no_grad, ops, optim
from tinydiff.data import mnist
from tinydiff.diffusion import Sampling, last
from tinydiff.models import PixelDiffusion
from tinydiff.nn import Module, UNet, UNetConfig
from tinydiff.nn.module import Parameter
from tinydiff.train import Training
from tinydiff.workers import DrawnLoss, Workers, shares_for

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "train_mnist.py"
UNET = UNetConfig()
"""3.94 M parameters: base 32, levels of 32, 64 and 128 channels, attention at the third."""

FOR_GOOD = contextlib.ExitStack()
"""What is entered until the process ends, which has nothing else to do; a context that nobody holds is left at once."""


# ------------------------------------------------------------------------------- what both sides begin with


def awake(model: Any) -> Any:
    """The model, its parameters that start at zero drawn anew: a network whose output is 0 would compare too easily."""
    for i, p in enumerate(model.parameters().values()):
        if not p.data.any():
            p[...] = 0.05 * Rng(9).at(i).normal(p.shape)
    return model


def unet(config: UNetConfig = UNET) -> UNet:
    """The U-Net of the rows that have one."""
    return awake(UNet(config, Rng(0)))


def images(batch: int, size: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets (batch, size, size, 1), and times (batch,)."""
    shape = (batch, size, size, 1)
    return Rng(1, "cpu").normal(shape), Rng(2, "cpu").normal(shape), 1 + np.arange(batch) % 1000


def digits_model(**changes: Any) -> tuple[PixelDiffusion, Any, mnist.Digits]:
    """The model of examples/train_mnist.py, its Recipe (with these changes), and the images."""
    recipe = dataclasses.replace(example()["Recipe"](), **changes)
    digits = mnist.load(recipe.data)
    return awake(PixelDiffusion(recipe.model(digits), Rng(0))), recipe, digits


def example() -> dict[str, Any]:
    """What examples/train_mnist.py defines."""
    return runpy.run_path(str(EXAMPLE))


def kernels(layers: int = 15, width: int = 272) -> dict[str, np.ndarray]:
    """Parameters of as many convolutions, each with its bias and a norm: by default 60 arrays, 10.0 million numbers."""
    shapes = {"weight": (3, 3, width, width), "bias": (width,), "gamma": (width,), "beta": (width,)}
    names = enumerate(itertools.product(range(layers), shapes))
    return {f"{layer}.{name}": Rng(0, "cpu").at(i).normal(shapes[name]) for i, (layer, name) in names}


# ----------------------------------------------------------------------------------------------- the rows


def unet_step(
    batch: int = 64, size: int = 32, config: UNetConfig = UNET, device: str = "cpu", processes: int = 1
) -> Step:
    """A training step of a U-Net, as the training loop takes it: forward, mean squared error, backward, Adam.

    Gives the loss. processes: how many share the batch; 0 is as many as the training loop would have.
    """
    FOR_GOOD.enter_context(backend.use_device(device))
    x, eps, t = map(backend.to_device, images(batch, size))
    model = unet(config)
    adam = optim.Adam(model.parameters())
    loss = DrawnLoss(
        lambda step, share: (share.of(x), share.of(t), share.of(eps)),
        lambda x, t, eps: ops.mse_loss(model(Tensor(x), t), eps),
    )
    workers = Workers(adam, loss, batch, processes or shares_for(batch)).__enter__()  # they end with this process

    def step() -> float:
        value = workers.backward(0)
        adam.step_along_gradient(1e-3)
        return value

    return step


def transformer_step(batch: int = 64, tokens: int = 64, width: int = 256, layers: int = 6, heads: int = 4) -> Step:
    """A training step of a transformer: forward, mean squared error, backward, Adam; gives the loss."""
    model, x, wanted = transformer(batch, tokens, width, layers, heads)
    return training_step(model, lambda: ops.mse_loss(model(Tensor(x)), wanted))


def transformer(batch: int, tokens: int, width: int, layers: int, heads: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """A transformer, and its inputs and targets (batch, tokens, width)."""
    from tinydiff.nn import Transformer, TransformerConfig

    shape = (batch, tokens, width)
    model = awake(Transformer(TransformerConfig(width=width, layers=layers, heads=heads), Rng(0)))
    return model, Rng(1).normal(shape), Rng(2).normal(shape)


def training_step(model: Module, loss_of: Any) -> Step:
    """A step of Adam along the gradient of this loss."""
    optimiser = optim.Adam(model.parameters())

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimiser.step(1e-3)
        return loss.item()

    return step


def unet_forward(batch: int = 64, size: int = 32, config: UNetConfig = UNET) -> Step:
    """A U-Net's forward pass without gradients; gives the mean square of the output."""
    model, (x, _, t) = unet(config), images(batch, size)

    def step() -> float:
        with no_grad():
            return float((model(Tensor(x), t).data ** 2).mean())

    return step


def mnist_step(**changes: Any) -> Step:
    """A training step of examples/train_mnist.py as its loop takes it, processes and all; gives the loss."""
    model, recipe, digits = digits_model(**{"steps": 100_000} | changes)  # so that no --repeats comes to their end
    training = Training(model, recipe.settings(), pathlib.Path(), {})
    loss_at = example()["loss_of"](model, recipe, digits, Rng(1))
    workers = training.workers(loss_at, Rng(2), recipe.batch_size).__enter__()  # they end with this process

    def step() -> float:
        loss = workers.backward(training.step + 1)
        training.advance(loss)
        return loss

    return step


def optimiser(**sizes: int) -> Step:
    """Clipping to norm 1, Adam and a moving average, without a network; gives how far one average moved."""
    parameters = {name: Parameter(array) for name, array in kernels(**sizes).items()}
    gradients = [0.1 * p.data for p in parameters.values()]
    adam = optim.Adam(parameters)
    ema = optim.EMA(adam, 0.99)
    last_one = next(reversed(parameters.values()))
    start = last_one.data.copy()

    def step() -> float:
        for p, gradient in zip(parameters.values(), gradients, strict=True):
            p.grad = gradient
        adam.step(1e-3, max_norm=1.0)
        ema.update()
        return float(np.abs(ema.average[-len(start) :] - start).sum())

    return step


def sample(n: int = 64, steps: int = 50, **changes: Any) -> Step:
    """DDIM with the model of examples/train_mnist.py and its usual guidance; gives the mean square of the digits."""
    model, _, _ = digits_model(**changes)

    def step() -> float:
        return float((last(model.sample(n, Rng(3), Sampling(steps=steps), label=np.arange(n) % 10)) ** 2).mean())

    return step


# --------------------------------------------------------------------------------- the machine's own limits


def matrix_product(n: int = 4096) -> Step:
    """A product of two (n, n) matrices of float32: 2 n³ operations."""
    a, b = Rng(1).normal((n, n)), Rng(2).normal((n, n))
    return lambda: float(backend.matmul(a, b)[0, 0])


def triad(n: int = 1 << 26) -> Step:
    """a = b + c on arrays of n numbers of float32, far larger than the caches: 12 n bytes to and from memory."""
    a, b, c = (np.ones(n, np.float32) for _ in range(3))

    def step() -> float:
        backend.parallel(lambda start, stop: np.add(b[start:stop], c[start:stop], out=a[start:stop]), n)
        return float(a[0])

    return step
