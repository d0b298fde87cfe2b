"""Train the first stage of latent diffusion (E23): an autoencoder from 32 x 32 pixels to 8 x 8 latents, and back.

    python examples/train_vae.py                       half an hour on one CPU core; endless captioned shapes
    python examples/train_vae.py --data fashion        clothes, or digits, or a folder of images with captions
    python examples/train_vae.py --config f8           to 4 x 4 latents instead: 48 times fewer numbers
    python examples/train_vae.py --regularisation vq   latents from a codebook instead of a Gaussian
    python examples/train_vae.py --adversarial 0       without the discriminator
    python examples/train_vae.py --base vae --data DIR start from the shipped model, to teach it your own images
    python examples/train_vae.py --resume runs/vae     go on after Ctrl-C, or after the power went

The folder of the run receives reconstructions_000000.png, ... (held-out images, and below them what the model makes of
them as it learns), losses.csv and losses.png (each term of the loss on held-out images), loss.png, and checkpoint.npz,
which VAE.load reads. The last act measures the scale that gives the latents unit variance (E24) and saves it too.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, cli, image, program
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.data import captioned
from tinydiff.files import atomic_file
from tinydiff.metrics import psnr
from tinydiff.models import VAE, AdversarialVAE, LossWeights, SceneReader, VAEConfig
from tinydiff.models.discriminator import DISTANCES, Features
from tinydiff.models.scene_reader import agreement
from tinydiff.models.vae import CONFIGS, REGULARISATIONS
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import Share

WEIGHTS, NOISE, HELD_OUT, SCALE = range(4)
"""The names of the run's random streams."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    base: a trained model to start from, whose sizes and regularisation it keeps, or "". pixels, perceptual,
    adversarial, start: see LossWeights; kl: its regularisation, which weighs 1 where latents are quantised. tested: how
    many held-out images the figures at the end are of.
    """

    data: str = "shapes"
    base: str = ""
    config: str = "f4"
    regularisation: str = "kl"
    pixels: str = "l2"
    kl: float = 3e-3
    perceptual: float = 0.01
    adversarial: float = 0.1
    start: int = 6000
    steps: int = 8000
    batch_size: int = 16
    lr: float = 3e-3
    tested: int = 500
    seed: int = 0

    def vae(self) -> VAEConfig:
        """The autoencoder, if no other is started from."""
        return dataclasses.replace(CONFIGS[self.config], regularisation=self.regularisation)

    def weights(self, regularisation: str) -> LossWeights:
        """How much each term of its loss counts."""
        price = self.kl if regularisation == "kl" else 1.0
        return LossWeights(self.pixels, self.perceptual, price, self.adversarial, self.start)

    def settings(self) -> TrainSettings:
        """How to train them."""
        return TrainSettings(self.steps, self.lr, warmup=100, betas=(0.9, 0.99), ema_decay=0.998)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    what = parser.add_argument_group("what to train")
    what.add_argument("--data", help="shapes, digits, fashion, or a folder of images with captions (default: shapes)")
    what.add_argument("--base", metavar="RUN", help="start from a run's model, or a shipped one: vae")
    small = [name for name in CONFIGS if name != "stable-diffusion"]
    what.add_argument("--config", choices=small, help="how much smaller the latents are (default: f4)")
    what.add_argument("--regularisation", choices=REGULARISATIONS, help="of the latents (default: kl)")
    terms = parser.add_argument_group("what each term of the loss weighs (E23)")
    terms.add_argument("--pixels", choices=DISTANCES, help=f"absolute or squared errors (default: {usual.pixels})")
    terms.add_argument(
        "--kl", type=float, metavar="W", help=f"the latents' divergence from N(0, I) (default: {usual.kl})"
    )
    help = f"distance of feature maps, for shapes only: those of the scene reader (default: {usual.perceptual})"
    terms.add_argument("--perceptual", type=float, metavar="W", help=help)
    help = f"the discriminator's share in what the decoder learns; 0: none (default: {usual.adversarial})"
    terms.add_argument("--adversarial", type=float, metavar="W", help=help)
    terms.add_argument("--start", type=int, metavar="N", help=f"steps before it plays (default: {usual.start})")
    program.add_training_flags(parser, usual, "images")
    help = f"held-out images to measure on at the end (default: {usual.tested})"
    parser.add_argument("--tested", type=int, metavar="N", help=help)
    program.add_run_flags(parser, "runs/vae", "steps between pictures (default: twenty a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then measure."""
    options = parse()
    if options.base and (options.config or options.regularisation):
        raise ValueError("a model that is started from keeps its own --config and --regularisation: leave them out")
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), "runs/vae", AdversarialVAE.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, and measure what it learned."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    source = captioned.source(recipe.data)
    reader = SceneReader.load("scene_reader") if recipe.data == "shapes" else None
    model = start(run, rng.at(WEIGHTS), features_of(reader) if recipe.perceptual else None)
    images = backend.to_device(image.to_signed(source.draw(rng.at(HELD_OUT), recipe.tested, "test")[0]))

    def loss_at(step: int, rng: Rng, share: Share) -> Tensor:
        seen, _ = source.draw(rng.at(0), len(share.of(range(recipe.batch_size))))
        return model.loss(backend.to_device(image.to_signed(seen)), step, rng.at(1))[0]

    def preview(step: int) -> None:
        image.save_png(folder / f"reconstructions_{step:06d}.png", sheet(model, images[:10]), scale=2)
        _, terms = model.loss(images[:64], step, rng.at(HELD_OUT))
        draw_terms(folder / "losses.png", logged(folder / "losses.csv", step, terms))

    what = f"{cli.short(recipe.data)}: {images.shape[1]} x {images.shape[2]} pixels"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=preview, previews=20)
    with training.ema.applied():
        model.measure_scale(backend.to_device(image.to_signed(source.draw(rng.at(SCALE), recipe.tested)[0])))
        report(model, images, reader)
    training.save()
    print(f"Held-out images and their reconstructions: {folder / f'reconstructions_{training.step:06d}.png'}")
    print(f"Put the model into a small file, which VAE.load takes as it does {folder}:")
    print(f"  {program.export_command(folder, 'vae.npz')}")


def start(run: Run[Recipe], rng: Rng, features: Features | None) -> AdversarialVAE:
    """The autoencoder and its judges, as they start: from nothing, or from another model's weights."""
    recipe = run.recipe
    base = VAE.load(recipe.base) if recipe.base and run.saved is None else None
    config = base.config if base else VAEConfig(**run.saved[1]["config"]) if run.saved else recipe.vae()
    config = dataclasses.replace(config, scale=1.0)
    model = AdversarialVAE(config, recipe.weights(config.regularisation), rng, features)
    if base:
        model.load_state_dict(model.state_dict() | base.state_dict())
    return model


def features_of(reader: SceneReader | None) -> Features | None:
    """The feature maps that a perceptual loss compares; the reader itself does not learn."""
    if reader is None:
        return None
    for p in reader.parameters().values():
        p.requires_grad = False
    return reader.embed


def sheet(model: AdversarialVAE, images: Array) -> np.ndarray:
    """Images, and below each what the model makes of it."""
    both = np.concatenate([backend.to_numpy(a) for a in (images, model.decode(model.encode(images)))])
    return image.grid(both, columns=len(images))


def logged(path: pathlib.Path, step: int, terms: dict[str, float]) -> list[dict[str, float]]:
    """Write the terms of a step into a CSV file, below those of earlier steps, and return all: one row each.

    Rows from this step on are replaced: they are of a part of the run that is done again.
    """
    rows: list[dict[str, float]] = []
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                rows.append({"step": int(row.pop("step")), **{name: float(v) for name, v in row.items() if v}})
        rows = [row for row in rows if row["step"] < step]
    rows.append({"step": step, **terms})
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.DictWriter(text, names)
        table.writeheader()
        table.writerows(rows)
        text.detach()
    return rows


def draw_terms(path: pathlib.Path, rows: list[dict[str, float]]) -> None:
    """Each term of the loss against the step, in a picture of its own."""
    from matplotlib.figure import Figure

    names = [name for name in rows[-1] if name != "step"]
    figure = Figure(figsize=(3.2 * len(names), 2.8), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), color="tab:blue", marker=".")
        axes.set(title=name, xlabel="training step")
        if name in ("pixels", "perceptual"):
            axes.set_yscale("log")
        axes.grid(True, alpha=0.2)
    image.save_png(path, image.rasterise(figure))


def report(model: AdversarialVAE, images: Array, reader: SceneReader | None) -> None:
    """Print how good the reconstructions of held-out images are, and how their latents are spread."""
    z = model.encode(images)
    drawn = model.decode(z)
    of_each = psnr(backend.to_numpy(drawn), backend.to_numpy(images))
    print(f"PSNR of {len(images)} held-out images: {of_each.mean():.2f} dB, the worst {of_each.min():.2f} dB")
    spread = ", ".join(f"{float(s):.2f}" for s in z.std(axis=(0, 1, 2)))
    print(
        f"Latent scale {model.config.scale:.4f}: their variance is {float(z.var()):.3f}; of each channel, std {spread}"
    )
    if reader is not None:
        alike = agreement(reader.read(drawn), reader.read(images))
        shares = ", ".join(f"{name} {share:.1%}" for name, share in alike.items())
        print(f"Scenes that the reader reads alike in original and reconstruction: {shares}")


if __name__ == "__main__":
    cli.run(main)
