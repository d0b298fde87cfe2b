"""Work on a batch, a few items at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinydiff import backend
from tinydiff.backend import Array


def each_block(work: Callable[[slice], Any], n: int, bytes_per_item: int, on: Array, grain: int | None = None) -> list:
    """Call work(block) on runs of range(n) that stay in a core's cache, shared among the cores; gives the results.

    bytes_per_item: how much memory the work passes over for each item; grain: how many items are worth a second core;
    on: an array the work is done on.
    """
    step = backend.items_per_block(on, bytes_per_item)

    def runs(start: int, stop: int) -> list:
        return [work(slice(i, min(i + step, stop))) for i in range(start, stop, step)]

    grain = grain or max(1, backend.BLOCK * on.itemsize // bytes_per_item)
    return [result for results in backend.parallel(runs, n, grain, on) for result in results]
