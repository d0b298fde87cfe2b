"""Measure how many bits a pixel a trained model takes for digits it has not seen: the variational bound (E11).

    python examples/evaluate_nll.py runs/mnist                    500 test digits, one step in 10: a minute or two
    python examples/evaluate_nll.py runs/mnist --every 1          all T steps of each digit; ten times as long
    python examples/evaluate_nll.py runs/mnist --n 2000           more digits, a smaller error
    python examples/evaluate_nll.py runs/mnist --no-labels        hide from the model which digit it sees

An 8-bit pixel takes 8 bits if nothing is known about it. A model that gives the test images a probability p_theta(x_0)
can store them in -log2 p_theta(x_0) bits; the terms of the bound add up to at least that:

    L_T      how far the end of the forward process is from pure noise; nothing to be learned (E5)
    L_t-1    KL(q(x_{t-1} | x_t, x_0) to p_theta(x_{t-1} | x_t)), summed over t = 2..T
    L_0      -log p_theta(x_0 | x_1), the bits that the last step leaves

There is a line for each variance of the reverse steps: the learned one, if the model has learned one, and the two that
need no learning (E13). With --every K one t is drawn from each K neighbouring ones, anew for each batch, and counts K
times, which is right on average; the first K are all measured. The ± is one standard error, which takes in the choice
of images, t and noise.

Good-looking digits and few bits are two things. Most bits are lost in the first steps, which change nothing that an
eye would see: a model trained with --target x0 and --weighting min-snr, which does not care for them, may need more
than 8. `train_mnist.py --recipe likelihood` trains one for few bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np

from tinydiff import backend, checkpoint, cli, image
from tinydiff.backend import Array
from tinydiff.data import mnist
from tinydiff.data.mnist import Digits
from tinydiff.diffusion import Prediction, bits_per_dim, bound_terms
from tinydiff.diffusion.samplers import Denoise
from tinydiff.files import atomic_file
from tinydiff.models import PixelDiffusion
from tinydiff.rng import Rng

NAMES = {"learned": "learned", "posterior": "beta_tilde_t", "beta": "beta_t"}
"""The variances, as the table calls them."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "run", metavar="RUN", type=pathlib.Path, help="folder of a training run, or a shipped model: mnist"
    )
    parser.add_argument(
        "--data",
        metavar="WHICH",
        help="whose test images: embedded, full, fashion, or a folder of IDX files (default: of what the model was "
        "trained on, or full if its file does not say; other images it may have seen)",
    )
    parser.add_argument("--n", type=int, default=500, metavar="N", help="how many images (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=10, metavar="K", help="one t in K; 1 is all (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=50, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument(
        "--labels",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="tell the model which class each image is of (default: if it knows classes)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_device(parser)
    parser.add_argument("--out", type=pathlib.Path, metavar="PNG", help="the picture (default: bits.png in the run)")
    return parser.parse_args()


@dataclasses.dataclass
class Measured:
    """What one batch gave, in bits per dimension.

    times: the t that were drawn, (K,), falling to 1. counts: how many t each stands for, (K,). prior: L_T, (B,).
    steps: L_{t-1} for those t, the last being L_0, (K, B).
    """

    times: np.ndarray
    counts: np.ndarray
    prior: np.ndarray
    steps: np.ndarray

    def parts(self) -> np.ndarray:
        """L_T, sum_t L_{t-1}, L_0 and the total of each image: (4, B)."""
        parts = np.stack([self.prior, self.counts[:-1] @ self.steps[:-1], self.steps[-1]])
        return np.concatenate([parts, parts.sum(axis=0, keepdims=True)])


def main() -> None:
    """Measure batch by batch, print the table, draw the picture."""
    options = parse()
    for name in ("n", "every", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    file = checkpoint.find(options.run)
    _, meta = checkpoint.load(file, PixelDiffusion.kind)
    out = cli.output(options.out, file, "bits.png")
    data = options.data or meta.get("about", {}).get("data", "full")
    digits = some(mnist.load(data, "test"), options.n, Rng(options.seed).at(0))
    with cli.on_device(options.device):
        model = PixelDiffusion.load(file)
        with_labels = _with_labels(model, options.labels)
        check_fits(model, digits)
        variances = [*["learned"] * model.config.learned_variance, "posterior", "beta"]
        batches: dict[str, list[Measured]] = {variance: [] for variance in variances}
        stopped = False
        try:
            for batch in measure(model, digits, with_labels, variances, options):
                for variance, measured in batch.items():
                    batches[variance].append(measured)
        except KeyboardInterrupt:
            stopped = True
    if not batches[variances[0]]:
        raise KeyboardInterrupt("stopped before the first batch was through")
    n = sum(len(measured.prior) for measured in batches[variances[0]])
    print(f"{n} test images of {data}, {'told' if with_labels else 'not told'} their class; bits per dimension:")
    print_table(batches, by_image=options.every == 1)
    draw(out, batches)
    print(f"the terms over t are in {out}")
    if stopped:
        raise KeyboardInterrupt(f"stopped after {n} of {len(digits)} images")
    if options.every > 1:
        print(f"with all steps:\n  {cli.command(__file__, options.run, '--data', data, '--every', 1)}")


def some(digits: Digits, n: int, rng: Rng) -> Digits:
    """n of the images, drawn at random without repetition. Raises ValueError if there are fewer."""
    if n > len(digits):
        raise ValueError(f"--n must be at most {len(digits)}, the number of test images, got {n}")
    chosen = rng.permutation(len(digits))[:n]
    return Digits(digits.images[chosen], digits.labels[chosen], digits.class_names)


def _with_labels(model: PixelDiffusion, wanted: bool | None) -> bool:
    """Whether to tell the model the labels. Raises ValueError if it cannot take them."""
    knows = model.config.unet.classes is not None
    if wanted and not knows:
        raise ValueError("--labels needs a model with classes; this one was trained without labels")
    return knows if wanted is None else wanted


def check_fits(model: PixelDiffusion, digits: Digits) -> None:
    """Raise ValueError if the images or the classes are not those of the model."""
    size, classes = tuple(model.config.size), model.config.unet.classes
    if digits.images.shape[1:] != size:
        raise ValueError(f"the model's images are {size}, those of --data {digits.images.shape[1:]}")
    if classes is not None and digits.labels.max() >= classes:
        raise ValueError(f"the model knows {classes} classes, --data has label {digits.labels.max()}")


def measure(
    model: PixelDiffusion, digits: Digits, with_labels: bool, variances: list[str], options: argparse.Namespace
) -> Iterator[dict[str, Measured]]:
    """The terms of each batch of the images, for each variance, with a progress bar."""
    rng, size = Rng(options.seed).at(1), options.batch_size
    starts = range(0, len(digits), size)
    for batch, start in enumerate(starts):
        images, labels = (a[start : start + size] for a in (digits.images, digits.labels))
        x_0 = backend.to_device(image.to_signed(images[..., None]))
        denoise = remembered(model.denoiser(backend.to_device(labels) if with_labels else None))
        times, counts = draw_times(model.schedule.T, options.every, rng.at(batch, 0))
        noise = rng.at(batch, 1)  # one for all variances: they are compared at the same x_t
        terms = zip(*(bound_terms(x_0, denoise, model.schedule, noise, v, times) for v in variances), strict=True)
        shown = cli.progress(terms, f"batch {batch + 1} of {len(starts)}", 1 + len(times))
        bits = [[backend.to_numpy(bits_per_dim(term, x_0)) for term in of_all] for of_all in shown]
        yield {
            variance: Measured(np.array(times), np.array(counts), prior, np.array(steps))
            for variance, (prior, *steps) in zip(variances, zip(*bits, strict=True), strict=True)
        }


def draw_times(T: int, every: int, rng: Rng) -> tuple[list[int], list[int]]:
    """Which t to measure, in falling order, and how many each stands for.

    One of each `every` neighbouring ones, and all of the first `every`, whose terms are the largest and differ most.
    """
    few = min(every, T)
    blocks = [range(max(few + 1, last - every + 1), last + 1) for last in range(T, few, -every)]
    within = backend.to_numpy(rng.uniform((len(blocks),), np.float64))
    times = [block[int(u * len(block))] for block, u in zip(blocks, within, strict=True)]
    return [*times, *range(few, 0, -1)], [*(len(block) for block in blocks), *[1] * few]


def remembered(denoise: Denoise) -> Denoise:
    """A denoiser that is asked once for each t, and gives the same answer to each variance."""
    last: list[tuple[int, Prediction]] = []

    def answer(x_t: Array, t: int) -> Prediction:
        if not last or last[0][0] != t:
            last[:] = [(t, denoise(x_t, t))]
        return last[0][1]

    return answer


def print_table(batches: dict[str, list[Measured]], by_image: bool) -> None:
    """A line for each variance: L_T, sum L_{t-1}, L_0, and the total with its standard error."""
    print(f"{'variance':14}{'L_T':>9}{'sum L_t-1':>11}{'L_0':>9}{'total':>9}")
    for variance, measured in batches.items():
        parts = [m.parts() for m in measured]
        L_T, L_steps, L_0, total = np.concatenate(parts, axis=1).mean(axis=1)
        totals = np.concatenate([p[3] for p in parts]) if by_image else np.array([p[3].mean() for p in parts])
        error = f"{totals.std(ddof=1) / len(totals) ** 0.5:.4f}" if len(totals) > 1 else "? (one batch)"
        print(f"{NAMES[variance]:14}{L_T:9.5f}{L_steps:11.4f}{L_0:9.4f}{total:9.4f} ± {error}")


def draw(path: pathlib.Path, batches: dict[str, list[Measured]]) -> None:
    """Draw each term over t, and how the bits add up from the data to the noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    each, added = figure.subplots(1, 2)
    for variance, measured in batches.items():
        t = np.mean([m.times for m in measured], axis=0)
        bits = np.mean([m.steps.mean(axis=1) for m in measured], axis=0)
        each.plot(t, bits, ".-", ms=3, lw=1, label=NAMES[variance])
        added.plot(t[::-1], np.cumsum((bits * measured[0].counts)[::-1]), lw=2, label=NAMES[variance])
    each.set(xscale="log", yscale="log", xlabel="t", ylabel="bits per dimension", title="L_0 (t = 1) and each L_t-1")
    added.set(xscale="log", xlabel="t", ylabel="bits per dimension", ylim=(0, None), title="added up from t = 1")
    for axes in (each, added):
        axes.spines[["top", "right"]].set_visible(False)
    each.legend(title="variance", frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    cli.run(main)
