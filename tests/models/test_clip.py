"""CLIP: its towers and its loss against loops, the loss's two limits, what a text sees, and the published size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import layer_gradcheck, randomised
from tests.test_rng import resident
from tinydiff import Tensor, backend
from tinydiff.checkpoint import CheckpointError
from tinydiff.models.clip import (
    CLIP,
    LARGEST_SCALE,
    TEMPERATURE,
    VIT_L_14_TEXT,
    CLIPConfig,
    TextConfig,
    TextTower,
    contrastive_loss,
)
from tinydiff.models.tokenizer import END, MERGED, PAD, START, Tokenizer
from tinydiff.nn import TransformerConfig
from tinydiff.optim import AdamW
from tinydiff.rng import Blank, Rng
from tinydiff.train import Training, TrainSettings

CAPTIONS = ["a red star", "a blue ring on grey", "", "🟥"]
SMALL = CLIPConfig(
    Tokenizer.train(CAPTIONS * 2, MERGED + 12).merges,
    length=20,
    text=TransformerConfig(8, 2, 2, 2, causal=True),
    image=TransformerConfig(8, 1, 4, 2),
    size=8,
    channels=2,
    patch=4,
    embedding=5,
)


def made(dtype=np.float64):
    model = randomised(CLIP(SMALL, Rng()), dtype=dtype)
    model.log_scale[...] = 1.5
    return model


def images(n, dtype=np.float64):
    return np.random.default_rng(n).uniform(-1, 1, (n, 8, 8, 2)).astype(dtype)


# --------------------------------------------------------------------------------------- against loops


def slow_loss(logits):
    """-log of the probability of the own caption among all, and of the own image, one after the other."""
    N, total = len(logits), 0.0
    for i in range(N):
        total -= math.log(math.exp(logits[i][i]) / sum(math.exp(logits[i][j]) for j in range(N)))
        total -= math.log(math.exp(logits[i][i]) / sum(math.exp(logits[j][i]) for j in range(N)))
    return total / (2 * N)


@PROPERTY
@given(st.integers(1, 6), st.integers(0, 2**32), st.floats(0.1, 20))
def test_the_loss_is_the_loop(N, seed, scale):
    """E25."""
    logits = scale * np.random.default_rng(seed).normal(size=(N, N))
    assert math.isclose(contrastive_loss(Tensor(logits)).item(), slow_loss(logits), rel_tol=1e-9, abs_tol=1e-12)


def slow_embeddings(weights, x, texts):
    """Both towers by the formulas of the references: image by image, text by text."""
    own = reference.part
    seen = []
    for image in x:
        h = reference.conv(image[None], own(weights, "image.convs.0"), stride=2)
        h = reference.silu(reference.group_norm(h, own(weights, "image.norms.0"), 8))
        h = reference.conv(h, own(weights, "image.convs.1"), stride=2)[0]  # 2 x 2 pixels, each a patch's
        tokens = np.array([h[0, 0], h[0, 1], h[1, 0], h[1, 1]]) + weights["image.places"]
        h = reference.transformer(tokens[None], own(weights, "image.transformer"), SMALL.image)[0].mean(axis=0)
        seen.append(h @ weights["image_head.weight"])
    read = []
    for ids in texts:  # without any padding
        tokens = np.array([weights["text.tokens.weight"][n] + weights["text.places"][k] for k, n in enumerate(ids)])
        h = reference.transformer(tokens[None], own(weights, "text.transformer"), SMALL.text)[0, -1]
        read.append(h @ weights["text_head.weight"])
    return [np.array([v / math.sqrt(sum(v * v)) for v in rows]) for rows in (seen, read)]


def test_the_whole_is_the_formula(device):
    """E25: the towers, the state at END, unit vectors, and the learned scale."""
    model, x = made(), images(4)
    texts = [[START, *model.tokenizer.encode(" a red star" if c == CAPTIONS[0] else c), END] for c in
             (CAPTIONS[0], " a blue ring on grey", "", " 🟥")]  # fmt: skip
    seen, read = slow_embeddings(model.state_dict(), x, texts)
    ids, mask = model.tokens(CAPTIONS)
    assert_close(model.embed_images(Tensor(backend.to_device(x))), seen, rtol=1e-10)
    assert_close(model.embed_texts(ids, mask), read, rtol=1e-10)
    expected = slow_loss(math.exp(1.5) * seen @ read.T)
    assert math.isclose(model.loss(backend.to_device(x), ids, mask).item(), expected, rel_tol=1e-9)


def test_gradients(device):
    model = made()
    ids, mask = model.tokens(CAPTIONS[:3])

    def loss(x):
        return contrastive_loss(model.embed_images(x) @ model.embed_texts(ids, mask).transpose() * model.scale())

    assert layer_gradcheck(model, images(3), call=loss) <= 1e-6


# ------------------------------------------------------------------------------------- what the loss says


@PROPERTY
@given(st.integers(1, 40), st.floats(-50, 50))
def test_pairs_that_all_look_alike_cost_log_n(N, value):
    """E25: the loss of a CLIP that cannot tell any pair from another."""
    assert math.isclose(contrastive_loss(Tensor(np.full((N, N), value))).item(), math.log(N), abs_tol=1e-9)


def test_an_untrained_clip_starts_near_log_n():
    model = CLIP(CLIPConfig(), Rng(1))
    x = Rng(2).uniform((64, 32, 32, 3)) * 2 - 1
    loss = model.loss(x, *model.tokens([f"picture {i}" for i in range(64)])).item()
    assert abs(loss - math.log(64)) < 0.7


@pytest.mark.parametrize("N", [2, 10, 100])
def test_pairs_that_stand_out_cost_nothing(N):
    """E25: orthogonal unit vectors, each pair aligned, at the largest scale."""
    assert contrastive_loss(Tensor(LARGEST_SCALE * np.eye(N))).item() < 1e-40 * N + 1e-12
    halves = [contrastive_loss(Tensor(scale * np.eye(N))).item() for scale in (0, 5, 10, 20, 40)]
    assert halves == sorted(halves, reverse=True)


@PROPERTY
@given(st.lists(st.integers(0, 2), min_size=2, max_size=7), st.integers(0, 2**32))
def test_equal_captions_need_no_care(which, seed):
    """E25: with equal captions in a batch, loss and gradient are those of targets shared among the equal ones."""
    rng = np.random.default_rng(seed)
    seen, read = Tensor(rng.normal(size=(len(which), 4)), True), Tensor(rng.normal(size=(3, 4)), True)
    contrastive_loss(seen @ read[np.array(which)].transpose()).backward()
    logits = seen.data @ read.data[which].T
    target = np.equal.outer(which, which) / np.equal.outer(which, which).sum(axis=1)
    rows, columns = (np.exp(a) / np.exp(a).sum(axis=1, keepdims=True) for a in (logits, logits.T))
    d_logits = ((rows - target) + (columns - target).T) / (2 * len(which))
    np.testing.assert_allclose(seen.grad, d_logits @ read.data[which], atol=1e-12)
    d_read = np.zeros((3, 4))
    np.add.at(d_read, which, d_logits.T @ seen.data)
    np.testing.assert_allclose(read.grad, d_read, atol=1e-12)


def test_the_scale_begins_at_one_over_the_temperature_and_is_capped():
    model = CLIP(SMALL, Rng())
    assert math.isclose(model.scale().item(), 1 / TEMPERATURE, rel_tol=1e-6) and TEMPERATURE == 0.07
    model.log_scale[...] = 5.0
    assert model.scale().item() == LARGEST_SCALE == 100


def test_it_learns_which_text_belongs_to_which_image():
    colours = {"red": (1, -1), "blue": (-1, 1), "pink": (1, 1), "black": (-1, -1)}
    pictures = np.stack([np.broadcast_to(np.float32(c), (8, 8, 2)) for c in colours.values()])
    model = CLIP(SMALL, Rng(0))
    ids, mask = model.tokens(list(colours))
    adam = AdamW(model.parameters())
    for _ in range(80):
        loss = model.loss(pictures, ids, mask)
        loss.backward()
        adam.step(1e-2)
    assert loss.item() < 0.1
    assert model.zero_shot(pictures, list(colours)).argmax(axis=1).tolist() == [0, 1, 2, 3]


# -------------------------------------------------------------------------------------- what a text sees


def test_a_text_does_not_see_its_padding():
    """Another length of the row, or other numbers where PAD is, change nothing in the places of the text."""
    model = made()
    ids, mask = model.tokens(CAPTIONS)
    states = model.text_states(ids, mask).data
    other = np.where(mask, ids, 7)
    np.testing.assert_array_equal(model.text_states(other, mask).data[mask], states[mask])
    assert_close(model.embed_texts(ids[:, :17], mask[:, :17]), model.embed_texts(ids, mask).data, rtol=1e-12)


def test_a_token_does_not_see_later_ones():
    model = made()
    (ids, mask), (longer, longer_mask) = model.tokens(["a red star"]), model.tokens(["a red star on grey"])
    n = int(mask.sum()) - 1  # up to END
    same = model.text_states(ids, mask).data[0, :n], model.text_states(longer, longer_mask).data[0, :n]
    np.testing.assert_array_equal(*same)


def test_case_and_blanks_do_not_count():
    model = made(np.float32)
    a, b, empty, blank = model.text_embedding(["A  Red STAR ", "a red star", "", " \n"])
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(empty, blank)
    assert np.abs(a - empty).max() > 0.01


def test_tokens_begin_and_end(device):
    ids, mask = made().tokens(["", "a red star"])
    assert backend.to_numpy(ids[0]).tolist() == [START, END] + [PAD] * 18
    assert backend.to_numpy(mask.sum(axis=1)).tolist()[0] == 2 and backend.device_of(ids) == backend.device()


# ---------------------------------------------------------------------------------------------- use


def test_embeddings_are_unit_vectors_whatever_the_batch():
    model = made(np.float32)
    seen, read = model.image_embedding(images(300, np.float32)), model.text_embedding(CAPTIONS)
    assert seen.shape == (300, 5) and read.shape == (4, 5) and seen.dtype == read.dtype == np.float32
    for rows in (seen, read):
        np.testing.assert_allclose((rows.astype(float) ** 2).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.image_embedding(images(300, np.float32)[290:]), seen[290:], atol=1e-6)


def test_zero_shot_is_the_softmax_of_scaled_cosines():
    model = made(np.float32)
    x = images(3, np.float32)
    p = model.zero_shot(x, CAPTIONS)
    logits = math.exp(1.5) * model.image_embedding(x).astype(float) @ model.text_embedding(CAPTIONS).T
    np.testing.assert_allclose(p, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-5)


def test_it_is_loaded_with_its_averaged_weights_and_its_words(tmp_path):
    training = Training(CLIP(SMALL, Rng(0)), TrainSettings(2), tmp_path / "checkpoint.npz", {})
    training.ema.average[...] = 0.01
    training.save()
    loaded = CLIP.load(tmp_path)
    assert loaded.config == SMALL and loaded.tokenizer.merges == SMALL.merges and not loaded.training
    assert all(np.all(w == np.float32(0.01)) for w in loaded.state_dict().values())


# -------------------------------------------------------------------------------------- the published size


def test_the_published_text_tower_has_123_060_480_parameters():
    """Counted by hand, and in a tower that is made without taking its 492 MB."""
    before, width = resident(), 768
    tower = TextTower(VIT_L_14_TEXT, Blank())
    block = 12 * width**2 + (3 + 1 + 4 + 1) * width + 4 * width
    by_hand = 49_408 * width + 77 * width + 12 * block + 2 * width
    assert tower.count_parameters() == by_hand == 123_060_480
    assert resident() - before < 50e6
    shapes = {name: p.shape for name, p in tower.parameters().items()}
    assert shapes["tokens.weight"] == (49_408, 768) and shapes["places"] == (77, 768)
    assert shapes["transformer.blocks.11.inner.weight"] == (768, 3072)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 0}, "sizes of at least 1"),
        ({"channels": 0}, "sizes of at least 1"),
        ({"embedding": 0}, "sizes of at least 1"),
        ({"patch": 0}, "sizes of at least 1"),
        ({"patch": 3, "size": 36}, "2, 4, 8, ... and divide .* got 3"),
        ({"patch": 1}, "got 1"),
        ({"patch": 4, "size": 34}, "and divide the size 34"),
        ({"image": TransformerConfig(12)}, "must be a multiple of 8, got 12"),
        ({"length": 1}, "2 tokens and 2 places"),
        ({"text": TransformerConfig(8, 1, 1)}, "a causal transformer"),
    ],
)
def test_a_clip_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        CLIPConfig(**fields)


def test_bad_input(tmp_path):
    model = made(np.float32)
    for shape in ((2, 6, 6, 3), (2, 8, 6, 2), (8, 8, 2)):
        with pytest.raises(ValueError, match=r"\(N, 8, 8, 2\), got"):
            model.image_embedding(np.zeros(shape, np.float32))
    for call in (lambda: model.image_embedding(images(0)), lambda: model.text_embedding([])):
        with pytest.raises(ValueError, match="one image or text at least, got none"):
            call()
    with pytest.raises(ValueError, match="a list of texts"):
        model.tokens("a red star")
    with pytest.raises(ValueError, match=r"at most 20 tokens, got ids of shape \(1, 21\)"):
        model.text(np.ones((1, 21), int), np.ones((1, 21), bool))
    with pytest.raises(ValueError, match="2 tokens and 2 places"):
        TextConfig(1, 5, SMALL.text)
    with pytest.warns(UserWarning, match="was cut to 18"):
        model.text_embedding(["a red star " * 20])
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        CLIP.load(tmp_path)
