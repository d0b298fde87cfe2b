"""Train DALL-E 2's decoder in miniature: diffusion on pixels, told CLIP's embedding of the image and a caption (E33).

    python examples/train_decoder.py                        with the shipped CLIP: an hour on two cores
    python examples/train_decoder.py --clip RUN             with the one that you trained (train_clip.py)
    python examples/train_decoder.py --data pictures/       your own images and captions
    python examples/train_decoder.py --resume runs/decoder  go on after Ctrl-C, or after the power went

What CLIP says of each picture (z_i) and of each caption is computed once, before the training, in which z_i is left out
10 % of the time and the caption 50 % of the time, each on its own. The folder of the run receives samples_000000.png,
... (in rows: pictures that the training never saw; drawn from z_i and caption; from z_i alone; from the caption alone;
as the model learns), then samples.png, loss.png and checkpoint.npz. The last act counts how often what is drawn agrees
with the picture and with the caption, as the package's scene reader sees it, if the pictures have its 32 x 32 pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, checkpoint, cli, image, program
from tinydiff.data import captioned
from tinydiff.diffusion import Sampling
from tinydiff.models import CLIP, Condition, Decoder, DecoderConfig, SceneReader, told_texts
from tinydiff.models.scene_reader import agreement
from tinydiff.nn import UNetConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings

WEIGHTS, DATA, ORDER, NOISE, PICTURES = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/decoder"

GUIDANCE = 2.0
"""s of E35, away from a picture of which nothing is known, where samples are drawn."""

ATTENTION = 8
"""Places see one another and the text where the picture has become so many places high and wide, or fewer."""

SHOWN = 8
"""Held-out pictures in the samples of a run."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    size: height and width of what it draws, in pixels; a cascade begins with less than the pictures have. width: of the
    U-Net. text_layers: blocks of a transformer before it. tested: how many
    held-out pictures the figures at the end are of. Raises ValueError for numbers below 1.
    """

    data: str = "shapes"
    pictures: int = 40_000
    size: int = 32
    clip: str = "clip"
    width: int = 48
    text_layers: int = 2
    steps: int = 6000
    batch_size: int = 64
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
    add("--clip", "of whose embeddings to draw images: the shipped one, or a run of train_clip.py", metavar="RUN")
    add("--width", "of the U-Net")
    add("--text-layers", "of a transformer between CLIP and the U-Net")
    add("--tested", "held-out pictures to measure on at the end")
    program.add_training_flags(parser, usual, "images")
    program.add_run_flags(parser, FOLDER, "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then measure."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), FOLDER, Decoder.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, and measure what it learned."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    clip, source = CLIP.load(recipe.clip), captioned.source_to_draw(recipe.data)
    images, captions = source.draw(rng.at(DATA), recipe.pictures)
    unseen, prompts = source.draw(rng.at(PICTURES), recipe.tested, "test")
    known = known_of(clip, unseen, prompts)
    small, unseen_small = (program.made_smaller(some, recipe.size) for some in (images, unseen))
    model = Decoder(config_for(recipe, clip, small), rng.at(WEIGHTS))
    told = dataclasses.replace(program.encoded_texts(clip, captions), vector=program.encoded_images(clip, images))
    loss_at = program.told_loss(model, small, told, told_texts(clip, ""), recipe.batch_size, rng.at(ORDER))
    some = np.arange(SHOWN) * recipe.tested // SHOWN  # of all kinds of pictures, which the source gives in turn

    def sheet(name: str, steps: int) -> None:
        how = Sampling("dpm", steps)
        pictures = (drawn(model, clip, told.taken(some), rng.at(PICTURES), how) for told in known.values())
        rows = np.concatenate([image.to_signed(unseen_small[some]), *pictures])
        image.save_png(folder / name, image.grid(rows, SHOWN), scale=max(1, 64 // recipe.size))

    def preview(step: int) -> None:
        sheet(f"samples_{step:06d}.png", 10)

    what = f"{len(images):,} pictures"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=preview)
    with training.ema.applied():
        sheet("samples.png", 25)
        if recipe.data == "shapes" and recipe.size == 32:  # what the scene reader can read
            report(model, clip, unseen, prompts, known, rng.at(PICTURES))
    print(f"In rows: pictures; drawn from {', from '.join(known)}: {folder / 'samples.png'}")
    print(f"Put the model into a small file:\n  {program.export_command(folder, 'decoder.npz')}")
    script, flags = pathlib.Path(__file__).with_name("train_upsampler.py"), ("--text-encoder", recipe.clip)
    command = cli.command(script, "--size", f"{2 * recipe.size}", *(flags if recipe.size < 32 else ()))
    print(f"Train what makes its pictures larger:\n  {command}")


def config_for(recipe: Recipe, clip: CLIP, images: np.ndarray) -> DecoderConfig:
    """A decoder of such images and of what this CLIP says of them."""
    unet = UNetConfig(
        channels=3,
        base=recipe.width,
        multipliers=(1, 2),
        blocks=1,
        attention=tuple(level for level in (0, 1) if min(images.shape[1:3]) // (2 << level) <= ATTENTION),
        heads=4,
        patch=2,
        context=clip.config.text.width,
        vector=clip.config.embedding,
    )
    known = checkpoint.fingerprint(clip)
    return DecoderConfig(unet, images.shape[1:3], text_layers=recipe.text_layers, text_encoder=known)


def known_of(clip: CLIP, images: np.ndarray, captions: list[str]) -> dict[str, Condition]:
    """What may be known of pictures: embedding and caption, or one of them."""
    texts, nothing = told_texts(clip, captions), told_texts(clip, "").repeated(len(captions))
    z_i = backend.to_device(clip.image_embedding(image.to_signed(images)))
    return {
        "z_i and caption": dataclasses.replace(texts, vector=z_i),
        "z_i alone": dataclasses.replace(nothing, vector=z_i),
        "the caption alone": texts,
    }


def drawn(model: Decoder, clip: CLIP, told: Condition, rng: Rng, how: Sampling) -> np.ndarray:
    """A picture of what is told of each, (N, H, W, 3), float32 in [-1, 1], on the host."""
    away = told_texts(clip, "")
    return program.drawn(
        lambda some, rng: model.sample(told.taken(some), rng, how, guidance=GUIDANCE, negative=away), len(told), rng
    )


def report(
    model: Decoder, clip: CLIP, images: np.ndarray, captions: list[str], known: dict[str, Condition], rng: Rng
) -> None:
    """Print how often what is drawn agrees with the picture and with the caption, by what was known of them."""
    reader = SceneReader.load("scene_reader")
    scenes = reader.read(image.to_signed(images))
    print("\n| drawn from | as its caption says | things of the picture | places |\n|---|---|---|---|")
    for name, told in known.items():
        pictures = drawn(model, clip, told, rng, Sampling("dpm", 25))
        alike = agreement(reader.read(pictures), scenes)
        fits = reader.fits(pictures, captions).mean()
        print(f"| {name} | {fits:.1%} | {alike['things']:.1%} | {alike['place']:.1%} |")
    print()


if __name__ == "__main__":
    cli.run(main)
