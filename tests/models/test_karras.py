"""The model that trains and samples as a column of the Karras table (E22)."""

import numpy as np
import pytest

from tinydiff import Rng, backend, checkpoint
from tinydiff.diffusion import Column, churned, denoising_loss, last, probability_flow
from tinydiff.diffusion.edm import COLUMNS
from tinydiff.models import KarrasConfig, KarrasDiffusion
from tinydiff.nn import UNetConfig
from tinydiff.train import Training, TrainSettings

UNET = UNetConfig(base=8, multipliers=(1, 2), blocks=1, attention=())


def model_of(column):
    """A small model whose last layer, zero at first, has some weight."""
    model = KarrasDiffusion(KarrasConfig(UNET, (4, 4), column, sigma_data=0.7), Rng(0))
    weight = model.unet.conv_out.weight
    weight[...] = 0.1 * Rng(1).normal_like(weight.data)
    return model


def images(n=3):
    return backend.to_device(np.random.default_rng(0).uniform(-1, 1, (n, 4, 4, 1)).astype(np.float32))


@pytest.mark.parametrize("column", COLUMNS)
def test_loss_is_that_of_the_column(column, device):
    model, y = model_of(column), images()
    loss = model.loss_of(*model.draw(y, Rng(7)))
    sigma, eps = model.column.draw_sigma(Rng(7).at(0), 3), Rng(7).at(1).normal_like(y)
    expected = denoising_loss(model, y, sigma, eps, model.column)
    assert np.isclose(loss.item(), expected.item(), rtol=1e-5)
    loss.backward()
    assert all(np.isfinite(backend.to_numpy(p.grad)).all() for p in model.parameters().values())


@pytest.mark.parametrize("column", ["vp", "edm"])
def test_samples_are_the_flow_of_its_denoiser(column, device):
    model = model_of(column)
    for way, solver in ((None, None), (Column.edm(), None), (None, "heun")):
        states = list(model.sample(2, Rng(3), 3, way, solver))
        expected = probability_flow(model.denoiser(), Rng(3).normal((2, 4, 4, 1)), way or model.column, 3, solver)
        assert len(states) == 3
        for state, other in zip(states, expected, strict=True):
            assert state.shape == (2, 4, 4, 1) and state.dtype == np.float32
            np.testing.assert_array_equal(backend.to_numpy(state), backend.to_numpy(other))
    churn = churned(model.denoiser(), Rng(3).normal((2, 4, 4, 1)), Column.edm().sigmas(3), Rng(4), S_churn=1)
    assert np.isfinite(backend.to_numpy(last(churn))).all()


def test_edm_column_knows_the_data():
    assert np.isclose(model_of("edm").column.c_skip(0.7), 0.5)


@pytest.mark.parametrize("column", COLUMNS)
def test_loads_the_averaged_weights(column, tmp_path):
    model = model_of(column)
    Training(model, TrainSettings(steps=1), tmp_path / checkpoint.NAME, {}).save()
    loaded = KarrasDiffusion.load(tmp_path)
    assert loaded.config == model.config and not loaded.training
    np.testing.assert_array_equal(last(loaded.sample(1, Rng(0), 2)), last(model.sample(1, Rng(0), 2)))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="one of vp, ve, iddpm, edm, got 'ddpm'"):
        KarrasConfig(UNET, column="ddpm")
    with pytest.raises(ValueError, match="sigma_data must be > 0, got 0"):
        KarrasConfig(UNET, sigma_data=0.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        model_of("vp").sample(0, Rng(0), 4)
    with pytest.raises(ValueError, match="N >= 2, got N = 1"):
        last(model_of("vp").sample(1, Rng(0), 1))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        KarrasDiffusion.load(tmp_path)
