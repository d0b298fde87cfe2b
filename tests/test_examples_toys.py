"""toys.py as a person runs it: what a run leaves, stopped and resumed, bad input."""

import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.test_examples import ENVIRONMENT, assert_picture, call, start
from tinydiff import checkpoint

TOYS = pathlib.Path(__file__).parents[1] / "examples" / "toys.py"
SMALL = ["--steps", "150", "--batch-size", "32", "--width", "16", "--timesteps", "25", "--lr", "0.01", "--n", "60"]


def arrays(folder):
    """All that a run's checkpoint holds, as bytes."""
    return {name: a.tobytes() for name, a in checkpoint.load(folder, "toy")[0].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a toy run of the default figure, uninterrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("toys")
    child = start(TOYS, *SMALL, cwd=folder)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return folder / "runs" / "toys", out


def test_a_run_leaves_pictures_and_a_checkpoint(whole):
    folder, printed = whole
    names = ["samples.png", "particles.gif", "field.gif", "loss.png", checkpoint.NAME]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert_picture(folder / "samples.png")
    assert_picture(folder / "loss.png")
    assert_picture(folder / "particles.gif", frames=26)  # x_T, ..., x_0
    assert_picture(folder / "field.gif", frames=26)
    assert (folder / "field.gif").read_bytes() != (folder / "particles.gif").read_bytes()
    assert "moons" in printed and "spirals --steps 6000" in shlex.join(shlex.split(printed.splitlines()[-1]))


def test_a_finished_run_draws_one_class_with_guidance(whole, tmp_path, monkeypatch, capsys):
    pictures = [(whole[0] / "samples.png").read_bytes()]
    for guidance in (1, 3):
        run = tmp_path / str(guidance)
        shutil.copytree(whole[0], run)
        code, _, err = call(monkeypatch, capsys, TOYS, "--resume", run, "--n", 60, "--label", 1, "--guidance", guidance)
        assert code == 0, err
        assert_picture(run / "samples.png")
        pictures.append((run / "samples.png").read_bytes())
        assert arrays(run) == arrays(whole[0])
    assert len(set(pictures)) == 3


def test_ctrl_c_saves_and_the_command_it_prints_ends_in_the_same_bits(whole, tmp_path):
    child = start(TOYS, *SMALL, "--steps", 600, cwd=tmp_path)
    while child.poll() is None and not (tmp_path / "runs/toys" / checkpoint.NAME).exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in err and "stopped after step" in err
    line = shlex.split(err.strip().splitlines()[-1])
    assert line[2:] == ["--resume", "runs/toys"]
    stopped = checkpoint.load(tmp_path / "runs/toys", "toy")[0]
    done = subprocess.run([sys.executable, *line[1:], "--n", "20"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr
    losses = checkpoint.load(tmp_path / "runs/toys", "toy")[0]["losses"]
    n = len(stopped["losses"])
    assert len(losses) == 600 and np.array_equal(losses[:n], stopped["losses"])


def test_refused(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    cases = [
        (("--n", 0), "--n must be at least 1, got 0"),
        (("--steps", 0), "at least 1, got 0"),
        (("--timesteps", 0), "T >= 1"),
        (("--width", 7), "even width"),
        (("--lr", -1), "got"),
        (("--batch-size", 0), "got 0"),
        (("--label", 2), "moons has the labels 0..1, got --label 2"),
        (("swiss_roll", "--label", -1), "labels 0..0, got --label -1"),
        (("--seed", -1), "got -1"),
        (("--guidance", "nan"), "--guidance must be a finite number, got nan"),
        (("--device", "cuda"), "device 'cuda' cannot be used"),
        (("--out", "file/run"), "file is not a folder"),
        (("--out", whole[0]), "holds a run already"),
        (("--resume", "nowhere"), "there is no checkpoint"),
    ]
    for arguments, words in cases:
        code, out, err = call(monkeypatch, capsys, TOYS, *arguments)
        case = f"{arguments}: {code} {out} {err}"
        assert code == 1 and words in err and "Traceback" not in err, case
        assert err.startswith("error: ") and err.count("\n") == 1, case
    code, _, err = call(monkeypatch, capsys, TOYS, "sun")
    assert code == 2 and "usage:" in err and "checkerboard" in err


def test_an_exported_run_is_not_resumed(whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "exported"
    checkpoint.export(whole[0], run / checkpoint.NAME)
    code, _, err = call(monkeypatch, capsys, TOYS, "--resume", run)
    assert code == 1 and "was exported" in err and len(err.splitlines()) == 1


def test_help_teaches(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, TOYS, "--help")
    assert code == 0 and "python examples/toys.py" in out and "Algorithm 1" in out and "default" in out
