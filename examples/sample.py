"""Draw digits from a trained model: by Algorithm 2 (DDPM), or by a sampler that takes fewer steps.

    python examples/sample.py runs/mnist                                64 digits in 50 steps: runs/mnist/grid.png
    python examples/sample.py runs/mnist --sampler ddpm                 all T steps, as in the deck
    python examples/sample.py runs/mnist --sampler dpm --steps 10       five times as fast
    python examples/sample.py runs/mnist --label 7 --guidance 3         sevens, from a class-conditional model
    python examples/sample.py runs/mnist --n 500 --save-array s.npz     the array `samples` (N, 28, 28) in [0, 1] too

Equal seeds give equal digits. The model's averaged weights (EMA) are used, which draw better than the last ones.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from tinydiff import backend, checkpoint, cli, image
from tinydiff.diffusion import Sampling
from tinydiff.diffusion.samplers import SAMPLERS, SPACINGS, USUAL_STEPS, VARIANCES
from tinydiff.files import atomic_file
from tinydiff.models import PixelDiffusion
from tinydiff.models.pixel_diffusion import USUAL_GUIDANCE
from tinydiff.rng import Rng


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "run", metavar="RUN", type=pathlib.Path, help="folder of a training run, or a shipped model: mnist"
    )
    parser.add_argument("--n", type=int, default=64, metavar="N", help="how many (default: %(default)s)")
    how = parser.add_argument_group("how to sample (lesson 10 compares)")
    how.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="ddim",
        help="ddpm: Algorithm 2, which adds noise at each step (E19). ddim: adds none, in fewer steps. heun: second "
        "order, at two calls of the network a step. dpm: DPM-Solver++(2M), second order at one (default: %(default)s)",
    )
    usual = ", ".join(f"{steps} for {sampler}" for sampler, steps in USUAL_STEPS.items())
    how.add_argument("--steps", type=int, metavar="N", help=f"1 to T (default: {usual}, all T for ddpm)")
    how.add_argument(
        "--spacing",
        choices=SPACINGS,
        default="trailing",
        help="which of the T times are visited (default: %(default)s)",
    )
    how.add_argument(
        "--eta", type=float, default=0.0, metavar="E", help="noise of ddim: 0 none, 1 as much as ddpm (default: 0)"
    )
    how.add_argument(
        "--variance", choices=VARIANCES, help="noise of ddpm (E13; default: learned if the model did, else posterior)"
    )
    how.add_argument(
        "--no-clip", action="store_true", help="let each guess at the image leave [-1, 1] (default: clip it)"
    )
    parser.add_argument("--label", type=int, metavar="K", help="which class to draw (default: all, at random)")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help=f"1 is none, 3 strong (E35; default: {USUAL_GUIDANCE} if the model knows classes)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_device(parser)
    parser.add_argument("--out", type=pathlib.Path, metavar="PNG", help="the picture (default: grid.png in the run)")
    parser.add_argument("--save-array", type=pathlib.Path, metavar="NPZ", help="also save the samples as an array")
    parser.add_argument("--batch-size", type=int, default=250, metavar="N", help="drawn at once (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Draw the samples, and save the picture and the array."""
    options = parse()
    if options.batch_size < 1 or options.n < 1:
        raise ValueError(f"--n and --batch-size must be at least 1, got {options.n} and {options.batch_size}")
    how = Sampling(
        options.sampler, options.steps, options.spacing, options.eta, options.variance, clip=not options.no_clip
    )
    file = checkpoint.find(options.run)
    out = cli.output(options.out, file, "grid.png")
    if options.save_array:
        cli.check_writable(options.save_array)
    with cli.on_device(options.device):
        model = PixelDiffusion.load(file)
        rng = Rng(options.seed)
        sizes = [min(options.batch_size, options.n - start) for start in range(0, options.n, options.batch_size)]
        total = how.steps_of(model.schedule.T) + 1
        drawn = []
        for batch, size in enumerate(sizes):
            states = model.sample(size, rng.at(batch), how, guidance=options.guidance, label=options.label)
            *_, x_0 = cli.progress(states, f"batch {batch + 1} of {len(sizes)}", total)
            drawn.append(backend.to_numpy(x_0))
    x_0 = np.concatenate(drawn).clip(-1, 1)
    image.save_png(out, image.grid(x_0), scale=2)
    print(f"{options.n} samples in {out}")
    if options.save_array:
        with atomic_file(options.save_array) as array_file:
            np.savez(array_file, samples=(x_0[..., 0] + 1) / 2)
        print(f"their array, {x_0.shape[:3]} in [0, 1], in {options.save_array}")


if __name__ == "__main__":
    cli.run(main)
