"""Random shifts: where every pixel may go, and that nothing else changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng
from tinydiff.data.augment import random_shift


@given(h=st.integers(5, 9), w=st.integers(5, 9), most=st.integers(0, 2), seed=st.integers(0, 99))
def test_each_image_moves_as_a_whole(h, w, most, seed):
    images = np.zeros((6, h, w), np.uint8)
    images[:, 2, 2], images[:, h - 3, w - 3] = 7, 9  # far enough from the border to stay inside
    moved = random_shift(images, most, Rng(seed))
    assert moved.dtype == images.dtype and moved.shape == images.shape
    for image, original in zip(moved, images, strict=True):
        down, across = np.argwhere(image == 9)[0] - (h - 3, w - 3)
        assert max(abs(down), abs(across)) <= most
        assert np.array_equal(image, np.roll(original, (down, across), axis=(0, 1)))


def test_all_shifts_occur_equally_often():
    images = np.zeros((9000, 5, 5), np.uint8)
    images[:, 2, 2] = 1
    counts = random_shift(images, 1, Rng(0)).sum(axis=0, dtype=int)
    assert counts[1:4, 1:4].min() > 850 and counts[1:4, 1:4].max() < 1150  # 1000 each, five standard deviations


@pytest.mark.parametrize("most", [0, 1])
def test_what_leaves_is_gone_and_what_enters_is_background(most):
    images = np.full((50, 4, 4), 255, np.uint8)
    moved = random_shift(images, most, Rng(1))
    assert (moved.reshape(50, -1).min(axis=1) == 0).any() == bool(most)
    assert set(np.unique(moved)) <= {0, 255}
