"""Train CLIP: two towers that learn from captions which image and which text belong together (E25).

    python examples/train_clip.py                     scenes of shapes, endless; twenty minutes of one CPU core
    python examples/train_clip.py --data fashion      clothes ("a photo of an ankle boot"); or digits ("a seven")
    python examples/train_clip.py --data FOLDER       your images, with a captions file: tinydiff/data/captioned.py
    python examples/train_clip.py --resume runs/clip  go on after Ctrl-C, or after the power went

First a tokenizer is trained on captions, then the towers. The folder of the run receives cosines_000000.png, ... (ten
held-out images against their captions, as the model learns), loss.png, and checkpoint.npz, which retrieve.py searches
with. At the end it says how often an image finds its own caption, and a caption its image, among up to 500 held-out
ones (recall@1, or among the first five found: recall@5), and how well it tells what nobody trained it to tell apart
(zero-shot).

With several processes (README, Speed) each contrasts its own share of a batch.
"""

from __future__ import annotations

import argparse
import pathlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydiff import backend, cli, image, program
from tinydiff.autograd import Tensor
from tinydiff.data import captioned
from tinydiff.data.captioned import Captioned, Mixture, Shapes
from tinydiff.data.shape_captions import PHRASES
from tinydiff.data.shapes import COLOURS, PLACES, SHAPES
from tinydiff.files import atomic_file
from tinydiff.models.clip import CLIP, CLIPConfig
from tinydiff.models.tokenizer import Tokenizer, clean
from tinydiff.nn import TransformerConfig
from tinydiff.program import Run, fit
from tinydiff.retrieval import recall
from tinydiff.rng import Rng
from tinydiff.train import LossAt, TrainSettings
from tinydiff.workers import Share

WEIGHTS, WORDS, PAIRS, TEST = range(4)
"""The names of the run's random streams: rng.at(WEIGHTS) draws the first weights, and so on."""

PROMPTS = {
    "shape": {name: f"a {name}" for name in SHAPES},
    "colour": {name: f"a {name} thing" for name in COLOURS},
    "place": {name: f"a thing {PHRASES['place'][name][0]}" for name in PLACES},
}
"""The texts among which one says what a thing is like."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    read: captions that the tokenizer learns from. vocabulary: its size. length: tokens of a caption that are read.
    width, layers, heads: of both transformers. The other fields are those of CLIPConfig and TrainSettings.
    """

    data: str = "shapes"
    steps: int = 4000
    batch_size: int = 96
    lr: float = 1e-3
    warmup: int = 100
    ema_decay: float = 0.99
    read: int = 5000
    vocabulary: int = 512
    length: int = 28
    width: int = 128
    layers: int = 3
    heads: int = 4
    patch: int = 8
    embedding: int = 128
    seed: int = 0

    def source(self) -> Captioned:
        """What to learn; of shapes, a third of the captions are brief, and a third name everything.

        Two random scenes hardly ever differ in their shapes alone, or in their places alone, so nothing would have to
        be learned of these: where captions name nearly everything, scenes that are alike in all else follow each other.
        """
        if self.data == "shapes":
            return Mixture((Shapes(brief=True), Shapes(alike=6), Shapes(full=True, alike=6)))
        return captioned.source(self.data)

    def tested(self) -> Captioned:
        """What recall is measured on: of shapes, captions that name everything."""
        return Shapes(full=True) if self.data == "shapes" else self.source()

    def model(self, images: np.ndarray, captions: Sequence[str]) -> CLIPConfig:
        """The model for images and captions like these."""
        return CLIPConfig(
            Tokenizer.train(map(clean, captions), self.vocabulary).merges,
            self.length,
            TransformerConfig(self.width, self.layers, self.heads, causal=True),
            TransformerConfig(self.width, self.layers, self.heads),
            size=images.shape[1],
            channels=images.shape[3],
            patch=self.patch,
            embedding=self.embedding,
        )

    def settings(self) -> TrainSettings:
        """How to train it."""
        return TrainSettings(self.steps, self.lr, warmup=self.warmup, betas=(0.9, 0.98), ema_decay=self.ema_decay)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser = cli.parser(__doc__)

    def add(group: Any, flag: str, text: str, **how: Any) -> None:
        value = getattr(Recipe, flag[2:].replace("-", "_"))
        group.add_argument(flag, help=f"{text} (default: {value})", **how)

    what = parser.add_argument_group("what to train")
    add(what, "--data", "shapes, digits, fashion, or a folder of images with a captions file")
    add(what, "--read", "captions that the tokenizer learns from", type=int, metavar="N")
    add(what, "--vocabulary", "tokens that the tokenizer may learn, 259 at least", type=int, metavar="N")
    add(what, "--length", "tokens of a caption that are read, start and end among them", type=int, metavar="N")
    add(what, "--width", "of the tokens in both towers", type=int, metavar="N")
    add(what, "--layers", "of each tower", type=int, metavar="N")
    add(what, "--heads", "of attention", type=int, metavar="N")
    add(what, "--patch", "pixels along a patch of the image", type=int, metavar="N")
    add(what, "--embedding", "numbers that describe an image or a text", type=int, metavar="N")
    program.add_training_flags(parser, Recipe(), "pairs")
    program.add_run_flags(parser, "runs/clip", "steps between pictures (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then measure."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), "runs/clip", CLIP.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, and measure what it learned."""
    recipe, rng = run.recipe, Rng(run.recipe.seed)
    source = recipe.source()
    images, captions = source.draw(rng.at(WORDS), recipe.read)
    model = CLIP(recipe.model(images, captions), rng.at(WEIGHTS))
    cut = np.mean([len(model.tokenizer.encode(clean(caption))) > recipe.length - 2 for caption in captions])
    if cut:
        print(f"{cut:.1%} of the captions are cut after {recipe.length} tokens; a larger --length reads all of them")
    shown = distinct_pairs(recipe.tested(), rng.at(TEST), 10)

    def preview(step: int) -> None:
        cosines_picture(run.folder / f"cosines_{step:06d}.png", model, *shown)

    what = f"{recipe.data}, {len(model.tokenizer)} tokens, captions such as {captions[0]!r}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a text of .* was cut")
        loss_at = loss_of(model, source, recipe.batch_size)
        training = fit(run, model, loss_at, rng.at(PAIRS), __file__, what=what, unit="pairs", preview=preview)
        with training.ema.applied():
            report = measure(model.eval(), recipe.data, recipe.tested(), rng.at(TEST))
    for name, value in report.items():
        print(f"{name:<60} {value:7.1%}")
    retrieve = cli.command(pathlib.Path(__file__).with_name("retrieve.py"), captions[0], "--model", run.folder)
    print(f"Search with it:\n  {retrieve}")


def loss_of(model: CLIP, source: Captioned, batch_size: int) -> LossAt:
    """The contrastive loss of a share of a step's batch, drawn for it."""
    if batch_size < 2:
        raise ValueError(f"to contrast pairs, a batch must have 2 at least, got {batch_size}")
    source.draw(Rng(0), batch_size)  # raises before the training for a batch that it cannot fill

    def loss_at(step: int, rng: Rng, share: Share) -> Tensor:
        images, captions = source.draw(rng, len(share.of(range(batch_size))))
        return model.loss(backend.to_device(image.to_signed(images)), *model.tokens(captions))

    return loss_at


def distinct_pairs(source: Captioned, rng: Rng, most: int) -> tuple[np.ndarray, list[str]]:
    """Up to so many held-out images, float32 in [-1, 1], no two with one caption, and their captions."""
    images, captions = source.draw(rng, 2 * most, "test")
    first = {clean(caption): i for i, caption in reversed([*enumerate(captions)])}
    rows = sorted(first.values())[:most]
    return image.to_signed(images[rows]), [captions[i] for i in rows]


def measure(model: CLIP, data: str, source: Captioned, rng: Rng) -> dict[str, float]:
    """Recall both ways among held-out pairs, and what the model tells apart without having been trained to."""
    images, captions = distinct_pairs(source, rng, 500)
    cosines = model.image_embedding(images) @ model.text_embedding(captions).T
    report = {
        f"recall@{k} among {len(captions)} held-out pairs, {way}": recall(table, k)
        for way, table in (("image to text", cosines), ("text to image", cosines.T))
        for k in (1, 5)
    }
    if data == "shapes":
        scenes, test = Shapes(number=1).scenes(rng.at(0), 500, "test"), Shapes(number=1).draw(rng.at(0), 500, "test")
        for kind, prompts in PROMPTS.items():
            own = np.array([[*prompts].index(getattr(scene.items[0], kind)) for scene in scenes])
            report[f"zero-shot {kind} of 500 held-out things"] = accuracy(model, test[0], [*prompts.values()], own)
    elif len(captions) <= 50:
        test = source.draw(rng.at(0), 500, "test")
        named = [clean(caption) for caption in captions]
        own = np.array([named.index(clean(c)) if clean(c) in named else -1 for c in test[1]])
        report[f"zero-shot among these captions, of {np.sum(own >= 0)} images"] = accuracy(
            model, test[0][own >= 0], captions, own[own >= 0]
        )
    return report


def accuracy(model: CLIP, images: np.ndarray, prompts: Sequence[str], own: np.ndarray) -> float:
    """The share of images, uint8, for which the prompt of this number is the likeliest."""
    return float(np.mean(model.zero_shot(image.to_signed(images), prompts).argmax(axis=1) == own))


def cosines_picture(path: pathlib.Path, model: CLIP, images: np.ndarray, captions: Sequence[str]) -> None:
    """Draw the cosine of each image (column) with each caption (row): pairs on the diagonal."""
    from matplotlib.figure import Figure

    cosines = model.text_embedding(captions) @ model.image_embedding(images).T
    n = len(captions)
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(cosines, cmap="viridis", vmin=-0.6, vmax=1, extent=(0, n, n, 0))
    for i, picture in enumerate(images):
        axes.imshow(image.to_uint8(picture).squeeze(), extent=(i + 0.05, i + 0.95, -0.05, -0.95), cmap="gray")
        for j in range(n):
            color = "black" if cosines[j, i] > 0.6 else "white"
            axes.text(i + 0.5, j + 0.5, f"{cosines[j, i]:.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.set(xlim=(0, n), ylim=(n, -1), xticks=[])
    axes.set_yticks(np.arange(n) + 0.5, [c if len(c) < 60 else c[:60] + "…" for c in captions], fontsize=8)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    cli.run(main)
