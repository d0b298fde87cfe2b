"""Fine-tune a text-to-image model so that it paints into what a mask hides: GLIDE in miniature (E36).

    python examples/train_glide.py --base RUN                       of train_text_to_pixels.py: 20 minutes on one core
    python examples/train_glide.py --base RUN --text-encoder RUN    if that was not told by the shipped CLIP
    python examples/train_glide.py --base RUN --data pictures/      your own images and captions
    python examples/train_glide.py --resume runs/glide              go on after Ctrl-C, or after the power went

The U-Net is shown the picture with its unknown pixels set to 0, and the mask, by new inputs whose weights start at 0,
and of each picture another random part is hidden. The folder of the run receives samples_000000.png, ... (in pairs of
rows: what is shown of pictures that the training never saw, and what the model makes of it), then samples.png,
prompts.txt, picture.png (one of these pictures), loss.png and checkpoint.npz. The last act hides a thing of each
picture, asks for another in its place, and counts how often it is there and all else as before, as the package's scene
reader sees it: edits.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tinydiff import checkpoint, cli, image, program
from tinydiff.backend import Array
from tinydiff.data import captioned, shapes
from tinydiff.data.captioned import Shapes
from tinydiff.data.masks import random_masks
from tinydiff.data.shape_captions import caption
from tinydiff.data.shapes import Scene
from tinydiff.diffusion import Sampling
from tinydiff.models import CLIP, MaskedTextEncoder, SceneReader, TextDiffusion, TextDiffusionConfig, TextInpainting
from tinydiff.models.pixel_inpainting import shown
from tinydiff.models.text_diffusion import TextEncoder, told_texts
from tinydiff.models.text_encoder import load_text_encoder
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings

WEIGHTS, DATA, ORDER, NOISE, PICTURES = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/glide"

GUIDANCE = 3.0
"""s of E35 where samples are drawn."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    base: the model that is fine-tuned, which was told by text_encoder. tested: how many held-out pictures the figure at
    the end is of. Raises ValueError for numbers below 1.
    """

    base: str = ""
    data: str = "shapes"
    pictures: int = 40_000
    text_encoder: str = "clip"
    steps: int = 4500
    batch_size: int = 64
    lr: float = 1e-3
    tested: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        program.at_least_1(self, "pictures", "tested")

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=200, betas=(0.9, 0.99), ema_decay=0.999)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    what = parser.add_argument_group("what to train")
    what.add_argument("--base", metavar="RUN", help="the model to fine-tune, of train_text_to_pixels.py (needed)")
    add = functools.partial(program.add_flag, what, usual)
    add("--text-encoder", "what read the texts to it: shipped, or a run", metavar="RUN")
    add("--data", "shapes, digits, fashion, or a folder of captioned images")
    add("--pictures", "how many to learn from")
    add("--tested", "held-out pictures to measure on at the end")
    program.add_training_flags(parser, usual, "images")
    program.add_run_flags(parser, FOLDER, "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Fine-tune, or go on with a run, then measure."""
    options = parse()
    if not options.base and options.resume is None:
        raise ValueError("--base is needed: a run of train_text_to_pixels.py, whose model is fine-tuned")
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), FOLDER, TextInpainting.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, draw the pictures and measure."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    encoder, source = load_text_encoder(recipe.text_encoder), captioned.source_to_draw(recipe.data)
    model = model_for(run, encoder, rng.at(WEIGHTS))
    images, captions = source.draw(rng.at(DATA), recipe.pictures)
    if images.shape[1:3] != model.config.size:
        raise ValueError(f"the model draws images of {model.config.size}, the data have {images.shape[1:3]}")
    unseen, prompts = source.draw(rng.at(PICTURES), 24, "test")
    told, empty = program.encoded_texts(encoder, captions), told_texts(encoder, "")
    loss_at = program.told_loss(model, images, told, empty, recipe.batch_size, rng.at(ORDER))

    def sheet(name: str, steps: int) -> None:
        known, mask = image.to_signed(unseen), random_masks(rng.at(PICTURES, 0), len(unseen), model.config.size)
        both = shown(known, mask)[..., :3], painted(model, encoder, known, mask, prompts, rng.at(PICTURES, 1), steps)
        rows = np.stack([x.reshape(-1, 8, *known.shape[1:]) for x in both], axis=1)
        image.save_png(folder / name, image.grid(rows.reshape(-1, *known.shape[1:]), 8), scale=2)

    def preview(step: int) -> None:
        sheet(f"samples_{step:06d}.png", 10)

    what = f"{len(images):,} pictures"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=preview)
    with training.ema.applied():
        sheet("samples.png", 25)
        if recipe.data == "shapes":
            report(model, encoder, recipe.tested, rng.at(PICTURES), folder / "edits.png")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"In pairs of rows: what is shown, and the prompts of {folder / 'prompts.txt'}: {folder / 'samples.png'}")
    print(f"Put the model into a small file:\n  {program.export_command(folder, 'glide.npz')}")
    script, picture = pathlib.Path(__file__).with_name("glide.py"), folder / "picture.png"
    image.save_png(picture, unseen[0])
    models = "--run", folder, "--text-encoder", recipe.text_encoder
    print(f"Paint into a picture:\n  {cli.command(script, prompts[1], '--from', picture, '--mask', 'left', *models)}")


def model_for(run: Run[Recipe], encoder: CLIP | MaskedTextEncoder, rng: Rng) -> TextInpainting:
    """The model as it starts: its base, which this encoder told, or with the sizes of the run that goes on."""
    if run.saved is not None:
        return TextInpainting(TextDiffusionConfig.from_dict(run.saved[1]["config"]), rng)
    model = TextInpainting.started_from(TextDiffusion.load(run.recipe.base))
    if model.config.text_encoder not in ("", checkpoint.fingerprint(encoder)):
        raise ValueError(f"{run.recipe.base} was told by another text encoder: name it with --text-encoder")
    return model


def painted(
    model: TextInpainting,
    encoder: TextEncoder,
    known: np.ndarray,
    mask: np.ndarray,
    prompts: list[str],
    rng: Rng,
    steps: int,
) -> np.ndarray:
    """Pictures with the prompts painted into what the masks hide, (N, H, W, 3), float32 in [-1, 1], on the host."""
    told, away, how = told_texts(encoder, prompts), told_texts(encoder, ""), Sampling(steps=steps)

    def paint(some: slice, rng: Rng) -> Iterator[Array]:
        return model.inpaint(known[some], mask[some], told.taken(some), rng, how, guidance=GUIDANCE, negative=away)

    return program.drawn(paint, len(known), rng)


def report(model: TextInpainting, encoder: TextEncoder, n: int, rng: Rng, path: pathlib.Path) -> None:
    """Print in how many of n pictures what was asked for is in place of a thing, and all else as before; draw some."""
    known, mask, prompts = edits(rng, n)
    pictures = painted(model, encoder, known, mask, prompts, rng.at(0), 50)
    rows = np.concatenate([known[:8], shown(known, mask)[:8, ..., :3], pictures[:8]])
    image.save_png(path, image.grid(rows, 8), scale=2)
    fits = SceneReader.load("scene_reader").fits(pictures, prompts)
    print(f"{fits.mean():.1%} of {n} pictures show what was asked for in place of one thing, and all else as before")
    print(f"In rows: pictures, what is shown of them, and what was made of that: {path}")


def edits(rng: Rng, n: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures of one or two things apart, masks that hide one, and captions with another thing in its place.

    Gives (n, 32, 32, 3) in [-1, 1], (n, 32, 32, 1), 1 where the picture is known, and n texts.
    """
    scenes = [scene for scene in Shapes().scenes(rng, 2 * n + 8, "test") if not is_nested(scene)][:n]
    draws = shapes.host_generator(rng.at(0))
    known, masks, prompts = [], [], []
    for i, scene in enumerate(scenes):
        item, *others = scene.items
        used = {thing.colour for thing in scene.items}
        shape, colour = shapes.one_of(draws, [pair for pair in shapes.SEEN if pair[1] not in used])
        new = dataclasses.replace(scene, items=(dataclasses.replace(item, shape=shape, colour=colour), *others))
        known.append(image.to_signed(shapes.draw(scene)))
        masks.append(without_square(item.x, item.y, 0.29, 32))
        prompts.append(caption(new, rng.at(1, i), full=True))
    return np.stack(known), np.stack(masks), prompts


def is_nested(scene: Scene) -> bool:
    """Whether one thing is inside another, so that none can be hidden alone."""
    return len(scene.items) == 2 and shapes.relation(*scene.items) in ("inside", "around")


def without_square(x: float, y: float, half: float, size: int) -> np.ndarray:
    """The mask that hides a square around (x, y), the picture's side being 1: bool (size, size, 1)."""
    at = (np.arange(size) + 0.5) / size
    return ((abs(at[:, None] - y) > half) | (abs(at[None] - x) > half))[..., None]


if __name__ == "__main__":
    cli.run(main)
