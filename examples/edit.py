"""Edit an image with a trained model: vary it, find its noise, or go over to another image (E36).

    python examples/edit.py mnist 207                                SDEdit: variations of test digit 207
    python examples/edit.py mnist 207 --label 9 --strengths 0.5,0.7  the same towards a nine
    python examples/edit.py mnist drawing.png                        a rough drawing of yours, made into a digit
    python examples/edit.py mnist 207 --invert 10,50,200             DDIM to noise and back, in so many steps
    python examples/edit.py mnist 207 --to 407                       from a four to an eight, through their noises

An image is the number of a test digit (of the 500 embedded ones, the first fifty are zeros, the next ones, ...), or a
picture file of the model's size.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from tinydiff import backend, checkpoint, cli, image
from tinydiff.backend import Array
from tinydiff.diffusion import Sampling, ddim, ddim_inverse, last, q_sample, sdedit, slerp, start_time
from tinydiff.models import PixelDiffusion
from tinydiff.rng import Rng


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "run", metavar="RUN", type=pathlib.Path, help="folder of a training run, or a shipped model: mnist"
    )
    parser.add_argument("image", metavar="IMAGE", help="number of a test digit, or a picture of the model's size")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--strengths",
        type=_numbers,
        default=(0.2, 0.35, 0.5, 0.65, 0.8, 1.0),
        metavar="S,S,...",
        help="SDEdit: how far to go back, from 0, the image itself, to 1, pure noise (default: 0.2,0.35,...,1)",
    )
    what.add_argument("--invert", type=cli.integers, metavar="N,N,...", help="to noise and back in so many steps")
    what.add_argument("--to", metavar="IMAGE", help="the image at the other end")
    parser.add_argument("--n", type=int, default=8, metavar="N", help="pictures in a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the way from noise (default: 50, or all T)")
    parser.add_argument("--label", type=int, metavar="K", help="tell the model to draw this class (default: nothing)")
    parser.add_argument("--guidance", type=float, metavar="S", help="how strongly, with --label (E35)")
    parser.add_argument("--data", default="embedded", help="where test digits come from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_device(parser)
    parser.add_argument("--out", type=pathlib.Path, metavar="PNG", help="default: edited.png in the run")
    return parser.parse_args()


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(n) for n in text.split(","))


def main() -> None:
    """Edit, and save the picture."""
    options = parse()
    file = checkpoint.find(options.run)
    out = cli.output(options.out, file, "edited.png")
    if options.n < 2:
        raise ValueError(f"--n must be at least 2, got {options.n}")
    with cli.on_device(options.device):
        model = PixelDiffusion.load(file)
        options.steps = Sampling(steps=options.steps).steps_of(model.schedule.T)
        names = [options.image] if options.to is None else [options.image, options.to]
        size, channels = model.config.size, model.config.unet.channels
        given = backend.to_device(np.stack([cli.image_of(name, options.data, size, channels) for name in names]))
        edit = interpolate if options.to is not None else there_and_back if options.invert else vary
        sheet, what = edit(model, given, options)
    image.save_png(out, sheet, scale=4)
    print(f"{what}: {out}")


def vary(model: PixelDiffusion, given: Array, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """SDEdit: a row of variations for each strength, each after the noisy image that they start from."""
    image_n = np.repeat(backend.to_numpy(given), options.n, axis=0)
    denoise = model.denoiser(*model.told(options.n, options.label, options.guidance))
    times = [start_time(strength, model.schedule.T) for strength in options.strengths]  # raises before any work
    rows = []
    for strength, t in cli.progress(zip(options.strengths, times, strict=True), "editing", len(times)):
        how = Sampling(steps=max(1, min(t, round(strength * options.steps))))
        states = [*sdedit(denoise, backend.to_device(image_n), model.schedule, Rng(options.seed), strength, how.states)]
        rows += [backend.to_numpy(given), backend.to_numpy(states[0])[:1], backend.to_numpy(states[-1])]
    shown = ", ".join(f"{s:g}" for s in options.strengths)
    return image.grid(np.concatenate(rows), columns=options.n + 2), (
        f"Rows of strength {shown}; in each the image, one of the noisy images begun with, and {options.n} results"
    )


def there_and_back(model: PixelDiffusion, given: Array, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """A row for each number of steps: the image, the noise that DDIM finds for it, and what DDIM makes of that."""
    denoise = model.denoiser(*model.told(1, options.label, options.guidance))
    rows, errors = [], []
    for steps in options.invert:
        x_T = last(ddim_inverse(denoise, given, model.schedule, Rng(0), steps))
        x_0 = last(ddim(denoise, x_T, model.schedule, Rng(0), steps))
        rows += [given, x_T, x_0]
        errors.append(f"{steps} steps: {float(abs(x_0 - given).mean()):.4f}")
    sheet = image.grid(np.concatenate([backend.to_numpy(x) for x in rows]), columns=3)
    return sheet, f"The image, its noise, and back again; mean error of a pixel, of 2, in {', '.join(errors)}"


def interpolate(model: PixelDiffusion, given: Array, options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """The two images, and between them what DDIM makes of the noises along the arc between theirs.

    It begins with a little noise on the images, a fiftieth of the way: see `ddim_inverse`.
    """
    schedule, steps, start = model.schedule, options.steps, model.schedule.T // 50
    noised = q_sample(given, start, Rng(options.seed).normal_like(given), schedule)
    a, b = last(ddim_inverse(model.denoiser(), noised, schedule, Rng(0), steps, start=start))
    weights = np.linspace(0, 1, options.n)
    xp = backend.array_module(given)
    arc = slerp(xp.stack([a] * options.n), xp.stack([b] * options.n), weights)
    denoise = model.denoiser(*model.told(options.n, options.label, options.guidance))
    states = ddim(denoise, arc, schedule, Rng(0), steps)
    *_, x_0 = cli.progress(states, "interpolating", steps)
    ends = backend.to_numpy(given)
    sheet = image.grid(np.concatenate([ends[:1], backend.to_numpy(x_0), ends[1:]]), columns=options.n + 2)
    return sheet, f"The two images at the ends, and {options.n} between them, drawn from the arc between their noises"


if __name__ == "__main__":
    cli.run(main)
