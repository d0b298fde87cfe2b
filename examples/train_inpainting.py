"""Teach a trained model to inpaint: fine-tune it with the masked image and the mask as further inputs (E36).

    python examples/train_inpainting.py runs/mnist                 fine-tune a run's model: three minutes on two cores
    python examples/train_inpainting.py mnist --data full          the shipped model, on all 60,000 digits
    python examples/train_inpainting.py --resume runs/inpainting   go on after Ctrl-C, or after the power went

It starts from the trained model, whose new inputs have weight 0, and hides another random part of each image: a
rectangle, a half, what lies under some strokes, or everything (GLIDE, Nichol et al. 2022). The folder of the run
receives samples_000000.png, ... (test digits with hidden parts, and what the model makes of them as it learns), then
samples.png, loss.png and checkpoint.npz, for inpaint.py.
"""

from __future__ import annotations

import argparse
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, cli, image, program
from tinydiff.backend import Array
from tinydiff.data import mnist
from tinydiff.data.loader import Batches
from tinydiff.data.masks import random_masks
from tinydiff.diffusion import Sampling, last
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig, PixelInpainting
from tinydiff.models.pixel_inpainting import shown
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import DrawnLoss, Share

ORDER, NOISE, PICTURES = range(3)
"""The names of the run's random streams."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line."""

    base: str = ""
    data: str = "embedded"
    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=50, betas=(0.9, 0.99), ema_decay=0.995)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser = cli.parser(__doc__)
    what = parser.add_argument_group("what to train")
    what.add_argument("base", metavar="RUN", nargs="?", help="folder of a training run, or a shipped model: mnist")
    what.add_argument("--data", help="embedded, full, fashion, or a folder with the IDX files (default: embedded)")
    program.add_training_flags(parser, Recipe(), "images")
    program.add_run_flags(parser, "runs/inpainting", "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Fine-tune, or go on with a run."""
    options = parse()
    if options.resume is None and options.base is None:
        raise ValueError("name the trained model to start from: the folder of a run, or mnist, which is shipped")
    if options.resume is not None and options.base is not None:
        raise ValueError("a resumed run keeps its own settings: leave out RUN, or start a new run")
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), "runs/inpainting", PixelInpainting.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the base model or from what was saved, and draw the pictures."""
    recipe, folder = run.recipe, run.folder
    if run.saved is None:
        model = PixelInpainting.started_from(PixelDiffusion.load(recipe.base))
    else:
        model = PixelInpainting(PixelDiffusionConfig.from_dict(run.saved[1]["config"]), Rng(0))
    rng = Rng(recipe.seed)
    digits, unseen = (mnist.load(recipe.data, split) for split in ("train", "test"))
    if digits.images.shape[1:] != model.config.size:
        raise ValueError(f"the model draws images of {model.config.size}, the data have {digits.images.shape[1:]}")

    loss_at = loss_of(model, recipe, digits, rng.at(ORDER))

    def preview(step: int) -> None:
        image.save_png(folder / f"samples_{step:06d}.png", sheet(model, unseen, rng.at(PICTURES), steps=10), scale=2)

    what = f"{len(digits):,} images"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=preview)
    with training.ema.applied():
        image.save_png(folder / "samples.png", sheet(model, unseen, rng.at(PICTURES), steps=50, rows=6), scale=2)
    print(f"Test digits with hidden parts, painted: {folder / 'samples.png'}")
    script = pathlib.Path(__file__).with_name("inpaint.py")
    print(f"Paint more:\n  {cli.command(script, folder, 207, '--mask', 'bottom')}")


def loss_of(model: PixelInpainting, recipe: Recipe, digits: mnist.Digits, order: Rng) -> DrawnLoss:
    """The loss of a share of a step's batch of images."""
    batches = Batches(digits.images, digits.labels, batch_size=recipe.batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array | None, ...]:
        images, labels = (share.of(a) for a in batches.at(step - 1))
        x_0 = backend.to_device(image.to_signed(images[..., None]))
        return model.draw(x_0, rng, labels if model.config.unet.classes else None)

    return DrawnLoss(draw_at, model.loss_of)


def sheet(model: PixelInpainting, digits: mnist.Digits, rng: Rng, steps: int, rows: int = 3) -> np.ndarray:
    """Pairs of rows of ten: what is known of some digits, and what the model makes of it."""
    n = 10 * rows
    known = image.to_signed(digits.images[np.arange(n) * len(digits) // n][..., None])
    mask = random_masks(rng.at(0), n, model.config.size)
    how = Sampling(steps=min(steps, model.schedule.T))
    painted = backend.to_numpy(last(model.inpaint(known, mask, rng.at(1), how)))
    pairs = np.stack([x.reshape(rows, 10, *known.shape[1:]) for x in (shown(known, mask)[..., :1], painted)], axis=1)
    return image.grid(pairs.reshape(-1, *known.shape[1:]), columns=10)


if __name__ == "__main__":
    cli.run(main)
