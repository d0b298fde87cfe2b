"""Pictures: pixel values to numbers and back, grids, film strips, GIFs and loss curves.

Inside, an image holds float32 in [-1, 1], channels last; at the edges, in files and data sets, it holds uint8
in 0..255. `to_signed` and `to_uint8` are the only ways from one to the other. Pillow and matplotlib are
imported where a file is written, so that importing this module costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array
from tinydiff.files import PathLike, atomic_file

# ------------------------------------------------------------------------------- pixel values


def to_signed(pixels: Array) -> Array:
    """Pixel values as the models take them: x = u / 127.5 - 1.

    pixels: uint8, any shape, on any device. Returns float32 in [-1, 1], same shape, same device.
    Raises ValueError for another dtype (floats may be scaled already).
    """
    if pixels.dtype != np.uint8:
        raise ValueError(f"to_signed expects uint8 pixels, got {pixels.dtype} of shape {tuple(pixels.shape)}")
    return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(x: Array) -> np.ndarray:
    """Pixel values for a file: u = round(127.5 (x + 1)), where x outside [-1, 1] is clipped first.

    x: floats, any shape, on any device. Returns uint8, same shape, on the host; to_uint8(to_signed(u)) = u.
    Raises ValueError for values that are not finite, with their number, and for an array not of floats.
    """
    x = backend.to_numpy(x)
    if x.dtype.kind != "f":
        raise ValueError(f"to_uint8 expects floats in [-1, 1], got {x.dtype} of shape {x.shape}")
    if bad := x.size - np.count_nonzero(np.isfinite(x)):
        raise ValueError(f"to_uint8 expects finite values, got {bad} of {x.size} that are NaN or infinite")
    return np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


# ------------------------------------------------------------------------------- many images in one


def grid(images: Array, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images side by side, row by row, on a white sheet.

    images: (N, H, W), (N, H, W, 1) or (N, H, W, 3), uint8, or floats in [-1, 1]. columns: images in a row,
    by default the square root of N, rounded up. gap: pixels between neighbours.
    Returns uint8 (rows (H + gap) - gap, columns (W + gap) - gap), with a last axis of 3 for colour.
    Raises ValueError for another shape, N = 0, columns < 1 or gap < 0.
    """
    images = backend.to_numpy(images)
    tiles = images[..., None] if images.ndim == 3 else images
    if tiles.ndim != 4 or tiles.shape[-1] not in (1, 3) or tiles.size == 0:
        raise ValueError(f"a grid expects images (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {images.shape}")
    N, H, W, C = tiles.shape
    columns = math.ceil(math.sqrt(N)) if columns is None else columns
    if columns < 1 or gap < 0:
        raise ValueError(f"a grid expects columns >= 1 and gap >= 0, got columns={columns}, gap={gap}")
    rows = math.ceil(N / columns)
    cells = np.full((rows * columns, H + gap, W + gap, C), 255, np.uint8)
    cells[:N, :H, :W] = tiles if tiles.dtype == np.uint8 else to_uint8(tiles)
    cells = cells.reshape(rows, columns, H + gap, W + gap, C).swapaxes(1, 2)  # (rows, H', columns, W', C)
    sheet = cells.reshape(rows * (H + gap), columns * (W + gap), C)[: rows * (H + gap) - gap]
    sheet = sheet[:, : columns * (W + gap) - gap]
    return sheet[..., 0] if C == 1 else sheet


def film_strip(states: Sequence[Array], columns: int = 10, rows: int = 8, gap: int = 2) -> np.ndarray:
    """From noise to image: one row a sample, one column a time, from x_T on the left to x_0 on the right.

    states: x_T, ..., x_0 as a sampler yields them, each (B, H, W), (B, H, W, 1) or (B, H, W, 3), floats in
    [-1, 1] (values outside are clipped). columns: how many of the states, evenly spaced from the first to the
    last. rows: how many of the B samples, from the first. gap: as in grid.
    Returns a uint8 picture, as grid does. Raises ValueError for no states, columns < 2 or rows < 1.
    """
    if not len(states) or columns < 2 or rows < 1:
        raise ValueError(
            f"a film strip expects states, columns >= 2 and rows >= 1, got {len(states)} states, "
            f"columns={columns}, rows={rows}"
        )
    times = np.linspace(0, len(states) - 1, min(columns, len(states))).round().astype(int)
    shown = [backend.to_numpy(states[i])[:rows] for i in times]
    strip = np.stack(shown, axis=1)  # (rows, columns, H, W) or (rows, columns, H, W, C)
    return grid(strip.reshape(-1, *strip.shape[2:]), columns=len(times), gap=gap)


def _picture(array: np.ndarray, scale: int) -> Any:
    """The Pillow image of a uint8 array (H, W), (H, W, 1) or (H, W, 3), each pixel scale x scale pixels."""
    from PIL import Image

    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim < 2 or array.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(
            f"a picture is uint8 (H, W), (H, W, 1) or (H, W, 3), got {array.dtype} {array.shape}; "
            "to_uint8 converts floats in [-1, 1], grid joins many images"
        )
    if scale < 1 or scale != int(scale):
        raise ValueError(f"a picture is scaled by a whole number >= 1, got {scale}")
    pixels = array[..., 0] if array.shape[2:] == (1,) else array
    return Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))


def save_png(path: PathLike, array: np.ndarray, scale: int = 1) -> None:
    """Write one picture, each of its pixels as scale x scale pixels.

    array: uint8 (H, W), (H, W, 1) or (H, W, 3). scale: a whole number >= 1.
    Raises ValueError for another array or scale, OSError where the file cannot be written.
    """
    picture = _picture(array, scale)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def load_png(path: PathLike, channels: int = 1) -> np.ndarray:
    """Read a picture file, PNG or another that Pillow knows, as grey (1 channel) or colour (3).

    Returns uint8 (H, W, channels). Raises OSError, naming the path, where it cannot be read, is damaged or no picture,
    or has more than 8 bits a channel, of which Pillow would not keep the highest.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            mode, pixels = picture.mode, np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{path} is not a picture that Pillow can read") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of a broken PNG
        raise OSError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if mode.startswith(("I", "F")):
        raise OSError(f"{path} has more than 8 bits a channel; save it with 8")
    return pixels.reshape(*pixels.shape[:2], channels)


def fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture at another size: as much of its middle as has the shape wanted, scaled.

    Made smaller, a pixel is the mean of those it covers, so that what `save_png` made larger comes back as it was.

    pixels: uint8 (H, W), (H, W, 1) or (H, W, 3). size: height and width wanted. Returns uint8 with the same last axis.
    Raises ValueError for another array, or sizes below 1.
    """
    from PIL import Image

    if min(size) < 1:
        raise ValueError(f"a picture's height and width must be at least 1, got {size[0]} x {size[1]}")
    H, W = pixels.shape[:2]
    scale = min(H / size[0], W / size[1])
    h, w = (max(1, round(scale * n)) for n in size)
    top, left = (H - h) // 2, (W - w) // 2
    middle = _picture(pixels[top : top + h, left : left + w], 1)
    how = Image.Resampling.BOX if scale >= 1 else Image.Resampling.BICUBIC
    return np.asarray(middle.resize((size[1], size[0]), how)).reshape(*size, *pixels.shape[2:])


def save_gif(path: PathLike, frames: Sequence[np.ndarray], ms: int = 60, hold: int = 2000, scale: int = 1) -> None:
    """Write an animation that repeats for ever and rests on its last frame.

    frames: uint8 pictures of one shape, (H, W), (H, W, 1) or (H, W, 3); grid makes one from a batch.
    ms: milliseconds a frame. hold: milliseconds for the last one. scale: as in save_png.
    Raises ValueError for no frames, different shapes or other arrays, OSError where it cannot be written.
    """
    shapes = {np.shape(frame) for frame in frames}
    if len(shapes) != 1:
        raise ValueError(f"a GIF expects one or more frames of one shape, got shapes {sorted(shapes)}")
    first, *rest = (_picture(frame, scale) for frame in frames)
    with atomic_file(path) as file:
        duration = [ms] * len(rest) + [hold]
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each value, of those that exist at the two ends.

    values: (N,) floats. window: 1..N. Returns float64 (N,).
    """
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def rasterise(figure: Any) -> np.ndarray:
    """The pixels of a matplotlib Figure as it is now, uint8 (H, W, 3): a frame for save_gif, a picture for save_png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def loss_curve(path: PathLike, steps: Sequence[int], losses: Sequence[float], title: str = "Training loss") -> None:
    """Draw the loss against the training step as a PNG: raw and smoothed, the loss on a logarithmic axis.

    steps: (N,) whole numbers. losses: (N,) floats > 0. The smoothed line is the running mean over N / 50.
    Raises ValueError for different lengths or none, OSError where the file cannot be written.
    """
    if len(steps) != len(losses) or not len(steps):
        raise ValueError(f"a loss curve expects as many steps as losses, one or more: got {len(steps)}, {len(losses)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    window = max(1, len(losses) // 50)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(steps, running_mean(np.asarray(losses), window), color="tab:blue", label=f"mean of {window}")
    axes.set(title=title, xlabel="training step", ylabel="loss", yscale="log")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
