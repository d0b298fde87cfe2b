"""Train a diffusion model on handwritten digits: Algorithm 1 on MNIST, with the deck's U-Net.

    python examples/train_mnist.py                         about four minutes on two CPU cores; 5,000 digits
    python examples/train_mnist.py --data full             all 60,000, downloaded once
    python examples/train_mnist.py --no-class-conditional  a model that is never told which digit it sees
    python examples/train_mnist.py --recipe ddpm           the deck's plain recipe (Ho et al. 2020)
    python examples/train_mnist.py --recipe shipped        the model that the package brings along; two hours
    python examples/train_mnist.py --recipe likelihood     as that, for few bits (evaluate_nll.py) and not for the eye;
                                                           40 minutes
    python examples/train_mnist.py --resume runs/mnist     go on after Ctrl-C, or after the power went

The folder of the run receives samples_000000.png, ... (the same noise turned into digits by the model as it learns),
then samples.png, film_strip.png, denoising.gif, loss.png, and checkpoint.npz, which sample.py draws more digits from.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydiff import backend, cli, image, program
from tinydiff.backend import Array
from tinydiff.cli import integers
from tinydiff.data import mnist
from tinydiff.data.augment import random_shift
from tinydiff.data.loader import Batches
from tinydiff.diffusion import Sampling, last
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig
from tinydiff.models.pixel_diffusion import SCHEDULES, TARGETS, WEIGHTINGS
from tinydiff.nn import UNetConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import DrawnLoss, Share

WEIGHTS, ORDER, NOISE, PICTURES = range(4)
"""The names of the run's random streams: rng.at(WEIGHTS) draws the first weights, and so on."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    timesteps: the T of diffusion. shift: move each training image by up to this many pixels, which makes more of few
    images. base, multipliers, blocks, patch: the sizes of the U-Net, see UNetConfig. decay: whether the learning rate
    falls to zero or stays. The other fields are those of PixelDiffusionConfig and TrainSettings.
    """

    data: str = "embedded"
    steps: int = 1500
    batch_size: int = 64
    lr: float = 3e-3
    warmup: int = 100
    decay: bool = True
    ema_decay: float = 0.995
    timesteps: int = 1000
    schedule: str = "cosine"
    target: str = "x0"
    weighting: str = "min-snr"
    learned_variance: bool = False
    stratified: bool = True
    class_conditional: bool = True
    shift: int = 1
    base: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    patch: int = 2
    fourier: tuple[int, ...] = ()
    seed: int = 0

    def model(self, digits: mnist.Digits) -> PixelDiffusionConfig:
        """The model for these images."""
        names = digits.class_names if self.class_conditional else ()
        unet = UNetConfig(
            base=self.base,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention=(),
            patch=self.patch,
            fourier=self.fourier,
            classes=len(names) or None,
        )
        H, W = digits.images.shape[1:]
        return PixelDiffusionConfig(
            unet,
            (H, W),
            self.timesteps,
            self.schedule,
            self.target,
            self.weighting,
            class_names=names,
            stratified=self.stratified,
            learned_variance=self.learned_variance,
        )

    def settings(self) -> TrainSettings:
        """How to train it."""
        return TrainSettings(
            self.steps,
            self.lr,
            final_lr=0.0 if self.decay else self.lr,
            warmup=self.warmup,
            betas=(0.9, 0.99),
            ema_decay=self.ema_decay,
        )


RECIPES = {
    "default": Recipe(),
    "ddpm": Recipe(
        schedule="linear",
        target="eps",
        weighting="plain",
        stratified=False,
        class_conditional=False,
        lr=1e-3,
        decay=False,
        shift=0,
    ),
    "shipped": Recipe(
        data="full",
        steps=16_000,
        lr=2e-3,
        warmup=500,
        ema_decay=0.999,
        target="v",
        weighting="plain",
        learned_variance=True,
        shift=0,
        base=48,
    ),
}
RECIPES["likelihood"] = dataclasses.replace(RECIPES["shipped"], steps=6000, weighting="vlb", fourier=(4, 5, 6))


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser = cli.parser(__doc__)
    default = RECIPES["default"]

    def add(group: Any, flag: str, text: str, **how: Any) -> None:
        value = getattr(default, flag[2:].replace("-", "_"))
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        group.add_argument(flag, help=f"{text} (default: {shown})", **how)

    what = parser.add_argument_group("what to train")
    what.add_argument("--recipe", choices=RECIPES, help="where the defaults come from (default: default)")
    add(what, "--data", "embedded, full, fashion, or a folder with the four IDX files")
    add(what, "--class-conditional", "tell the model which digit it sees", action=argparse.BooleanOptionalAction)
    add(what, "--timesteps", "T, the number of diffusion steps", type=int, metavar="T")
    add(what, "--schedule", "how the noise grows with t (E6, E7; lesson 3)", choices=SCHEDULES)
    add(what, "--target", "what the network predicts: the noise, the image, or v (E15)", choices=TARGETS)
    add(what, "--weighting", "how much each t counts in the loss", choices=WEIGHTINGS)
    add(
        what,
        "--learned-variance",
        "let the model choose the noise of its reverse steps (E13), for evaluate_nll.py",
        action=argparse.BooleanOptionalAction,
    )
    add(what, "--base", "width of the U-Net's first level", type=int, metavar="N")
    add(what, "--multipliers", "width of each level, over base", type=integers, metavar="N,N,...")
    add(what, "--blocks", "ResBlocks a level", type=int, metavar="N")
    add(what, "--patch", "work on patches of N x N pixels, N² times faster", type=int, metavar="N")
    add(what, "--fourier", "exponents of Fourier features of the image, for few bits", type=integers, metavar="N,N,...")
    program.add_training_flags(parser, default, "images")
    program.add_run_flags(parser, "runs/mnist", "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then draw the final pictures."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, RECIPES[options.recipe or "default"], "runs/mnist", PixelDiffusion.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, and draw the pictures."""
    recipe, folder = run.recipe, run.folder
    rng = Rng(recipe.seed)
    digits = mnist.load(recipe.data)
    model = PixelDiffusion(recipe.model(digits), rng.at(WEIGHTS))
    loss_at = loss_of(model, recipe, digits, rng.at(ORDER))

    def preview(step: int) -> None:
        states = draw(model, rng.at(PICTURES), n=40, steps=min(10, recipe.timesteps))
        shown = last(states) if step > 0 else next(states)  # what has learned nothing leaves the noise as it is
        image.save_png(folder / f"samples_{step:06d}.png", image.grid(shown, columns=10), scale=2)

    what = f"{len(digits):,} images of {cli.short(recipe.data)}"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=preview)
    with training.ema.applied():
        pictures(model, rng.at(PICTURES), folder)
    print(f"The digits are in {folder / 'samples.png'}; how they came out of noise: film_strip.png, denoising.gif.")
    print(f"Draw more:\n  {cli.command(pathlib.Path(__file__).with_name('sample.py'), folder, '--n', 64)}")


def loss_of(model: PixelDiffusion, recipe: Recipe, digits: mnist.Digits, order: Rng) -> DrawnLoss:
    """The loss of a share of a step's batch: images drawn in this order, each moved by a random shift."""
    batches = Batches(digits.images, digits.labels, batch_size=recipe.batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array | None, ...]:
        images, labels = (share.of(a) for a in batches.at(step - 1))
        x_0 = backend.to_device(image.to_signed(random_shift(images, recipe.shift, rng.at(0))[..., None]))
        return model.draw(x_0, rng.at(1), labels if recipe.class_conditional else None)

    return DrawnLoss(draw_at, model.loss_of)


def draw(model: PixelDiffusion, rng: Rng, n: int, steps: int) -> Iterator[np.ndarray]:
    """The states of n samples from x_T to x_0, each (n, H, W, 1); a model with classes draws them in turn."""
    classes = model.config.unet.classes
    label = None if classes is None else np.arange(n) % classes
    states = model.sample(n, rng, Sampling(steps=steps), label=label)
    return (backend.to_numpy(x) for x in states)


def pictures(model: PixelDiffusion, rng: Rng, folder: pathlib.Path) -> None:
    """samples.png, film_strip.png and denoising.gif: 100 samples in up to 50 steps."""
    steps = min(50, model.schedule.T)
    states = list(cli.progress(draw(model, rng, n=100, steps=steps), "drawing", steps + 1))
    image.save_png(folder / "samples.png", image.grid(states[-1], columns=10), scale=2)
    image.save_png(folder / "film_strip.png", image.film_strip(states), scale=2)
    frames = [image.grid(x[:20], columns=5) for x in [*states[:-1:2], states[-1]]]
    image.save_gif(folder / "denoising.gif", frames, ms=100, scale=2)


if __name__ == "__main__":
    cli.run(main)
