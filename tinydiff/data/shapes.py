"""Scenes of coloured shapes: one or two simple things on a background, and their pictures.

scene = random_scene(rng)     what there is, as a frozen dataclass
draw(scene, 32)               its picture, uint8 (32, 32, 3)

What scenes are called is in shape_captions.py; captioned.Shapes makes training data of both. The pairs in HELD_OUT,
such as a red triangle, are never drawn for training: a model that draws one has put it together itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
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
            check_name(kind, getattr(self, kind), names)
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
        check_name("background", self.background, BACKGROUNDS)
        colours = [item.colour for item in self.items]
        if len(set(colours)) != len(colours):
            raise ValueError(f"the things of a scene must differ in colour, got {', '.join(colours)}")


def check_name(kind: str, name: Any, names: Collection[str]) -> None:
    """Raise ValueError for a name that is none of these, saying which they are."""
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
    check_name("split", split, SPLITS)
    if number not in (None, 1, 2):
        raise ValueError(f"a random scene has 1 or 2 things, got {number}")
    draws = host_generator(rng)
    number = number or int(draws.integers(1, 3))
    background = one_of(draws, tuple(BACKGROUNDS))
    inside = number == 2 and draws.random() < INSIDE
    pairs = _random_pairs(draws, split, number, CONTAINERS if inside else SHAPES)
    sizes = ("big", "small") if inside else [one_of(draws, tuple(SIZES)) for _ in pairs]
    if inside or number == 1:
        centres = [_near(draws, one_of(draws, tuple(PLACES)), sizes[0])] * number
    else:
        places = one_of(draws, _OPPOSITE_PLACES)
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
        chosen.append(one_of(draws, [pair for pair in pool if pair[0] in shapes and pair[1] not in used]))
    return chosen


def _near(draws: np.random.Generator, place: str, size: str) -> tuple[float, float]:
    """A centre near this place, from which a thing of this size does not reach out of the picture."""
    half = SIZES[size]
    x, y = (min(max(c + JITTER * (2 * draws.random() - 1), half), 1 - half) for c in PLACES[place])
    return x, y


def with_other_shapes(scene: Scene, rng: Rng) -> Scene:
    """The scene with random shapes in place of its own, of pairs that are seen in training; what has a thing inside
    remains a container."""
    draws = host_generator(rng)
    inside = len(scene.items) == 2 and relation(*scene.items) in ("inside", "around")
    pools = [CONTAINERS if inside and item.size == "big" else SHAPES for item in scene.items]
    shapes = [
        one_of(draws, [shape for shape in pool if (shape, item.colour) in SEEN])
        for pool, item in zip(pools, scene.items, strict=True)
    ]
    items = (dataclasses.replace(item, shape=shape) for item, shape in zip(scene.items, shapes, strict=True))
    return Scene(tuple(items), scene.background)


def turned(scene: Scene) -> Scene:
    """The scene with its things at the opposite places, as after half a turn: who was left of another is now right."""
    items = (dataclasses.replace(item, x=1 - item.x, y=1 - item.y) for item in scene.items)
    return Scene(tuple(items), scene.background)


def host_generator(rng: Rng) -> np.random.Generator:
    """A generator for many small draws: NumPy's, whatever the device."""
    return Rng(rng.seed, "cpu", path=rng.path).generator


def one_of(draws: np.random.Generator, options: Sequence[T]) -> T:
    """A random one of the options."""
    return options[int(draws.integers(len(options)))]
