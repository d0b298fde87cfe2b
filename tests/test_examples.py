"""The examples as a person runs them: from another folder, stopped, killed, resumed, and given bad input."""

import json
import os
import pathlib
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tinydiff import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
TRAIN, SAMPLE, CLASSIFY = (ROOT / "examples" / name for name in ("train_mnist.py", "sample.py", "classify_mnist.py"))
TOY = ["--steps", "40", "--batch-size", "32", "--base", "8", "--timesteps", "20", "--lr", "0.1", "--save-every", "0"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TINYDIFF_DEVICE": "cpu", "TINYDIFF_THREADS": "2"}
CHECKPOINT = pathlib.Path("runs/mnist") / checkpoint.NAME


def start(script, *arguments, cwd):
    """A child process that runs an example."""
    line = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(line, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child):
    """What a child printed, after it ended well."""
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return out


def call(monkeypatch, capsys, script, *arguments):
    """Run an example in this process: its exit code and what it printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    monkeypatch.setenv("TINYDIFF_DEVICE", "cpu")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code, *capsys.readouterr()


def weights(path):
    """All that a checkpoint holds, as bytes."""
    arrays, meta = checkpoint.load(path, "pixel-diffusion")
    return {name: array.tobytes() for name, array in arrays.items()}, meta


def assert_picture(path, size=None, frames=1):
    """Fail unless the file is a picture of something: of this size, so many frames, with at least ten shades."""
    with Image.open(path) as picture:
        assert size is None or picture.size == size, picture.size
        assert getattr(picture, "n_frames", 1) == frames
        pixels = np.asarray(picture.convert("L"))
    assert len(np.unique(pixels)) >= 10 and pixels.std() > 5, path


def grid_size(columns, rows, scale):
    return (scale * (30 * columns - 2), scale * (30 * rows - 2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which a toy training ran to its end, uninterrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(start(TRAIN, *TOY, cwd=folder))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """The run of a toy model that was never told a label."""
    folder = tmp_path_factory.mktemp("unlabelled")
    finish(start(TRAIN, *TOY, "--steps", 2, "--no-class-conditional", "--out", folder, cwd=folder))
    return folder


# ----------------------------------------------------------------------------------------------- what a run gives


def test_training_leaves_pictures_and_a_checkpoint(whole):
    run = whole[0] / "runs" / "mnist"
    grids = [f"samples_{step:06d}.png" for step in range(0, 41, 4)]
    others = ["samples.png", "film_strip.png", "denoising.gif", "loss.png", checkpoint.NAME]
    assert sorted(path.name for path in run.iterdir()) == sorted(grids + others)
    for name in (grids[0], *grids[4:]):  # in between, a model that has learned little draws everything grey
        assert_picture(run / name, grid_size(10, 4, 2))
    assert_picture(run / "samples.png", grid_size(10, 10, 2))
    assert_picture(run / "film_strip.png", grid_size(10, 8, 2))
    assert_picture(run / "denoising.gif", grid_size(5, 4, 2), frames=11)
    assert_picture(run / "loss.png")
    assert (run / grids[0]).read_bytes() != (run / grids[-1]).read_bytes()


def test_the_command_it_prints_draws_more(whole):
    folder, printed = whole
    line = shlex.split(printed.strip().splitlines()[-1])
    assert "sample.py" in line[1] and line[2] == "runs/mnist"
    subprocess.run([sys.executable, *line[1:]], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    assert_picture(folder / "runs" / "mnist" / "grid.png", grid_size(8, 8, 2))


def test_a_second_run_takes_another_folder(whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / CHECKPOINT).read_bytes()
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(monkeypatch, capsys, TRAIN, *TOY, "--steps", 1)
    assert code == 0 and "runs/mnist-2" in out
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert len(checkpoint.load("runs/mnist-2", "pixel-diffusion")[0]["losses"]) == 1
    code, out, _ = call(monkeypatch, capsys, TRAIN, "--resume")
    assert code == 0 and "after step 1" in out and "runs/mnist-2" in out


def test_minutes_are_a_number_of_steps(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    code, *_ = call(monkeypatch, capsys, TRAIN, *TOY[2:], "--minutes", 0.003, "--out", out)
    arrays, meta = checkpoint.load(out, "pixel-diffusion")
    assert code == 0 and len(arrays["losses"]) == meta["settings"]["steps"] == meta["about"]["steps"] >= 1


def test_the_recipe_of_the_deck(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    code, *_ = call(monkeypatch, capsys, TRAIN, *TOY, "--steps", 2, "--recipe", "ddpm", "--out", out)
    _, meta = checkpoint.load(out, "pixel-diffusion")
    assert code == 0
    config, settings = meta["config"], meta["settings"]
    assert (config["schedule"], config["target"], config["weighting"]) == ("linear", "eps", "plain")
    assert config["unet"]["classes"] is None and config["class_names"] == ()
    assert settings["final_lr"] == settings["lr"] and not config["stratified"] and meta["about"]["shift"] == 0


def test_data_in_a_folder(tmp_path, monkeypatch, capsys):
    write_idx(tmp_path / "data")
    code, *_ = call(
        monkeypatch, capsys, TRAIN, *TOY, "--steps", 2, "--data", tmp_path / "data", "--out", tmp_path / "r"
    )
    assert code == 0
    monkeypatch.chdir("/")
    code, *_ = call(monkeypatch, capsys, TRAIN, "--resume", tmp_path / "r")
    assert code == 0


# ----------------------------------------------------------------------------------------------- stopped and resumed


def half_written():
    """The temporary file of a checkpoint that is being written."""
    return list(CHECKPOINT.parent.glob(f".{CHECKPOINT.name}.*.tmp"))


def wait_for_saves(child, n):
    """Wait until a training process has replaced its checkpoint n times, or ended."""
    seen = set()
    while child.poll() is None and len(seen) <= n:
        if CHECKPOINT.exists():
            seen.add(CHECKPOINT.stat().st_mtime_ns)


def kill_while_saving(child):
    """Kill a training process between the start and the end of a save: pause it there first, to be sure."""
    while child.poll() is None:
        if half_written():
            child.send_signal(signal.SIGSTOP)
            time.sleep(0.02)  # a signal takes a moment to arrive
            if half_written():
                break
            child.send_signal(signal.SIGCONT)
    child.kill()


def test_killed_at_any_moment_and_resumed_it_ends_in_the_same_bits(whole, tmp_path, monkeypatch):
    """SIGKILL while a checkpoint is being written, and three times at some moment of some step; then to the end."""
    monkeypatch.chdir(tmp_path)
    child = start(TRAIN, *TOY, cwd=tmp_path)
    wait_for_saves(child, 3)
    kill_while_saving(child)
    assert child.wait() == -signal.SIGKILL and half_written()
    resume = ["--resume", CHECKPOINT.parent, "--save-every", "0"]
    for n, delay in zip((2, 9, 5), np.random.default_rng(0).uniform(0, 0.03, 3), strict=True):
        child = start(TRAIN, *resume, cwd=tmp_path)
        wait_for_saves(child, n)
        time.sleep(delay)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert len(checkpoint.load(CHECKPOINT, "pixel-diffusion")[0]["losses"]) < 40
    finish(start(TRAIN, *resume, cwd=tmp_path))
    assert weights(CHECKPOINT) == weights(whole[0] / CHECKPOINT)
    assert not half_written()
    for name in ("samples.png", "film_strip.png", "loss.png"):
        assert (CHECKPOINT.parent / name).read_bytes() == (whole[0] / CHECKPOINT.parent / name).read_bytes()


def test_ctrl_c_saves_and_prints_the_command_that_resumes(whole, tmp_path):
    child = start(TRAIN, *TOY, cwd=tmp_path)
    while child.poll() is None and not (tmp_path / "runs/mnist/samples_000004.png").exists():
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in err
    stopped_after = len(checkpoint.load(tmp_path / CHECKPOINT, "pixel-diffusion")[0]["losses"])
    assert 4 <= stopped_after < 40 and f"stopped after step {stopped_after} of 40" in err
    line = shlex.split(err.strip().splitlines()[-1])
    assert line[2:] == ["--resume", "runs/mnist"]
    subprocess.run([sys.executable, *line[1:]], cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    assert weights(tmp_path / CHECKPOINT) == weights(whole[0] / CHECKPOINT)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    child = start(TRAIN, *TOY, "--lr", "1e30", cwd=tmp_path)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and "Traceback" not in err and "Warning" not in err
    message = err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "step" in message and "last good checkpoint" in message
    arrays, _ = checkpoint.load(tmp_path / CHECKPOINT, "pixel-diffusion")
    assert all(np.isfinite(array).all() for array in arrays.values())


# ----------------------------------------------------------------------------------------------- drawing more


def draw(monkeypatch, capsys, tmp_path, run, *arguments):
    """The array that sample.py saves."""
    out = ["--out", tmp_path / "grid.png", "--save-array", tmp_path / "s.npz"]
    code, _, err = call(monkeypatch, capsys, SAMPLE, run, *out, *arguments)
    assert code == 0, err
    with np.load(tmp_path / "s.npz") as saved:
        assert saved.files == ["samples"]
        return saved["samples"]


def test_samples_as_an_array(whole, tmp_path, monkeypatch, capsys):
    run = whole[0] / "runs" / "mnist"
    first = draw(monkeypatch, capsys, tmp_path, run, "--n", 7, "--batch-size", 3, "--steps", 4)
    assert first.shape == (7, 28, 28) and first.dtype == np.float32
    assert 0 <= first.min() < first.max() <= 1 and len(np.unique(first, axis=0)) == 7
    assert_picture(tmp_path / "grid.png", grid_size(3, 3, 2))
    with Image.open(tmp_path / "grid.png") as picture:
        shown = np.asarray(picture)[:56:2, :56:2]
    assert np.abs(shown / 255 - first[0]).max() <= 0.5 / 255 + 1e-6
    options = ("--n", 7, "--batch-size", 3, "--steps", 4)
    assert np.array_equal(first, draw(monkeypatch, capsys, tmp_path, run / checkpoint.NAME, *options))
    assert not np.array_equal(first, draw(monkeypatch, capsys, tmp_path, run, *options, "--seed", 1))
    assert not np.array_equal(first, draw(monkeypatch, capsys, tmp_path, run, *options, "--sampler", "ddpm"))
    assert draw(monkeypatch, capsys, tmp_path, run, "--n", 2, "--sampler", "ddpm").shape == (2, 28, 28)


def test_samples_with_label_and_guidance(whole, tmp_path, monkeypatch, capsys):
    def digits(*arguments):
        run = whole[0] / CHECKPOINT.parent
        return draw(monkeypatch, capsys, tmp_path, run, "--n", 3, "--steps", 2, *arguments)

    assert not np.array_equal(digits("--label", 1), digits("--label", 7))
    assert not np.array_equal(digits("--label", 7, "--guidance", 1), digits("--label", 7, "--guidance", 4))
    assert np.array_equal(digits(), digits("--guidance", 1.5))


def test_samples_of_an_unlabelled_model(unlabelled, tmp_path, monkeypatch, capsys):
    assert draw(monkeypatch, capsys, tmp_path, unlabelled, "--n", 2, "--steps", 2).shape == (2, 28, 28)


def test_samples_are_of_the_averaged_weights(whole, tmp_path, monkeypatch, capsys):
    """With the weights themselves swapped for noise the samples stay; with the averages swapped they change."""
    arrays, meta = checkpoint.load(whole[0] / CHECKPOINT, "pixel-diffusion")
    pictures = {}
    for spoilt in ("nothing", "model", "ema"):
        changed = {name: a + 1 if name.startswith(spoilt) else a for name, a in arrays.items()}
        checkpoint.save(tmp_path / "spoilt.npz", changed, meta)
        pictures[spoilt] = draw(monkeypatch, capsys, tmp_path, tmp_path / "spoilt.npz", "--n", 2, "--steps", 2)
    assert np.array_equal(pictures["nothing"], pictures["model"])
    assert not np.array_equal(pictures["nothing"], pictures["ema"])


# ----------------------------------------------------------------------------------------------- the classifier


def test_classifier(tmp_path, monkeypatch, capsys):
    options = ("--steps", 25, "--batch-size", 16, "--out", tmp_path / "c")
    code, out, _ = call(monkeypatch, capsys, CLASSIFY, *options)
    assert code == 0
    share = float(out.split("%")[0].split()[-1])
    assert 20 < share <= 100 and "of the 500 test images" in out  # one in ten by chance
    assert_picture(tmp_path / "c" / "confusion.png")
    assert_picture(tmp_path / "c" / "mistakes.png")
    code, again, _ = call(monkeypatch, capsys, CLASSIFY, "--resume", tmp_path / "c")
    assert code == 0 and again.splitlines()[1:] == out.splitlines()[1:]  # all but where it began


# ----------------------------------------------------------------------------------------------- bad input


def write_idx(folder, n=40, images_magic=2051, cut=0, labels=None):
    """The four files of MNIST with n random images, optionally wrong."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    labels = np.arange(n, dtype=np.uint8) % 10 if labels is None else labels
    for split in ("train", "t10k"):
        content = np.array([images_magic, n, 28, 28], ">u4").tobytes() + images.tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(content[: len(content) - cut])
        head = np.array([2049, len(labels)], ">u4").tobytes()
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def test_refused(whole, unlabelled, tmp_path, monkeypatch, capsys):
    """Each bad input gives one line on stderr that says what is wrong, a non-zero exit code, and changes no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYDIFF_CACHE", str(tmp_path / "cache"))
    write_idx(tmp_path / "cut", cut=5)
    write_idx(tmp_path / "magic", images_magic=1234)
    write_idx(tmp_path / "uneven", labels=np.zeros(7, np.uint8))
    run = tmp_path / "run"
    shutil.copytree(whole[0] / "runs" / "mnist", run)
    good = (run / checkpoint.NAME).read_bytes()
    (tmp_path / "short.npz").write_bytes(good[:-1000])
    (tmp_path / "pickle.npz").write_bytes(b"\x80\x04K\x01.")
    arrays, meta = checkpoint.load(run, "pixel-diffusion")
    checkpoint.save(tmp_path / "other.npz", arrays, meta | {"kind": "classifier"})
    text = json.dumps(meta | {"format": checkpoint.FORMAT + 1}).encode()
    np.savez(tmp_path / "newer.npz", meta=np.frombuffer(text, np.uint8), **arrays)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "cache" / "full").mkdir(parents=True)
    (tmp_path / "cache" / "full" / "train-images-idx3-ubyte.gz").write_bytes(b"not the right file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def no_network(*args, **options):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    new = (*TOY[2:], "--steps", 1, "--out", "new")
    cases = [
        (TRAIN, (*new, "--data", "nowhere"), "'nowhere' is not a folder"),
        (TRAIN, (*new, "--data", "cut"), "truncated"),
        (TRAIN, (*new, "--data", "magic"), "wrong magic number: expected 2051"),
        (TRAIN, (*new, "--data", "uneven"), "40 images but"),
        (TRAIN, (*new, "--data", "full"), "checksum mismatch"),
        (TRAIN, (*new, "--data", "fashion"), "Network is unreachable"),
        (TRAIN, (*new, "--timesteps", 0), "T >= 1"),
        (TRAIN, (*new, "--steps", 0), "at least 1, got 0"),
        (TRAIN, (*TOY[2:], "--out", "new", "--minutes", -1), "more than 0, got -1"),
        (TRAIN, (*new, "--lr", -1), "got"),
        (TRAIN, (*new, "--batch-size", 0), "got 0"),
        (TRAIN, (*new, "--batch-size", 4501), "got 4501"),
        (TRAIN, (*new, "--seed", -1), "got -1"),
        (TRAIN, (*new, "--sample-every", -1), "at least 0, got -1"),
        (TRAIN, (*new, "--base", 12), "must divide"),
        (TRAIN, (*new, "--multipliers", "1,2,2"), "8 divides, got 28 x 28"),
        (TRAIN, (*new, "--device", "cuda"), "device 'cuda' cannot be used"),
        (TRAIN, ("--out", "file/run"), "file is not a folder"),
        (TRAIN, ("--out", "run"), "holds a run already"),
        (TRAIN, ("--resume", "run", "--lr", 1), "leave out --lr"),
        (TRAIN, ("--resume", "nowhere"), "there is no checkpoint"),
        (TRAIN, ("--resume",), "there is no checkpoint runs/mnist"),
        (TRAIN, ("--resume", "short.npz"), "cut short"),
        (TRAIN, ("--resume", "pickle.npz"), "pickle"),
        (TRAIN, ("--resume", "newer.npz"), "newer"),
        (TRAIN, ("--resume", "other.npz"), "another model"),
        (SAMPLE, ("nowhere",), "there is no checkpoint"),
        (SAMPLE, ("short.npz",), "cut short"),
        (SAMPLE, ("pickle.npz",), "pickle"),
        (SAMPLE, ("newer.npz",), "newer"),
        (SAMPLE, ("other.npz",), "another model"),
        (SAMPLE, ("file",), "not a checkpoint"),
        (SAMPLE, ("run", "--n", 0), "at least 1, got 0"),
        (SAMPLE, ("run", "--batch-size", 0), "at least 1"),
        (SAMPLE, ("run", "--steps", 21), "1..20"),
        (SAMPLE, ("run", "--steps", 0), "1..20"),
        (SAMPLE, (unlabelled, "--label", 3, "--out", "grid.png"), "without classes"),
        (SAMPLE, (unlabelled, "--guidance", 3, "--out", "grid.png"), "without labels"),
        (SAMPLE, ("run", "--seed", -1), "got -1"),
        (SAMPLE, ("run", "--device", "cuda"), "device 'cuda' cannot be used"),
        (SAMPLE, ("run", "--out", "file/grid.png"), "file is not a folder"),
        (SAMPLE, ("run", "--save-array", "file/s.npz"), "file is not a folder"),
        (SAMPLE, ("run", "--label", 10), "0..9, got 10"),
        (SAMPLE, ("run", "--label", -1), "0..9, got -1"),
        (CLASSIFY, ("--data", "nowhere"), "'nowhere' is not a folder"),
        (CLASSIFY, ("--resume", "run"), "expected 'classifier', got 'pixel-diffusion'"),
        (CLASSIFY, ("--out", "run"), "holds a run already"),
    ]
    for script, arguments, words in cases:
        code, out, err = call(monkeypatch, capsys, script, *arguments)
        case = f"{script.name} {arguments}: {code} {out} {err}"
        assert code == 1 and words in err and "Traceback" not in err, case
        assert err.startswith("error: ") and (err.count("\n") == 1 or "fashion" in arguments), case
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    "arguments", [["--schedule", "square"], ["--steps", "many"], ["--steps", "1", "--minutes", "1"]]
)
def test_usage_errors(monkeypatch, capsys, arguments):
    code, _, err = call(monkeypatch, capsys, TRAIN, *arguments)
    assert code == 2 and "usage:" in err and "error: argument" in err


@pytest.mark.parametrize("script", [TRAIN, SAMPLE, CLASSIFY])
def test_help_teaches(monkeypatch, capsys, script):
    code, out, _ = call(monkeypatch, capsys, script, "--help")
    assert code == 0 and f"python examples/{script.name}" in out and "default" in out


def test_an_error_can_be_traced(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYDIFF_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["sample.py", str(tmp_path)])
    with pytest.raises(checkpoint.CheckpointError):
        runpy.run_path(str(SAMPLE), run_name="__main__")
