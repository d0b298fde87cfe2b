"""DALL-E 2's decoder (E33): how it is told an image embedding, and what it must do without in training."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.models.common import Stub, different, stirred, texts
from tinydiff import Rng, backend
from tinydiff.diffusion import Sampling, last
from tinydiff.models import Condition, Decoder, DecoderConfig
from tinydiff.nn import UNetConfig
from tinydiff.train import Training, TrainSettings, train

UNET = UNetConfig(
    channels=2, base=8, multipliers=(1,), blocks=1, attention=(0,), heads=2, groups=4, context=6, vector=5, patch=2
)
CONFIG = DecoderConfig(UNET, size=(4, 4), T=50, tokens=3)


def made(config=CONFIG):
    return stirred(Decoder(config, Rng(0)))


def told(n, seed=0):
    """n texts, and n unit vectors."""
    z_i = Rng(seed + 1).normal((n, 5))
    return dataclasses.replace(texts(n, seed), vector=z_i / (z_i**2).sum(axis=1, keepdims=True) ** 0.5)


def test_where_the_embedding_enters(device):
    """√d z_i beside the time, and after the text as tokens of context, which are never padding."""
    model, what = made(), told(2)
    model.unet = Stub()
    model(Rng(3).normal((2, 4, 4, 2)), np.array([3, 30]), what)
    [(_, t, context, mask, extra, vector)] = model.unet.asked
    states, there, z_i = (backend.to_numpy(a) for a in (what.states, what.mask, what.vector))
    weight, bias = (backend.to_numpy(p.data) for p in (model.image_tokens.weight, model.image_tokens.bias))
    tokens = (5**0.5 * z_i @ weight + bias).reshape(2, 3, 6)
    np.testing.assert_array_equal(t, [3, 30])
    assert_close(vector, 5**0.5 * z_i, rtol=1e-6)
    assert_close(context, np.concatenate([states, tokens], axis=1), rtol=1e-5)
    np.testing.assert_array_equal(mask, np.concatenate([there, np.ones((2, 3), bool)], axis=1))
    assert extra is None


def test_both_ways_count():
    model, x, t = made(), Rng(4).normal((2, 4, 4, 2)), np.array([3, 30])
    for part in (model.unet.vector, model.image_tokens):
        kept = part.weight.data.copy()
        part.weight[...] = kept * 0
        assert (
            different(model(x, t, told(2)), model(x, t, dataclasses.replace(told(2), vector=told(2, 7).vector))) > 0
        ).all()
        part.weight[...] = kept
    assert (
        different(model(x, t, told(2)), model(x, t, dataclasses.replace(texts(2, 7), vector=told(2).vector))) > 0
    ).all()


def test_layers_for_the_text_read_the_caption_alone():
    model, what = made(dataclasses.replace(CONFIG, text_layers=1)), told(2)
    model.unet = Stub()
    model(Rng(3).normal((2, 4, 4, 2)), np.array([3, 30]), what)
    context = model.unet.asked[0][2]
    assert_close(context[:, :3], model.read(what).numpy(), rtol=1e-6)
    assert np.abs(context[:, :3] - what.states).max() > 0.1


def test_no_embedding_is_an_embedding_of_zero():
    model, x, t = made(), Rng(4).normal((2, 4, 4, 2)), np.array([3, 30])
    none, zero = texts(2), dataclasses.replace(texts(2), vector=np.zeros((2, 5), np.float32))
    assert not different(model(x, t, none), model(x, t, zero)).any()


def test_guidance_away_from_no_embedding_takes_one_pass():
    model, x, what = made(), Rng(4).normal((2, 4, 4, 2)), told(2)
    zero = dataclasses.replace(texts(2, 7), vector=np.zeros((2, 5), np.float32))
    none, zero = (model.denoiser(what, 2.0, negative)(x, 20).x0 for negative in (texts(2, 7), zero))
    np.testing.assert_array_equal(none, zero)
    model.unet = Stub()
    model.denoiser(what, 2.0, texts(2, 7))(x, 20)
    [(_, _, _, _, _, vector)] = model.unet.asked
    assert_close(vector, np.concatenate([5**0.5 * what.vector, np.zeros((2, 5), np.float32)]), rtol=1e-6)


def test_without_a_mask_all_tokens_are_there():
    model, x, t = made(), Rng(4).normal((2, 4, 4, 2)), np.array([3, 30])
    what = told(2)
    every, none = (dataclasses.replace(what, mask=mask) for mask in (np.ones((2, 3), bool), None))
    assert different(model(x, t, every), model(x, t, none)).max() < 1e-5


def test_what_is_dropped_in_training(device):
    """Half of the captions, a tenth of the embeddings, as the paper says, each on its own; 0 for an embedding."""
    n = 600
    assert (CONFIG.text_drop, CONFIG.image_drop) == (0.5, 0.1)
    what, empty = told(n), texts(1, 9)
    drawn = Decoder(CONFIG, Rng(0)).draw(Rng(1).normal((n, 4, 4, 2)), Rng(2), what, empty)
    states, _, vector = (backend.to_numpy(a) for a in drawn[3:6])
    no_text = (states == backend.to_numpy(empty.states)).all(axis=(1, 2))
    no_image = (vector == 0).all(axis=1)
    for found, share in ((no_text, 0.5), (no_image, 0.1), (no_text & no_image, 0.05)):
        assert abs(found.mean() - share) < 4 * (share * (1 - share) / n) ** 0.5
    np.testing.assert_array_equal(states[~no_text], backend.to_numpy(what.states)[~no_text])
    np.testing.assert_array_equal(vector[~no_image], backend.to_numpy(what.vector)[~no_image])


def test_on_a_device(device):
    model, what = made(), told(2)
    x_0 = last(model.sample(what, Rng(0), Sampling(steps=4), guidance=2.0, negative=texts(1)))
    assert backend.device_of(x_0) == backend.device() and np.abs(backend.to_numpy(x_0)).max() <= 1 + 1e-5
    loss = model.loss(Rng(2).normal((2, 4, 4, 2)), Rng(1), what, texts(1))
    loss.backward()
    assert np.isfinite(loss.item()) and np.abs(backend.to_numpy(model.image_tokens.weight.grad)).max() > 0


def test_it_learns_what_an_embedding_says(tmp_path):
    """Two embeddings, two images, one and the same text; saved, and loaded again."""
    model, what = Decoder(dataclasses.replace(CONFIG, T=20, image_drop=0.0), Rng(0)), told(2)
    x = np.stack([np.full((4, 4, 2), c, np.float32) for c in (-0.7, 0.7)])
    one_text = dataclasses.replace(texts(1).repeated(16), vector=np.concatenate([what.vector] * 8))

    def loss_at(step, rng, share):
        condition = Condition(*(None if a is None else share.of(a) for a in one_text.arrays))
        return model.loss(share.of(np.concatenate([x] * 8)), rng, condition, texts(1, 5))

    training = Training(model, TrainSettings(60, 2e-2, warmup=5, ema_decay=0.8), tmp_path / "checkpoint.npz", {})
    train(training, loss_at, Rng(1), batch_size=16, resume_with="")
    loaded = Decoder.load(tmp_path)
    assert loaded.config == model.config
    drawn = last(
        loaded.sample(Condition(*(None if a is None else a[:2] for a in one_text.arrays)), Rng(2), Sampling(steps=10))
    )
    means = drawn.mean(axis=(1, 2, 3))
    assert means[0] < -0.5 and means[1] > 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet": dataclasses.replace(UNET, context=None)}, "context, .* and a vector, .* got None and 5"),
        ({"unet": dataclasses.replace(UNET, vector=None)}, "context, .* and a vector, .* got 6 and None"),
        ({"image_drop": -0.1}, r"dropped image embeddings must be in \[0, 1\], got -0.1"),
        ({"text_drop": 2}, r"dropped texts must be in \[0, 1\], got 2"),
        ({"tokens": 0}, "becomes 1 token of context or more, got 0"),
    ],
)
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_bad_calls_are_refused():
    model, x = made(), np.zeros((2, 4, 4, 2), np.float32)
    with pytest.raises(ValueError, match="a decoder is told a text, if only the empty one"):
        model(x, np.array([1, 2]), Condition(vector=told(2).vector))
    with pytest.raises(ValueError, match="learns from image embeddings, but was told none"):
        model.draw(x, Rng(0), texts(2), texts(1))
    with pytest.raises(ValueError, match=r"image embeddings \(2, 5\), got \(1, 5\)"):
        model(x, np.array([1, 2]), dataclasses.replace(texts(2), vector=told(1).vector))
