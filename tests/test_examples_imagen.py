"""imagen.py and glide.py as a person runs them: prompts, thresholds, levels, masks, and bad input."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.models.common import stirred
from tests.test_examples import ROOT, assert_picture, call
from tinydiff import Rng, checkpoint
from tinydiff.models import (
    CLIP,
    CLIPConfig,
    TextDiffusion,
    TextDiffusionConfig,
    TextInpainting,
    Upsampler,
    UpsamplerConfig,
)
from tinydiff.models.text_encoder import MaskedTextEncoder, TextEncoderConfig
from tinydiff.nn import TransformerConfig, UNetConfig
from tinydiff.train import Training, TrainSettings

IMAGEN, GLIDE = ROOT / "examples" / "imagen.py", ROOT / "examples" / "glide.py"
UNET = UNetConfig(channels=3, base=8, multipliers=(1,), blocks=1, attention=(0,), heads=2, groups=4, context=8)
LARGE = UNetConfig(channels=3, base=8, multipliers=(1,), blocks=1, attention=(), groups=4, patch=4, extra=3, vector=4)
TOLD_LARGE = dataclasses.replace(LARGE, context=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with small models that nobody trained, each in a folder of its own."""
    text, towers = TransformerConfig(8, 1, 2), TransformerConfig(8, 1, 2, causal=True)
    base = stirred(TextDiffusion(TextDiffusionConfig(UNET, (16, 16), T=20), Rng(2)))
    models = {
        "words": MaskedTextEncoder(TextEncoderConfig(length=80, text=text), Rng(0)),
        "seeing": CLIP(CLIPConfig(length=80, text=towers, image=text), Rng(1)),
        "base": base,
        "larger": Upsampler(UpsamplerConfig(TOLD_LARGE, (32, 32), T=20, S=6), Rng(3)),
        "largest": Upsampler(UpsamplerConfig(LARGE, (64, 64), T=20, S=6), Rng(4)),
        "painter": TextInpainting.started_from(base),
    }
    folder = tmp_path_factory.mktemp("runs")
    for name, model in models.items():
        (folder / name).mkdir()
        Training(stirred(model), TrainSettings(1), folder / name / checkpoint.NAME, {}).save()
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def flags(runs):
    """The flags of both programs that name the small models."""
    return {
        IMAGEN: [
            "--text-encoder",
            runs / "words",
            "--base",
            runs / "base",
            "--upsamplers",
            runs / "larger",
            runs / "largest",
        ],
        GLIDE: ["--text-encoder", runs / "seeing", "--run", runs / "painter"],
    }


@pytest.fixture
def draw(flags, monkeypatch, capsys):
    """draw(program, ...): the array that it draws with these arguments, ended well."""

    def done(script, *arguments):
        given = [*flags[script], "--steps", 3, "--save-array", "x.npz", *arguments]
        code, out, err = call(monkeypatch, capsys, script, *given)
        assert code == 0 and "how they came out of noise" in out, err
        with np.load("x.npz") as file:
            return file["samples"]

    return done


def differ(one, other):
    return np.abs(one - other).max() > 1e-5


# --------------------------------------------------------------------------------------------- imagen.py


def test_a_prompt_becomes_large_pictures(draw, tmp_path):
    pictures = draw(IMAGEN, "a red star", "--n", 3)
    assert pictures.shape == (3, 64, 64, 3) and pictures.min() >= 0 and pictures.max() <= 1
    assert_picture(tmp_path / "drawn.png", size=(3 * (66 * 3 - 2), 3 * 64))
    with Image.open(tmp_path / "drawn_strip.png") as strip:
        assert strip.size == (3 * (66 * 8 - 2), 3 * (66 * 3 - 2))
        moments = np.asarray(strip)
    small, large = (moments[: 3 * 64, left : left + 3 * 64] for left in (0, 3 * 66 * 7))
    assert (small[::12, ::12] == small[9::12, 9::12]).all() and (large[::6, ::6] != large[3::6, 3::6]).any()
    assert not differ(draw(IMAGEN, "a red star", "--n", 3), pictures)
    for other in (
        ["--seed", 1],
        ["--guidance", 1],
        ["--negative", "blue"],
        ["--threshold", "static"],
        ["--level", 6],
        ["--sampler", "ddpm"],
    ):
        assert differ(draw(IMAGEN, "a red star", "--n", 3, *other), pictures), other


def test_many_prompts_and_a_clip_that_listens(draw, runs, tmp_path):
    (tmp_path / "p.txt").write_text("a star\na blue ring\n", encoding="utf-8")
    pictures = draw(IMAGEN, "--prompts", "p.txt")
    assert pictures.shape == (2, 64, 64, 3)
    assert differ(draw(IMAGEN, "--prompts", "p.txt", "--text-encoder", runs / "seeing"), pictures)


# ---------------------------------------------------------------------------------------------- glide.py


def test_known_pixels_stay_and_the_text_counts(draw, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("in.png")
    edit = ["--from", "in.png", "--mask", "left", "--n", 2]
    painted = draw(GLIDE, "a ring", *edit)
    assert painted.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(painted[:, :, 8:], np.stack([pixels[:, 8:] / 255] * 2), atol=1e-6)
    assert differ(painted[0, :, :8], painted[1, :, :8])
    assert not differ(draw(GLIDE, "a ring", *edit), painted)
    for other in (["--seed", 1], ["--guidance", 1], ["--negative", "blue"], ["--mask", "top"]):
        assert differ(draw(GLIDE, "a ring", *edit, *other), painted), other
    assert differ(draw(GLIDE, "a star", *edit), painted)
    assert_picture(tmp_path / "drawn.png", size=(3 * (18 * 2 - 2), 3 * 16))


def test_a_mask_that_was_drawn_and_a_picture_that_is_scaled(draw):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save("in.png")
    mask = np.full((16, 16), 255, np.uint8)
    mask[3:7, 2:9] = 0
    Image.fromarray(mask).save("mask.png")
    [painted] = draw(GLIDE, "a ring", "--from", "in.png", "--mask", "mask.png", "--n", 1)
    np.testing.assert_allclose(painted[mask == 255], pixels[mask == 255] / 255, atol=1e-6)
    assert (np.abs(painted - pixels / 255)[mask == 0] > 1e-3).mean() > 0.9


def test_without_a_picture_all_is_drawn(draw):
    """As the model draws that is shown nothing."""
    drawn = draw(GLIDE, "a ring", "--n", 2)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save("black.png")
    assert not differ(draw(GLIDE, "a ring", "--n", 2, "--from", "black.png", "--mask", "all"), drawn)


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (IMAGEN, [], "give a PROMPT"),
        (IMAGEN, ["a", "--level", 7], "0..6, got 7"),
        (IMAGEN, ["a", "--steps", 21], "1..20"),
        (IMAGEN, ["a", "--guidance", "nan"], "finite number"),
        (IMAGEN, ["a", "--base", "nowhere"], "there is no checkpoint nowhere"),
        (IMAGEN, ["a", "--text-encoder", "{runs}/base"], "no text encoder: expected"),
        (IMAGEN, ["a", "--base", "{runs}/larger"], "expected 'text-diffusion', got 'upsampler'"),
        (GLIDE, [], "give a PROMPT"),
        (GLIDE, ["a", "--mask", "left"], "name it (--from)"),
        (GLIDE, ["a", "--from", "in.png"], "the part to paint (--mask)"),
        (GLIDE, ["a", "--from", "nowhere.png", "--mask", "left"], "nowhere.png"),
        (GLIDE, ["a", "--from", "in.png", "--mask", "somewhere"], "the mask must be one of left"),
        (GLIDE, ["a", "--run", "{runs}/base"], "expected 'text-inpainting', got 'text-diffusion'"),
    ],
)
def test_bad_input_is_one_line(script, arguments, message, flags, runs, tmp_path, monkeypatch, capsys):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save("in.png")
    given = [str(argument).replace("{runs}", str(runs)) for argument in arguments]
    code, _, err = call(monkeypatch, capsys, script, *flags[script], "--steps", 2, *given)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0], err
    assert not (tmp_path / "drawn.png").exists()


@pytest.mark.parametrize("script", [IMAGEN, GLIDE], ids=lambda path: path.stem)
def test_help_teaches(script, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, script, "--help")
    assert code == 0 and f"python examples/{script.name}" in out and "(E3" in out
