"""Diffusion in the plane: points in place of images, trained in seconds, with every particle in sight.

    python examples/toys.py                                 two moons, ten seconds of training
    python examples/toys.py checkerboard --steps 6000       sharp edges take longer
    python examples/toys.py swiss_roll --timesteps 50       coarser steps of diffusion
    python examples/toys.py mixture --label 2 --guidance 4  one class only, and exaggerated (E35)
    python examples/toys.py --resume runs/toys              go on after Ctrl-C

The network, an MLP, predicts the noise (E17) and learns by Algorithm 1 (E18). The samples are drawn by Algorithm 2
(E19). The folder of the run receives

    samples.png     the data and the samples side by side
    particles.gif   the samples on their way from noise to the figure
    field.gif       the same, with the arrows that they follow: the score, -eps_theta/sqrt(1 - alpha_bar_t)
    loss.png        the loss; most of it cannot be learned away, since the noise in x_t can only be guessed
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydiff import backend, cli, image, program
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.data import toys
from tinydiff.data.loader import Batches
from tinydiff.diffusion import Schedule, classifier_free, ddpm, denoiser, draw_t, simple_loss
from tinydiff.nn import MLP, MLPConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import Share

DATA, WEIGHTS, ORDER, NOISE, SAMPLES = range(5)
"""The names of the run's random streams."""

POINTS = 20_000
"""How many points there are to learn from."""

LABEL_DROP = 0.1
"""The share of labels hidden in training, so that guidance has something to move away from (E35)."""

DRAWING = frozenset({"n", "label", "guidance"})
"""The flags of what to draw, which decide nothing of the training."""

REACH = 2.8
"""The pictures show -REACH..REACH in both coordinates."""


class ToyModel(MLP):
    """The MLP as the training loop and its checkpoints know it."""

    kind = "toy"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line."""

    figure: str = "moons"
    steps: int = 2000
    batch_size: int = 256
    lr: float = 3e-3
    timesteps: int = 200
    width: int = 128
    seed: int = 0

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=50, betas=(0.9, 0.99), ema_decay=0.99)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    parser.add_argument("figure", nargs="?", choices=toys.TOYS, help=f"default: {usual.figure}")
    program.add_training_flags(parser, usual, "points")
    how = parser.add_argument_group("of what size")
    how.add_argument("--timesteps", type=int, metavar="T", help=f"steps of diffusion (default: {usual.timesteps})")
    how.add_argument("--width", type=int, metavar="N", help=f"of the network (default: {usual.width})")
    what = parser.add_argument_group("what to draw")
    what.add_argument("--n", type=int, default=2000, metavar="N", help="particles (default: %(default)s)")
    what.add_argument("--label", type=int, metavar="K", help="only this part of the figure (default: all parts)")
    what.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="S",
        help="1 is none, more exaggerates the label (E35; default: 1)",
    )
    program.add_run_flags(parser, "runs/toys")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then draw the pictures."""
    options = parse()
    if options.n < 1:
        raise ValueError(f"--n must be at least 1, got {options.n}")
    if not math.isfinite(options.guidance):
        raise ValueError(f"--guidance must be a finite number, got {options.guidance}")
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), "runs/toys", ToyModel.kind, DRAWING))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, and draw with the averaged weights."""
    recipe, options, folder = run.recipe, run.options, run.folder
    rng, schedule = Rng(recipe.seed), Schedule.linear(recipe.timesteps)
    data = toys.draw(recipe.figure, POINTS, rng.at(DATA))
    if options.label is not None and not 0 <= options.label < data.classes:
        raise ValueError(f"{recipe.figure} has the labels 0..{data.classes - 1}, got --label {options.label}")
    model = ToyModel(MLPConfig(width=recipe.width, classes=data.classes), rng.at(WEIGHTS))
    batches = Batches(data.x, data.labels, batch_size=recipe.batch_size, rng=rng.at(ORDER))

    def loss_at(step: int, rng: Rng, share: Share) -> Tensor:
        points, labels = (share.of(a) for a in batches.at(step - 1))
        x_0 = backend.to_device(points)
        shown = np.where(backend.to_numpy(rng.at(0).uniform(labels.shape)) < LABEL_DROP, -1, labels)
        t, eps = draw_t(rng.at(1), len(x_0), schedule.T), rng.at(2).normal_like(x_0)
        return simple_loss(network(model, shown), x_0, t, eps, schedule)

    what = f"{recipe.figure}: {POINTS:,} points"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="points")
    with training.ema.applied():
        draw(model, schedule, data, rng.at(SAMPLES), options, folder)
    print(f"{folder / 'samples.png'} shows data and samples; particles.gif and field.gif how they came about.")
    print(f"Another figure:\n  {cli.command(__file__, 'spirals', '--steps', 6000)}")


def network(model: MLP, label: np.ndarray | None) -> Any:
    """eps_theta(x_t, t) for points of these labels, or of none."""

    def eps_theta(x_t: Array, t: np.ndarray) -> Tensor:
        beside = backend.device_of(x_t)
        return model(
            Tensor(x_t), backend.to_device(t, beside), None if label is None else backend.to_device(label, beside)
        )

    return eps_theta


def draw(
    model: MLP, schedule: Schedule, data: toys.Points, rng: Rng, options: argparse.Namespace, folder: pathlib.Path
) -> None:
    """Draw samples, and the three pictures of them."""
    n = options.n
    label = backend.to_numpy(rng.at(0).integers(0, data.classes, (n,)))
    if options.label is not None:
        label = np.full(n, options.label)
    guided = classifier_free(network(model, label), network(model, None), options.guidance)
    x_T = rng.at(1).normal((n, 2))
    states = ddpm(denoiser(guided, schedule, clip=False), x_T, schedule, rng.at(2))
    particles = [backend.to_numpy(x) for x in (x_T, *cli.progress(states, "sampling", schedule.T))]

    shown = data.labels[:n] if options.label is None else np.full(n, options.label)
    real = data.x[:n] if options.label is None else data.x[data.labels == options.label][:n]
    side_by_side(folder / "samples.png", real, shown[: len(real)], particles[-1], label)
    times = sorted({round(t) for t in np.linspace(0, schedule.T, 51)}, reverse=True)  # T, ..., 0
    seen = [(t, particles[schedule.T - t]) for t in times]
    for name, field in (("particles.gif", None), ("field.gif", score_field(model, schedule))):
        frames = list(cli.progress(animation(seen, label, field), name, len(seen)))
        image.save_gif(folder / name, frames, ms=80)


def score_field(model: MLP, schedule: Schedule, side: int = 18) -> Any:
    """A function of t: where arrows stand (side², 2), and the score there, -eps_theta/sqrt(1 - alpha_bar_t)."""
    line = np.linspace(-REACH, REACH, side, dtype=np.float32)
    places = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    denoise = denoiser(network(model, None), schedule, clip=False)

    def field(t: int) -> tuple[np.ndarray, np.ndarray]:
        eps = backend.to_numpy(denoise(backend.to_device(places), t).eps)
        return places, -eps / schedule.one_minus_alpha_bar[t] ** 0.5

    return field


def plane(axes: Any, title: str) -> None:
    """Equal axes over the plane that the figures lie in, without numbers."""
    axes.set(title=title, xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], aspect="equal")


def side_by_side(path: pathlib.Path, x: np.ndarray, label: np.ndarray, drawn: np.ndarray, asked: np.ndarray) -> None:
    """Data and samples, coloured by their labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    for axes, title, points, colour in zip(
        figure.subplots(1, 2), ("data", "samples"), (x, drawn), (label, asked), strict=True
    ):
        axes.scatter(points[:, 0], points[:, 1], c=colour, s=3, cmap="tab10", vmin=0, vmax=9, linewidths=0)
        plane(axes, title)
    image.save_png(path, image.rasterise(figure))


def animation(seen: Sequence[tuple[int, np.ndarray]], label: np.ndarray, field: Any) -> Iterator[np.ndarray]:
    """One frame for each time t and its particles, from noise to data, with the field's arrows if there is a field."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for t, points in seen:
        axes.clear()
        if field is not None:
            places, arrows = field(max(t, 1))
            length = np.linalg.norm(arrows, axis=1, keepdims=True)
            unit = arrows / length.clip(1e-9) * np.tanh(length)  # near the data, scores are too long to draw
            axes.quiver(*places.T, *unit.T, color="0.6", angles="xy", scale=22, width=0.005)
        axes.scatter(points[:, 0], points[:, 1], c=label, s=3, cmap="tab10", vmin=0, vmax=9, linewidths=0)
        plane(axes, f"t = {t}")
        yield image.rasterise(figure)


if __name__ == "__main__":
    cli.run(main)
