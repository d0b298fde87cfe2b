"""evaluate_nll.py on models with random weights: what it prints and draws, stopped, and given bad input."""

import dataclasses
import pathlib
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from tinydiff import Rng, checkpoint, cli
from tinydiff.diffusion import bits_per_dim, bound_terms
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig
from tinydiff.nn import UNetConfig

EVALUATE = pathlib.Path(__file__).parents[1] / "examples" / "evaluate_nll.py"
NAMES = tuple("0123456789")


def saved(folder, classes=10, learned=True, size=(28, 28)):
    """A folder with the checkpoint of a small model, as training writes it."""
    unet = UNetConfig(base=4, multipliers=(1,), blocks=1, attention=(), groups=2, classes=classes, patch=4)
    names = NAMES[:classes] if classes else ()
    config = PixelDiffusionConfig(unet, size=size, T=25, class_names=names, learned_variance=learned)
    state = PixelDiffusion(config, Rng(0)).state_dict()
    weights = {f"ema/{name}": 0.1 * Rng(1).at(i).normal(p.shape) for i, (name, p) in enumerate(state.items())}
    meta = {"kind": PixelDiffusion.kind, "config": dataclasses.asdict(config), "about": {"data": "embedded"}}
    checkpoint.save(folder / checkpoint.NAME, weights, meta)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    saved(folder / "labelled")
    saved(folder / "plain", classes=None, learned=False)
    saved(folder / "five", classes=5)
    saved(folder / "small", size=(8, 8))
    return folder


@pytest.fixture
def evaluate(runs, monkeypatch, capsys):
    """Calls evaluate_nll.py in the folder of the runs: the exit code, the lines of stdout, and stderr."""
    monkeypatch.chdir(runs)
    monkeypatch.setenv("TINYDIFF_DEVICE", "cpu")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(EVALUATE), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EVALUATE), run_name="__main__")
        out, err = capsys.readouterr()
        return stop.value.code, out.splitlines(), err

    return call


def table(lines):
    """The numbers of the table by the name of the variance: L_T, sum L_t-1, L_0, total, error (nan for "?")."""
    rows = [line.replace("±", " ").replace("?", "nan").split() for line in lines[2:]]
    return {row[0]: [float(x) for x in row[1:6]] for row in rows if row[0] in ("learned", "beta_tilde_t", "beta_t")}


def test_the_table_and_the_picture(runs, evaluate):
    code, lines, err = evaluate("labelled", "--n", 6, "--batch-size", 2, "--every", 4)
    assert code == 0, err
    assert lines[0].startswith("6 test images of embedded, told their class")
    rows = table(lines)
    assert list(rows) == ["learned", "beta_tilde_t", "beta_t"]
    for L_T, L_steps, L_0, total, error in rows.values():
        assert total == pytest.approx(L_T + L_steps + L_0, abs=2e-4) and error > 0
    assert len({row[3] for row in rows.values()}) == 3
    assert "--every 1" in lines[-1]
    with Image.open(runs / "labelled" / "bits.png") as picture:
        assert min(picture.size) > 100 and np.asarray(picture.convert("L")).std() > 5
    assert evaluate("labelled", "--n", 6, "--batch-size", 2, "--every", 4)[1] == lines
    assert table(evaluate("labelled", "--n", 6, "--batch-size", 2, "--every", 4, "--seed", 1)[1]) != rows


def test_it_is_the_sum_of_the_terms(runs, evaluate):
    """All steps of three images, against the functions themselves; the error of one batch of drawn steps is unknown."""
    namespace = runpy.run_path(str(EVALUATE))
    code, lines, _ = evaluate("plain", "--n", 3, "--every", 1)
    assert code == 0 and "not told" in lines[0] and list(table(lines)) == ["beta_tilde_t", "beta_t"]
    model = PixelDiffusion.load(runs / "plain")
    digits = namespace["some"](namespace["mnist"].load("embedded", "test"), 3, Rng(0).at(0))
    x_0 = namespace["image"].to_signed(digits.images[..., None])
    for row, variance in zip(table(lines).values(), ("posterior", "beta"), strict=True):
        terms = bits_per_dim(
            np.array([*bound_terms(x_0, model.denoiser(), model.schedule, Rng(0).at(1, 0, 1), variance)]), x_0
        )
        total = terms.sum(axis=0)
        expected = [terms[0].mean(), terms[1:-1].sum(axis=0).mean(), terms[-1].mean(), total.mean()]
        np.testing.assert_allclose(row, [*expected, total.std(ddof=1) / 3**0.5], atol=1e-4)
    assert "one batch" in evaluate("plain", "--n", 3)[1][2]


def test_a_drawn_step_stands_for_its_neighbours():
    measured = runpy.run_path(str(EVALUATE))["Measured"]
    steps = np.array([[0.1, 0.2], [0.3, 0.4], [5.0, 6.0]])  # L_{t-1} of t = 7 and 3, and L_0, of two images
    parts = measured(np.array([7, 3, 1]), np.array([4, 3, 1]), np.array([0.01, 0.02]), steps).parts()
    np.testing.assert_allclose(parts, [[0.01, 0.02], [1.3, 2.0], [5.0, 6.0], [6.31, 8.02]])


def test_labels_can_be_hidden(evaluate):
    told, hidden = (evaluate("labelled", "--n", 4, *flags)[1] for flags in ((), ("--no-labels",)))
    assert "not told" in hidden[0]
    assert table(told)["beta_t"][:4] != table(hidden)["beta_t"][:4]


@pytest.mark.parametrize(("T", "every"), [(25, 1), (25, 4), (25, 30), (1, 3), (1000, 10)])
def test_each_step_counts_once_on_average(T, every):
    draw_times = runpy.run_path(str(EVALUATE))["draw_times"]
    count = np.zeros(T + 1)
    for i in range(200):
        times, counts = draw_times(T, every, Rng(0).at(i))
        assert times == sorted(set(times), reverse=True) and times[-1] == 1 and sum(counts) == T
        assert set(range(1, min(every, T) + 1)) <= set(times)
        np.add.at(count, times, np.array(counts) / 200)
    assert count[0] == 0
    assert (np.abs(count[1:] - 1) <= 5 * np.sqrt(every / 200)).all()


def test_ctrl_c_reports_what_is_measured(evaluate, monkeypatch):
    def interrupted(items, what, total):
        if what.startswith("batch 2"):
            raise KeyboardInterrupt
        yield from items

    monkeypatch.setattr(cli, "progress", interrupted)
    code, lines, err = evaluate("labelled", "--n", 6, "--batch-size", 4)
    assert code == 130 and "stopped after 4 of 6 images" in err
    assert lines[0].startswith("4 test images") and np.isnan(table(lines)["learned"][4])
    monkeypatch.setattr(cli, "progress", lambda items, what, total: interrupted(items, "batch 2", total))
    code, lines, err = evaluate("labelled", "--n", 6)
    assert code == 130 and not lines and "before the first batch" in err


def test_refused(runs, evaluate):
    (runs / "file").write_text("in the way")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    for arguments, words in [
        (("nowhere",), "there is no checkpoint"),
        (("plain", "--n", 0), "--n must be at least 1, got 0"),
        (("plain", "--n", 501), "at most 500"),
        (("plain", "--every", 0), "--every must be at least 1, got 0"),
        (("plain", "--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("plain", "--labels"), "without labels"),
        (("plain", "--seed", -1), "got -1"),
        (("plain", "--data", "nowhere"), "'nowhere' is not a folder"),
        (("plain", "--out", "file/bits.png"), "file is not a folder"),
        (("plain", "--device", "cuda"), "device 'cuda' cannot be used"),
        (("five",), "knows 5 classes"),
        (("small",), "images are (8, 8)"),
    ]:
        code, _, err = evaluate(*arguments)
        assert code == 1 and words in err and err.startswith("error: ") and err.count("\n") == 1, (arguments, err)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_help_teaches(evaluate):
    code, lines, _ = evaluate("--help")
    text = "\n".join(lines)
    assert code == 0 and "python examples/evaluate_nll.py" in text and "default" in text and "E11" in text
