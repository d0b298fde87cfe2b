"""How the time of a training step grows with the batch, the width and the resolution of a small U-Net.

    seconds = c x^a,   a fitted by least squares of log seconds on log x

Twice the images or pixels should take twice as long, a = 1, and twice the width up to four times, a = 2, since a
convolution's work grows with the square of its channels and all else with the channels alone. Only attention grows
with the square of the pixels, and the U-Net attends in the middle alone, where the resolution is a quarter. The first
points carry the time that a step takes at any size, most of it Python's own, which makes a smaller: the slope between
the last two points is nearer to what large work does.
"""

from __future__ import annotations

import contextlib
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tests.benchmarks.side import Side, Task
from tests.benchmarks.timing import take_turns
from tinydiff.nn import UNetConfig

FIGURE = pathlib.Path(__file__).with_name("scaling.png")
SMALL: dict[str, Any] = {"batch": 16, "size": 32, "base": 32}
POINTS = {"batch": (8, 16, 32, 64, 128), "base": (16, 32, 64, 128), "size": (16, 32, 64, 96)}
"""What is varied, all else as in SMALL: images in a batch, channels of the first level, height and width in pixels."""
LABELS = {"batch": "images in the batch", "base": "channels of the first level", "size": "pixels of an image"}


def main(repeats: int = 7) -> None:
    """Measure, print the exponents, and save the figure."""
    from tqdm import tqdm

    with tqdm(total=len(POINTS) * repeats, desc="scaling", bar_format="{desc} |{bar:30}| {elapsed}") as bar:
        curves = {name: curve(name, repeats, bar.update) for name in POINTS}
    for name, seconds in curves.items():
        times = ", ".join(f"{x}: {s:.3f} s" for x, s in zip(amounts(name), seconds, strict=True))
        fits = exponent(amounts(name), seconds), exponent(amounts(name)[-2:], seconds[-2:])
        print(f"{LABELS[name]:28} exponent {fits[0]:.2f}, of the last two points {fits[1]:.2f}   ({times})")
    draw(curves, FIGURE)
    print(f"drawn in {FIGURE}")


def curve(name: str, repeats: int, tick: Callable[[], Any]) -> list[float]:
    """The median seconds of a training step at each point, which take turns."""
    with contextlib.ExitStack() as stack:
        sides = {str(value): stack.enter_context(Side(task(SMALL | {name: value}))) for value in POINTS[name]}
        return [statistics.median(seconds) for seconds in take_turns(sides, repeats, tick).values()]


def task(point: Mapping[str, Any]) -> Task:
    """Training steps of a U-Net of three levels, one block each."""
    config = UNetConfig(base=point["base"], multipliers=(1, 2, 2), blocks=1, attention=())
    return Task("tests.benchmarks.ours:unet_step", {"batch": point["batch"], "size": point["size"], "config": config})


def amounts(name: str) -> list[int]:
    """The values on the horizontal axis: pixels and not their root for the size."""
    return [value**2 if name == "size" else value for value in POINTS[name]]


def exponent(x: Sequence[float], seconds: Sequence[float]) -> float:
    """The a of seconds = c x^a that fits best."""
    return float(np.polyfit(np.log(x), np.log(seconds), 1)[0])


def draw(curves: Mapping[str, Sequence[float]], path: pathlib.Path) -> None:
    """One panel a curve, both axes logarithmic, times relative to the first point, a straight line for a = 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (name, seconds) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        x = np.asarray(amounts(name))
        axes.loglog(x, x / x[0], ":", color="gray", label="in proportion")
        axes.loglog(x, np.asarray(seconds) / seconds[0], "o-", label=f"measured, exponent {exponent(x, seconds):.2f}")
        axes.set_xticks(x, map(str, x))
        axes.minorticks_off()
        axes.set_xlabel(LABELS[name])
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("time of a training step,\nover that of the first point")
    figure.savefig(path, dpi=120)
