"""The text encoder trained on texts alone: its loss, what is hidden, what a token sees, what it learns."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tests.helpers import assert_close
from tests.models.common import stirred
from tests.nn import reference
from tests.nn.common import layer_gradcheck, randomised
from tinydiff import Rng, backend
from tinydiff.checkpoint import CheckpointError
from tinydiff.models import CLIP, CLIPConfig, TextDiffusion, TextDiffusionConfig, Tokenizer, told_texts
from tinydiff.models.text_encoder import MaskedTextEncoder, TextEncoderConfig, load_text_encoder
from tinydiff.models.tokenizer import BYTES, END, MERGED, PAD, START, clean
from tinydiff.nn import TransformerConfig, UNetConfig
from tinydiff.optim import AdamW
from tinydiff.train import Training, TrainSettings

CAPTIONS = ["a red star", "a blue ring on grey", "", "a blue star"]
MERGES = Tokenizer.train(map(clean, CAPTIONS * 2), MERGED + 40).merges  # each word is one token
DIFFUSION = TextDiffusionConfig(UNetConfig(3, 8, (1,), 1, (0,), heads=2, context=8), (4, 4))
SMALL = TextEncoderConfig(MERGES, length=8, text=TransformerConfig(8, 2, 2, 2))


def made(dtype=np.float64, **fields):
    return randomised(MaskedTextEncoder(dataclasses.replace(SMALL, **fields), Rng()), dtype=dtype)


def host(*arrays):
    return [backend.to_numpy(a) for a in arrays]


# --------------------------------------------------------------------------------------- against loops


def slow_loss(weights, shown, mask, ids, hidden):
    """-log of the probability of each hidden token, one after the other; each text alone, without its padding."""
    total, own = 0.0, reference.part
    for text, true, there, asked in zip(shown, ids, mask, hidden, strict=True):
        n = int(there.sum())
        x = np.array([weights["text.tokens.weight"][i] for i in text[:n]]) + weights["text.places"][:n]
        h = reference.transformer(x[None], own(weights, "text.transformer"), SMALL.text)[0]
        logits = reference.linear(h, own(weights, "head"))
        total -= sum(
            math.log(math.exp(z[y]) / np.exp(z).sum()) for z, y, a in zip(logits, true, asked, strict=False) if a
        )
    return total / hidden.sum()


def test_the_loss_is_the_loop(device):
    model = made()
    ids, mask = model.tokens(CAPTIONS)
    drawn = model.draw(ids, mask, Rng(3))
    expected = slow_loss(model.state_dict(), *host(*drawn))
    assert model.loss(ids, mask, Rng(3)).item() == pytest.approx(expected, rel=1e-9)
    assert model.loss_of(*drawn).item() == pytest.approx(expected, rel=1e-9)


def test_gradients(device):
    model = made()
    drawn = model.draw(*model.tokens(CAPTIONS), Rng(3))
    assert layer_gradcheck(model, call=lambda: model.loss_of(*drawn)) <= 1e-6


def test_texts_without_a_word_cost_nothing():
    model = made()
    assert model.loss(*model.tokens(["", ""]), Rng(0)).item() == 0


def test_an_untrained_encoder_starts_near_the_logarithm_of_the_vocabulary():
    model = MaskedTextEncoder(TextEncoderConfig(MERGES), Rng(1))
    assert len(model.text.tokens.weight) == 1 + len(model.tokenizer) == 1 + model.mask_token
    assert abs(model.loss(*model.tokens(CAPTIONS * 8), Rng(2)).item() - math.log(len(model.tokenizer))) < 1.5


# ------------------------------------------------------------------------------------------ what is hidden


@PROPERTY
@given(st.floats(0.01, 1), st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=5), st.integers(0, 2**32))
def test_words_are_chosen_and_nothing_else(share, texts, seed):
    """One at least of each text that has any, and all if the share is 1."""
    model = made(hidden=share)
    ids, _ = model.tokens(texts)
    chosen = model.chosen(ids, Rng(seed))
    assert not chosen[np.isin(ids, (START, END, PAD))].any()
    assert [row.any() for row in chosen] == [text != "" for text in texts]
    assert share < 1 or chosen.sum() == (ids >= BYTES).sum()


def test_so_many_are_chosen_and_of_these_so_many_hidden(device):
    """A share of all tokens; of these 80 % hidden, 10 % another token, 10 % as they are, and no other is changed."""
    model, n = made(hidden=0.4, length=302), 100
    ids, mask = model.tokens([" ".join(["star"] * 300)] * n)
    shown, _, true, hidden = host(*model.draw(ids, mask, Rng(1)))
    np.testing.assert_array_equal(true, backend.to_numpy(ids))
    assert hidden[:, 1:301].mean() == pytest.approx(0.4, abs=0.01)
    np.testing.assert_array_equal(shown[~hidden], true[~hidden])
    as_before, asked = (shown == true)[hidden].mean(), (shown == model.mask_token)[hidden].mean()
    assert (asked, as_before) == pytest.approx((0.8, 0.1), abs=0.015)
    others = shown[hidden & (shown != true) & (shown != model.mask_token)]
    assert others.min() >= BYTES and others.max() < model.mask_token and len(set(others.tolist())) > 200


def test_each_draw_hides_others_and_equal_streams_the_same():
    model = made()
    ids, mask = model.tokens(CAPTIONS)
    one, same, other = (np.stack(model.draw(ids, mask, Rng(seed))[::3]) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


# -------------------------------------------------------------------------------------- what a token sees


def test_a_token_sees_those_before_and_after_it_and_no_padding(device):
    model = made()
    ids, mask = model.tokens(["a red star"])
    states, n = backend.to_numpy(model.text_states(ids, mask).data), 5
    assert states.shape == (1, 8, 8)
    for place in range(n):
        other = backend.to_numpy(ids).copy()
        other[0, place] = BYTES
        changed = backend.to_numpy(model.text_states(backend.to_device(other), mask).data)
        assert (np.abs(changed - states)[0, :n].max(axis=1) > 1e-6).all()
    other = np.where(backend.to_numpy(mask), backend.to_numpy(ids), BYTES)
    unseen = backend.to_numpy(model.text_states(backend.to_device(other), mask).data)
    np.testing.assert_array_equal(unseen[0, :n], states[0, :n])
    assert_close(model.text_states(ids[:, :n], mask[:, :n]), states[:, :n], rtol=1e-12)


def test_it_learns_a_language():
    """Red things are stars and blue ones rings, but for one text in three, in which a ring is on a star."""
    texts = ["a red star", "a blue ring", "a blue ring on a red star"]
    model = MaskedTextEncoder(dataclasses.replace(SMALL, length=10, text=TransformerConfig(16, 1, 2)), Rng(0))
    ids, mask = model.tokens(texts * 8)
    adam = AdamW(model.parameters())
    for step in range(150):
        model.loss(ids, mask, Rng(step)).backward()
        adam.step(1e-2)
    for text, word in {"a red ___": "star", "a ___ ring": "blue", "A ___ ring on a red star": "blue"}.items():
        guess, p = model.fill(text)[0]
        assert guess == word and p > 0.8, text


def test_guesses_are_likeliest_first(device):
    model = made(np.float32)
    guessed = model.fill("a red ___", n=10_000)
    p = [p for _, p in guessed]
    assert len(p) == len(model.tokenizer) and p == sorted(p, reverse=True) and sum(p) == pytest.approx(1, abs=1e-5)
    assert [pair[0] for pair in model.fill("a red ___", n=2)] == [pair[0] for pair in guessed[:2]]
    ids = [START, *model.tokenizer.encode(" a red"), model.mask_token, END]
    row = backend.to_device(np.array([ids]))
    logits = backend.to_numpy(model.logits(row, row >= 0).data)[0, -2].astype(float)
    assert p[0] == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum(), rel=1e-4)


# ------------------------------------------------------------------------------------------------- its use


def test_a_unet_may_listen_to_it(device):
    """Of the texts, a TextDiffusion is told the states: it draws, and draws otherwise for another text."""
    encoder = stirred(MaskedTextEncoder(SMALL, Rng(1)))
    told = told_texts(encoder, CAPTIONS[:2])
    assert told.states.shape == (2, 8, 8) and told.mask.shape == (2, 8)
    model = stirred(
        TextDiffusion(TextDiffusionConfig(UNetConfig(3, 8, (1,), 1, (0,), heads=2, context=8), (4, 4)), Rng(2))
    )
    x = Rng(3).normal((1, 4, 4, 3))
    one, other = (model(x, np.array([5]), told_texts(encoder, text)).data for text in CAPTIONS[:2])
    assert np.abs(backend.to_numpy(one) - backend.to_numpy(other)).max() > 1e-5


def saved(model, folder):
    Training(model, TrainSettings(1), folder / "checkpoint.npz", {}).save()
    return folder


def test_it_is_loaded_with_its_averaged_weights_and_its_words(tmp_path):
    training = Training(MaskedTextEncoder(SMALL, Rng(0)), TrainSettings(2), tmp_path / "checkpoint.npz", {})
    training.ema.average[...] = 0.01
    training.save()
    loaded = MaskedTextEncoder.load(tmp_path)
    assert loaded.config == SMALL and loaded.tokenizer.merges == MERGES and not loaded.training
    assert all(np.all(w == np.float32(0.01)) for w in loaded.state_dict().values())


def test_either_text_encoder_is_loaded(tmp_path):
    towers = {"text": TransformerConfig(8, 1, 2, causal=True), "image": TransformerConfig(8, 1, 2)}
    for model in (MaskedTextEncoder(SMALL, Rng(0)), CLIP(CLIPConfig(**towers), Rng(0))):
        (tmp_path / model.kind).mkdir()
        loaded = load_text_encoder(saved(model, tmp_path / model.kind))
        assert type(loaded) is type(model) and loaded.config.text == model.config.text
    with pytest.raises(CheckpointError, match="expected 'clip' or 'text-encoder', got 'text-diffusion'"):
        load_text_encoder(saved(TextDiffusion(DIFFUSION, Rng(0)), tmp_path))
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_text_encoder(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": TransformerConfig(8, 1, 1, causal=True)}, "not causal"),
        ({"hidden": 0.0}, r"must be in \(0, 1\], got 0.0"),
        ({"hidden": 1.1}, "got 1.1"),
        ({"hidden": math.nan}, "got nan"),
        ({"length": 1}, "2 tokens and 2 places"),
    ],
)
def test_an_encoder_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        TextEncoderConfig(**fields)


def test_bad_input():
    model = made(np.float32)
    for text in ("a red star", "a ___ ___"):
        with pytest.raises(ValueError, match="a text with one ___"):
            model.fill(text)
    with pytest.raises(ValueError, match="guesses above 0, got 'a ___' and 0"):
        model.fill("a ___", n=0)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        model.fill("a red ___ on a red star on grey")
    with pytest.raises(ValueError, match="a list of texts"):
        model.tokens("a red star")
    with pytest.warns(UserWarning, match="was cut to 6"):
        model.tokens(["a red star " * 3])
