"""Data parallelism: processes that share the work of each gradient.

The threads of one Python process wait in line for the interpreter lock between NumPy's calls, which costs a small
network a third of its speed on two cores. Processes do not wait. Each holds the model and takes a share of every
batch; the parameters lie in memory that all of them see, each writes its gradient to memory of its own, and the sum of
the gradients is the gradient of the batch:

    ∇ L = Σ_i (n_i / n) ∇ L_i        L_i the mean loss over the n_i items of share i, n = Σ n_i
"""

from __future__ import annotations

import mmap
import multiprocessing
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np

from tinydiff import backend
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.optim import Optimiser

SMALLEST_SHARE = 16
"""Items of a batch below which another process would spend its time on Python rather than on arithmetic."""


@dataclass(frozen=True)
class Share:
    """Piece `index` of a batch that was cut into `count` pieces of one length (or one less)."""

    index: int = 0
    count: int = 1

    def of(self, batch: Array) -> Array:
        """This share's items of an array (n, ...)."""
        n = len(batch)
        return batch[n * self.index // self.count : n * (self.index + 1) // self.count]


@dataclass(frozen=True)
class DrawnLoss:
    """A loss in two parts: what a step draws, and the loss of that, which draws nothing. Called, it does both.

    draw(...): all that changes from step to step, as arrays on the device (or None). of(*arrays): the mean loss, by
    nothing but ops on them and on the parameters, so that a CUDA device can replay it together with its gradient.
    """

    draw: Callable[..., tuple[Array | None, ...]]
    of: Callable[..., Tensor]

    def __call__(self, *args: Any) -> Tensor:
        return self.of(*self.draw(*args))


LossOfShare = Callable[[int, Share], Tensor]
"""loss(step, share): the mean loss over a share of the batch of this step."""


def shares_for(batch_size: int) -> int:
    """How many processes to share a batch among: one a core, each with a share worth its while; Linux, CPU only."""
    if sys.platform != "linux" or backend.device() != "cpu":
        return 1
    return max(1, min(backend.cores(), batch_size // SMALLEST_SHARE))


class Workers:
    """The processes that share a batch, this one among them; a context that ends the others.

    optimiser: of the model; its vector of parameters moves to shared memory. loss: of a share; the other processes are
    copies of this one as it is now, and call it with the step's number and their share. On a CUDA device a DrawnLoss
    and its gradient are replayed as one piece (`backend.captured`). count: how many processes.
    """

    def __init__(self, optimiser: Optimiser, loss: LossOfShare, batch_size: int, count: int):
        self.optimiser, self.loss, self.batch_size, self.count = optimiser, loss, batch_size, count
        self._share = Share(0, count)
        self._backward_drawn = backend.captured(self._backward_of_drawn)
        self.processes: list[Any] = []
        self._others: list[tuple[Connection, Array]] = []

    def __enter__(self) -> Self:
        if self.count == 1:
            return self
        self.optimiser.move_to(_shared_like(self.optimiser.vector))
        context = multiprocessing.get_context("fork")
        for index in range(1, self.count):
            ours, theirs = context.Pipe()
            gradient = _shared_like(self.optimiser.vector)
            others = [connection for connection, _ in self._others]
            target = (Share(index, self.count), theirs, gradient, [ours, *others])
            process = context.Process(target=self._work, args=target, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._others.append((ours, gradient))
        return self

    def __exit__(self, *error: Any) -> None:
        for connection, _ in self._others:
            connection.close()
        for process in self.processes:
            process.join()
        self.processes, self._others = [], []

    def backward(self, step: int) -> float:
        """Leave the gradient of this step's loss in the optimiser's vector `gradient`, and return the loss.

        Raises ChildProcessError if another process ended.
        """
        if self.count == 1:
            return self._backward_share(step)
        try:
            return self._backward_shares(step)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ChildProcessError("a process that shared the work ended; if it said why, it stands above") from None

    def _backward_shares(self, step: int) -> float:
        """Set all processes to work, then add up what they found."""
        for connection, _ in self._others:
            connection.send(step)
        with backend.one_thread():
            value = self._backward_share(step)
        for connection, gradient in self._others:
            value += connection.recv()
            self.optimiser.gradient += gradient
        return value

    def _backward_share(self, step: int) -> float:
        """Set the gradient to that of this process's part of the loss, and return that part."""
        if isinstance(self.loss, DrawnLoss):
            return self._backward_drawn(*self.loss.draw(step, self._share)).item()
        return self._backward(self.loss(step, self._share)).item()

    def _backward_of_drawn(self, *drawn: Array | None) -> Array:
        assert isinstance(self.loss, DrawnLoss)
        self.optimiser.forget_gradients()  # what a recording that failed half-way has left
        return self._backward(self.loss.of(*drawn))

    def _backward(self, loss: Tensor) -> Array:
        items = len(self._share.of(range(self.batch_size)))
        part = loss * (items / self.batch_size)
        part.backward()
        self.optimiser.gather()
        return part.data

    def _work(self, share: Share, connection: Connection, gradient: Array, not_ours: list[Connection]) -> None:
        """What another process does: for each step it is sent, its share's gradient, until the first one is gone."""
        for other in not_ours:
            other.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process decides
        self._share, self.optimiser.gradient = share, gradient
        with backend.one_thread():
            while True:
                try:
                    step = connection.recv()
                except EOFError:
                    return
                connection.send(self._backward_share(step))


def _shared_like(vector: np.ndarray) -> np.ndarray:
    """Zeros like a vector, in memory that this process and those it forks both see."""
    return np.frombuffer(mmap.mmap(-1, max(1, vector.nbytes)), vector.dtype, vector.size)
