"""The upsampler of a cascade (E37): what it is shown, how noisy, and at which levels it learns."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tests.helpers import assert_close
from tests.models.common import Stub, stirred, texts
from tests.nn.reference import sinusoidal
from tinydiff import Rng, backend, image
from tinydiff.data import shapes
from tinydiff.diffusion import Sampling, last
from tinydiff.models import Upsampler, UpsamplerConfig
from tinydiff.models.cascade import larger, smaller
from tinydiff.nn import UNetConfig
from tinydiff.train import Training, TrainSettings, train

UNET = UNetConfig(channels=2, base=8, multipliers=(1,), blocks=1, attention=(), groups=4, patch=2, extra=2, vector=6)
CONFIG = UpsamplerConfig(UNET, size=(4, 8), T=50, S=20)


def made(config=CONFIG):
    return stirred(Upsampler(config, Rng(0)))


# ---------------------------------------------------------------------------------------------- sizes


@PROPERTY
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(2, 4), st.integers(0, 99)
)
def test_smaller_is_the_mean_of_what_becomes_one_pixel(B, h, w, C, f, seed):
    x = np.random.default_rng(seed).normal(size=(B, f * h, f * w, C))
    low = smaller(x, f)
    assert low.shape == (B, h, w, C)
    for i in range(h):
        for j in range(w):
            block = x[:, f * i : f * i + f, f * j : f * j + f]
            np.testing.assert_allclose(low[:, i, j], sum(block[:, u, v] for u in range(f) for v in range(f)) / f**2)
    again = larger(low, f)
    assert all((again[:, i, j] == low[:, i // f, j // f]).all() for i in range(f * h) for j in range(f * w))


def test_pictures_of_shapes_are_small_ones_of_large_ones():
    """What the upsampler is shown in training is what a model of small pictures learns to draw."""
    scenes = [shapes.random_scene(Rng(i)) for i in range(4)]
    small, large = (np.stack([image.to_signed(shapes.draw(scene, size)) for scene in scenes]) for size in (32, 64))
    assert np.abs(smaller(large, 2) - small).max() <= 1.01 / 127.5


# ----------------------------------------------------------------------------------------- what is shown


def test_the_small_images_are_noised_by_the_level(device):
    """E37: √ᾱ_s low + √(1−ᾱ_s) ε, each at its own level, and sines and cosines that tell it."""
    model, low, s = made(), Rng(1).normal((3, 2, 4, 2)), np.array([0, 7, 50])
    told = model.shown(low, backend.to_device(s), Rng(4))
    a = model.schedule.alpha_bar[s][:, None, None, None]
    eps = backend.to_numpy(Rng(4).normal((3, 2, 4, 2)))
    expected = a**0.5 * backend.to_numpy(low) + (1 - a) ** 0.5 * eps
    assert_close(told.shown, expected.repeat(2, axis=1).repeat(2, axis=2).astype(np.float32), rtol=1e-6)
    assert_close(told.vector, sinusoidal(s, 6).astype(np.float32), rtol=1e-6)
    np.testing.assert_array_equal(backend.to_numpy(told.shown)[0], backend.to_numpy(larger(low, 2))[0])
    one = model.shown(low, 7, Rng(4))
    np.testing.assert_array_equal(backend.to_numpy(one.vector), backend.to_numpy(told.vector)[[1, 1, 1]])


def test_what_the_network_sees_in_training(device):
    """The large images made smaller, at levels that are uniform in 0..S; the noise is not that of x_t."""
    n, model = 400, made()
    x_0 = backend.to_device(np.broadcast_to(np.float32([[[0.5, -0.5]]]), (n, 4, 8, 2)))
    x_t, t, wanted, *told = model.draw(x_0, Rng(5))
    model.unet = Stub()
    model.loss_of(x_t, t, wanted, *told)
    [(x, _, context, mask, shown, vector)] = model.unet.asked
    assert context is mask is None
    s = np.array([np.abs(sinusoidal(range(51), 6) - v).sum(axis=1).argmin() for v in vector])
    counts = np.bincount(s, minlength=21)
    assert len(counts) == 21 and counts.min() > 0 and abs(s.mean() - 10) < 1.3
    low = shown[:, ::2, ::2]
    np.testing.assert_array_equal(low.repeat(2, axis=1).repeat(2, axis=2), shown)
    a = model.schedule.alpha_bar[s][:, None, None, None]
    eps = backend.to_numpy(Rng(5).at(5).normal(low.shape))
    assert_close(low, (a**0.5 * np.float32([0.5, -0.5]) + (1 - a) ** 0.5 * eps).astype(np.float32), rtol=1e-5)
    assert np.abs(eps.ravel() - backend.to_numpy(Rng(5).at(1).normal(x.shape)).ravel()[: eps.size]).max() > 0.1


def test_what_the_network_sees_in_sampling():
    """One and the same noisy image, and its level, at every step."""
    model, low = made(), Rng(1).normal((2, 2, 4, 2)).clip(-1, 1)
    model.unet = Stub()
    x_T, *_, x_0 = model.upsample(low, Rng(0), Sampling(steps=4), level=7)
    assert x_T.shape == x_0.shape == (2, 4, 8, 2) and len(model.unet.asked) == 4
    first, *others = model.unet.asked
    for asked in others:
        np.testing.assert_array_equal(asked[4], first[4])
    np.testing.assert_allclose(first[5], sinusoidal([7, 7], 6), rtol=1e-6)
    assert np.abs(first[4] - larger(low, 2)).max() > 0.05
    model.unet.asked.clear()
    list(model.upsample(low, Rng(0), Sampling(steps=1), level=0))
    np.testing.assert_array_equal(model.unet.asked[0][4], larger(low, 2))


def test_on_a_device(device):
    model, low = made(), Rng(1).normal((2, 2, 4, 2)).clip(-1, 1)
    x_0 = last(model.upsample(backend.to_numpy(low), Rng(0), Sampling(steps=3)))
    assert backend.device_of(x_0) == backend.device() and np.abs(backend.to_numpy(x_0)).max() <= 1 + 1e-5
    loss = model.loss_of(*model.draw(Rng(2).normal((2, 4, 8, 2)), Rng(1)))
    loss.backward()
    assert np.isfinite(loss.item()) and np.abs(backend.to_numpy(model.unet.vector.weight.grad)).max() > 0


def test_it_may_be_told_a_text_too():
    """As Imagen's is."""
    unet = dataclasses.replace(UNET, attention=(0,), context=6, heads=2)
    model, low = made(dataclasses.replace(CONFIG, unet=unet)), Rng(1).normal((2, 2, 4, 2)).clip(-1, 1)
    one, other = (last(model.upsample(low, Rng(0), Sampling(steps=2), told=texts(1, seed))) for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-4


def test_it_learns_to_make_larger(tmp_path):
    """Two images, alike but for their brightness, each with a pattern that the small one does not show."""
    config = dataclasses.replace(CONFIG, target="x0", size=(4, 4), T=20, S=5)
    model, pattern = Upsampler(config, Rng(0)), np.indices((4, 4)).sum(axis=0) % 2 * 0.6 - 0.3
    x_0 = np.float32([-0.6, 0.6] * 8)[:, None, None, None] + np.float32(pattern)[..., None].repeat(2, axis=2)
    training = Training(model, TrainSettings(80, lr=1e-2, warmup=1, ema_decay=0.5), tmp_path / "checkpoint.npz", {})
    train(
        training,
        lambda _, rng, share: model.loss_of(*model.draw(share.of(x_0), rng)),
        Rng(7),
        batch_size=16,
        resume_with="",
    )
    loaded = Upsampler.load(tmp_path)
    assert loaded.config == config
    drawn = last(loaded.upsample(smaller(x_0[:2], 2), Rng(1), Sampling(steps=10), level=1))
    assert np.abs(drawn - x_0[:2]).mean() < 0.1


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet": dataclasses.replace(UNET, extra=3)}, r"unet.extra = 2, .* got 3 and 6"),
        ({"unet": dataclasses.replace(UNET, vector=None)}, r"an even unet.vector, .* got 2 and None"),
        ({"unet": dataclasses.replace(UNET, vector=5)}, r"an even unet.vector, .* got 2 and 5"),
        ({"factor": 1}, r"at least 2 and divide the size \(4, 8\), got 1"),
        ({"factor": 3}, r"at least 2 and divide the size \(4, 8\), got 3"),
        ({"S": 51}, r"must be in 0..T = 0..50, got 51"),
        ({"S": -1}, r"must be in 0..T = 0..50, got -1"),
        ({"target": "y"}, "target must be one of"),
    ],
)
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": np.zeros((2, 4, 8, 2), np.float32)}, r"images \(n, 2, 4, 2\), got \(2, 4, 8, 2\)"),
        ({"low": np.zeros((2, 4), np.float32)}, r"images \(n, 2, 4, 2\), got \(2, 4\)"),
        ({"level": 21}, r"noise must be in 0..20, got 21"),
        ({"level": -1}, r"noise must be in 0..20, got -1"),
        ({"told": texts(3)}, "2 images are told one thing, or one each, got 3"),
        ({"how": Sampling(steps=51)}, r"1\.\.50"),
    ],
)
def test_bad_requests_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        made().upsample(**{"low": np.zeros((2, 2, 4, 2), np.float32), "rng": Rng(0)} | wrong)
