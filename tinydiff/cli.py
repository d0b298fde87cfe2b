"""What the command-line programs share: errors of one line, folders that are never overwritten, commands to copy."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, TypeVar

import numpy as np

from tinydiff import backend, checkpoint, image
from tinydiff.backend import DeviceError
from tinydiff.checkpoint import CheckpointError
from tinydiff.data import masks, mnist
from tinydiff.data.idx import DataError
from tinydiff.files import PathLike, make_folder

T = TypeVar("T")

EXPECTED = (CheckpointError, DataError, DeviceError, FloatingPointError, MemoryError, OSError, ValueError)
"""What can go wrong without the program being wrong: bad input, full disks, numbers that overflow."""


def run(main: Callable[[], None]) -> NoReturn:
    """Call main and exit: with 0, or 1 after one line on stderr for an expected error, or 130 for Ctrl-C.

    Set the environment variable TINYDIFF_TRACEBACK to see where an error came from.
    """
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else "\nstopped", file=sys.stderr)
        sys.exit(130)
    except EXPECTED as error:
        if os.environ.get("TINYDIFF_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the command line whose --help begins with the program's docstring, as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device(flags: argparse._ActionsContainer) -> None:
    """Add --device to a parser, or to a group of flags; `on_device` takes what is given."""
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: $TINYDIFF_DEVICE, else auto")


def on_device(given: str | None) -> contextlib.AbstractContextManager[str]:
    """The context in which new arrays are made on this device: given, or named by $TINYDIFF_DEVICE, or the best."""
    return backend.use_device(given or os.environ.get("TINYDIFF_DEVICE", "auto"))


def integers(text: str) -> tuple[int, ...]:
    """The value of a flag that takes "1,2,3"."""
    return tuple(int(n) for n in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """The value of a flag that takes "1,2.5,3"."""
    return tuple(float(x) for x in text.split(","))


def new_folder(chosen: str | None, default: str) -> pathlib.Path:
    """Make the folder for a new run: the one that was chosen, else the default, or default-2, default-3, ...

    Raises ValueError if the chosen folder holds a run already: nothing is overwritten. OSError if it is not writable.
    """
    if chosen is not None:
        if _saved_at(chosen):
            raise ValueError(f"{chosen} holds a run already; go on with it (--resume {chosen}) or choose another --out")
        folder = pathlib.Path(chosen)
    else:
        names = itertools.chain([default], (f"{default}-{number}" for number in itertools.count(2)))
        folder = pathlib.Path(next(name for name in names if not _saved_at(name)))
    check_writable(folder / checkpoint.NAME)
    return folder


def latest_folder(default: str) -> pathlib.Path:
    """Of the folders that new_folder gives for this default, the one whose run was saved last, or the default."""
    path = pathlib.Path(default)
    return max([path, *path.parent.glob(f"{path.name}-*")], key=_saved_at)


def _saved_at(folder: PathLike) -> float:
    """When the run in a folder was last saved, in seconds since 1970; 0 if there is none."""
    path = pathlib.Path(folder) / checkpoint.NAME
    return path.stat().st_mtime if path.exists() else 0


def image_of(text: str, data: str, size: tuple[int, int], channels: int = 1) -> np.ndarray:
    """The image that a user names: a test digit by its number, or a picture file of just this size.

    data: where digits come from, see `mnist.load`. Returns float32 (H, W, channels) in [-1, 1].
    Raises ValueError for a number without a digit or an image of another size, OSError for a file that is no picture.
    """
    if text.isdecimal():
        images = mnist.load(data, "test").images
        if int(text) >= len(images):
            raise ValueError(f"the test digits of {data} are 0..{len(images) - 1}, got {text}")
        pixels = images[int(text)][..., None]
    else:
        pixels = image.load_png(text, channels)
    if pixels.shape != (*size, channels):
        raise ValueError(f"the model takes images of {size[0]} x {size[1]} x {channels}, but {text} has {pixels.shape}")
    return image.to_signed(pixels)


def mask_of(text: str, size: tuple[int, int]) -> np.ndarray:
    """The mask that a user names: the part to hide, see `masks.without`, or a picture, white where the image is known.

    Returns bool (H, W), False where hidden. Raises ValueError for what is neither, and for a picture of another size or
    with grey in it, OSError for a file that is no picture.
    """
    if text in masks.PARTS:
        return masks.without(text, size)
    if not os.path.exists(text):
        raise ValueError(f"the mask must be one of {', '.join(masks.PARTS)}, or a picture; there is no file {text}")
    pixels = image.load_png(text)[..., 0]
    if pixels.shape != size:
        raise ValueError(f"the mask must have the image's size {size[0]} x {size[1]}, but {text} has {pixels.shape}")
    if not np.isin(pixels, (0, 255)).all():
        raise ValueError(f"a mask is black (to be painted) and white (known), but {text} has grey in it")
    return pixels == 255


def check_writable(path: PathLike) -> None:
    """Make the folder of a file that will be written, and raise OSError now if nothing can be written there."""
    make_folder(path)
    try:
        tempfile.TemporaryFile(dir=pathlib.Path(path).parent).close()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def output(chosen: pathlib.Path | None, file: pathlib.Path, name: str) -> pathlib.Path:
    """Where a program writes: the path that was chosen, else this name beside a checkpoint, or here if it is shipped.

    file: the checkpoint. Raises OSError now if nothing can be written there.
    """
    path = chosen or (pathlib.Path() if file.parent == checkpoint.SHIPPED else file.parent) / name
    check_writable(path)
    return path


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items, with a progress bar on stderr that disappears when they are through."""
    from tqdm import tqdm

    yield from tqdm(items, what, total, leave=False, mininterval=0.1 if sys.stderr.isatty() else 10)


def command(script: PathLike, *arguments: object) -> str:
    """The line that runs a script with these arguments from the current folder, ready to be copied."""
    on_path = shutil.which("python")
    same = on_path and os.path.dirname(on_path) == os.path.dirname(sys.executable)  # one environment, not one file
    python = "python" if same else short(sys.executable)
    return shlex.join([python, short(script), *(str(a) for a in arguments)])


def short(path: PathLike) -> str:
    """The path relative to the current folder if it is inside it, else absolute."""
    absolute, here = pathlib.Path(os.path.abspath(path)), pathlib.Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
