"""evaluate_text_to_image.py: its table for a model that draws nothing right, and bad input."""

import argparse
import dataclasses
import pathlib
import runpy

import numpy as np
import pytest

from tests.models.common import stirred
from tests.test_examples_text_to_image import assert_picture, call, run  # noqa: F401
from tinydiff import Rng, checkpoint, models
from tinydiff.data.shape_captions import parse
from tinydiff.data.shapes import HELD_OUT
from tinydiff.diffusion import Sampling
from tinydiff.models.imagen import PERCENTILE
from tinydiff.nn import TransformerConfig, UNetConfig
from tinydiff.train import Training, TrainSettings

EVALUATE = pathlib.Path(__file__).parents[1] / "examples" / "evaluate_text_to_image.py"


def test_the_table(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    flags = [
        "--run",
        run,
        "--n",
        6,
        "--repeated",
        2,
        "--steps",
        2,
        "--guidance",
        "1,2.5",
        "--out",
        "scores",
        "--device",
        "cpu",
    ]
    code, out, err = call(monkeypatch, capsys, EVALUATE, *flags)
    assert code == 0, err
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * 5 and "guidance 2.5" in out
    assert out.count("8 pictures of one prompt differ, 2 prompts") == out.count("the reader's features") == 2
    by_name = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    names = by_name[""]
    one, two = by_name["one thing"], by_name["two things"]
    assert one[names.index("relation")] == "" and one[names.index("place")].endswith("%")
    assert two[names.index("place")] == "" and two[names.index("relation")].endswith("%")
    assert float(one[0].rstrip("%")) < 50
    for name in ("one_thing", "two_things", "one_thing_new_pair", "two_things_new_pair", "guidance"):
        assert (tmp_path / "scores" / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("without", [[], ["--no-prior"], ["--no-prior", "caption"]])
def test_dalle2(without, tmp_path, monkeypatch, capsys):
    """Another system is asked the same; its larger pictures are made smaller for the reader."""
    monkeypatch.chdir(tmp_path)
    rng, asked = np.random.default_rng(0), []

    class Drawing:
        def __init__(self, prior, decoder, upsamplers):
            assert (prior, decoder, upsamplers) == (None if without else "prior", "d", ["u", "v"])

        @classmethod
        def load(cls, prior, decoder, upsamplers):
            return cls(prior, decoder, upsamplers)

        def draw(self, z_i, prompts, rng, how, guidance):
            assert z_i is None
            return self.text_to_image(prompts, rng, how, guidance, "draw")

        def text_to_image(self, prompts, _, how, guidance, name="text_to_image"):
            asked.append((name, how.steps, guidance))
            return [rng.uniform(-1, 1, (len(prompts), 64, 64, 3)).astype(np.float32)]

        def pictures(self, x):
            return x

    monkeypatch.setattr(models, "DallE2", Drawing)
    flags = [
        "--model",
        "dalle2",
        "--decoder",
        "d",
        "--upsamplers",
        "u",
        "v",
        *without,
        "--n",
        2,
        "--repeated",
        2,
        "--device",
        "cpu",
    ]
    code, out, err = call(monkeypatch, capsys, EVALUATE, *flags)
    assert code == 0 and "guidance 2;" in out, err
    assert set(asked) == {("draw" if "caption" in without else "text_to_image", 50, 2.0)}
    pixels = float(out.split("pixels")[1].split()[0])
    assert pixels == pytest.approx((2 / 3 / 4) ** 0.5, rel=0.02)  # means of four pixels, of variance 1/3 each


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Small models that nobody trained, each in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    text, towers = TransformerConfig(8, 1, 2), TransformerConfig(8, 1, 2, causal=True)
    unet = UNetConfig(channels=3, base=8, multipliers=(1,), blocks=1, attention=(), groups=4, patch=4)
    base = models.TextDiffusion(models.TextDiffusionConfig(dataclasses.replace(unet, context=8), T=20), Rng(2))
    larger = models.UpsamplerConfig(dataclasses.replace(unet, extra=3, vector=4), T=20, S=6)
    made = {
        "words": models.MaskedTextEncoder(models.TextEncoderConfig(length=80, text=text), Rng(0)),
        "seeing": models.CLIP(models.CLIPConfig(length=80, text=towers, image=text), Rng(1)),
        "base": stirred(base),
        "larger": stirred(models.Upsampler(larger, Rng(3))),
        "painter": models.TextInpainting.started_from(base),
    }
    for name, model in made.items():
        (tmp_path / name).mkdir()
        Training(model, TrainSettings(1), tmp_path / name / checkpoint.NAME, {}).save()


@pytest.mark.parametrize(
    ("flags", "usual"),
    [
        (["--model", "glide", "--glide", "painter", "--text-encoder", "seeing"], 3),
        (["--model", "imagen", "--base", "base", "--text-encoder", "words", "--upsamplers", "larger"], 3),
    ],
    ids=["glide", "imagen"],
)
def test_glide_and_imagen(flags, usual, other, monkeypatch, capsys):
    """Both draw what they are told, each by its own text encoder, and with its usual guidance."""
    few = ["--n", 2, "--repeated", 2, "--steps", 2, "--device", "cpu", "--out", "scores"]
    code, out, err = call(monkeypatch, capsys, EVALUATE, *flags, *few)
    assert code == 0 and f"guidance {usual};" in out and out.count("\n| ") == 5, err
    assert float(out.split("pixels")[1].split()[0]) > 0


def test_imagen_draws_as_its_own_program_does(monkeypatch):
    """With dynamic thresholds, whatever else is asked of the sampler."""
    asked = []

    class Drawing:
        def text_to_image(self, prompts, rng, how, guidance):
            asked.append((how, guidance))
            return [np.zeros((len(prompts), 64, 64, 3), np.float32)]

    monkeypatch.setattr(models.Imagen, "load", lambda *parts: asked.append(parts) or Drawing())
    options = argparse.Namespace(text_encoder=None, base="b", upsamplers=["u", "v"])
    draw = runpy.run_path(str(EVALUATE))["load_imagen"](options)
    assert draw(["a star"], Rng(0), Sampling(steps=7), 5).shape == (1, 64, 64, 3)
    assert asked == [("text_encoder", "b", ["u", "v"]), (Sampling(steps=7, clip=PERCENTILE), 5)]


def test_the_kinds_of_prompts():
    """One thing or two, and a pair that training never sees where the name says so."""
    for name, (source, split) in runpy.run_path(str(EVALUATE))["KINDS"].items():
        for prompt in source.draw(Rng(0), 20, split)[1]:
            things = parse(prompt).things
            assert len(things) == (1 if name.startswith("one") else 2)
            assert any((t.shape, t.colour) in HELD_OUT for t in things) == name.endswith("new pair")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", 0], "--n must be at least 1, got 0"),
        (["--repeated", 1], "--repeated must be at least 2, got 1"),
        (["--run", "nowhere"], "there is no checkpoint nowhere"),
        (["--model", "glide", "--glide", "nowhere"], "there is no checkpoint nowhere"),
        (["--model", "imagen", "--base", "nowhere"], "there is no checkpoint nowhere"),
        (["--model", "imagen", "--text-encoder", "scene_reader"], "holds no text encoder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, EVALUATE, *arguments)
    assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
