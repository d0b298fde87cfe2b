"""TextDiffusion and what it is told (E27): its loss, the texts that are dropped, guidance (E35), the clip (E37)."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.models.common import Stub, different, stirred, texts
from tinydiff import Rng, backend
from tinydiff.diffusion import Sampling, dynamic_threshold, last
from tinydiff.models import CLIP, CLIPConfig, Condition, TextDiffusion, TextDiffusionConfig, told_texts
from tinydiff.models.text_diffusion import AT_ONCE
from tinydiff.nn import TransformerConfig, UNetConfig
from tinydiff.train import Training, TrainSettings, train

UNET = UNetConfig(channels=2, base=8, multipliers=(1, 2), blocks=1, attention=(0,), heads=2, groups=4, context=6)
CONFIG = TextDiffusionConfig(UNET, size=(4, 4), T=50)
TOLD_MORE = dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, vector=5, extra=1))


def made(config=CONFIG):
    return stirred(TextDiffusion(config, Rng(0)))


def told(n, seed=0):
    """Texts, vectors and second images, as TOLD_MORE takes them."""
    more = Rng(seed + 1)
    return dataclasses.replace(texts(n, seed), vector=more.at(0).normal((n, 5)), shown=more.at(1).normal((n, 4, 4, 1)))


# ------------------------------------------------------------------------------------------- conditions


def test_a_condition_is_repeated(device):
    one = told(1)
    three = one.repeated(3)
    assert len(one) == 1 and len(three) == 3 and three.repeated(3).arrays == three.arrays
    for a, b in zip(one.arrays, three.arrays, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(b), np.concatenate([backend.to_numpy(a)] * 3))
    mixed = Condition(one.states, one.mask, vector=told(3).vector).repeated(3)
    assert [len(a) for a in mixed.arrays if a is not None] == [3, 3, 3] and mixed.shown is None
    with pytest.raises(ValueError, match="3 images are told one thing, or one each, got 2"):
        told(2).repeated(3)


def test_some_of_a_condition_is_taken(device):
    all_of_it, rows = told(4), np.array([3, 0, 3])
    for a, b in zip(all_of_it.arrays, all_of_it.taken(rows).arrays, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(b), backend.to_numpy(a)[rows])
    assert texts(4).taken(slice(1, 3)).vector is None and len(texts(4).taken(slice(1, 3))) == 2


def test_what_is_told_is_replaced_by_the_image(device):
    here, where = told(4), np.array([True, False, True, False])
    there = dataclasses.replace(told(1, seed=8), shown=None)
    found = here.replaced(backend.to_device(where), there)
    for mine, others, a in zip(here.arrays, there.arrays, found.arrays, strict=True):
        mine, a = backend.to_numpy(mine), backend.to_numpy(a)
        np.testing.assert_array_equal(a[~where], mine[~where])
        kept = mine if others is None else np.concatenate([backend.to_numpy(others)] * 4)
        np.testing.assert_array_equal(a[where], kept[where])


def test_a_condition_is_joined_with_one_that_tells_the_like(device):
    here, there = told(4), told(4, seed=8)
    assert here.tells_like(there) and not here.tells_like(told(3)) and not here.tells_like(texts(4))
    for one, other, found in zip(here.arrays, there.arrays, here.joined(there).arrays, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(found), np.concatenate([*map(backend.to_numpy, (one, other))]))
    assert texts(2).joined(texts(2)).arrays[2:] == (None, None)


def test_bad_conditions_are_refused():
    with pytest.raises(ValueError, match="tells nothing"):
        len(Condition())
    with pytest.raises(ValueError, match="nothing can be replaced by what was not told"):
        texts(2).replaced(np.array([True, False]), told(1))


def test_texts_are_read(device):
    text = TransformerConfig(8, 1, 2, causal=True)
    clip = CLIP(CLIPConfig(length=12, text=text, image=TransformerConfig(8, 1, 2), embedding=8), Rng(1))
    one, two = told_texts(clip, "a star"), told_texts(clip, ["a star", ""])
    assert one.states.shape == (1, 12, 8) and two.mask.shape == (2, 12) and two.vector is two.shown is None
    assert_close(two.states[:1], backend.to_numpy(one.states), rtol=1e-5)
    assert int(two.mask[1].sum()) < int(two.mask[0].sum())


# --------------------------------------------------------------------------------------------- training


def test_the_loss_is_the_formula(device):
    """‖v‖² for a network that says 0: v = √ᾱ ε − √(1−ᾱ) x_0 at the t and with the ε that the stream gives."""
    model, x_0 = made(dataclasses.replace(TOLD_MORE, text_drop=0.0)), Rng(3).normal((6, 4, 4, 2))
    model.unet, told_it = Stub(), told(6)
    loss = model.loss(x_0, Rng(5), told_it, texts(1, seed=9)).item()
    [(x_t, t, *seen)] = model.unet.asked
    x, a = backend.to_numpy(x_0).astype(np.float64), model.schedule.alpha_bar[t][:, None, None, None]
    eps = backend.to_numpy(Rng(5).at(1).normal((6, 4, 4, 2)))
    assert_close(x_t, (a**0.5 * x + (1 - a) ** 0.5 * eps).astype(np.float32), rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(np.mean((a**0.5 * eps - (1 - a) ** 0.5 * x) ** 2), rel=1e-5)
    assert ((1 <= t) & (t <= 50)).all() and len(set(t)) > 3
    wanted = told_it.states, told_it.mask, told_it.shown, told_it.vector
    for a, b in zip(seen, wanted, strict=True):
        np.testing.assert_array_equal(a, backend.to_numpy(b))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_texts_are_replaced_by_the_empty_one(share, device):
    n = 400
    model, text, empty = TextDiffusion(dataclasses.replace(CONFIG, text_drop=share), Rng(0)), texts(n), texts(1, 9)
    drawn = model.draw(Rng(1).normal((n, 4, 4, 2)), Rng(2), text, empty)
    assert drawn[-2:] == (None, None)
    states, mask = (backend.to_numpy(a) for a in drawn[3:5])
    dropped = (states == backend.to_numpy(empty.states)).all(axis=(1, 2))
    assert abs(dropped.mean() - share) < 4 * (share * (1 - share) / n) ** 0.5 + 1e-9
    np.testing.assert_array_equal(states[~dropped], backend.to_numpy(text.states)[~dropped])
    expected = np.where(dropped[:, None], backend.to_numpy(empty.mask), backend.to_numpy(text.mask))
    np.testing.assert_array_equal(mask, expected)


def test_layers_for_the_text_let_each_token_see_all(device):
    """What comes to the U-Net of the first token depends on the last one, unless that is padding."""
    model = made(dataclasses.replace(CONFIG, text_layers=1))
    model.unet, text, x_t, t = Stub(), texts(2), Rng(4).normal((2, 4, 4, 2)), np.array([7, 9])
    model(x_t, t, text)
    states = backend.to_numpy(text.states).copy()
    states[:, 2, 0] += 1  # of all channels alike, LayerNorm would not notice
    model(x_t, t, Condition(backend.to_device(states), text.mask))
    before, after = (asked[2] for asked in model.unet.asked)
    assert (after[0, :2] != before[0, :2]).any(axis=-1).all()
    np.testing.assert_array_equal(after[1, :2], before[1, :2])


def test_layers_for_the_text_are_trained():
    model = made(dataclasses.replace(CONFIG, text_layers=2))
    model.loss(Rng(3).normal((2, 4, 4, 2)), Rng(5), texts(2), texts(1, 9)).backward()
    assert all(np.abs(p.grad).max() > 0 for p in model.reader.parameters().values())
    assert TextDiffusion(CONFIG, Rng(0)).reader is None


def test_it_learns_what_a_text_says(tmp_path):
    """Two texts, two images: after training, each text draws its own; saved, and loaded again."""
    unet = dataclasses.replace(UNET, multipliers=(1,))
    model = TextDiffusion(TextDiffusionConfig(unet, (2, 2), T=20), Rng(0))
    text, x = texts(2), np.stack([np.full((2, 2, 2), c, np.float32) for c in (-0.7, 0.7)])

    def loss_at(step, rng, share):
        states, mask = (share.of(np.concatenate([a] * 8)) for a in (text.states, text.mask))
        return model.loss(share.of(np.concatenate([x] * 8)), rng, Condition(states, mask), texts(1, 5))

    training = Training(model, TrainSettings(60, 2e-2, warmup=5, ema_decay=0.8), tmp_path / "checkpoint.npz", {})
    train(training, loss_at, Rng(1), batch_size=16, resume_with="")
    loaded = TextDiffusion.load(tmp_path)
    assert loaded.config == model.config
    drawn = last(loaded.sample(text, Rng(2), Sampling(steps=10), guidance=1.5, negative=texts(1, 5)))
    means = drawn.mean(axis=(1, 2, 3))
    assert means[0] < -0.5 and means[1] > 0.5


# --------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("s", [0.0, 1.0, 3.0])
def test_guidance_is_the_formula(s, device):
    """E35, for v as for ε: the outputs' difference is exaggerated; s = 1 is the text's own, s = 0 the other's."""
    model, x, t = made(TOLD_MORE), Rng(4).normal((3, 4, 4, 2)), 20
    text, negative = told(3), told(3, seed=7)
    each = np.full(3, t)
    v, u = (backend.to_numpy(model(x, each, what).data).astype(np.float64) for what in (text, negative))
    assert np.abs(v - u).max() > 1e-3
    guided, a = u + s * (v - u), model.schedule.alpha_bar[t].item()
    got = model.denoiser(text, s, negative, clip=False)(x, t)
    x = backend.to_numpy(x)
    assert_close(got.x0, (a**0.5 * x - (1 - a) ** 0.5 * guided).astype(np.float32), rtol=1e-4, atol=1e-5)
    assert_close(got.eps, ((1 - a) ** 0.5 * x + a**0.5 * guided).astype(np.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "M", "passes"), [(3, 3, 1), (AT_ONCE, 3, 1), (AT_ONCE + 1, 3, 2), (3, 2, 2)])
def test_guidance_takes_one_pass_of_a_doubled_batch_or_two(n, M, passes, device):
    """Of few images that are told equally many tokens; each half is told its own, and the formula holds both ways."""
    model, x, text, away = made(TOLD_MORE), Rng(4).normal((n, 4, 4, 2)), told(n), told(n, seed=7)
    away = dataclasses.replace(away, states=away.states[:, :M], mask=away.mask[:, :M])
    each = np.full(n, 20)
    v, u = (backend.to_numpy(model(x, each, what).data) for what in (text, away))
    got, a = model.denoiser(text, 3.0, away, clip=False)(x, 20).x0, model.schedule.alpha_bar[20].item()
    wanted = a**0.5 * backend.to_numpy(x) - (1 - a) ** 0.5 * (3 * v - 2 * u)
    assert_close(got, wanted.astype(np.float32), rtol=1e-4, atol=1e-5)
    model.unet = Stub()
    model.denoiser(text, 3.0, away)(x, 20)
    for part, of in enumerate(("states", "mask", "shown", "vector"), 2):
        asked = np.concatenate([seen[part] for seen in model.unet.asked]) if M == 3 else model.unet.asked[0][part]
        expected = [backend.to_numpy(getattr(what, of)) for what in ((text, away) if M == 3 else (text,))]
        np.testing.assert_array_equal(asked, np.concatenate(expected))
    assert len(model.unet.asked) == passes and all(len(seen[0]) == 2 * n // passes for seen in model.unet.asked)


@pytest.mark.parametrize("clip", [True, 80.0])
def test_pictures_are_kept_in_their_range(clip, device):
    """At strong guidance x_0 leaves it; it is cut off there, or divided by a percentile (E37)."""
    model, x = made(), Rng(4).normal((3, 4, 4, 2))
    free, kept = (model.denoiser(texts(3), 9.0, texts(3, 7), clip=c)(x, 40).x0 for c in (False, clip))
    free = backend.to_numpy(free)
    assert np.abs(free).max() > 1.5
    assert_close(kept, free.clip(-1, 1) if clip is True else dynamic_threshold(free, clip), rtol=1e-5)
    x_0 = last(model.sample(texts(3), Rng(3), Sampling(steps=3, clip=clip), guidance=9.0, negative=texts(1, 7)))
    assert np.abs(backend.to_numpy(x_0)).max() <= 1 + 1e-5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpm"])
def test_sampling(sampler):
    """Every sampler, from the same noise whatever is told; the negative text once for all."""
    model, how = made(), Sampling(sampler, 3)
    one, other = (list(model.sample(texts(2, seed), Rng(3), how, negative=texts(1, 5))) for seed in (0, 1))
    assert all(x.shape == (2, 4, 4, 2) for x in one) and len(one) == 4
    np.testing.assert_array_equal(one[0], other[0])
    assert (different(one[-1], other[-1]) > 1e-3).all()


def test_padding_has_no_influence():
    model, x, text = made(), Rng(4).normal((2, 4, 4, 2)), texts(2)
    hidden = np.where(text.mask[..., None], text.states, 1e3).astype(np.float32)
    t = np.array([3, 30])
    assert not different(model(x, t, text), model(x, t, Condition(hidden, text.mask))).any()
    seen = Condition(text.states, np.ones_like(text.mask))
    assert different(model(x, t, text), model(x, t, seen))[1] > 1e-4


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "quadratic"}, "schedule must be one of linear"),
        ({"target": "y"}, "target must be one of eps, x0, v, got 'y'"),
        ({"text_layers": -1}, "layers for the text must be at least 0, .* got -1"),
        ({"text_layers": 1, "unet": dataclasses.replace(UNET, context=None)}, "0 without a context, got 1"),
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
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs something to move away from"):
        model.sample(texts(3), Rng(0), guidance=2.0)
    with pytest.raises(ValueError, match="3 images are told one thing, or one each, got 2"):
        model.sample(texts(3), Rng(0), negative=texts(2))
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.50"):
        next(model.sample(texts(1), Rng(0), Sampling(steps=51)))
    with pytest.raises(ValueError, match="context has width 6, got None"):
        model(np.zeros((1, 4, 4, 2), np.float32), np.array([1]), Condition())
