"""Sides that take turns, and what comes of it.

A turn is one step, or as many as fill TURN seconds, so that short work is timed warm. Before each turn all rest for
REST seconds, since the threads of OpenMP, which PyTorch works with, go on spinning after their work and would take a
core from whoever is next. Measured: a PyTorch process with nothing to do uses the processor for 5 to 20 ms more, then
not at all, and no side was slower in turns than alone. What disturbs the machine meanwhile falls on all sides alike,
and medians leave out the worst of it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests.benchmarks.roofline import Limits
from tests.benchmarks.rows import Row, missing
from tests.benchmarks.side import Side

REST = 0.05
TURN = 0.3
WARM_UPS = 2


def take_turns(sides: Mapping[str, Any], repeats: int, tick: Callable[[], None]) -> dict[str, list[float]]:
    """The seconds of each side's step in each of `repeats` turns, after a few turns of warming up.

    sides: by name, each with go(count) as Side has it. tick: called after each turn of all.
    """
    count, seconds = 1, {name: [] for name in sides}
    for turn in range(-WARM_UPS, repeats):
        for name, side in sides.items():
            time.sleep(REST)
            seconds[name].append(side.go(count)[0])
        count = max(1, round(TURN / max(taken[-1] for taken in seconds.values())))
        if turn >= 0:
            tick()
    return {name: taken[WARM_UPS:] for name, taken in seconds.items()}


def compare(row: Row, repeats: int, limits: Limits, tick: Callable[[], None]) -> dict[str, Any]:
    """Run a row here: its figures by name (see `summary`), with the peers that are not installed under "missing"."""
    absent = {name: problem for name, task in row.peers.items() if (problem := missing(task))}
    tasks = {"ours": row.ours} | {name: task for name, task in row.peers.items() if name not in absent}
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(Side(task)) for name, task in tasks.items()}
        seconds = take_turns(sides, repeats, tick)
        memory = {name: side.memory() for name, side in sides.items()} if row.memory else {}
    return summary(row, seconds, memory, limits) | {"missing": sorted(set(absent.values()))}


def summary(
    row: Row, seconds: Mapping[str, list[float]], memory: Mapping[str, float | None], limits: Limits
) -> dict[str, Any]:
    """A row's figures: medians in seconds, ratios of ours to the fastest peer, memory in megabytes, share of limits.

    ratio_min and ratio_max are of single turns, and show how much the machine was disturbed.
    """
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    figures: dict[str, Any] = {"id": row.id, "work": row.work, "ours": medians["ours"]}
    figures |= {"reach": row.reach, "hope": row.hope, "memory": memory.get("ours"), "memory_reach": row.memory_reach}
    peers = [name for name in medians if name != "ours"]
    if peers:
        best = min(peers, key=medians.__getitem__)
        ratios = [a / b for a, b in zip(seconds["ours"], seconds[best], strict=True)]
        figures |= {"peer_name": best, "peer": medians[best], "ratio": medians["ours"] / medians[best]}
        figures |= {"ratio_min": min(ratios), "ratio_max": max(ratios), "peer_memory": memory.get(best)}
        figures |= {"memory_ratio": memory["ours"] / memory[best] if memory.get(best) else None}
        figures |= {"all_peers": {name: medians[name] for name in peers}}
    flops, moved = row.flops(), row.moved
    if flops or moved:
        figures |= {"flops": flops, "share": limits.share(medians["ours"], flops, moved)}
    return figures
