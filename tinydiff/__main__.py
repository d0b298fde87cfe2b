"""python -m tinydiff doctor: what works on this machine, and why not."""

from __future__ import annotations

import argparse
import sys

from tinydiff import cli, doctor


def main() -> None:
    """Run the command that was named."""
    parser = argparse.ArgumentParser(prog="python -m tinydiff", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, threads, and which device works, or why not and what to do")
    parser.parse_args()
    if not doctor.report():
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
