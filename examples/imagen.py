"""Type a prompt, get pictures: Imagen in miniature (E37).

    python examples/imagen.py "a big red circle above a small green star"
    python examples/imagen.py "a yellow ring on white" --guidance 10 --threshold static
    python examples/imagen.py "a yellow ring on white" --level 0          upsamplers that trust every pixel
    python examples/imagen.py --prompts prompts.txt --save-array drawn.npz
    python examples/imagen.py "a pink cross" --base runs/text_to_pixels        a first model that you trained

A text encoder that never saw a picture reads the prompt; a first model draws it small, in 16 x 16 pixels, and two more
make it larger. Strong guidance drives pixels beyond black and white: static thresholds cut them off there, dynamic ones
scale the whole picture back. Noise is put on each picture before the next model sees it, so that it need not believe
all that the one before drew: --level says how much.

The package brings all models along; train_text_encoder.py, train_text_to_pixels.py and train_upsampler.py trained them.
Equal seeds give equal pictures. Beside the picture, a strip shows the way from noise, first of the small picture, then
of the larger ones.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from tinydiff import backend, cli, drawing
from tinydiff.diffusion import Sampling
from tinydiff.models import Imagen
from tinydiff.models.imagen import IMAGEN_GUIDANCE, PERCENTILE, UPSAMPLERS
from tinydiff.rng import Rng


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    how = drawing.add_flags(parser, IMAGEN_GUIDANCE)
    thresholds: dict[str, Any] = {"choices": ("dynamic", "static"), "default": "dynamic"}
    how.add_argument("--threshold", **thresholds, help="how x_0 is kept in [-1, 1] (default: %(default)s)")
    noise = "of the noise on the small picture, 0 to the upsampler's S (default: a sixth of S)"
    how.add_argument("--level", type=int, metavar="N", help=noise)
    which = parser.add_argument_group("which models")
    which.add_argument("--text-encoder", default="text_encoder", metavar="RUN", help="or a CLIP (default: shipped)")
    which.add_argument("--base", default="imagen", metavar="RUN", help="draws small pictures (default: shipped)")
    makes = "make them larger, one after the other (default: shipped)"
    which.add_argument("--upsamplers", nargs="+", default=UPSAMPLERS, metavar="RUN", help=makes)
    return parser.parse_args()


def main() -> None:
    """Draw, and save the picture, the strip and the array."""
    options = parse()
    prompts = drawing.prompts_of(options)
    drawing.check_outputs(options)
    with cli.on_device(options.device):
        model = Imagen.load(options.text_encoder, options.base, options.upsamplers)
        drawn = drawing.draw_all(prompts, options.seed, lambda some, rng, what: draw(model, some, rng, what, options))
    drawing.save(options, drawn)


def draw(model: Imagen, prompts: list[str], rng: Rng, what: str, options: argparse.Namespace) -> list[np.ndarray]:
    """One batch of pictures on their way from noise, (n, H, W, 3) in [-1, 1] each; the last are the result."""
    how = Sampling(options.sampler, options.steps, clip=PERCENTILE if options.threshold == "dynamic" else True)
    states = model.text_to_image(prompts, rng, how, options.guidance, options.negative, options.level)
    return [backend.to_numpy(x) for x in drawing.evenly_spaced(states, model.count_states(how), what)]


if __name__ == "__main__":
    cli.run(main)
