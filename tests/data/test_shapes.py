"""Scenes of coloured shapes: pictures against a painter of points, and what random scenes may be."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tinydiff import Rng
from tinydiff.data import shapes
from tinydiff.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    OPPOSITE,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Item,
    Scene,
    draw,
    random_scene,
    relation,
)

SEEDS = st.integers(0, 10_000)
RED, BLUE = Item("circle", "red", "big", 0.25, 0.5), Item("star", "blue", "small", 0.75, 0.5)
TWO = Scene((RED, BLUE), "grey")


# ------------------------------------------------------------------------------- what there may be


def test_six_shapes_eight_colours_two_sizes_nine_places():
    assert SHAPES == ("circle", "square", "triangle", "star", "ring", "cross")
    assert (len(COLOURS), len(SIZES), len(PLACES), len(BACKGROUNDS)) == (8, 2, 9, 5)


def test_held_out_pairs_leave_every_shape_and_colour_to_learn_from():
    assert len(set(HELD_OUT)) == 8 and {colour for _, colour in HELD_OUT} == set(COLOURS)
    seen = [pair for pair in itertools.product(SHAPES, COLOURS) if pair not in HELD_OUT]
    assert min(sum(shape == s for s, _ in seen) for shape in SHAPES) >= 6


def test_colours_are_far_from_each_other_and_from_what_is_behind():
    behind = [np.mean(pair, axis=0) for pair in BACKGROUNDS.values()]
    for (_, a), b in itertools.product(COLOURS.items(), [*COLOURS.values(), *behind]):
        assert a == tuple(b) or np.linalg.norm(np.subtract(a, b)) > 90


@pytest.mark.parametrize("name", PLACES)
def test_an_item_knows_its_place(name):
    x, y = PLACES[name]
    for dx, dy in itertools.product((-0.13, 0, 0.13), repeat=2):
        assert Item("ring", "red", "big", x + dx, y + dy).place == name
    assert ("left" in name, "right" in name, "top" in name, "bottom" in name) == (x < 0.4, x > 0.6, y < 0.4, y > 0.6)


# ------------------------------------------------------------------------------- drawing


def covered(shape, x, y):
    """Whether points lie in a shape of half height 1 around (0, 0), by inequalities; y points down."""
    r = np.hypot(x, y)
    if shape in ("circle", "ring"):
        return r < 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.86
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.36) & (np.maximum(abs(x), abs(y)) < 1)
    if shape == "triangle":
        return (y < 0.85) & (abs(x) < 1.05 * (y + 1) / 1.85)
    angle = np.mod(np.arctan2(x, -y), 2 * math.pi / 5)  # of a star: from the nearest tip
    angle = np.minimum(angle, 2 * math.pi / 5 - angle)  # to the nearest notch, mirrored
    tip, notch = np.array([1.1, 0.0]), 0.48 * np.array([math.cos(math.pi / 5), math.sin(math.pi / 5)])
    edge = notch - tip
    px, py = r * np.cos(angle), r * np.sin(angle)
    return edge[0] * (py - tip[1]) - edge[1] * (px - tip[0]) > 0


def painted(scene, size, fine=12):
    """The picture, point by point."""
    at = (np.arange(size * fine) + 0.5) / (size * fine)
    x, y = at[None, :], at[:, None]
    first, second = map(np.array, BACKGROUNDS[scene.background])
    row, column = np.broadcast_arrays(np.floor(4 * y), np.floor(4 * x))
    odd = (row if scene.background == "striped" else row + column) % 2 == 1
    picture = np.where(odd[..., None], second, first).astype(float)
    for item in scene.items:
        half = SIZES[item.size]
        here = covered(item.shape, (x - item.x) / half, (y - item.y) / half)
        if item.shape == "ring":
            here &= np.hypot(x - item.x, y - item.y) > half - shapes.RING_WIDTH
        picture[here] = COLOURS[item.colour]
    return picture.reshape(size, fine, size, fine, 3).mean(axis=(1, 3))


@pytest.mark.parametrize(("shape", "size"), list(itertools.product(SHAPES, SIZES)))
def test_a_picture_is_what_a_painter_of_points_paints(shape, size):
    for background, (x, y) in zip(BACKGROUNDS, PLACES.values(), strict=False):
        scene = Scene((Item(shape, "orange", size, x + 0.01, y - 0.02),), background)
        difference = abs(draw(scene, 32).astype(float) - painted(scene, 32))  # an eighth of a pixel at most
        assert difference.max() < 60 and difference.mean() < 0.8, (background, difference.max(), difference.mean())


@PROPERTY
@given(seed=SEEDS)
def test_pictures_of_two_sizes_are_the_same(seed):
    scene = random_scene(Rng(seed))
    small, large = draw(scene, 32), draw(scene, 64)
    assert small.shape == (32, 32, 3) and large.shape == (64, 64, 3) and small.dtype == large.dtype == np.uint8
    assert abs(large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)) - small).max() <= 2


@pytest.mark.parametrize("size", [1, 28, 100, 300])
def test_pictures_of_any_size(size):
    picture = draw(TWO, size)
    assert picture.shape == (size, size, 3)
    assert abs(picture.mean(axis=(0, 1)) - draw(TWO, 32).mean(axis=(0, 1))).max() < 3


def test_later_things_are_drawn_on_top():
    ring_last = Scene((Item("square", "red", "big", 0.5, 0.5), Item("circle", "blue", "small", 0.5, 0.5)), "white")
    assert draw(ring_last)[16, 16].tolist() == list(COLOURS["blue"])
    assert draw(dataclasses.replace(ring_last, items=ring_last.items[::-1]))[16, 16].tolist() == list(COLOURS["red"])


def test_a_scene_of_nothing():
    assert (draw(Scene((), "black"), 8) == BACKGROUNDS["black"][0]).all()


# ------------------------------------------------------------------------------- relations


@PROPERTY
@given(st.tuples(*[st.floats(0, 1)] * 4), st.sampled_from(list(itertools.product(SIZES, repeat=2))))
def test_a_relation_and_its_opposite(centres, sizes):
    x_a, y_a, x_b, y_b = centres
    a, b = Item("ring", "red", sizes[0], x_a, y_a), Item("star", "blue", sizes[1], x_b, y_b)
    if abs(x_a - x_b) != abs(y_a - y_b):
        assert relation(b, a) == OPPOSITE[relation(a, b)]


@pytest.mark.parametrize(
    ("x", "y", "size", "expected"),
    [
        (0.75, 0.6, "small", "left of"),
        (0.25, 0.4, "small", "right of"),
        (0.4, 0.75, "small", "above"),
        (0.6, 0.25, "big", "below"),
        (0.52, 0.48, "big", "inside"),
        (0.52, 0.51, "small", "left of"),
    ],
)
def test_relations_by_hand(x, y, size, expected):
    assert relation(Item("ring", "red", "small", 0.5, 0.5), Item("ring", "blue", size, x, y)) == expected


# ------------------------------------------------------------------------------- random scenes


@pytest.mark.parametrize("split", SPLITS)
def test_random_scenes(split):
    scenes = [random_scene(Rng(0).at(i), split) for i in range(1500)]
    items = [item for scene in scenes for item in scene.items]
    pairs = [(item.shape, item.colour) for item in items]
    for names, found in (
        (SHAPES, [i.shape for i in items]),
        (COLOURS, [i.colour for i in items]),
        (SIZES, [i.size for i in items]),
        (PLACES, [i.place for i in items]),
        (BACKGROUNDS, [s.background for s in scenes]),
    ):
        assert min(found.count(name) for name in names) > 0.3 * len(found) / len(names)
    if split == "held-out":
        assert all(sum((i.shape, i.colour) in HELD_OUT for i in scene.items) == 1 for scene in scenes)
        assert set(HELD_OUT) < set(pairs)
    else:
        assert set(pairs) == set(itertools.product(SHAPES, COLOURS)) - set(HELD_OUT)
    for item in items:
        x, y = PLACES[item.place]
        assert max(abs(item.x - x), abs(item.y - y)) < 0.031
        half = SIZES[item.size]
        assert half <= min(item.x, item.y) and max(item.x, item.y) <= 1 - half


def test_two_things_have_one_relation_clearly():
    scenes = [random_scene(Rng(1).at(i), number=2) for i in range(1500)]
    relations = [relation(*scene.items) for scene in scenes]
    assert {name: relations.count(name) > 200 for name in OPPOSITE} == {name: name != "inside" for name in OPPOSITE}
    for (a, b), name in zip((scene.items for scene in scenes), relations, strict=True):
        near, far = sorted((abs(a.x - b.x), abs(a.y - b.y)))
        if name == "around":
            assert a.shape in shapes.CONTAINERS and far == 0
        else:
            assert far - near > 0.15 and far >= SIZES[a.size] + SIZES[b.size]


def test_random_scenes_are_the_same_on_every_device(device):
    assert random_scene(Rng(3)) == random_scene(Rng(3, "cpu"))
    assert len({random_scene(Rng(seed)) for seed in range(20)}) == 20


def test_the_number_of_things():
    for number in (1, 2):
        assert {len(random_scene(Rng(i), "test", number).items) for i in range(20)} == {number}
    assert 0.4 < np.mean([len(random_scene(Rng(i)).items) == 1 for i in range(400)]) < 0.6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Item("dog", "red", "big", 0, 0), "the shape must be one of circle.*got 'dog'"),
        (lambda: Item("ring", "white", "big", 0, 0), "the colour must be one of red.*got 'white'"),
        (lambda: Item("ring", "red", "huge", 0, 0), "the size must be one of small, big, got 'huge'"),
        (lambda: Item("ring", "red", "big", 0, 1.1), r"in \[0, 1\], got x = 0, y = 1.1"),
        (lambda: Item("ring", "red", "big", math.nan, 0), r"in \[0, 1\], got x = nan"),
        (lambda: Scene((RED,), "green"), "the background must be one of white.*got 'green'"),
        (lambda: Scene((RED, RED), "grey"), "must differ in colour, got red, red"),
        (lambda: draw(TWO, 0), "at least 1, got 0"),
        (lambda: random_scene(Rng(0), "valid"), "the split must be one of train, test, held-out, got 'valid'"),
        (lambda: random_scene(Rng(0), number=3), "1 or 2 things, got 3"),
    ],
)
def test_what_cannot_be(call, words):
    with pytest.raises(ValueError, match=words):
        call()
