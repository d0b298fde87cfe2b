"""All sides of a row do the same work: they agree in the number that each step gives."""

import contextlib

import numpy as np
import pytest

from tests import strict_double
from tests.benchmarks import ours
from tinydiff import Rng, backend
from tinydiff.diffusion import min_snr_weight, simple_loss
from tinydiff.nn import UNetConfig

TOY = UNetConfig(base=8, multipliers=(1, 2), blocks=1, attention=(1,))
RECIPE = {"base": 8, "batch_size": 8, "timesteps": 50}
both_layouts = pytest.mark.parametrize("channels_last", [False, True])


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def in_torch(torch):
    from tests.benchmarks import in_torch

    return in_torch


def assert_same_steps(one, other, steps=3):
    """Fail unless two sides give the same numbers, each another."""
    pairs = [(one(), other()) for _ in range(steps)]
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-3)
    assert len({a for a, _ in pairs} - {0.0}) == steps


def test_a_step_on_a_gpu_stays_there(monkeypatch):
    strict_double.install(monkeypatch)
    with contextlib.ExitStack() as until_here:
        monkeypatch.setattr(ours, "FOR_GOOD", until_here)
        step = ours.unet_step(2, 16, TOY, device="cuda")
        assert backend.device_of(Rng(0).normal((2,))) == "cuda" and np.isfinite(step())


@both_layouts
def test_a_training_step_of_the_unet(in_torch, channels_last):
    assert_same_steps(ours.unet_step(2, 16, TOY), in_torch.unet_step(2, 16, TOY, channels_last))


def test_the_unet_of_the_rows_takes_the_same_step_too(in_torch):
    assert_same_steps(ours.unet_step(2), in_torch.unet_step(2), steps=2)


@pytest.mark.slow  # it compiles
def test_a_training_step_in_jax():
    pytest.importorskip("jax", reason="JAX is not installed")
    from tests.benchmarks import in_jax

    assert_same_steps(ours.unet_step(2, 16, TOY), in_jax.unet_step(2, 16, TOY))


@both_layouts
def test_the_unet_without_gradients(in_torch, channels_last):
    assert_same_steps(ours.unet_forward(2, 16, TOY), in_torch.unet_forward(2, 16, TOY, channels_last), steps=1)


def test_a_training_step_of_the_transformer(in_torch):
    toy = {"batch": 2, "tokens": 5, "width": 16, "layers": 2, "heads": 2}
    assert_same_steps(ours.transformer_step(**toy), in_torch.transformer_step(**toy))


@pytest.mark.parametrize("fused", [False, True])
def test_the_optimiser(in_torch, fused):
    toy = {"layers": 2, "width": 12}
    assert_same_steps(ours.optimiser(**toy), in_torch.optimiser(fused, **toy))


def test_the_optimiser_s_work_is_ten_million_numbers_in_sixty_arrays():
    arrays = ours.kernels().values()
    assert len(arrays) == 60 and sum(a.size for a in arrays) == pytest.approx(10e6, rel=0.01)


@both_layouts
def test_samples(in_torch, channels_last):
    toy = {"n": 4, "steps": 3} | RECIPE
    assert_same_steps(ours.sample(**toy), in_torch.sample(channels_last=channels_last, **toy), steps=1)


def test_the_loss_of_the_digits(torch, in_torch):
    """The same x_t, t and labels, one of them hidden, give the same loss as simple_loss."""
    model, _, _ = ours.digits_model(**RECIPE)
    x_0, eps, _ = ours.images(4, 28)
    t, label = np.array([1, 50, 7, 20]), np.array([3, -1, 0, 9])
    weight = min_snr_weight(t, model.schedule, target="x0")
    expected = simple_loss(lambda x_t, t: model(x_t, t, label), x_0, t, eps, model.schedule, "x0", weight)
    x_0, eps = (in_torch.channels_first(a, False) for a in (x_0, eps))
    peer, tables = in_torch.twin(model.unet), in_torch.Tables(model.schedule)
    loss = in_torch.x0_loss(peer, x_0, torch.from_numpy(t), eps, torch.from_numpy(label), tables)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_training_step_of_the_digits_learns_as_much_on_both_sides(in_torch):
    """Their draws differ, so that losses agree on the average alone."""
    ends = []
    for step in (ours.mnist_step(**RECIPE), in_torch.mnist_step(**RECIPE)):
        losses = [step() for _ in range(60)]
        ends.append((np.mean(losses[:10]), np.mean(losses[-20:])))
    (first, end), (first_there, end_there) = ends
    assert end < 0.7 * first and end_there < 0.7 * first_there
    assert end_there == pytest.approx(end, rel=0.3)


def test_the_draws_of_the_digits(torch, in_torch):
    torch.manual_seed(0)
    assert in_torch.stratified_times(100, 100).tolist() == list(range(1, 101))
    image = torch.zeros(50, 5, 5, dtype=torch.uint8)
    image[:, 2, 2] = 1
    places = in_torch.shifted(image, 1).nonzero()
    assert len(places) == 50 and set(places[:, 1:].flatten().tolist()) == {1, 2, 3}
