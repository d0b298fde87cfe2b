"""The VAE: its bound against the integral it bounds, and what it learns."""

import numpy as np
import pytest

from tests.diffusion.common import within
from tests.helpers import assert_close
from tests.nn.common import randomised
from tinydiff import Rng, Tensor, backend
from tinydiff.models import DigitVAE, DigitVAEConfig
from tinydiff.optim import Adam
from tinydiff.train import Training, TrainSettings

SMALL = DigitVAEConfig(size=8, latent=3, width=8, sigma=0.5)


def images(n, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 8, 8, 1)).astype(dtype)


def test_the_loss_term_by_term():
    model, x = randomised(DigitVAE(SMALL, Rng(0))), images(5)
    m, s2 = (t.numpy() for t in model.encode(Tensor(x)))
    assert m.shape == s2.shape == (5, 3)
    s = np.exp(s2 / 2)
    z = m + s * Rng(7).normal((5, 3), np.float64)
    drawn = model.decoder(Tensor(z)).numpy()
    of_image = ((x - drawn) ** 2).reshape(5, -1).sum(axis=1) / (2 * 0.25)
    kl = 0.5 * (m**2 + s**2 - 1 - np.log(s**2)).sum(axis=1)
    assert np.isclose(model.loss(x, Rng(7)).item(), np.mean(of_image + kl), rtol=1e-10)


def test_the_loss_bounds_the_likelihood():
    """E L >= -log ∫ p(z) exp(-|x - x̂(z)|² / 2σ²) dz, the integral by a sum over a grid of z."""
    model = randomised(DigitVAE(DigitVAEConfig(size=4, latent=1, width=8, sigma=2.0), Rng(0)))
    x = images(1)[:, :4, :4]
    grid = np.linspace(-8, 8, 4001)
    drawn = model.decoder(Tensor(grid[:, None])).numpy()
    exponent = -(((x - drawn) ** 2).reshape(4001, -1).sum(axis=1)) / (2 * 4) - grid**2 / 2
    minus_log_p = -np.log(np.exp(exponent).sum() * (grid[1] - grid[0]) / (2 * np.pi) ** 0.5)
    bound = np.mean([model.loss(x, Rng(seed)).item() for seed in range(200)])
    m, s2 = (t.numpy().item() for t in model.encode(Tensor(x)))
    posterior = exponent - exponent.max()  # the gap is KL(q to the true posterior of z)
    posterior = np.exp(posterior) / (np.exp(posterior).sum() * (grid[1] - grid[0]))
    q = np.exp(-((grid - m) ** 2) / (2 * np.exp(s2))) / (2 * np.pi * np.exp(s2)) ** 0.5
    inside = q > 1e-300
    gap = (q[inside] * np.log(q[inside] / posterior[inside])).sum() * (grid[1] - grid[0])
    losses = [model.loss(x, Rng(seed)).item() for seed in range(200)]
    assert bound > minus_log_p
    within(bound - minus_log_p, gap, np.std(losses) / 200**0.5)


def test_it_learns_to_describe_and_to_draw():
    """Images of one grey tone each: the tone is found in z, and what is drawn from noise has such tones."""
    model = DigitVAE(DigitVAEConfig(size=4, latent=2, width=8, sigma=0.1), Rng(0))
    adam = Adam(model.parameters())
    for step in range(100):
        tone = Rng(1).at(step).uniform((32, 1, 1, 1)) - 0.5
        model.loss(np.broadcast_to(tone, (32, 4, 4, 1)) * np.float32(1), Rng(2).at(step)).backward()
        adam.step(1e-2)
    tones = np.linspace(-0.4, 0.4, 9, dtype=np.float32).reshape(9, 1, 1, 1)
    x = np.broadcast_to(tones, (9, 4, 4, 1)) * np.float32(1)
    assert np.abs(model.reconstruct(x) - x).max() < 0.3
    drawn = model.sample(300, Rng(3)).mean(axis=(1, 2, 3))
    assert np.std(drawn) > 0.1 and np.abs(drawn).max() < 0.75


def test_samples_and_checkpoints(tmp_path, device):
    model = DigitVAE(SMALL, Rng(0))
    Training(model, TrainSettings(2), tmp_path / "checkpoint.npz", {}).save()
    loaded = DigitVAE.load(tmp_path)
    drawn, x = model.sample(3, Rng(1)), backend.to_device(images(2, dtype=np.float32))
    assert loaded.config == SMALL and drawn.shape == (3, 8, 8, 1) and drawn.dtype == np.float32
    assert_close(loaded.sample(3, Rng(1)), backend.to_numpy(drawn), rtol=1e-6)
    assert_close(loaded.reconstruct(x), backend.to_numpy(model.reconstruct(x)), rtol=1e-6)


@pytest.mark.parametrize("fields", [{"latent": 0}, {"sigma": 0.0}])
def test_a_vae_that_cannot_be(fields):
    with pytest.raises(ValueError, match="a VAE needs latent >= 1"):
        DigitVAEConfig(**fields)


def test_no_images():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DigitVAE(SMALL, Rng(0)).sample(0, Rng(0))
