"""Say what shall be under the mask: GLIDE in miniature (E36).

    python examples/glide.py "a blue star left of a red circle" --from picture.png --mask left
    python examples/glide.py "a green ring on grey" --from picture.png --mask mask.png --n 4
    python examples/glide.py "a green ring on grey"                       nothing is known: all of it is drawn
    python examples/glide.py --prompts prompts.txt --from picture.png --mask centre    one picture a line

The text says what there is in the whole picture, as the captions did that the model learned from, and not in the masked
part alone. The model was shown pictures with a part hidden, and what it sees decides how the rest goes on; the pixels
that are known stay exactly as they are. A picture is scaled to the model's size first; a mask is black where to paint.

The package brings the model along; --run takes one that train_glide.py trained. Equal seeds give equal pictures. Beside
the picture, a strip shows how it came out of noise.
"""

from __future__ import annotations

import argparse

import numpy as np

from tinydiff import backend, cli, drawing, image
from tinydiff.backend import Array
from tinydiff.diffusion import Sampling
from tinydiff.models import TextInpainting, load_text_encoder, told_texts
from tinydiff.models.glide import USUAL_GUIDANCE
from tinydiff.models.text_encoder import TrainedTextEncoder, check_listens
from tinydiff.rng import Rng


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    drawing.add_flags(parser, USUAL_GUIDANCE)
    what = parser.add_argument_group("into which picture")
    what.add_argument("--from", dest="source", metavar="PNG", help="paint into this picture")
    part = "the part to paint: left, right, top, bottom, centre or all; or a picture, black where to paint"
    what.add_argument("--mask", metavar="MASK", help=part)
    which = parser.add_argument_group("which models")
    which.add_argument("--run", default="glide", metavar="RUN", help="of train_glide.py (default: shipped)")
    which.add_argument("--text-encoder", default="clip", metavar="RUN", help="that it listens to (default: shipped)")
    return parser.parse_args()


def main() -> None:
    """Draw, and save the picture, the strip and the array."""
    options = parse()
    prompts = drawing.prompts_of(options)
    if (options.source is None) != (options.mask is None):
        raise ValueError("to paint into a picture, name it (--from) and the part to paint (--mask), or neither")
    drawing.check_outputs(options)
    with cli.on_device(options.device):
        model, encoder = TextInpainting.load(options.run), load_text_encoder(options.text_encoder)
        check_listens(model, encoder)
        known = given(model, options)

        def draw(some: list[str], rng: Rng, what: str) -> list[np.ndarray]:
            return painted(model, encoder, some, known, rng, what, options)

        drawn = drawing.draw_all(prompts, options.seed, draw)
    drawing.save(options, drawn)


def given(model: TextInpainting, options: argparse.Namespace) -> tuple[Array, Array]:
    """The picture to be painted into, (1, H, W, 3) in [-1, 1], and where it is known, bool (H, W); if none, nowhere."""
    size = model.config.size
    if options.source is None:
        return np.zeros((1, *size, model.config.unet.channels), np.float32), np.zeros(size, bool)
    pixels = image.fit(image.load_png(options.source, channels=3), size)
    return image.to_signed(pixels)[None], cli.mask_of(options.mask, size)


def painted(
    model: TextInpainting,
    encoder: TrainedTextEncoder,
    prompts: list[str],
    known: tuple[Array, Array],
    rng: Rng,
    what: str,
    options: argparse.Namespace,
) -> list[np.ndarray]:
    """One batch of pictures on their way from noise, (n, H, W, 3) in [-1, 1] each; the last are the result."""
    how, (picture, mask) = Sampling(options.sampler, options.steps), known
    told, negative = told_texts(encoder, prompts), told_texts(encoder, options.negative)
    pictures = picture.repeat(len(prompts), axis=0)
    states = model.inpaint(pictures, mask, told, rng, how, guidance=options.guidance, negative=negative)
    total = how.steps_of(model.schedule.T) + 1
    return [backend.to_numpy(x) for x in drawing.evenly_spaced(states, total, what)]


if __name__ == "__main__":
    cli.run(main)
