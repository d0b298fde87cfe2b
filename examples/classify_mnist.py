"""Train a small convolutional network to read digits: the engine under the diffusion models is a general one.

    python examples/classify_mnist.py                           the 5,000 digits in the package: about a minute
    python examples/classify_mnist.py --data full --steps 1500  60,000 digits: reads 99.5 % of the 10,000 test digits
    python examples/classify_mnist.py --resume runs/classify    goes on after Ctrl-C

It reports how many of the test images, which it has never seen, it reads correctly, and draws its worst mistakes. The
classifier that the package brings along, which judges what diffusion models draw (evaluate.py), is of the second kind.
"""

from __future__ import annotations

import argparse
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import cli, image, program
from tinydiff.data import mnist
from tinydiff.files import atomic_file
from tinydiff.models.classifier import Classifier, ClassifierConfig, reading_loss
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings

WEIGHTS, ORDER, NOISE = range(3)
"""The names of the run's random streams."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line."""

    data: str = "embedded"
    steps: int = 500
    batch_size: int = 128
    lr: float = 2e-3
    seed: int = 0

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, weight_decay=0.05, ema_decay=0.99)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser = cli.parser(__doc__)
    what = parser.add_argument_group("what to train")
    what.add_argument("--data", help="embedded, full, fashion, or a folder with the IDX files (default: embedded)")
    program.add_training_flags(parser, Recipe(), "images")
    program.add_run_flags(parser, "runs/classify")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then test."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), "runs/classify", Classifier.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, and test the averaged weights."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    digits, test = mnist.load(recipe.data, "train"), mnist.load(recipe.data, "test")
    model = Classifier(ClassifierConfig(digits.images.shape[1:], len(digits.class_names)), rng.at(WEIGHTS))
    loss_at = reading_loss(model, digits.images, digits.labels, recipe.batch_size, rng.at(ORDER))
    what = f"{len(digits):,} images"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images")

    model.eval()
    with training.ema.applied():
        p = model.probabilities(image.to_signed(test.images[..., None]))
    read, sure = p.argmax(axis=1), p.max(axis=1) > 0.9
    wrong = np.flatnonzero(read != test.labels)
    print(f"{1 - len(wrong) / len(test):.2%} of the {len(test):,} test images are read correctly")
    print(
        f"{sure.mean():.2%} are read with a probability over 0.9, {sure[wrong].sum()} of them wrongly; "
        f"the mean probability of what it reads is {p.max(axis=1).mean():.2%}"
    )
    confusion(folder / "confusion.png", test.labels, read, test.class_names)
    if len(wrong):
        worst = wrong[np.argsort(-p[wrong, read[wrong]])][:50]
        image.save_png(folder / "mistakes.png", image.grid(test.images[worst], columns=10), scale=2)
        print(f"its surest mistakes are in {folder / 'mistakes.png'}")
    print(f"what it takes for what is in {folder / 'confusion.png'}")


def confusion(path: pathlib.Path, labels: np.ndarray, read: np.ndarray, names: tuple[str, ...]) -> None:
    """Draw how often each class (row) is read as each class (column)."""
    from matplotlib.figure import Figure

    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, read), 1)
    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="read as", ylabel="is", title="Test images")
    axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(1), cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(names)), names)
    for (i, j), count in np.ndenumerate(counts):
        if count:
            axes.text(j, i, str(count), ha="center", va="center", color="white" if i == j else "black")
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    cli.run(main)
