"""Every lesson runs from any directory, at toy size where it is long, and draws pictures of something."""

import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

LESSONS = sorted((pathlib.Path(__file__).parents[1] / "lessons").glob("[0-9][0-9]_*.py"))


def test_there_are_lessons():
    assert LESSONS


def run(lesson, folder):
    """Run a lesson in this folder: how it ended, and the pictures it drew."""
    pictures = lesson.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in pictures.glob(f"{lesson.stem[:2]}_*.png")}
    environment = {**os.environ, "PYTHONPATH": str(lesson.parents[1]), "TINYDIFF_QUICK": "1", "TINYDIFF_THREADS": "1"}
    done = subprocess.run([sys.executable, lesson], cwd=folder, env=environment, capture_output=True, text=True)
    return done, [p for p in pictures.glob(f"{lesson.stem[:2]}_*.png") if p.stat().st_mtime_ns != before.get(p)]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Every lesson that is to be tested and the folder it runs in; two run at once."""
    tests = [item for item in request.session.items if getattr(item, "function", None) is test_lesson_runs_and_draws]
    folders = {item.callspec.params["lesson"]: tmp_path_factory.mktemp("lesson") for item in tests}
    pool = ThreadPoolExecutor(2)
    yield {lesson: (pool.submit(run, lesson, folder), folder) for lesson, folder in folders.items()}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_lesson_runs_and_draws(lesson, runs):
    future, folder = runs[lesson]
    done, drawn = future.result()
    assert done.returncode == 0, done.stderr
    assert drawn
    for path in drawn:
        pixels = np.asarray(Image.open(path).convert("L"), float)
        assert min(pixels.shape) > 100 and pixels.std() > 5, f"{path} shows nothing"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_lesson_is_cells_of_text_and_code(lesson):
    text = lesson.read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]") and "\n# %%\n" in text
