"""Does a picture show what its prompt says? Scenes, drawn from their captions and read again, attribute by attribute.

    python examples/evaluate_text_to_image.py                              the shipped model, 500 prompts of each kind
    python examples/evaluate_text_to_image.py --guidance 1,1.5,2,3,5,8     how strongly to guide: guidance.png
    python examples/evaluate_text_to_image.py --run RUN                    a model of train_text_to_image.py
    python examples/evaluate_text_to_image.py --model dalle2               DALL-E 2; --no-prior: without its prior
    python examples/evaluate_text_to_image.py --model glide                GLIDE, which draws what nothing is known of
    python examples/evaluate_text_to_image.py --model imagen               Imagen, whose text encoder saw no picture

The prompts are captions of scenes that the training never saw, each naming all there is: one thing; two things; and
one or two things of which one has a shape and a colour that never went together in training, such as a red triangle.
The package's scene reader looks at each picture, made smaller if need be, and a prompt counts as drawn if all that it
names is there: number, shapes, colours, sizes, places or relation, and background. Other prompts, which leave much
open, are drawn eight times each, to see how much the pictures of one prompt differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tinydiff import cli, image, metrics
from tinydiff.backend import to_numpy
from tinydiff.data.captioned import Shapes
from tinydiff.data.shape_captions import parse
from tinydiff.diffusion import Sampling, last
from tinydiff.files import atomic_file
from tinydiff.models import (
    DallE2,
    Imagen,
    SceneReader,
    StableDiffusion,
    TextInpainting,
    dalle2,
    glide,
    imagen,
    load_text_encoder,
    stable_diffusion,
    told_texts,
)
from tinydiff.models.cascade import smaller
from tinydiff.models.text_encoder import check_listens
from tinydiff.rng import Rng

PROMPTS, NOISE, OPEN = range(3)
"""The names of the program's random streams."""

KINDS = {
    "one thing": (Shapes(number=1, full=True), "test"),
    "two things": (Shapes(number=2, full=True), "test"),
    "one thing, new pair": (Shapes(number=1, full=True), "held-out"),
    "two things, new pair": (Shapes(number=2, full=True), "held-out"),
}
"""Where the prompts of each kind come from."""

ATTRIBUTES = ("number", "shape", "colour", "size", "place", "relation", "background")

OPEN_PROMPTS = Shapes(number=1)
"""Where prompts that leave much open come from."""

COPIES = 8
"""How often each of those is drawn."""

Reports = list[dict[str, bool]]
"""For each picture, whether each attribute that its prompt names is right."""

Draw = Callable[[list[str], Rng, Sampling, float], np.ndarray]
"""draw(prompts, rng, how, guidance): a picture of each, (n, H, W, 3), float32 in [-1, 1], on the host."""


def load_stable_diffusion(options: argparse.Namespace) -> Draw:
    """A text, latents, a picture (E28)."""
    model = StableDiffusion.of_run(options.run, options.unet)
    return lambda prompts, rng, how, guidance: model.decode(last(model.text_to_image(prompts, rng, how, guidance)))


def load_dalle2(options: argparse.Namespace) -> Draw:
    """A text, an embedding of an image, a picture (E29); or without the prior, as the flags say."""
    prior = None if options.no_prior else options.prior
    model = DallE2.load(prior=prior, decoder=options.decoder, upsamplers=options.upsamplers or dalle2.UPSAMPLERS)

    def draw(prompts: list[str], rng: Rng, how: Sampling, guidance: float) -> np.ndarray:
        if options.no_prior == "caption":
            return model.pictures(last(model.draw(None, prompts, rng, how, guidance)))
        return model.pictures(last(model.text_to_image(prompts, rng, how, guidance)))

    return draw


def load_glide(options: argparse.Namespace) -> Draw:
    """A text, a picture of which nothing is known (E36)."""
    model, encoder = TextInpainting.load(options.glide), load_text_encoder(options.text_encoder or "clip")
    check_listens(model, encoder)

    def draw(prompts: list[str], rng: Rng, how: Sampling, guidance: float) -> np.ndarray:
        told, nothing = told_texts(encoder, prompts), told_texts(encoder, "")
        return to_numpy(last(model.sample(told, rng, how, guidance=guidance, negative=nothing)))

    return draw


def load_imagen(options: argparse.Namespace) -> Draw:
    """A text, a small picture, larger ones (E37), with dynamic thresholds."""
    model = Imagen.load(options.text_encoder or "text_encoder", options.base, options.upsamplers or imagen.UPSAMPLERS)

    def draw(prompts: list[str], rng: Rng, how: Sampling, guidance: float) -> np.ndarray:
        dynamic = dataclasses.replace(how, clip=imagen.PERCENTILE)
        return to_numpy(last(model.text_to_image(prompts, rng, dynamic, guidance)))

    return draw


class System(NamedTuple):
    """How the flags become something that draws, and the guidance that is usual with it."""

    load: Callable[[argparse.Namespace], Draw]
    guidance: float


SYSTEMS = {
    "stable-diffusion": System(load_stable_diffusion, stable_diffusion.USUAL_GUIDANCE),
    "dalle2": System(load_dalle2, dalle2.USUAL_GUIDANCE),
    "glide": System(load_glide, glide.USUAL_GUIDANCE),
    "imagen": System(load_imagen, imagen.IMAGEN_GUIDANCE),
}


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--n", type=int, default=500, metavar="N", help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of DDIM (default: %(default)s)")
    usual = ", ".join(f"{system.guidance:g} for {name}" for name, system in SYSTEMS.items())
    guidance = f"1 is none (E35; default: {usual})"
    parser.add_argument("--guidance", type=cli.numbers, metavar="S,S,...", help=guidance)
    repeated = f"prompts that are drawn {COPIES} times each, 2 or more (default: %(default)s)"
    parser.add_argument("--repeated", type=int, default=20, metavar="N", help=repeated)
    which = parser.add_argument_group("which model")
    which.add_argument("--model", choices=SYSTEMS, default="stable-diffusion", help="default: %(default)s")
    which.add_argument("--run", type=pathlib.Path, metavar="RUN", help="of train_text_to_image.py (default: shipped)")
    which.add_argument("--unet", type=pathlib.Path, metavar="RUN", help="of train_latent_diffusion.py")
    for part in ("prior", "decoder", "glide"):
        which.add_argument(f"--{part}", default=part, metavar="RUN", help=f"of train_{part}.py (default: shipped)")
    without = "dalle2: told the text's embedding instead, or no embedding and the caption alone"
    which.add_argument("--no-prior", nargs="?", choices=("text", "caption"), const="text", help=without)
    which.add_argument("--base", default="imagen", metavar="RUN", help="Imagen's, of train_text_to_pixels.py")
    larger = "of DALL-E 2 or Imagen, of train_upsampler.py (default: shipped, each its own)"
    which.add_argument("--upsamplers", nargs="+", metavar="RUN", help=larger)
    listened = "that GLIDE or Imagen listens to (default: shipped, each its own)"
    which.add_argument("--text-encoder", metavar="RUN", help=listened)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_device(parser)
    out = pathlib.Path("runs/text_to_image_scores")
    parser.add_argument("--out", type=pathlib.Path, default=out, metavar="DIR", help="pictures (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Draw and read, print the table, and save the pictures."""
    options = parse_flags()
    if options.n < 1:
        raise ValueError(f"--n must be at least 1, got {options.n}")
    cli.check_writable(options.out / "guidance.png")
    if options.repeated < 2:
        raise ValueError(f"--repeated must be at least 2, got {options.repeated}")
    rng, how, system = Rng(options.seed), Sampling(steps=options.steps), SYSTEMS[options.model]
    sweep = options.guidance or (system.guidance,)
    with cli.on_device(options.device):
        draw, reader = system.load(options), SceneReader.load("scene_reader")
        shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for guidance in sweep:
            print(f"\nguidance {guidance:g}; share of pictures in which it is right:\n")
            print(f"| | everything | {' | '.join(ATTRIBUTES)} |\n|---|{'---|' * (1 + len(ATTRIBUTES))}")
            for i, (kind, (source, split)) in enumerate(KINDS.items()):
                prompts = source.draw(rng.at(PROMPTS, i), options.n, split)[1]
                pictures = drawn(draw, prompts, rng.at(NOISE, i), how, guidance, kind)
                read = reader.read(as_read(reader, pictures))
                reports = [parse(p).report(scene) for p, scene in zip(prompts, read, strict=True)]
                right = np.array([all(report.values()) for report in reports])
                shares[kind].append(float(right.mean()))
                print(f"| {kind} | {right.mean():.1%} | {' | '.join(of_each(reports))} |")
                save_sheet(options.out / f"{kind.replace(', ', '_').replace(' ', '_')}.png", pictures, prompts, right)
            prompts = OPEN_PROMPTS.draw(rng.at(OPEN), options.repeated, "test")[1]
            copies = [prompt for prompt in prompts for _ in range(COPIES)]
            report_diversity(reader, drawn(draw, copies, rng.at(OPEN, 0), how, guidance, "open prompts"))
    if len(sweep) > 1:
        save_sweep(options.out / "guidance.png", sweep, shares)
    print(f"\npictures of each kind are in {options.out}")


def drawn(
    draw: Draw, prompts: list[str], rng: Rng, how: Sampling, guidance: float, kind: str, batch: int = 100
) -> np.ndarray:
    """A picture of each prompt, (N, H, W, 3), float32 in [-1, 1]."""
    starts = cli.progress(range(0, len(prompts), batch), kind, -(-len(prompts) // batch))
    return np.concatenate([draw(prompts[i : i + batch], rng.at(i), how, guidance) for i in starts])


def as_read(reader: SceneReader, pictures: np.ndarray) -> np.ndarray:
    """Pictures at the size that the reader reads."""
    return smaller(pictures, pictures.shape[1] // reader.config.size)


def report_diversity(reader: SceneReader, pictures: np.ndarray) -> None:
    """Print how far apart the pictures of one prompt are, COPIES of each in turn: in pixels, and as the reader sees."""
    small = as_read(reader, pictures)
    print(f"\nhow much {COPIES} pictures of one prompt differ, {len(pictures) // COPIES} prompts:")
    for name, x in (("pixels", small), ("the reader's features", reader.features(small))):
        value, error = metrics.diversity(x.reshape(-1, COPIES, x[0].size))
        print(f"  {name:22} {value:.4f} ± {error:.4f}")


def of_each(reports: Reports) -> list[str]:
    """For each attribute the share of pictures in which it is right, of those whose prompts name it."""
    named = [[report[attribute] for report in reports if attribute in report] for attribute in ATTRIBUTES]
    return [f"{np.mean(rights):.1%}" if rights else "" for rights in named]


def save_sheet(path: pathlib.Path, pictures: np.ndarray, prompts: list[str], right: np.ndarray, n: int = 12) -> None:
    """Draw the first pictures under their prompts, those in which something is wrong with a red title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), dpi=120, layout="constrained")
    for axes, picture, prompt, fine in zip(figure.subplots(3, n // 3).flat, pictures, prompts, right, strict=False):
        axes.imshow(image.to_uint8(picture), interpolation="nearest")
        words = prompt.split()
        half = (len(words) + 1) // 2
        title = " ".join(words[:half]) + "\n" + " ".join(words[half:])
        axes.set_title(title, fontsize=7, color="black" if fine else "tab:red")
    for axes in figure.axes:
        axes.axis("off")
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def save_sweep(path: pathlib.Path, guidance: tuple[float, ...], shares: dict[str, list[float]]) -> None:
    """Draw how often everything is right against the guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="guidance s", ylabel="everything right", ylim=(0, 1.02), title="Guidance (E35)")
    for kind, share in shares.items():
        axes.plot(guidance, share, marker="o", label=kind)
    axes.grid(alpha=0.2)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    cli.run(main)
