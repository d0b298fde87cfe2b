"""What the package does by itself.

python -m tinydiff doctor              what works on this machine, and why not
python -m tinydiff export RUN FILE     a trained model as a small file, to use but not to train on
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from tinydiff import checkpoint, cli, doctor


def main() -> None:
    """Run the command that was named."""
    parser = argparse.ArgumentParser(
        prog="python -m tinydiff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, threads, and which device works, or why not and what to do")
    export = commands.add_parser("export", help="the averaged weights of a run in half precision, a tenth of its size")
    export.add_argument("run", metavar="RUN", help="folder of a training run, or its checkpoint.npz")
    export.add_argument("file", metavar="FILE", help="the file to write, NAME.npz")
    options = parser.parse_args()
    if options.command == "export":
        checkpoint.export(options.run, options.file)
        print(f"{options.file} holds the model, {pathlib.Path(options.file).stat().st_size / 1e6:.1f} MB")
    elif not doctor.report():
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
