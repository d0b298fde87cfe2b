"""Train GLIDE in miniature: diffusion on pixels, told a text, then taught to paint into what a mask hides (E36).

    python examples/train_glide.py                       from nothing: text to image, 45 minutes on one core
    python examples/train_glide.py --base runs/glide     fine-tune that for inpainting, for 3,000 steps
    python examples/train_glide.py --clip RUN            read the texts with the CLIP that you trained
    python examples/train_glide.py --data pictures/      your own images and captions
    python examples/train_glide.py --resume runs/glide   go on after Ctrl-C, or after the power went

The first model alone is also the first stage of Imagen's cascade. Fine-tuning starts from it, with weights of 0 for the
new inputs, and hides another random part of each picture. The folder of the run receives samples_000000.png, ...
(prompts, drawn by the model as it learns; in fine-tuning pairs of rows: what is shown of pictures that the training
never saw, and what the model makes of it), then samples.png, prompts.txt, loss.png and checkpoint.npz. The last act
counts how often what was asked for is there, as the package's scene reader sees it; in fine-tuning, in place of a thing
that was hidden: edits.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, checkpoint, cli, image, program
from tinydiff.backend import Array
from tinydiff.data import captioned, shapes
from tinydiff.data.captioned import Shapes
from tinydiff.data.loader import Batches
from tinydiff.data.masks import random_masks
from tinydiff.data.shape_captions import caption, parse
from tinydiff.data.shapes import Scene
from tinydiff.diffusion import Sampling, last
from tinydiff.models import (
    CLIP,
    Condition,
    SceneReader,
    TextDiffusion,
    TextDiffusionConfig,
    TextInpainting,
    told_texts,
)
from tinydiff.models.pixel_inpainting import shown
from tinydiff.nn import UNetConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import DrawnLoss, Share

WEIGHTS, DATA, ORDER, NOISE, PICTURES = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/glide"

GUIDANCE = 3.0
"""s of E35 where samples are drawn."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    base: the trained model that is fine-tuned for inpainting, or "". width: of the U-Net, and text_layers before it, if
    there is no base. tested: how many held-out pictures the figures at the end are of.
    """

    data: str = "shapes"
    pictures: int = 40_000
    clip: str = "clip"
    base: str = ""
    width: int = 40
    text_layers: int = 2
    steps: int = 9000
    batch_size: int = 32
    lr: float = 2e-3
    tested: int = 200
    seed: int = 0

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=200, betas=(0.9, 0.99), ema_decay=0.999)


FINE_TUNING = Recipe(steps=3000, lr=1e-3)


def parse_flags() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    what = parser.add_argument_group("what to train")
    what.add_argument("--base", metavar="RUN", help="fine-tune this run's model for inpainting (default: none)")
    what.add_argument("--data", help="shapes, digits, fashion, or a folder of captioned images (default: shapes)")
    what.add_argument("--pictures", type=int, metavar="N", help=f"how many to learn from (default: {usual.pictures:,})")
    what.add_argument("--clip", metavar="RUN", help="the text encoder (default: the shipped one)")
    what.add_argument("--width", type=int, metavar="N", help=f"of the U-Net (default: {usual.width})")
    layers = f"of a transformer between CLIP and the U-Net (default: {usual.text_layers})"
    what.add_argument("--text-layers", type=int, metavar="N", help=layers)
    program.add_training_flags(parser, usual, "images")
    help = f"held-out pictures to measure on at the end (default: {usual.tested})"
    parser.add_argument("--tested", type=int, metavar="N", help=help)
    program.add_run_flags(parser, FOLDER, "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, fine-tune, or go on with a run of either kind, then measure."""
    options = parse_flags()
    if options.base is not None and (options.width is not None or options.text_layers is not None):
        raise ValueError("a model that is fine-tuned keeps its own --width and --text-layers: leave them out")
    inpaints = options.base is not None
    if options.resume is not None:
        inpaints = checkpoint.kind_of(options.resume or cli.latest_folder(FOLDER)) == TextInpainting.kind
    usual, kind = (FINE_TUNING, TextInpainting.kind) if inpaints else (Recipe(), TextDiffusion.kind)
    with cli.on_device(options.device):
        train(program.start_or_resume(options, usual, FOLDER, kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, draw the pictures and measure."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    if recipe.tested < 1:
        raise ValueError(f"--tested must be at least 1, got {recipe.tested}")
    clip, source = CLIP.load(recipe.clip), captioned.source_to_draw(recipe.data)
    images, captions = source.draw(rng.at(DATA), recipe.pictures)
    unseen, prompts = source.draw(rng.at(PICTURES), 24, "test")
    model = model_for(run, clip, images, rng.at(WEIGHTS))
    loss_at = loss_of(model, clip, images, captions, recipe.batch_size, rng.at(ORDER))

    def sheet(step: int, steps: int = 10, name: str | None = None) -> None:
        picture = drawn_sheet(model, clip, unseen, prompts, rng.at(PICTURES), steps)
        image.save_png(folder / (name or f"samples_{step:06d}.png"), picture, scale=2)

    what = f"{len(images):,} pictures"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=sheet)
    with training.ema.applied():
        sheet(training.step, 25, "samples.png")
        if recipe.data == "shapes":
            report(model, clip, recipe.tested, rng.at(PICTURES), folder / "edits.png")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"The prompts in {folder / 'prompts.txt'}, drawn: {folder / 'samples.png'}")
    if isinstance(model, TextInpainting):
        print(f"Put the model into a small file:\n  python -m tinydiff export {shlex.quote(str(folder))} glide.npz")
    else:
        print(f"Teach it to paint into pictures:\n  {cli.command(__file__, '--base', folder)}")


def model_for(run: Run[Recipe], clip: CLIP, images: np.ndarray, rng: Rng) -> TextDiffusion:
    """The model as it starts: from nothing, from its base, or with the sizes of the run that goes on."""
    recipe = run.recipe
    if recipe.base and run.saved is not None:
        return TextInpainting(TextDiffusionConfig.from_dict(run.saved[1]["config"]), rng)
    if recipe.base:
        model = TextInpainting.started_from(TextDiffusion.load(recipe.base))
        if images.shape[1:3] != model.config.size:
            raise ValueError(f"the model draws images of {model.config.size}, the data have {images.shape[1:3]}")
        return model
    unet = UNetConfig(3, recipe.width, (1, 2), 1, (1,), heads=4, patch=2, context=clip.config.text.width)
    known = checkpoint.fingerprint(clip)
    config = TextDiffusionConfig(unet, images.shape[1:3], text_layers=recipe.text_layers, text_encoder=known)
    return TextDiffusion(config, rng)


def loss_of(
    model: TextDiffusion, clip: CLIP, images: np.ndarray, captions: list[str], batch_size: int, order: Rng
) -> DrawnLoss:
    """The loss of a share of a step's batch; what CLIP says of each caption is computed before the training."""
    texts, empty = program.encoded_texts(clip, captions), told_texts(clip, "")
    batches = Batches(images, *texts, batch_size=batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array | None, ...]:
        pixels, states, mask = (backend.to_device(share.of(a)) for a in batches.at(step - 1))
        return model.draw(image.to_signed(pixels), rng, Condition(states.astype(np.float32), mask), empty)

    return DrawnLoss(draw_at, model.loss_of)


def drawn_sheet(
    model: TextDiffusion, clip: CLIP, images: np.ndarray, prompts: list[str], rng: Rng, steps: int
) -> np.ndarray:
    """Drawn prompts; in fine-tuning, pairs of rows: what is shown of a picture, and what the model makes of it."""
    if not isinstance(model, TextInpainting):
        return image.grid(drawn(model, clip, prompts, rng, steps), 8)
    known, mask = image.to_signed(images), random_masks(rng.at(0), len(images), model.config.size)
    painted = drawn(model, clip, prompts, rng.at(1), steps, known, mask)
    rows = np.stack([x.reshape(-1, 8, *known.shape[1:]) for x in (shown(known, mask)[..., :3], painted)], axis=1)
    return image.grid(rows.reshape(-1, *known.shape[1:]), 8)


def drawn(
    model: TextDiffusion,
    clip: CLIP,
    prompts: list[str],
    rng: Rng,
    steps: int,
    known: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    batch: int = 100,
) -> np.ndarray:
    """A picture of each prompt, or painted into known pictures, (N, H, W, 3), float32 in [-1, 1], on the host."""
    how, nothing, ends = Sampling(steps=min(steps, model.schedule.T)), told_texts(clip, ""), []
    for i in range(0, len(prompts), batch):
        told, some = told_texts(clip, prompts[i : i + batch]), slice(i, i + batch)
        if isinstance(model, TextInpainting) and known is not None and mask is not None:
            states = model.inpaint(known[some], mask[some], told, rng.at(i), how, guidance=GUIDANCE, negative=nothing)
        else:
            states = model.sample(told, rng.at(i), how, guidance=GUIDANCE, negative=nothing)
        ends.append(backend.to_numpy(last(states)))
    return np.concatenate(ends)


def report(model: TextDiffusion, clip: CLIP, n: int, rng: Rng, path: pathlib.Path) -> None:
    """Print how often the scene reader sees what was asked for; with inpainting, in place of what had been there."""
    reader = SceneReader.load("scene_reader")
    if not isinstance(model, TextInpainting):
        prompts = Shapes(full=True).draw(rng, n, "test")[1]
        pictures = drawn(model, clip, prompts, rng.at(0), 50)
        what = "prompts are drawn with all that they name"
    else:
        known, mask, prompts = edits(rng, n)
        pictures = drawn(model, clip, prompts, rng.at(0), 50, known, mask)
        rows = np.concatenate([known[:8], shown(known, mask)[:8, ..., :3], pictures[:8]])
        image.save_png(path, image.grid(rows, 8), scale=2)
        what = f"pictures show what was asked for in place of one thing, and all else as before (some in {path})"
    right = [parse(prompt).fits(scene) for prompt, scene in zip(prompts, reader.read(pictures), strict=True)]
    print(f"{np.mean(right):.1%} of {n} {what}")


def edits(rng: Rng, n: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures of one or two things apart, masks that hide one, and captions with another thing in its place.

    Gives (n, 32, 32, 3) in [-1, 1], (n, 32, 32, 1), 1 where the picture is known, and n texts.
    """
    scenes = [scene for scene in Shapes().scenes(rng, 2 * n + 8, "test") if not is_nested(scene)][:n]
    draws = shapes.host_generator(rng.at(0))
    known, masks, prompts = [], [], []
    for i, scene in enumerate(scenes):
        item, *others = scene.items
        used = {thing.colour for thing in scene.items}
        shape, colour = shapes.one_of(draws, [pair for pair in shapes.SEEN if pair[1] not in used])
        new = dataclasses.replace(scene, items=(dataclasses.replace(item, shape=shape, colour=colour), *others))
        known.append(image.to_signed(shapes.draw(scene)))
        masks.append(without_square(item.x, item.y, 0.29, 32))
        prompts.append(caption(new, rng.at(1, i), full=True))
    return np.stack(known), np.stack(masks), prompts


def is_nested(scene: Scene) -> bool:
    """Whether one thing is inside another, so that none can be hidden alone."""
    return len(scene.items) == 2 and shapes.relation(*scene.items) in ("inside", "around")


def without_square(x: float, y: float, half: float, size: int) -> np.ndarray:
    """The mask that hides a square around (x, y), the picture's side being 1: bool (size, size, 1)."""
    at = (np.arange(size) + 0.5) / size
    return ((abs(at[:, None] - y) > half) | (abs(at[None] - x) > half))[..., None]


if __name__ == "__main__":
    cli.run(main)
