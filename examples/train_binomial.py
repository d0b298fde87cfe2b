"""Train diffusion on bits, the second process of Sohl-Dickstein et al. 2015 (E21): noise is coin tosses.

    python examples/train_binomial.py                    the heartbeat of the paper, a 1 in every fifth place; a minute
    python examples/train_binomial.py --data embedded    5,000 digits in black and white; some minutes on two CPU cores
    python examples/train_binomial.py --data full        all 60,000, downloaded once
    python examples/train_binomial.py --resume RUN       go on after Ctrl-C, or after the power went

At the end it measures the bound on -log p(x_0) in bits, on test images that training did not see. For the heartbeat it
comes near log2 5 = 2.32 bits a sequence, which it takes to say where the first pulse is. The folder of the run receives
samples_000000.png, ... (what the model draws as it learns), then samples.png, film_strip.png, denoising.gif, loss.png,
bound.png (how many bits each step of the diffusion costs), and checkpoint.npz, which sample_binomial.py draws from.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, cli, image, program
from tinydiff.backend import Array
from tinydiff.data import mnist
from tinydiff.data.augment import random_shift
from tinydiff.data.heartbeat import heartbeats
from tinydiff.data.loader import Batches
from tinydiff.diffusion import last
from tinydiff.files import atomic_file
from tinydiff.models import BinomialDiffusion, BinomialDiffusionConfig
from tinydiff.nn import UNetConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import DrawnLoss, Share

WEIGHTS, ORDER, NOISE, PICTURES, BOUND = range(5)
"""The names of the run's random streams."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    shift: move each training image by up to this many pixels. measured: how many samples the bound is measured on.
    timesteps: the T of diffusion. base: width of the network, of the U-Net's first level, or of the BitNetwork's layers
    for sequences. The rest is as in TrainSettings.
    """

    data: str
    steps: int
    batch_size: int
    base: int
    lr: float = 3e-3
    shift: int = 0
    measured: int = 200
    timesteps: int = 200
    warmup: int = 100
    ema_decay: float = 0.995
    seed: int = 0

    def model(self, size: tuple[int, int]) -> BinomialDiffusionConfig:
        """The model of images of this size; a sequence is an image of height 1."""
        if size[0] == 1:
            return BinomialDiffusionConfig(size, width=self.base, T=self.timesteps)
        unet = UNetConfig(base=self.base, multipliers=(1, 2), blocks=1, attention=(), patch=2)
        return BinomialDiffusionConfig(size, unet, T=self.timesteps)

    def settings(self) -> TrainSettings:
        """How to train it."""
        return TrainSettings(self.steps, self.lr, warmup=self.warmup, betas=(0.9, 0.99), ema_decay=self.ema_decay)


HEARTBEAT = Recipe("heartbeat", steps=2000, batch_size=128, base=256, measured=1000)
IMAGES = Recipe("embedded", steps=1500, batch_size=64, base=32, shift=1)


def load(data: str, split: str) -> np.ndarray:
    """One split of a data set as bits, uint8 (N, H, W): grey levels above the middle are 1."""
    if data == "heartbeat":
        return np.tile(heartbeats().astype(np.uint8), (200, 1))[:, None, :]  # there is nothing else to test on
    return (mnist.load(data, split).images > 127).astype(np.uint8)


def to_input(bits: np.ndarray) -> Array:
    """uint8 (B, H, W) -> float32 (B, H, W, 1), 0 or 1, on the device in use."""
    return backend.to_device(bits[..., None].astype(np.float32))


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser = cli.parser(__doc__)
    parser.add_argument("--data", help="heartbeat (default), embedded, full, fashion, or a folder with four IDX files")
    for flag, of, metavar, text in (
        ("--batch-size", int, "N", "samples a step"),
        ("--lr", float, "LR", "peak learning rate"),
        ("--timesteps", int, "T", "the number of diffusion steps"),
        ("--base", int, "N", "width of the network"),
        ("--seed", int, "N", "equal seeds give equal bits"),
    ):
        heartbeat, images = (getattr(recipe, flag[2:].replace("-", "_")) for recipe in (HEARTBEAT, IMAGES))
        default = f"{heartbeat}" if heartbeat == images else f"{heartbeat} for the heartbeat, {images} for images"
        parser.add_argument(flag, type=of, metavar=metavar, help=f"{text} (default: {default})")
    length = parser.add_mutually_exclusive_group()
    steps = f"gradient steps (default: {HEARTBEAT.steps} for the heartbeat, {IMAGES.steps} for images)"
    length.add_argument("--steps", type=int, metavar="N", help=steps)
    length.add_argument("--minutes", type=float, metavar="M", help="as many steps as fit in about M minutes")
    program.add_run_flags(parser, "runs/binomial", "steps between samples (default: five a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then draw the pictures and measure the bound."""
    options = parse()
    usual = HEARTBEAT if options.data in (None, "heartbeat") else IMAGES
    with cli.on_device(options.device):
        train(program.start_or_resume(options, usual, "runs/binomial", BinomialDiffusion.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run; then draw the pictures and measure the bound."""
    recipe, folder = run.recipe, run.folder
    rng = Rng(recipe.seed)
    bits = load(recipe.data, "train")
    model = BinomialDiffusion(recipe.model(bits.shape[1:]), rng.at(WEIGHTS))
    loss_at = loss_of(model, recipe, bits, rng.at(ORDER))

    def preview(step: int) -> None:
        samples = last(model.sample(40, rng.at(PICTURES), steps=min(20, recipe.timesteps)))
        image.save_png(folder / f"samples_{step:06d}.png", sheet(samples), scale=scale_of(bits))

    what = f"{len(bits):,} samples of {cli.short(recipe.data)}"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="samples", preview=preview, previews=5)
    with training.ema.applied():
        pictures(model, rng.at(PICTURES), folder, scale_of(bits))
        measure(model, bits, load(recipe.data, "test")[: recipe.measured], rng.at(BOUND), folder)
    print(f"The samples are in {folder / 'samples.png'}; how they came out of coin tosses: film_strip.png.")
    print(f"Draw more:\n  {cli.command(pathlib.Path(__file__).with_name('sample_binomial.py'), folder, '--n', 64)}")


def loss_of(model: BinomialDiffusion, recipe: Recipe, bits: np.ndarray, order: Rng) -> DrawnLoss:
    """The loss of a share of a step's batch, its images moved by a random shift: in bits for each bit of the data."""
    batches = Batches(bits, batch_size=recipe.batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array, ...]:
        (chosen,) = (share.of(a) for a in batches.at(step - 1))
        return model.draw(to_input(random_shift(chosen, recipe.shift, rng.at(0))), rng.at(1))

    return DrawnLoss(draw_at, model.loss_of)


def measure(model: BinomialDiffusion, train: np.ndarray, test: np.ndarray, rng: Rng, folder: pathlib.Path) -> None:
    """Print the bound on these test data, beside what independent bits of the training data's frequencies cost."""
    pieces = np.array_split(test, math.ceil(len(test) / 50))
    terms = [
        model.bound(to_input(piece), rng.at(i))
        for i, piece in enumerate(cli.progress(pieces, "measuring the bound", len(pieces)))
    ]
    bits = np.concatenate(terms, axis=1) / math.log(2)  # (T+1, N)
    total, dimensions = bits.sum(axis=0), test[0].size
    error = total.std() / math.sqrt(len(total))
    often = ((train.sum(axis=0) + 1) / (len(train) + 2)).astype(np.float64)  # of a 1, at each place
    alone = -np.where(test == 1, np.log2(often), np.log2(1 - often)).sum(axis=(1, 2)).mean()
    print(
        f"the bound on {len(test)} test samples is {total.mean():.3f} ± {error:.3f} bits a sample, "
        f"{total.mean() / dimensions:.4f} a bit; independent bits, each with its own frequency, cost {alone:.3f}"
    )
    bound_curve(folder / "bound.png", bits.mean(axis=1))


def bound_curve(path: pathlib.Path, bits: np.ndarray) -> None:
    """Draw what each step of the diffusion costs in bits: L_{t-1} against t, and their sum from T down."""
    from matplotlib.figure import Figure

    t = np.arange(1, len(bits))
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xlabel="step t of the diffusion, from noise on the right to data on the left", ylabel="bits"
    )
    axes.plot(t, np.cumsum(bits[-2::-1])[::-1], color="tab:blue", label="the bound, summed from T down to t")
    axes.plot(t, bits[:-1] * len(t), color="tab:red", lw=0.8, label=r"T L$_{t-1}$, the rate at which it grows")
    axes.set(title="What each step of the diffusion costs")
    axes.grid(True, alpha=0.2)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def sheet(x: Array) -> np.ndarray:
    """The picture of samples (n, H, W, 1) of bits: images in rows of ten, sequences one below the other."""
    sequences = x.shape[1] == 1
    return image.grid(2 * backend.to_numpy(x) - 1, columns=1 if sequences else 10, gap=0 if sequences else 2)


def film(states: list[np.ndarray]) -> np.ndarray:
    """How samples came out of noise: the film strip of images; of each sequence its states, x_T above, x_0 below."""
    signed = [2 * x - 1 for x in states]
    if states[0].shape[1] > 1:
        return image.film_strip(signed)
    times = np.linspace(0, len(signed) - 1, 50).round().astype(int)
    return image.grid(np.concatenate([signed[i] for i in times], axis=1)[:8], columns=8, gap=6)


def scale_of(bits: np.ndarray) -> int:
    """How many pixels of a picture a bit is wide."""
    return 8 if bits.shape[1] == 1 else 2


def pictures(model: BinomialDiffusion, rng: Rng, folder: pathlib.Path, scale: int) -> None:
    """samples.png, film_strip.png and denoising.gif: 100 samples in all T steps."""
    T = model.config.T
    states = [backend.to_numpy(x) for x in cli.progress(model.sample(100, rng), "drawing", T + 1)]
    image.save_png(folder / "samples.png", sheet(states[-1]), scale)
    image.save_png(folder / "film_strip.png", film(states), max(2, scale // 2))
    frames = [sheet(x[:20]) for x in [*states[:-1][:: max(1, T // 40)], states[-1]]]
    image.save_gif(folder / "denoising.gif", frames, ms=100, scale=scale)


if __name__ == "__main__":
    cli.run(main)
