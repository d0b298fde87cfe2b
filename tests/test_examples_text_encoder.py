"""train_text_encoder.py as a person runs it: on shapes, on a folder, stopped and resumed, and misused."""

import re
import runpy
import signal

import numpy as np
import pytest

from tests.test_examples import ROOT, assert_picture, call
from tinydiff import Rng, checkpoint
from tinydiff.data.captioned import Shapes
from tinydiff.image import save_png
from tinydiff.models.text_encoder import MaskedTextEncoder, TextEncoderConfig
from tinydiff.nn import TransformerConfig
from tinydiff.train import Training

TRAIN = ROOT / "examples" / "train_text_encoder.py"
TOY = [
    *("--captions", 60, "--tested", 20, "--vocabulary", 300, "--length", 80, "--width", 8, "--layers", 1),
    *("--steps", 4, "--batch-size", 8, "--save-every", 0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_stopped_and_resumed(tmp_path, monkeypatch, capsys):
    """It says what it measured, and a run that was stopped ends in the bits of one that was not."""
    code, out, err = call(monkeypatch, capsys, TRAIN, *TOY, "--out", "whole")
    assert code == 0, err
    assert "60 captions such as 'a" in out and "--text-encoder whole" in out.splitlines()[-1]
    shares = re.findall(r"^  by (.*?) +(\d+\.\d)%$", out, re.MULTILINE)
    assert [name for name, _ in shares] == ["the model", "always saying 'a'"]
    assert all(0 <= float(share) <= 100 for _, share in shares) and float(shares[1][1]) > 2
    assert len(re.findall(r"^'.* ___ .*': (?:\S* 0\.\d\d(?:, )?){5}$", out, re.MULTILINE)) == 3
    assert_picture(tmp_path / "whole" / "loss.png")

    plain = Training.advance

    def stopped_after_two(self, loss):
        plain(self, loss)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "advance", stopped_after_two)
    assert call(monkeypatch, capsys, TRAIN, *TOY, "--out", "stopped")[0] == 130
    monkeypatch.setattr(Training, "advance", plain)
    code, again, err = call(monkeypatch, capsys, TRAIN, "--resume", "stopped")
    assert code == 0 and "after step 2" in again, err
    assert re.findall("^  by .*%$", again, re.MULTILINE) == re.findall("^  by .*%$", out, re.MULTILINE)
    whole, stopped = (checkpoint.load(folder, MaskedTextEncoder.kind)[0] for folder in ("whole", "stopped"))
    assert len(whole["losses"]) == 4 and all((stopped[name] == array).all() for name, array in whole.items())
    assert MaskedTextEncoder.load("whole").config.text.width == 8


def test_a_folder_of_your_own(tmp_path, monkeypatch, capsys):
    """Captions that are longer than what is read are cut, which is said once."""
    (tmp_path / "mine").mkdir()
    for i, picture in enumerate(Shapes().draw(Rng(1), 20)[0]):
        save_png(tmp_path / "mine" / f"{i:02d}.png", picture)
    lines = (f"{i:02d}.png\tsomething that is described in a few words, number {i}" for i in range(20))
    (tmp_path / "mine" / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.warns(UserWarning, match="was cut to 4"):
        code, out, err = call(monkeypatch, capsys, TRAIN, *TOY, "--data", "mine", "--length", 6)
    assert code == 0 and "the run is in runs/text_encoder" in out, err


class Parrot(MaskedTextEncoder):
    """Guesses a star everywhere, whatever it is shown, which it remembers."""

    def logits(self, ids, mask):
        self.asked = [*getattr(self, "asked", []), ids]
        return super().logits(ids, mask) * 0 + np.eye(len(self.tokenizer))[self.tokenizer.encode("s")[0]]


def test_what_is_counted():
    """The hidden tokens of all captions, of which none is left to be seen, and the model's guesses."""
    model = Parrot(TextEncoderConfig(length=5, text=TransformerConfig(8, 1, 2), hidden=1.0), Rng(0))
    true, guessed = runpy.run_path(str(TRAIN))["guesses"](model, ["s", "a", "ss"], Rng(0), batch=2)
    assert model.tokenizer.decode(true) == " s a ss" and model.tokenizer.decode(guessed) == "sssssss"
    assert np.mean(true == guessed) == 3 / 7
    shown = np.concatenate(model.asked)
    assert (shown == model.mask_token).sum() == 7 and not (shown == model.tokenizer.encode("s")[0]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captions", 0], "at least 1, got 0"),
        (["--captions", 5], "batch size must be 1..5"),
        (["--tested", 0], "--tested must be at least 1, got 0"),
        (["--vocabulary", 100], "got a size of 100"),
        (["--length", 1], "2 tokens and 2 places"),
        (["--width", 10], "heads (4) must divide width (10)"),
        (["--layers", 0], "--layers must be at least 1, got 0"),
        (["--hidden", 0], "must be in (0, 1], got 0.0"),
        (["--hidden", 1.5], "must be in (0, 1], got 1.5"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--steps", 0], "at least 1, got 0"),
        (["--resume"], "leave out --captions"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, TRAIN, *TOY, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0], err


def test_help_teaches(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, TRAIN, "--help")
    assert code == 0 and "python examples/train_text_encoder.py --data FOLDER" in out and "E37" in out
