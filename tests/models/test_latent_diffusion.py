"""LatentDiffusion (E24, E27): diffusion told a text, on latents, which are not clipped, and its published size."""

import dataclasses

import numpy as np
import pytest

from tests.models.common import stirred, texts
from tinydiff import Rng, backend, no_grad
from tinydiff.diffusion import Sampling, last
from tinydiff.models import Condition, LatentDiffusion, LatentDiffusionConfig
from tinydiff.models.latent_diffusion import STABLE_DIFFUSION_1
from tinydiff.nn import Downsample, UNetConfig, Upsample
from tinydiff.nn.unet import Stage
from tinydiff.rng import Blank
from tinydiff.train import Training, TrainSettings

UNET = UNetConfig(channels=2, base=8, multipliers=(1, 2), blocks=1, attention=(0,), heads=2, groups=4, context=6)
CONFIG = LatentDiffusionConfig(UNET, size=(4, 4), T=50)


@pytest.mark.parametrize("clip", [True, 90.0])
def test_latents_are_not_clipped(clip, device):
    """They have no bounds, whatever the sampler is told."""
    model = stirred(LatentDiffusion(CONFIG, Rng(0)))
    model.unet.conv_out.weight[...] = model.unet.conv_out.weight.data * 100
    z_0 = last(model.sample(texts(2), Rng(3), Sampling(steps=5, clip=clip), negative=texts(1, 5)))
    assert np.abs(backend.to_numpy(z_0)).max() > 1.5


def test_it_is_saved_and_loaded(tmp_path):
    model = stirred(LatentDiffusion(CONFIG, Rng(0)))
    Training(model, TrainSettings(1), tmp_path / "checkpoint.npz", {}).save()
    loaded = LatentDiffusion.load(tmp_path)
    assert loaded.config == CONFIG
    for name, weights in loaded.state_dict().items():
        np.testing.assert_array_equal(weights, model.state_dict()[name])


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
    text = Condition(np.ones((1, 77, 768), np.float32), np.ones((1, 77), bool))
    with no_grad():
        out = model(np.ones((1, 8, 8, 4), np.float32), np.array([500]), text)
    assert out.shape == (1, 8, 8, 4) and STABLE_DIFFUSION_1.size == (64, 64)
    down = [(8, 320)] * 2 + [(4, 320)] + [(4, 640)] * 2 + [(2, 640)] + [(2, 1280)] * 2 + [(1, 1280)] * 3
    up = [(1, 1280)] * 3 + [(2, 1280)] * 4 + [(4, 1280)] + [(4, 640)] * 3 + [(8, 640)] + [(8, 320)] * 3
    assert seen == [*down, (1, 1280), (1, 1280), *up]


def test_a_u_net_without_a_context_is_refused():
    with pytest.raises(ValueError, match="needs a U-Net with a context"):
        dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, context=None))
    with pytest.raises(ValueError, match="schedule must be one of linear"):
        dataclasses.replace(CONFIG, schedule="quadratic")
