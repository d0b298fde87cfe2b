"""Train a later stage of a cascade (E37): diffusion that makes pictures twice as large, of 32 x 32 pixels by default.

    python examples/train_upsampler.py                          pictures of shapes: twenty minutes on one core
    python examples/train_upsampler.py --size 32 --text-encoder text_encoder
                                                                from 16 to 32, told the captions, for Imagen
    python examples/train_upsampler.py --data pictures/         your own images: they are the large ones
    python examples/train_upsampler.py --resume runs/upsampler  go on after Ctrl-C, or after the power went

It needs large pictures alone: the small ones are made of them, and noised on purpose, so that the model also copes with
pictures that another model drew. The folder of the run receives samples_000000.png, ... (in rows: small pictures that
the training never saw, each pixel repeated; made larger by the model, as it learns; and as they were), and samples.png,
loss.png and checkpoint.npz. The last act compares PSNR with that of the nearest pixel and of bicubic interpolation.
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
from tinydiff.data import captioned
from tinydiff.data.captioned import Captioned, Shapes
from tinydiff.diffusion import Sampling
from tinydiff.metrics import psnr
from tinydiff.models import (
    Condition,
    MaskedTextEncoder,
    Upsampler,
    UpsamplerConfig,
    dalle2,
    imagen,
    told_texts,
)
from tinydiff.models.cascade import NOTHING, larger, smaller
from tinydiff.models.text_encoder import TrainedTextEncoder, load_text_encoder
from tinydiff.nn import UNetConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings

WEIGHTS, DATA, ORDER, NOISE, PICTURES = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/upsampler"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    size: height and width of the large pictures of shapes. text_encoder: what reads the captions that the model is
    told, if any: the smaller a picture, the less it says by itself. base: an upsampler whose weights it begins with.
    text_layers: blocks of a transformer after the text encoder. width: of the U-Net. tested: how many held-out pictures
    the figures at the end are of. Raises ValueError for numbers below 1.
    """

    data: str = "shapes"
    pictures: int = 20_000
    size: int = 64
    text_encoder: str = ""
    base: str = ""
    text_layers: int = 2
    width: int = 32
    steps: int = 4000
    batch_size: int = 32
    lr: float = 2e-3
    tested: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        program.at_least_1(self, "pictures", "width", "tested")

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=200, betas=(0.9, 0.99), ema_decay=0.999)

    def source(self) -> Captioned:
        """The large pictures."""
        if self.data == "shapes" and not self.text_encoder:
            return Shapes(self.size)
        return captioned.source_to_draw(self.data, self.size)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    add = functools.partial(program.add_flag, parser.add_argument_group("what to train"), usual)
    add("--data", "shapes, or a folder of captioned images, see captioned.py")
    add("--pictures", "how many to learn from")
    add("--size", "height and width of the large pictures of shapes, in pixels")
    add("--text-encoder", "what reads the captions: clip, text_encoder, or a run; none by default", metavar="RUN")
    add(
        "--base", "an upsampler of these sizes to begin with, which may have been told by another reader", metavar="RUN"
    )
    add("--text-layers", "of a transformer between the text encoder and the U-Net")
    add("--width", "of the U-Net")
    add("--tested", "held-out pictures to measure on at the end")
    program.add_training_flags(parser, usual, "images")
    program.add_run_flags(parser, FOLDER, "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then measure."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), FOLDER, Upsampler.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, and measure what it learned."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    source = recipe.source()
    encoder = load_text_encoder(recipe.text_encoder) if recipe.text_encoder else None
    images, captions = source.draw(rng.at(DATA), recipe.pictures)
    unseen, prompts = source.draw(rng.at(PICTURES), recipe.tested, "test")
    unseen, asked = image.to_signed(unseen), told_of(encoder, prompts)
    model = Upsampler(config_for(recipe, encoder, images), rng.at(WEIGHTS))
    if recipe.base:
        model.load_state_dict(Upsampler.load(recipe.base).state_dict())
    told = NOTHING if encoder is None else program.encoded_texts(encoder, captions)
    loss_at = program.told_loss(model, images, told, told_of(encoder, [""]), recipe.batch_size, rng.at(ORDER))
    some = np.arange(8) * recipe.tested // 8  # of all kinds of pictures, which the source gives in turn

    def sheet(name: str, steps: int) -> None:
        low = smaller(unseen[some], model.config.factor)
        drawn = made_larger(model, low, asked.taken(some), rng.at(PICTURES), steps)
        rows = larger(low, model.config.factor), drawn, unseen[some]
        image.save_png(folder / name, image.grid(np.concatenate(rows), 8), scale=2)

    def preview(step: int) -> None:
        sheet(f"samples_{step:06d}.png", 10)

    what = f"{len(images):,} pictures"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=preview)
    with training.ema.applied():
        sheet("samples.png", 25)
        report(model, unseen, asked, rng.at(PICTURES))
    print(f"In rows: small pictures, made larger, and as they were: {folder / 'samples.png'}")
    print(f"Put the model into a small file:\n  {program.export_command(folder, 'upsampler.npz')}")
    print(next_command(recipe, encoder, folder))


def next_command(recipe: Recipe, encoder: TrainedTextEncoder | None, folder: pathlib.Path) -> str:
    """How to draw with a trained upsampler in its place: of Imagen, if it is told by a reader of texts alone."""
    imagens = isinstance(encoder, MaskedTextEncoder)
    usual, name, script = (
        (imagen.UPSAMPLERS, "Imagen", "imagen.py") if imagens else (dalle2.UPSAMPLERS, "DALL-E 2", "dalle2.py")
    )
    places = (folder, "upsampler") if recipe.size == 32 else (*usual[:-1], folder)
    command = cli.command(pathlib.Path(__file__).with_name(script), "a red star", "--upsamplers", *places)
    return f"Draw with all of {name}:\n  {command}"


def config_for(recipe: Recipe, encoder: TrainedTextEncoder | None, images: np.ndarray) -> UpsamplerConfig:
    """The sizes of an upsampler whose results are such images; a patch of 2 is one small pixel."""
    unet = UNetConfig(3, recipe.width, (1, 2), 1, (), patch=2, extra=3, vector=recipe.width)
    config = UpsamplerConfig(unet, size=images.shape[1:3], target="x0")
    if encoder is None:
        return config
    reading = dataclasses.replace(unet, attention=(1,), heads=4, context=encoder.config.text.width, pooled=True)
    known = checkpoint.fingerprint(encoder)
    return dataclasses.replace(config, unet=reading, text_layers=recipe.text_layers, text_encoder=known)


def told_of(encoder: TrainedTextEncoder | None, texts: list[str]) -> Condition:
    """What is told of the texts, where a text encoder reads them."""
    return NOTHING if encoder is None else told_texts(encoder, texts)


def made_larger(
    model: Upsampler, low: np.ndarray, told: Condition, rng: Rng, steps: int, level: int | None = None
) -> np.ndarray:
    """Small pictures made larger by the model, (N, H, W, 3), float32 in [-1, 1], on the host."""
    how = Sampling(steps=steps)

    def states(some: slice, rng: Rng) -> Iterator[Array]:
        return model.upsample(low[some], rng, how, level=level, told=told.taken(some))

    return program.drawn(states, len(low), rng, batch=50)


def bicubic(low: np.ndarray, factor: int) -> np.ndarray:
    """Small pictures, (N, h, w, 3) in [-1, 1], made larger by bicubic interpolation."""
    from PIL import Image

    size = low.shape[2] * factor, low.shape[1] * factor
    pictures = (Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in image.to_uint8(low))
    return image.to_signed(np.stack([np.asarray(picture) for picture in pictures]))


def report(model: Upsampler, images: np.ndarray, told: Condition, rng: Rng) -> None:
    """Print how near held-out pictures come to themselves after they were made smaller, and larger again."""
    factor = model.config.factor
    low = smaller(images, factor)
    ways = {"the nearest pixel": larger(low, factor), "bicubic interpolation": bicubic(low, factor)}
    for level in (0, model.config.S // 6):
        ways[f"the model, noise of level s = {level}"] = made_larger(model, low, told, rng, 25, level)
    print(f"\n| {len(images)} held-out pictures made larger by | PSNR, mean | the worst |\n|---|---|---|")
    for name, pictures in ways.items():
        of_each = psnr(pictures, images)
        print(f"| {name} | {of_each.mean():.2f} dB | {of_each.min():.2f} dB |")
    print()


if __name__ == "__main__":
    cli.run(main)
