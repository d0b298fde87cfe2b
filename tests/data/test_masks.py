"""Masks: the parts by name, and those to train on, each kind in its share."""

import numpy as np
import pytest

from tinydiff import Rng
from tinydiff.data import masks


def test_parts_by_hand():
    expected = {
        "left": ["0011"] * 4,
        "right": ["1100"] * 4,
        "top": ["0000", "0000", "1111", "1111"],
        "bottom": ["1111", "1111", "0000", "0000"],
        "centre": ["1111", "1001", "1001", "1111"],
        "all": ["0000"] * 4,
    }
    assert set(expected) == set(masks.PARTS)
    for part, rows in expected.items():
        mask = masks.without(part, (4, 4))
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, [[pixel == "1" for pixel in row] for row in rows])
    assert masks.without("top", (2, 6)).tolist() == [[False] * 6, [True] * 6]


def test_another_part():
    with pytest.raises(ValueError, match="left, right, top, bottom, centre, all, got 'middle'"):
        masks.without("middle", (4, 4))


def test_random_masks():
    drawn = masks.random_masks(Rng(0), 2000, (28, 20))
    assert drawn.shape == (2000, 28, 20, 1) and drawn.dtype == np.float32 and set(np.unique(drawn)) == {0, 1}
    known = drawn.mean(axis=(1, 2, 3))
    assert abs((known == 0).mean() - 0.1) < 0.03  # the share where all is hidden
    assert (known == 1).mean() < 0.02 and 0.4 < known.mean() < 0.6
    np.testing.assert_array_equal(drawn, masks.random_masks(Rng(0), 2000, (28, 20)))
    assert not np.array_equal(drawn, masks.random_masks(Rng(1), 2000, (28, 20)))
    often = drawn.mean(axis=(0, 3))  # no pixel is always seen, nor never
    assert 0.3 < often.min() and often.max() < 0.8


@pytest.mark.parametrize("kind", masks.SHARES)
def test_each_kind(monkeypatch, kind):
    """What it is by definition: a convex half, a rectangle or its complement, thin lines, or all."""
    monkeypatch.setattr(masks, "SHARES", {k: float(k == kind) for k in masks.SHARES})
    hidden = masks.random_masks(Rng(3), 200, (32, 32))[..., 0] == 0
    share = hidden.mean(axis=(1, 2))
    if kind == "all":
        assert hidden.all()
    elif kind == "half":
        assert 0.25 < share.min() and share.max() < 0.75
    elif kind == "strokes":
        assert 0.02 < share.min() and share.max() < 0.6 and 0.1 < share.mean() < 0.4
    else:
        for mask in hidden:
            inside = mask if not mask[0, 0] or not mask[-1, -1] else ~mask
            rows, columns = inside.any(axis=1), inside.any(axis=0)
            inside_too = ~mask
            is_box = np.array_equal(inside, np.outer(rows, columns))
            rows, columns = inside_too.any(axis=1), inside_too.any(axis=0)
            assert is_box or np.array_equal(inside_too, np.outer(rows, columns))
        assert (share < 0.65).any() and (share > 0.7).any()
