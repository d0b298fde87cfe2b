"""Train the U-Net of Stable Diffusion in miniature: diffusion on an autoencoder's latents, told a text (E24, E27).

    python examples/train_latent_diffusion.py                          with the shipped autoencoder and CLIP
    python examples/train_latent_diffusion.py --vae RUN --clip RUN     with those that you trained
    python examples/train_latent_diffusion.py --data pictures/         your own images and captions
    python examples/train_latent_diffusion.py --resume RUN             go on after Ctrl-C, or after the power went

It is the third stage of train_text_to_image.py, which trains all three. Pictures and captions are turned into latents
and states of tokens once, before the training, which then never sees a pixel. The folder of the run receives
samples_000000.png, ... (the same prompts, drawn by the model as it learns), then samples.png, loss.png and
checkpoint.npz.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from dataclasses import dataclass

import numpy as np

from tinydiff import backend, checkpoint, cli, image, program
from tinydiff.data import captioned
from tinydiff.diffusion import Sampling, last
from tinydiff.models import CLIP, VAE, LatentDiffusion, LatentDiffusionConfig, StableDiffusion
from tinydiff.nn import UNetConfig
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings

WEIGHTS, DATA, ORDER, NOISE, PICTURES = range(5)
"""The names of the run's random streams."""

FOLDER = "runs/latent_diffusion"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    width: of the U-Net. text_layers: blocks of a transformer before it. Raises ValueError for numbers below 1.
    """

    data: str = "shapes"
    pictures: int = 40_000
    vae: str = "vae"
    clip: str = "clip"
    width: int = 56
    text_layers: int = 2
    steps: int = 5000
    batch_size: int = 128
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        program.at_least_1(self, "pictures", "width")

    def settings(self) -> TrainSettings:
        """How to train."""
        return TrainSettings(self.steps, self.lr, warmup=200, betas=(0.9, 0.99), ema_decay=0.999)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser, usual = cli.parser(__doc__), Recipe()
    add = functools.partial(program.add_flag, parser.add_argument_group("what to train"), usual)
    add("--data", "shapes, digits, fashion, or a folder of captioned images")
    add("--pictures", "how many to learn from")
    add("--vae", "the autoencoder: the shipped one, or a run of train_vae.py", metavar="RUN")
    add("--clip", "the text encoder: the shipped one, or a run of train_clip.py", metavar="RUN")
    add("--width", "of the U-Net")
    add("--text-layers", "of a transformer between CLIP and the U-Net; Stable Diffusion has none")
    program.add_training_flags(parser, usual, "images")
    program.add_run_flags(parser, FOLDER, "steps between sample grids (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), FOLDER, LatentDiffusion.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, from the start or from what was saved, and draw the pictures."""
    recipe, folder, rng = run.recipe, run.folder, Rng(run.recipe.seed)
    vae, clip = VAE.load(recipe.vae), CLIP.load(recipe.clip)
    source = captioned.source_to_draw(recipe.data)
    images, captions = source.draw(rng.at(DATA), recipe.pictures)
    height, width = (pixels // vae.factor for pixels in images.shape[1:3])
    unet = UNetConfig(vae.config.latent, recipe.width, (1, 2), 1, (0, 1), heads=4, context=clip.config.text.width)
    config = LatentDiffusionConfig(
        unet,
        (height, width),
        text_layers=recipe.text_layers,
        autoencoder=checkpoint.fingerprint(vae),
        text_encoder=checkpoint.fingerprint(clip),
    )
    model = LatentDiffusion(config, rng.at(WEIGHTS))
    whole = StableDiffusion(vae, clip, model)
    z, told = encoded(vae, images), program.encoded_texts(clip, captions)
    loss_at = program.told_loss(model, z, told, whole.text(""), recipe.batch_size, rng.at(ORDER))
    _, prompts = source.draw(rng.at(PICTURES), 24, "test")

    def sheet(name: str, steps: int) -> None:
        z_0 = last(whole.text_to_image(prompts, rng.at(PICTURES), Sampling("dpm", steps)))
        image.save_png(folder / name, image.grid(whole.decode(z_0), 8), scale=2)

    def preview(step: int) -> None:
        sheet(f"samples_{step:06d}.png", 10)

    what = f"{len(images):,} pictures"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="images", preview=preview)
    with training.ema.applied():
        sheet("samples.png", 25)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"The prompts in {folder / 'prompts.txt'}, drawn: {folder / 'samples.png'}")
    print(f"Put the model into a small file:\n  {program.export_command(folder, 'latent_diffusion.npz')}")
    script = pathlib.Path(__file__).with_name("text_to_image.py")
    print(f"Draw more:\n  {cli.command(script, prompts[0], '--unet', folder)}")


def encoded(vae: VAE, images: np.ndarray, batch: int = 100) -> np.ndarray:
    """z_0 of pictures, uint8 (N, H, W, 3): (N, h, w, c), float32 on the host."""
    starts = cli.progress(range(0, len(images), batch), "pictures to latents", -(-len(images) // batch))
    signed = (backend.to_device(image.to_signed(images[i : i + batch])) for i in starts)
    return np.concatenate([backend.to_numpy(vae.encode(x)) for x in signed])


if __name__ == "__main__":
    cli.run(main)
