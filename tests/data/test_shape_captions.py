"""Captions of scenes: understood again, told from what they are not, and leaving out what they should."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_shapes import RED, SEEDS, TWO
from tests.diffusion.common import PROPERTY
from tinydiff import Rng
from tinydiff.data import shape_captions
from tinydiff.data.captioned import Shapes
from tinydiff.data.shape_captions import Description, Named, caption, parse
from tinydiff.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Item,
    Scene,
    random_scene,
    relation,
)


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


def test_captions_are_the_same_on_every_device(device):
    assert caption(TWO, Rng(3)) == caption(TWO, Rng(3, "cpu"))


@pytest.mark.parametrize("brief", [False, True])
def test_captions_leave_out_about_what_they_are_said_to(brief):
    """Without a shape the colour is always named."""
    _, captions = Shapes(4, number=1, brief=brief).draw(Rng(0), 1500)
    descriptions, often = [parse(text) for text in captions], shape_captions.BRIEF if brief else shape_captions.NAMED
    expected = often | {"colour": 1 - often["shape"] * (1 - often["colour"])}
    for kind in ("shape", "colour", "size", "place"):
        named = np.mean([getattr(d.things[0], kind) is not None for d in descriptions])
        assert abs(named - expected[kind]) < 0.05, kind
    assert abs(np.mean([d.background is not None for d in descriptions]) - often["background"]) < 0.05


def test_every_phrase_is_said_and_understood_as_one_thing():
    spoken = " | ".join(caption(random_scene(Rng(0).at(i)), Rng(1).at(i)) for i in range(3000))
    for kind, meanings in shape_captions.PHRASES.items():
        for says, phrases in meanings.items():
            for phrase in phrases:
                assert shape_captions.LEXICON[phrase][1] == says
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


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: caption(Scene((), "grey"), Rng(0)), "one or two things, got 0"),
        (lambda: Named(shape="dog"), "the shape must be one of"),
        (lambda: Named(place="here"), "the place must be one of"),
        (lambda: Description((Named(), Named()), "near"), "the relation must be one of"),
        (lambda: Description((Named(),), "above"), "one of two things, got 1"),
        (lambda: Description((Named(),), None, "green"), "the background must be one of"),
    ],
)
def test_what_cannot_be_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()
