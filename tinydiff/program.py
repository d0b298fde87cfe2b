"""What the training programs share: their flags, where a run begins, and the way from there to its last step.

    run = start_or_resume(options, Recipe(), "runs/mnist", PixelDiffusion.kind)
    training = fit(run, model, loss_at, rng, __file__, what="4,500 images", unit="images", preview=preview)

A program brings its recipe, a frozen dataclass of everything that decides what a run computes, which the checkpoint
holds. Its flags have the names of the recipe's fields, and are None unless given: `add_flag`.

Training what draws a text, all that is said of captions and pictures is looked up before: `encoded_texts`,
`encoded_images`. The loss of a step is `told_loss`, and what the model draws then, `drawn`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from tinydiff import backend, checkpoint, cli, image
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.data.loader import Batches
from tinydiff.diffusion import last
from tinydiff.models.cascade import smaller
from tinydiff.models.clip import CLIP
from tinydiff.models.text_diffusion import Condition, TextEncoder, told_texts
from tinydiff.rng import Rng
from tinydiff.train import LossAt, Trainable, Training, TrainSettings, steps_in, train
from tinydiff.workers import DrawnLoss, Share


class Recipe(Protocol):
    """What this module asks of a program's recipe, which is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    def settings(self) -> TrainSettings: ...


R = TypeVar("R", bound=Recipe)
E = TypeVar("E", bound=TextEncoder)

FREE = {"device", "sample_every", "save_every", "resume"}
"""The flags that a resumed run may be given."""


@dataclass(frozen=True)
class Run(Generic[R]):
    """A run to be trained: by this recipe, in this folder, from the start or from the checkpoint that was saved."""

    recipe: R
    folder: pathlib.Path
    options: argparse.Namespace
    saved: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None


def add_flag(flags: argparse._ActionsContainer, usual: Any, name: str, help: str, metavar: str | None = None) -> None:
    """Add the flag of a field of the recipe `usual`, whose type it has, and whose value --help gives as the default."""
    value = getattr(usual, name.removeprefix("--").replace("-", "_"))
    default = f"{value:,}" if isinstance(value, int) else value
    metavar = metavar or {int: "N", float: "X"}.get(type(value))
    flags.add_argument(name, type=type(value), metavar=metavar, help=f"{help} (default: {default})")


def at_least_1(recipe: Recipe, *names: str) -> None:
    """Raise ValueError, before anything is computed, if one of these fields of a recipe is below 1."""
    for name in names:
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(recipe, name)}")


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
    ValueError for settings that nothing can be trained by, if a new run's folder holds one already, or for flags that a
    resumed run cannot take; OSError where nothing can be written; CheckpointError if there is nothing to resume.
    """
    given = {name: value for name, value in vars(options).items() if value is not None and name not in FREE | free}
    if options.resume is None:
        if os.path.isdir(given.get("data", "")):
            given["data"] = os.path.abspath(given["data"])  # a run may be resumed from another folder
        names = {field.name for field in dataclasses.fields(usual)}
        recipe = dataclasses.replace(usual, **{name: value for name, value in given.items() if name in names})
        at_least_1(recipe, "batch_size")
        recipe.settings()  # raises now, and not when all is looked up, for what nothing can be trained by
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


def export_command(folder: pathlib.Path, file: str) -> str:
    """The line that puts the trained model of a run into a small file."""
    return shlex.join(["python", "-m", "tinydiff", "export", str(folder), file])


# ------------------------------------------------------------------------------------ what draws a text


class Told(Protocol):
    """What `told_loss` asks of a model: a TextDiffusion, or a prior."""

    def draw(self, x_0: Array, rng: Rng, told: Condition, empty: Condition, /) -> tuple[Array | None, ...]: ...
    @property
    def loss_of(self) -> Callable[..., Tensor]: ...


def encoded_texts(
    encoder: E, captions: Sequence[str], told: Callable[[E, Sequence[str]], Condition] = told_texts, batch: int = 500
) -> Condition:
    """What a network is told of captions (E27), looked up before its training, with a progress bar, as `stored`."""
    starts = cli.progress(range(0, len(captions), batch), "captions to states", -(-len(captions) // batch))
    parts = [stored(told(encoder, captions[i : i + batch])) for i in starts]
    arrays = zip(*(part.arrays for part in parts), strict=True)
    return Condition(*(None if some[0] is None else np.concatenate(some) for some in arrays))


def encoded_images(clip: CLIP, images: np.ndarray, batch: int = 500) -> np.ndarray:
    """CLIP's embeddings of pictures, uint8 (N, H, W, C), with a progress bar: (N, embedding), float32 on the host."""
    starts = cli.progress(range(0, len(images), batch), "pictures to embeddings", -(-len(images) // batch))
    return np.concatenate([clip.image_embedding(image.to_signed(images[i : i + batch])) for i in starts])


def stored(told: Condition) -> Condition:
    """The same on the host, the states in half precision: of many captions they take most of the memory."""
    states, *others = (None if a is None else backend.to_numpy(a) for a in told.arrays)
    return Condition(None if states is None else states.astype(np.float16), *others)


def ready(told: Condition) -> Condition:
    """What was `stored`, on the device in use, in single precision."""
    states, *others = (None if a is None else backend.to_device(a) for a in told.arrays)
    return Condition(None if states is None else states.astype(np.float32), *others)


def made_smaller(images: np.ndarray, size: int) -> np.ndarray:
    """Images (N, H, W, C), uint8, of this height or width, whichever is less: the first stage of a cascade draws such.

    Raises ValueError, by the name of the flag, unless the size divides theirs.
    """
    factor, rest = divmod(min(images.shape[1:3]), size)
    if rest or not factor:
        raise ValueError(f"--size must divide that of the pictures, {images.shape[1]} x {images.shape[2]}, got {size}")
    if factor == 1:
        return images
    parts = (image.to_signed(images[i : i + 1000]) for i in range(0, len(images), 1000))  # floats take much memory
    return np.concatenate([image.to_uint8(smaller(part, factor)) for part in parts])


def told_loss(model: Told, x: np.ndarray, told: Condition, empty: Condition, batch_size: int, order: Rng) -> DrawnLoss:
    """The loss of a share of each step's batch: model.loss_of(*model.draw(x_0, rng, told, empty)).

    x: N things to be drawn, on the host: uint8 pixels, or what the model takes. told: of each, `stored`. empty: of the
    empty text, on the device. order: the stream for the order of the batches. Raises ValueError unless as many are
    told, and for a batch size outside 1..N.
    """
    batches = Batches(x, *(a for a in told.arrays if a is not None), batch_size=batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array | None, ...]:
        rows = share.of(batches.indices(step - 1))
        x_0 = backend.to_device(x[rows])
        x_0 = image.to_signed(x_0) if x_0.dtype == np.uint8 else x_0
        return model.draw(x_0, rng, ready(told.taken(rows)), empty)

    return DrawnLoss(draw_at, model.loss_of)


def drawn(draw: Callable[[slice, Rng], Iterable[Array]], n: int, rng: Rng, batch: int = 100) -> np.ndarray:
    """n things drawn, some at a time: x_0 (n, ...), on the host.

    draw(some, rng): the states of a sampler that draws these of the n.
    """
    starts = range(0, n, batch)
    return np.concatenate([backend.to_numpy(last(draw(slice(i, i + batch), rng.at(i)))) for i in starts])
