"""MNIST from wherever it is: 5,000 digits in the package, all 70,000, Fashion-MNIST, or a folder.

load("embedded")     4,500 to train on and 500 to test on; needs no download
load("full")         the 60,000 and the 10,000, downloaded once
load("fashion")      Fashion-MNIST: clothes in the shape of MNIST (Debian's dataset-fashion-mnist is found)
load("some/folder")  the four IDX files in a folder, .gz or not
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydiff.data import download, idx
from tinydiff.data.idx import DataError
from tinydiff.files import PathLike

EMBEDDED = pathlib.Path(__file__).with_name("mnist_5k.npz")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True, eq=False)
class Digits:
    """Images and what they show.

    images: uint8 (N, 28, 28), 0 is the background. labels: int64 (N,), each an index of class_names.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Published:
    """A data set on the internet: its mirrors, its files' checksums, and where a system package puts it.

    sha256: by file, of the unpacked content, which mirrors and packages may pack differently.
    """

    mirrors: tuple[str, ...]
    sha256: dict[str, str]
    class_names: tuple[str, ...]
    installed: pathlib.Path | None = None


PUBLISHED = {
    "full": Published(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        sha256={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        class_names=tuple("0123456789"),
    ),
    "fashion": Published(
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        sha256={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        installed=pathlib.Path("/usr/share/datasets/fashion-mnist"),
    ),
}


def load(
    source: PathLike = "embedded",
    split: str = "train",
    *,
    cache: PathLike | None = None,
) -> Digits:
    """One split of a data set.

    source: "embedded", "full", "fashion", or a folder with the four IDX files. split: "train" or "test"; of
    the embedded digits, "test" is the last 50 of each class (hold_out), "train" the other 4,500.
    cache: the folder that keeps downloads, by default download.cache_folder().
    Raises ValueError for another split, DataError for data that is missing, damaged or cannot be fetched.
    """
    if split not in FILES:
        raise ValueError(f"a split is 'train' or 'test', got {split!r}")
    if source == "embedded":
        return dict(zip(("train", "test"), hold_out(embedded()), strict=True))[split]
    if source in PUBLISHED:
        data = PUBLISHED[str(source)]
        folder = pathlib.Path(cache or download.cache_folder()).expanduser() / str(source)
        contents = [_published(data, name, folder) for name in FILES[split]]
        return _digits(contents, FILES[split], data.class_names)
    paths = [_find(pathlib.Path(source).expanduser(), name) for name in FILES[split]]
    return _digits([idx.read_file(path) for path in paths], [str(path) for path in paths])


def embedded() -> Digits:
    """All 5,000 digits in the package, 500 a class, sorted by class (README.md here says more)."""
    with np.load(EMBEDDED, allow_pickle=False) as arrays:
        return Digits(arrays["images"], arrays["labels"].astype(np.int64), PUBLISHED["full"].class_names)


def hold_out(digits: Digits, per_class: int = 50) -> tuple[Digits, Digits]:
    """Split off the last `per_class` images of each class: (the rest, those), both in the order they had.

    Raises ValueError unless every class has more than per_class >= 1 images.
    """
    labels, counts = np.unique(digits.labels, return_counts=True)
    if not 1 <= per_class < counts.min():
        raise ValueError(f"per_class must be 1..{counts.min() - 1}, fewer than every class has; got {per_class}")
    held = np.zeros(len(digits), bool)
    for label in labels:
        held[np.flatnonzero(digits.labels == label)[-per_class:]] = True
    rest, those = (Digits(digits.images[k], digits.labels[k], digits.class_names) for k in (~held, held))
    return rest, those


def _published(data: Published, name: str, cache: pathlib.Path) -> bytes:
    """The unpacked content of one published file, from the system's package where that is installed."""
    packed = f"{name}.gz"
    if data.installed and (path := data.installed / packed).is_file():
        return download.check(idx.read_file(path), data.sha256[name], str(path))
    return download.published(packed, data.sha256[name], data.mirrors, cache)


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file of this name in a folder, packed or not, with a dash or a dot before idx (both are in use)."""
    if not folder.is_dir():
        raise DataError(f"data source {str(folder)!r} is not a folder, nor embedded, {' or '.join(PUBLISHED)}")
    names = [stem + end for stem in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for path in (folder / name for name in names):
        if path.is_file():
            return path
    raise DataError(f"no file {name} in {folder} (looked for {', '.join(names)})")


def _digits(contents: Sequence[bytes], where: Sequence[str], class_names: tuple[str, ...] = ()) -> Digits:
    """Images and labels from the unpacked contents of their files; by default the labels name the classes."""
    images = idx.parse(contents[0], 3, where[0])
    labels = idx.parse(contents[1], 1, where[1]).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{where[0]} has {len(images)} images but {where[1]} has {len(labels)} labels")
    names = class_names or tuple(str(label) for label in range(max(10, labels.max(initial=0) + 1)))
    return Digits(images, labels, names)
