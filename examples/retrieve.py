"""Search images by a text, or by another image (E26): CLIP says which lie nearest, and a contact sheet shows them.

    python examples/retrieve.py "a red star"                        among 2,000 scenes of shapes, drawn for it
    python examples/retrieve.py "a red star" --folder DIR           among the images in a folder and its sub-folders
    python examples/retrieve.py --image FILE --folder DIR           images like this one
    python examples/retrieve.py "a red star" --folder DIR --index INDEX    the same, and the index is kept
    python examples/retrieve.py "a blue ring" --index INDEX         from then on: the images are not read again

The shipped CLIP knows shapes; --model RUN takes a run of train_clip.py in its place. An index belongs to the model that
made it, and is refused with any other. Images of any size do: the middle of each is scaled to what the model takes.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import sys
import warnings

import numpy as np

from tinydiff import cli, image
from tinydiff.checkpoint import fingerprint
from tinydiff.data.captioned import Shapes
from tinydiff.data.shapes import Scene, draw
from tinydiff.files import atomic_file
from tinydiff.models import CLIP
from tinydiff.retrieval import ABOUT, Found, Index
from tinydiff.rng import Rng

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
"""Of the files that are taken for images."""

SCENES, SCENE = 2000, "scene "
"""How many are drawn where no folder is given, and what their names begin with."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for")
    parser.add_argument("--image", type=pathlib.Path, metavar="FILE", help="an image to look for, in place of a text")
    parser.add_argument("--folder", type=pathlib.Path, metavar="DIR", help="where to look (default: drawn scenes)")
    parser.add_argument(
        "--index", type=pathlib.Path, metavar="DIR", help="write the index here; without --folder, read"
    )
    parser.add_argument("--k", type=int, default=12, metavar="K", help="how many to show (default: %(default)s)")
    parser.add_argument("--model", default="clip", metavar="RUN", help="a run of train_clip.py (default: %(default)s)")
    parser.add_argument("--faiss", action="store_true", help="search with faiss, if installed: for millions of images")
    cli.add_device(parser)
    parser.add_argument(
        "--out", type=pathlib.Path, default="retrieved.png", metavar="PNG", help="contact sheet (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Search, print what was found, and draw it."""
    options = parse()
    if (options.text is None) == (options.image is None):
        raise ValueError("give a text or an --image to look for, one of the two")
    if options.k < 1:
        raise ValueError(f"--k must be at least 1, got {options.k}")
    cli.check_writable(options.out)
    with cli.on_device(options.device):
        model = CLIP.load(options.model)
        query = query_of(model, options.text, options.image)
        index = index_of(model, options.folder, options.index)
        k = min(options.k, len(index))
        found = (index.search_with_faiss if options.faiss else index.search)(query, k)
    names = [index.names[row] for row in found.rows[0]]
    for name, cosine in zip(names, found.cosines[0], strict=True):
        print(f"{cosine:6.3f}  {cli.short(name) if os.path.exists(name) else name}")
    contact_sheet(options.out, options.text or f"like {options.image}", names, found)
    print(f"The {k} nearest of {len(index):,} images are in {options.out}.")


def query_of(model: CLIP, text: str | None, file: pathlib.Path | None) -> np.ndarray:
    """The vector to look for, (1, embedding)."""
    if text is not None:
        return model.text_embedding([text])
    assert file is not None  # main saw to that
    size, channels = model.config.size, model.config.channels
    pixels = image.fit(image.load_png(file, channels), (size, size))
    return model.image_embedding(image.to_signed(pixels[None]))


def index_of(model: CLIP, folder: pathlib.Path | None, kept: pathlib.Path | None) -> Index:
    """The index of a folder's images, which is kept if wanted; or the one that was kept; or that of drawn scenes."""
    if folder is None and kept is not None:
        return Index.load(kept, fingerprint(model))
    if kept is not None:
        cli.check_writable(kept / ABOUT)
    if folder is None:
        images = np.stack([draw(scene, model.config.size) for scene in scenes()])
        names = [f"{SCENE}{i}" for i in range(len(images))]
    else:
        images, names = read_folder(folder, model.config.size, model.config.channels)
    index = Index(model.image_embedding(image.to_signed(images)), names, fingerprint(model))
    if kept is not None:
        index.save(kept)
    return index


@functools.cache
def scenes() -> list[Scene]:
    """The scenes that are searched where there is no folder."""
    return Shapes().scenes(Rng(0), SCENES, "test")


def read_folder(folder: pathlib.Path, size: int, channels: int) -> tuple[np.ndarray, list[str]]:
    """The images in a folder and below, uint8 (N, size, size, channels), and their paths, in order.

    A file that cannot be read is left out, with a line on stderr. Raises ValueError if no image is left.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    images, names = [], []
    for path in cli.progress(paths, "reading", len(paths)) if paths else ():
        try:
            images.append(image.fit(image.load_png(path, channels), (size, size)))
            names.append(os.path.abspath(path))
        except OSError as error:
            print(f"\nleft out: {error}", file=sys.stderr)
    if not images:
        raise ValueError(f"there is no image in {folder}: its files must end in {', '.join(ENDINGS)}")
    return np.stack(images), names


def contact_sheet(path: pathlib.Path, title: str, names: list[str], found: Found, columns: int = 6) -> None:
    """Draw what was found, the nearest first, each above its cosine and its name."""
    from matplotlib.figure import Figure

    pictures = [picture_of(name) for name in names]
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows + 0.5), dpi=110, layout="constrained")
    figure.suptitle(title if len(title) < 100 else title[:100] + "…")
    for axis in (axes := figure.subplots(rows, columns, squeeze=False)).flat:
        axis.axis("off")
    for axis, picture, name, cosine in zip(axes.flat, pictures, names, found.cosines[0], strict=False):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(f"{cosine:.3f}\n{pathlib.Path(name).name[:24]}", fontsize=8)
    with atomic_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of an emoji, which the search itself knows
        figure.savefig(file, format="png")


def picture_of(name: str, most: int = 128) -> np.ndarray:
    """The image of this name, a scene or a file: its middle, at most so many pixels high and wide."""
    if name.startswith(SCENE):
        return draw(scenes()[int(name.removeprefix(SCENE))], most)
    pixels = image.load_png(name, channels=3)
    side = min(most, *pixels.shape[:2])
    return image.fit(pixels, (side, side))


if __name__ == "__main__":
    cli.run(main)
