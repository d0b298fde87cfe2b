"""What the training programs share: their flags, where a run begins, and the way from there to its last step.

    run = start_or_resume(options, Recipe(), "runs/mnist", PixelDiffusion.kind)
    training = fit(run, model, loss_at, rng, __file__, what="4,500 images", unit="images", preview=preview)

A program brings its recipe, a frozen dataclass of everything that decides what a run computes, which the checkpoint
holds. Its flags have the names of the recipe's fields, and are None unless given.
What CLIP says of captions and pictures is looked up before the training: `encoded_texts`, `encoded_images`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from tinydiff import backend, checkpoint, cli, image
from tinydiff.models.clip import CLIP
from tinydiff.models.text_diffusion import TextEncoder, told_texts
from tinydiff.rng import Rng
from tinydiff.train import LossAt, Trainable, Training, TrainSettings, steps_in, train


class Recipe(Protocol):
    """What this module asks of a program's recipe, which is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    def settings(self) -> TrainSettings: ...


R = TypeVar("R", bound=Recipe)

FREE = {"device", "sample_every", "save_every", "resume"}
"""The flags that a resumed run may be given."""


@dataclass(frozen=True)
class Run(Generic[R]):
    """A run to be trained: by this recipe, in this folder, from the start or from the checkpoint that was saved."""

    recipe: R
    folder: pathlib.Path
    options: argparse.Namespace
    saved: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None


def add_training_flags(parser: argparse.ArgumentParser, usual: Any, items: str) -> None:
    """Add the flags of how to train; usual: the recipe that --help tells of. items: what a batch has, such as images.

    --steps or --minutes, --batch-size, --lr, --seed.
    """
    how = parser.add_argument_group("how to train")
    length = how.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help=f"gradient steps (default: {usual.steps})")
    length.add_argument("--minutes", type=float, metavar="M", help="as many steps as fit in about M minutes")
    how.add_argument("--batch-size", type=int, metavar="N", help=f"{items} a step (default: {usual.batch_size})")
    how.add_argument("--lr", type=float, help=f"peak learning rate (default: {usual.lr})")
    how.add_argument("--seed", type=int, metavar="N", help=f"equal seeds give equal bits (default: {usual.seed})")


def add_run_flags(parser: argparse.ArgumentParser, default: str, sample_every: str | None = None) -> None:
    """Add the flags of where: --device, --out, --save-every, --resume, and --sample-every if there is help for it."""
    where = parser.add_argument_group("where")
    cli.add_device(where)
    out = f"folder of the run (default: {default}, or a new {default}-2, ...)"
    where.add_argument("--out", metavar="DIR", help=out)
    if sample_every:
        where.add_argument("--sample-every", type=int, metavar="N", help=sample_every)
    where.add_argument(
        "--save-every", type=float, default=30, metavar="S", help="seconds between checkpoints (default: 30)"
    )
    where.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with a run that was stopped (default: the latest)"
    )


def start_or_resume(
    options: argparse.Namespace, usual: R, default: str, kind: str, free: frozenset[str] = frozenset()
) -> Run[R]:
    """The run that the flags ask for: a new one, or with --resume the one in that folder, or in the latest.

    usual: the recipe whose fields the given flags replace. default: the folder of a run, see `cli.new_folder`. kind: of
    the model. free: flags that say what to do with the trained model, which a resumed run may be given too. Raises
    ValueError if a new run's folder holds one already, or for flags that a resumed run cannot take; OSError where
    nothing can be written; CheckpointError if there is nothing to resume.
    """
    given = {name: value for name, value in vars(options).items() if value is not None and name not in FREE | free}
    if options.resume is None:
        if os.path.isdir(given.get("data", "")):
            given["data"] = os.path.abspath(given["data"])  # a run may be resumed from another folder
        names = {field.name for field in dataclasses.fields(usual)}
        recipe = dataclasses.replace(usual, **{name: value for name, value in given.items() if name in names})
        return Run(recipe, cli.new_folder(options.out, default), options)
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"a resumed run keeps its own settings: leave out {flags}, or start a new run")
    path = pathlib.Path(options.resume or cli.latest_folder(default))
    folder = path.parent if path.name == checkpoint.NAME else path
    arrays, meta = checkpoint.load(path, kind, resume=True)
    cli.check_writable(folder / checkpoint.NAME)
    return Run(type(usual)(**meta["about"]), folder, options, (arrays, meta))


def fit(
    run: Run[R],
    model: Trainable,
    loss_at: LossAt,
    rng: Rng,
    script: str,
    *,
    what: str,
    unit: str,
    preview: Callable[[int], None] | None = None,
    previews: int = 10,
) -> Training:
    """Train the model of a run to its last step, and draw loss.png. Its arguments are those of `train`, and these.

    script: the program, to be called again with --resume. what: is trained on, for the line that is printed at the
    start. previews: how many in a run, unless --sample-every was given. Raises what `steps_in` and `train` do.
    """
    recipe, options, folder = run.recipe, run.options, run.folder
    every = None if preview is None else options.sample_every
    if options.minutes is not None:
        steps = steps_in(options.minutes, model, loss_at, recipe.settings(), rng, recipe.batch_size)
        recipe = dataclasses.replace(recipe, steps=steps)
    training = Training(model, recipe.settings(), folder / checkpoint.NAME, dataclasses.asdict(recipe))
    if run.saved is not None:
        training.restore(*run.saved)
    print(
        f"{what}, {model.count_parameters():,} parameters, device {backend.device()}, "
        f"{'starting' if training.step == 0 else f'going on after step {training.step}'}; the run is in {folder}"
    )
    train(
        training,
        loss_at,
        rng,
        batch_size=recipe.batch_size,
        resume_with=cli.command(script, "--resume", folder),
        preview=preview,
        preview_every=max(1, recipe.steps // previews) if every is None else every,
        save_every=options.save_every,
        unit=unit,
    )
    image.loss_curve(folder / "loss.png", range(1, training.step + 1), training.losses.tolist())
    return training


def encoded_texts(encoder: TextEncoder, captions: Sequence[str], batch: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """What a U-Net will be told of captions (E27), looked up before the training, with a progress bar.

    Gives the states of the tokens (N, M, width), in half precision, and which are there, (N, M) bool, on the host.
    """
    starts = cli.progress(range(0, len(captions), batch), "captions to states", -(-len(captions) // batch))
    texts = [told_texts(encoder, captions[i : i + batch]) for i in starts]
    states = [backend.to_numpy(text.states).astype(np.float16) for text in texts]
    return np.concatenate(states), np.concatenate([backend.to_numpy(text.mask) for text in texts])


def encoded_images(clip: CLIP, images: np.ndarray, batch: int = 500) -> np.ndarray:
    """CLIP's embeddings of pictures, uint8 (N, H, W, C), with a progress bar: (N, embedding), float32 on the host."""
    starts = cli.progress(range(0, len(images), batch), "pictures to embeddings", -(-len(images) // batch))
    return np.concatenate([clip.image_embedding(image.to_signed(images[i : i + batch])) for i in starts])
