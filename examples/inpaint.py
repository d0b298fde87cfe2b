"""Paint what is missing of an image with a trained model (E36).

    python examples/inpaint.py mnist 207 --mask bottom            test digit 207 without its lower half, 8 times
    python examples/inpaint.py inpainting 207 --mask centre       by a model trained for it, which is far faster
    python examples/inpaint.py mnist mine.png --mask mask.png     your own picture and mask, white where it is known
    python examples/inpaint.py mnist 207 --mask top --label 6     tell the model which digit it is to make of it

A model of train_mnist.py paints by RePaint: no training, but every stretch of the way is walked --resamplings times
(with 1, the known part is merely put in at each step, and often does not fit). A model of train_inpainting.py was shown
masked images in training, and needs --steps steps. The picture shows the image, what is known of it, and the paintings.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator

import numpy as np

from tinydiff import backend, checkpoint, cli, image
from tinydiff.backend import Array
from tinydiff.diffusion import Sampling, repaint, resampled
from tinydiff.models import PixelDiffusion, PixelInpainting
from tinydiff.models.pixel_inpainting import shown
from tinydiff.rng import Rng


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "run", metavar="RUN", type=pathlib.Path, help="folder of a run, or a shipped model: mnist, inpainting"
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help="number of a test digit (embedded: 0..499, fifty of each class), or a picture of the model's size",
    )
    parser.add_argument(
        "--mask",
        default="bottom",
        metavar="MASK",
        help="what to paint: left, right, top, bottom, centre or all; or a picture, black where to paint, white where "
        "the image is known (default: %(default)s)",
    )
    parser.add_argument("--n", type=int, default=8, metavar="N", help="how many paintings (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the way from noise (default: 50, or all T)")
    parser.add_argument(
        "--resamplings",
        type=int,
        default=10,
        metavar="N",
        help="r of RePaint; 1 never goes back (default: %(default)s)",
    )
    parser.add_argument("--jump", type=int, default=5, metavar="N", help="j of RePaint (default: %(default)s)")
    parser.add_argument("--label", type=int, metavar="K", help="which class to paint (default: what fits)")
    parser.add_argument("--guidance", type=float, metavar="S", help="how strongly, with --label (E35)")
    parser.add_argument("--data", default="embedded", help="where test digits come from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_device(parser)
    parser.add_argument("--out", type=pathlib.Path, metavar="PNG", help="default: inpainted.png in the run")
    return parser.parse_args()


def main() -> None:
    """Paint, and save the picture."""
    options = parse()
    file = checkpoint.find(options.run)
    out = cli.output(options.out, file, "inpainted.png")
    if options.n < 1:
        raise ValueError(f"--n must be at least 1, got {options.n}")
    with cli.on_device(options.device):
        kind = PixelInpainting if checkpoint.kind_of(file) == PixelInpainting.kind else PixelDiffusion
        model = kind.load(file)
        size, channels = model.config.size, model.config.unet.channels
        x_0, mask = cli.image_of(options.image, options.data, size, channels), cli.mask_of(options.mask, size)
        states, steps = paint(model, np.repeat(x_0[None], options.n, axis=0), mask, options)
        *_, painted = cli.progress(states, "painting", steps)
        painted = backend.to_numpy(painted)
    sheet = np.concatenate([x_0[None], shown(x_0[None], mask)[..., :channels], painted])
    image.save_png(out, image.grid(sheet, columns=min(len(sheet), 10)), scale=4)
    print(f"The image, what is known of it, and {options.n} paintings: {out}")


def paint(
    model: PixelDiffusion, known: np.ndarray, mask: np.ndarray, options: argparse.Namespace
) -> tuple[Iterator[Array], int]:
    """The states of the paintings, and how many there are: by the model's own training, or by RePaint."""
    o, rng, n = options, Rng(options.seed), len(known)
    steps = Sampling(steps=o.steps).steps_of(model.schedule.T)
    if isinstance(model, PixelInpainting):
        how = Sampling(steps=steps)
        return model.inpaint(known, mask, rng, how, label=o.label, guidance=o.guidance), steps + 1
    denoise, x_T = model.denoiser(*model.told(n, o.label, o.guidance)), model.noise(n, rng.at(0))
    known = backend.to_device(known)
    states = repaint(denoise, x_T, model.schedule, rng.at(1), known, mask, steps, o.jump, o.resamplings)
    return states, len(resampled(steps, o.jump, o.resamplings)) - 1


if __name__ == "__main__":
    cli.run(main)
