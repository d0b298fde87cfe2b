"""The generative trilemma (E39): a GAN, a VAE and a diffusion model on the same digits, measured three ways.

    python examples/trilemma.py                                     trains GAN and VAE, five minutes on two CPU cores
    python examples/trilemma.py --gan runs/gan --vae runs/vae       uses those that were trained, or goes on with them
    python examples/trilemma.py --data full --diffusion runs/mnist  the diffusion model of a run of train_mnist.py

    quality     precision: the share of what it draws that lies among real images
    diversity   recall: the share of real images that lie among what it draws
    speed       images a second, on this machine; and how often a network must be asked for one image

No model has all three (Xiao et al. 2022, fig. 1). The folder runs/trilemma receives samples.png and triangle.png.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinydiff import Rng, Tensor, backend, checkpoint, cli, image, metrics
from tinydiff.backend import Array
from tinydiff.data import mnist
from tinydiff.data.loader import Batches
from tinydiff.diffusion import Sampling
from tinydiff.files import atomic_file
from tinydiff.models import GAN, Classifier, DigitVAE, DigitVAEConfig, GANConfig, PixelDiffusion
from tinydiff.train import Training, TrainSettings, train
from tinydiff.workers import Share

WEIGHTS, ORDER, NOISE, PICTURES, CHOICE, SAMPLES = range(6)
"""The names of the program's random streams."""

BATCH = 64
"""Images a training step."""

Model = GAN | DigitVAE

SETTINGS = {  # the learning rate of a game stays: there is no minimum to settle in
    GAN: TrainSettings(1500, 1e-3, final_lr=1e-3, max_norm=100.0, betas=(0.5, 0.99), ema_decay=0.995),
    DigitVAE: TrainSettings(1500, 3e-3, max_norm=1000.0, betas=(0.9, 0.99), ema_decay=0.99),
}


@dataclass(frozen=True)
class Player:
    """One of those compared: draw(n, rng) gives images, for each of which it asks a network `calls` times."""

    name: str
    calls: int
    draw: Callable[[int, Rng], Array]


@dataclass(frozen=True)
class Result:
    """What was measured of a player, and some of what it drew."""

    name: str
    calls: int
    images_per_second: float
    read: float
    scores: metrics.Scores
    images: np.ndarray


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, or these arguments in its place."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data", default="embedded", help="embedded (default), full, fashion, or a folder of IDX files"
    )
    for flag, model in (("gan", GAN), ("vae", DigitVAE)):
        parser.add_argument(f"--{flag}", metavar="RUN", help=f"use this {flag.upper()}, or go on with its training")
        parser.add_argument(
            f"--{flag}-steps", type=int, default=SETTINGS[model].steps, metavar="N", help="default: %(default)s"
        )
    parser.add_argument(
        "--diffusion",
        default="mnist",
        metavar="RUN",
        help="a run, or a shipped model (default: mnist)",
    )
    parser.add_argument("--n", type=int, default=500, metavar="N", help="images drawn by each (default: %(default)s)")
    parser.add_argument(
        "--classifier", default="classifier", metavar="RUN", help="the judge: a run of classify_mnist.py"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds give equal bits")
    cli.add_device(parser)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/trilemma"), metavar="DIR", help="pictures"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Train what is not trained yet, measure all, print the table and draw the triangle."""
    options = parse()
    if options.n < 20:
        raise ValueError(f"--n must be at least 20, got {options.n}")
    out = pathlib.Path(options.out)
    cli.check_writable(out / "triangle.png")
    with cli.on_device(options.device):
        judge, diffusion = Classifier.load(options.classifier), PixelDiffusion.load(options.diffusion)
        digits = mnist.load(options.data)
        check_sizes(judge, diffusion, digits)
        rng = Rng(options.seed)
        gan_run = pathlib.Path(options.gan or cli.new_folder(None, "runs/gan"))
        vae_run = pathlib.Path(options.vae or cli.new_folder(None, "runs/vae"))
        again = [*given(options), "--gan", gan_run]
        gan = trained(GAN, GANConfig(), gan_run, options.gan_steps, options, again)
        vae = trained(DigitVAE, DigitVAEConfig(), vae_run, options.vae_steps, options, [*again, "--vae", vae_run])

        real = digits.images[rng.at(CHOICE).permutation(len(digits))[: options.n]]
        real_features = judge.features(image.to_signed(real[..., None]))
        players = [
            Player("GAN", 1, gan.sample),
            Player("VAE", 1, vae.sample),
            diffusion_player(diffusion, "dpm", 10),
            diffusion_player(diffusion, "ddim", 50),
        ]
        results = [measure(player, options.n, judge, real_features, rng) for player in players]
    report(results)
    save_samples(out / "samples.png", results)
    save_triangle(out / "triangle.png", results)
    print(f"\nwhat each draws is in {out / 'samples.png'}, the triangle in {out / 'triangle.png'}")


def check_sizes(judge: Classifier, diffusion: PixelDiffusion, digits: mnist.Digits) -> None:
    """Raise ValueError unless all are made for images of one size, that of GAN and VAE."""
    size = (GANConfig().size,) * 2
    sizes = {"--classifier": judge.config.size, "--diffusion": diffusion.config.size, "--data": digits.images.shape[1:]}
    if wrong := [f"{name} has {found}" for name, found in sizes.items() if found != size]:
        raise ValueError(f"those compared draw images of {size}, but {wrong[0]}")


def given(options: argparse.Namespace) -> list[object]:
    """The flags that were given, but for the runs of GAN and VAE."""
    usual = vars(parse([])) | {"gan": options.gan, "vae": options.vae}
    changed = {name: value for name, value in vars(options).items() if value != usual[name]}
    return [item for name, value in changed.items() for item in (f"--{name.replace('_', '-')}", value)]


def trained(
    kind: type[Model], config: object, run: pathlib.Path, steps: int, options: argparse.Namespace, again: list[object]
) -> Model:
    """The model of a run: trained to its end, going on where it stopped if it did, or from the start."""
    settings = TrainSettings(**{**vars(SETTINGS[kind]), "steps": steps})
    about = {"data": options.data, "seed": options.seed}
    saved = None
    if checkpoint.find(run).exists():
        saved = checkpoint.load(run, kind.kind)
        if "losses" not in saved[0]:
            return kind.load(run)
        settings, about = TrainSettings(**saved[1]["settings"]), saved[1]["about"]
    rng = Rng(about["seed"])
    model = kind(config, rng.at(WEIGHTS))  # type: ignore[arg-type]
    batches = Batches(mnist.load(about["data"]).images, batch_size=BATCH, rng=rng.at(ORDER))
    training = Training(model, settings, run / checkpoint.NAME, about)
    if saved is not None:
        training.restore(*saved)
    if training.step == settings.steps:
        return kind.load(run)

    def loss_at(step: int, rng: Rng, share: Share) -> Tensor:
        (images,) = batches.at(step - 1)
        return model.loss(backend.to_device(image.to_signed(share.of(images)[..., None])), rng)

    def preview(step: int) -> None:
        image.save_png(run / f"samples_{step:06d}.png", image.grid(model.sample(40, rng.at(PICTURES)), 10), scale=2)

    print(f"{kind.kind}: {model.count_parameters():,} parameters, {settings.steps} steps; the run is in {run}")
    cli.check_writable(run / checkpoint.NAME)
    train(
        training,
        loss_at,
        rng.at(NOISE),
        batch_size=BATCH,
        resume_with=cli.command(__file__, *again),
        preview=preview,
        preview_every=max(1, settings.steps // 5),
    )
    return kind.load(run)


def diffusion_player(model: PixelDiffusion, sampler: str, steps: int) -> Player:
    """The diffusion model, sampled this way, without guidance, which would trade diversity for quality."""
    steps = min(steps, model.schedule.T)
    how = Sampling(sampler, steps)

    def draw(n: int, rng: Rng) -> Array:
        *_, x_0 = cli.progress(model.sample(n, rng, how, guidance=1.0), f"{steps} steps", steps + 1)
        return x_0

    return Player(f"diffusion, {steps} steps", steps, draw)


def measure(player: Player, n: int, judge: Classifier, real_features: np.ndarray, rng: Rng) -> Result:
    """Draw n images in batches, taking the time, and compare them with as many real ones."""
    batch = min(n, 100)
    player.draw(1, rng.at(SAMPLES))  # what is done once, such as compiling, counts for nobody
    began = time.perf_counter()
    drawn = [
        backend.to_numpy(player.draw(min(batch, n - i), rng.at(SAMPLES, 1 + i))).clip(-1, 1) for i in range(0, n, batch)
    ]
    seconds = time.perf_counter() - began
    images = np.concatenate(drawn)
    scores = metrics.compare(real_features, judge.features(images), rng.at(CHOICE, 1))
    read = float(np.mean(judge.probabilities(images).max(axis=1) > 0.9))
    return Result(player.name, player.calls, n / seconds, read, scores, images)


def report(results: list[Result]) -> None:
    """Print what was measured, as Markdown."""
    print(
        "\n| | quality (precision) | diversity (recall) | images/s | network calls | Fréchet distance | read, p > 0.9 |"
    )
    print("|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r.name} | {r.scores.precision:.1%} | {r.scores.recall:.1%} | {r.images_per_second:,.1f} | {r.calls} "
            f"| {r.scores.frechet:.2f} | {r.read:.1%} |"
        )


def save_samples(path: pathlib.Path, results: list[Result], columns: int = 12) -> None:
    """Draw two rows of samples of each player, under its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.55 * len(results)), dpi=120, layout="constrained")
    for axes, r in zip(figure.subplots(len(results)), results, strict=True):
        axes.imshow(image.grid(r.images[: 2 * columns], columns), cmap="gray")
        axes.set_title(r.name, fontsize=10, loc="left")
        axes.axis("off")
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def save_triangle(path: pathlib.Path, results: list[Result], decades: int = 4) -> None:
    """Draw each player as a triangle, whose corners lie the further out the better: speed by its logarithm."""
    from matplotlib.figure import Figure

    angles = np.radians([90, 210, 330, 90])
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    fastest = max(r.images_per_second for r in results)
    figure = Figure(figsize=(6.4, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot(aspect="equal", xlim=(-1.35, 1.35), ylim=(-0.8, 1.25), title="The generative trilemma")
    axes.axis("off")
    for ring in (0.25, 0.5, 0.75, 1):
        axes.plot(*(ring * corners).T, color="0.8", lw=0.8)
    names = ("quality\n(precision)", "diversity\n(recall)", f"speed\n({decades} decades)")
    for corner, name in zip(corners, names, strict=False):
        axes.plot(*zip((0, 0), corner, strict=True), color="0.8", lw=0.8)
        axes.text(1.17 * corner[0], 1.17 * corner[1], name, ha="center", va="center")
    for r in results:
        speed = max(0.0, 1 + math.log10(r.images_per_second / fastest) / decades)
        values = np.array([r.scores.precision, r.scores.recall, speed, r.scores.precision])
        points = (values[:, None] * corners).T
        rate = np.format_float_positional(r.images_per_second, 3, fractional=False, trim="-")
        axes.plot(*points, marker="o", lw=2, label=f"{r.name}: {rate} images/s")
        axes.fill(*points, alpha=0.07)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    cli.run(main)
