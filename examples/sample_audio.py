"""Draw sounds from a trained DiffWave (E38): WAV files, and a picture of their waves and spectrograms.

    python examples/sample_audio.py runs/diffwave --note A4              eight A4, in 50 steps of DDIM
    python examples/sample_audio.py runs/diffwave --n 24                 any note
    python examples/sample_audio.py runs/diffwave --note A4 --steps 6    as few as DiffWave's fast sampling
    python examples/sample_audio.py runs/diffwave-2 --mel-of FILE.wav    a vocoder: the sound of a mel spectrogram

Where the classes are notes, it also says how many samples have the pitch that was asked for. Equal seeds give equal
sounds. The model's averaged weights (EMA) are used.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from tinydiff import backend, checkpoint, cli
from tinydiff.data import audio, spectrum
from tinydiff.diffusion import Sampling
from tinydiff.diffusion.samplers import SAMPLERS, USUAL_STEPS
from tinydiff.models import DiffWave
from tinydiff.rng import Rng


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=pathlib.Path, help="folder of a training run, or a shipped model")
    parser.add_argument("--n", type=int, default=8, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--note", metavar="NAME", help="which class to draw, such as A4 (default: all, in turn)")
    parser.add_argument("--mel-of", type=pathlib.Path, metavar="WAV", help="the sound that a vocoder is to make again")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="default: %(default)s")
    usual = ", ".join(f"{steps} for {sampler}" for sampler, steps in USUAL_STEPS.items())
    parser.add_argument("--steps", type=int, metavar="N", help=f"1 to T (default: {usual}, all T for ddpm)")
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="S", help="1 is none (E35; default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_device(parser)
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="where to write (default: sounds in the run)")
    return parser.parse_args()


def main() -> None:
    """Draw the sounds, and save them and their picture."""
    options = parse()
    file = checkpoint.find(options.run)
    picture = cli.output(options.out / "sounds.png" if options.out else None, file, "sounds/sounds.png")
    out = picture.parent
    with cli.on_device(options.device):
        model = DiffWave.load(file)
        if options.note is not None and options.note not in (names := model.config.class_names):
            raise ValueError(f"this model knows {', '.join(names) or 'no classes'}; got --note {options.note}")
        if model.config.mel is not None or options.mel_of is not None:
            waves, titles = vocoded(model, options)
        else:
            waves, titles = drawn(model, options)
    rate = model.config.rate
    for i, (samples, title) in enumerate(zip(waves, titles, strict=True)):
        audio.write_wav(out / f"{i:02d}-{title.replace(' ', '-')}.wav", samples, rate)
    spectrum.pictures(picture, waves[:24], titles[:24], rate)
    print(f"{len(waves)} sounds in {out}; what they look like: {picture}")
    if notes := [name for name in model.config.class_names if audio.is_note(name)]:
        print(heard(np.stack(waves), titles, notes, rate))


def heard(waves: np.ndarray, titles: list[str], names: list[str], rate: int) -> str:
    """How many of the waves have the pitch that their title names, or why that cannot be measured."""
    frequencies = [audio.frequency(name) for name in names]
    lowest, highest = min(80.0, 0.9 * min(frequencies)), max(1000.0, 1.1 * max(frequencies))
    try:
        pitches = spectrum.pitch(waves, rate, lowest, highest)
    except ValueError as error:
        return f"their pitch cannot be measured: {error}"
    found = spectrum.nearest(pitches, frequencies)
    right = sum(names[i] == title for i, title in zip(found, titles, strict=True) if i >= 0)
    return f"{right} of {len(waves)} have the pitch that was asked for"


def drawn(model: DiffWave, options: argparse.Namespace) -> tuple[list[np.ndarray], list[str]]:
    """n samples and their titles: of the class that was asked for, or of all in turn."""
    names = model.config.class_names
    labels = np.arange(options.n) % max(1, len(names))
    if options.note is not None:
        labels = np.full(options.n, names.index(options.note))
    x_0 = sampled(model, options, options.n, labels if names else None, None)
    return list(x_0), [names[i] for i in labels] if names else [f"sample {i}" for i in range(options.n)]


def vocoded(model: DiffWave, options: argparse.Namespace) -> tuple[list[np.ndarray], list[str]]:
    """The sound of a file and n sounds made from its mel spectrogram; prints how far their spectrograms are from it."""
    if model.config.mel is None or options.mel_of is None:
        told = "a mel spectrogram" if model.config.mel else "no mel spectrogram"
        raise ValueError(f"--mel-of is for a vocoder, and a vocoder needs it; this model is told {told}")
    mel = model.config.mel
    original, _ = audio.read_wav(options.mel_of, mel.rate)
    original = original[: len(original) // mel.hop * mel.hop]
    if len(original) < mel.window:
        raise ValueError(
            f"{options.mel_of} is too short for a spectrogram: expected {mel.window} samples at {mel.rate} a second, "
            f"got {len(original)}"
        )
    wanted = mel(original)
    x_0 = sampled(model, options, options.n, None, np.repeat(wanted[None], options.n, axis=0))
    distance = 100 * np.abs(mel(x_0) - wanted).mean()
    print(f"their mel spectrograms are {distance:.1f} dB from the original's, on average")
    return [original, *x_0], ["original", *(f"vocoded {i}" for i in range(options.n))]


def sampled(
    model: DiffWave, options: argparse.Namespace, n: int, label: np.ndarray | None, mel: np.ndarray | None
) -> np.ndarray:
    """n samples on the host, (n, L) in [-1, 1], with a progress bar."""
    how = Sampling(options.sampler, options.steps)
    states = model.sample(n, Rng(options.seed), how, guidance=options.guidance, label=label, mel=mel)
    total = how.steps_of(model.schedule.T) + 1
    *_, x_0 = cli.progress(states, "drawing", total)
    return backend.to_numpy(x_0).clip(-1, 1)


if __name__ == "__main__":
    cli.run(main)
