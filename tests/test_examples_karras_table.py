"""examples/karras_table.py at toy size: the table, what is kept between two runs, and bad input."""

import shutil

import numpy as np
import pytest

from tests.test_examples import ROOT, assert_picture, call, finish, start
from tinydiff import checkpoint

TABLE = ROOT / "examples" / "karras_table.py"
TOY = ["--steps", "2", "--base", "8", "--batch-size", "8", "--n", "8", "--evaluations", "3,5"]
COLUMNS = ("vp", "ve", "iddpm", "edm")


def weights(folder):
    """The checkpoint of each column, as bytes."""
    return {column: (folder / column / checkpoint.NAME).read_bytes() for column in COLUMNS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a toy run that was never interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("karras")
    return folder, finish(start(TABLE, *TOY, "--out", folder, cwd=folder))


def test_the_table(whole):
    """All four columns, each sampled its own way and EDM's."""
    folder, out = whole
    assert_picture(folder / "table.png")
    assert_picture(folder / "samples.png", (2 * (30 * 8 - 2), 2 * (30 * 7 - 2)))
    rows = [
        line.rsplit(maxsplit=2) for line in out.splitlines() if line.startswith(("VP ", "VE ", "iDDPM + DDIM ", "EDM "))
    ]
    assert [row[0].split("  ")[0] for row in rows] == ["VP"] * 2 + ["VE"] * 2 + ["iDDPM + DDIM"] * 2 + ["EDM"]
    distances = np.array([row[1:] for row in rows], float)
    real = float(out.split("held out:")[1].split()[0])
    assert (distances > real).all() and real > 0  # nothing is learned in two steps


def test_a_column_goes_on_where_it_stopped(whole, tmp_path, monkeypatch, capsys):
    """A column that was stopped after its first step ends in the same bits; finished ones are not trained again."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "edm")
    options = (*TOY, "--out", tmp_path)
    monkeypatch.setattr("tinydiff.train.warmup_cosine", interrupt_at(2))
    code, _, err = call(monkeypatch, capsys, TABLE, *options)
    assert code == 130 and "Traceback" not in err
    monkeypatch.undo()
    code, out, err = call(monkeypatch, capsys, TABLE, *options)
    assert code == 0, err
    assert out.count("steps to go") == 1 and "EDM: " in out
    for column in ("vp", "ve", "iddpm"):
        assert (tmp_path / column / checkpoint.NAME).read_bytes() == weights(whole[0])[column]
    loaded = [checkpoint.load(folder / "edm", "karras")[0] for folder in (whole[0], tmp_path)]
    assert all(np.array_equal(a, b) for a, b in zip(*(arrays.values() for arrays in loaded), strict=True))


def interrupt_at(step):
    """The learning rate, but a Ctrl-C when it is asked for at this step."""
    from tinydiff.optim import warmup_cosine

    def rate(n, *rest):
        if n == step:
            raise KeyboardInterrupt
        return warmup_cosine(n, *rest)

    return rate


def test_refused(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = weights(whole[0])
    (tmp_path / "file").write_text("in the way")
    for arguments, words in (
        ((*TOY, "--evaluations", "3,4"), "3, 5, 7, ... evaluations, got 4"),
        ((*TOY, "--evaluations", "1"), "got 1"),
        ((*TOY, "--n", "1"), "--n must be at least 2, got 1"),
        ((*TOY, "--steps", "0"), "at least 1, got 0"),
        ((*TOY, "--batch-size", "0"), "got 0"),
        ((*TOY, "--data", "nowhere"), "'nowhere' is not a folder"),
        ((*TOY, "--device", "cuda"), "device 'cuda' cannot be used"),
        ((*TOY, "--out", "file/run"), "file is not a folder"),
        ((*TOY, "--out", whole[0], "--steps", "3"), "choose another --out"),
    ):
        code, out, err = call(monkeypatch, capsys, TABLE, "--out", "new", *arguments)
        case = f"{arguments}: {code} {out} {err}"
        assert code == 1 and words in err and err.startswith("error: ") and err.count("\n") == 1, case
    assert weights(whole[0]) == before


def test_help_teaches(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, TABLE, "--help")
    assert code == 0 and "python examples/karras_table.py" in out and "default" in out
