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
import dataclasses
import os
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, checkpoint, cli, image
from tinydiff.backend import Array
from tinydiff.data import mnist
from tinydiff.data.loader import Batches
from tinydiff.data.masks import random_masks
from tinydiff.diffusion import Sampling, last
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig, PixelInpainting
from tinydiff.models.pixel_inpainting import shown
from tinydiff.rng import Rng
from tinydiff.train import Training, TrainSettings, train
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    d = Recipe()
    what = parser.add_argument_group("what to train")
    what.add_argument("base", metavar="RUN", nargs="?", help="folder of a training run, or a shipped model: mnist")
    what.add_argument("--data", help=f"embedded, full, fashion, or a folder with the IDX files (default: {d.data})")
    what.add_argument("--steps", type=int, metavar="N", help=f"gradient steps (default: {d.steps})")
    what.add_argument("--batch-size", type=int, metavar="N", help=f"images a step (default: {d.batch_size})")
    what.add_argument("--lr", type=float, help=f"peak learning rate (default: {d.lr})")
    what.add_argument("--seed", type=int, metavar="N", help=f"equal seeds give equal bits (default: {d.seed})")
    run = parser.add_argument_group("where")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: $TINYDIFF_DEVICE, else auto")
    run.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/inpainting, or a new ...-2, ...)")
    run.add_argument("--sample-every", type=int, metavar="N", help="steps between sample grids (default: ten a run)")
    run.add_argument(
        "--save-every", type=float, default=30, metavar="S", help="seconds between checkpoints (default: 30)"
    )
    run.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with a run that was stopped (default: the latest)"
    )
    return parser.parse_args()


def main() -> None:
    """Fine-tune, or go on with a run."""
    options = parse()
    given = {f.name: v for f in dataclasses.fields(Recipe) if (v := getattr(options, f.name)) is not None}
    if os.path.isdir(given.get("data", "")):
        given["data"] = os.path.abspath(given["data"])  # a run may be resumed from another folder
    with backend.use_device(options.device or os.environ.get("TINYDIFF_DEVICE", "auto")):
        if options.resume is not None:
            if fixed := [*given, *(["out"] if options.out is not None else [])]:
                flags = ", ".join("RUN" if name == "base" else f"--{name.replace('_', '-')}" for name in fixed)
                raise ValueError(f"a resumed run keeps its own settings: leave out {flags}, or start a new run")
            folder = pathlib.Path(options.resume or cli.latest_folder("runs/inpainting"))
            arrays, meta = checkpoint.load(folder, PixelInpainting.kind, resume=True)
            model = PixelInpainting(PixelDiffusionConfig.from_dict(meta["config"]), Rng(0))
            run(model, Recipe(**meta["about"]), folder, options, (arrays, meta))
        elif options.base is None:
            raise ValueError("name the trained model to start from: the folder of a run, or mnist, which is shipped")
        else:
            model = PixelInpainting.started_from(PixelDiffusion.load(options.base))
            folder = cli.new_folder(options.out, "runs/inpainting")
            cli.check_writable(folder / checkpoint.NAME)
            run(model, Recipe(**given), folder, options)


def run(
    model: PixelInpainting,
    recipe: Recipe,
    folder: pathlib.Path,
    options: argparse.Namespace,
    saved: tuple[dict, dict] | None = None,
) -> None:
    """Train by this recipe in this folder, from the base model or from what its checkpoint holds; draw the pictures."""
    rng = Rng(recipe.seed)
    digits, unseen = (mnist.load(recipe.data, split) for split in ("train", "test"))
    if digits.images.shape[1:] != model.config.size:
        raise ValueError(f"the model draws images of {model.config.size}, the data have {digits.images.shape[1:]}")
    training = Training(model, recipe.settings(), folder / checkpoint.NAME, dataclasses.asdict(recipe))
    if saved is not None:
        training.restore(*saved)
    print(
        f"{len(digits):,} images, {model.count_parameters():,} parameters, device {backend.device()}, "
        f"{'starting' if training.step == 0 else f'going on after step {training.step}'}; the run is in {folder}"
    )

    def preview(step: int) -> None:
        image.save_png(folder / f"samples_{step:06d}.png", sheet(model, unseen, rng.at(PICTURES), steps=10), scale=2)

    train(
        training,
        loss_of(model, recipe, digits, rng.at(ORDER)),
        rng.at(NOISE),
        batch_size=recipe.batch_size,
        resume_with=cli.command(__file__, "--resume", folder),
        preview=preview,
        preview_every=max(1, recipe.steps // 10) if options.sample_every is None else options.sample_every,
        save_every=options.save_every,
    )
    with training.ema.applied():
        image.save_png(folder / "samples.png", sheet(model, unseen, rng.at(PICTURES), steps=50, rows=6), scale=2)
    image.loss_curve(folder / "loss.png", range(1, training.step + 1), training.losses.tolist())
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
