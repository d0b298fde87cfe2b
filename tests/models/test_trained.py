"""load_trained: a checkpoint that is not quite of this model is refused in one line."""

import dataclasses
import re

import pytest

from tinydiff import Rng, checkpoint
from tinydiff.checkpoint import CheckpointError
from tinydiff.models import GAN, GANConfig, PixelDiffusion, PixelDiffusionConfig
from tinydiff.nn import UNetConfig

MODELS = {
    "gan": GAN(GANConfig(size=8, width=8), Rng(0)),
    "pixels": PixelDiffusion(
        PixelDiffusionConfig(UNetConfig(base=8, multipliers=(1,), attention=(), groups=2), T=5), Rng(0)
    ),
}


def saved(path, model, without=(), **other):
    """Write a model's checkpoint with other fields in its configuration, or without some."""
    config = {name: v for name, v in dataclasses.asdict(model.config).items() if name not in without} | other
    checkpoint.save(path, checkpoint.prefixed("ema", model.state_dict()), {"kind": model.kind, "config": config})
    return path


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_it_is_ready_for_use(model, tmp_path):
    loaded = type(model).load(saved(tmp_path / "a.npz", model))
    assert loaded.config == model.config and not loaded.training
    assert all((loaded.state_dict()[name] == a).all() for name, a in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "without", "other", "words"),
    [
        ("gan", (), {"colour": 3}, "unexpected keyword argument 'colour'"),
        ("gan", (), {"gamma": -1}, "gamma >= 0"),
        ("gan", (), {"width": 16}, "the state is of another model"),
        ("pixels", ("unet",), {}, "'unet'"),
        ("pixels", (), {"schedule": "steep"}, "got 'steep'"),
    ],
)
def test_what_does_not_fit_is_refused(name, without, other, words, tmp_path):
    path = saved(tmp_path / "a.npz", MODELS[name], without, **other)
    with pytest.raises(CheckpointError, match=rf"a\.npz does not fit this version of tinydiff: .*{re.escape(words)}"):
        type(MODELS[name]).load(path)
