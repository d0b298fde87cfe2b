"""One side of a comparison: a fresh process that builds its work, then does it when told to.

A process of its own keeps the libraries apart: none starts threads in another's process, the processes that training
forks are copies of ours alone, and the memory that the process grows by is that side's alone.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pathlib
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

Step = Callable[[], float]
"""Does the work once; gives a number, such as the loss, in which all sides agree if they do the same work."""

PLAIN = {"TINYDIFF_COMPILED": "0"}
"""The environment of a side that is not said to have another: NumPy alone."""


@dataclass(frozen=True)
class Task:
    """What a side does: the Step that function `make` ("module:function") gives for these arguments.

    environment: variables that are set before anything is imported.
    """

    make: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(PLAIN))


class Side:
    """A process for one task, ready to go; a context that ends it. Raises ChildProcessError where it died."""

    def __init__(self, task: Task):
        context = multiprocessing.get_context("spawn")
        self.task = task
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(task.environment)))
        self._process.start()
        theirs.close()
        self._ask((task.make, dict(task.arguments)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._connection.close()
        self._process.join()

    def go(self, count: int = 1) -> tuple[float, float]:
        """Take `count` steps one after the other: the median seconds of one, and what the last gave."""
        return self._ask(count)

    def memory(self) -> float | None:
        """Megabytes that the process has grown by since its imports, at the most so far; None but on Linux."""
        return self._ask("memory")

    def _ask(self, message: Any) -> Any:
        try:
            self._connection.send(message)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise ChildProcessError(f"the process of {self.task.make} ended; why stands above") from None


def _serve(connection: Connection, environment: Mapping[str, str]) -> None:
    """What the process does: import, build, then answer until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process decides
    os.environ.update(environment)
    make, arguments = connection.recv()
    module, _, name = make.partition(":")
    function = getattr(importlib.import_module(module), name)
    before = _megabytes("VmRSS") or 0.0
    step = function(**arguments)
    connection.send("ready")
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        connection.send(_growth(before) if message == "memory" else _timed(step, message))


def _timed(step: Step, count: int) -> tuple[float, float]:
    seconds, value = [], float("nan")
    for _ in range(count):
        began = time.perf_counter()
        value = step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), value


def _growth(before: float) -> float | None:
    most = _megabytes("VmHWM")
    return most and most - before


def _megabytes(name: str) -> float | None:
    """A figure of this process's memory as Linux keeps it: VmRSS is now, VmHWM the largest so far."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)
