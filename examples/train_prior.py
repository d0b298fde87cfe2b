"""Train a prior of DALL-E 2: from a caption to CLIP embeddings of images that it may belong to (E30, E31, E32).

    python examples/train_prior.py                           by diffusion, with the shipped CLIP; ten minutes of a core
    python examples/train_prior.py --kind autoregressive     code by code
    python examples/train_prior.py --clip RUN                with a CLIP that you trained
    python examples/train_prior.py --data pictures/          your own images and captions
    python examples/train_prior.py --resume RUN              go on after Ctrl-C, or after the power went

Pictures and captions are turned into embeddings once, before the training, which then never sees a pixel. The folder of
the run receives samples_000000.png, ... (a held-out picture, and beside it those training pictures whose embeddings are
nearest to what the model draws for its caption), samples.png, captions.txt, loss.png and checkpoint.npz.

At the end it says, for held-out pairs, how near the drawn embedding is to that of the caption's own picture: the mean
cosine, beside those of two things that need no prior, the embedding of the text itself and the mean of all pictures.
And whether the better of two candidates (E32) is really nearer: as the paired differences, their standard error, and
the probability of as much by chance.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, checkpoint, cli, image, program
from tinydiff.backend import Array
from tinydiff.data import captioned
from tinydiff.data.captioned import Captioned
from tinydiff.data.loader import Batches
from tinydiff.metrics import Change, paired_change
from tinydiff.models import (
    CLIP,
    AutoregressivePrior,
    AutoregressivePriorConfig,
    Condition,
    DiffusionPrior,
    DiffusionPriorConfig,
    told_captions,
)
from tinydiff.models.autoregressive_prior import PrincipalComponents
from tinydiff.models.prior import most_aligned, unit_rows
from tinydiff.nn import TransformerConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import DrawnLoss, Share

WEIGHTS, DATA, ORDER, NOISE, TEST = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/prior"
KINDS = {"diffusion": DiffusionPrior.kind, "autoregressive": AutoregressivePrior.kind}
Prior = DiffusionPrior | AutoregressivePrior

SHOWN, DRAWS = 8, 7
"""Captions in the pictures of a run, and embeddings drawn for each."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line."""

    kind: str = "diffusion"
    data: str = "shapes"
    pictures: int = 40_000
    held_out: int = 1000
    clip: str = "clip"
    width: int = 96
    layers: int = 3
    explained: float = 0.99
    bins: int = 16
    steps: int = 5000
    batch_size: int = 64
    lr: float = 2e-3
    seed: int = 0

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=100, betas=(0.9, 0.99), ema_decay=0.998)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    what = parser.add_argument_group("what to train")
    what.add_argument("--kind", choices=KINDS, help=f"of the prior, E30 or E31 (default: {usual.kind})")
    what.add_argument("--data", help="shapes, digits, fashion, or a folder of captioned images (default: shapes)")
    what.add_argument("--pictures", type=int, metavar="N", help=f"how many to learn from (default: {usual.pictures:,})")
    what.add_argument("--held-out", type=int, metavar="N", help=f"how many to test with (default: {usual.held_out:,})")
    what.add_argument("--clip", metavar="RUN", help="whose embeddings they are (default: the shipped CLIP)")
    what.add_argument("--width", type=int, metavar="N", help=f"of the transformer's tokens (default: {usual.width})")
    what.add_argument("--layers", type=int, metavar="N", help=f"of the transformer (default: {usual.layers})")
    codes = parser.add_argument_group("codes of the autoregressive prior (E31)")
    share = f"of the variance, by as many principal components as it takes (default: {usual.explained})"
    codes.add_argument("--explained", type=float, metavar="SHARE", help=share)
    codes.add_argument("--bins", type=int, metavar="N", help=f"codes for each component (default: {usual.bins})")
    program.add_training_flags(parser, usual, "embeddings")
    program.add_run_flags(parser, FOLDER, "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then measure."""
    options = parse()
    kind = KINDS[options.kind or Recipe.kind]
    if options.resume is not None:
        found = checkpoint.kind_of(options.resume or cli.latest_folder(FOLDER))
        kind = found if found in KINDS.values() else kind
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), FOLDER, kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, draw the pictures, and print what was measured."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    clip, source = CLIP.load(recipe.clip), captioned.source(recipe.data)
    seen = Pairs.of(clip, source, rng.at(DATA), recipe.pictures, "train")
    held_out = Pairs.of(clip, source, rng.at(TEST), recipe.held_out, "test")
    empty = told_captions(clip, [""])
    model = prior_of(recipe, clip, seen, rng.at(WEIGHTS))
    loss_at = loss_of(model, seen, empty, recipe.batch_size, rng.at(ORDER))

    def sheet(step: int, name: str | None = None) -> None:
        found = nearest_pictures(model, held_out, seen, empty, rng.at(TEST))
        image.save_png(folder / (name or f"samples_{step:06d}.png"), image.grid(found, 1 + DRAWS), scale=2)

    (folder / "captions.txt").write_text("\n".join(held_out.texts[:SHOWN]) + "\n", encoding="utf-8")
    what = f"{len(seen.images):,} pictures, {recipe.kind}"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="embeddings", preview=sheet)
    with training.ema.applied():
        sheet(training.step, "samples.png")
        report(model, held_out, seen, empty, rng.at(TEST))
    print(f"Pictures near what it draws for the captions in {folder / 'captions.txt'}: {folder / 'samples.png'}")
    other = next(kind for kind in KINDS if kind != recipe.kind)
    print(f"Train the other prior:\n  {cli.command(__file__, '--kind', other)}")


# ------------------------------------------------------------------------------------------ embeddings


@dataclass(frozen=True)
class Pairs:
    """N pictures, uint8 (N, H, W, 3), what they are called, and what CLIP makes of both, on the host.

    z_i, z_t: (N, d). states: (N, M, width), in half precision, of which there are many; mask: which are there, (N, M).
    """

    images: np.ndarray
    texts: list[str]
    z_i: np.ndarray
    states: np.ndarray
    mask: np.ndarray
    z_t: np.ndarray

    @classmethod
    def of(cls, clip: CLIP, source: Captioned, rng: Rng, n: int, split: str, batch: int = 500) -> Pairs:
        """Draw n pairs, and read them."""
        images, texts = source.draw(rng, n, split)
        starts = cli.progress(range(0, n, batch), f"{split} pairs to embeddings", -(-n // batch))
        parts = [cls._read(clip, images[i : i + batch], texts[i : i + batch]) for i in starts]
        return cls(images, texts, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    @staticmethod
    def _read(clip: CLIP, images: np.ndarray, texts: list[str]) -> tuple[np.ndarray, ...]:
        z_i, told = clip.image_embedding(image.to_signed(images)), told_captions(clip, texts)
        states, mask, z_t = (backend.to_numpy(a) for a in (told.states, told.mask, told.vector))
        return z_i, states.astype(np.float16), mask, z_t

    def told(self, rows: np.ndarray | slice) -> Condition:
        """What a prior is told of some of the captions."""
        return on_device(self.states[rows], self.mask[rows], self.z_t[rows])


def on_device(states: np.ndarray, mask: np.ndarray, z_t: np.ndarray) -> Condition:
    """What is told of captions, on the device in use, in single precision."""
    return Condition(*(backend.to_device(a) for a in (states.astype(np.float32), mask, z_t)))


# -------------------------------------------------------------------------------------------- training


def prior_of(recipe: Recipe, clip: CLIP, seen: Pairs, rng: Rng) -> Prior:
    """The untrained prior of a recipe; the codes of an autoregressive one are fitted to the embeddings seen."""
    sizes = TransformerConfig(recipe.width, recipe.layers, causal=True)
    context, embedding = clip.config.text.width, clip.config.embedding
    if recipe.kind == "diffusion":
        return DiffusionPrior(DiffusionPriorConfig(sizes, context, embedding), rng)
    components = PrincipalComponents.of(seen.z_i).needed(recipe.explained)
    config = AutoregressivePriorConfig(sizes, context, embedding, components=components, bins=recipe.bins)
    prior = AutoregressivePrior(config, rng)
    prior.codebook.fit(seen.z_i, seen.z_t)
    print(f"{components} of {embedding} principal components explain {recipe.explained:.2%} of the variance")
    return prior


def loss_of(model: Prior, seen: Pairs, empty: Condition, batch_size: int, order: Rng) -> DrawnLoss:
    """The loss of a share of a step's batch."""
    batches = Batches(seen.z_i, seen.states, seen.mask, seen.z_t, batch_size=batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array | None, ...]:
        z_i, *told = (share.of(a) for a in batches.at(step - 1))
        return model.draw(backend.to_device(z_i), rng, on_device(*told), empty)

    return DrawnLoss(draw_at, model.loss_of)


# ------------------------------------------------------------------------------------------- measuring


def nearest_pictures(model: Prior, held_out: Pairs, seen: Pairs, empty: Condition, rng: Rng) -> np.ndarray:
    """A row for each of the first captions: its own picture, then the one nearest to each embedding drawn for it."""
    n = min(SHOWN, len(held_out.texts))
    told = held_out.told(np.repeat(np.arange(n), DRAWS))
    z_i = backend.to_numpy(model.candidates(told, rng, empty=empty)[0])
    found = seen.images[(z_i @ seen.z_i.T).argmax(axis=1)].reshape(n, DRAWS, *seen.images.shape[1:])
    rows = np.concatenate([held_out.images[:n, None], found], axis=1)
    return rows.reshape(-1, *rows.shape[2:])


def report(model: Prior, held_out: Pairs, seen: Pairs, empty: Condition, rng: Rng) -> None:
    """Print the mean cosines with the held-out pictures' embeddings, and what a second candidate is worth."""
    z_t, mean = held_out.z_t, unit_rows(seen.z_i.mean(axis=0, keepdims=True))
    both = drawn(model, held_out, empty, rng, n=2)
    one, two = both[0], most_aligned(both, z_t)
    true = functools.partial(cosines, held_out.z_i)
    print(f"Mean cosine with the embedding of the caption's own picture, {len(z_t):,} held-out pairs:")
    for name, z in {
        "drawn by the prior": one,
        "drawn, the better of two candidates": two,
        "the text's own embedding": z_t,
        "the mean of all pictures": mean,
    }.items():
        print(f"  {name:36} {true(z).mean():.4f}")
    print("What the second candidate adds to the cosine with (mean, standard error, probability by chance):")
    for name, change in {
        "the caption's embedding": paired_change(cosines(z_t, one), cosines(z_t, two)),
        "the embedding of its picture": paired_change(true(one), true(two)),
    }.items():
        print(f"  {name:36} {as_text(change)}")


def drawn(model: Prior, held_out: Pairs, empty: Condition, rng: Rng, n: int, batch: int = 250) -> np.ndarray:
    """Embeddings for the N held-out captions, (n, N, d), on the host."""
    N = len(held_out.texts)
    starts = cli.progress(range(0, N, batch), "embeddings for held-out captions", -(-N // batch))
    told = ((i, held_out.told(slice(i, i + batch))) for i in starts)
    parts = (model.candidates(some, rng.at(i), n=n, empty=empty) for i, some in told)
    return np.concatenate([backend.to_numpy(part) for part in parts], axis=1)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosines of unit vectors, row by row: (N,)."""
    return (a * b).sum(axis=1)


def as_text(change: Change) -> str:
    """A change, its error and its p-value."""
    return f"{change.value:+.4f} ± {change.error:.4f}, p = {change.p:.1e}"


if __name__ == "__main__":
    cli.run(main)
