"""How fast tinydiff is, and how much memory it takes, beside PyTorch eager (and JAX) on the same machine.

    python -m tests.benchmarks                            every row, a few minutes
    python -m tests.benchmarks unet-step mnist-step       these rows
    python -m tests.benchmarks jax --repeats 3            rows that run only if named: JAX compiles for a minute
    python -m tests.benchmarks roofline                   only what the machine can do at most
    python -m tests.benchmarks --scaling                  how the time grows with batch, width and resolution
    python tests/benchmarks                               the same from any folder

Each side of a comparison is a fresh process that builds the same model with the same weights; the sides then take
steps in turns, and medians are compared. Of PyTorch's memory layouts and optimisers the fastest counts. Nothing else
should run meanwhile. Without PyTorch (pip install torch) only our own figures are printed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # where `python tests/benchmarks` looks for tests

from tests.benchmarks import roofline, table
from tests.benchmarks.rows import ROWS, Row
from tests.benchmarks.timing import compare


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = "\n".join(f"  {row.id:20} {row.work}{' (only if named)' if row.asked_only else ''}" for row in ROWS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        epilog=f"rows:\n{about}\n  {'roofline':20} the machine's limits, which are measured with every row",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*(row.id for row in ROWS), "roofline"]
    parser.add_argument("rows", nargs="*", metavar="ROW", help="which rows (default: all; they are listed below)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timed turns of each side (default: 9)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="FILE", help="write a table of the ratios to this file"
    )
    parser.add_argument("--scaling", action="store_true", help="instead of rows: fit how the time grows, and plot it")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.rows if name not in names]:
        parser.error(f"there is no row {', '.join(unknown)}; choose from {', '.join(names)}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the rows, print the table, and write the files that were asked for."""
    options = parse(arguments)
    if options.scaling:
        from tests.benchmarks import scaling

        return scaling.main()
    chosen = [row for row in ROWS if (row.id in options.rows if options.rows else not row.asked_only)]
    limits = roofline.measure()
    figures = run(chosen, options.repeats, limits)
    print(table.terminal(figures, limits))
    if options.markdown:
        options.markdown.write_text(table.markdown(figures), encoding="utf-8")
    if options.json:
        figures.append({"id": "roofline", "flops": limits.flops, "bandwidth": limits.bandwidth})
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def run(rows: list[Row], repeats: int, limits: roofline.Limits) -> list[dict[str, Any]]:
    """The figures of each row, a progress bar meanwhile; a row that cannot run or dies has a "problem" instead."""
    from tqdm import tqdm

    figures, total = [], sum(min(repeats, row.most) for row in rows)
    every = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=total, bar_format="{desc:20} |{bar:30}| {elapsed}", mininterval=every) as bar:
        for row in rows:
            bar.set_description_str(row.id, refresh=sys.stderr.isatty())
            turns = min(repeats, row.most)
            if problem := row.problem():
                figures.append({"id": row.id, "work": row.work, "problem": problem})
                bar.update(turns)
                continue
            try:
                figures.append(compare(row, turns, limits, bar.update))
            except ChildProcessError as error:  # the rows after it are worth having all the same
                figures.append({"id": row.id, "work": row.work, "problem": str(error)})
    return figures


if __name__ == "__main__":
    main()
