"""Streams of random numbers: the same name, the same bits; another name, other ones; the right distributions."""

import os
import pathlib

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, backend
from tinydiff.rng import Blank

N = 40_000


def draws(rng):
    """One draw of each kind."""
    arrays = rng.normal((3, 4)), rng.uniform((2, 5)), rng.integers(0, 1000, (6,)), rng.permutation(9)
    return [backend.to_numpy(a) for a in arrays]


def test_equal_names_give_equal_bits(device):
    for make in (lambda: Rng(3), lambda: Rng(3).at(7), lambda: Rng(3).at(7, 0), lambda: Rng(3).at(7).at(0)):
        for first, second in zip(draws(make()), draws(make()), strict=True):
            assert_close(first, second)


def test_a_child_depends_on_its_name_alone(device):
    """Not on what was drawn before: this is why a resumed run needs no state of a generator."""
    fresh, used = Rng(1), Rng(1)
    draws(used)
    draws(used.at(4))
    for first, second in zip(draws(fresh.at(5)), draws(used.at(5)), strict=True):
        assert_close(first, second)
    assert_close(Rng(1).at(2, 3).normal((5,)), backend.to_numpy(Rng(1).at(2).at(3).normal((5,))))


def test_other_names_give_other_numbers(device):
    makes = [Rng(0), Rng(1), Rng(0).at(0), Rng(0).at(1), Rng(0).at(0, 0), Rng(0).at(0, 1), Rng(0).at(1, 0)]
    seen = {tuple(backend.to_numpy(rng.normal((4,))).tolist()) for rng in makes}
    assert len(seen) == len(makes)
    stream = Rng(0)
    assert backend.to_numpy(stream.normal((4,))).tolist() != backend.to_numpy(stream.normal((4,))).tolist()


def test_streams_are_uncorrelated():
    """The correlation of two streams of N numbers has a standard deviation of 1/√N."""
    streams = np.array([Rng(0).at(i).normal((N,), np.float64) for i in range(6)])
    correlations = np.corrcoef(streams) - np.eye(6)
    assert np.abs(correlations).max() < 5 / np.sqrt(N)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distributions(dtype, device):
    """Each moment within five of its standard errors."""
    normal, uniform = (backend.to_numpy(x) for x in (Rng(5).normal((N,), dtype), Rng(6).uniform((N,), dtype)))
    assert normal.dtype == uniform.dtype == dtype
    for moment, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((normal.astype(float) ** moment).mean() - mean) < 5 * np.sqrt(variance / N)
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * np.sqrt(1 / 12 / N)
    assert abs(uniform.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / N)


def test_a_standard_deviation_scales_what_is_drawn(device):
    assert_close(Rng(5).normal((7,), std=0.25), 0.25 * backend.to_numpy(Rng(5).normal((7,))))
    assert Rng(5).normal((7,), np.float32, std=0.3).dtype == np.float32


def resident():
    """The bytes of memory that this process really has."""
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("only Linux tells how much memory a process has")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_blank_gives_zeros_that_take_no_memory():
    before = resident()
    weights = Blank(3).at(1).normal((2**14, 2**14), std=0.5)
    assert isinstance(weights, np.ndarray) and weights.shape == (2**14, 2**14) and weights.dtype == np.float32
    assert not weights[5].any() and resident() - before < 2**26 < weights.nbytes / 8
    assert Blank().normal((2,), np.float64).dtype == np.float64 and Blank(2).integers(1, 5, (3,)).all()


def test_blank_gives_zeros_on_every_device(device):
    zeros = Blank().normal((2, 3))
    assert backend.device_of(zeros) == backend.device()
    assert_close(zeros, np.zeros((2, 3), np.float32))


def test_integers(device):
    n = backend.to_numpy(Rng(2).integers(3, 8, (N,)))
    assert n.dtype == np.int64
    counts = np.bincount(n, minlength=8)
    assert counts[:3].sum() == 0 and len(counts) == 8
    assert np.abs(counts[3:] - N / 5).max() < 5 * np.sqrt(N * 0.2 * 0.8)


def test_permutation_is_on_the_host_and_the_same_on_every_device(device):
    order = Rng(2).permutation(100)
    assert isinstance(order, np.ndarray) and sorted(order.tolist()) == list(range(100))
    assert_close(order, Rng(2, "cpu").permutation(100))


def test_normal_like(device):
    x = backend.to_device(np.zeros((2, 1, 3), np.float64))
    y = Rng(0).normal_like(x)
    assert y.shape == x.shape and y.dtype == x.dtype and backend.device_of(y) == backend.device_of(x)


@pytest.mark.parametrize("make", [lambda: Rng(-1), lambda: Rng(0).at(-2), lambda: Rng(0).at(1, -2)])
def test_negative_seeds_and_names_are_refused(make):
    with pytest.raises(ValueError, match=r"whole numbers >= 0, got .*-[12]"):
        make()
