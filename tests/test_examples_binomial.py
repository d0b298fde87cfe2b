"""train_binomial.py and sample_binomial.py as a person runs them: the whole way, stopped and resumed, and bad input."""

import os
import pathlib
import runpy
import shlex
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from tinydiff import checkpoint
from tinydiff.models import BinomialDiffusion

ROOT = pathlib.Path(__file__).parents[1]
TRAIN, SAMPLE = (ROOT / "examples" / name for name in ("train_binomial.py", "sample_binomial.py"))
TOY = ["--steps", 6, "--batch-size", 16, "--base", 8, "--timesteps", 8, "--save-every", 0]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run an example in this process: its exit code and what it printed to stdout and stderr."""
    monkeypatch.setenv("TINYDIFF_DEVICE", "cpu")

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


def assert_picture(path, size=None):
    with Image.open(path) as picture:
        assert size is None or picture.size == size, picture.size
        assert np.asarray(picture.convert("L")).std() > 5, path


def contents(path):
    arrays, meta = checkpoint.load(path, "binomial")
    return {name: array.tobytes() for name, array in arrays.items()}, meta


def test_the_heartbeat(call, tmp_path, monkeypatch):
    """From the training to the samples, by the command that it prints."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(TRAIN, *TOY)
    assert code == 0 and "bits a sample" in out and "cost 14.4" in out  # 20 bits that are 1 with probability 1/5
    run = tmp_path / "runs" / "binomial"
    pictures = ["samples.png", "film_strip.png", "denoising.gif", "loss.png", "bound.png"]
    grids = [f"samples_{step:06d}.png" for step in range(7)]
    assert sorted(path.name for path in run.iterdir()) == sorted([*pictures, *grids, checkpoint.NAME])
    for name in (*pictures, grids[0], grids[-1]):
        assert_picture(run / name)
    assert_picture(run / "samples.png", (8 * 20, 8 * 100))

    line = shlex.split(out.strip().splitlines()[-1])
    assert line[1].endswith("sample_binomial.py")
    code, out, _ = call(SAMPLE, *line[2:], "--save-array", "beats.npz")
    assert code == 0 and "64 samples in runs/binomial/grid.png" in out
    assert_picture(run / "grid.png", (8 * 20, 8 * 64))
    samples = np.load("beats.npz")["samples"]
    assert samples.shape == (64, 1, 20) and set(np.unique(samples)) <= {0, 1}

    code, out, _ = call(TRAIN, *TOY)
    assert code == 0 and "runs/binomial-2" in out


def test_digits(call, tmp_path):
    run = tmp_path / "digits"
    code, out, _ = call(TRAIN, *TOY, "--steps", 1, "--timesteps", 3, "--data", "embedded", "--out", run)
    assert code == 0 and "4,500 samples of embedded" in out and "the bound on 200 test samples" in out
    for name in ("samples.png", "film_strip.png"):
        assert_picture(run / name)
    code, out, _ = call(SAMPLE, run, "--n", 4, "--steps", 2, "--out", tmp_path / "four.png")
    assert code == 0
    assert_picture(tmp_path / "four.png", (2 * 58, 2 * 58))


def test_stopped_and_resumed_it_ends_in_the_same_bits(call, tmp_path, monkeypatch):
    code, whole, _ = call(TRAIN, *TOY, "--out", tmp_path / "whole")
    assert code == 0
    draw, steps = BinomialDiffusion.draw, iter(range(100))

    def interrupted(self, x_0, rng):
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, x_0, rng)

    with monkeypatch.context() as patch:
        patch.setattr(BinomialDiffusion, "draw", interrupted)
        code, _, err = call(TRAIN, *TOY, "--out", tmp_path / "stopped")
    assert code == 130 and "stopped after step 3 of 6" in err and "--resume" in err
    code, resumed, _ = call(TRAIN, *shlex.split(err.strip().splitlines()[-1])[2:])
    assert code == 0 and "going on after step 3" in resumed
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert resumed.splitlines()[1] == whole.splitlines()[1]  # the bound


def test_minutes_are_a_number_of_steps(call, tmp_path):
    code, *_ = call(TRAIN, *TOY[2:], "--minutes", 0.001, "--out", tmp_path)
    arrays, meta = checkpoint.load(tmp_path, "binomial")
    assert code == 0 and len(arrays["losses"]) == meta["settings"]["steps"] == meta["about"]["steps"] >= 1


def test_refused(call, tmp_path, monkeypatch):
    """Each bad input gives one line on stderr that says what is wrong, and a non-zero exit code."""
    monkeypatch.chdir(tmp_path)
    assert call(TRAIN, *TOY, "--steps", 1, "--out", "run")[0] == 0
    checkpoint.save(tmp_path / "other.npz", {}, {"kind": "mnist-classifier"})
    new = (*TOY[2:], "--steps", 1, "--out", "new")
    cases = [
        (TRAIN, (*new, "--data", "nowhere"), "'nowhere' is not a folder"),
        (TRAIN, (*new, "--timesteps", 0), "T=0"),
        (TRAIN, (*new, "--steps", 0), "at least 1, got 0"),
        (TRAIN, (*new, "--lr", -1), "got"),
        (TRAIN, (*new, "--batch-size", 0), "got 0"),
        (TRAIN, (*new, "--batch-size", 1001), "got 1001"),
        (TRAIN, (*new, "--data", "embedded", "--base", 12), "must divide"),
        (TRAIN, (*new, "--seed", -1), "got -1"),
        (TRAIN, (*new, "--sample-every", -1), "at least 0, got -1"),
        (TRAIN, (*TOY[2:], "--out", "new", "--minutes", -1), "more than 0, got -1"),
        (TRAIN, (*new, "--device", "cuda"), "device 'cuda' cannot be used"),
        (TRAIN, ("--out", "run"), "holds a run already"),
        (TRAIN, ("--resume", "run", "--lr", 1), "leave out --lr"),
        (TRAIN, ("--resume", "nowhere"), "there is no checkpoint"),
        (TRAIN, ("--resume",), "there is no checkpoint runs/binomial"),
        (TRAIN, ("--resume", "other.npz"), "another model"),
        (SAMPLE, ("nowhere",), "there is no checkpoint"),
        (SAMPLE, ("other.npz",), "another model"),
        (SAMPLE, ("run", "--n", 0), "at least 1, got 0"),
        (SAMPLE, ("run", "--steps", 9), "1..8"),
        (SAMPLE, ("run", "--steps", 0), "1..8"),
        (SAMPLE, ("run", "--seed", -1), "got -1"),
        (SAMPLE, ("run", "--out", "other.npz/grid.png"), "not a folder"),
        (SAMPLE, ("run", "--device", "cuda"), "device 'cuda' cannot be used"),
    ]
    for script, arguments, words in cases:
        code, out, err = call(script, *arguments)
        case = f"{script.name} {arguments}: {code} {out} {err}"
        assert code == 1 and words in err and err.startswith("error: ") and err.count("\n") == 1, case


@pytest.mark.parametrize("script", [TRAIN, SAMPLE])
def test_help_teaches(call, script):
    code, out, _ = call(script, "--help")
    assert code == 0 and f"python examples/{script.name}" in out and "default" in out
