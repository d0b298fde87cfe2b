"""Type a prompt, get pictures: Stable Diffusion in miniature (E28).

    python examples/text_to_image.py "a big red circle above a small green star"
    python examples/text_to_image.py "a yellow ring" --negative "on black" --guidance 5
    python examples/text_to_image.py "a small green triangle" --to "a big pink square"     from one prompt to another
    python examples/text_to_image.py "a green star" --from circle.png --strength 0.7        change a picture
    python examples/text_to_image.py "a green star" --from circle.png --mask left           paint its left half anew
    python examples/text_to_image.py --prompts prompts.txt --save-array drawn.npz          one picture a line

A model of shapes knows scenes of one or two things: circle, square, triangle, star, ring or cross; red, orange, yellow,
green, cyan, blue, purple or pink; small or big; at nine places, or left of, right of, above, below, inside each other;
on white, grey, black, stripes or squares. The package brings it along; --run draws with a model that
train_text_to_image.py trained. Equal seeds give equal pictures. Beside the picture, a strip shows what the latents
would have decoded to on the way.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator

import numpy as np

from tinydiff import cli, drawing, image
from tinydiff.backend import Array
from tinydiff.diffusion import Sampling, resampled
from tinydiff.models import StableDiffusion
from tinydiff.models.stable_diffusion import REPAINT, USUAL_GUIDANCE, with_known
from tinydiff.rng import Rng


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    drawing.add_flags(parser, USUAL_GUIDANCE)
    other = parser.add_argument_group("other than from noise")
    other.add_argument("--to", metavar="PROMPT", help="walk to this prompt in --n pictures")
    other.add_argument("--from", dest="source", metavar="PNG", help="change this picture, scaled to the model's size")
    other.add_argument("--strength", type=float, metavar="S", help="how much of it, 0 to 1 (default: 0.6)")
    other.add_argument(
        "--mask",
        metavar="MASK",
        help="paint only this part of it: left, right, top, bottom, centre or all; or a picture, black where to paint",
    )
    which = parser.add_argument_group("which model")
    which.add_argument("--run", type=pathlib.Path, metavar="RUN", help="of train_text_to_image.py (default: shipped)")
    which.add_argument("--unet", type=pathlib.Path, metavar="RUN", help="of train_latent_diffusion.py")
    return parser.parse_args()


def main() -> None:
    """Draw, and save the picture, the strip and the array."""
    options = parse()
    prompts = drawing.prompts_of(options)
    check_edits(options)
    drawing.check_outputs(options)
    with cli.on_device(options.device):
        model = StableDiffusion.of_run(options.run, options.unet)
        drawn = drawing.draw_all(prompts, options.seed, lambda some, rng, what: draw(model, some, rng, what, options))
    drawing.save(options, drawn)


def check_edits(options: argparse.Namespace) -> None:
    """Raise ValueError for flags of drawing other than from noise that do not go together."""
    if options.to is not None and (options.prompts or options.source):
        raise ValueError("--to walks from one PROMPT to another, and takes neither --prompts nor --from")
    if options.source is None and (options.mask or options.strength is not None):
        raise ValueError("--mask and --strength change a picture: name it with --from")
    if options.mask and options.strength is not None:
        raise ValueError("--strength changes all of a picture and --mask a part of it: give one of them")


def draw(
    model: StableDiffusion, prompts: list[str], rng: Rng, what: str, options: argparse.Namespace
) -> list[np.ndarray]:
    """One batch of pictures on their way from noise, (n, H, W, 3) in [-1, 1] each; the last are the result."""
    states, total = latents(model, prompts, rng, options)
    pictures = [model.decode(z) for z in drawing.evenly_spaced(states, total, what)]
    if options.mask:
        source, mask = given(model, options, len(prompts))
        pictures[-1] = with_known(pictures[-1], source, mask)
    return pictures


def latents(model: StableDiffusion, prompts: list[str], rng: Rng, o: argparse.Namespace) -> tuple[Iterator[Array], int]:
    """The latents on their way from noise, as the flags ask for it, and how many states there are."""
    how, n = Sampling(o.sampler, o.steps), len(prompts)
    steps = how.steps_of(model.unet.schedule.T)
    if o.to is not None:
        return model.interpolate(prompts[0], o.to, n, rng, how, o.guidance), steps + 1
    if o.source is None:
        return model.text_to_image(prompts, rng, how, o.guidance, o.negative), steps + 1
    source, mask = given(model, o, n)
    if o.mask:
        states = model.inpaint(source, mask, prompts, rng, steps, guidance=o.guidance, negative=o.negative)
        return states, len(resampled(steps, *REPAINT)) - 1
    strength = 0.6 if o.strength is None else o.strength
    return model.image_to_image(source, prompts, rng, strength, how, o.guidance, o.negative), round(
        strength * steps
    ) + 1


def given(model: StableDiffusion, options: argparse.Namespace, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture to be changed, n times, (n, H, W, 3) in [-1, 1], and which of its pixels are known, (H, W)."""
    pixels = image.fit(image.load_png(options.source, channels=3), model.size)
    mask = cli.mask_of(options.mask, model.size) if options.mask else np.ones(model.size, bool)
    return np.repeat(image.to_signed(pixels)[None], n, axis=0), mask


if __name__ == "__main__":
    cli.run(main)
