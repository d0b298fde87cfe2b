"""The figures as a table for the terminal, and as one in Markdown for the README."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.benchmarks.roofline import Limits

HEAD = ["row", "ours", "peer", "ratio", "(of turns)", "reach", "hope", "memory", "/ peer", "limit", "fastest peer"]


def terminal(rows: Sequence[Mapping[str, Any]], limits: Limits) -> str:
    """The table, what each row's work is, what could not run and why, and what the figures mean."""
    lines = aligned([HEAD, *(cells(row) for row in rows if "ours" in row)])
    lines += ["", *(f"{row['id']}: {row['work']}" for row in rows)]
    lines += ["", *notes(rows), *meaning(limits)]
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the terminal's table."""
    spread = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}" if "ratio" in row else ""
    return [
        row["id"],
        seconds(row["ours"]),
        seconds(row.get("peer")),
        number(row.get("ratio")),
        spread,
        number(row["reach"]),
        number(row["hope"]),
        "" if row["memory"] is None else f"{row['memory']:.0f} MB",
        number(row.get("memory_ratio")),
        "" if "share" not in row else f"{row['share']:.0%}",
        row.get("peer_name", "none"),
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, in columns: numbers to the right, the first and the last to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, middle, widths[1:]), last]) for first, *middle, last in rows
    ]


def notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which rows did not run, and which peers were not there."""
    lines = [f"{row['id']} did not run: {row['problem']}" for row in rows if "problem" in row]
    absent = {problem for row in rows for problem in row.get("missing", ())}
    return lines + [f"a peer is missing: {problem}" for problem in sorted(absent)]


def meaning(limits: Limits) -> list[str]:
    """What the columns are."""
    flops, bandwidth = f"{limits.flops / 1e9:.0f} GFLOP/s", f"{limits.bandwidth / 1e9:.0f} GB/s"
    text = [
        "ratio: ours / the fastest peer's time, of medians; then the least and the most of single turns. Below 1 ours",
        "is faster. memory: what our process grew by at the most, and that / the peer's.",
        f"limit: how near ours comes to the machine's limit, {flops} in a large matrix product or {bandwidth} to and",
        "from memory. Convolutions count as if done directly; Winograd's way takes fewer multiplications, so it may",
        "exceed 100 %.",
    ]
    return textwrap.wrap(" ".join(text), 120)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows that ran as a table for the README: ratios, which mean something on other machines too.

    A time stands only beside what ran on a GPU, whose name says what to expect of it.
    """
    lines = ["| work | time, ours / PyTorch | reach | memory, ours / PyTorch | against |", "|---|---|---|---|---|"]
    for row in rows:
        if "ratio" in row:
            time = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
            time += f"; {seconds(row['ours'])}" if row["id"].startswith("cuda") else ""
            shown = [row["work"], time, number(row["reach"]), number(row["memory_ratio"]), row["peer_name"]]
            lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    return "" if value is None else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def number(value: float | None) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:.2f}"
