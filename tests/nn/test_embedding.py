"""Embeddings of whole numbers and of times (E20)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised
from tinydiff.backend import to_device
from tinydiff.nn import Embedding, TimeEmbedding, sinusoidal
from tinydiff.rng import Rng


@pytest.mark.parametrize("rows", [3, [4, 0, 4], [[1, 2], [3, 4]], []])
def test_embedding_picks_rows(rows, device):
    layer = Embedding(5, 3, Rng(1))
    rows = np.array(rows, int)
    assert_close(layer(rows), layer.weight.numpy()[rows])
    assert_close(layer(to_device(rows)), layer.weight.numpy()[rows])  # the rows may lie on either device


def test_embedding_gradients_add_up_for_a_row_picked_twice(device):
    layer, rows = randomised(Embedding(5, 3, Rng())), np.array([[1, 4], [4, 4]])
    g = draw(2, 2, 3)
    layer(rows).backward(to_device(g))
    expected = np.zeros((5, 3))
    for row, piece in zip(rows.ravel(), g.reshape(-1, 3), strict=True):
        expected[row] += piece
    assert_close(layer.weight.grad, expected, rtol=1e-14)


@pytest.mark.parametrize(("rows", "got"), [([0, 5], r"0\.\.5"), ([-1], r"-1\.\.-1")])
def test_a_row_outside_the_table_is_refused(rows, got, device):
    with pytest.raises(IndexError, match=rf"rows must be in 0\.\.4, got {got}"):
        Embedding(5, 3, Rng())(np.array(rows))


@given(t=st.lists(st.integers(0, 4000) | st.floats(0, 1), min_size=1, max_size=5), half=st.integers(1, 20))
def test_sinusoidal_is_the_formula(t, half):
    e = sinusoidal(np.array(t), 2 * half)
    assert_close(e, reference.sinusoidal(t, 2 * half), atol=1e-11)


def test_sinusoidal_on_every_device(device):
    t = np.array([1, 7, 1000])
    assert_close(sinusoidal(to_device(t), 6), reference.sinusoidal(t, 6), atol=1e-12)


def test_sinusoidal_turns_with_time():
    """The embedding of t + s is a rotation of that of t by angles which depend on s alone (Vaswani et al., §3.5)."""
    t, s, half = np.arange(50), 13, 4
    now, later = sinusoidal(t, 2 * half), sinusoidal(t + s, 2 * half)
    angle = s * np.array([10_000 ** (-i / half) for i in range(half)])
    sine, cosine = now[:, :half], now[:, half:]
    turned = np.concatenate(
        [sine * np.cos(angle) + cosine * np.sin(angle), cosine * np.cos(angle) - sine * np.sin(angle)], 1
    )
    assert_close(later, turned, atol=1e-12)
    assert later[0, 0] == math.sin(13)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even number of channels, got 5"):
        sinusoidal(np.arange(3), 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_time_embedding(dtype, device):
    t, layer = np.array([1, 500, 1000]), randomised(TimeEmbedding(6, 5, Rng()), dtype=dtype)
    expected = reference.time_embedding(t, layer.state_dict())
    assert_close(layer(t), expected.astype(dtype), rtol=1e-6 if dtype is np.float32 else 1e-12)
    assert_close(layer(to_device(t)), layer(t).numpy())  # the times may lie on either device


def test_time_embedding_gradients(device):
    layer, t = randomised(TimeEmbedding(6, 5, Rng())), np.array([1, 500, 1000])
    assert layer_gradcheck(layer, call=lambda: layer(t)) <= 1e-6
