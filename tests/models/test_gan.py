"""The GAN of the trilemma (E39): its losses, which gradient goes to which network, and that playing helps."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import randomised
from tests.nn.reference import part
from tinydiff import Rng, Tensor, backend
from tinydiff.models import GAN, GANConfig
from tinydiff.models.digit_nets import DigitDecoder, DigitEncoder
from tinydiff.models.gan import frozen, softplus
from tinydiff.optim import Adam
from tinydiff.train import Training, TrainSettings

SMALL = GANConfig(size=8, latent=3, width=8, gamma=2.0, sigma=0.5)


def images(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 8, 8, 1))


def to_depth(x):
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, H // 2, W // 2, 4 * C)


def to_space(x):
    B, H, W, C = x.shape
    return x.reshape(B, H, W, 2, 2, C // 4).transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, C // 4)


def expected_encoder(x, weights):
    h = to_depth(x)
    for i, stride in enumerate((1, 2, 2)):
        h = reference.silu(reference.conv(h, part(weights, f"convs.{i}"), stride=stride))
    return reference.linear(h.reshape(len(h), -1), part(weights, "out"))


def expected_decoder(z, weights, size, width):
    def norm(h, name):
        return reference.silu(reference.group_norm(h, part(weights, name), 8))

    h = norm(reference.linear(z, part(weights, "first")).reshape(len(z), size // 4, size // 4, 2 * width), "norm1")
    h = norm(to_space(reference.conv(h, part(weights, "up"))), "norm2")
    h = norm(reference.conv(h, part(weights, "smooth")), "norm3")
    return np.tanh(to_space(reference.conv(h, part(weights, "out"))))


@pytest.mark.parametrize("size", [4, 12, 16])
def test_the_networks(size, device):
    x, z = np.random.default_rng(1).uniform(-1, 1, (2, size, size, 1)), np.random.default_rng(2).normal(size=(2, 3))
    encoder, decoder = randomised(DigitEncoder(size, 5, 8, Rng(0))), randomised(DigitDecoder(size, 3, 8, Rng(0)))
    drawn = decoder(Tensor(backend.to_device(z)))
    assert_close(encoder(Tensor(backend.to_device(x))), expected_encoder(x, encoder.state_dict()), rtol=1e-11)
    assert_close(drawn, expected_decoder(z, decoder.state_dict(), size, 8), rtol=1e-11)


def test_softplus():
    x = np.array([-1000, -30.0, -1, 0, 2, 30, 1000])
    expected = [0, *(np.log1p(np.exp(v)) for v in x[1:-1]), 1000]
    assert_close(softplus(Tensor(x)), np.array(expected), rtol=1e-12)


def losses(model, x, rng):
    """L_D and L_G of the deck's game, from what the two networks say."""
    drawn = model.generator(Tensor(rng.at(0).normal((len(x), 3), x.dtype))).data
    moved = x + 0.5 * rng.at(1).normal_like(x)
    real, near, fake = (model.discriminator(Tensor(a)).numpy() for a in (x, moved, drawn))
    slope = (near - real) / 0.5
    of_d = np.mean(np.log1p(np.exp(-real))) + np.mean(np.log1p(np.exp(fake))) + 2.0 / 2 * np.mean(slope**2)
    return of_d, np.mean(np.log1p(np.exp(-fake)))


def test_the_loss_is_the_sum_of_both(device):
    model, x = randomised(GAN(SMALL, Rng(0))), backend.to_device(images(5))
    with backend.use_device(backend.device()):
        loss = model.loss(x, Rng(7))
    if backend.device() == "cpu":
        assert np.isclose(loss.item(), sum(losses(model, x, Rng(7))), rtol=1e-10)
    assert np.isfinite(loss.item())


def test_each_network_minimises_its_own_loss():
    """Differences of L_D along the discriminator's weights, and of L_G along the generator's, are the gradient's."""
    model, x = randomised(GAN(SMALL, Rng(0))), images(5)
    model.loss(x, Rng(7)).backward()
    for network, which in ((model.discriminator, 0), (model.generator, 1)):
        parameters = network.parameters().values()
        directions = [np.random.default_rng(i).normal(size=p.shape) for i, p in enumerate(parameters)]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
        values = []
        for step in (1e-5, -2e-5):
            for p, d in zip(parameters, directions, strict=True):
                p[...] = p.data + step * d
            values.append(losses(model, x, Rng(7))[which])
        for p, d in zip(parameters, directions, strict=True):
            p[...] = p.data + 1e-5 * d
        assert np.isclose(slope, (values[0] - values[1]) / 2e-5, rtol=1e-5)


def test_frozen_leaves_parameters_as_they_were():
    """Also one that was not trained before."""
    model = DigitEncoder(8, 1, 8, Rng(0))
    fixed, *others = model.parameters().values()
    fixed.requires_grad = False
    x = Tensor(images(1).astype(np.float32), requires_grad=True)
    with pytest.raises(KeyError), frozen(model):
        y = model(x).sum()
        raise KeyError
    y.backward()
    assert x.grad is not None and all(p.grad is None for p in others)
    assert not fixed.requires_grad and all(p.requires_grad for p in others)


def test_slope_is_estimated_without_bias():
    """For a discriminator that is linear, E ((D(x + σu) - D(x)) / σ)² = |∇D|² exactly."""
    model = GAN(GANConfig(size=4, latent=3, width=8, gamma=2.0, sigma=0.3), Rng(0))
    w = np.random.default_rng(3).normal(size=16)
    model.discriminator = lambda x: x.reshape(len(x), -1) @ Tensor(w[:, None])
    model.discriminator.parameters = dict
    x = np.zeros((20_000, 4, 4, 1))
    without = GAN(GANConfig(size=4, latent=3, width=8, gamma=0.0), Rng(0))
    without.discriminator, without.generator = model.discriminator, model.generator
    term = model.loss(x, Rng(1)).item() - without.loss(x, Rng(1)).item()
    assert np.isclose(term, w @ w, rtol=5 * (2 / 20_000) ** 0.5)


def test_playing_moves_the_drawings_to_the_data():
    """Data of two grey images, dark and bright: the generator learns to draw both and little else."""
    model = GAN(GANConfig(size=4, latent=2, width=8, gamma=1.0), Rng(0))
    adam = Adam(model.parameters(), betas=(0.5, 0.9))
    for step in range(300):
        tone = Rng(1).at(step).integers(0, 2, (64, 1, 1, 1)) * 1.2 - 0.6
        model.loss(np.broadcast_to(tone, (64, 4, 4, 1)).astype(np.float32), Rng(2).at(step)).backward()
        adam.step(2e-3)
    tones = model.sample(500, Rng(3)).mean(axis=(1, 2, 3))
    assert np.mean(np.abs(np.abs(tones) - 0.6) < 0.25) > 0.6
    assert 0.1 < np.mean(tones > 0) < 0.9


def test_samples_and_checkpoints(tmp_path, device):
    model = GAN(SMALL, Rng(0))
    training = Training(model, TrainSettings(2), tmp_path / "checkpoint.npz", {})
    training.save()
    loaded = GAN.load(tmp_path)
    drawn = model.sample(3, Rng(1))
    assert loaded.config == SMALL and drawn.shape == (3, 8, 8, 1) and drawn.dtype == np.float32
    assert_close(loaded.sample(3, Rng(1)), backend.to_numpy(drawn), rtol=1e-6)


@pytest.mark.parametrize("fields", [{"latent": 0}, {"gamma": -1.0}, {"sigma": 0.0}])
def test_a_gan_that_cannot_be(fields):
    with pytest.raises(ValueError, match="a GAN needs latent >= 1"):
        GANConfig(**fields)


@pytest.mark.parametrize("size", [0, 6, 30])
def test_images_that_cannot_be_halved_twice(size):
    with pytest.raises(ValueError, match=f"a multiple of 4, got {size}"):
        GAN(GANConfig(size), Rng(0))


def test_no_images():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GAN(SMALL, Rng(0)).sample(0, Rng(0))
