"""Captions of scenes of shapes, written, and understood again.

caption(scene, rng)                   "a big red circle above a small blue star on a grey background"
parse("a red circle").fits(scene)     whether the scene is what a caption says; .report(scene): and what of it

A caption is a row of phrases of PHRASES in the order of GRAMMAR, so that `parse` is the exact inverse of `caption`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinydiff.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    PLACES,
    SHAPES,
    SIZES,
    Item,
    Scene,
    check_name,
    host_generator,
    one_of,
    relation,
)
from tinydiff.rng import Rng

PHRASES: dict[str, dict[str | None, tuple[str, ...]]] = {
    "lead": {None: ("a picture of", "a drawing of", "there is")},
    "article": {None: ("a", "an", "the", "one")},
    "size": {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")},
    "colour": {**{name: (name,) for name in COLOURS}, "cyan": ("cyan", "turquoise"), "purple": ("purple", "violet")},
    "thing": {
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle",),
        "star": ("star",),
        "ring": ("ring", "hoop"),
        "cross": ("cross", "plus"),
        None: ("thing", "shape", "object"),
    },
    "place": {
        "top left": ("in the top left", "in the top left corner", "at the upper left"),
        "top": ("at the top", "at the top centre"),
        "top right": ("in the top right", "in the top right corner", "at the upper right"),
        "left": ("on the left", "at the left"),
        "centre": ("in the centre", "in the middle", "in the center"),
        "right": ("on the right", "at the right"),
        "bottom left": ("in the bottom left", "in the bottom left corner", "at the lower left"),
        "bottom": ("at the bottom", "at the bottom centre"),
        "bottom right": ("in the bottom right", "in the bottom right corner", "at the lower right"),
    },
    "relation": {
        "left of": ("left of", "to the left of", "on the left of"),
        "right of": ("right of", "to the right of", "on the right of"),
        "above": ("above", "over"),
        "below": ("below", "under", "beneath"),
        "inside": ("inside", "within", "inside of"),
        "around": ("around", "surrounding"),
    },
    "also": {None: ("and",)},
    "background": {
        "white": ("on a white background", "on white"),
        "grey": ("on a grey background", "on grey", "on a gray background"),
        "black": ("on a black background", "on black"),
        "striped": ("on a striped background", "on stripes"),
        "checked": ("on a checked background", "on squares"),
    },
}
"""All that captions are made of: for each kind of phrase, and each thing it can say, the ways to say it."""

LETTERS = {kind: kind[0].upper() for kind in PHRASES} | {"article": "D", "also": "+"}
"""One for each kind, so that a caption is a word, and its grammar a regular expression."""

THING = "D?S?C?TP?"
GRAMMAR = re.compile(f"L?(?P<first>{THING})((?P<link>[R+])(?P<second>{THING}))?B?")

LEXICON = {
    phrase: (LETTERS[kind], says)
    for kind, meanings in PHRASES.items()
    for says, phrases in meanings.items()
    for phrase in phrases
}
"""What each phrase is, and what it says."""

LONGEST = max(len(phrase.split()) for phrase in LEXICON)

NAMED = {"shape": 0.95, "colour": 0.95, "size": 0.8, "place": 0.7, "relation": 0.8, "background": 0.6}
"""How often a caption says each."""

BRIEF = {"shape": 0.6, "colour": 0.6, "size": 0.25, "place": 0.25, "relation": 0.5, "background": 0.2}
"""The same of a brief caption, such as "a star": each word then has to be worth something by itself."""

LEADS = 0.1
"""How often it begins with "a picture of", or the like."""


def caption(scene: Scene, rng: Rng, full: bool = False, brief: bool = False) -> str:
    """Describe a scene of one or two things in words, the same ones for equal rng.

    Of one thing it may name shape, colour, size and place; of two, shapes, colours and sizes, and either their relation
    or their places; each is left out at times (NAMED), and there are several ways to say it (PHRASES). full: names
    everything (of two things, their relation). brief: leaves out more (BRIEF). Raises ValueError for a scene of another
    number of things.
    """
    if len(scene.items) not in (1, 2):
        raise ValueError(f"captions are of one or two things, got {len(scene.items)}")
    draws, named = host_generator(rng), BRIEF if brief else NAMED

    def says(what: str) -> bool:
        return full or draws.random() < named[what]

    def thing(item: Item, place: bool) -> str:
        shape, colour = (item.shape, says("colour")) if says("shape") else (None, True)
        words = [_say(draws, "size", item.size)] if says("size") else []
        words += [_say(draws, "colour", item.colour)] if colour else []
        words += [_say(draws, "thing", shape)]
        words += [_say(draws, "place", item.place)] if place and says("place") else []
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])

    order = draws.permutation(len(scene.items))
    items = [scene.items[i] for i in order]
    parts = [_say(draws, "lead", None)] if not full and draws.random() < LEADS else []
    if len(items) == 2 and says("relation"):
        parts += [thing(items[0], False), _say(draws, "relation", relation(*items)), thing(items[1], False)]
    else:
        parts += [" and ".join(thing(item, True) for item in items)]
    parts += [_say(draws, "background", scene.background)] if says("background") else []
    return " ".join(parts)


def _say(draws: np.random.Generator, kind: str, what: str | None) -> str:
    return one_of(draws, PHRASES[kind][what])


# ---------------------------------------------------------------------------------------- understanding them


@dataclass(frozen=True)
class Named:
    """What a caption says of a thing, None where it says nothing.

    Raises ValueError for a name that is none of SHAPES, COLOURS, SIZES or PLACES.
    """

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        for kind, names in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
            if getattr(self, kind) is not None:
                check_name(kind, getattr(self, kind), names)

    def report(self, item: Item | None) -> dict[str, bool]:
        """For each attribute that is named, whether a thing has it; None has none."""
        named = {kind: says for kind, says in vars(self).items() if says is not None}
        return {kind: item is not None and getattr(item, kind) == says for kind, says in named.items()}


@dataclass(frozen=True)
class Description:
    """What a caption says of a scene: of its things, of how the first lies to the second, of what is behind them.

    relation, background: None where it says nothing. Raises ValueError for names that are none of OPPOSITE or
    BACKGROUNDS, or a relation of other than two things.
    """

    things: tuple[Named, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        if self.relation is not None:
            check_name("relation", self.relation, OPPOSITE)
            if len(self.things) != 2:
                raise ValueError(f"a relation is one of two things, got {len(self.things)}")
        if self.background is not None:
            check_name("background", self.background, BACKGROUNDS)

    def report(self, scene: Scene) -> dict[str, bool]:
        """Whether a scene is as described: the number of its things, and each kind of attribute that is named.

        Returns {"number": ..., "shape": ..., "colour": ..., "size": ..., "place": ..., "relation": ...,
        "background": ...}, without those of which nothing is said; "shape" is whether all shapes named are right. Which
        of the scene's things is which is settled in the scene's favour.
        """
        candidates = itertools.permutations([*scene.items, *[None] * len(self.things)], len(self.things))
        return max((self._report(items, scene) for items in candidates), key=lambda report: sum(report.values()))

    def _report(self, items: Sequence[Item | None], scene: Scene) -> dict[str, bool]:
        report = {"number": len(scene.items) == len(self.things)}
        for named, item in zip(self.things, items, strict=True):
            for kind, right in named.report(item).items():
                report[kind] = report.get(kind, True) and right
        if self.relation is not None:
            a, b = items
            report["relation"] = a is not None and b is not None and relation(a, b) == self.relation
        if self.background is not None:
            report["background"] = scene.background == self.background
        return report

    def fits(self, scene: Scene) -> bool:
        """Whether a scene is as described in everything."""
        return all(self.report(scene).values())


def parse(text: str) -> Description:
    """Understand a caption: every one that `caption` writes, and what else is written by GRAMMAR.

    Raises ValueError that names the word, or the order, that is not understood.
    """
    phrases = list(_phrases(re.findall(r"[^\s,.;]+", text.lower())))
    match = GRAMMAR.fullmatch("".join(letter for letter, _ in phrases))
    if match is None:
        raise ValueError(f'{text!r} is not built as "a big red circle left of a small blue star on a grey background"')
    things = tuple(_named(phrases[slice(*match.span(part))]) for part in ("first", "second") if match[part])
    said = dict(phrases)
    return Description(things, said.get("R"), said.get("B"))


def _named(phrases: list[tuple[str, str | None]]) -> Named:
    said = dict(phrases)
    return Named(said.get("T"), said.get("C"), said.get("S"), said.get("P"))


def _phrases(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """The phrases that words make, each as long as can be: its letter and what it says."""
    start = 0
    while start < len(words):
        ends = range(min(start + LONGEST, len(words)), start, -1)
        found = next((end for end in ends if " ".join(words[start:end]) in LEXICON), None)
        if found is None:
            raise ValueError(f"captions of shapes know no {words[start]!r} here: {' '.join(words)!r}")
        yield LEXICON[" ".join(words[start:found])]
        start = found
