"""train_text_to_image.py: three stages in order, each gone on with where it stopped; stand-ins take their place."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tinydiff import checkpoint

TRAIN = pathlib.Path(__file__).parents[1] / "examples" / "train_text_to_image.py"
STAGES = {"vae": "train_vae.py", "clip": "train_clip.py", "latent_diffusion": "train_latent_diffusion.py"}

STAND_IN = """
import json, os, pathlib, sys
import numpy as np
from tinydiff import checkpoint
stage, argv = {stage!r}, sys.argv[1:]
with open("calls.txt", "a") as file:
    file.write(json.dumps([stage, *argv]) + chr(10))
if "--resume" in argv:
    folder = pathlib.Path(argv[argv.index("--resume") + 1])
    data = checkpoint.load(folder, stage)[1]["about"]["data"]
else:
    folder, data = (pathlib.Path(argv[argv.index(flag) + 1]) for flag in ("--out", "--data"))
stopped = os.environ.get("STOP") == stage
folder.mkdir(parents=True, exist_ok=True)
meta = dict(kind=stage, settings=dict(steps=4), about=dict(data=str(data)))
checkpoint.save(folder / checkpoint.NAME, dict(losses=np.zeros(2 if stopped else 4, np.float32)), meta)
sys.exit(130 if stopped else 0)
"""


@pytest.fixture
def run(tmp_path):
    """run(..., stop=): the program in a folder of its own; its exit code, what it printed, and the calls of stages."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(TRAIN, scripts)
    for stage, name in STAGES.items():
        (scripts / name).write_text(STAND_IN.format(stage=stage))

    def done(*arguments, stop=""):
        calls = tmp_path / "calls.txt"
        calls.unlink(missing_ok=True)
        command = [sys.executable, scripts / TRAIN.name, *map(str, arguments)]
        environment = {**os.environ, "STOP": stop}
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        lines = calls.read_text().splitlines() if calls.exists() else []
        return found.returncode, found.stdout + found.stderr, [json.loads(line) for line in lines]

    return done


def test_all_stages_in_order(run, tmp_path):
    code, printed, calls = run("--out", "r", "--seed", 3, "--clip-steps", 7, "--device", "cpu")
    assert code == 0 and "text_to_image.py 'a big red circle' --run r" in printed
    usual = "--device cpu --data shapes --seed 3 --out"
    assert [" ".join(call) for call in calls] == [
        f"vae {usual} r/vae",
        f"clip {usual} r/clip --steps 7",
        f"latent_diffusion {usual} r/latent_diffusion --vae r/vae --clip r/clip",
    ]
    code, printed, calls = run("--out", "r")
    assert code == 0 and not calls and printed.count(" is trained: ") == 3


@pytest.mark.parametrize("stage", STAGES)
def test_it_goes_on_with_the_stage_that_was_stopped(run, stage):
    code, printed, calls = run("--out", "r", stop=stage)
    names = list(STAGES)
    assert code == 130 and "to go on:" in printed and "--out r" in printed
    assert [call[0] for call in calls] == names[: names.index(stage) + 1]
    code, printed, calls = run("--out", "r")
    assert code == 0 and [call[0] for call in calls] == names[names.index(stage) :]
    assert calls[0] == [stage, "--resume", f"r/{stage}"]


def test_a_stage_that_fails_ends_it_with_one_line(run, tmp_path):
    (tmp_path / "scripts" / "train_clip.py").write_text("import sys; sys.exit(1)")
    code, printed, calls = run("--out", "r")
    assert code == 1 and "error: train_clip.py did not come to its end" in printed and "Traceback" not in printed
    assert [call[0] for call in calls] == ["vae"]


def test_parts_may_be_given(run, tmp_path):
    checkpoint.save(tmp_path / "v.npz", {"ema/w": np.ones(3)}, {"kind": "vae"})
    code, _, calls = run("--out", "r", "--vae", "v.npz")
    assert code == 0 and [call[0] for call in calls] == ["clip", "latent_diffusion"]
    assert (tmp_path / "r/vae" / checkpoint.NAME).read_bytes() == (tmp_path / "v.npz").read_bytes()


def test_other_data_are_refused(run):
    run("--out", "r", stop="clip")
    code, printed, calls = run("--out", "r", "--data", "fashion")
    assert (
        code == 1 and "error: r/vae was trained on shapes, not fashion; choose another --out" in printed and not calls
    )
