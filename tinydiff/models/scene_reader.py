"""A small convolutional network that reads scenes of coloured shapes from their pixels, and so judges what is drawn.

    reader = SceneReader.load("scene_reader")
    parse("a red circle left of a blue star").fits(reader.read(images)[0])

Its feature maps serve as a perceptual loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from tinydiff import image, ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, array_module, to_device, to_numpy
from tinydiff.data.captioned import Shapes
from tinydiff.data.shape_captions import parse
from tinydiff.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Item, Scene, draw
from tinydiff.files import PathLike
from tinydiff.models.trained import load_trained
from tinydiff.nn import Conv2d, Linear, Module
from tinydiff.rng import Rng
from tinydiff.workers import DrawnLoss, Share

TAU = 0.1
"""How far apart, squared, pixels in [-1, 1] may be and still count as of one colour, before training."""

_PIXELS = [*COLOURS.values(), *(np.mean(pair, axis=0) for pair in BACKGROUNDS.values())]
_MEANS = np.array(_PIXELS, np.float32) / 127.5 - 1

_SHAPES, _SIZES, _BACKGROUNDS = ("none", *SHAPES), ("none", *SIZES), tuple(BACKGROUNDS)
_WIDTHS = len(_SHAPES), len(_SIZES), 2
"""How many numbers say the shape, size and place of what has a colour."""


@dataclass(frozen=True)
class SceneReaderConfig:
    """How large a SceneReader is.

    size: height and width of the pictures, which have three channels. width: channels of the first convolutions; the
    later ones have up to four times as many. hidden: how many numbers describe what is found of a colour.

    Raises ValueError for a size that cannot be halved three times, or others below 1.
    """

    size: int = 32
    width: int = 16
    hidden: int = 96

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise ValueError(f"the size of the pictures must be a multiple of 8, got {self.size}")
        if min(self.width, self.hidden) < 1:
            raise ValueError(f"a reader's sizes must be at least 1, got {self}")


class Reading(NamedTuple):
    """What a reader says of B pictures: of what has each of the eight colours, and of what is behind.

    shape: logits (B, 8, 7), the first of which says that nothing has this colour. size: logits (B, 8, 3), as well.
    place: x and y, (B, 8, 2). background: logits (B, 5).
    """

    shape: Any
    size: Any
    place: Any
    background: Any


class SceneReader(Module):
    """What colour each pixel has; then, for each colour alone, what the pixels of this colour show.

    A pixel x has colour c with probability p(c | x) = softmax(-|x - m_c|²/tau), for the eight colours of things and the
    five of backgrounds. Written as softmax((2 x·m_c - |m_c|²)/tau) it is a 1 x 1 convolution, which starts at the
    colours m_c that scenes are drawn in, and is trained as all else is. One and the same network of four convolutions
    and two linear layers then reads the picture of p(c | x) for each c, so that what it learns of a shape in one colour
    it knows in all.

    Called as model(x) it gives a Reading of pictures x (B, size, size, 3), float32 in [-1, 1].
    """

    kind = "scene-reader"

    def __init__(self, config: SceneReaderConfig, rng: Rng):
        self.config, w = config, config.width
        self.colour = Conv2d(3, len(_MEANS), rng, kernel=1)
        self.colour.weight[...] = to_device(2 / TAU * _MEANS.T[None, None], rng.device)
        self.colour.bias[...] = to_device(-(_MEANS**2).sum(axis=1) / TAU, rng.device)
        widths = (w, 2 * w, 2 * w, 3 * w)
        self.convs = [
            Conv2d(inputs, outputs, rng, stride=stride)
            for inputs, outputs, stride in zip((1, *widths), widths, (2, 2, 1, 2), strict=False)
        ]
        self.hidden = Linear((config.size // 8) ** 2 * widths[-1], config.hidden, rng)
        self.thing = Linear(config.hidden, sum(_WIDTHS), rng)
        self.background = Linear(len(_MEANS), len(BACKGROUNDS), rng)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The reader in a training run's checkpoint, with the averaged weights (EMA), ready to read.

        path: the checkpoint, the folder it is in, or the name of a shipped one, "scene_reader". Raises CheckpointError
        if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(SceneReaderConfig(**fields), Rng(0)))

    def embed(self, x: Tensor) -> list[Tensor]:
        """What the network sees in pictures (B, size, size, 3) in [-1, 1]: the maps that a perceptual loss compares.

        Returns tensors that can be differentiated: p(c | x), (B, size, size, 13), and the maps of the four convolutions
        for each picture and colour, (8 B, h, h, channels), h = size/2, size/4, size/4, size/8.
        (E23; Johnson et al. 2016; Zhang et al. 2018)
        """
        p = ops.softmax(self.colour(x))
        B, size, _, _ = p.shape
        h = p[..., : len(COLOURS)].transpose(0, 3, 1, 2).reshape(B * len(COLOURS), size, size, 1)
        maps = [p]
        for conv in self.convs:
            h = ops.silu(conv(h))
            maps.append(h)
        return maps

    def __call__(self, x: Tensor) -> Reading:
        p, *_, last = self.embed(x)
        thing = self.thing(self._describe(last))
        to_size, to_place = _WIDTHS[0], _WIDTHS[0] + _WIDTHS[1]
        background = self.background(p.mean(axis=(1, 2)))
        return Reading(thing[..., :to_size], thing[..., to_size:to_place], thing[..., to_place:], background)

    def _describe(self, last: Tensor) -> Tensor:
        """What the last layer sees of each colour, (B, 8, hidden)."""
        return ops.silu(self.hidden(last.reshape(len(last) // len(COLOURS), len(COLOURS), -1)))

    def features(self, images: Array) -> np.ndarray:
        """Describe pictures by the numbers that the last layer sees, summed over the colours: for Fréchet distances.

        images: (N, size, size, 3), float32 in [-1, 1]. Returns (N, hidden), float32 on the host. Raises ValueError for
        images of another shape.
        """
        return self._of_each(lambda x: [self._describe(self.embed(x)[-1]).sum(axis=1)], images)[0]

    def read(self, images: Array) -> list[Scene]:
        """What there is in pictures: each thing's most probable shape and size, its place, and the background.

        images: (N, size, size, 3), float32 in [-1, 1]. A scene may be of no thing, or of many; big things come first.
        Raises ValueError for images of another shape.
        """
        reading = Reading(*self._of_each(self, images))
        return [_scene(Reading(*of_one)) for of_one in zip(*reading, strict=True)]

    def fits(self, images: Array, captions: Sequence[str]) -> np.ndarray:
        """Whether pictures show all that their captions name, bool (N,).

        images: as `read` takes them. Raises ValueError as it does, and as `parse` for captions of nothing known.
        """
        return np.array([parse(c).fits(scene) for c, scene in zip(captions, self.read(images), strict=True)])

    def _of_each(self, function: Callable[[Tensor], Sequence[Tensor]], images: Array, batch: int = 250) -> list[Any]:
        """What a function says of a batch, for many images, some at a time: its arrays, on the host."""
        size = self.config.size
        if images.shape[1:] != (size, size, 3) or not len(images):
            raise ValueError(f"this reader reads images of shape (N, {size}, {size}, 3), got {images.shape}")
        device = self.background.weight.device
        with no_grad():
            said = [function(Tensor(to_device(images[i : i + batch], device))) for i in range(0, len(images), batch)]
        return [np.concatenate([to_numpy(part.data) for part in parts]) for parts in zip(*said, strict=True)]


def _scene(reading: Reading) -> Scene:
    """The most probable scene; its arguments are those of one picture."""
    shapes, sizes = reading.shape.argmax(axis=-1), reading.size[:, 1:].argmax(axis=-1)
    places = reading.place.clip(0, 1)
    items = [
        Item(_SHAPES[shape], colour, _SIZES[1 + size], float(x), float(y))
        for colour, shape, size, (x, y) in zip(COLOURS, shapes, sizes, places, strict=True)
        if shape
    ]
    items.sort(key=lambda item: -SIZES[item.size])
    return Scene(tuple(items), _BACKGROUNDS[reading.background.argmax()])


# ---------------------------------------------------------------------------------------- how well it reads


def agreement(read: Sequence[Scene], scenes: Sequence[Scene], tolerance: float = 0.06) -> dict[str, float]:
    """In how many of N scenes, 0..1, what was read agrees with what there is, attribute by attribute.

    "colour": it has things of just these colours. "shape", "size": and these shapes, these sizes. "place": their
    centres lie within `tolerance` along x and y, where the picture's side is 1. "background": it is this one. "things":
    colours, shapes and sizes are all right. Raises ValueError unless there are as many of both, one or more.
    """
    if len(read) != len(scenes) or not scenes:
        raise ValueError(f"expected as many scenes read as there are, one or more, got {len(read)} and {len(scenes)}")
    reports = [_agreement(a, b, tolerance) for a, b in zip(read, scenes, strict=True)]
    return {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}


def _agreement(read: Scene, scene: Scene, tolerance: float) -> dict[str, bool]:
    found = {item.colour: item for item in read.items}
    pairs = [(found.get(item.colour), item) for item in scene.items]
    report = {"colour": found.keys() == {item.colour for item in scene.items}}
    for kind in ("shape", "size"):
        report[kind] = all(a is not None and getattr(a, kind) == getattr(b, kind) for a, b in pairs)
    report["place"] = all(a is not None and max(abs(a.x - b.x), abs(a.y - b.y)) <= tolerance for a, b in pairs)
    report["background"] = read.background == scene.background
    report["things"] = report["colour"] and report["shape"] and report["size"]
    return report


# ---------------------------------------------------------------------------------------- how it learns


def answers(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What a reader should say of B scenes: as a Reading, with classes in place of logits.

    Returns shape (B, 8), 0 where nothing has this colour, else 1 + the place in SHAPES; size (B, 8), likewise; place
    (B, 8, 2), float32, 0 where nothing is; background (B,).
    """
    shape, size = np.zeros((2, len(scenes), len(COLOURS)), np.int64)
    place = np.zeros((len(scenes), len(COLOURS), 2), np.float32)
    colours = list(COLOURS)
    for i, scene in enumerate(scenes):
        for item in scene.items:
            at = i, colours.index(item.colour)
            shape[at], size[at] = _SHAPES.index(item.shape), _SIZES.index(item.size)
            place[at] = item.x, item.y
    return shape, size, place, np.array([_BACKGROUNDS.index(scene.background) for scene in scenes])


def reading_loss(model: SceneReader, batch_size: int, noise: float = 0.1) -> DrawnLoss:
    """What `train` minimises to teach a reader: how improbable it finds what there is, in new scenes at every step.

    The mean of -log p(shape) - log p(size) + DISTANCE_WEIGHT |place - place there|², summed over the colours, and of
    -log p(background); the distances only where a thing is. Every fourth scene has a pair of HELD_OUT in it, since a
    reader is to know whatever may be drawn, and of each share of a batch one has nothing in it. The pictures are
    `flawed`. Raises ValueError for a batch size below 1 or a noise below 0.
    """
    if batch_size < 1 or not noise >= 0:
        raise ValueError(f"reading is learned from batches of at least 1, noise >= 0; got {batch_size} and {noise}")

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array, ...]:
        scenes = scenes_to_learn_from(rng.at(0), len(share.of(np.empty(batch_size))))
        pixels = np.stack([draw(scene, model.config.size) for scene in scenes])
        x = flawed(to_device(image.to_signed(pixels)), rng.at(1), noise)
        return x, *map(to_device, answers(scenes))

    def loss_of(x: Array, shape: Array, size: Array, place: Array, background: Array) -> Tensor:
        said = model(Tensor(x))
        things = ops.cross_entropy(said.shape.reshape(-1, len(_SHAPES)), shape.reshape(-1))
        things = things + ops.cross_entropy(said.size.reshape(-1, len(_SIZES)), size.reshape(-1))
        there = (shape > 0)[..., None].astype(place.dtype)
        distance = (said.place - place) * there
        far = (distance * distance).sum() / len(x)
        return len(COLOURS) * things + ops.cross_entropy(said.background, background) + DISTANCE_WEIGHT * far

    return DrawnLoss(draw_at, loss_of)


DISTANCE_WEIGHT = 20.0
"""Of a squared distance, the picture's side being 1, beside a logarithm of a probability."""


def scenes_to_learn_from(rng: Rng, n: int) -> list[Scene]:
    """n random scenes, the last quarter with a pair of HELD_OUT, the very first with nothing in it."""
    held_out = n // 4
    scenes = Shapes().scenes(rng, n - held_out, "train")
    if held_out:
        scenes += Shapes().scenes(rng, held_out, "held-out")
    return [dataclasses.replace(scenes[0], items=()), *scenes[1:]]


def flawed(x: Array, rng: Rng, noise: float) -> Array:
    """Pictures with the flaws of those that models draw: x + b (blurred x - x) + s eps, eps from N(0, I).

    Of each picture its own: b drawn from U[0, 1), s from U[0, noise). Blurred: by the binomial weights 1 4 6 4 1 along
    both axes. x: (B, H, W, 3), floats; Returns the like.
    """
    b, s = rng.at(0).uniform((2, len(x), 1, 1, 1), x.dtype)
    return x + b * (_blurred(_blurred(x)) - x) + noise * s * rng.at(1).normal_like(x)


def _blurred(x: Array) -> Array:
    """By the weights 1 2 1 along both axes, the pixels at the edges repeated outwards."""
    x = array_module(x).pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
