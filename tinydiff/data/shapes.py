"""Captioned shapes: endless scenes of one or two simple things, drawn, described, and descriptions understood again.

scene = random_scene(rng)                what there is, as a frozen dataclass
draw(scene, 32)                          its picture, uint8 (32, 32, 3)
caption(scene, rng)                      "a big red circle above a small blue star on a grey background"
parse("a red circle").fits(scene)        whether the scene is what a caption says; .report(scene): and what of it
Shapes(32).draw(rng, n)                  n pictures and their captions, as training wants them

A caption is a row of phrases of PHRASES in the order of GRAMMAR, so that `parse` is the exact inverse of `caption`. The
pairs in HELD_OUT, such as a red triangle, are never drawn for training: a model that draws one has put it together
itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tinydiff.rng import Rng

T = TypeVar("T")

# ---------------------------------------------------------------------------------------- what there may be

COLOURS = {
    "red": (225, 35, 35),
    "orange": (255, 135, 0),
    "yellow": (250, 230, 40),
    "green": (30, 150, 50),
    "cyan": (60, 215, 225),
    "blue": (35, 65, 225),
    "purple": (150, 50, 190),
    "pink": (255, 135, 200),
}
"""The colours of things: red, green, blue in 0..255."""

SIZES = {"small": 0.13, "big": 0.24}
"""Half the height of a thing; the picture's is 1."""

PLACES = {
    "top left": (0.22, 0.22), "top": (0.5, 0.22), "top right": (0.78, 0.22),
    "left": (0.22, 0.5), "centre": (0.5, 0.5), "right": (0.78, 0.5),
    "bottom left": (0.22, 0.78), "bottom": (0.5, 0.78), "bottom right": (0.78, 0.78),
}  # fmt: skip
"""Their centres (x, y); (0, 0) is the picture's corner at the top left, (1, 1) that at the bottom right."""

JITTER = 0.03
"""How far from these centres, along x and along y, things lie in a random scene."""

BACKGROUNDS = {
    "white": ((250, 250, 250), (250, 250, 250)),
    "grey": ((128, 128, 128), (128, 128, 128)),
    "black": ((15, 15, 15), (15, 15, 15)),
    "striped": ((185, 185, 185), (165, 165, 165)),
    "checked": ((95, 95, 95), (75, 75, 75)),
}
"""The two colours of each: of the stripes or the squares, a quarter of the picture wide."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")

RING_WIDTH = 0.065
"""Of big and small ones alike, so that a small thing lies clear inside a big ring."""

ARM = 0.36
"""Half the width of a cross's arms, where half its height is 1."""


def _wheel(*radii: float, n: int) -> list[tuple[float, float]]:
    """n points around (0, 0), clockwise from the top, at each radius in turn."""
    angles = (2 * math.pi * i / n for i in range(n))
    return [(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, itertools.cycle(radii), strict=False)]


OUTLINES = {
    "circle": _wheel(1.0, n=64),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "star": _wheel(1.1, 0.48, n=10),
    "cross": [
        (-ARM, -1.0), (ARM, -1.0), (ARM, -ARM), (1.0, -ARM), (1.0, ARM), (ARM, ARM),
        (ARM, 1.0), (-ARM, 1.0), (-ARM, ARM), (-1.0, ARM), (-1.0, -ARM), (-ARM, -ARM),
    ],
}  # fmt: skip
"""The corners (x, y) of each shape but the ring, around (0, 0) and about 1 in half its height."""

CONTAINERS = ("circle", "square", "ring")
"""Shapes that a small thing can be inside of, if they are big."""

PAIRS = tuple(itertools.product(SHAPES, COLOURS))

HELD_OUT = (
    ("circle", "orange"), ("circle", "purple"), ("square", "cyan"), ("triangle", "red"),
    ("star", "blue"), ("star", "yellow"), ("ring", "green"), ("cross", "pink"),
)  # fmt: skip
"""Shapes and colours that are never seen together in training: one shape of each colour."""

SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

SPLITS = ("train", "test", "held-out")
"""Random scenes to train on; other ones like them; and scenes in which one thing is a pair of HELD_OUT."""


@dataclass(frozen=True)
class Item:
    """A thing: its shape, colour and size by name, and the place of its centre.

    x, y: in [0, 1], to the right and down. Raises ValueError for a name that is none of SHAPES, COLOURS or SIZES, or a
    centre outside the picture.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def __post_init__(self) -> None:
        for kind, names in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            _check_name(kind, getattr(self, kind), names)
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise ValueError(f"a thing's centre must be in [0, 1], got x = {self.x}, y = {self.y}")

    @property
    def place(self) -> str:
        """The nearest of PLACES."""
        return min(PLACES, key=lambda name: math.dist(PLACES[name], (self.x, self.y)))


@dataclass(frozen=True)
class Scene:
    """Things, the first one drawn first, and what is behind them.

    items: of different colours, so that each can be told from the others. background: one of BACKGROUNDS.
    Raises ValueError for two things of one colour or another background.
    """

    items: tuple[Item, ...]
    background: str

    def __post_init__(self) -> None:
        _check_name("background", self.background, BACKGROUNDS)
        colours = [item.colour for item in self.items]
        if len(set(colours)) != len(colours):
            raise ValueError(f"the things of a scene must differ in colour, got {', '.join(colours)}")


def _check_name(kind: str, name: Any, names: Collection[str]) -> None:
    if name not in names:
        raise ValueError(f"the {kind} must be one of {', '.join(names)}, got {name!r}")


OPPOSITE = {
    "left of": "right of", "right of": "left of",
    "above": "below", "below": "above",
    "inside": "around", "around": "inside",
}  # fmt: skip
"""Each relation, and how the second thing then lies to the first."""


def relation(a: Item, b: Item) -> str:
    """How a lies to b, one of OPPOSITE.

    Inside or around, if their sizes differ and their centres lie less than half the larger one's height apart along
    both x and y; else by the direction in which they lie farther apart.
    """
    dx, dy = b.x - a.x, b.y - a.y
    if a.size != b.size and max(abs(dx), abs(dy)) < SIZES["big"]:
        return "inside" if a.size == "small" else "around"
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


# ---------------------------------------------------------------------------------------- drawing

_FINE = 256
"""Pictures are drawn at least this large, then made smaller: their edges are smooth, and their sizes alike."""


def draw(scene: Scene, size: int = 32) -> np.ndarray:
    """The picture of a scene, uint8 (size, size, 3), with smooth edges; the same picture at every size.

    Raises ValueError for a size below 1.
    """
    from PIL import Image, ImageDraw

    if size < 1:
        raise ValueError(f"a picture's size must be at least 1, got {size}")
    times = max(4, -(-_FINE // size))
    side = times * size
    picture = Image.new("RGB", (side, side), BACKGROUNDS[scene.background][0])
    pen = ImageDraw.Draw(picture)
    _draw_pattern(pen, scene.background, side)
    for item in scene.items:
        _draw_item(pen, item, side)
    return np.asarray(picture.reduce(times))


def _draw_pattern(pen: Any, background: str, side: int) -> None:
    """Every second stripe, or every second square."""
    first, second = BACKGROUNDS[background]
    if first == second:
        return
    edges = [side * i // 4 for i in range(5)]
    for row, column in itertools.product(range(4), repeat=2):
        if (row if background == "striped" else row + column) % 2:
            pen.rectangle((edges[column], edges[row], edges[column + 1] - 1, edges[row + 1] - 1), fill=second)


def _draw_item(pen: Any, item: Item, side: int) -> None:
    half = SIZES[item.size] * side
    x, y = item.x * side - 0.5, item.y * side - 0.5  # of Pillow's pixels, the centres have whole numbers
    colour = COLOURS[item.colour]
    if item.shape == "ring":
        pen.ellipse((x - half, y - half, x + half, y + half), outline=colour, width=round(RING_WIDTH * side))
    else:
        pen.polygon([(x + half * dx, y + half * dy) for dx, dy in OUTLINES[item.shape]], fill=colour)


# ---------------------------------------------------------------------------------------- random scenes

INSIDE = 0.2
"""How often, of two things, one is inside the other."""


def random_scene(rng: Rng, split: str = "train", number: int | None = None) -> Scene:
    """A scene of one or two things, the same for equal rng on every device.

    A thing lies near one of PLACES. Two are one in the other, or at opposite sides of the picture, with one relation
    clearly. split: one of SPLITS. number: of things, 1 or 2, by default either.
    Raises ValueError for another split or number.
    """
    _check_name("split", split, SPLITS)
    if number not in (None, 1, 2):
        raise ValueError(f"a random scene has 1 or 2 things, got {number}")
    draws = _host(rng)
    number = number or int(draws.integers(1, 3))
    background = _one_of(draws, tuple(BACKGROUNDS))
    inside = number == 2 and draws.random() < INSIDE
    pairs = _random_pairs(draws, split, number, CONTAINERS if inside else SHAPES)
    sizes = ("big", "small") if inside else [_one_of(draws, tuple(SIZES)) for _ in pairs]
    if inside or number == 1:
        centres = [_near(draws, _one_of(draws, tuple(PLACES)), sizes[0])] * number
    else:
        places = _one_of(draws, _OPPOSITE_PLACES)
        centres = [_near(draws, place, size) for place, size in zip(places, sizes, strict=True)]
    items = (Item(*pair, size, *centre) for pair, size, centre in zip(pairs, sizes, centres, strict=True))
    return Scene(tuple(items), background)


_OPPOSITE_PLACES = [
    (p, q)
    for (p, (x_p, y_p)), (q, (x_q, y_q)) in itertools.permutations(PLACES.items(), 2)
    if max(abs(x_p - x_q), abs(y_p - y_q)) > 0.5 and min(abs(x_p - x_q), abs(y_p - y_q)) < 0.5
]
"""In opposite rows or columns but not corners: one of the relations holds clearly."""


def _random_pairs(draws: np.random.Generator, split: str, number: int, first: Sequence[str]) -> list[tuple[str, str]]:
    """(shape, colour) of each thing, in different colours, the first thing of one of these shapes."""
    pools = [SEEN] * number
    if split == "held-out":
        pools[int(draws.integers(number))] = HELD_OUT
    chosen: list[tuple[str, str]] = []
    for shapes, pool in zip((first, SHAPES), pools, strict=False):
        used = [colour for _, colour in chosen]
        chosen.append(_one_of(draws, [pair for pair in pool if pair[0] in shapes and pair[1] not in used]))
    return chosen


def _near(draws: np.random.Generator, place: str, size: str) -> tuple[float, float]:
    """A centre near this place, from which a thing of this size does not reach out of the picture."""
    half = SIZES[size]
    x, y = (min(max(c + JITTER * (2 * draws.random() - 1), half), 1 - half) for c in PLACES[place])
    return x, y


def with_other_shapes(scene: Scene, rng: Rng) -> Scene:
    """The scene with random shapes in place of its own, of pairs that are seen in training; what has a thing inside
    remains a container."""
    draws = _host(rng)
    inside = len(scene.items) == 2 and relation(*scene.items) in ("inside", "around")
    pools = [CONTAINERS if inside and item.size == "big" else SHAPES for item in scene.items]
    shapes = [
        _one_of(draws, [shape for shape in pool if (shape, item.colour) in SEEN])
        for pool, item in zip(pools, scene.items, strict=True)
    ]
    items = (dataclasses.replace(item, shape=shape) for item, shape in zip(scene.items, shapes, strict=True))
    return Scene(tuple(items), scene.background)


def turned(scene: Scene) -> Scene:
    """The scene with its things at the opposite places, as after half a turn: who was left of another is now right."""
    items = (dataclasses.replace(item, x=1 - item.x, y=1 - item.y) for item in scene.items)
    return Scene(tuple(items), scene.background)


def _host(rng: Rng) -> np.random.Generator:
    """A generator for many small draws: NumPy's, whatever the device."""
    return Rng(rng.seed, "cpu", path=rng.path).generator


def _one_of(draws: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(draws.integers(len(options)))]


# ---------------------------------------------------------------------------------------- captions

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
    draws, named = _host(rng), BRIEF if brief else NAMED

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
    return _one_of(draws, PHRASES[kind][what])


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
                _check_name(kind, getattr(self, kind), names)

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
            _check_name("relation", self.relation, OPPOSITE)
            if len(self.things) != 2:
                raise ValueError(f"a relation is one of two things, got {len(self.things)}")
        if self.background is not None:
            _check_name("background", self.background, BACKGROUNDS)

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


# ---------------------------------------------------------------------------------------- for training


@dataclass(frozen=True)
class Shapes:
    """An endless source of captioned scenes (see captioned.py).

    size: height and width of the pictures. number: of things in each, 1 or 2, by default either. full: captions name
    everything. brief: they leave out most. alike: so many scenes in a row differ in the shapes of their things alone,
    so that these must be told apart. Raises ValueError if alike is below 1.
    """

    size: int = 32
    number: int | None = None
    full: bool = False
    brief: bool = False
    alike: int = 1

    def __post_init__(self) -> None:
        if self.alike < 1:
            raise ValueError(f"at least 1 scene in a row is alike, got {self.alike}")

    def scenes(self, rng: Rng, n: int, split: str = "train") -> list[Scene]:
        """n random scenes; the first ones are the same for every n. ValueError for n < 1, or as random_scene."""
        if n < 1:
            raise ValueError(f"the number of scenes must be at least 1, got {n}")
        _check_name("split", split, SPLITS)
        mine = rng.at(SPLITS.index(split))
        return [self._scene(mine, i, split) for i in range(n)]

    def _scene(self, rng: Rng, i: int, split: str) -> Scene:
        variant = i % self.alike
        scene = random_scene(rng.at(i - variant, 0), split, self.number)
        if variant >= 2:
            scene = with_other_shapes(scene, rng.at(i - variant % 2, 2))
        return turned(scene) if variant % 2 else scene

    def draw(self, rng: Rng, n: int, split: str = "train") -> tuple[np.ndarray, list[str]]:
        """The pictures of `scenes`, uint8 (n, size, size, 3), and a caption of each."""
        scenes, mine = self.scenes(rng, n, split), rng.at(SPLITS.index(split))
        captions = [caption(scene, mine.at(i, 1), self.full, self.brief) for i, scene in enumerate(scenes)]
        return np.stack([draw(scene, self.size) for scene in scenes]), captions
