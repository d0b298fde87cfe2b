"""Train Stable Diffusion in miniature from nothing: autoencoder, CLIP, and the U-Net between them (E23-E28).

    python examples/train_text_to_image.py                         captioned shapes; two hours on two CPU cores
    python examples/train_text_to_image.py --data pictures/        your own images, with captions: see --help
    python examples/train_text_to_image.py --vae vae --clip clip   only the U-Net, beside the shipped parts

Three stages, each a program of its own, in a folder of the run each:

    vae               train_vae.py               pictures to latents and back, 32 x 32 x 3 to 8 x 8 x 4
    clip              train_clip.py              what texts and pictures have in common
    latent_diffusion  train_latent_diffusion.py  latents out of noise, as a text says

The same command goes on where it was stopped, by Ctrl-C or a power cut: a stage that is trained is not trained again. A
folder for --data holds images of one size, and captions.txt with a line "name.png<TAB>caption" for each.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys

from tinydiff import checkpoint, cli
from tinydiff.files import atomic_file

STAGES = {"vae": "train_vae.py", "clip": "train_clip.py", "latent_diffusion": "train_latent_diffusion.py"}
"""The stages in order, and the program of each."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data", default="shapes", help="shapes (default), digits, fashion, or a folder of captioned images"
    )
    for stage in STAGES:
        flag = stage.replace("_", "-")
        parser.add_argument(f"--{flag}-steps", type=int, metavar="N", help=f"gradient steps of {STAGES[stage]}")
    for stage in ("vae", "clip"):
        parser.add_argument(f"--{stage}", metavar="RUN", help=f"take this {stage} in place of training one")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds give equal bits")
    cli.add_device(parser)
    usual = pathlib.Path("runs/text_to_image")
    parser.add_argument("--out", type=pathlib.Path, default=usual, metavar="DIR", help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Train the stages that are not trained yet."""
    options = parse()
    data = os.path.abspath(options.data) if os.path.isdir(options.data) else options.data
    cli.check_writable(options.out / "vae" / checkpoint.NAME)
    for stage in ("vae", "clip"):
        if given := getattr(options, stage):
            adopt(given, options.out / stage / checkpoint.NAME)
    for stage in STAGES:
        if getattr(options, stage, None) is None:
            train(stage, data, options)
    script = pathlib.Path(__file__).with_name("text_to_image.py")
    print(f"\nAll is trained. Draw:\n  {cli.command(script, 'a big red circle', '--run', options.out)}")


def adopt(given: str, path: pathlib.Path) -> None:
    """Copy a trained model to where this run expects it, unless it is there."""
    if not path.exists():
        cli.check_writable(path)
        with open(checkpoint.find(given), "rb") as source, atomic_file(path) as file:
            shutil.copyfileobj(source, file)


def train(stage: str, data: str, options: argparse.Namespace) -> None:
    """Run the program of a stage, from the start or from where it was stopped, unless it is through."""
    folder = options.out / stage
    flags: list[object] = ["--device", options.device] if options.device else []
    if (folder / checkpoint.NAME).exists():
        if trained(folder, data):
            print(f"{stage} is trained: {folder}")
            return
        flags += ["--resume", folder]
    else:
        flags += ["--data", data, "--seed", options.seed, "--out", folder]
        steps = getattr(options, f"{stage}_steps")
        flags += [] if steps is None else ["--steps", steps]
        if stage == "latent_diffusion":
            flags += ["--vae", options.out / "vae", "--clip", options.out / "clip"]
    program = pathlib.Path(__file__).with_name(STAGES[stage])
    print(f"\n{stage}:", flush=True)
    code = run([sys.executable, program, *flags])
    if code:
        again = cli.command(__file__, *sys.argv[1:])
        stopped = KeyboardInterrupt if code == 130 else ValueError
        raise stopped(f"{STAGES[stage]} did not come to its end; to go on:\n  {again}")


def run(command: list[object]) -> int:
    """Run a command to its end, whose exit status is returned. Ctrl-C is for the command, which saves and ends."""
    process = subprocess.Popen([*map(str, command)])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


def trained(folder: pathlib.Path, data: str) -> bool:
    """Whether a stage was trained to its last step. Raises ValueError if on other data, CheckpointError if exported."""
    arrays, meta = checkpoint.load(folder, checkpoint.kind_of(folder), resume=True)
    if (before := meta["about"]["data"]) != data:
        raise ValueError(f"{folder} was trained on {before}, not {data}; choose another --out")
    return len(arrays["losses"]) == meta["settings"]["steps"]


if __name__ == "__main__":
    cli.run(main)
