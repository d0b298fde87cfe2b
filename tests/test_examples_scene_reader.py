"""train_scene_reader.py at toy size: what it writes and says, stopped and resumed, and what it refuses."""

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
from tinydiff.__main__ import main as tinydiff_main
from tinydiff.models import SceneReader

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "train_scene_reader.py"
TOY = ["--steps", 4, "--batch-size", 4, "--width", 2, "--tested", 6, "--save-every", 0]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the example in this process: its exit code and what it printed to stdout and stderr."""
    monkeypatch.setenv("TINYDIFF_DEVICE", "cpu")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


def contents(path):
    arrays, meta = checkpoint.load(path, SceneReader.kind)
    return {name: array.tobytes() for name, array in arrays.items()}, meta


def test_from_training_to_a_small_file(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(*TOY)
    assert code == 0 and out.count("2 things: colour") == 2 and "held-out, 1 thing: colour" in out
    run = tmp_path / "runs" / "scene_reader"
    names = [f"readings_{step:06d}.png" for step in range(5)]
    assert sorted(path.name for path in run.iterdir()) == sorted([*names, "checkpoint.npz", "loss.png", "mistakes.png"])
    for name in (names[-1], "mistakes.png"):
        with Image.open(run / name) as picture:
            assert picture.size == (2 * (10 * 34 - 2), 2 * (2 * 34 - 2)) and np.asarray(picture).std() > 20
    assert call(*TOY)[1].count("runs/scene_reader-2") >= 1

    line = shlex.split(out.strip().splitlines()[-1])
    assert line[:3] == ["python", "-m", "tinydiff"]
    monkeypatch.setattr(sys, "argv", line[2:])
    tinydiff_main()
    assert SceneReader.load(line[-1]).config.width == 2


def test_stopped_and_resumed_it_ends_in_the_same_bits(call, tmp_path, monkeypatch):
    code, whole, _ = call(*TOY, "--out", tmp_path / "whole")
    assert code == 0
    embed, calls = SceneReader.embed, iter(range(100))

    def interrupted(self, x):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return embed(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(SceneReader, "embed", interrupted)
        code, _, err = call(*TOY, "--out", tmp_path / "stopped")
    assert code == 130 and "of 4 and saved" in err and "--resume" in err
    code, resumed, _ = call(*shlex.split(err.strip().splitlines()[-1])[2:])
    assert code == 0 and "going on after step" in resumed
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert resumed.splitlines()[1:5] == whole.splitlines()[1:5]  # how well it reads


def test_it_is_tested_with_the_averaged_weights(call, tmp_path, monkeypatch):
    read, weights = SceneReader.read, []

    def noting(self, images):
        weights.append(self.thing.weight.numpy().copy())
        return read(self, images)

    monkeypatch.setattr(SceneReader, "read", noting)
    assert call(*TOY, "--out", tmp_path)[0] == 0
    assert np.array_equal(weights[-1], SceneReader.load(tmp_path).thing.weight.numpy())


def test_minutes_are_a_number_of_steps(call, tmp_path):
    code, *_ = call(*TOY[2:], "--minutes", 0.001, "--out", tmp_path)
    arrays, meta = checkpoint.load(tmp_path, SceneReader.kind)
    assert code == 0 and len(arrays["losses"]) == meta["about"]["steps"] >= 1


def test_refused(call, tmp_path, monkeypatch):
    """Each bad input gives one line on stderr that says what is wrong, and a non-zero exit code."""
    monkeypatch.chdir(tmp_path)
    assert call(*TOY, "--steps", 1, "--out", "run")[0] == 0
    checkpoint.save(tmp_path / "other.npz", {}, {"kind": "mnist-classifier"})
    new = (*TOY[2:], "--steps", 1, "--out", "new")
    cases = [
        ((*new, "--steps", 0), "at least 1, got 0"),
        ((*new, "--width", 0), "at least 1, got"),
        ((*new, "--tested", 0), "to test on must be at least 1, got 0"),
        ((*new, "--batch-size", 0), "--batch-size must be at least 1, got 0"),
        ((*new, "--lr", -1), "got"),
        ((*new, "--seed", -1), "got -1"),
        ((*new, "--sample-every", -1), "at least 0, got -1"),
        ((*TOY[2:], "--out", "new", "--minutes", -1), "more than 0, got -1"),
        ((*new, "--device", "cuda"), "device 'cuda' cannot be used"),
        (("--out", "run"), "holds a run already"),
        (("--resume", "run", "--lr", 1), "leave out --lr"),
        (("--resume", "nowhere"), "there is no checkpoint"),
        (("--resume", "other.npz"), "another model"),
    ]
    for arguments, words in cases:
        code, out, err = call(*arguments)
        case = f"{arguments}: {code} {out} {err}"
        assert code == 1 and words in err and err.startswith("error: ") and err.count("\n") == 1, case


def test_help_teaches(call):
    code, out, _ = call("--help")
    assert code == 0 and "python examples/train_scene_reader.py" in out and "default" in out
