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

import numpy as np

from tinydiff import checkpoint, cli, image
from tinydiff.data import mnist
from tinydiff.files import atomic_file
from tinydiff.models.classifier import Classifier, ClassifierConfig, reading_loss
from tinydiff.rng import Rng
from tinydiff.train import Training, TrainSettings, train

WEIGHTS, ORDER, NOISE = range(3)
"""The names of the run's random streams."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data", default="embedded", help="embedded (default), full, fashion, or a folder of IDX files"
    )
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="gradient steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds give equal bits")
    cli.add_device(parser)
    parser.add_argument("--out", metavar="DIR", help="default: runs/classify, or a new runs/classify-2, ...")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped, with its own settings")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then test."""
    options = parse()
    with cli.on_device(options.device):
        if options.resume is None:
            folder = cli.new_folder(options.out, "runs/classify")
            settings = TrainSettings(options.steps, options.lr, weight_decay=0.05, ema_decay=0.99)
            about = {"data": options.data, "batch_size": options.batch_size, "seed": options.seed}
            run(settings, about, folder)
        else:
            folder = pathlib.Path(options.resume)
            arrays, meta = checkpoint.load(folder, Classifier.kind, resume=True)
            run(TrainSettings(**meta["settings"]), meta["about"], folder, (arrays, meta))


def run(settings: TrainSettings, about: dict, folder: pathlib.Path, saved: tuple[dict, dict] | None = None) -> None:
    """Train in this folder, from the start or from what its checkpoint holds, and test the averaged weights."""
    rng = Rng(about["seed"])
    digits, test = mnist.load(about["data"], "train"), mnist.load(about["data"], "test")
    model = Classifier(ClassifierConfig(digits.images.shape[1:], len(digits.class_names)), rng.at(WEIGHTS))
    loss_at = reading_loss(model, digits.images, digits.labels, about["batch_size"], rng.at(ORDER))
    training = Training(model, settings, folder / checkpoint.NAME, about)
    if saved is not None:
        training.restore(*saved)
    resume_with = cli.command(__file__, "--resume", folder)
    train(training, loss_at, rng.at(NOISE), batch_size=about["batch_size"], resume_with=resume_with)

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
