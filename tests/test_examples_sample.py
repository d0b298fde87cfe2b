"""The flags of sample.py that choose a sampler, on a model with random weights."""

import dataclasses
import pathlib
import runpy
import sys

import numpy as np
import pytest

from tinydiff import Rng, checkpoint
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig
from tinydiff.nn import UNetConfig

SAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "sample.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the checkpoint of a small model that learned a variance, as training writes it."""
    unet = UNetConfig(base=4, multipliers=(1,), blocks=1, attention=(), groups=2)
    config = PixelDiffusionConfig(unet, size=(8, 8), T=30, learned_variance=True)
    model = PixelDiffusion(config, Rng(0))
    weights = {
        f"ema/{name}": 0.3 * Rng(1).at(i).normal(p.shape) for i, (name, p) in enumerate(model.state_dict().items())
    }
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / checkpoint.NAME, weights, {"kind": model.kind, "config": dataclasses.asdict(config)})
    return folder


@pytest.fixture
def sample(run, tmp_path, monkeypatch, capsys):
    """Calls sample.py with some flags: the exit code, the array it drew or None, and stderr."""

    def call(*flags):
        array = tmp_path / "s.npz"
        array.unlink(missing_ok=True)
        where = ("--n", 3, "--out", tmp_path / "grid.png", "--save-array", array)
        monkeypatch.setattr(sys, "argv", [str(SAMPLE), *map(str, (run, *where, *flags))])
        monkeypatch.setenv("TINYDIFF_DEVICE", "cpu")
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SAMPLE), run_name="__main__")
        return stop.value.code, np.load(array)["samples"] if array.exists() else None, capsys.readouterr().err

    return call


def test_each_choice_draws_something_else(sample):
    choices = [
        (),
        ("--sampler", "ddim", "--steps", 5),
        ("--sampler", "ddim", "--steps", 5, "--eta", 0.5),
        ("--sampler", "ddim", "--steps", 5, "--spacing", "leading"),
        ("--sampler", "ddim", "--steps", 5, "--no-clip"),
        ("--sampler", "heun", "--steps", 5),
        ("--sampler", "dpm", "--steps", 5),
        ("--sampler", "ddpm", "--steps", 5),
        ("--sampler", "ddpm", "--steps", 5, "--variance", "posterior"),
        ("--sampler", "ddpm", "--steps", 5, "--variance", "beta"),
        ("--sampler", "ddpm"),
    ]
    drawn = []
    for flags in choices:
        code, array, err = sample(*flags)
        assert code == 0 and array.shape == (3, 8, 8), (flags, err)
        drawn.append(array.tobytes())
    assert len(set(drawn)) == len(choices)
    learned = sample("--sampler", "ddpm", "--steps", 5, "--variance", "learned")[1]
    assert learned.tobytes() == drawn[7]  # the default of a model that learned one


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--sampler", "heun", "--steps", 31), "1..30, the T of this model, got 31"),
        (("--sampler", "dpm", "--steps", 0), "1..30, the T of this model, got 0"),
        (("--eta", 2), "eta must lie in [0, 1], got 2.0"),
        (("--sampler", "dpm", "--eta", 0.5), "eta is for the sampler ddim"),
        (("--variance", "beta"), "a variance is for the sampler ddpm"),
    ],
)
def test_refused_in_one_line(sample, flags, words):
    code, array, err = sample(*flags)
    assert code == 1 and array is None and err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("flags", [("--sampler", "euler"), ("--spacing", "even"), ("--variance", "fixed")])
def test_usage_errors_name_the_choices(sample, flags):
    code, array, err = sample(*flags)
    assert code == 2 and array is None and "choose from" in err
