"""The benchmark measures what it says: two engines that take the same step."""

import math

import pytest

from tests.benchmarks import unet_step


def test_alternate_takes_each_step_in_turn():
    seen = []
    times = unet_step.alternate({name: lambda name=name: seen.append(name) for name in "ab"}, repeats=3)
    assert seen == list("ab") * 5
    assert set(times) == {"a", "b"} and min(times.values()) >= 0


def test_our_step_trains():
    step = unet_step.our_step(batch=2)
    losses = [step() for _ in range(5)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_peer_takes_the_same_steps(channels_last):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    ours, theirs = unet_step.our_step(batch=2), unet_step.torch_step(channels_last, batch=2)
    for _ in range(3):
        assert theirs() == pytest.approx(ours(), rel=1e-3)
