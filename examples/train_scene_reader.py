"""Train the network that reads scenes of coloured shapes, and so judges what a text-to-image model draws.

    python examples/train_scene_reader.py                some minutes of one CPU core
    python examples/train_scene_reader.py --minutes 1    a reader that makes mistakes
    python examples/train_scene_reader.py --resume RUN   go on after Ctrl-C, or after the power went

It sees new scenes at every step, and at the end reads others that it has never seen, among them the pairs of shape and
colour that text-to-image models are not shown in training. The folder of the run receives readings_000000.png, ... (in
the upper rows scenes, below each the scene that the network read from it, drawn), mistakes.png, loss.png and
checkpoint.npz. The package brings one along, scene_reader.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydiff import cli, image, program
from tinydiff.data.captioned import Shapes
from tinydiff.data.shapes import Scene, draw
from tinydiff.models.scene_reader import SceneReader, SceneReaderConfig, agreement, reading_loss
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings

WEIGHTS, NOISE, TEST = range(3)
"""The names of the run's random streams."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    width, hidden: the network's (SceneReaderConfig). noise: on the pictures, in training. tested: how many scenes of
    each kind are read at the end. The rest is as in TrainSettings.
    """

    steps: int = 2000
    batch_size: int = 64
    width: int = 16
    hidden: int = 96
    noise: float = 0.1
    tested: int = 2000
    lr: float = 3e-3
    warmup: int = 50
    ema_decay: float = 0.995
    seed: int = 0

    def settings(self) -> TrainSettings:
        """How to train it."""
        return TrainSettings(self.steps, self.lr, warmup=self.warmup, ema_decay=self.ema_decay)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    usual, parser = Recipe(), cli.parser(__doc__)
    program.add_training_flags(parser, usual, "scenes")
    parser.add_argument("--width", type=int, metavar="N", help=f"channels of the network (default: {usual.width})")
    parser.add_argument(
        "--tested", type=int, metavar="N", help=f"scenes of each kind to read at the end (default: {usual.tested})"
    )
    program.add_run_flags(parser, "runs/scene_reader", "steps between pictures of what it reads (default: five a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then test."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), "runs/scene_reader", SceneReader.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, then test."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    if recipe.tested < 1:
        raise ValueError(f"the number of scenes to test on must be at least 1, got {recipe.tested}")
    model = SceneReader(SceneReaderConfig(width=recipe.width, hidden=recipe.hidden), rng.at(WEIGHTS))
    loss_at = reading_loss(model, recipe.batch_size, recipe.noise)
    shown = Shapes().scenes(rng.at(TEST, 0), 10, "test")

    def preview(step: int) -> None:
        image.save_png(folder / f"readings_{step:06d}.png", sheet(shown, read(model, shown)), scale=2)

    training = fit(
        run, model, loss_at, rng.at(NOISE), __file__, what="endless scenes", unit="scenes", preview=preview, previews=5
    )
    model.eval()
    with training.ema.applied():
        test(model, recipe.tested, rng.at(TEST, 1), folder)
    print(f"Put it into a small file, which SceneReader.load takes as it does {folder}:")
    print(f"  {program.export_command(folder, 'scene_reader.npz')}")


def test(model: SceneReader, n: int, rng: Rng, folder: pathlib.Path) -> None:
    """Print how well it reads n scenes of each kind, and draw some of its mistakes."""
    wrong: list[tuple[Scene, Scene]] = []
    for split, number in (("test", 1), ("test", 2), ("held-out", 1), ("held-out", 2)):
        scenes = Shapes(number=number).scenes(rng.at(number), n, split)
        what_is_read = read(model, scenes)
        report = agreement(what_is_read, scenes)
        wrong += [(a, b) for a, b in zip(scenes, what_is_read, strict=True) if not agreement([b], [a])["things"]]
        said = ", ".join(f"{name} {share:.2%}" for name, share in report.items())
        print(f"{split}, {number} thing{'s' * (number - 1)}: {said}")
    if wrong:
        there, read_there = zip(*wrong[:10], strict=True)
        image.save_png(folder / "mistakes.png", sheet(there, read_there), scale=2)
        print(f"the first of {len(wrong)} mistakes in {4 * n} scenes are in {folder / 'mistakes.png'}")


def read(model: SceneReader, scenes: list[Scene]) -> list[Scene]:
    """What the network reads in the pictures of scenes."""
    return model.read(image.to_signed(np.stack([draw(scene, model.config.size) for scene in scenes])))


def sheet(scenes: Sequence[Scene], what_is_read: Sequence[Scene]) -> np.ndarray:
    """The pictures of scenes, and below each that of what was read from it."""
    return image.grid(np.stack([draw(scene) for scene in (*scenes, *what_is_read)]), columns=len(scenes))


if __name__ == "__main__":
    cli.run(main)
