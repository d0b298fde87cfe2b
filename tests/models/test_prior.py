"""The diffusion prior (E30, E32; E35's guidance): its sequence, its loss, guidance, and which candidate stays."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tests.helpers import assert_close
from tests.models.prior_common import SIZES, captions, embeddings, prefix, told, unit
from tests.nn import reference
from tests.nn.common import layer_gradcheck, randomised
from tinydiff import Rng, Tensor, backend
from tinydiff.diffusion import Sampling
from tinydiff.models import CLIP, CLIPConfig, Condition, DiffusionPrior, DiffusionPriorConfig, told_captions
from tinydiff.models.prior import DALLE_2_PRIOR, most_aligned
from tinydiff.nn import TransformerConfig
from tinydiff.optim import Adam
from tinydiff.rng import Blank
from tinydiff.train import Training, TrainSettings

CONFIG = DiffusionPriorConfig(**SIZES, T=50)


def made(dtype=np.float32, **fields):
    return randomised(DiffusionPrior(dataclasses.replace(CONFIG, **fields), Rng(0)), dtype=dtype)


# ------------------------------------------------------------------------------------ against formulas


def slow_output(weights, noised, t, text):
    """E30, caption by caption and without padding: what the last of the tokens says."""
    rows = []
    for z, time, (states, z_t) in zip(noised, t, told(text), strict=True):
        emb = reference.time_embedding([time], reference.part(weights, "time"))[0]
        into = reference.linear(z, reference.part(weights, "into"))
        tokens = np.array([*prefix(weights, states, z_t), emb, into, weights["query"][0, 0]])
        h = reference.transformer(tokens[None], reference.part(weights, "transformer"), CONFIG.transformer)[0, -1]
        rows.append(reference.linear(h, reference.part(weights, "out")))
    return np.array(rows)


def test_the_output_is_the_formula(device):
    """The query at the end sees the caption, z_t, t and the noised embedding, and no padding (E30)."""
    model, noised, t = made(np.float64), np.random.default_rng(5).normal(size=(6, 5)), np.array([1, 50, 7, 20, 33, 2])
    text = captions(6)
    expected = slow_output(model.state_dict(), noised, t, text)
    assert_close(model(backend.to_device(noised), t, text), expected, rtol=1e-10)


def test_gradients(device):
    model, text, t = made(np.float64), captions(3), np.array([1, 50, 7])
    x = backend.to_device(np.random.default_rng(5).normal(size=(3, 5)))
    assert layer_gradcheck(model, call=lambda: (model(x, t, text) ** 2).sum()) <= 1e-6


def test_the_loss_is_the_formula(monkeypatch, device):
    """‖0 − √d z_i‖² = 1 a number for a network that says 0, shown √ᾱ √d z_i + √(1−ᾱ) ε at the t of the stream."""
    model, z_i, text, seen = made(text_drop=0.0), embeddings(8, dtype=np.float32), captions(8, dtype=np.float32), []

    def stub(self, noised, t, told):
        seen.extend(backend.to_numpy(a) for a in (noised, t, told.states, told.mask, told.vector))
        return Tensor(noised * 0)

    monkeypatch.setattr(DiffusionPrior, "__call__", stub)
    loss = model.loss(backend.to_device(z_i), Rng(5), text, captions(1, 9, np.float32)).item()
    assert loss == pytest.approx(1, rel=1e-5)
    noised, t, *same = seen
    a = np.cumprod(1 - model.schedule.beta)[t][:, None]
    eps = backend.to_numpy(Rng(5).at(1).normal((8, 5)))
    assert_close(noised, (a**0.5 * 5**0.5 * z_i + (1 - a) ** 0.5 * eps).astype(np.float32), rtol=1e-5)
    assert ((1 <= t) & (t <= 50)).all() and len(set(t)) > 4
    for got, given_ in zip(same, (text.states, text.mask, text.vector), strict=True):
        np.testing.assert_array_equal(got, backend.to_numpy(given_))


@pytest.mark.parametrize("s", [0.0, 1.0, 3.0])
def test_guidance_is_the_formula(s, device):
    """E35, and the network's output is x_0 itself: it is neither clipped nor turned into another."""
    model, x, t = made(), Rng(4).normal((3, 5)), 20
    text, empty = captions(3, dtype=np.float32), captions(1, 9, np.float32)
    each = np.full(3, t)
    c, u = (backend.to_numpy(model(x, each, said).data).astype(float) for said in (text, empty.repeated(3)))
    assert np.abs(c - u).max() > 1e-3
    got = model.denoiser(text, s, empty.repeated(3))(x, t)
    a, x_0 = model.schedule.alpha_bar[t], u + s * (c - u)
    assert_close(got.x0, x_0.astype(np.float32), rtol=1e-4)
    assert_close(got.eps, ((backend.to_numpy(x) - a**0.5 * x_0) / (1 - a) ** 0.5).astype(np.float32), rtol=1e-4)


# --------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_captions_are_replaced_by_the_empty_one(share, device):
    n = 400
    text, empty = captions(n), captions(1, 9)
    drawn = made(text_drop=share).draw(backend.to_device(embeddings(n)), Rng(2), text, empty)
    got = Condition(*drawn[3:])
    own, other, new = (
        [backend.to_numpy(a) for a in (c.states, c.mask, c.vector)] for c in (text, empty.repeated(n), got)
    )
    dropped = (new[2] == other[2]).all(axis=1)
    assert abs(dropped.mean() - share) < 4 * (share * (1 - share) / n) ** 0.5 + 1e-9
    for before, replaced, after in zip(own, other, new, strict=True):
        np.testing.assert_array_equal(after[dropped], replaced[dropped])
        np.testing.assert_array_equal(after[~dropped], before[~dropped])


def test_captions_are_what_clip_says(device):
    clip = CLIP(CLIPConfig(text=TransformerConfig(8, 1, 2, causal=True), image=TransformerConfig(8, 1, 2)), Rng(1))
    texts = ["a red star", ""]
    read, (ids, mask) = told_captions(clip, texts), clip.tokens(texts)
    assert_close(read.states, backend.to_numpy(clip.text_states(ids, mask).data))
    assert_close(read.vector, clip.text_embedding(texts), atol=1e-6)
    np.testing.assert_array_equal(backend.to_numpy(read.mask), backend.to_numpy(mask))
    assert len(read) == 2 and backend.device_of(read.states) == backend.device_of(read.vector) == backend.device()


# -------------------------------------------------------------------------------------------- candidates


@PROPERTY
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_the_candidate_nearest_to_the_text_stays(n, B, d, seed):
    """E32, by a loop over captions and candidates."""
    rng = np.random.default_rng(seed)
    candidates, z_t = unit(rng.normal(size=(n, B, d))), unit(rng.normal(size=(B, d)))
    expected = []
    for b in range(B):
        best = max(range(n), key=lambda j, b=b: sum(candidates[j, b, i] * z_t[b, i] for i in range(d)))
        expected.append(candidates[best, b])
    np.testing.assert_array_equal(most_aligned(candidates, z_t), expected)


def test_sampling(device):
    """Unit vectors; the first candidates of equal rng are equal; the most aligned of them stays (E32)."""
    model, how, text, empty = made(), Sampling("ddpm", 2), captions(3, dtype=np.float32), captions(1, 9, np.float32)
    three = model.candidates(text, Rng(3), how, n=3, guidance=2.0, empty=empty)
    assert three.shape == (3, 3, 5) and three.dtype == np.float32
    assert_close((three * three).sum(axis=-1), np.ones((3, 3), np.float32), atol=1e-5)
    two = model.candidates(text, Rng(3), how, n=2, guidance=2.0, empty=empty)
    assert_close(two, backend.to_numpy(three[:2]))
    assert np.abs(backend.to_numpy(two[0] - two[1])).max() > 1e-3
    best, aligned = model.sample(text, Rng(3), how, guidance=2.0, empty=empty), (two * text.vector).sum(axis=-1)
    assert_close((best * text.vector).sum(axis=-1), backend.to_numpy(aligned).max(axis=0), atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpm"])
def test_every_sampler_draws_without_bounds(sampler):
    """A network that says 100 gives 100 / ‖100‖: nothing is clipped."""
    model = made()
    model.out.weight[...] = 0
    model.out.bias[...] = np.float32([100, 0, 0, 0, 1])
    drawn = model.sample(captions(2, dtype=np.float32), Rng(3), Sampling(sampler, 5), empty=captions(1, 9, np.float32))
    assert_close(drawn, np.float32([[1, 0, 0, 0, 0.01]] * 2), atol=1e-3)


def test_it_learns_what_a_caption_leaves_open():
    """One caption with one image, and one that fits two: after training it draws both of these, and not their mean."""
    x, y, z = np.eye(4, dtype=np.float32)[:3]
    two = Condition(Rng(0).normal((2, 1, 6)), np.ones((2, 1), bool), embeddings(2, dtype=np.float32, d=4))
    empty = Condition(two.states[:1] * 0, two.mask[:1], two.vector[:1])
    rows, z_i = np.array([0, 0, 1, 1] * 8), np.stack([x, x, y, z] * 8)
    text, sizes = two.taken(rows), SIZES | {"transformer": TransformerConfig(16, 1, 2, 2, causal=True), "embedding": 4}
    model = DiffusionPrior(DiffusionPriorConfig(**sizes, T=20), Rng(1))
    adam = Adam(model.parameters())
    for step in range(200):
        model.loss(z_i, Rng(2).at(step), text, empty).backward()
        adam.step(1e-2 * (1 - step / 200))
    drawn = model.candidates(two.taken(np.repeat([0, 1], 40)), Rng(3), Sampling("ddpm", 10), empty=empty)[0]
    own, either = drawn[:40] @ x, np.stack([drawn[40:] @ y, drawn[40:] @ z])
    assert own.mean() > 0.9 and np.median(either.max(axis=0)) > 0.9
    assert 0.2 < np.mean(either[0] > either[1]) < 0.8


def test_it_is_loaded_with_its_averaged_weights(tmp_path):
    training = Training(made(), TrainSettings(2), tmp_path / "checkpoint.npz", {})
    training.ema.average[...] = 0.01
    training.save()
    loaded = DiffusionPrior.load(tmp_path)
    assert loaded.config == CONFIG and not loaded.training
    assert all(np.all(w == np.float32(0.01)) for w in loaded.state_dict().values())


def test_the_published_size():
    """24 blocks of width 2048, counted by hand, in a model whose weights take no memory."""
    w, d = 2048, 1024
    block = 12 * w**2 + (3 + 1 + 4 + 1) * w + 4 * w
    ends = 2 * (d * w + w) + 2 * (w * w + w) + (d * w + w) + w + (w * d + d)
    assert DiffusionPrior(DALLE_2_PRIOR, Blank()).count_parameters() == 24 * block + 2 * w + ends


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"transformer": TransformerConfig(8, 1, 1)}, "a causal transformer"),
        ({"context": 0}, "sizes of at least 1"),
        ({"embedding": 0}, "sizes of at least 1"),
        ({"text_drop": -0.1}, r"dropped captions must be in \[0, 1\], got -0.1"),
        ({"schedule": "steep"}, "schedule must be one of linear.*got 'steep'"),
    ],
)
def test_bad_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **fields)


def test_bad_calls_are_refused():
    model, text, empty = made(), captions(3, dtype=np.float32), captions(1, 9, np.float32)
    with pytest.raises(ValueError, match="guidance must be a finite number, got inf"):
        model.denoiser(text, math.inf, empty)
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        model.sample(text, Rng(0), candidates=0, empty=empty)
    with pytest.raises(ValueError, match="3 images are told one thing, or one each, got 2"):
        model.sample(text, Rng(0), empty=captions(2, dtype=np.float32))
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.50"):
        model.sample(text, Rng(0), Sampling(steps=51), empty=empty)
    with pytest.raises(ValueError, match="told the embeddings of captions, z_t"):
        model.sample(dataclasses.replace(text, vector=None), Rng(0), Sampling(steps=2), empty=empty)
