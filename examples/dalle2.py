"""Type a prompt, get pictures: DALL-E 2 in miniature, from a text to CLIP's embedding of an image to the image (E29).

    python examples/dalle2.py "a big red circle above a small green star"
    python examples/dalle2.py "a yellow ring" --prior autoregressive --candidates 8    another prior, the best of eight
    python examples/dalle2.py "a yellow ring" --no-prior                                the text's embedding instead
    python examples/dalle2.py --vary star.png                                           pictures like this one
    python examples/dalle2.py --vary star.png --eta 0.4                                 ... that keep its layout
    python examples/dalle2.py --vary star.png --to ring.png                             from one picture to another
    python examples/dalle2.py --vary star.png --diff "a red star" "a blue star"         changed by what a text changes
    python examples/dalle2.py --prompts prompts.txt --save-array drawn.npz              one picture a line

What it knows of: see text_to_image.py. The package brings all parts along; --prior, --decoder and --upsamplers take
runs of train_prior.py, train_decoder.py and train_upsampler.py instead. Equal seeds give equal pictures. Beside the
picture, a strip shows how the decoder draws it small out of noise, and the upsampler, out of noise again, large.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import numpy as np

from tinydiff import cli, drawing, image
from tinydiff.backend import Array
from tinydiff.diffusion import Sampling
from tinydiff.models import DallE2
from tinydiff.models.dalle2 import UPSAMPLERS, USUAL_GUIDANCE
from tinydiff.rng import Rng

SHIPPED_PRIORS = {"diffusion": "prior", "autoregressive": "autoregressive_prior"}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    how = drawing.add_flags(parser, USUAL_GUIDANCE)
    best = "embeddings drawn for a prompt, of which the one nearest to the text stays (E32; default: %(default)s)"
    how.add_argument("--candidates", type=int, default=2, metavar="N", help=best)
    how.add_argument(
        "--no-prior",
        nargs="?",
        choices=("text", "caption"),
        const="text",
        help="tell the decoder the embedding of the text, or no embedding and the caption alone",
    )
    how.add_argument("--no-upsamplers", action="store_true", help="stay small")
    picture = parser.add_argument_group("of a picture, in place of a prompt (E34)")
    picture.add_argument("--vary", metavar="PNG", help="draw others like it")
    picture.add_argument("--eta", type=float, metavar="E", help="near it: 0 gives it back, 1 changes most")
    picture.add_argument("--to", metavar="PNG", help="walk to this picture in --n pictures")
    picture.add_argument("--diff", nargs=2, metavar=("OLD", "NEW"), help="walk towards what the texts change in it")
    which = parser.add_argument_group("which models")
    prior = f"{', '.join(SHIPPED_PRIORS)}, or a run of train_prior.py (default: %(default)s)"
    which.add_argument("--prior", default="diffusion", metavar="PRIOR", help=prior)
    which.add_argument("--clip", default="clip", metavar="RUN", help="of train_clip.py (default: shipped)")
    which.add_argument("--decoder", default="decoder", metavar="RUN", help="of train_decoder.py (default: shipped)")
    makes = "make them larger, one after the other, of train_upsampler.py (default: shipped)"
    which.add_argument("--upsamplers", nargs="+", default=UPSAMPLERS, metavar="RUN", help=makes)
    return parser.parse_args()


def main() -> None:
    """Draw, and save the picture, the strip and the array."""
    options = parse()
    check_pictures(options)
    prompts = drawing.prompts_of(options, default=None if options.vary is None else "")
    drawing.check_outputs(options)
    with cli.on_device(options.device):
        model = load(options)
        drawn = drawing.draw_all(prompts, options.seed, lambda some, rng, what: draw(model, some, rng, what, options))
    drawing.save(options, drawn)


def check_pictures(options: argparse.Namespace) -> None:
    """Raise ValueError for flags of what to draw of a picture that do not go together."""
    ways = [options.eta, options.to, options.diff]
    if options.vary is None and ways != [None] * 3:
        raise ValueError("--eta, --to and --diff change a picture: name it with --vary")
    if options.vary is not None and (options.prompt is not None or options.prompts is not None):
        raise ValueError("--vary takes a picture in place of a PROMPT: leave one of them out")
    if ways.count(None) < 2:
        raise ValueError("--eta, --to and --diff are three ways: give one of them")
    if (options.to or options.diff) and (options.n or 0) > drawing.BATCH:
        raise ValueError(f"a walk has at most {drawing.BATCH} pictures, got --n {options.n}")


def load(options: argparse.Namespace) -> DallE2:
    """The model of the parts that the flags name."""
    prior = None if options.no_prior or options.vary else SHIPPED_PRIORS.get(options.prior, options.prior)
    return DallE2.load(options.clip, prior, options.decoder, () if options.no_upsamplers else options.upsamplers)


def draw(model: DallE2, prompts: list[str], rng: Rng, what: str, options: argparse.Namespace) -> list[np.ndarray]:
    """One batch of pictures on their way from noise, (n, H, W, 3) in [-1, 1] each; the last are the result."""
    how = Sampling(options.sampler, options.steps, eta=options.eta or 0.0)
    draw = of_prompts if options.vary is None else of_pictures
    states = draw(model, prompts, rng, how, options)
    return [model.pictures(x) for x in drawing.evenly_spaced(states, model.count_states(how), what)]


def of_prompts(model: DallE2, prompts: list[str], rng: Rng, how: Sampling, o: argparse.Namespace) -> Iterator[Array]:
    """The states of pictures of these prompts, of embeddings that the prior draws, unless it is left out."""
    if o.no_prior == "caption":
        return model.draw(None, prompts, rng.at(1), how, o.guidance, o.negative)
    return model.text_to_image(prompts, rng, how, o.guidance, o.negative, o.candidates)


def of_pictures(model: DallE2, prompts: list[str], rng: Rng, how: Sampling, o: argparse.Namespace) -> Iterator[Array]:
    """The states of as many pictures as there are prompts, made of the one that was given, or of two."""
    n, picture = len(prompts), given(model, o.vary)
    if o.to is not None:
        return walk(model, np.concatenate([picture, given(model, o.to)]), n, rng, how, o.guidance)
    if o.eta is None and o.diff is None:
        return model.variations(picture.repeat(n, axis=0), rng, how, o.guidance)
    x_T = model.invert(picture, rng.at(3), how.steps_of(model.decoder.schedule.T), o.guidance)
    if o.diff is not None:
        old, new = o.diff
        return model.text_diff(picture, old, new, n, rng, how, o.guidance, x_T=x_T)
    return model.variations(picture.repeat(n, axis=0), rng, how, o.guidance, x_T.repeat(n, axis=0))


def walk(model: DallE2, ends: np.ndarray, n: int, rng: Rng, how: Sampling, guidance: float) -> Iterator[Array]:
    """The states of n pictures from one to the other, where more is to be seen more of them."""
    if n < 3:
        return model.interpolate(ends, n, rng, how, guidance)
    halved = itertools.islice(model.bisect(ends, rng, how, guidance), n)
    places = [w for w, _ in cli.progress(halved, "where the pictures change", n)]
    return model.interpolate(ends, sorted(places), rng, how, guidance)


def given(model: DallE2, path: str) -> np.ndarray:
    """A picture as the decoder draws them, (1, H, W, 3), float32 in [-1, 1]."""
    return image.to_signed(image.fit(image.load_png(path, channels=3), model.decoder.config.size))[None]


if __name__ == "__main__":
    cli.run(main)
