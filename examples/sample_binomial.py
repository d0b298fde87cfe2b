"""Draw bits from a model that train_binomial.py trained: black and white digits, or heartbeats (E21).

    python examples/sample_binomial.py runs/binomial               64 samples in all T steps: runs/binomial/grid.png
    python examples/sample_binomial.py runs/binomial --steps 20    in fewer steps, faster and a little worse

Equal seeds give equal samples. The model's averaged weights (EMA) are used.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from tinydiff import backend, cli, image
from tinydiff.files import atomic_file
from tinydiff.models import BinomialDiffusion
from tinydiff.rng import Rng


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=pathlib.Path, help="folder of a training run")
    parser.add_argument("--n", type=int, default=64, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="default: all T of the model")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_device(parser)
    parser.add_argument("--out", metavar="PNG", type=pathlib.Path, help="default: grid.png in the folder of the run")
    parser.add_argument("--save-array", metavar="NPZ", type=pathlib.Path, help="also write the array `samples`")
    return parser.parse_args()


def main() -> None:
    """Draw and save."""
    options = parse()
    folder = options.run if options.run.is_dir() else options.run.parent
    out = options.out or folder / "grid.png"
    with cli.on_device(options.device):
        model = BinomialDiffusion.load(options.run)
        for path in filter(None, (out, options.save_array)):
            cli.check_writable(path)
        states = model.sample(options.n, Rng(options.seed), steps=options.steps)
        *_, x_0 = cli.progress(states, "drawing", (options.steps or model.config.T) + 1)
        bits = backend.to_numpy(x_0)
    sequences = bits.shape[1] == 1
    sheet = image.grid(2 * bits - 1, columns=1 if sequences else None, gap=0 if sequences else 2)
    image.save_png(out, sheet, scale=8 if sequences else 2)
    print(f"{options.n} samples in {out}")
    if options.save_array:
        with atomic_file(options.save_array) as file:
            np.savez(file, samples=bits[..., 0].astype(np.uint8))
        print(f"their array, {bits.shape[:3]} of 0 and 1, in {options.save_array}")


if __name__ == "__main__":
    cli.run(main)
