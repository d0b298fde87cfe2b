"""StableDiffusion (E28): its parts put together, small and untrained, which the way through them does not mind."""

import dataclasses
import warnings

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, backend, checkpoint
from tinydiff.backend import to_numpy
from tinydiff.diffusion import Sampling, last
from tinydiff.models import CLIP, VAE, CLIPConfig, LatentDiffusion, LatentDiffusionConfig, StableDiffusion, VAEConfig
from tinydiff.models.stable_diffusion import with_known
from tinydiff.nn import TransformerConfig, UNetConfig

TEXT = TransformerConfig(8, 1, 2, causal=True)
CLIP_CONFIG = CLIPConfig(length=40, text=TEXT, image=TransformerConfig(8, 1, 2), size=16, embedding=8)
VAE_CONFIG = VAEConfig(base=8, latent=2, scale=0.5)
UNET = UNetConfig(channels=2, base=8, multipliers=(1, 2), blocks=1, attention=(0,), heads=2, groups=4, context=8)
HOW = Sampling(steps=4)
MASK = np.ones((16, 16), bool)
MASK[:, 6:] = False
"""Column 1 of the latents, pixels 4 to 7, is known in part only."""


def moved(model):
    """No weight is left at the zeros that many start from."""
    for i, p in enumerate(model.parameters().values()):
        p[...] = p.data + 0.1 * Rng(1).at(i).normal(p.shape)
    return model


def made(size=(4, 4)):
    unet = LatentDiffusion(LatentDiffusionConfig(UNET, size, T=20), Rng(2))
    return StableDiffusion(VAE(VAE_CONFIG, Rng(0)), CLIP(CLIP_CONFIG, Rng(1)), moved(unet))


def images(n=2):
    return Rng(9).uniform((n, 16, 16, 3)) * 2 - 1


def test_from_a_prompt_to_a_picture(device):
    """The latents are those of the U-Net told CLIP's states of the prompts, and the picture the decoder's."""
    model, prompts = made(), ["a red star", "a blue ring on black"]
    states = list(model.text_to_image(prompts, Rng(3), HOW, guidance=2.0))
    ids, mask = model.clip.tokens(prompts)
    text = model.text(prompts)
    assert_close(text.states, to_numpy(model.clip.text_states(ids, mask).data), atol=0)
    expected = model.unet.sample(text, Rng(3), HOW, guidance=2.0, negative=model.text(""))
    for z, other in zip(states, expected, strict=True):
        assert_close(z, to_numpy(other), atol=0)
    picture = model.decode(states[-1])
    assert picture.shape == (2, 16, 16, 3) and picture.dtype == np.float32 and np.abs(picture).max() <= 1
    assert_close(picture, to_numpy(model.vae.decode(states[-1])), atol=0)


def test_pictures_that_are_not_square_and_in_range():
    model = made((2, 6))
    z = model.unet.noise(1, Rng(0))
    model.vae.config = dataclasses.replace(VAE_CONFIG, scale=1e-3)  # latents a thousand times too large
    assert model.size == (8, 24) and model.decode(z).shape == (1, 8, 24, 3)
    assert np.abs(model.decode(z)).max() == 1


def test_prompts_and_negative_prompts_count_and_the_noise_does_not_depend_on_them():
    model = made()
    a, b, c = (
        list(model.text_to_image([prompt], Rng(3), HOW, negative=negative))
        for prompt, negative in (("a star", ""), ("a ring", ""), ("a star", "red"))
    )
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[-1] - b[-1]).max() > 1e-4 and np.abs(a[-1] - c[-1]).max() > 1e-4


@pytest.mark.parametrize("prompt", ["", "ein roter Stern", "赤い星", "⭐🔴", "a " * 12])
def test_any_text_is_a_prompt(prompt):
    model = made()
    assert np.isfinite(model.decode(last(model.text_to_image([prompt], Rng(3), HOW)))).all()


def test_a_prompt_that_is_too_long_is_cut_with_a_warning():
    with pytest.warns(UserWarning, match="cut"):
        made().text("a red star " * 30)


def test_image_to_image(device):
    """At strength 0 the picture is what the autoencoder makes of it; the more strength, the more of it is gone."""
    model, x = made(), images()
    z_0 = to_numpy(model.encode(x))
    results = [
        to_numpy(last(model.image_to_image(x, ["a star", "a ring"], Rng(3), strength, HOW)))
        for strength in (0.0, 0.1, 1.0)
    ]
    assert_close(results[0], z_0, rtol=1e-5, atol=1e-6)
    near, far = (np.abs(z - z_0).mean() for z in results[1:])
    assert 0 < near < far
    assert len(list(model.image_to_image(x, ["a star"], Rng(3), 0.5, HOW))) == 1 + 2  # half of the way, half the steps


def test_negative_prompts_count_in_editing_too():
    model, x = made(), images(1)
    for draw in (
        lambda negative: model.image_to_image(x, ["a star"], Rng(3), 1.0, HOW, negative=negative),
        lambda negative: model.inpaint(x, MASK, ["a star"], Rng(3), steps=4, negative=negative),
    ):
        assert np.abs(last(draw("")) - last(draw("red"))).max() > 1e-4


def test_inpainting_keeps_what_is_known(device):
    """In the latents, those whose pixels are all known; in the picture, after with_known, every known pixel exactly."""
    model, x = made(), images()
    z = to_numpy(last(model.inpaint(x, MASK, ["a star"], Rng(3), steps=4)))
    z_0 = to_numpy(model.encode(x))
    np.testing.assert_array_equal(z[:, :, :1], z_0[:, :, :1])
    assert (z[:, :, 1:] != z_0[:, :, 1:]).all()
    x, painted = to_numpy(x), model.decode(backend.to_device(z))
    whole = with_known(painted, x, MASK)
    np.testing.assert_array_equal(whole[:, :, :6], x[:, :, :6])
    np.testing.assert_array_equal(whole[:, :, 6:], painted[:, :, 6:])


def test_from_one_prompt_to_another(device):
    """The ends are what each prompt draws from the same noise."""
    model = made()
    way = to_numpy(last(model.interpolate("a star", "a ring", 3, Rng(3), HOW)))
    for z, prompt in ((way[:1], "a star"), (way[2:], "a ring")):
        assert_close(z, to_numpy(last(model.text_to_image([prompt], Rng(3), HOW))), rtol=1e-4, atol=1e-5)
    assert np.abs(way[1] - way[0]).max() > 1e-4 and np.abs(way[1] - way[2]).max() > 1e-4


def test_parts_that_do_not_fit_are_refused():
    vae, clip, unet = VAE(VAE_CONFIG, Rng(0)), CLIP(CLIP_CONFIG, Rng(1)), made().unet
    with pytest.raises(ValueError, match=r"draws latents of 2 channels .* autoencoder makes latents of 3"):
        StableDiffusion(VAE(dataclasses.replace(VAE_CONFIG, latent=3), Rng(0)), clip, unet)
    wide = dataclasses.replace(CLIP_CONFIG, text=dataclasses.replace(TEXT, width=16))
    with pytest.raises(ValueError, match=r"texts of width 8; .* CLIP's texts have width 16"):
        StableDiffusion(vae, CLIP(wide, Rng(1)), unet)


def test_parts_that_the_unet_was_not_trained_with_are_warned_of():
    vae, other, clip, unet = VAE(VAE_CONFIG, Rng(0)), VAE(VAE_CONFIG, Rng(7)), CLIP(CLIP_CONFIG, Rng(1)), made().unet
    known = {"autoencoder": checkpoint.fingerprint(vae), "text_encoder": checkpoint.fingerprint(clip)}
    unet.config = dataclasses.replace(unet.config, **known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StableDiffusion(vae, clip, unet)
    with pytest.warns(UserWarning, match="another autoencoder"):
        StableDiffusion(other, clip, unet)
    with pytest.warns(UserWarning, match="another text encoder"):
        StableDiffusion(vae, CLIP(CLIP_CONFIG, Rng(7)), unet)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.image_to_image(images(), ["a"], Rng(0), 1.5), r"strength must lie in \[0, 1\], got 1.5"),
        (lambda m: m.image_to_image(images()[:, :8], ["a"], Rng(0)), r"takes images \(n, 16, 16, 3\), got \(2, 8, 16"),
        (lambda m: m.inpaint(images(), MASK[:8], ["a"], Rng(0), 2), r"take a mask \(16, 16\)"),
        (
            lambda m: m.inpaint(images(), MASK, ["a", "b", "c"], Rng(0), 2),
            "2 images are told one thing, or one each, got 3",
        ),
        (lambda m: m.interpolate("a", "b", 1, Rng(0)), "at least 2 pictures from one prompt to another, got 1"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        last(call(made()))
