"""Captioned shapes: pictures against a painter of points, captions understood again and told from what they are not."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tinydiff import Rng, backend
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
    Description,
    Item,
    Named,
    Scene,
    Shapes,
    caption,
    draw,
    parse,
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
    assert caption(TWO, Rng(3)) == caption(TWO, Rng(3, "cpu"))
    assert len({random_scene(Rng(seed)) for seed in range(20)}) == 20


def test_the_number_of_things():
    for number in (1, 2):
        assert {len(random_scene(Rng(i), "test", number).items) for i in range(20)} == {number}
    assert 0.4 < np.mean([len(random_scene(Rng(i)).items) == 1 for i in range(400)]) < 0.6


# ------------------------------------------------------------------------------- captions


@PROPERTY
@given(seed=SEEDS, split=st.sampled_from(SPLITS), full=st.booleans(), brief=st.booleans())
def test_a_caption_is_understood_and_fits_its_scene(seed, split, full, brief):
    scene = random_scene(Rng(seed).at(0), split)
    description = parse(caption(scene, Rng(seed).at(1), full, brief))
    assert description.fits(scene) and len(description.things) == len(scene.items)
    if full:
        named = [vars(thing) | {"place": thing.place or description.relation} for thing in description.things]
        assert description.background == scene.background
        assert None not in [value for thing in named for value in thing.values()]


def other(names, name):
    return [n for n in names if n != name]


def changed(scene):
    """Every scene that differs in one attribute, and which it is."""
    for i, item in enumerate(scene.items):
        taken = [it.colour for it in scene.items]
        moved = [dict(zip("xy", at, strict=True)) for name, at in PLACES.items() if name != item.place]
        changes = [("shape", {"shape": s}) for s in other(SHAPES, item.shape)]
        changes += [("colour", {"colour": c}) for c in COLOURS if c not in taken]
        changes += [("size", {"size": s}) for s in other(SIZES, item.size)] + [("place", m) for m in moved]
        for kind, change in changes:
            new = dataclasses.replace(item, **change)
            yield kind, i, dataclasses.replace(scene, items=(*scene.items[:i], new, *scene.items[i + 1 :]))
    for background in other(BACKGROUNDS, scene.background):
        yield "background", None, dataclasses.replace(scene, background=background)
    yield "number", None, dataclasses.replace(scene, items=scene.items[:-1])
    unused = next(c for c in COLOURS if c not in [it.colour for it in scene.items])
    yield "number", None, dataclasses.replace(scene, items=(*scene.items, Item("star", unused, "big", 0.5, 0.5)))


@PROPERTY
@given(seed=SEEDS)
def test_a_full_caption_fits_no_scene_in_which_something_else_was_changed(seed):
    scene = random_scene(Rng(seed).at(0), number=1 + seed % 2)
    description = parse(caption(scene, Rng(seed).at(1), full=True))
    before = relation(*scene.items) if len(scene.items) == 2 else None
    for kind, _, new in changed(scene):
        if kind == "place" and before is not None:
            kind, same = "relation", relation(*new.items) == before
            assert description.fits(new) == same
            continue
        report = description.report(new)
        assert not description.fits(new) and not report[kind], (kind, new)
        if kind != "size":  # on which what is inside what depends
            assert all(right for name, right in report.items() if name != kind or kind == "number") or kind == "number"


@PROPERTY
@given(seed=SEEDS)
def test_what_a_caption_of_one_thing_leaves_out_may_be_anything(seed):
    scene = random_scene(Rng(seed).at(0), number=1)
    description = parse(caption(scene, Rng(seed).at(1)))
    (thing,) = description.things
    for kind, _, new in changed(scene):
        named = kind == "number" or (description.background if kind == "background" else getattr(thing, kind))
        assert description.fits(new) == (named is None), (kind, description)


@pytest.mark.parametrize("brief", [False, True])
def test_captions_leave_out_about_what_they_are_said_to(brief):
    """Without a shape the colour is always named."""
    _, captions = Shapes(4, number=1, brief=brief).draw(Rng(0), 1500)
    descriptions, often = [parse(text) for text in captions], shapes.BRIEF if brief else shapes.NAMED
    expected = often | {"colour": 1 - often["shape"] * (1 - often["colour"])}
    for kind in ("shape", "colour", "size", "place"):
        named = np.mean([getattr(d.things[0], kind) is not None for d in descriptions])
        assert abs(named - expected[kind]) < 0.05, kind
    assert abs(np.mean([d.background is not None for d in descriptions]) - often["background"]) < 0.05


def test_every_phrase_is_said_and_understood_as_one_thing():
    spoken = " | ".join(caption(random_scene(Rng(0).at(i)), Rng(1).at(i)) for i in range(3000))
    for kind, meanings in shapes.PHRASES.items():
        for says, phrases in meanings.items():
            for phrase in phrases:
                assert shapes.LEXICON[phrase][1] == says
                assert phrase in spoken or kind == "article", phrase


def test_understood_by_hand():
    assert parse("a big red circle above a small blue star on a grey background") == Description(
        (Named("circle", "red", "big"), Named("star", "blue", "small")), "above", "grey"
    )
    assert parse("An orange thing, at the Upper Left. ") == Description((Named(None, "orange", None, "top left"),))
    assert parse("tiny ring on the left of the huge violet box on squares") == Description(
        (Named("ring", None, "small"), Named("square", "purple", "big")), "left of", "checked"
    )
    assert parse("a star on the left and a cross on the right on white") == Description(
        (Named("star", place="left"), Named("cross", place="right")), None, "white"
    )


def test_a_report_by_hand():
    right = parse("a small blue star right of a big red circle on grey").report(TWO)
    assert right == dict.fromkeys(("number", "shape", "colour", "size", "relation", "background"), True)
    swapped = parse("a small red star right of a big blue circle on black").report(TWO)
    assert sum(swapped.values()) == 4 and not swapped["colour"] and not swapped["background"] and swapped["number"]
    alone = parse("a small blue star right of a big red circle").report(Scene((RED,), "grey"))
    assert not any(alone.values())
    more = parse("a red circle").report(TWO)
    assert more == {"number": False, "shape": True, "colour": True}
    assert not parse("a red circle").fits(Scene((), "grey"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not built as"),
        ("a dog", "know no 'dog' here"),
        ("a red", "not built as"),
        ("a red big circle", "not built as"),
        ("a circle above", "not built as"),
        ("a circle and a star and a ring", "not built as"),
        ("a circle on a", "know no 'on' here"),
        ("круг", "know no 'круг' here"),
        ("a red 🔴", "know no '🔴' here"),
    ],
)
def test_not_understood(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


# ------------------------------------------------------------------------------- the source


@pytest.mark.parametrize("split", SPLITS)
def test_the_source(split):
    images, captions = Shapes(24).draw(Rng(5), 6, split)
    scenes = Shapes(24).scenes(Rng(5), 6, split)
    assert images.shape == (6, 24, 24, 3) and images.dtype == np.uint8
    for image, text, scene in zip(images, captions, scenes, strict=True):
        np.testing.assert_array_equal(image, draw(scene, 24))
        assert parse(text).fits(scene)
    assert Shapes(24).scenes(Rng(5), 3, split) == scenes[:3]
    assert not set(scenes) & set(Shapes().scenes(Rng(6), 6, split))


def test_the_splits_share_no_scene_and_the_source_says_how_many_things():
    train, test = (set(Shapes().scenes(Rng(0), 50, split)) for split in ("train", "test"))
    assert not train & test
    one = Shapes(8, number=1, full=True)
    assert all(len(scene.items) == 1 for scene in one.scenes(Rng(0), 20))
    assert all(parse(text).things[0].place for text in one.draw(Rng(0), 5)[1])


@PROPERTY
@given(seed=SEEDS, number=st.sampled_from([1, 2]))
def test_scenes_that_are_alike_differ_in_shapes_and_places_alone(seed, number):
    """In rows of four, of pairs seen in training: each second scene has the things of the one before, turned."""
    scenes = Shapes(number=number, alike=4).scenes(Rng(seed), 9)
    for first in (0, 4):
        row = scenes[first : first + 4]
        assert len({(s.background, *((i.colour, i.size) for i in s.items)) for s in row}) == 1
        assert len({tuple((i.x, i.y) for i in s.items) for s in (row[0], row[2])}) == 1
        for scene, turned in (row[:2], row[2:]):
            for a, b in zip(scene.items, turned.items, strict=True):
                assert (a.shape, a.x + b.x, a.y + b.y) == (b.shape, pytest.approx(1), pytest.approx(1))
        assert all((item.shape, item.colour) in shapes.SEEN for s in row for item in s.items)
        if number == 2:
            relations = [shapes.relation(*s.items) for s in row]
            inside = relations[0] in ("inside", "around")
            assert relations[::2] == [relations[0]] * 2
            assert relations[1::2] == [relations[0] if inside else OPPOSITE[relations[0]]] * 2
            assert not inside or all(s.items[0].shape in shapes.CONTAINERS for s in row)
    assert scenes[0] == Shapes(number=number).scenes(Rng(seed), 1)[0] and scenes[4].items[0] != scenes[0].items[0]
    assert scenes[:6] == Shapes(number=number, alike=4).scenes(Rng(seed), 6)


def test_alike_scenes_have_other_shapes():
    rows = np.array([[s.items[0].shape for s in Shapes(number=1, alike=6).scenes(Rng(i), 6)] for i in range(300)])
    assert np.mean(rows[:, 2:] == rows[:, :1]) == pytest.approx(1 / 5, abs=0.06)  # five shapes of each colour are seen
    assert np.mean(rows[:, 2] == rows[:, 4]) < 0.35 and set(rows[:, 4]) == set(shapes.SHAPES)


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
        (lambda: Shapes(alike=0), "at least 1 scene in a row is alike, got 0"),
        (lambda: random_scene(Rng(0), number=3), "1 or 2 things, got 3"),
        (lambda: caption(Scene((), "grey"), Rng(0)), "one or two things, got 0"),
        (lambda: Named(shape="dog"), "the shape must be one of"),
        (lambda: Named(place="here"), "the place must be one of"),
        (lambda: Description((Named(), Named()), "near"), "the relation must be one of"),
        (lambda: Description((Named(),), "above"), "one of two things, got 1"),
        (lambda: Description((Named(),), None, "green"), "the background must be one of"),
        (lambda: Shapes(32).draw(Rng(0), 0), "at least 1, got 0"),
        (lambda: Shapes(32).draw(Rng(0), 1, "valid"), "the split must be one of"),
        (lambda: Shapes(0).draw(Rng(0), 1), "at least 1, got 0"),
        (lambda: Shapes(32, number=3).draw(Rng(0), 1), "1 or 2 things, got 3"),
    ],
)
def test_what_cannot_be(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_pictures_and_captions_live_on_the_host(device):
    images, _ = Shapes(8).draw(Rng(0), 2)
    assert isinstance(images, np.ndarray) and backend.to_device(images).shape == (2, 8, 8, 3)
