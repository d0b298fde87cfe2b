"""DALL-E 2 as a whole (E29) and what is done with its two coordinates, z_i and x_T (E34): small and untrained."""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tests.helpers import assert_close
from tests.models.common import Stub, stirred
from tests.models.prior_common import unit
from tinydiff import Rng, backend, checkpoint
from tinydiff.backend import to_numpy
from tinydiff.diffusion import Sampling, last
from tinydiff.models import (
    CLIP,
    AutoregressivePrior,
    AutoregressivePriorConfig,
    CLIPConfig,
    Condition,
    DallE2,
    Decoder,
    DecoderConfig,
    DiffusionPrior,
    DiffusionPriorConfig,
    Upsampler,
    UpsamplerConfig,
    told_captions,
    told_texts,
)
from tinydiff.models.cascade import UPSAMPLING_STEPS, larger, smaller
from tinydiff.models.dalle2 import arc
from tinydiff.nn import TransformerConfig, UNetConfig
from tinydiff.train import Training, TrainSettings

TEXT = TransformerConfig(8, 1, 2, causal=True)
CLIP_CONFIG = CLIPConfig(length=40, text=TEXT, image=TransformerConfig(8, 1, 2), size=8, patch=4, embedding=6)
UNET = UNetConfig(
    channels=3, base=8, multipliers=(1,), blocks=1, attention=(0,), heads=2, groups=4, context=8, vector=6, patch=2
)
UPSAMPLER = UpsamplerConfig(
    UNetConfig(channels=3, base=8, multipliers=(1,), blocks=1, attention=(), groups=4, vector=8, patch=4, extra=3),
    (16, 16),
    T=70,
    S=20,
)
HOW = Sampling(steps=4)


def clip_of(seed=1):
    return stirred(CLIP(CLIP_CONFIG, Rng(seed)))


def prior_of(kind="diffusion", **fields):
    if kind == "diffusion":
        return stirred(DiffusionPrior(DiffusionPriorConfig(TEXT, 8, 6, T=70, **fields), Rng(2)))
    return stirred(AutoregressivePrior(AutoregressivePriorConfig(TEXT, 8, 6, components=3, bins=4), Rng(2)))


def decoder_of(**fields):
    return stirred(Decoder(DecoderConfig(UNET, (8, 8), T=70, tokens=2, **fields), Rng(3)))


def made(prior="diffusion", large=True):
    upsamplers = [stirred(Upsampler(UPSAMPLER, Rng(4)))] if large else []
    return DallE2(clip_of(), prior and prior_of(prior), decoder_of(), upsamplers)


def images(n=2, seed=9):
    return Rng(seed).uniform((n, 8, 8, 3)) * 2 - 1


def told_to(model, draw):
    """What the decoder's network is told: the embeddings z_i, and how much of the context is a caption's own tokens."""
    model.decoder.unet = Stub()
    last(draw(model))
    _, _, _, mask, _, vector = model.decoder.unet.asked[0]
    return vector / 6**0.5, mask.sum(axis=1)


# -------------------------------------------------------------------------------------- the whole (E29)


def check_step_by_step(kind):
    """E29: z_i ~ p(z_i | y), then x ~ p(x | z_i, y), then the same image larger."""
    model, prompts = made(kind), ["a red star", "a blue ring on black"]
    states = list(model.text_to_image(prompts, Rng(3), HOW, guidance=2.0, candidates=3))
    captions, empty = told_captions(model.clip, prompts), told_captions(model.clip, [""])
    z_i = model.prior.sample(captions, Rng(3).at(0), candidates=3, empty=empty)
    told, nothing = Condition(captions.states, captions.mask, z_i), told_texts(model.clip, "")
    small = list(model.decoder.sample(told, Rng(3).at(1, 0), HOW, guidance=2.0, negative=nothing))
    large = list(model.upsamplers[0].upsample(small[-1], Rng(3).at(1, 1, 0), HOW))
    assert len(states) == len(small) + len(large)
    for x, expected in zip(states, [*small, *large], strict=True):
        assert_close(x, to_numpy(expected), rtol=1e-5, atol=1e-6)


def test_first_the_embedding_then_the_image(device):
    check_step_by_step("autoregressive")


def test_either_prior_will_do():
    check_step_by_step("diffusion")


def test_an_upsampler_that_reads_is_told_the_caption():
    """And images of given noise are made larger from one noise, each told its own."""
    unet = dataclasses.replace(UPSAMPLER.unet, attention=(0,), context=8)
    model = DallE2(
        clip_of(), None, decoder_of(), [stirred(Upsampler(dataclasses.replace(UPSAMPLER, unet=unet), Rng(4)))]
    )
    model.decoder.unet = Stub()
    z_i, x_T = model.image_embedding(images()), images(1).repeat(2, axis=0)
    for start in (None, x_T):
        one, other = (
            last(model.draw(z_i, ["a star", caption], Rng(0), HOW, x_T=start)) for caption in ("a star", "a ring")
        )
        np.testing.assert_array_equal(one[0], other[0])
        assert np.abs(one[1] - other[1]).max() > 1e-5
        assert (one[0] == one[1]).all() == (start is not None)


def test_the_candidates_are_told_apart_by_the_text():
    """E32: with many candidates the embedding is nearer to z_t than with one."""
    model, prompts = made(), ["a red star", "a ring", "a square", "a cross"]
    z_t = to_numpy(model.text_embedding(prompts))
    one, many = ((to_numpy(model.embed(prompts, Rng(1), n)) * z_t).sum(axis=1) for n in (1, 5))
    assert (many >= one - 1e-6).all() and many.mean() > one.mean()


def test_without_a_prior_the_text_is_taken_for_the_image(device):
    prompts, model = ["a star", "a ring"], made(None)
    assert_close(model.embed(prompts, Rng(0)), model.clip.text_embedding(prompts), atol=1e-6)


def test_what_the_decoder_is_told():
    """An embedding and a caption; or only one of them."""
    z_i = unit(np.random.default_rng(0).normal(size=(2, 6))).astype(np.float32)
    prompts = ["a red star", "a blue ring on black"]
    lengths = made().clip.tokens(prompts)[1].sum(axis=1) + 2
    empty = made().clip.tokens([""])[1].sum() + 2
    for given_, caption, found, length in (
        (z_i, prompts, z_i, lengths),
        (z_i, "", z_i, [empty] * 2),
        (None, prompts, 0 * z_i, lengths),
    ):
        vector, seen = told_to(made(), lambda m, z=given_, y=caption: m.draw(z, y, Rng(0), HOW, guidance=1.0))
        assert_close(vector, found, atol=1e-6)
        np.testing.assert_array_equal(seen, length)


def test_how_many_states_and_how_large():
    model, plain = made(), made(large=False)
    assert (model.size, plain.size) == ((16, 16), (8, 8))
    assert plain.count_states(Sampling(steps=40)) == 1 + 40
    assert model.count_states(Sampling(steps=40)) == 1 + 40 + 1 + UPSAMPLING_STEPS
    states = list(model.draw(None, "a star", Rng(3), HOW))
    assert len(states) == model.count_states(HOW) == 10 and len(list(plain.draw(None, "a", Rng(3), HOW))) == 5
    assert [x.shape for x in states] == [(1, 8, 8, 3)] * 5 + [(1, 16, 16, 3)] * 5
    pictures = [model.pictures(x) for x in states]
    assert {x.shape for x in pictures} == {(1, 16, 16, 3)} and max(np.abs(x).max() for x in pictures) <= 1
    np.testing.assert_array_equal(pictures[0][:, ::2, 1::2], states[0].clip(-1, 1))


def test_what_is_not_wanted_counts():
    model = made()
    a, b = (last(model.draw(None, "a star", Rng(3), HOW, 3.0, negative)) for negative in ("", "red"))
    assert np.abs(a - b).max() > 1e-4


# ----------------------------------------------------------------------------------- manipulations (E34)


@PROPERTY
@given(st.integers(2, 8), st.integers(2, 6), st.floats(0.1, 1), st.integers(0, 2**32))
def test_points_on_an_arc(n, d, far, seed):
    """Unit vectors, each as far from the last: the n-th part of the angle, in the plane of the two ends."""
    a, b = unit(np.random.default_rng(seed).normal(size=(2, 1, d)))
    points = arc(a, b, np.linspace(0, far, n))
    theta = np.arccos(np.clip((a * b).sum(), -1, 1))
    aside = b - (a * b).sum() * a
    aside /= np.linalg.norm(aside)
    for k, point in enumerate(points):
        angle = far * theta * k / (n - 1)
        np.testing.assert_allclose(point, (np.cos(angle) * a + np.sin(angle) * aside)[0], atol=1e-5)


def test_a_variation_is_told_what_clip_sees_and_nothing_else():
    model, x = made(), images()
    vector, seen = told_to(made(), lambda m: m.variations(x, Rng(0), HOW))
    assert_close(vector, model.clip.image_embedding(x), atol=1e-6)
    assert set(seen) == {model.clip.tokens([""])[1].sum() + 2}
    one, other = (last(model.variations(x, Rng(seed), HOW)) for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-3


def test_the_noise_of_an_image_that_is_larger_than_what_the_decoder_draws(monkeypatch):
    """It is found by the means of its pixels, and by what CLIP sees of the image as it is."""
    decoder = stirred(Decoder(DecoderConfig(UNET, (4, 4), T=70, tokens=2), Rng(3)))
    model, x = DallE2(clip_of(), None, decoder), images()
    x_T = model.invert(x, Rng(1), 3)
    assert x_T.shape == (2, 4, 4, 3)
    z_i, squares = model.image_embedding(x), larger(smaller(x, 2), 2)
    assert np.abs(x_T - model.invert(squares, Rng(1), 3)).max() > 1e-5
    monkeypatch.setattr(model, "image_embedding", lambda images: z_i)
    assert_close(x_T, model.invert(squares, Rng(1), 3), atol=1e-5)


def test_the_way_from_one_image_to_another(device):
    """The ends are drawn of the two embeddings and the middle of none of them, all from one noise."""
    model, x = made(), images()
    states = [to_numpy(s) for s in model.interpolate(x, 3, Rng(0), HOW)]
    for k in (0, 5):  # where the decoder and the upsampler begin
        np.testing.assert_array_equal(states[k], np.repeat(states[k][:1], 3, axis=0))
    z_i, x_T = model.image_embedding(x), backend.to_device(states[0][:2])
    ends = to_numpy(last(model.draw(z_i, "", Rng(0), HOW, guidance=1.0, x_T=x_T)))
    assert_close(states[-1][[0, 2]], ends, rtol=1e-4, atol=1e-5)
    assert all(np.abs(states[-1][1] - end).max() > 1e-4 for end in ends)


def test_the_way_is_halved_where_most_changes(device):
    """The ends, then always between those neighbours that differ most, each as `interpolate` draws it there."""
    model, x = made(), images()
    found = list(itertools.islice(model.bisect(x, Rng(0), HOW), 8))
    places, drawn = [w for w, _ in found], np.concatenate([to_numpy(image) for _, image in found])
    assert places[:3] == [0, 1, 0.5]
    way = to_numpy(last(DallE2(model.clip, None, model.decoder).interpolate(x, places, Rng(0), HOW)))
    assert_close(way, drawn, rtol=1e-4, atol=1e-5)
    for n in range(3, 8):
        order = np.argsort(places[:n])
        jumps = ((drawn[order][1:] - drawn[order][:-1]) ** 2).mean(axis=(1, 2, 3))
        before, after = (places[order[jumps.argmax() + k]] for k in (0, 1))
        assert places[n] == (before + after) / 2


def test_a_way_that_leads_nowhere_changes_nothing():
    x = np.repeat(images(1), 2, axis=0)
    same = last(made().interpolate(x, 4, Rng(0), HOW))
    assert_close(same, np.repeat(same[:1], 4, axis=0), atol=1e-5)


def test_text_diffs():
    """The embedding turns towards the difference of two texts, by equal angles; x_T stays."""
    model, x, x_T = made(), images(1), images(1, seed=5)
    told, _ = told_to(made(), lambda m: m.text_diff(x, "a star", "a red star", 3, Rng(0), HOW, far=0.4, x_T=x_T))
    z_old, z_new = model.clip.text_embedding(["a star", "a red star"]).astype(np.float64)
    z, z_d = model.clip.image_embedding(x)[0].astype(np.float64), unit(z_new - z_old)
    theta = np.arccos(z @ z_d)
    expected = [(np.sin((1 - w) * theta) * z + np.sin(w * theta) * z_d) / np.sin(theta) for w in (0, 0.2, 0.4)]
    assert_close(told, np.array(expected, np.float32), atol=1e-5)
    first = next(iter(model.text_diff(x, "a star", "a red star", 3, Rng(0), HOW, x_T=x_T)))
    np.testing.assert_array_equal(to_numpy(first), np.repeat(to_numpy(x_T), 3, axis=0))
    free = to_numpy(next(iter(model.text_diff(x, "a star", "a red star", 3, Rng(0), HOW))))
    np.testing.assert_array_equal(free, np.repeat(free[:1], 3, axis=0))


def test_an_image_is_drawn_from_its_own_two_coordinates():
    """DDIM's way back ends near it, and nearer the more steps are taken; from other noise, or of another z_i, not."""
    model, x = made(large=False), images(2)
    x = 0.3 * x

    def back(steps, of, x_T=None):
        return np.abs(last(model.variations(of, Rng(1), Sampling(steps=steps), x_T=x_T)) - x).mean()

    few, many = (back(steps, x, model.invert(x, Rng(0), steps)) for steps in (4, 30))
    x_T = model.invert(x, Rng(0), 30)
    assert x_T.shape == x.shape and many < few
    assert many < 0.5 * back(30, x) and many < 0.9 * back(30, images(2, seed=6), x_T)


# ------------------------------------------------------------------------------------- loading, bad input


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_it_is_loaded_part_by_part(kind, tmp_path):
    model = made(kind)
    save(model, tmp_path)
    loaded = DallE2.load(*(tmp_path / name for name in ("clip", "prior", "decoder")), [tmp_path / "upsampler"])
    a, b = (last(m.text_to_image(["a star"], Rng(0), HOW)) for m in (model, loaded))
    np.testing.assert_array_equal(a, b)
    less = DallE2.load(tmp_path / "clip", None, tmp_path / "decoder", [])
    assert less.prior is None and not less.upsamplers and less.size == (8, 8)
    with pytest.raises(checkpoint.CheckpointError, match="expected 'diffusion-prior', got 'clip'"):
        DallE2.load(tmp_path / "clip", tmp_path / "clip", tmp_path / "decoder", [])


def save(model, folder):
    """Each part in a folder of its own."""
    parts = {name: getattr(model, name) for name in ("clip", "prior", "decoder")}
    for name, part in {**parts, "upsampler": model.upsamplers[0]}.items():
        (folder / name).mkdir()
        Training(part, TrainSettings(1), folder / name / checkpoint.NAME, {}).save()


def test_parts_that_do_not_fit_are_refused():
    clip, decoder = clip_of(), decoder_of()
    other = CLIP(dataclasses.replace(CLIP_CONFIG, embedding=7), Rng(0))
    with pytest.raises(ValueError, match=r"embeddings of 7 numbers; the decoder takes 8 and 6"):
        DallE2(other, None, decoder)
    narrow = DiffusionPrior(DiffusionPriorConfig(TEXT, 8, 5), Rng(0))
    with pytest.raises(ValueError, match=r"width 8 and embeddings of 6 numbers; the prior takes 8 and 5"):
        DallE2(clip, narrow, decoder)
    large = Upsampler(dataclasses.replace(UPSAMPLER, size=(24, 32)), Rng(0))
    with pytest.raises(ValueError, match=r"is shown pictures of \(12, 16, 3\); the model before it draws \(8, 8, 3\)"):
        DallE2(clip, None, decoder, [large])


def test_parts_that_were_trained_with_another_clip_are_warned_of():
    clip = clip_of()
    known = checkpoint.fingerprint(clip)
    prior, decoder = prior_of(text_encoder=known), decoder_of(text_encoder=known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DallE2(clip, prior, decoder)
    with pytest.warns(UserWarning, match="the decoder was trained with another CLIP"):
        DallE2(clip_of(7), None, decoder)
    reading = dataclasses.replace(UPSAMPLER, unet=dataclasses.replace(UPSAMPLER.unet, context=8), text_encoder=known)
    with pytest.warns(UserWarning, match="the upsampler was trained with another CLIP"):
        DallE2(clip_of(7), None, decoder_of(), [Upsampler(reading, Rng(0))])
    with pytest.warns(UserWarning, match="the prior was trained with another CLIP"):
        DallE2(clip_of(7), prior, decoder_of())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.interpolate(images(), 1, Rng(0)), "2 images or more from one to another, of 2, got 1 of 2"),
        (lambda m: m.interpolate(images(3), 4, Rng(0)), "got 4 of 3"),
        (lambda m: m.interpolate(images(), [0, 1.5], Rng(0)), "from w = 0 to 1, got 0 to 1.5"),
        (lambda m: m.text_diff(images(1), "a", "a", 3, Rng(0)), "equal texts make no difference: 'a'"),
        (lambda m: m.text_diff(images(1), "a", "b", 3, Rng(0), far=1.5), r"in \[0, 1\], got 1.5"),
        (lambda m: m.variations(images()[:, :4], Rng(0)), r"images of shape \(N, 8, 8, 3\), got \(2, 4, 8, 3\)"),
        (
            lambda m: m.variations(images(), Rng(0), HOW, x_T=images(3)),
            "2 images start from as much noise, got x_T of 3",
        ),
        (lambda m: m.draw(None, "a", Rng(0), Sampling(steps=71)), r"steps must be in 1\.\.70"),
        (lambda m: m.text_to_image(["a"], Rng(0), candidates=0), "candidates must be at least 1, got 0"),
        (lambda m: m.draw(None, "a", Rng(0), guidance=float("nan")), "guidance must be a finite number"),
        (lambda m: m.draw(None, ["a", "b"], Rng(0), x_T=images(3)), "got x_T of 3"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(made())
