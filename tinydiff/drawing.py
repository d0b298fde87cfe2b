"""What the programs that draw prompts share: their flags, drawing in batches, and what they save.

    options = parse()                                                  # a parser with drawing.add_flags
    prompts = drawing.prompts_of(options)
    drawing.check_outputs(options)
    with cli.on_device(options.device):
        model = ...
        pictures = drawing.draw_all(prompts, options.seed, lambda some, rng, what: ...)
        drawing.save(options, pictures)

A program brings the function that draws one batch. It gives the pictures as they came out of noise, of which
`evenly_spaced` chooses some.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from tinydiff import cli, image
from tinydiff.backend import Array
from tinydiff.diffusion.samplers import SAMPLERS, USUAL_STEPS
from tinydiff.files import atomic_file
from tinydiff.rng import Rng

BATCH = 100
"""Pictures drawn at once."""

COLUMNS = 8
"""Pictures in a row; and the moments on their way from noise that a strip shows."""

DrawSome = Callable[[list[str], Rng, str], list[np.ndarray]]
"""draw(prompts, rng, what): a picture of each prompt on its way from noise, (n, H, W, 3) float32 in [-1, 1] each, the
last being the result. what: the title of its progress bar."""


class Drawn(NamedTuple):
    """What was drawn: pictures (N, H, W, 3), float32 in [-1, 1], and the first batch on its way, the like each."""

    pictures: np.ndarray
    way: list[np.ndarray]


def add_flags(parser: argparse.ArgumentParser, guidance: float) -> argparse._ArgumentGroup:
    """Add the flags of what to draw, how, and where to; return the group of how, to which a program may add its own.

    PROMPT, --prompts, --n; --sampler, --steps, --guidance (by default `guidance`), --negative, --seed; --device, --out,
    --save-array.
    """
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    parser.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="many prompts, one a line")
    parser.add_argument("--n", type=int, metavar="N", help="pictures (default: 8 of one prompt, 1 each of many)")
    cli.add_device(parser)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("drawn.png"), help="default: %(default)s")
    parser.add_argument("--save-array", type=pathlib.Path, metavar="NPZ", help="also save the array `samples`")
    how = parser.add_argument_group("how")
    how.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="see sample.py (default: %(default)s)")
    usual = ", ".join(f"{steps} for {sampler}" for sampler, steps in USUAL_STEPS.items())
    how.add_argument("--steps", type=int, metavar="N", help=f"1 to T (default: {usual}, all T for ddpm)")
    closer = "1 is none, more keeps closer to the prompt (E35; default: %(default)s)"
    how.add_argument("--guidance", type=float, default=guidance, metavar="S", help=closer)
    how.add_argument("--negative", default="", metavar="PROMPT", help="what is not wanted (default: nothing)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    return how


def prompts_of(options: argparse.Namespace, default: str | None = None) -> list[str]:
    """One prompt for each picture. default: what is drawn if there is none, where that makes sense.

    Raises ValueError for flags that do not go together, or a file of no prompts.
    """
    one = default if options.prompt is None and options.prompts is None else options.prompt
    if (one is None) == (options.prompts is None):
        raise ValueError("give a PROMPT, or a file of them (--prompts), and not both")
    if options.n is not None and options.n < 1:
        raise ValueError(f"--n must be at least 1, got {options.n}")
    if one is not None:
        return [one] * (options.n or COLUMNS)
    prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{options.prompts} has no prompts; it needs one a line")
    return [prompt for prompt in prompts for _ in range(options.n or 1)]


def check_outputs(options: argparse.Namespace) -> None:
    """Raise OSError now if nothing can be written where the results shall go."""
    for path in (options.out, options.save_array):
        if path is not None:
            cli.check_writable(path)


def draw_all(prompts: list[str], seed: int, draw: DrawSome, batch: int = BATCH) -> Drawn:
    """A picture of each prompt, so many at once; each batch has its own stream of random numbers, Rng(seed).at(i)."""
    batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    ways = [draw(some, Rng(seed).at(i), f"batch {i + 1} of {len(batches)}") for i, some in enumerate(batches)]
    return Drawn(np.concatenate([way[-1] for way in ways]), ways[0])


def evenly_spaced(states: Iterable[Array], total: int, what: str) -> list[Array]:
    """Of the states that a sampler yields, the first, the last, and up to six between, with a progress bar.

    The others are let go at once: a thousand batches of pictures would fill the memory. total: how many states there
    are, or about; the last is the last in any case. Raises ValueError if there is none.
    """
    early = {round(i) for i in np.linspace(0, total - 1, COLUMNS)} - {total - 1}
    chosen, state = [], None
    for i, state in enumerate(cli.progress(states, what, total)):
        if i in early:
            chosen.append(state)
    if state is None:
        raise ValueError("expected at least one state, got none")
    return [*chosen, state]


def save(options: argparse.Namespace, drawn: Drawn) -> None:
    """Write the picture, the strip beside it and the array, and say where they are."""
    pictures, strip = drawn.pictures, options.out.with_name(f"{options.out.stem}_strip.png")
    image.save_png(options.out, image.grid(pictures, columns=min(len(pictures), COLUMNS)), scale=3)
    image.save_png(strip, image.film_strip(drawn.way, columns=COLUMNS, rows=4), scale=3)
    print(f"{len(pictures)} pictures in {options.out}; how they came out of noise in {strip}")
    if options.save_array:
        with atomic_file(options.save_array) as file:
            np.savez(file, samples=(pictures + 1) / 2)
        print(f"their array, {pictures.shape} in [0, 1], in {options.save_array}")
