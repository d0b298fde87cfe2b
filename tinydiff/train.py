"""The one training loop: Algorithm 1's outer lines (E18), for every model of the package.

    repeat
        draw a batch, t and eps           loss = loss_at(step, rng, share).backward()
        take a gradient step on the loss  clip, Adam, moving average
    until converged                       step = 1..steps

On several cores, processes share each batch (workers.py). Share i of the batch of step s draws from the stream
`rng.at(s, i)` and nothing else is random, so a run that was stopped, or killed, and resumed from its checkpoint does
what it would have done had it never stopped, to the last bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tinydiff import backend, checkpoint
from tinydiff.autograd import Tensor
from tinydiff.nn.module import Parameter
from tinydiff.optim import EMA, AdamW, warmup_cosine
from tinydiff.rng import Rng
from tinydiff.workers import DrawnLoss, Share, Workers, shares_for


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    steps: how many. lr: the learning rate, which rises to this over `warmup` steps, then falls along half a cosine to
    final_lr (equal to lr: it stays). max_norm: the largest gradient norm a step may have; larger ones are scaled down.
    betas, weight_decay: AdamW's. ema_decay: how much of the average of the weights a step keeps.

    Raises ValueError for a number of steps below 1 or rates below 0.
    """

    steps: int
    lr: float = 1e-3
    final_lr: float = 0.0
    warmup: int = 100
    max_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"the number of training steps must be at least 1, got {self.steps}")
        if not (self.lr > 0 and self.final_lr >= 0 and self.warmup >= 0):
            raise ValueError(f"learning rates and warm-up cannot be negative, got {self}")


class Trainable(Protocol):
    """What the loop asks of a model: a Module, the name of its kind, and a dataclass that describes it."""

    kind: str
    config: Any

    def parameters(self) -> dict[str, Parameter]: ...
    def count_parameters(self) -> int: ...
    def state_dict(self) -> dict[str, np.ndarray]: ...
    def load_state_dict(self, state: Any) -> None: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


class Training:
    """A model in training: all that a checkpoint holds.

    path: where the checkpoint goes. about: what else the program wants to find in it, such as its own settings
    (anything JSON can hold). `step` counts the steps done, `losses` has the loss of each; `processes` share the work.
    """

    def __init__(self, model: Trainable, settings: TrainSettings, path: pathlib.Path, about: dict[str, Any]):
        self.model, self.settings, self.path, self.about = model, settings, path, about
        self.optimiser = AdamW(model.parameters(), betas=settings.betas, weight_decay=settings.weight_decay)
        self.ema = EMA(self.optimiser, settings.ema_decay)
        self.step, self.losses = 0, np.zeros(settings.steps, np.float32)
        self.processes: int | None = None

    def advance(self, loss: float) -> None:
        """Take one gradient step, along the gradient of this loss that the optimiser holds.

        Raises FloatingPointError, with the weights as they were, if the loss or its gradient is not finite.
        """
        s, step = self.settings, self.step + 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; {self._first_bad_weight()}")
        try:
            self.optimiser.step_along_gradient(warmup_cosine(step, s.steps, s.lr, s.warmup, s.final_lr), s.max_norm)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} at step {step}, where the loss is {loss:.4g}") from None
        self.ema.update()
        self.losses[self.step] = loss
        self.step = step

    def _first_bad_weight(self) -> str:
        for name, weight in self.model.state_dict().items():
            if not np.isfinite(weight).all():
                return f"the weights {name} are not finite"
        return "all weights are finite"

    def save(self) -> None:
        """Write the checkpoint. Raises FloatingPointError, and keeps the last one, if the weights are not finite."""
        model = self.model.state_dict()
        if bad := [name for name, weight in model.items() if not np.isfinite(weight).all()]:
            raise FloatingPointError(f"the weights {bad[0]} are not finite after step {self.step}")
        with self.ema.applied():
            averages = self.model.state_dict()
        arrays = {
            **checkpoint.prefixed("model", model),
            **checkpoint.prefixed("ema", averages),
            **checkpoint.prefixed("optimiser", self.optimiser.state_dict()),
            "losses": self.losses[: self.step],
        }
        meta = {
            "kind": self.model.kind,
            "config": dataclasses.asdict(self.model.config),
            "settings": dataclasses.asdict(self.settings),
            "processes": self.processes,
            "about": self.about,
        }
        checkpoint.save(self.path, arrays, meta)

    def restore(self, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        """Go back to where a checkpoint was saved, as `checkpoint.load` gives it. ValueError if of another model."""
        self.model.load_state_dict(checkpoint.part("ema", arrays))
        self.ema.average[...] = self.optimiser.vector
        self.model.load_state_dict(checkpoint.part("model", arrays))
        self.optimiser.load_state_dict(checkpoint.part("optimiser", arrays))
        self.step = self.ema.count = len(arrays["losses"])
        self.losses[: self.step] = arrays["losses"]
        self.processes = meta["processes"]

    def workers(self, loss_at: LossAt, rng: Rng, batch_size: int) -> Workers:
        """The processes that compute the gradients: as many as the run began with, which decides the last bits."""
        can_share = sys.platform == "linux" and backend.device() == "cpu"
        if self.processes is None or not can_share:
            self.processes = shares_for(batch_size)

        def loss(step: int, share: Share) -> Tensor:
            return loss_at(step, rng.at(step, share.index), share)

        self.model.train()
        if not isinstance(loss_at, DrawnLoss):
            return Workers(self.optimiser, loss, batch_size, self.processes)
        draw, of = loss_at.draw, loss_at.of
        drawn = DrawnLoss(lambda step, share: draw(step, rng.at(step, share.index), share), of)
        return Workers(self.optimiser, drawn, batch_size, self.processes)


LossAt = Callable[[int, Rng, Share], Tensor]
"""loss_at(step, rng, share): the mean loss over a share of the batch of step 1, 2, ..., drawing only from rng.

A DrawnLoss, which splits it in two, trains faster on a GPU."""


def train(
    training: Training,
    loss_at: LossAt,
    rng: Rng,
    *,
    batch_size: int,
    resume_with: str,
    preview: Callable[[int], None] | None = None,
    preview_every: int = 0,
    save_every: float = 30.0,
    unit: str = "images",
) -> None:
    """Train from the step reached so far to the last, showing progress and saving checkpoints.

    loss_at(step, rng, share): the loss of a share of a step's batch; it may be called in another process, a copy of
    this one as it was at the start. batch_size: items in a batch. resume_with: the command that resumes this run.
    preview(step): called with the averaged weights in place, at the start, every preview_every steps (0: never) and at
    the end. save_every: seconds between checkpoints, 0 for every step. unit: what the items are, for the progress bar.

    Ctrl-C ends the step, saves, and raises KeyboardInterrupt that says how to resume; a second one stops at once.
    Raises FloatingPointError, naming step and parameter, if loss, gradient or weights are not finite; the last good
    checkpoint stays. Raises OSError, before any work, where the checkpoint cannot be written.
    """
    if preview_every < 0 or save_every < 0:
        raise ValueError(f"preview_every and save_every must be at least 0, got {preview_every} and {save_every}")
    steps = training.settings.steps
    checkpoint.remove_leftovers(training.path)
    workers = training.workers(loss_at, rng, batch_size)
    with _finite(training), workers, _interrupts() as stopped, _progress(training, batch_size, unit) as show:
        if training.step == 0:
            training.save()
            _show(training, preview)
        saved = time.monotonic()
        for step in range(training.step + 1, steps + 1):
            training.model.train()
            training.advance(workers.backward(step))
            show()
            if step == steps or stopped.is_set() or time.monotonic() - saved >= save_every:
                training.save()
                saved = time.monotonic()
            if stopped.is_set():
                break
            if step == steps or (preview_every and step % preview_every == 0):
                _show(training, preview)
    if stopped.is_set():
        raise KeyboardInterrupt(
            f"stopped after step {training.step} of {steps} and saved {training.path}; resume with:\n  {resume_with}"
        )


@contextlib.contextmanager
def _finite(training: Training) -> Iterator[None]:
    """Leave numbers that are not finite to the loop's own check, and add to its error what can be done."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}; training stopped, the last good checkpoint is {training.path}; "
            "a smaller learning rate often helps"
        ) from None


def _show(training: Training, preview: Callable[[int], None] | None) -> None:
    if preview is not None:
        training.model.eval()
        with training.ema.applied():
            preview(training.step)


@contextlib.contextmanager
def _progress(training: Training, batch_size: int, unit: str) -> Iterator[Callable[[], None]]:
    """A progress bar with the smoothed loss, items/s and the time left: gives the function that moves it on a step."""
    from tqdm import tqdm

    window = max(1, min(50, training.settings.steps // 10))
    bar = tqdm(
        total=training.settings.steps,
        initial=training.step,
        desc="training",
        bar_format="{desc} {percentage:3.0f}% |{bar:20}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )

    def show() -> None:
        loss = training.losses[max(0, training.step - window) : training.step].mean()
        now = bar.format_dict  # its rate is of the last seconds; there is none at first
        rate = now["rate"] or (now["n"] - now["initial"]) / max(now["elapsed"], 1e-9)
        bar.set_postfix_str(f"loss {loss:.4f}, {batch_size * rate:.0f} {unit}/s", refresh=False)
        bar.update()

    with bar:
        yield show


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Within this context the first Ctrl-C sets an event, so that a step is never left half done; the second raises."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals go to the main thread
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, previous)


def steps_in(
    minutes: float, model: Trainable, loss_at: LossAt, settings: TrainSettings, rng: Rng, batch_size: int
) -> int:
    """How many training steps fit in this time, told from the first few, which are then undone.

    At most 20 steps and a twentieth of the time are spent on it. Raises ValueError unless minutes > 0.
    """
    if not minutes > 0:
        raise ValueError(f"the minutes to train must be more than 0, got {minutes}")
    before = model.state_dict()
    training = Training(model, dataclasses.replace(settings, steps=20), pathlib.Path(), {})
    times: list[float] = []
    with training.workers(loss_at, rng, batch_size) as workers:
        while len(times) < 3 or (len(times) < 20 and sum(times) < 0.05 * 60 * minutes):
            began = time.perf_counter()
            training.advance(workers.backward(training.step + 1))
            times.append(time.perf_counter() - began)
    model.load_state_dict(before)
    return max(1, round(60 * minutes / float(np.median(times[1:]))))
