"""PixelInpainting: it starts as its base model, sees what it should, and gives known pixels back."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend, checkpoint
from tinydiff.data.masks import random_masks
from tinydiff.diffusion import Sampling
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig, PixelInpainting
from tinydiff.models.pixel_inpainting import shown
from tinydiff.nn import Module, UNetConfig
from tinydiff.train import Training, TrainSettings, train

UNET = UNetConfig(base=8, multipliers=(1, 2), blocks=1, attention=(), groups=4)
PLAIN = PixelDiffusionConfig(UNET, size=(4, 8), T=50, target="v")
CONFIGS = {
    "plain": PLAIN,
    "patches": dataclasses.replace(PLAIN, unet=dataclasses.replace(UNET, patch=2, channels=3), size=(4, 8)),
    "labels": dataclasses.replace(PLAIN, unet=dataclasses.replace(UNET, classes=3), class_names=("a", "b", "c")),
    "waves": dataclasses.replace(PLAIN, unet=dataclasses.replace(UNET, patch=2, fourier=(3, 4))),
    "variance": dataclasses.replace(PLAIN, learned_variance=True),
}
MASK = np.arange(32).reshape(4, 8) % 3 == 0


def base(config):
    """A model with no weights left at the zeros that many start from."""
    model = PixelDiffusion(config, Rng(0))
    for i, p in enumerate(model.parameters().values()):
        p[...] = p.data + 0.1 * Rng(1).at(i).normal(p.shape)
    return model


def inpainting(config=PLAIN):
    return PixelInpainting.started_from(base(config))


class Stub(Module):
    """Stands for the U-Net: outputs 0 and remembers what it was shown."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, label=None, rng=None, extra=None):
        self.asked.append((x.numpy(), backend.to_numpy(t), label, extra.numpy()))
        return Tensor(x.data * 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_starts_as_its_base_model(name, device):
    """The same output whatever is shown, up to rounding; and another once its new weights have moved."""
    before = base(CONFIGS[name])
    model, C = PixelInpainting.started_from(before), CONFIGS[name].unet.channels
    x_t, extra = Rng(2).normal((3, 4, 8, C)), Rng(3).normal((3, 4, 8, C + 1))
    xp, t = backend.array_module(x_t), np.array([1, 20, 50])
    seen = xp.concatenate([x_t, extra], axis=-1)
    assert_close(model(seen, t), backend.to_numpy(before(x_t, t).data), rtol=1e-5, atol=1e-5)
    weight = model.unet.conv_in.weight
    weight[...] = weight.data + 0.1
    assert np.abs(model(seen, t).numpy() - before(x_t, t).numpy()).max() > 1e-3


def test_what_the_network_sees_in_training():
    """x_t is the base model's; beside it the image where it is known, zero elsewhere, and the mask."""
    model, x_0 = inpainting(), Rng(1).uniform((6, 4, 8, 1)) * 2 - 1
    x_t, *others = base(PLAIN).draw(x_0, Rng(5))
    model.unet = Stub()
    seen, *same = model.draw(x_0, Rng(5))
    model.loss_of(seen, *same)
    [(x, t, _, extra)] = model.unet.asked
    mask = random_masks(Rng(5).at(4), 6, (4, 8))
    np.testing.assert_array_equal(x, x_t)
    np.testing.assert_array_equal(t, others[0])
    np.testing.assert_array_equal(extra, np.concatenate([x_0 * mask, mask], axis=-1))
    for a, b in zip(same, others, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_the_network_sees_in_sampling():
    """What is not known is hidden from it, and stays so at every step."""
    model = inpainting()
    model.unet = Stub()
    known = np.where(MASK[..., None], Rng(1).normal((2, 4, 8, 1)).clip(-1, 1), np.nan)
    list(model.inpaint(known, MASK, Rng(0), Sampling(steps=4)))
    assert len(model.unet.asked) == 4
    for _, _, _, extra in model.unet.asked:
        np.testing.assert_array_equal(extra[..., 0], np.where(MASK, known[..., 0], 0))
        np.testing.assert_array_equal(extra[..., 1], np.broadcast_to(MASK, (2, 4, 8)))
    model.unet.asked.clear()
    list(model.sample(3, Rng(0), Sampling(steps=2)))
    assert all(not extra.any() and extra.shape == (3, 4, 8, 2) for *_, extra in model.unet.asked)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_known_pixels_come_back_exactly(name, sampler):
    config = CONFIGS[name]
    model = inpainting(config)
    known = np.tanh(np.random.default_rng(0).normal(size=(2, 4, 8, config.unet.channels))).astype(np.float32)
    x_T, *_, x_0 = model.inpaint(known, MASK, Rng(0), Sampling(sampler, 5))
    assert x_0.dtype == np.float32 and x_T.shape == x_0.shape == known.shape and np.abs(x_0).max() <= 1 + 1e-5
    np.testing.assert_array_equal(x_0[:, MASK], known[:, MASK])
    assert np.abs(x_0[:, ~MASK] - known[:, ~MASK]).max() > 0.1


def test_on_a_device(device):
    model = inpainting(CONFIGS["labels"])
    known = np.tanh(np.random.default_rng(0).normal(size=(2, 4, 8, 1))).astype(np.float32)
    *_, x_0 = model.inpaint(known, MASK, Rng(0), Sampling(steps=3), label=2, guidance=2.0)
    assert backend.device_of(x_0) == backend.device()
    np.testing.assert_array_equal(backend.to_numpy(x_0)[:, MASK], known[:, MASK])
    loss = model.loss(backend.to_device(known), Rng(1), np.array([0, 2]))
    loss.backward()
    assert np.isfinite(loss.item()) and np.abs(backend.to_numpy(model.unet.conv_in.weight.grad)).max() > 0


def test_learns_to_use_what_it_is_shown(tmp_path):
    """Two images, alike but for their brightness: shown a part, it paints the rest of the right one."""
    unet = UNetConfig(base=8, multipliers=(1,), blocks=1, attention=(), groups=2)
    config = dataclasses.replace(PLAIN, unet=unet, target="x0", size=(4, 4), T=20)
    model = PixelInpainting.started_from(PixelDiffusion(config, Rng(0)))
    x_0 = np.repeat(np.float32([-0.7, 0.7] * 8), 16).reshape(16, 4, 4, 1)
    training = Training(model, TrainSettings(80, lr=1e-2, warmup=1, ema_decay=0.5), tmp_path / checkpoint.NAME, {})
    train(training, lambda step, rng, share: model.loss(share.of(x_0), rng), Rng(7), batch_size=16, resume_with="")
    loaded = PixelInpainting.load(tmp_path)
    assert loaded.config == model.config and loaded.config.unet.extra == 2
    mask = np.arange(4) < np.full((4, 1), 2)
    *_, painted = loaded.inpaint(x_0, mask, Rng(1), Sampling(steps=10))
    assert np.abs(painted - x_0).mean() < 0.2


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_other_extra_channels(extra):
    config = dataclasses.replace(PLAIN, unet=dataclasses.replace(UNET, extra=extra))
    with pytest.raises(ValueError, match=rf"unet.extra = 2, .* got {extra}"):
        PixelInpainting(config, Rng(0))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"known": np.zeros((2, 4, 7, 1), np.float32)}, r"images of \(4, 8, 1\), got \(2, 4, 7, 1\)"),
        ({"known": np.zeros((4, 8), np.float32)}, r"images of \(4, 8, 1\), got \(4, 8\)"),
        ({"mask": np.ones((8, 4))}, r"take a mask \(4, 8\)"),
        ({"how": Sampling(steps=51)}, r"1\.\.50"),
        ({"label": 1}, "without classes"),
        ({"guidance": 2.0}, "without labels"),
    ],
)
def test_bad_requests(wrong, words):
    with pytest.raises(ValueError, match=words):
        inpainting().inpaint(**{"known": np.zeros((2, 4, 8, 1), np.float32), "mask": MASK, "rng": Rng(0)} | wrong)


def test_guidance_needs_a_label():
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a label to move towards"):
        inpainting(CONFIGS["labels"]).inpaint(np.zeros((2, 4, 8, 1), np.float32), MASK, Rng(0), guidance=2.0)


def test_shown():
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    mask = np.array([[1, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(shown(x, mask)[0, ..., 0], [[0, 0, 2], [0, 0, 5]])
    np.testing.assert_array_equal(shown(x, mask)[0, ..., 1], mask)


def test_load_refuses_other_kinds(tmp_path):
    checkpoint.save(tmp_path / checkpoint.NAME, {}, {"kind": "pixel-diffusion"})
    with pytest.raises(checkpoint.CheckpointError, match="'pixel-inpainting', got 'pixel-diffusion'"):
        PixelInpainting.load(tmp_path)
    assert checkpoint.kind_of(tmp_path) == "pixel-diffusion"
