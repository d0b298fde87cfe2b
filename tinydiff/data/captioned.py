"""Images with captions, all in one form, so that a text-to-image model can be trained on any of them.

source.draw(rng, n, split)    n images, uint8 (n, H, W, 3), and their captions, each time others

Shapes(32)                    endless scenes of coloured shapes
CaptionedDigits("embedded")   "a handwritten seven"; of Fashion-MNIST, "a photo of an ankle boot"
CaptionedFolder("my/images")  your own images, with a file captions.txt
Mixture((one, another))       as many of each

source("shapes")              one of these, by the name that the programs' --data takes
source_to_draw("shapes")      the same, for a model that draws what it is told
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tinydiff.backend import to_numpy
from tinydiff.data import mnist, shapes
from tinydiff.data.idx import DataError
from tinydiff.data.shape_captions import caption
from tinydiff.data.shapes import Scene
from tinydiff.files import PathLike
from tinydiff.image import load_png
from tinydiff.rng import Rng

SPLITS = ("train", "test")
"""Those that every source has; Shapes has another one."""


class Captioned(Protocol):
    """What every source of images and captions offers."""

    def draw(self, rng: Rng, n: int, split: str = "train") -> tuple[np.ndarray, list[str]]:
        """n random images of a split, uint8 (n, H, W, 3), and a caption of each; the same ones for equal rng.

        Raises ValueError for n < 1 or a split that the source does not have.
        """
        ...


def source(data: str) -> Captioned:
    """The source that a user names: shapes, digits, fashion, or a folder of images with captions.txt.

    The first three have images of 32 x 32; digits are the 5,000 that the package brings along, and full stands for all
    of MNIST. Raises DataError as CaptionedFolder, or where MNIST cannot be had.
    """
    if data == "shapes":
        return Shapes()
    if data in ("digits", "full", "fashion"):
        return CaptionedDigits("embedded" if data == "digits" else data)
    return CaptionedFolder(data)


def source_to_draw(data: str, size: int = 32) -> Captioned:
    """The same, for a model that is to draw what it is told: of shapes, with captions that tell all, too.

    Of one thing, only those tell its place; of two things, whose words are harder to sort out, there are more.
    size: height and width of the pictures of shapes.
    """
    if data == "shapes":
        return Mixture((Shapes(size), Shapes(size, number=1, full=True), Shapes(size, number=2, full=True)))
    return source(data)


@dataclass(frozen=True)
class Mixture:
    """As many images of each of several sources, whose images must have one size."""

    sources: tuple[Captioned, ...]

    def draw(self, rng: Rng, n: int, split: str = "train") -> tuple[np.ndarray, list[str]]:
        """See Captioned."""
        shares = [(i, source, len(range(i, n, len(self.sources)))) for i, source in enumerate(self.sources)]
        parts = [source.draw(rng.at(i), share, split) for i, source, share in shares if share or n < 1]
        captions = [caption for _, captions in parts for caption in captions]
        return np.concatenate([images for images, _ in parts]), captions


# ---------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shapes:
    """An endless source of captioned scenes (shapes.py, shape_captions.py).

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
        shapes.check_name("split", split, shapes.SPLITS)
        mine = rng.at(shapes.SPLITS.index(split))
        return [self._scene(mine, i, split) for i in range(n)]

    def _scene(self, rng: Rng, i: int, split: str) -> Scene:
        variant = i % self.alike
        scene = shapes.random_scene(rng.at(i - variant, 0), split, self.number)
        if variant >= 2:
            scene = shapes.with_other_shapes(scene, rng.at(i - variant % 2, 2))
        return shapes.turned(scene) if variant % 2 else scene

    def draw(self, rng: Rng, n: int, split: str = "train") -> tuple[np.ndarray, list[str]]:
        """The pictures of `scenes`, uint8 (n, size, size, 3), and a caption of each."""
        scenes, mine = self.scenes(rng, n, split), rng.at(shapes.SPLITS.index(split))
        captions = [caption(scene, mine.at(i, 1), self.full, self.brief) for i, scene in enumerate(scenes)]
        return np.stack([shapes.draw(scene, self.size) for scene in scenes]), captions


# ---------------------------------------------------------------------------------------- MNIST

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CLOTHES = {
    "T-shirt/top": "a t-shirt",
    "Trouser": "trousers",
    "Pullover": "a pullover",
    "Dress": "a dress",
    "Coat": "a coat",
    "Sandal": "a sandal",
    "Shirt": "a shirt",
    "Sneaker": "a sneaker",
    "Bag": "a bag",
    "Ankle boot": "an ankle boot",
}
"""What is in the photo of each class of Fashion-MNIST."""


class CaptionedDigits:
    """MNIST, or Fashion-MNIST, in three equal channels and with black margins, and a caption of each class.

    data: "embedded", "full", "fashion" or a folder, as mnist.load takes it. size: height and width, at least the
    images' own. Raises ValueError for a smaller size or a class without a name; DataError as mnist.load.
    """

    def __init__(self, data: PathLike = "embedded", size: int = 32):
        self.size = size
        self._load = functools.cache(lambda split: mnist.load(data, split))
        digits = self._load("train")
        self._captions = [caption_of_class(name) for name in digits.class_names]
        if size < max(digits.images.shape[1:]):
            raise ValueError(f"the size must be at least the images' own, {digits.images.shape[1:]}, got {size}")

    def draw(self, rng: Rng, n: int, split: str = "train") -> tuple[np.ndarray, list[str]]:
        """See Captioned."""
        _check(n, split)
        digits = self._load(split)
        chosen = to_numpy(rng.integers(0, len(digits), (n,)))
        images = digits.images[chosen]
        margins = [((self.size - pixels) // 2, (self.size - pixels + 1) // 2) for pixels in images.shape[1:]]
        images = np.pad(images, ((0, 0), *margins))[..., None].repeat(3, axis=3)
        return images, [self._captions[label] for label in digits.labels[chosen]]


def caption_of_class(name: str) -> str:
    """The caption of a class of MNIST ("7") or Fashion-MNIST ("Ankle boot"). Raises ValueError for another."""
    if name in CLOTHES:
        return f"a photo of {CLOTHES[name]}"
    if name in map(str, range(10)):
        return f"a handwritten {NUMBERS[int(name)]}"
    raise ValueError(f"there are captions for the classes 0..9 and {', '.join(CLOTHES)}, not for {name!r}")


# ---------------------------------------------------------------------------------------- a folder

CAPTIONS = "captions.txt"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")

EVERY = 10
"""Of a folder's images, the last of so many is for testing."""


class CaptionedFolder:
    """Images of one size in a folder, and what captions.txt in it says of them.

    A line of captions.txt is the name of an image, a tab, and a caption; an image may have several lines. Every tenth
    image, in the order of the file, is not trained on but tested on. The images are kept in memory.

    images: uint8 (N, H, W, 3). captions: a list of captions for each.

    Raises DataError, naming file and line, for a folder or captions.txt that is missing, a line that is not so, an
    image that is not there, has no caption, cannot be read or differs in size from the first.
    """

    def __init__(self, path: PathLike):
        folder = pathlib.Path(path).expanduser()
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder")
        captions = _read_captions(folder)
        self.images = _read_images([folder / name for name in captions])
        self.captions = list(captions.values())

    def draw(self, rng: Rng, n: int, split: str = "train") -> tuple[np.ndarray, list[str]]:
        """See Captioned. DataError if there are too few images for a test split."""
        _check(n, split)
        where = np.arange(len(self.images))
        of_split = where[(where % EVERY == EVERY - 1) == (split == "test")]
        if not len(of_split):
            raise DataError(f"of {len(where)} images none is left to test on; it takes {EVERY} or more")
        chosen = of_split[to_numpy(rng.at(0).integers(0, len(of_split), (n,)))]
        which = to_numpy(rng.at(1).uniform((n,), np.float64))
        captions = [self.captions[i][int(u * len(self.captions[i]))] for i, u in zip(chosen, which, strict=True)]
        return self.images[chosen], captions


def _read_captions(folder: pathlib.Path) -> dict[str, list[str]]:
    """The captions of each image by its name, in the order of the file."""
    path = folder / CAPTIONS
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}, in which each line is an image's name, a tab, and a caption") from error
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, _, caption = (part.strip() for part in line.partition("\t"))
            if not name or not caption:
                raise DataError(f"{path}, line {number}: expected an image's name, a tab, and a caption, got {line!r}")
            if not (folder / name).is_file():
                raise DataError(f"{path}, line {number}: there is no image {name} in {folder}")
            captions.setdefault(name, []).append(caption)
    if not captions:
        raise DataError(f"{path} has no captions")
    pictures = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if without := [name for name in pictures if name not in captions]:
        raise DataError(
            f"{len(without)} of {len(pictures)} images in {folder} have no line in {CAPTIONS}: {without[0]}"
        )
    return captions


def _read_images(paths: Sequence[pathlib.Path]) -> np.ndarray:
    """All images, which must be of one size."""
    images: list[np.ndarray] = []
    for path in paths:
        try:
            images.append(load_png(path, channels=3))
        except OSError as error:
            raise DataError(str(error)) from error
        if images[-1].shape != images[0].shape:
            (h, w, _), (first_h, first_w, _) = images[-1].shape, images[0].shape
            raise DataError(
                f"the images must be of one size, but {path} is {w} x {h} and {paths[0]} is {first_w} x {first_h}"
            )
    return np.stack(images)


def _check(n: int, split: str) -> None:
    if n < 1:
        raise ValueError(f"the number of images must be at least 1, got {n}")
    if split not in SPLITS:
        raise ValueError(f"the split must be one of {', '.join(SPLITS)}, got {split!r}")
