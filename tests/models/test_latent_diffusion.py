"""LatentDiffusion (E24, E27, E35): its loss against the formula, what it is told, and how it is guided."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend, no_grad
from tinydiff.diffusion import Sampling, last
from tinydiff.models import LatentDiffusion, LatentDiffusionConfig, Text
from tinydiff.models.latent_diffusion import STABLE_DIFFUSION_1
from tinydiff.nn import Downsample, Module, UNetConfig, Upsample
from tinydiff.nn.unet import Stage
from tinydiff.rng import Blank
from tinydiff.train import Training, TrainSettings, train

UNET = UNetConfig(channels=2, base=8, multipliers=(1, 2), blocks=1, attention=(0,), heads=2, groups=4, context=6)
CONFIG = LatentDiffusionConfig(UNET, size=(4, 4), T=50)


def made(config=CONFIG):
    """A model with no weights left at the zeros that many start from."""
    model = LatentDiffusion(config, Rng(0))
    for i, p in enumerate(model.parameters().values()):
        p[...] = p.data + 0.1 * Rng(1).at(i).normal(p.shape)
    return model


def texts(n, seed=0):
    """n texts of three tokens, of which the last is there in every second."""
    mask = np.ones((n, 3), bool)
    mask[1::2, 2] = False
    return Text(Rng(seed).normal((n, 3, 6)), backend.to_device(mask))


class Stub(Module):
    """Stands for the U-Net: outputs 0 and remembers what it was told."""

    def __call__(self, z, t, context, mask):
        self.told = [backend.to_numpy(a) for a in (z.data, t, context.data, mask)]
        return Tensor(z.data * 0)


def test_the_loss_is_the_formula(device):
    """‖v‖² for a network that says 0: v = √ᾱ ε − √(1−ᾱ) z_0 at the t and with the ε that the stream gives."""
    model, z_0 = made(dataclasses.replace(CONFIG, text_drop=0.0)), Rng(3).normal((6, 4, 4, 2))
    model.unet, text = Stub(), texts(6)
    loss = model.loss(z_0, Rng(5), text, texts(1, seed=9)).item()
    z_t, t, states, mask = model.unet.told
    z, a = backend.to_numpy(z_0).astype(np.float64), model.schedule.alpha_bar[t][:, None, None, None]
    eps = backend.to_numpy(Rng(5).at(1).normal((6, 4, 4, 2)))
    assert_close(z_t, (a**0.5 * z + (1 - a) ** 0.5 * eps).astype(np.float32), rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(np.mean((a**0.5 * eps - (1 - a) ** 0.5 * z) ** 2), rel=1e-5)
    assert ((1 <= t) & (t <= 50)).all() and len(set(t)) > 3
    np.testing.assert_array_equal(states, backend.to_numpy(text.states))
    np.testing.assert_array_equal(mask, backend.to_numpy(text.mask))


def test_layers_for_the_text_let_each_token_see_all(device):
    """What comes to the U-Net of the first token depends on the last one, unless that is padding."""
    model = made(dataclasses.replace(CONFIG, text_layers=1))
    model.unet, text, z_t, t = Stub(), texts(2), Rng(4).normal((2, 4, 4, 2)), np.array([7, 9])
    model(z_t, t, text)
    before = model.unet.told[2]
    states = backend.to_numpy(text.states).copy()
    states[:, 2, 0] += 1  # of all channels alike, LayerNorm would not notice
    model(z_t, t, Text(backend.to_device(states), text.mask))
    after = model.unet.told[2]
    assert (after[0, :2] != before[0, :2]).any(axis=-1).all()
    np.testing.assert_array_equal(after[1, :2], before[1, :2])


def test_layers_for_the_text_are_trained():
    model = made(dataclasses.replace(CONFIG, text_layers=2))
    model.loss(Rng(3).normal((2, 4, 4, 2)), Rng(5), texts(2), texts(1, 9)).backward()
    assert all(np.abs(p.grad).max() > 0 for p in model.reader.parameters().values())
    assert LatentDiffusion(CONFIG, Rng(0)).reader is None


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_texts_are_replaced_by_the_empty_one(share, device):
    n = 400
    model, text, empty = LatentDiffusion(dataclasses.replace(CONFIG, text_drop=share), Rng(0)), texts(n), texts(1, 9)
    *_, states, mask = (backend.to_numpy(a) for a in model.draw(Rng(1).normal((n, 4, 4, 2)), Rng(2), text, empty))
    dropped = (states == backend.to_numpy(empty.states)).all(axis=(1, 2))
    assert abs(dropped.mean() - share) < 4 * (share * (1 - share) / n) ** 0.5 + 1e-9
    np.testing.assert_array_equal(states[~dropped], backend.to_numpy(text.states)[~dropped])
    expected = np.where(dropped[:, None], backend.to_numpy(empty.mask), backend.to_numpy(text.mask))
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("s", [0.0, 1.0, 3.0])
def test_guidance_is_the_formula(s, device):
    """E35, for v as for ε: the outputs' difference is exaggerated; s = 1 is the text's own, s = 0 the other's."""
    model, z, t = made(), Rng(4).normal((3, 4, 4, 2)), 20
    text, negative = texts(3), texts(3, seed=7)
    each = np.full(3, t)
    v, u = (backend.to_numpy(model(z, each, told).data).astype(np.float64) for told in (text, negative))
    assert np.abs(v - u).max() > 1e-3
    guided, a = u + s * (v - u), model.schedule.alpha_bar[t].item()
    got = model.denoiser(text, s, negative)(z, t)
    z = backend.to_numpy(z)
    assert_close(got.x0, (a**0.5 * z - (1 - a) ** 0.5 * guided).astype(np.float32), rtol=1e-4, atol=1e-5)
    assert_close(got.eps, ((1 - a) ** 0.5 * z + a**0.5 * guided).astype(np.float32), rtol=1e-4, atol=1e-5)


def test_padding_has_no_influence():
    model, z, text = made(), Rng(4).normal((2, 4, 4, 2)), texts(2)
    other = Text(np.where(text.mask[..., None], text.states, 1e3).astype(np.float32), text.mask)
    t = np.array([3, 30])
    np.testing.assert_array_equal(model(z, t, text).data, model(z, t, other).data)
    seen = Text(text.states, np.ones_like(text.mask))
    assert np.abs(model(z, t, text).data - model(z, t, seen).data)[1].max() > 1e-4


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpm"])
def test_sampling(sampler, device):
    """Every sampler, from the same noise for every text, and unclipped: latents have no bounds."""
    model, how = made(), Sampling(sampler, 5)
    one, other = (list(model.sample(texts(2, seed), Rng(3), how, negative=texts(1, 5))) for seed in (0, 1))
    assert all(z.shape == (2, 4, 4, 2) for z in one) and len(one) == 6
    assert_close(one[0], backend.to_numpy(other[0]), atol=0)
    assert np.abs(backend.to_numpy(one[-1]) - backend.to_numpy(other[-1])).max() > 1e-3
    big = Text(texts(2).states * 100, texts(2).mask)
    model.unet.conv_out.weight[...] = model.unet.conv_out.weight.data * 100
    assert np.abs(backend.to_numpy(last(model.sample(big, Rng(3), how, negative=texts(1, 5))))).max() > 1.5


def test_it_learns_what_a_text_says(tmp_path):
    """Two texts, two latents: after training, each text draws its own; saved, and loaded again."""
    unet = dataclasses.replace(UNET, multipliers=(1,))
    model = LatentDiffusion(LatentDiffusionConfig(unet, (2, 2), T=20), Rng(0))
    text, z = texts(2), np.stack([np.full((2, 2, 2), c, np.float32) for c in (-1, 1)])

    def loss_at(step, rng, share):
        states, mask = (share.of(np.concatenate([a] * 8)) for a in (text.states, text.mask))
        return model.loss(share.of(np.concatenate([z] * 8)), rng, Text(states, mask), texts(1, 5))

    training = Training(model, TrainSettings(100, 1e-2, warmup=5, ema_decay=0.9), tmp_path / "checkpoint.npz", {})
    train(training, loss_at, Rng(1), batch_size=16, resume_with="")
    loaded = LatentDiffusion.load(tmp_path)
    assert loaded.config == model.config
    drawn = last(loaded.sample(text, Rng(2), Sampling(steps=10), guidance=1.5, negative=texts(1, 5)))
    means = drawn.mean(axis=(1, 2, 3))
    assert means[0] < -0.8 and means[1] > 0.8


def test_the_published_size(monkeypatch):
    """Stable Diffusion 1.x: its number of parameters, and what each level gives, here for latents of 8 x 8.

    The weights are zeros, which take no memory.
    """
    model, seen = LatentDiffusion(STABLE_DIFFUSION_1, Blank()), []
    assert model.count_parameters() == 859_520_964
    for kind in (Stage, Downsample, Upsample):

        def call(layer, x, *others, plain=kind.__call__):
            y = plain(layer, x, *others)
            seen.append((y.shape[1], y.shape[3]))
            return y

        monkeypatch.setattr(kind, "__call__", call)
    text = Text(np.ones((1, 77, 768), np.float32), np.ones((1, 77), bool))
    with no_grad():
        out = model(np.ones((1, 8, 8, 4), np.float32), np.array([500]), text)
    assert out.shape == (1, 8, 8, 4) and STABLE_DIFFUSION_1.size == (64, 64)
    down = [(8, 320)] * 2 + [(4, 320)] + [(4, 640)] * 2 + [(2, 640)] + [(2, 1280)] * 2 + [(1, 1280)] * 3
    up = [(1, 1280)] * 3 + [(2, 1280)] * 4 + [(4, 1280)] + [(4, 640)] * 3 + [(8, 640)] + [(8, 320)] * 3
    assert seen == [*down, (1, 1280), (1, 1280), *up]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "quadratic"}, "schedule must be one of linear"),
        ({"target": "y"}, "target must be one of eps, x0, v, got 'y'"),
        ({"unet": dataclasses.replace(UNET, context=None)}, "needs a U-Net with a context"),
        ({"text_layers": -1}, "layers for the text must be at least 0, got -1"),
        ({"text_drop": 1.1}, r"dropped texts must be in \[0, 1\], got 1.1"),
    ],
)
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_bad_calls_are_refused():
    model = made()
    with pytest.raises(ValueError, match="guidance must be a finite number, got nan"):
        model.denoiser(texts(2), float("nan"), texts(2))
    with pytest.raises(ValueError, match="3 images take one text, or one each, got 2"):
        model.sample(texts(3), Rng(0), negative=texts(2))
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.50"):
        next(model.sample(texts(1), Rng(0), Sampling(steps=51), negative=texts(1)))
