"""Train DiffWave: Algorithm 1 on sound (E38). Its default data are notes that the package plays itself.

    python examples/train_diffwave.py                         notes, named to the model; ten minutes on two CPU cores
    python examples/train_diffwave.py --condition none        a model that is never told the note
    python examples/train_diffwave.py --condition mel         a vocoder: from a mel spectrogram back to sound;
                                                             twenty minutes
    python examples/train_diffwave.py --data FOLDER           your own WAV files; sub-folders are classes
    python examples/train_diffwave.py --resume runs/diffwave  go on after Ctrl-C, or after the power went

The folder of the run receives samples_000000.png, ... (waves and spectrograms: the same noise turned into sound by the
model as it learns), then samples.png, samples/*.wav, loss.png, and checkpoint.npz, which sample_audio.py draws from.
"""

from __future__ import annotations

import argparse
import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydiff import backend, cli, program
from tinydiff.backend import Array
from tinydiff.data import audio, spectrum
from tinydiff.data.loader import Batches
from tinydiff.diffusion import Sampling, last
from tinydiff.models import DiffWave, DiffWaveConfig
from tinydiff.models.pixel_diffusion import SCHEDULES, TARGETS
from tinydiff.program import Run, fit
from tinydiff.rng import Rng
from tinydiff.train import TrainSettings
from tinydiff.workers import DrawnLoss, Share

WEIGHTS, ORDER, NOISE, PICTURES, NOTES = range(5)
"""The names of the run's random streams: rng.at(WEIGHTS) draws the first weights, and so on."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, and the defaults of the command line.

    per_class: how often each note is played for the data set. timesteps: the T of diffusion. The other fields are those
    of DiffWaveConfig and TrainSettings.
    """

    data: str = "notes"
    condition: str = "label"
    per_class: int = 300
    steps: int = 3000
    batch_size: int = 32
    lr: float = 5e-3
    warmup: int = 100
    ema_decay: float = 0.995
    timesteps: int = 200
    schedule: str = "cosine"
    target: str = "v"
    length: int = 2048
    rate: int = 8000
    channels: int = 48
    layers: int = 12
    cycle: int = 6
    patch: int = 8
    seed: int = 0

    def clips(self) -> audio.Clips:
        """What to learn."""
        if self.data == "notes":
            return audio.notes(self.per_class, self.length, Rng(self.seed).at(NOTES), rate=self.rate)
        return audio.folder(self.data, self.length, self.rate)

    def model(self, clips: audio.Clips) -> DiffWaveConfig:
        """The model for these clips."""
        return DiffWaveConfig(
            length=self.length,
            rate=self.rate,
            channels=self.channels,
            layers=self.layers,
            cycle=self.cycle,
            patch=self.patch,
            T=self.timesteps,
            schedule=self.schedule,
            target=self.target,
            class_names=clips.class_names if self.condition == "label" else (),
            mel=spectrum.Mel(self.rate) if self.condition == "mel" else None,
        )

    def settings(self) -> TrainSettings:
        """How to train it."""
        return TrainSettings(self.steps, self.lr, warmup=self.warmup, betas=(0.9, 0.99), ema_decay=self.ema_decay)


def parse() -> argparse.Namespace:
    """The command line. Flags that a Recipe has are None unless given."""
    parser = cli.parser(__doc__)

    def add(group: Any, flag: str, text: str, **how: Any) -> None:
        value = getattr(Recipe, flag[2:].replace("-", "_"))
        group.add_argument(flag, help=f"{text} (default: {value})", **how)

    what = parser.add_argument_group("what to train")
    add(what, "--data", "notes, or a folder of WAV files")
    add(what, "--condition", "what the model is told: nothing, the class, or the mel spectrogram",
        choices=("none", "label", "mel"))  # fmt: skip
    add(what, "--per-class", "how many of each note to play", type=int, metavar="N")
    add(what, "--length", "samples in a clip", type=int, metavar="N")
    add(what, "--rate", "samples a second; files of other rates are converted", type=int, metavar="HZ")
    add(what, "--timesteps", "T, the number of diffusion steps", type=int, metavar="T")
    add(what, "--schedule", "how the noise grows with t (E6, E7)", choices=SCHEDULES)
    add(what, "--target", "what the network predicts: the noise, as in the paper, the sound, or v (E15)",
        choices=TARGETS)  # fmt: skip
    add(what, "--channels", "width of the residual layers", type=int, metavar="N")
    add(what, "--layers", "number of residual layers", type=int, metavar="N")
    add(what, "--cycle", "dilations 1, 2, ..., 2^(N - 1), and again", type=int, metavar="N")
    add(what, "--patch", "work on N samples at once, N times faster; 1 is the paper's", type=int, metavar="N")
    program.add_training_flags(parser, Recipe(), "clips")
    program.add_run_flags(parser, "runs/diffwave", "steps between pictures (default: ten a run)")
    return parser.parse_args()


def main() -> None:
    """Train, or go on with a run, then draw the final sounds."""
    options = parse()
    with cli.on_device(options.device):
        train(program.start_or_resume(options, Recipe(), "runs/diffwave", DiffWave.kind))


def train(run: Run[Recipe]) -> None:
    """Train by the recipe of this run, and draw the sounds."""
    recipe, folder = run.recipe, run.folder
    rng = Rng(recipe.seed)
    clips = recipe.clips()
    model = DiffWave(recipe.model(clips), rng.at(WEIGHTS))
    loss_at = loss_of(model, recipe, clips, rng.at(ORDER))
    seconds, seen = recipe.length / recipe.rate, model.config.receptive_field / recipe.rate

    def preview(step: int) -> None:
        waves, titles = sounds(model, clips, rng.at(PICTURES), steps=min(10, recipe.timesteps))
        spectrum.pictures(folder / f"samples_{step:06d}.png", waves, titles, recipe.rate)

    what = f"{len(clips):,} clips of {seconds:.2f} s, {len(clips.class_names)} classes; the network sees {seen:.2f} s"
    training = fit(run, model, loss_at, rng.at(NOISE), __file__, what=what, unit="clips", preview=preview)
    with training.ema.applied():
        waves, titles = sounds(model, clips, rng.at(PICTURES), steps=min(50, recipe.timesteps))
    spectrum.pictures(folder / "samples.png", waves, titles, recipe.rate)
    for i, samples in enumerate(waves):
        audio.write_wav(folder / "samples" / f"{i:02d}.wav", samples, recipe.rate)
    print(f"The sounds are in {folder / 'samples'}; what they look like: {folder / 'samples.png'}.")
    more = {"none": (), "label": ("--note", clips.class_names[-1]), "mel": ("--mel-of", folder / "samples" / "00.wav")}
    script = pathlib.Path(__file__).with_name("sample_audio.py")
    print(f"Draw more:\n  {cli.command(script, folder, *more[recipe.condition])}")


def loss_of(model: DiffWave, recipe: Recipe, clips: audio.Clips, order: Rng) -> DrawnLoss:
    """The loss of a share of a step's batch: clips drawn in this order, with what the model is told of them."""
    batches = Batches(clips.waves, clips.labels, batch_size=recipe.batch_size, rng=order)

    def draw_at(step: int, rng: Rng, share: Share) -> tuple[Array | None, ...]:
        waves, labels = (share.of(a) for a in batches.at(step - 1))
        label = labels if recipe.condition == "label" else None
        mel = model.config.mel(waves) if model.config.mel else None
        return model.draw(backend.to_device(waves), rng, label, mel)

    return DrawnLoss(draw_at, model.loss_of)


def sounds(
    model: DiffWave, clips: audio.Clips, rng: Rng, steps: int, n: int = 12
) -> tuple[list[np.ndarray], list[str]]:
    """n samples, (L,) each, and their titles: of classes spread over all, or of the mel spectrograms of such clips."""
    chosen = np.linspace(0, len(clips) - 1, n).astype(int)
    labels = clips.labels[chosen]
    told = {"label": labels} if model.config.class_names else {}
    mel = model.config.mel(clips.waves[chosen]) if model.config.mel else None
    x_0 = last(model.sample(n, rng, Sampling(steps=steps), mel=mel, **told))
    titles = [clips.class_names[i] for i in labels] if told or mel is not None else [f"sample {i}" for i in range(n)]
    return list(backend.to_numpy(x_0).clip(-1, 1)), titles


if __name__ == "__main__":
    cli.run(main)
