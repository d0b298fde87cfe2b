"""Imagen (E37): its parts put together, small and untrained, which the way through them does not mind."""

import dataclasses
import warnings

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.models.common import Stub, stirred
from tinydiff import Rng, backend, checkpoint
from tinydiff.diffusion import Sampling, last
from tinydiff.models import CLIP, CLIPConfig, Imagen, TextDiffusion, TextDiffusionConfig, Upsampler, UpsamplerConfig
from tinydiff.models.cascade import UPSAMPLING_STEPS, larger, smaller
from tinydiff.models.imagen import IMAGEN_GUIDANCE, IMAGEN_SAMPLING
from tinydiff.models.text_encoder import MaskedTextEncoder, TextEncoderConfig
from tinydiff.nn import TransformerConfig, UNetConfig
from tinydiff.train import Training, TrainSettings

UNET = UNetConfig(channels=3, base=8, multipliers=(1,), blocks=1, attention=(0,), heads=2, groups=4, context=8)
BASE = TextDiffusionConfig(UNET, (2, 4), T=20)
UPSAMPLER = UpsamplerConfig(
    dataclasses.replace(UNET, attention=(), context=None, extra=3, vector=4), (4, 8), T=30, S=12
)
HOW = Sampling(steps=2, clip=90.0)


def encoder(width=8):
    return stirred(MaskedTextEncoder(TextEncoderConfig(length=20, text=TransformerConfig(width, 1, 2)), Rng(0)))


def made(*upsamplers, **base):
    first = TextDiffusion(dataclasses.replace(BASE, **base), Rng(1))
    later = [stirred(Upsampler(config, Rng(2))) for config in upsamplers or (UPSAMPLER,)]
    return Imagen(encoder(), stirred(first), later)


def drawn(model, prompts=("a star", "a ring"), how=HOW, **settings):
    return [backend.to_numpy(x) for x in model.text_to_image(prompts, Rng(3), how, **settings)]


def test_first_a_small_picture_then_a_large_one(device):
    """The base model's states, told the encoder's; then the upsampler's, shown the last of these at the level asked."""
    model, prompts = made(), ["a star", "a ring"]
    states = drawn(model, prompts, guidance=2.0, negative="red", level=5)
    assert len(states) == 2 * (2 + 1) and all(x.shape == (2, 4, 8, 3) for x in states)
    ids, mask = model.text_encoder.tokens(prompts)
    told = model.text(prompts)
    assert_close(told.states, backend.to_numpy(model.text_encoder.text_states(ids, mask).data), atol=0)
    small = list(model.base.sample(told, Rng(3).at(0), HOW, guidance=2.0, negative=model.text("red")))
    for x, low in zip(states, small, strict=False):
        np.testing.assert_array_equal(x, backend.to_numpy(larger(low, 2)))
    for x, other in zip(
        states[3:], model.upsamplers[0].upsample(small[-1], Rng(3).at(1, 0), HOW, level=5), strict=True
    ):
        np.testing.assert_array_equal(x, backend.to_numpy(other))
    np.testing.assert_array_equal(smaller(states[2], 2), backend.to_numpy(small[-1]))


def test_prompts_guidance_thresholds_and_level_count():
    model = made()
    first = drawn(model)
    for other in (
        drawn(model, ("a star", "a cross")),
        drawn(model, guidance=1.0),
        drawn(model, negative="red"),
        drawn(model, how=dataclasses.replace(HOW, clip=True)),
        drawn(model, level=12),
    ):
        np.testing.assert_array_equal(other[0], first[0])  # from equal noise
        assert np.abs(other[-1] - first[-1])[1].max() > 1e-5
    for same in (drawn(model), drawn(model, guidance=IMAGEN_GUIDANCE), drawn(model, level=12 // 6)):
        np.testing.assert_array_equal(same[-1], first[-1])
    assert not isinstance(IMAGEN_SAMPLING.clip, bool)


def test_thresholds_are_dynamic():
    """At guidance 10 of a network that says 1 for the text and 0 for none, x_0 would be 10: it is divided by that."""

    class Bright(Stub):
        """Says x_0 = 1 for a text and 0 without one."""

        def __call__(self, x, t, context=None, mask=None, **told):
            return super().__call__(x, t) + mask.any(axis=1).astype(np.float32).reshape(-1, 1, 1, 1)

    model = made(target="x0")
    model.base.unet = Bright()
    told, nothing = model.text("a star"), dataclasses.replace(model.text(""), mask=np.zeros((1, 20), bool))
    for clip, x_0 in ((90.0, 1.0), (True, 1.0), (False, 10.0)):
        how = Sampling(steps=2, clip=clip)
        np.testing.assert_allclose(last(model.base.sample(told, Rng(0), how, guidance=10, negative=nothing)), x_0)


def test_each_upsampler_is_shown_what_the_last_one_drew(device):
    """Each from noise of its own, in fewer steps than the first model, told the text if it reads; all at one size."""
    unet = dataclasses.replace(UPSAMPLER.unet, attention=(0,), context=8)
    told_too = dataclasses.replace(UPSAMPLER, unet=unet, T=60)
    model = made(told_too, dataclasses.replace(UPSAMPLER, size=(8, 16), T=60), T=60)
    how = Sampling(steps=UPSAMPLING_STEPS + 1, clip=90.0)
    states = drawn(model, how=how, level=5)
    steps = UPSAMPLING_STEPS + 1
    assert len(states) == model.count_states(how) == (steps + 1) + 2 * steps
    assert all(x.shape == (2, 8, 16, 3) for x in states)
    low, (first, second), fewer = states[steps][:, ::4, ::4], model.upsamplers, dataclasses.replace(how, steps=27)
    middle = backend.to_numpy(
        last(first.upsample(low, Rng(3).at(1, 0), fewer, level=5, told=model.text(["a star", "a ring"])))
    )
    np.testing.assert_array_equal(states[2 * steps][:, ::2, ::2], middle)
    np.testing.assert_array_equal(
        states[-1], backend.to_numpy(last(second.upsample(middle, Rng(3).at(1, 1), fewer, level=5)))
    )


def test_an_upsampler_that_is_told_the_text_too():
    """As Imagen's own are: it draws otherwise for another text, shown the same small picture."""
    unet = dataclasses.replace(UPSAMPLER.unet, attention=(0,), context=8)
    model = made(dataclasses.replace(UPSAMPLER, unet=unet))
    model.base.unet = Stub()
    a, b = drawn(model, ["a star"]), drawn(model, ["a ring"])
    np.testing.assert_array_equal(a[3], b[3])
    assert np.abs(a[-1] - b[-1]).max() > 1e-5


@pytest.mark.parametrize("prompt", ["", "ein roter Stern", "赤い星"])
def test_any_text_is_a_prompt(prompt):
    assert np.isfinite(drawn(made(), [prompt])[-1]).all()


def saved(model, folder):
    Training(model, TrainSettings(1), folder / checkpoint.NAME, {}).save()
    return folder


@pytest.mark.parametrize("kind", ["text-encoder", "clip"])
def test_it_is_loaded_from_its_parts(kind, tmp_path):
    """With a text encoder that saw texts alone, or with a CLIP."""
    towers = {"text": TransformerConfig(8, 1, 2, causal=True), "image": TransformerConfig(8, 1, 2)}
    model = made()
    if kind == "clip":
        model.text_encoder = stirred(CLIP(CLIPConfig(**towers, length=20), Rng(0)))
    for name, part in {"text": model.text_encoder, "base": model.base, "larger": model.upsamplers[0]}.items():
        (tmp_path / name).mkdir()
        saved(part, tmp_path / name)
    loaded = Imagen.load(tmp_path / "text", tmp_path / "base", [tmp_path / "larger"])
    assert type(loaded.text_encoder) is type(model.text_encoder)
    np.testing.assert_array_equal(drawn(loaded)[-1], drawn(model)[-1])


def test_parts_trained_with_another_encoder_are_told():
    """Once for each; an upsampler that reads nothing cannot misread."""
    other = checkpoint.fingerprint(encoder(8)).replace("a", "b")
    with pytest.warns(UserWarning, match="trained with another text encoder") as warned:
        made(text_encoder=other)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(text_encoder=checkpoint.fingerprint(encoder()))
        made(dataclasses.replace(UPSAMPLER, text_encoder=other))
    unet = dataclasses.replace(UPSAMPLER.unet, attention=(0,), context=8)
    with pytest.warns(UserWarning, match="trained with another text encoder"):
        made(dataclasses.replace(UPSAMPLER, unet=unet, text_encoder=other))


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"is shown pictures of \(2, 4, 3\); the model before it draws \(4, 4, 3\)"):
        made(size=(4, 4))
    with pytest.raises(ValueError, match=r"\(2, 4, 3\); the model before it draws \(2, 4, 2\)"):
        made(unet=dataclasses.replace(UNET, channels=2))
    model = made()
    with pytest.raises(ValueError, match="reads texts of width 8, the text encoder's have width 4"):
        Imagen(encoder(4), model.base, model.upsamplers)
    with pytest.raises(ValueError, match=r"is shown pictures of \(2, 4, 3\); the model before it draws \(4, 8, 3\)"):
        made(UPSAMPLER, UPSAMPLER)
    unet = dataclasses.replace(UPSAMPLER.unet, attention=(0,), context=6)
    with pytest.raises(ValueError, match="reads texts of width 6, the text encoder's have width 8"):
        made(dataclasses.replace(UPSAMPLER, unet=unet))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"level": 13}, r"0\.\.12, got 13"),
        ({"level": -1}, r"0\.\.12, got -1"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"how": Sampling(steps=21)}, r"1\.\.20"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_drawn(wrong, message):
    with pytest.raises(ValueError, match=message):
        made().text_to_image(["a star"], Rng(0), **wrong)
