"""The arithmetic that work needs, counted by hand and by PyTorch, and the machine's limits."""

import dataclasses

import pytest

from tests.benchmarks import ours, roofline, rows
from tinydiff import Rng
from tinydiff.nn import UNet, UNetConfig


def test_the_smallest_unet_by_hand():
    """One level, so no change of resolution; middle: two stages, one attends; up: two stages of 4 + 4 channels."""
    config, pixels, c = UNetConfig(base=4, multipliers=(1,), blocks=1, attention=(), groups=2), 6 * 4, 4
    time = c * 16 + 16 * 16 + 5 * 16 * c  # the embedding, and its matrix in each of five blocks
    ends = 2 * 9 * c
    same, joined = 2 * 9 * c * c, 9 * 2 * c * c + 9 * c * c + 2 * c * c  # the latter with a 1 x 1 skip
    attention = 4 * c * c + 2 * pixels * c
    assert roofline.unet_flops(config, 6, 4) == 2 * (time + pixels * (ends + 3 * same + 2 * joined + attention))


CONFIGS = {
    "default": (UNetConfig(), (32, 32)),
    "digits": (UNetConfig(base=16, multipliers=(1, 2), blocks=1, attention=(), patch=2, classes=10), (28, 28)),
    "heads": (UNetConfig(channels=3, base=8, multipliers=(1, 2), attention=(0, 1), heads=2), (8, 12)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pytorch_counts_the_same(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch.utils.flop_counter import FlopCounterMode

    from tests.torch_unet import twin

    config, size = CONFIGS[name]
    model = twin(UNet(config, Rng(0)))
    forward, step = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with step:
        with forward:
            y = model(torch.zeros(1, config.channels, *size), torch.ones(1, dtype=torch.long))
        y.sum().backward()
    expected = roofline.unet_flops(config, *size)
    assert forward.get_total_flops() == expected
    assert step.get_total_flops() == pytest.approx(rows.TRAINING * expected, rel=0.02)


def test_a_training_step_of_the_default_unet_takes_207_gigaflop():
    assert rows.TRAINING * rows.unet_forward_flops(64) == pytest.approx(207e9, rel=0.01)


def test_the_transformer_is_counted_from_its_matrices():
    from tinydiff.nn import Transformer, TransformerConfig

    model = Transformer(TransformerConfig(width=8, layers=3, heads=2), Rng(0))
    attention = 3 * 2 * 2 * 5**2 * 8
    assert roofline.transformer_flops(8, 3, 5) == 2 * 5 * roofline.weights(model) + attention


def test_the_digits_count_as_their_unet_does():
    model, _, _ = ours.digits_model()
    assert rows.digits_forward_flops(3) == 3 * roofline.unet_flops(model.config.unet, 28, 28)


def test_the_limits_are_those_of_work_of_known_size(monkeypatch):
    """Each side takes half a second at its best."""

    class Fake:
        def __init__(self, task):
            self.times = iter([9.0, 2.0, 0.5])

        def __enter__(self):
            return self

        def __exit__(self, *error): ...

        def go(self):
            return next(self.times), 0.0

    monkeypatch.setattr(roofline, "Side", Fake)
    assert dataclasses.astuple(roofline.measure(product=10, triad=100, tries=2)) == (4000, 2400)


def test_the_limits_measure_what_they_say():
    assert ours.matrix_product(3)() == pytest.approx((Rng(1).normal((3, 3)) @ Rng(2).normal((3, 3)))[0, 0])
    assert ours.triad(1000)() == 2
    assert min(dataclasses.astuple(roofline.measure(product=64, triad=1000, tries=1))) > 0
