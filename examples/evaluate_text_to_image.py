"""Does a picture show what its prompt says? Scenes, drawn from their captions and read again, attribute by attribute.

    python examples/evaluate_text_to_image.py                              the shipped model, 500 prompts of each kind
    python examples/evaluate_text_to_image.py --guidance 1,1.5,2,3,5,8     how strongly to guide: guidance.png
    python examples/evaluate_text_to_image.py --run RUN                    a model of train_text_to_image.py

The prompts are captions of scenes that the training never saw, each naming all there is: one thing; two things; and
one or two things of which one has a shape and a colour that never went together in training, such as a red triangle.
The package's scene reader looks at each picture, and a prompt counts as drawn if all that it names is there: number,
shapes, colours, sizes, places or relation, and background.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from tinydiff import cli, image
from tinydiff.data.captioned import Shapes
from tinydiff.data.shape_captions import parse
from tinydiff.diffusion import Sampling
from tinydiff.files import atomic_file
from tinydiff.models import SceneReader, StableDiffusion
from tinydiff.models.stable_diffusion import USUAL_GUIDANCE
from tinydiff.rng import Rng

PROMPTS, NOISE = range(2)
"""The names of the program's random streams."""

KINDS = {
    "one thing": (Shapes(number=1, full=True), "test"),
    "two things": (Shapes(number=2, full=True), "test"),
    "one thing, new pair": (Shapes(number=1, full=True), "held-out"),
    "two things, new pair": (Shapes(number=2, full=True), "held-out"),
}
"""Where the prompts of each kind come from."""

ATTRIBUTES = ("number", "shape", "colour", "size", "place", "relation", "background")

Reports = list[dict[str, bool]]
"""For each picture, whether each attribute that its prompt names is right."""


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--n", type=int, default=500, metavar="N", help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of DDIM (default: %(default)s)")
    parser.add_argument(
        "--guidance",
        type=cli.numbers,
        default=(USUAL_GUIDANCE,),
        metavar="S,S,...",
        help=f"1 is none (E35; default: {USUAL_GUIDANCE})",
    )
    parser.add_argument("--run", type=pathlib.Path, metavar="RUN", help="of train_text_to_image.py (default: shipped)")
    parser.add_argument("--unet", type=pathlib.Path, metavar="RUN", help="of train_latent_diffusion.py")
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
    rng, how = Rng(options.seed), Sampling(steps=options.steps)
    with cli.on_device(options.device):
        model, reader = StableDiffusion.of_run(options.run, options.unet), SceneReader.load("scene_reader")
        shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for guidance in options.guidance:
            print(f"\nguidance {guidance:g}; share of pictures in which it is right:\n")
            print(f"| | everything | {' | '.join(ATTRIBUTES)} |\n|---|{'---|' * (1 + len(ATTRIBUTES))}")
            for i, (kind, (source, split)) in enumerate(KINDS.items()):
                prompts = source.draw(rng.at(PROMPTS, i), options.n, split)[1]
                pictures = drawn(model, prompts, rng.at(NOISE, i), how, guidance, kind)
                reports = [parse(p).report(scene) for p, scene in zip(prompts, reader.read(pictures), strict=True)]
                right = np.array([all(report.values()) for report in reports])
                shares[kind].append(float(right.mean()))
                print(f"| {kind} | {right.mean():.1%} | {' | '.join(of_each(reports))} |")
                save_sheet(options.out / f"{kind.replace(', ', '_').replace(' ', '_')}.png", pictures, prompts, right)
    if len(options.guidance) > 1:
        save_sweep(options.out / "guidance.png", options.guidance, shares)
    print(f"\npictures of each kind are in {options.out}")


def drawn(
    model: StableDiffusion, prompts: list[str], rng: Rng, how: Sampling, guidance: float, kind: str, batch: int = 100
) -> np.ndarray:
    """A picture of each prompt, (N, H, W, 3), float32 in [-1, 1]."""
    starts = cli.progress(range(0, len(prompts), batch), kind, -(-len(prompts) // batch))
    ends = [[*model.text_to_image(prompts[i : i + batch], rng.at(i), how, guidance)][-1] for i in starts]
    return np.concatenate([model.decode(z) for z in ends])


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
