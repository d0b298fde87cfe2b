"""Training CLIP as a person does: on shapes, on digits, on a folder, resumed, and misused; then searching with it."""

import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.test_examples import ENVIRONMENT, ROOT, assert_picture, call
from tinydiff import Rng, checkpoint
from tinydiff.data.captioned import Shapes
from tinydiff.image import save_png
from tinydiff.models.clip import CLIP

TRAIN, RETRIEVE = ROOT / "examples" / "train_clip.py", ROOT / "examples" / "retrieve.py"
TOY = [
    *("--steps", 3, "--batch-size", 8, "--width", 8, "--layers", 1, "--heads", 2, "--embedding", 8, "--patch", 8),
    *("--sample-every", 0, "--vocabulary", 300, "--length", 40, "--read", 100),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a run on shapes, and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    line = [sys.executable, TRAIN, *TOY]
    done = subprocess.run([*map(str, line)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A folder to work in, with a copy of the run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_and_its_resumption(whole, copied, monkeypatch, capsys):
    run = copied / "runs" / "clip"
    assert "shapes, 300 tokens, captions such as 'a" in whole[1]
    for name in ("cosines_000000.png", "cosines_000003.png", "loss.png"):
        assert_picture(run / name)
    values = dict(line.rsplit(" ", 1) for line in whole[1].splitlines() if line.endswith("%"))
    names = {name.strip() for name in values}
    assert len(values) == 7 and all(0 <= float(value[:-1]) <= 100 for value in values.values())
    for name in ("recall@5 among 500 held-out pairs, text to image", "zero-shot place of 500 held-out things"):
        assert name in names
    saved = (run / checkpoint.NAME).read_bytes()
    code, again, _ = call(monkeypatch, capsys, TRAIN, "--resume")
    assert code == 0 and "after step 3" in again and (run / checkpoint.NAME).read_bytes() == saved
    assert [line for line in again.splitlines() if line.endswith("%")] == [f"{n} {v}" for n, v in values.items()]


def test_the_printed_command_searches(whole, copied, monkeypatch, capsys):
    line = shlex.split(whole[1].strip().splitlines()[-1])
    assert line[1].endswith("retrieve.py") and line[3:] == ["--model", "runs/clip"]
    (copied / "pictures").mkdir()
    for i, picture in enumerate(Shapes().draw(Rng(0), 5)[0]):
        save_png(copied / "pictures" / f"{i}.png", picture)
    code, out, err = call(monkeypatch, capsys, RETRIEVE, *line[2:], "--folder", "pictures")
    assert code == 0 and "The 5 nearest of 5 images" in out, err


def folder_of_pictures(path, n=40):
    """Pictures with a captions file, of which some captions are the same, and one is long."""
    path.mkdir()
    pictures, _ = Shapes(size=16).draw(Rng(1), n)
    captions = ["a thing", "another thing", "a thing that is described in more words than the model has places for"]
    for i, picture in enumerate(pictures):
        save_png(path / f"{i:02d}.png", picture)
    lines = (f"{i:02d}.png\t{captions[i % 3]}" for i in range(n))
    (path / "captions.txt").write_text("\n".join(lines), encoding="utf-8")


def test_a_folder_of_your_own(copied, monkeypatch, capsys):
    folder_of_pictures(copied / "mine")
    options = (*TOY, "--data", "mine", "--length", 12, "--out", "m")
    code, out, err = call(monkeypatch, capsys, TRAIN, *options)
    assert code == 0 and "% of the captions are cut after 12 tokens" in out and "zero-shot among" in out, err
    model = CLIP.load("m")
    assert model.config.size == 16 and model.config.length == 12
    monkeypatch.chdir("/")
    assert call(monkeypatch, capsys, TRAIN, "--resume", copied / "m")[0] == 0


def test_handwritten_digits(copied, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, TRAIN, *TOY, "--data", "digits", "--out", "d")
    assert code == 0 and "recall@1 among" in out and "zero-shot among these captions" in out, err


def test_no_two_pairs_have_one_caption():
    program = runpy.run_path(str(TRAIN))
    images, captions = program["distinct_pairs"](Shapes(full=True), Rng(0), 50)
    assert len(images) == len(set(captions)) == 50


class Known:
    """A model whose embeddings are known, and a source of its pairs."""

    def draw(self, rng, n, split):
        return np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1), ["a", "b", "c"]

    def image_embedding(self, images):
        return np.array([[1, 0], [1, 0], [0, 1]])

    def text_embedding(self, captions):
        return np.array([[0.9, 0], [0.8, 0.1], [0, 1]])

    def zero_shot(self, images, prompts):
        return np.eye(3)[[{"a": 0, "b": 1, "c": 1}[prompt] for prompt in prompts]]


def test_what_is_measured():
    """Images 1 and 2 find text 1, texts 1 and 2 find either image, the third pair finds itself."""
    program, known = runpy.run_path(str(TRAIN)), Known()
    report = program["measure"](known, "folder", known, Rng(0))
    assert report["recall@1 among 3 held-out pairs, image to text"] == pytest.approx(2 / 3)
    assert report["recall@1 among 3 held-out pairs, text to image"] == pytest.approx(1 / 3)
    assert report["zero-shot among these captions, of 3 images"] == pytest.approx(2 / 3)


def test_refused(copied, monkeypatch, capsys):
    """Each bad input gives one line on stderr that says what is wrong, a non-zero exit code, and changes no file."""
    (copied / "empty").mkdir()
    (copied / "file").write_text("in the way")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    new, run = (*TOY, "--out", "new"), "runs/clip"
    cases = [
        ((*new, "--data", "nowhere"), "nowhere"),
        ((*new, "--data", "empty"), "empty"),
        ((*new, "--vocabulary", 100), "got a size of 100"),
        ((*new, "--length", 1), "2 places"),
        ((*new, "--patch", 5), "2, 4, 8, ... and divide"),
        ((*new, "--heads", 3), "must divide width"),
        ((*new, "--layers", 0), "sizes of at least 1"),
        ((*new, "--embedding", 0), "sizes of at least 1"),
        ((*new, "--batch-size", 1), "a batch must have 2 at least, got 1"),
        ((*new, "--steps", 0), "at least 1, got 0"),
        (("--out", "file/run"), "file is not a folder"),
        (("--out", run), "holds a run already"),
        (("--resume", run, "--lr", 1), "leave out --lr"),
        (("--resume", "nowhere"), "there is no checkpoint"),
    ]
    for arguments, words in cases:
        code, out, err = call(monkeypatch, capsys, TRAIN, *arguments)
        case = f"{arguments}: {code} {out} {err}"
        assert code == 1 and words in err and "Traceback" not in err, case
        assert err.startswith("error: ") and err.count("\n") == 1, case
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_help_teaches(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, TRAIN, "--help")
    assert code == 0 and "python examples/train_clip.py" in out and "default" in out
