"""What stays of a picture that DALL-E 2's decoder varies, and how even is its walk from one to another (E34)?

    python examples/evaluate_manipulations.py                     the shipped decoder: a quarter of an hour on two cores
    python examples/evaluate_manipulations.py --decoder RUN       a decoder of train_decoder.py
    python examples/evaluate_manipulations.py --frames 9          walks of fewer pictures

Variations are drawn of the CLIP embeddings of held-out scenes, and the package's scene reader says what they share with
the scene. Walks go from one scene to another in pictures that are drawn where most changes; the largest difference of
two neighbours is measured, as a share of that of the two ends, all as root mean squares over the pixels. All with DDIM,
without guidance and without a caption.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib

import numpy as np

from tinydiff import cli, image, program
from tinydiff.backend import to_numpy
from tinydiff.data.captioned import Shapes
from tinydiff.diffusion import Sampling, last
from tinydiff.models import DallE2, SceneReader
from tinydiff.models.scene_reader import agreement
from tinydiff.rng import Rng

SCENES, VARIATIONS, WALKS = range(3)
"""The names of the program's random streams."""

KINDS = {"one thing": Shapes(number=1), "two things": Shapes(number=2)}
"""Where the scenes of each kind come from."""

KEPT = ("shape", "colour", "size", "place", "background")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    for name, usual, of in (
        ("--n", 100, "scenes of each kind to vary"),
        ("--copies", 3, "variations of each"),
        ("--pairs", 20, "walks of each kind"),
        ("--frames", 49, "pictures of a walk, with its ends"),
        ("--steps", 25, "of DDIM"),
        ("--seed", 0, "of the random numbers"),
    ):
        add(name, type=int, default=usual, metavar="N", help=f"{of} (default: %(default)s)")
    add("--clip", default="clip", metavar="RUN", help="of train_clip.py (default: shipped)")
    add("--decoder", default="decoder", metavar="RUN", help="of train_decoder.py (default: shipped)")
    to_32 = "for a decoder of less than the 32 x 32 pixels that the scene reader reads (default: none)"
    add("--upsamplers", nargs="+", default=(), metavar="RUN", help=to_32)
    cli.add_device(parser)
    out = pathlib.Path("runs/manipulations")
    add("--out", type=pathlib.Path, default=out, metavar="DIR", help="pictures of walks (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Draw and measure, print the tables, and save pictures of the walks."""
    options = parse()
    for name, least in (("n", 1), ("copies", 1), ("pairs", 1), ("frames", 3)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    cli.check_writable(options.out / "one_thing.png")
    rng, how = Rng(options.seed), Sampling(steps=options.steps)
    with cli.on_device(options.device):
        model = DallE2.load(options.clip, None, options.decoder, options.upsamplers)
        print(f"of {options.copies} variations each of {options.n} scenes, as many keep their\n")
        print(f"| | {' | '.join(KEPT)} |\n|---|{'---|' * len(KEPT)}")
        for i, (kind, source) in enumerate(KINDS.items()):
            x = image.to_signed(source.draw(rng.at(SCENES, i), options.n, "test")[0])
            kept = variations(model, x, options.copies, rng.at(VARIATIONS, i), how)
            print(f"| {kind} | {' | '.join(f'{kept[name]:.1%}' for name in KEPT)} |")
        print(f"\nthe largest step of walks of {options.frames} pictures, as a share of the way from end to end:\n")
        print(f"| | mean of {options.pairs} | the worst | at most a third |\n|---|---|---|---|")
        for i, (kind, source) in enumerate(KINDS.items()):
            x = image.to_signed(source.draw(rng.at(SCENES, i), 2 * options.pairs, "test")[0])
            each = cli.progress(range(options.pairs), kind, options.pairs)
            walks = [walk(model, x[2 * p : 2 * p + 2], options.frames, rng.at(WALKS, p), how) for p in each]
            steps = np.array([largest_step(frames) for frames in walks])
            print(f"| {kind} | {steps.mean():.2f} | {steps.max():.2f} | {np.mean(steps <= 1 / 3):.0%} |")
            shown = np.concatenate([frames[:: max(1, options.frames // 16)] for frames in walks[:8]])
            sheet = image.grid(shown, len(shown) // len(walks[:8]))
            image.save_png(options.out / f"{kind.replace(' ', '_')}.png", sheet, scale=2)
    print(f"\nwalks, one in a row: {options.out}")


def variations(model: DallE2, x: np.ndarray, copies: int, rng: Rng, how: Sampling) -> dict[str, float]:
    """In what share of variations of pictures x, (N, H, W, 3) in [-1, 1], each attribute of the scene stays."""
    reader, repeated = SceneReader.load("scene_reader"), x.repeat(copies, axis=0)
    drawn = program.drawn(lambda some, rng: model.variations(repeated[some], rng, how), len(repeated), rng)
    return agreement(reader.read(drawn), reader.read(repeated))


def walk(model: DallE2, ends: np.ndarray, frames: int, rng: Rng, how: Sampling) -> np.ndarray:
    """Pictures from one to another, (frames, H, W, 3), in [-1, 1], drawn where most changes."""
    places = sorted(w for w, _ in itertools.islice(model.bisect(ends, rng, how), frames))
    return to_numpy(last(model.interpolate(ends, places, rng, how))).clip(-1, 1)


def largest_step(frames: np.ndarray) -> float:
    """The largest difference of two neighbours, as a share of the difference of the ends."""
    from_one_to_next = ((frames[1:] - frames[:-1]) ** 2).mean(axis=(1, 2, 3))
    return float(np.sqrt(from_one_to_next.max() / ((frames[-1] - frames[0]) ** 2).mean()))


if __name__ == "__main__":
    cli.run(main)
