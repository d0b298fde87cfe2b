"""Training and sampling are the same on every device: layers, losses, optimisers and samplers together."""

import functools

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend, no_grad, ops
from tinydiff.autograd import checkpoint
from tinydiff.diffusion import Sampling
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.models.pixel_diffusion import PixelDiffusion, PixelDiffusionConfig
from tinydiff.nn import UNet, UNetConfig
from tinydiff.optim import EMA, SGD, Adam, AdamW

CONFIG = UNetConfig(
    channels=2, base=8, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, groups=4, classes=3, context=5
)
STEPS = 3


def host_model():
    """A small U-Net with everything, its weights drawn on the host."""
    with backend.use_device("cpu"):
        model = UNet(CONFIG, Rng(0))
        for i, p in enumerate(model.parameters().values()):
            p[...] = 0.2 * np.random.default_rng(i).normal(size=p.shape) + (p.ndim == 1)
    return model.to(np.float64)


def batch(step):
    """Noised images, times, labels, tokens with their mask, and the noise: drawn on the host, moved to the device."""
    rng = np.random.default_rng(100 + step)
    arrays = (
        rng.normal(size=(3, 4, 6, 2)), rng.integers(1, 1000, 3), rng.integers(-1, 3, 3), rng.normal(size=(3, 4, 5)),
        np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]], bool), rng.normal(size=(3, 4, 6, 2)),
    )  # fmt: skip
    return map(backend.to_device, arrays)


def trained(optimiser, recompute=False):
    """The weights, their average, and the losses, after a few steps on the device in use."""
    model = host_model().to(backend.device())
    opt = optimiser(model.parameters())
    ema, losses = EMA(opt, 0.9), []
    for step in range(STEPS):
        x, t, label, context, mask, eps = batch(step)
        call = functools.partial(model, t=t, label=label, context=Tensor(context), mask=mask)
        loss = ops.mse_loss(checkpoint(call, Tensor(x)) if recompute else call(Tensor(x)), eps)
        loss.backward()
        norm = opt.step(1e-2, max_norm=1.0)
        ema.update()
        losses += [loss.item(), norm]
    return [backend.to_numpy(a) for a in (opt.vector, ema.average)] + [np.array(losses)]


@functools.cache
def trained_on_the_host(optimiser):
    with backend.use_device("cpu"):
        return trained(optimiser)


MOMENTUM, DECAY = functools.partial(SGD, momentum=0.9), functools.partial(AdamW, weight_decay=0.1)


@pytest.mark.parametrize(
    ("optimiser", "recompute"),
    [(MOMENTUM, False), (Adam, False), (DECAY, False), (Adam, True)],
    ids=["SGD", "Adam", "AdamW", "Adam-checkpoint"],
)
def test_training_ends_in_the_same_weights(optimiser, recompute, device):
    for actual, expected in zip(trained(optimiser, recompute), trained_on_the_host(optimiser), strict=True):
        assert_close(actual, expected, rtol=1e-8)


def test_training_twice_ends_in_the_same_bits(device):
    for first, second in zip(trained(Adam), trained(Adam), strict=True):
        assert_close(first, second)


def diffusion():
    unet = UNetConfig(base=8, multipliers=(1, 2), blocks=1, attention=(1,), groups=4, classes=2, dropout=0.1)
    return PixelDiffusion(PixelDiffusionConfig(unet, size=(4, 4), T=6, class_names=("a", "b")), Rng(0))


def test_one_step_of_diffusion_training(device):
    model = diffusion()
    opt = Adam(model.parameters())
    x_0 = backend.to_device(np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 4, 4, 1))
    for step in range(2):
        loss = model.loss(x_0, Rng(1).at(step), backend.to_device(np.array([0, 1, 1, 0])))
        loss.backward()
        assert loss.device == backend.device() and opt.step(1e-3) > 0
    again = diffusion()
    opt2 = Adam(again.parameters())
    for step in range(2):
        again.loss(x_0, Rng(1).at(step), backend.to_device(np.array([0, 1, 1, 0]))).backward()
        opt2.step(1e-3)
    assert_close(opt2.vector, backend.to_numpy(opt.vector))


@pytest.mark.parametrize(
    "how",
    [
        *({"how": Sampling(sampler, steps=3)} for sampler in SAMPLERS),
        {"guidance": 2.0, "how": Sampling(steps=2), "label": 1},
    ],
)
def test_sampling_stays_on_the_device(how, device):
    with no_grad():
        states = list(diffusion().sample(2, Rng(3), **how))
        again = list(diffusion().sample(2, Rng(3), **how))
    for state, other in zip(states, again, strict=True):
        assert backend.device_of(state) == backend.device()
        assert state.shape == (2, 4, 4, 1) and state.dtype == np.float32
        assert_close(state, backend.to_numpy(other))
