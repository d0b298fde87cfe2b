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
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, checkpoint, cli, image, program
from tinydiff.data import captioned
from tinydiff.data.captioned import Captioned
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
from tinydiff.models.prior import most_aligned, unit_rows, z_t_of
from tinydiff.nn import TransformerConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings

WEIGHTS, DATA, ORDER, NOISE, TEST = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/prior"
KINDS = {"diffusion": DiffusionPrior.kind, "autoregressive": AutoregressivePrior.kind}
NAMES = {"diffusion": "prior.npz", "autoregressive": "autoregressive_prior.npz"}
Prior = DiffusionPrior | AutoregressivePrior

SHOWN, DRAWS = 8, 7
"""Captions in the pictures of a run, and embeddings drawn for each."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    held_out: how many pairs the figures at the end are of. width, layers: of the transformer. explained, bins: see the
    command line. Raises ValueError for numbers below 1.
    """

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

    def __post_init__(self) -> None:
        program.at_least_1(self, "pictures", "held_out", "width", "layers")

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=100, betas=(0.9, 0.99), ema_decay=0.998)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    what = parser.add_argument_group("what to train")
    codes = parser.add_argument_group("codes of the autoregressive prior (E31)")
    what.add_argument("--kind", choices=KINDS, help=f"of the prior, E30 or E31 (default: {usual.kind})")
    add = functools.partial(program.add_flag, what, usual)
    add("--data", "shapes, digits, fashion, or a folder of captioned images")
    add("--pictures", "how many to learn from")
    add("--held-out", "how many to test with")
    add("--clip", "whose embeddings they are: the shipped one, or a run of train_clip.py", metavar="RUN")
    add("--width", "of the transformer's tokens")
    add("--layers", "of the transformer")
    share = "of the variance, by as many principal components as it takes"
    program.add_flag(codes, usual, "--explained", share, metavar="SHARE")
    program.add_flag(codes, usual, "--bins", "codes for each component")
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
    loss_at = program.told_loss(model, seen.z_i, seen.told, empty, recipe.batch_size, rng.at(ORDER))

    def sheet(name: str) -> None:
        found = nearest_pictures(model, held_out, seen, empty, rng.at(TEST))
        image.save_png(folder / name, image.grid(found, 1 + DRAWS), scale=2)

    def preview(step: int) -> None:
        sheet(f"samples_{step:06d}.png")

    (folder / "captions.txt").write_text("\n".join(held_out.texts[:SHOWN]) + "\n", encoding="utf-8")
    what = f"{len(seen.images):,} pictures, {recipe.kind}"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="embeddings", preview=preview)
    with training.ema.applied():
        sheet("samples.png")
        report(model, held_out, seen, empty, rng.at(TEST))
    print(f"Pictures near what it draws for the captions in {folder / 'captions.txt'}: {folder / 'samples.png'}")
    other = next(kind for kind in KINDS if kind != recipe.kind)
    told_by = () if recipe.clip == Recipe.clip else ("--clip", recipe.clip)
    print(f"Train the other prior:\n  {cli.command(__file__, '--kind', other, *told_by)}")
    print(f"Put the model into a small file:\n  {program.export_command(folder, NAMES[recipe.kind])}")
    decoder = pathlib.Path(__file__).with_name("train_decoder.py")
    print(f"Train what draws pictures of its embeddings:\n  {cli.command(decoder, *told_by)}")


# ------------------------------------------------------------------------------------------ embeddings


@dataclass(frozen=True)
class Pairs:
    """N pictures, uint8 (N, H, W, 3), what they are called, and what CLIP makes of both.

    z_i: (N, d), on the host. told: of the captions, `program.stored`, told.vector their embeddings z_t.
    """

    images: np.ndarray
    texts: list[str]
    z_i: np.ndarray
    told: Condition

    @classmethod
    def of(cls, clip: CLIP, source: Captioned, rng: Rng, n: int, split: str) -> Pairs:
        """Draw n pairs, and read them."""
        images, texts = source.draw(rng, n, split)
        told = program.encoded_texts(clip, texts, told_captions)
        return cls(images, texts, program.encoded_images(clip, images), told)


# -------------------------------------------------------------------------------------------- training


def prior_of(recipe: Recipe, clip: CLIP, seen: Pairs, rng: Rng) -> Prior:
    """The untrained prior of a recipe; the codes of an autoregressive one are fitted to the embeddings seen."""
    sizes, known = TransformerConfig(recipe.width, recipe.layers, causal=True), checkpoint.fingerprint(clip)
    context, embedding = clip.config.text.width, clip.config.embedding
    if recipe.kind == "diffusion":
        return DiffusionPrior(DiffusionPriorConfig(sizes, context, embedding, text_encoder=known), rng)
    components = PrincipalComponents.of(seen.z_i).needed(recipe.explained)
    config = AutoregressivePriorConfig(
        sizes, context, embedding, text_encoder=known, components=components, bins=recipe.bins
    )
    prior = AutoregressivePrior(config, rng)
    prior.codebook.fit(seen.z_i, z_t_of(seen.told))
    print(f"{components} of {embedding} principal components explain {recipe.explained:.2%} of the variance")
    return prior


# ------------------------------------------------------------------------------------------- measuring


def nearest_pictures(model: Prior, held_out: Pairs, seen: Pairs, empty: Condition, rng: Rng) -> np.ndarray:
    """A row for each of the first captions: its own picture, then the one nearest to each embedding drawn for it."""
    n = min(SHOWN, len(held_out.texts))
    told = program.ready(held_out.told.taken(np.repeat(np.arange(n), DRAWS)))
    z_i = backend.to_numpy(model.candidates(told, rng, empty=empty)[0])
    found = seen.images[(z_i @ seen.z_i.T).argmax(axis=1)].reshape(n, DRAWS, *seen.images.shape[1:])
    rows = np.concatenate([held_out.images[:n, None], found], axis=1)
    return rows.reshape(-1, *rows.shape[2:])


def report(model: Prior, held_out: Pairs, seen: Pairs, empty: Condition, rng: Rng) -> None:
    """Print the mean cosines with the held-out pictures' embeddings, and what a second candidate is worth."""
    z_t, mean = z_t_of(held_out.told), unit_rows(seen.z_i.mean(axis=0, keepdims=True))
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
    told = ((i, program.ready(held_out.told.taken(slice(i, i + batch)))) for i in starts)
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
