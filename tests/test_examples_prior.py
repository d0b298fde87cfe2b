"""train_prior.py as a person runs it: both priors, stopped and resumed, on other data, and misused."""

import re
import signal

import pytest

from tests.test_examples import ROOT, assert_picture, call
from tinydiff import Rng, checkpoint
from tinydiff.data.captioned import Shapes
from tinydiff.models import CLIP, AutoregressivePrior, CLIPConfig, DiffusionPrior
from tinydiff.models.tokenizer import Tokenizer, clean
from tinydiff.nn import TransformerConfig
from tinydiff.train import Training, TrainSettings

TRAIN = ROOT / "examples" / "train_prior.py"
TOY = [
    *("--pictures", 40, "--held-out", 9, "--width", 8, "--layers", 1, "--bins", 4, "--steps", 4, "--batch-size", 4),
    *("--sample-every", 4, "--save-every", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a small CLIP that nobody trained."""
    text, folder = TransformerConfig(8, 1, 2, causal=True), tmp_path_factory.mktemp("clip")
    merges = Tokenizer.train(map(clean, Shapes().draw(Rng(0), 200)[1]), 450).merges
    model = CLIP(CLIPConfig(merges, 28, text=text, image=TransformerConfig(8, 1, 2), embedding=6), Rng(1))
    Training(model, TrainSettings(1), folder / checkpoint.NAME, {}).save()
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "model"), [("diffusion", DiffusionPrior), ("autoregressive", AutoregressivePrior)], ids=lambda x: x
)
def test_stopped_and_resumed(kind, model, clip, tmp_path, monkeypatch, capsys):
    """It says what it measured, and a run that was stopped ends in the bits of one that was not."""
    flags = ["--kind", kind, "--clip", clip, *TOY]
    code, out, err = call(monkeypatch, capsys, TRAIN, *flags, "--out", "whole")
    assert code == 0, err
    assert f"40 pictures, {kind}" in out
    other, export, decoder = out.splitlines()[-5::2]
    assert "train_prior.py --kind" in other and kind not in other and "train_decoder.py --clip" in decoder
    assert export.endswith(
        f"tinydiff export whole {'prior.npz' if kind == 'diffusion' else 'autoregressive_prior.npz'}"
    )
    cosines = re.findall(r"^  (\w.*?) +(-?\d\.\d{4})$", out, re.MULTILINE)
    names = ["drawn by the prior", "drawn, the better of two candidates", "the text's own embedding"]
    assert [name for name, _ in cosines] == [*names, "the mean of all pictures"]
    assert all(-1 <= float(value) <= 1 for _, value in cosines)
    changes = re.findall(r"([+-]\d\.\d{4}) ± (\d\.\d{4}), p = (\S+)$", out, re.MULTILINE)
    assert len(changes) == 2 and float(changes[0][0]) >= 0 and all(0 <= float(p) <= 1 for *_, p in changes)
    for name in ("samples_000000.png", "samples_000004.png", "samples.png"):
        assert_picture(tmp_path / "whole" / name, size=(2 * (34 * 8 - 2), 2 * (34 * 8 - 2)))
    assert_picture(tmp_path / "whole" / "loss.png")
    assert len((tmp_path / "whole" / "captions.txt").read_text().splitlines()) == 8

    plain = Training.advance

    def stopped_after_two(self, loss):
        plain(self, loss)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "advance", stopped_after_two)
    assert call(monkeypatch, capsys, TRAIN, *flags, "--out", "stopped")[0] == 130
    monkeypatch.setattr(Training, "advance", plain)
    code, again, err = call(monkeypatch, capsys, TRAIN, "--resume", "stopped")
    assert code == 0 and "after step 2" in again, err
    assert re.findall(r"^  .*$", again, re.MULTILINE)[:6] == re.findall(r"^  .*$", out, re.MULTILINE)[:6]
    whole, stopped = (checkpoint.load(folder, model.kind)[0] for folder in ("whole", "stopped"))
    assert len(whole["losses"]) == 4 and all((stopped[name] == array).all() for name, array in whole.items())
    assert model.load("whole").config.embedding == 6


def test_on_digits(clip, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, TRAIN, "--clip", clip, *TOY, "--data", "digits")
    assert code == 0 and "the run is in runs/prior" in out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip", "nowhere"], "there is no checkpoint nowhere"),
        (["--pictures", 0], "at least 1, got 0"),
        (["--pictures", 3], "batch size must be 1..3"),
        (["--held-out", 1], "n >= 2, got (1,)"),
        (["--width", 10], "heads (4) must divide width (10)"),
        (["--layers", 0], "--layers must be at least 1, got 0"),
        (["--kind", "autoregressive", "--bins", 1], "2 bins, got"),
        (["--kind", "autoregressive", "--explained", 2], "must be in (0, 1], got 2.0"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--steps", 0], "at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(clip, arguments, message, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, TRAIN, "--clip", clip, *TOY, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0], err


def test_what_cannot_be_resumed(clip, monkeypatch, capsys):
    for arguments, words in (
        (["--resume"], "there is no checkpoint runs/prior"),
        (["--resume", clip], "expected 'diffusion-prior', got 'clip'"),
        (["--resume", clip, "--lr", 1], "leave out --lr"),
    ):
        code, _, err = call(monkeypatch, capsys, TRAIN, *arguments)
        assert code == 1 and words in err and err.startswith("error: "), err


def test_help_teaches(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, TRAIN, "--help")
    assert code == 0 and "python examples/train_prior.py --kind autoregressive" in out and "E31" in out
