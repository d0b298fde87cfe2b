"""Judge what a model draws: by a classifier that reads digits, and by distances in the space of its features.

    python examples/evaluate.py runs/mnist                        500 digits, beside as many held-out ones
    python examples/evaluate.py mnist --n 10000 --data full       the shipped model, beside all of MNIST's test digits
    python examples/evaluate.py runs/mnist --sampler dpm --steps 10 --guidance 1
    python examples/evaluate.py samples.npz                       what sample.py --save-array wrote
    python examples/evaluate.py runs/mnist --train-on-samples     can a classifier learn to read from them alone?

Both are measured against training images. The column of real test images, measured as if a model had drawn them, says
what is the best to hope for.

    Fréchet distance     of means and covariances of the features; 0 is best, small sets never reach it
    kernel distance      of all their moments up to the third, 0 on average for real images
    precision            the share of samples that lie among real images (quality)
    recall               the share of real images that lie among the samples (diversity)
    copies               how often a sample is nearer to a training image than a test image is: 50 % without copying
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import zipfile

import numpy as np

from tinydiff import Rng, backend, checkpoint, cli, image, metrics
from tinydiff.checkpoint import CheckpointError
from tinydiff.data import mnist
from tinydiff.diffusion import Sampling
from tinydiff.diffusion.samplers import SAMPLERS, USUAL_STEPS
from tinydiff.models import Classifier, ClassifierConfig, PixelDiffusion
from tinydiff.models.classifier import reading_loss
from tinydiff.models.pixel_diffusion import USUAL_GUIDANCE
from tinydiff.train import Training, TrainSettings, train

SAMPLES, CHOICE, BLOCKS, LESSONS = range(4)
"""The names of the program's random streams."""

FEWEST = 20
"""Images without which the distances mean nothing."""

SURE = 0.9
"""The probability over which a digit counts as read."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "run", metavar="RUN", type=pathlib.Path, help="a run's folder, a shipped model (mnist), or an array of samples"
    )
    parser.add_argument("--n", type=int, default=500, metavar="N", help="how many samples (default: %(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="see sample.py (default: %(default)s)")
    usual = ", ".join(f"{steps} for {sampler}" for sampler, steps in USUAL_STEPS.items())
    parser.add_argument("--steps", type=int, metavar="N", help=f"1 to T (default: {usual}, all T for ddpm)")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help=f"1 is none, 3 strong (E35; default: {USUAL_GUIDANCE} if the model knows classes)",
    )
    parser.add_argument(
        "--data",
        default="embedded",
        help="the real images: embedded (default), full, fashion, or a folder of IDX files; the nearest neighbours are "
        "only meant if the model was trained on these",
    )
    parser.add_argument(
        "--train-on-samples",
        action="store_true",
        help="also train a classifier on the samples, labelled with what was asked for, and test it on real images; "
        "a minute or two",
    )
    parser.add_argument(
        "--classifier",
        default="classifier",
        metavar="RUN",
        help="the judge: a run of classify_mnist.py",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_device(parser)
    parser.add_argument("--out", type=pathlib.Path, metavar="PNG", help="pairs (default: nearest.png in the run)")
    parser.add_argument("--batch-size", type=int, default=250, metavar="N", help="drawn at once (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Draw the samples, measure them and as many test images, and print the table."""
    options = parse()
    if options.n < FEWEST or options.batch_size < 1:
        raise ValueError(f"--n must be at least {FEWEST} and --batch-size 1, got {options.n} and {options.batch_size}")
    how = Sampling(options.sampler, options.steps)
    with cli.on_device(options.device):
        rng = Rng(options.seed)
        training, test = (signed(mnist.load(options.data, split), rng.at(CHOICE)) for split in ("train", "test"))
        judge = Classifier.load(options.classifier)
        samples, file = load_array(options.run), checkpoint.find(options.run)
        out = cli.output(options.out, file, "nearest.png")
        if samples is None:
            model = PixelDiffusion.load(file)
            check_fits(judge, test[0], model.config.size, options.train_on_samples and not model.config.unet.classes)
            samples = draw(model, how, options, rng.at(SAMPLES))
        else:
            check_fits(judge, test[0], samples[0].shape[1:3], options.train_on_samples and samples[1] is None)
            samples = in_order(rng.at(CHOICE).permutation(len(samples[0])), samples)  # a file may be sorted by class
        n = min(options.n, len(samples[0]), len(test[0]), len(training[0]))
        if n < FEWEST:
            found = f"{len(samples[0])} samples and {len(test[0])} test images"
            raise ValueError(f"measuring takes at least {FEWEST} images of each, got {found}")
        samples, test = (in_order(slice(n), labelled) for labelled in (samples, test))
        columns = {"samples": samples, "real test images": test}
        rows = [measure(judge, *columns[name], training[0], test[0], rng) for name in columns]
        if options.train_on_samples:
            for row, (images, labels) in zip(rows, columns.values(), strict=True):
                assert labels is not None  # check_fits saw to that
                row["test images read after training on them"] = taught(images, labels, test, rng.at(LESSONS))
    print(f"{n} samples and {n} test images against {n} training images of {options.data}\n")
    print_table(rows, list(columns))
    save_pairs(out, samples[0], training[0])
    print(f"\nthe samples nearest to a training image, above it, are in {out}")


def check_fits(judge: Classifier, test: np.ndarray, size: tuple[int, ...], unlabelled: bool) -> None:
    """Raise ValueError for samples that the classifier cannot read, or cannot be taught without their labels."""
    sizes = {"the classifier reads": judge.config.size, "--data has": test.shape[1:3], "the samples have": size}
    if len(set(sizes.values())) > 1:
        raise ValueError("the sizes differ: " + ", ".join(f"{what} {size}" for what, size in sizes.items()))
    if unlabelled:
        raise ValueError(
            "--train-on-samples needs to know what each sample was to show; these were drawn without classes"
        )


Labelled = tuple[np.ndarray, np.ndarray | None]
"""Images, float32 (N, H, W, 1) in [-1, 1], and the class of each, (N,), where it is known."""


def signed(digits: mnist.Digits, rng: Rng) -> Labelled:
    """Real images in random order."""
    images, labels = in_order(rng.permutation(len(digits)), (digits.images, digits.labels))
    return image.to_signed(images[..., None]), labels


def in_order(order: np.ndarray | slice, labelled: Labelled) -> Labelled:
    """The images at these places, and their labels."""
    images, labels = labelled
    return images[order], None if labels is None else labels[order]


def load_array(path: pathlib.Path) -> Labelled | None:
    """The samples in a file that sample.py wrote, or None if this is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "samples" not in file.files:
                return None
            samples, labels = file["samples"], file["labels"] if "labels" in file.files else None
    except (OSError, ValueError, zipfile.BadZipFile):
        return None  # a checkpoint, or what checkpoint.find has words for
    if (
        samples.dtype.kind != "f"
        or samples.ndim != 3
        or not (samples.size and 0 <= samples.min() <= samples.max() <= 1)
    ):
        raise CheckpointError(
            f"{path}: expected samples (N, H, W), floats in [0, 1], got {samples.dtype} {samples.shape}"
        )
    if labels is not None and (labels.shape != samples.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise CheckpointError(
            f"{path}: expected a label >= 0 for each of {len(samples)} samples, got {labels.dtype} {labels.shape}"
        )
    return samples[..., None].astype(np.float32) * 2 - 1, labels


def draw(model: PixelDiffusion, how: Sampling, options: argparse.Namespace, rng: Rng) -> Labelled:
    """Samples of a model, of each class in turn if it knows classes."""
    classes = model.config.unet.classes
    labels = None if classes is None else np.arange(options.n) % classes
    starts = range(0, options.n, options.batch_size)
    images = []
    for batch, start in enumerate(starts):
        asked = None if labels is None else labels[start : start + options.batch_size]
        size = min(options.batch_size, options.n - start)
        states = model.sample(size, rng.at(batch), how, guidance=options.guidance, label=asked)
        *_, x_0 = cli.progress(states, f"batch {batch + 1} of {len(starts)}", how.steps_of(model.schedule.T) + 1)
        images.append(backend.to_numpy(x_0).clip(-1, 1))
    return np.concatenate(images), labels


def measure(
    judge: Classifier,
    images: np.ndarray,
    labels: np.ndarray | None,
    training: np.ndarray,
    test: np.ndarray,
    rng: Rng,
) -> dict[str, str]:
    """One column of the table: what is measured of these images."""
    p = judge.probabilities(images)
    n = len(images)
    found = metrics.compare(judge.features(training[:n]), judge.features(images), rng.at(BLOCKS))
    flat, flat_training = images.reshape(n, -1), training.reshape(len(training), -1)
    copies = metrics.copying(flat, test.reshape(len(test), -1), flat_training)
    return {
        f"read with a probability over {SURE}": f"{np.mean(p.max(axis=1) > SURE):.1%}",
        "show the class asked for": "" if labels is None else f"{np.mean(p.argmax(axis=1) == labels):.1%}",
        "Fréchet distance": f"{found.frechet:.2f}",
        "kernel distance × 100": f"{100 * found.kernel.value:.2f} ± {100 * found.kernel.error:.2f}",
        "precision": f"{found.precision:.1%}",
        "recall": f"{found.recall:.1%}",
        "distance to the nearest training image": f"{metrics.nearest(flat, flat_training)[1].mean():.2f}",
        "nearer to one than a test image is (copies)": f"{copies.value:.1%} ± {copies.error:.1%}",
    }


def taught(images: np.ndarray, labels: np.ndarray, test: Labelled, rng: Rng, steps: int = 300) -> str:
    """The share of test images that a classifier reads which was trained on these images alone.

    The classification accuracy score of Ravuri & Vinyals 2019: it falls where samples are bad, where they show another
    class than was asked for, and where kinds are missing.
    """
    pixels = image.to_uint8(images[..., 0])
    batch_size = min(64, len(pixels))
    model = Classifier(ClassifierConfig(images.shape[1:3], int(labels.max()) + 1), rng.at(0))
    loss_at = reading_loss(model, pixels, labels, batch_size, rng.at(1))
    settings = TrainSettings(steps, 2e-3, weight_decay=0.05, ema_decay=0.98)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(model, settings, pathlib.Path(folder) / checkpoint.NAME, {})
        train(training, loss_at, rng.at(2), batch_size=batch_size, resume_with="no command: start again")
    with training.ema.applied():
        p = model.eval().probabilities(test[0])
    return f"{np.mean(p.argmax(axis=1) == test[1]):.1%}"


def print_table(rows: list[dict[str, str]], names: list[str]) -> None:
    """Print the columns side by side, as Markdown."""
    lines = [["", *names], *([what, *(row[what] for row in rows)] for what in rows[0])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def save_pairs(path: pathlib.Path, samples: np.ndarray, training: np.ndarray, columns: int = 10, rows: int = 2) -> None:
    """Draw the samples that are nearest to a training image, each above that image."""
    index, distance = metrics.nearest(samples.reshape(len(samples), -1), training.reshape(len(training), -1))
    chosen = np.argsort(distance)[: columns * rows].reshape(rows, columns)
    pairs = [half for row in chosen for half in (samples[row], training[index[row]])]
    image.save_png(path, image.grid(np.concatenate(pairs), columns), scale=2)


if __name__ == "__main__":
    cli.run(main)
