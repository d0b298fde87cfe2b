"""Train DALL-E 2's decoder in miniature: diffusion on pixels, told CLIP's embedding of the image and a caption (E33).

    python examples/train_decoder.py                        with the shipped CLIP: three quarters of an hour on one core
    python examples/train_decoder.py --clip RUN             with the one that you trained (train_clip.py)
    python examples/train_decoder.py --data pictures/       your own images and captions
    python examples/train_decoder.py --resume runs/decoder  go on after Ctrl-C, or after the power went

What CLIP says of each picture (z_i) and of each caption is computed once, before the training, in which z_i is left out
10 % of the time and the caption 50 % of the time, each on its own. The folder of the run receives samples_000000.png,
... (in rows: pictures that the training never saw; drawn from z_i and caption; from z_i alone; from the caption alone;
as the model learns), then samples.png, loss.png and checkpoint.npz. The last act counts how often what is drawn agrees
with the picture and with the caption, as the package's scene reader sees it.
"""

from __future__ import annotations

import argparse
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, checkpoint, cli, image, program
from tinydiff.backend import Array
from tinydiff.data import captioned
from tinydiff.data.loader import Batches
from tinydiff.data.shape_captions import parse
from tinydiff.diffusion import Sampling, last
from tinydiff.models import CLIP, Condition, Decoder, DecoderConfig, SceneReader, told_texts
from tinydiff.models.scene_reader import agreement
from tinydiff.nn import UNetConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import DrawnLoss, Share

WEIGHTS, DATA, ORDER, NOISE, PICTURES = range(5)
"""The names of the run's random streams."""

GUIDANCE = 2.0
"""s of E35, away from a picture of which nothing is known, where samples are drawn."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    tested: how many held-out pictures the figures at the end are of.
    """

    data: str = "shapes"
    pictures: int = 40_000
    clip: str = "clip"
    base: int = 48
    text_layers: int = 2
    steps: int = 9000
    batch_size: int = 32
    lr: float = 2e-3
    tested: int = 200
    seed: int = 0

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=200, betas=(0.9, 0.99), ema_decay=0.999)


def parse_flags() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    what = parser.add_argument_group("what to train")
    what.add_argument("--data", help="shapes, digits, fashion, or a folder of captioned images (default: shapes)")
    what.add_argument("--pictures", type=int, metavar="N", help=f"how many to learn from (default: {usual.pictures:,})")
    what.add_argument("--clip", metavar="RUN", help="of whose embeddings to draw images (default: the shipped one)")
    what.add_argument("--base", type=int, metavar="N", help=f"width of the U-Net (default: {usual.base})")
    layers = f"of a transformer between CLIP and the U-Net (default: {usual.text_layers})"
    what.add_argument("--text-layers", type=int, metavar="N", help=layers)
    program.add_training_flags(parser, usual, "images")
    help = f"held-out pictures to measure on at the end (default: {usual.tested})"
    parser.add_argument("--tested", type=int, metavar="N", help=help)
    program.add_run_flags(parser, "runs/decoder", "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then measure."""
    options = parse_flags()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), "runs/decoder", Decoder.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, and measure what it learned."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    clip, source = CLIP.load(recipe.clip), captioned.source_to_draw(recipe.data)
    images, captions = source.draw(rng.at(DATA), recipe.pictures)
    unseen, prompts = source.draw(rng.at(PICTURES), recipe.tested, "test")
    model = Decoder(config_for(recipe, clip, images), rng.at(WEIGHTS))
    loss_at = loss_of(model, clip, images, captions, recipe.batch_size, rng.at(ORDER))
    all_known = known_of(clip, unseen, prompts)
    few = {name: told_of_some(told, slice(8)) for name, told in all_known.items()}

    def sheet(step: int, steps: int = 10, name: str | None = None) -> None:
        how = Sampling("dpm", steps)
        rows = [
            image.to_signed(unseen[:8]),
            *(drawn(model, clip, told, rng.at(PICTURES), how) for told in few.values()),
        ]
        image.save_png(folder / (name or f"samples_{step:06d}.png"), image.grid(np.concatenate(rows), 8), scale=2)

    what = f"{len(images):,} pictures"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=sheet)
    with training.ema.applied():
        sheet(training.step, 25, "samples.png")
        if recipe.data == "shapes":
            report(model, clip, unseen, prompts, all_known, rng.at(PICTURES))
    print(f"In rows: pictures; drawn from {', from '.join(few)}: {folder / 'samples.png'}")
    script = pathlib.Path(__file__).with_name("train_upsampler.py")
    print(f"Train what makes its pictures larger:\n  {cli.command(script)}")


def config_for(recipe: Recipe, clip: CLIP, images: np.ndarray) -> DecoderConfig:
    """A decoder of such images and of what this CLIP says of them."""
    unet = UNetConfig(
        channels=3,
        base=recipe.base,
        multipliers=(1, 2),
        blocks=1,
        attention=(1,),
        heads=4,
        patch=2,
        context=clip.config.text.width,
        vector=clip.config.embedding,
    )
    known = checkpoint.fingerprint(clip)
    return DecoderConfig(unet, size=images.shape[1:3], text_layers=recipe.text_layers, text_encoder=known)


def loss_of(
    model: Decoder, clip: CLIP, images: np.ndarray, captions: list[str], batch_size: int, order: Rng
) -> DrawnLoss:
    """The loss of a share of a step's batch; what CLIP says of each picture and caption is computed before."""
    texts, z_i = program.encoded_texts(clip, captions), program.encoded_images(clip, images)
    batches, empty = Batches(images, *texts, z_i, batch_size=batch_size, rng=order), told_texts(clip, "")

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array | None, ...]:
        pixels, states, mask, z_i = (backend.to_device(share.of(a)) for a in batches.at(step - 1))
        return model.draw(image.to_signed(pixels), rng, Condition(states.astype(np.float32), mask, z_i), empty)

    return DrawnLoss(draw_at, model.loss_of)


def known_of(clip: CLIP, images: np.ndarray, captions: list[str]) -> dict[str, Condition]:
    """What may be known of pictures: embedding and caption, or one of them."""
    texts, nothing = told_texts(clip, captions), told_texts(clip, "").repeated(len(captions))
    z_i = backend.to_device(clip.image_embedding(image.to_signed(images)))
    return {
        "z_i and caption": Condition(texts.states, texts.mask, z_i),
        "z_i alone": Condition(nothing.states, nothing.mask, z_i),
        "the caption alone": texts,
    }


def told_of_some(told: Condition, some: slice) -> Condition:
    """What is told of some of the images."""
    return Condition(*(None if a is None else a[some] for a in told.arrays))


def drawn(model: Decoder, clip: CLIP, told: Condition, rng: Rng, how: Sampling, batch: int = 100) -> np.ndarray:
    """A picture of what is told of each, (N, H, W, 3), float32 in [-1, 1], on the host."""
    nothing = told_texts(clip, "")
    some = [told_of_some(told, slice(i, i + batch)) for i in range(0, len(told), batch)]
    ends = [
        last(model.sample(told, rng.at(i), how, guidance=GUIDANCE, negative=nothing)) for i, told in enumerate(some)
    ]
    return np.concatenate([backend.to_numpy(x) for x in ends])


def report(
    model: Decoder, clip: CLIP, images: np.ndarray, captions: list[str], known: dict[str, Condition], rng: Rng
) -> None:
    """Print how often what is drawn agrees with the picture and with the caption, by what was known of them."""
    reader = SceneReader.load("scene_reader")
    scenes = reader.read(image.to_signed(images))
    rows = ["| drawn from | as its caption says | things of the picture | places |", "|---|---|---|---|"]
    for name, told in cli.progress(known.items(), "measuring", len(known)):
        read = reader.read(drawn(model, clip, told, rng, Sampling("dpm", 25)))
        fits = np.mean([parse(caption).fits(scene) for caption, scene in zip(captions, read, strict=True)])
        alike = agreement(read, scenes)
        rows.append(f"| {name} | {fits:.1%} | {alike['things']:.1%} | {alike['place']:.1%} |")
    print("", *rows, "", sep="\n")


if __name__ == "__main__":
    cli.run(main)
