"""Train diffusion on pixels, told a text: the base model of GLIDE, and the first stage of Imagen (E27, E35).

    python examples/train_text_to_pixels.py                       told by the shipped CLIP: an hour on two cores
    python examples/train_text_to_pixels.py --size 16 --width 56 --batch-size 128 --text-encoder text_encoder
                                                                  for Imagen: smaller pictures, an hour on two cores
    python examples/train_text_to_pixels.py --text-encoder RUN    by the CLIP, or the text encoder, that you trained
    python examples/train_text_to_pixels.py --data pictures/      your own images and captions
    python examples/train_text_to_pixels.py --resume RUN          go on after Ctrl-C, or after the power went

GLIDE's U-Net listens to a transformer that learns with it, Imagen's to an encoder that was trained on texts alone
(train_text_encoder.py), and begins small: what is where is learned many times sooner from fewer pixels, and other
models make them more (train_upsampler.py). What is said of each caption is computed once, before the training.

The folder of the run receives samples_000000.png, ... (the same prompts, drawn by the model as it learns), then
samples.png, prompts.txt, loss.png and checkpoint.npz. The last act counts how often all that a prompt names is there,
as the package's scene reader sees it, if the pictures have its 32 x 32 pixels.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import checkpoint, cli, image, program
from tinydiff.data import captioned
from tinydiff.data.captioned import Shapes
from tinydiff.diffusion import Sampling
from tinydiff.models import CLIP, MaskedTextEncoder, SceneReader, TextDiffusion, TextDiffusionConfig, told_texts
from tinydiff.models.text_diffusion import TextEncoder
from tinydiff.models.text_encoder import load_text_encoder
from tinydiff.nn import UNetConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings

WEIGHTS, DATA, ORDER, NOISE, PICTURES = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/text_to_pixels"

ATTENTION = 8
"""Places see one another and the text where the picture has become so many places high and wide, or fewer."""

GUIDANCE = 3.0
"""s of E35 where samples are drawn."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    size: height and width of what it draws, in pixels; a cascade begins with less than the pictures have. width: of the
    U-Net. text_layers: blocks of a transformer before it. tested: how many held-out prompts the figure at the end is
    of. Raises ValueError for numbers below 1.
    """

    data: str = "shapes"
    pictures: int = 60_000
    size: int = 32
    text_encoder: str = "clip"
    width: int = 40
    text_layers: int = 2
    steps: int = 6000
    batch_size: int = 96
    lr: float = 2e-3
    tested: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        program.at_least_1(self, "pictures", "size", "width", "tested")

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=200, betas=(0.9, 0.99), ema_decay=0.999)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    add = functools.partial(program.add_flag, parser.add_argument_group("what to train"), usual)
    add("--data", "shapes, digits, fashion, or a folder of captioned images")
    add("--pictures", "how many to learn from")
    add("--size", "height and width of what it draws, in pixels")
    add("--text-encoder", "what reads the texts: shipped, or of train_clip.py or train_text_encoder.py", metavar="RUN")
    add("--width", "of the U-Net")
    add("--text-layers", "of a transformer between the text encoder and the U-Net")
    add("--tested", "held-out prompts to measure on at the end")
    program.add_training_flags(parser, usual, "images")
    program.add_run_flags(parser, FOLDER, "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then measure."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), FOLDER, TextDiffusion.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, draw the pictures and measure."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    encoder, source = load_text_encoder(recipe.text_encoder), captioned.source_to_draw(recipe.data)
    images, captions = source.draw(rng.at(DATA), recipe.pictures)
    images = program.made_smaller(images, recipe.size)
    _, prompts = source.draw(rng.at(PICTURES), 24, "test")
    model = TextDiffusion(config_for(recipe, encoder, images), rng.at(WEIGHTS))
    told, empty = program.encoded_texts(encoder, captions), told_texts(encoder, "")
    loss_at = program.told_loss(model, images, told, empty, recipe.batch_size, rng.at(ORDER))

    def sheet(name: str, steps: int) -> None:
        pictures = drawn(model, encoder, prompts, rng.at(PICTURES), steps)
        image.save_png(folder / name, image.grid(pictures, 8), scale=max(1, 64 // recipe.size))

    def preview(step: int) -> None:
        sheet(f"samples_{step:06d}.png", 10)

    what = f"{len(images):,} pictures"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=preview)
    with training.ema.applied():
        sheet("samples.png", 25)
        if recipe.data == "shapes" and recipe.size == 32:  # what the scene reader can read
            report(model, encoder, recipe.tested, rng.at(PICTURES))
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"The prompts in {folder / 'prompts.txt'}, drawn: {folder / 'samples.png'}")
    print(f"Put the model into a small file:\n  {program.export_command(folder, 'text_to_pixels.npz')}")
    print(next_command(recipe, folder))


def next_command(recipe: Recipe, folder: pathlib.Path) -> str:
    """What to do with a trained model: make its pictures larger, or teach it to paint into pictures."""
    if recipe.size < 32:
        script, flags = "train_upsampler.py", ("--size", f"{2 * recipe.size}", "--text-encoder", recipe.text_encoder)
        what = "Train what makes its pictures larger, as Imagen does:"
    else:
        script, flags = "train_glide.py", ("--base", f"{folder}", "--text-encoder", recipe.text_encoder)
        what = "Teach it to paint into pictures, as GLIDE does:"
    return f"{what}\n  {cli.command(pathlib.Path(__file__).with_name(script), *flags)}"


def config_for(recipe: Recipe, encoder: CLIP | MaskedTextEncoder, images: np.ndarray) -> TextDiffusionConfig:
    """The sizes of a model of such images, told by this text encoder."""
    size, width = images.shape[1:3], encoder.config.text.width
    attention = tuple(level for level in (0, 1) if min(size) // (2 << level) <= ATTENTION)
    unet = UNetConfig(3, recipe.width, (1, 2), 1, attention, heads=4, patch=2, context=width, pooled=True)
    known = checkpoint.fingerprint(encoder)
    return TextDiffusionConfig(unet, size, text_layers=recipe.text_layers, text_encoder=known)


def drawn(model: TextDiffusion, encoder: TextEncoder, prompts: list[str], rng: Rng, steps: int) -> np.ndarray:
    """A picture of each prompt, (N, H, W, 3), float32 in [-1, 1], on the host."""
    told, away, how = told_texts(encoder, prompts), told_texts(encoder, ""), Sampling(steps=steps)
    return program.drawn(
        lambda some, rng: model.sample(told.taken(some), rng, how, guidance=GUIDANCE, negative=away), len(told), rng
    )


def report(model: TextDiffusion, encoder: TextEncoder, n: int, rng: Rng) -> None:
    """Print in how many of n pictures the scene reader sees all that the prompt names."""
    _, prompts = Shapes(full=True).draw(rng, n, "test")
    fits = SceneReader.load("scene_reader").fits(drawn(model, encoder, prompts, rng.at(0), 50), prompts)
    print(f"{fits.mean():.1%} of {n} prompts are drawn with all that they name")


if __name__ == "__main__":
    cli.run(main)
