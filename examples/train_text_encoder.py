"""Train a text encoder on captions alone, as Imagen's was on texts alone: it guesses words that are hidden (E37).

    python examples/train_text_encoder.py                             captions of shapes; ten minutes of one CPU core
    python examples/train_text_encoder.py --data FOLDER               your own captions: tinydiff/data/captioned.py
    python examples/train_text_encoder.py --resume runs/text_encoder  go on after Ctrl-C, or after the power went

It sees no picture. A tokenizer is trained on the captions, then a transformer in which each token sees all others: a
fifth of the tokens are hidden, and it learns to guess them from the rest (BERT: Devlin et al. 2019). What it makes of a
text on the way is what a diffusion model is told: in place of CLIP, train_text_to_pixels.py takes it.

The folder of the run receives loss.png and checkpoint.npz. At the end it says how many hidden words of held-out
captions are guessed, beside how many the commonest one would hit. Most cannot be known: who could tell the colour of a
thing that was hidden?
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, cli, program
from tinydiff.autograd import no_grad
from tinydiff.backend import Array
from tinydiff.data import captioned
from tinydiff.data.loader import Batches
from tinydiff.models.text_encoder import GAP, MaskedTextEncoder, TextEncoderConfig
from tinydiff.models.tokenizer import BYTES, Tokenizer, clean
from tinydiff.nn import TransformerConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import DrawnLoss, Share

WEIGHTS, DATA, ORDER, HIDDEN, TEST = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/text_encoder"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    captions: how many to learn from. tested: how many held-out ones the figures at the end are of. vocabulary: of the
    tokenizer. length: tokens of a caption that are read. width, layers: of the transformer. hidden: see
    TextEncoderConfig. Raises ValueError for numbers below 1.
    """

    data: str = "shapes"
    captions: int = 40_000
    tested: int = 1000
    vocabulary: int = 512
    length: int = 28
    width: int = 128
    layers: int = 3
    hidden: float = 0.2
    steps: int = 4000
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        program.at_least_1(self, "captions", "tested", "width", "layers")

    def model(self, captions: list[str]) -> TextEncoderConfig:
        """The model for captions like these."""
        merges = Tokenizer.train(map(clean, captions), self.vocabulary).merges
        return TextEncoderConfig(merges, self.length, TransformerConfig(self.width, self.layers), self.hidden)

    def settings(self) -> TrainSettings:
        """How to train it."""
        return TrainSettings(self.steps, self.lr, warmup=200, betas=(0.9, 0.98), ema_decay=0.998)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    add = functools.partial(program.add_flag, parser.add_argument_group("what to train"), usual)
    add("--data", "shapes, digits, fashion, or a folder of images with a captions file")
    add("--captions", "how many to learn from")
    add("--tested", "held-out captions to measure on at the end")
    add("--vocabulary", "tokens that the tokenizer may learn, 259 at least")
    add("--length", "tokens of a caption that are read, start and end among them")
    add("--width", "of the transformer's tokens, a multiple of 4")
    add("--layers", "of the transformer")
    add("--hidden", "share of a caption's tokens that must be guessed", metavar="SHARE")
    program.add_training_flags(parser, usual, "captions")
    program.add_run_flags(parser, FOLDER)
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then measure."""
    options = parse()
    with cli.on_device(options.device), warnings.catch_warnings():
        warnings.filterwarnings("once", message="a text of .* was cut")
        train(program.start_or_resume(options, Recipe(), FOLDER, MaskedTextEncoder.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, and measure what it learned."""
    recipe, rng = run.recipe, Rng(run.recipe.seed)
    source = captioned.source_to_draw(recipe.data)
    captions = source.draw(rng.at(DATA), recipe.captions)[1]
    held_out = source.draw(rng.at(TEST), recipe.tested, "test")[1]
    model = MaskedTextEncoder(recipe.model(captions), rng.at(WEIGHTS))
    ids, mask = map(backend.to_numpy, model.tokens(captions))
    loss_at = loss_of(model, ids, mask, recipe.batch_size, rng.at(ORDER))
    what = f"{len(captions):,} captions such as {captions[0]!r}"
    training = fit(run, model, loss_at, rng.at(HIDDEN), __file__, what=what, unit="captions")
    with training.ema.applied():
        report(model.eval(), ids, held_out, rng.at(TEST))
    print(f"Put it into a small file:\n  {program.export_command(run.folder, 'text_encoder.npz')}")
    then = pathlib.Path(__file__).with_name("train_text_to_pixels.py")
    print(f"Train a diffusion model that listens to it:\n  {cli.command(then, '--text-encoder', run.folder)}")


def loss_of(model: MaskedTextEncoder, ids: np.ndarray, mask: np.ndarray, batch_size: int, order: Rng) -> DrawnLoss:
    """The loss of a share of a step's batch, of which each time other tokens are hidden."""
    batches = Batches(ids, mask, batch_size=batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array | None, ...]:
        ids, mask = (backend.to_device(share.of(a)) for a in batches.at(step - 1))
        return model.draw(ids, mask, rng)

    return DrawnLoss(draw_at, model.loss_of)


# ------------------------------------------------------------------------------------------- measuring


def report(model: MaskedTextEncoder, seen: np.ndarray, captions: list[str], rng: Rng) -> None:
    """Print how many hidden tokens of held-out captions are guessed, and what the model says of some gaps."""
    true, guessed = guesses(model, captions, rng)
    commonest, _ = Counter(seen[seen >= BYTES].tolist()).most_common(1)[0]
    word = model.tokenizer.decode([commonest]).strip()
    print(f"Of {len(true):,} hidden tokens of held-out captions are guessed:")
    print(f"  {'by the model':36} {np.mean(true == guessed):.1%}")
    print(f"  {f'by always saying {word!r}':36} {np.mean(true == commonest):.1%}")
    for text in [with_gap(c) for c in captions if len(model.tokenizer.encode(clean(c))) <= model.config.length - 2][:3]:
        print(f"{text!r}: " + ", ".join(f"{word} {p:.2f}" for word, p in model.fill(text)))


def with_gap(caption: str) -> str:
    """The caption without the word in its middle."""
    words = caption.split()
    return " ".join([*words[: len(words) // 2], GAP, *words[len(words) // 2 + 1 :]])


def guesses(model: MaskedTextEncoder, captions: list[str], rng: Rng, batch: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """Each hidden token of the captions, and the model's first guess, both (number hidden,): none is left visible."""
    true, guessed = [], []
    for i in range(0, len(captions), batch):
        ids, mask = model.tokens(captions[i : i + batch])
        hidden = model.chosen(ids, rng.at(i))
        shown = backend.array_module(ids).where(hidden, model.mask_token, ids)
        with no_grad():
            first = model.logits(shown, mask).data.argmax(axis=2)
        true.append(backend.to_numpy(ids[hidden]))
        guessed.append(backend.to_numpy(first[hidden]))
    return np.concatenate(true), np.concatenate(guessed)


if __name__ == "__main__":
    cli.run(main)
