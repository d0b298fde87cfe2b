"""The Karras table, measured: one small U-Net on handwritten digits, trained as each column, sampled in few steps.

    python examples/karras_table.py                     four trainings of some minutes, then the table
    python examples/karras_table.py --steps 4000        trained for longer
    python examples/karras_table.py --evaluations 5,79  other numbers of network evaluations

The columns (E22; Karras et al. 2022, Table 1) are VP, VE, iDDPM + DDIM, and the paper's own, EDM. Each network is
sampled twice: as its own column says, and as EDM says, which any network allows. The quality of samples is how far they
are from real digits, in the features of the package's classifier (Fréchet distance, less is better). Expect noise from
VE's own sampling: its time steps need hundreds of evaluations (lesson 11 says why), and EDM's do not.

The same command goes on where it was stopped: a column that has been trained is not trained again. The folder of the
run receives a folder for each column, table.png and samples.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, checkpoint, cli, image
from tinydiff.backend import Array
from tinydiff.data import mnist
from tinydiff.data.augment import random_shift
from tinydiff.data.loader import Batches
from tinydiff.diffusion import Column, last
from tinydiff.diffusion.edm import COLUMNS
from tinydiff.files import atomic_file
from tinydiff.metrics import frechet_distance
from tinydiff.models import Classifier, KarrasConfig, KarrasDiffusion
from tinydiff.nn import UNetConfig
from tinydiff.rng import Rng
from tinydiff.train import Training, TrainSettings, train
from tinydiff.workers import DrawnLoss, Share

WEIGHTS, ORDER, NOISE, SAMPLES, REAL = range(5)
"""The names of the run's random streams."""

NAMES = {"vp": "VP", "ve": "VE", "iddpm": "iDDPM + DDIM", "edm": "EDM"}


@dataclass(frozen=True)
class Settings:
    """What decides how the networks come out; a column is only gone on with under the settings it began with."""

    data: str
    steps: int
    batch_size: int
    lr: float
    base: int
    seed: int


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data", default="embedded", help="embedded (default), full, fashion, or a folder of IDX files"
    )
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="gradient steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--base", type=int, default=32, metavar="N", help="width of the U-Net (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds give equal bits")
    parser.add_argument(
        "--evaluations",
        type=cli.integers,
        default=(5, 9, 17, 35),
        metavar="N,N,...",
        help="network evaluations an image, odd numbers from 3 on (default: 5,9,17,35)",
    )
    parser.add_argument("--n", type=int, default=300, metavar="N", help="images to judge by (default: %(default)s)")
    cli.add_device(parser)
    parser.add_argument("--out", default="runs/karras", metavar="DIR", help="folder of the run (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train the columns that are not trained yet, then measure and draw the table."""
    options = parse()
    if bad := [e for e in options.evaluations if e < 3 or e % 2 == 0]:
        raise ValueError(f"Heun's solver takes 3, 5, 7, ... evaluations, got {bad[0]}")
    if options.n < 2:
        raise ValueError(f"--n must be at least 2, got {options.n}")
    folder = pathlib.Path(options.out)
    cli.check_writable(folder / "table.png")
    data = os.path.abspath(options.data) if os.path.isdir(options.data) else options.data
    settings = Settings(data, *(getattr(options, field.name) for field in dataclasses.fields(Settings)[1:]))
    with cli.on_device(options.device):
        digits = mnist.load(data)
        quality = Quality(digits.images)  # raises before any training for images that the classifier cannot read
        models = {column: trained(column, settings, digits, folder / column) for column in COLUMNS}
        table(models, quality, mnist.load(data, "test"), options, folder)


def trained(column: str, settings: Settings, digits: mnist.Digits, folder: pathlib.Path) -> KarrasDiffusion:
    """The network of a column with its averaged weights: trained now, gone on with, or as it was found."""
    rng = Rng(settings.seed)
    unet = UNetConfig(base=settings.base, multipliers=(1, 2), blocks=1, attention=(), patch=2)
    sigma_data = float(image.to_signed(digits.images).std())
    model = KarrasDiffusion(KarrasConfig(unet, digits.images.shape[1:], column, sigma_data), rng.at(WEIGHTS))
    how = TrainSettings(settings.steps, settings.lr, betas=(0.9, 0.99), ema_decay=0.995)
    training = Training(model, how, folder / checkpoint.NAME, dataclasses.asdict(settings))
    if training.path.exists():
        arrays, meta = checkpoint.load(folder, KarrasDiffusion.kind, resume=True)
        if meta["about"] != training.about:
            raise ValueError(f"{folder} was trained with {meta['about']}, not {training.about}; choose another --out")
        training.restore(arrays, meta)
    if training.step < settings.steps:
        print(f"{NAMES[column]}: {model.count_parameters():,} parameters, {settings.steps - training.step} steps to go")
        resume_with = cli.command(__file__, *sys.argv[1:])
        loss_at = loss_of(model, settings, digits, rng.at(ORDER))
        train(training, loss_at, rng.at(NOISE), batch_size=settings.batch_size, resume_with=resume_with)
    return KarrasDiffusion.load(folder)


def loss_of(model: KarrasDiffusion, settings: Settings, digits: mnist.Digits, order: Rng) -> DrawnLoss:
    """The loss of a share of a step's batch: images drawn in this order, each moved by a random shift."""
    batches = Batches(digits.images, batch_size=settings.batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array, ...]:
        (images,) = batches.at(step - 1)
        shifted = random_shift(share.of(images), 1, rng.at(0))
        return model.draw(backend.to_device(image.to_signed(shifted[..., None])), rng.at(1))

    return DrawnLoss(draw_at, model.loss_of)


# ------------------------------------------------------------------------------------------- measuring the table


def draw(model: KarrasDiffusion, n: int, evaluations: int, seed: int, column: Column | None) -> np.ndarray:
    """n digits in so many network evaluations each, by the sampling of a column, (n, H, W, 1) in [-1, 1]."""
    solver = (column or model.column).solver
    N = (evaluations + 1) // 2 if solver == "heun" else evaluations
    rng = Rng(seed).at(SAMPLES)
    pieces = [last(model.sample(min(250, n - i), rng.at(i), N, column)) for i in range(0, n, 250)]
    return np.concatenate([backend.to_numpy(piece) for piece in pieces]).clip(-1, 1)


def table(
    models: dict[str, KarrasDiffusion],
    quality: Quality,
    test: mnist.Digits,
    options: argparse.Namespace,
    folder: pathlib.Path,
) -> None:
    """Draw from each network in each way, print how far from real digits it is, and save the pictures."""
    ways = [(name, way) for name in models for way in dict.fromkeys([name, "edm"])]
    work = [(name, way, e) for name, way in ways for e in options.evaluations]
    distances, shown = {}, []
    for name, way, evaluations in cli.progress(work, "drawing", len(work)):
        column = None if way == name else Column.edm()
        samples = draw(models[name], options.n, evaluations, options.seed, column)
        distances[name, way, evaluations] = quality(samples)
        shown.append(samples[:4])

    heading = "".join(f"{e:>9}" for e in options.evaluations)
    print(f"\nDistance from real digits after so many network evaluations\n{'trained as':14}{'sampled as':14}{heading}")
    for name, way in ways:
        row = "".join(f"{distances[name, way, e]:9.2f}" for e in options.evaluations)
        print(f"{NAMES[name]:14}{NAMES[way]:14}{row}")
    real = test.images[Rng(options.seed).at(REAL).permutation(len(test))[: options.n]]
    print(f"{len(real)} real digits that were held out: {quality(image.to_signed(real[..., None])):.2f}")
    draw_curves(folder / "table.png", ways, distances, options.evaluations)
    columns = 4 * len(options.evaluations)
    image.save_png(folder / "samples.png", image.grid(np.concatenate(shown), columns=columns), scale=2)
    print(f"The curves are in {folder / 'table.png'}, digits of each row of the table in {folder / 'samples.png'}.")


class Quality:
    """The Fréchet distance of images to real ones, in the features of the package's classifier of digits."""

    def __init__(self, real: np.ndarray):
        self.classifier = Classifier.load("classifier")
        self.real = self._features(image.to_signed(real[..., None]))

    def __call__(self, x: np.ndarray) -> float:
        return frechet_distance(self.real, self._features(x))

    def _features(self, x: np.ndarray) -> np.ndarray:
        return self.classifier.features(backend.to_device(x))


def draw_curves(path: pathlib.Path, ways: list[tuple[str, str]], distances: dict, evaluations: tuple[int, ...]) -> None:
    """The table as curves: a colour for each network, dashed as its own column samples, whole as EDM does."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xscale="log")
    colours = dict(zip(NAMES, ("tab:red", "tab:green", "tab:purple", "tab:blue"), strict=True))
    for name, way in ways:
        line = [distances[name, way, e] for e in evaluations]
        label = f"{NAMES[name]}, sampled as {NAMES[way]}" if way != name else f"{NAMES[name]}, as it is"
        axes.plot(evaluations, line, "o-" if way == "edm" else "o--", color=colours[name], label=label)
    axes.set(xlabel="network evaluations an image", ylabel="distance from real digits", title="The Karras table")
    axes.set_xticks(evaluations, [str(e) for e in evaluations])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.2)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    cli.run(main)
