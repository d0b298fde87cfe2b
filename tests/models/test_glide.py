"""GLIDE's inpainting (E36): it starts as its base model, sees what it should, and gives known pixels back."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.models.common import Stub, different, stirred, texts
from tinydiff import Rng, backend
from tinydiff.data.masks import random_masks
from tinydiff.diffusion import Sampling
from tinydiff.models import TextDiffusion, TextDiffusionConfig, TextInpainting
from tinydiff.nn import UNetConfig
from tinydiff.train import Training, TrainSettings

UNET = UNetConfig(channels=2, base=8, multipliers=(1,), blocks=1, attention=(0,), heads=2, groups=4, context=6, patch=2)
CONFIG = TextDiffusionConfig(UNET, size=(4, 8), T=50)
MASK = np.arange(32).reshape(4, 8) % 3 == 0


def base():
    return stirred(TextDiffusion(CONFIG, Rng(0)))


def inpainting():
    return TextInpainting.started_from(base())


def pictures(n=2):
    return np.tanh(np.random.default_rng(0).normal(size=(n, 4, 8, 2))).astype(np.float32)


def test_it_starts_as_its_base_model(device):
    """The same output whatever is shown, up to rounding; and another once its new weights have moved."""
    before = base()
    model, x_t, t = TextInpainting.started_from(before), Rng(2).normal((3, 4, 8, 2)), np.array([1, 20, 50])
    seeing = dataclasses.replace(texts(3), shown=Rng(3).normal((3, 4, 8, 3)))
    assert model.config.unet.extra == 3
    assert_close(model(x_t, t, seeing), backend.to_numpy(before(x_t, t, texts(3)).data), rtol=1e-5, atol=1e-5)
    weight = model.unet.conv_in.weight
    weight[...] = weight.data + 0.1
    assert (different(model(x_t, t, seeing), before(x_t, t, texts(3))) > 1e-3).all()


def test_what_the_network_sees_in_training():
    """x_t and the text are the base model's; beside them the image where it is known, zero elsewhere, and the mask."""
    model, x_0 = inpainting(), pictures(6)
    expected = base().draw(x_0, Rng(5), texts(6), texts(1, 9))
    drawn = model.draw(x_0, Rng(5), texts(6), texts(1, 9))
    for a, b in zip(drawn[:5], expected[:5], strict=True):
        np.testing.assert_array_equal(a, b)
    mask = random_masks(Rng(5).at(4), 6, (4, 8))
    np.testing.assert_array_equal(drawn[-1], np.concatenate([x_0 * mask, mask], axis=-1))
    assert np.isfinite(model.loss_of(*drawn).item())


def test_what_the_network_sees_in_sampling():
    """What is not known is hidden from it at every step; with guidance, from both outputs."""
    model = inpainting()
    model.unet = Stub()
    known = np.where(MASK[..., None], pictures(), np.nan)
    list(model.inpaint(known, MASK, texts(1), Rng(0), Sampling(steps=3), guidance=2.0, negative=texts(1, 5)))
    assert len(model.unet.asked) == 3
    for _, _, context, _, extra, _ in model.unet.asked:
        assert context.shape == (4, 3, 6)
        np.testing.assert_array_equal(extra[..., :2], np.concatenate([np.where(MASK[..., None], known, 0)] * 2))
        np.testing.assert_array_equal(extra[..., 2], np.broadcast_to(MASK, (4, 4, 8)))
    model.unet.asked.clear()
    list(model.sample(texts(2), Rng(0), Sampling(steps=2)))
    assert all(not asked[4].any() and asked[4].shape == (2, 4, 8, 3) for asked in model.unet.asked)


@pytest.mark.parametrize("how", [Sampling("ddim", 2), Sampling("ddpm", 2), Sampling("dpm", 3, clip=90.0)])
def test_known_pixels_come_back_exactly(how, device):
    """And the others are what the text says."""
    model, known = inpainting(), pictures()

    def painted(text):
        *_, x_0 = model.inpaint(known, MASK, text, Rng(0), how, guidance=4.0, negative=texts(1, 5))
        return backend.to_numpy(x_0)

    one, other = painted(texts(2)), painted(texts(1, 8))
    for x_0 in (one, other):
        assert x_0.dtype == np.float32 and np.abs(x_0).max() <= 1 + 1e-5
        np.testing.assert_array_equal(x_0[:, MASK], known[:, MASK])
    assert np.abs(one - other)[:, ~MASK].max() > 1e-3


def test_it_is_saved_and_loaded(tmp_path):
    model = inpainting()
    Training(model, TrainSettings(1), tmp_path / "checkpoint.npz", {}).save()
    loaded = TextInpainting.load(tmp_path)
    assert loaded.config == model.config and loaded.config.unet.extra == 3


@pytest.mark.parametrize("extra", [0, 2, 4])
def test_other_extra_channels(extra):
    config = dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, extra=extra))
    with pytest.raises(ValueError, match=rf"unet.extra = 3, .* got {extra}"):
        TextInpainting(config, Rng(0))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"known": np.zeros((2, 4, 7, 2), np.float32)}, r"images of \(4, 8, 2\), got \(2, 4, 7, 2\)"),
        ({"known": np.zeros((4, 8), np.float32)}, r"images of \(4, 8, 2\), got \(4, 8\)"),
        ({"mask": np.ones((8, 4))}, r"take a mask \(4, 8\)"),
        ({"how": Sampling(steps=51)}, r"1\.\.50"),
        ({"told": texts(3)}, "2 images are told one thing, or one each, got 3"),
        ({"guidance": 2.0}, "needs something to move away from"),
    ],
)
def test_bad_requests(wrong, words):
    with pytest.raises(ValueError, match=words):
        inpainting().inpaint(**{"known": pictures(), "mask": MASK, "told": texts(2), "rng": Rng(0)} | wrong)
