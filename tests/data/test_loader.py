"""Batches: every item once an epoch, always full, and the same again after a resume."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydiff.data.loader import Batches
from tinydiff.rng import Rng

# No deadline: a slow machine is no failure.
PROPERTY = settings(deadline=None)

sizes = st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@PROPERTY
@given(size=sizes, epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_item_comes_once_an_epoch_in_full_batches(size, epochs, seed):
    n, batch_size = size
    batches = Batches(np.arange(n), batch_size=batch_size, rng=Rng(seed))
    drawn = [batches.at(step)[0] for step in range(-(-n * epochs // batch_size))]
    assert {batch.shape for batch in drawn} == {(batch_size,)}
    for epoch in np.concatenate(drawn)[: n * epochs].reshape(epochs, n):
        assert sorted(epoch) == list(range(n))


@PROPERTY
@given(size=sizes, step=st.integers(0, 200), seed=st.integers(0, 99))
def test_a_batch_depends_on_the_seed_and_the_step_alone(size, step, seed):
    n, batch_size = size
    run = Batches(np.arange(n), batch_size=batch_size, rng=Rng(seed))
    before = [run.indices(s).tolist() for s in range(step, step + 5)]
    for s in (7, 0, 3):
        run.indices(s)
    resumed = Batches(np.arange(n), batch_size=batch_size, rng=Rng(seed))
    assert [resumed.indices(s).tolist() for s in range(step, step + 5)] == before
    assert run.indices(step).tolist() == before[0]


def test_epochs_and_seeds_give_different_orders():
    orders = [
        tuple(Batches(np.arange(50), batch_size=50, rng=Rng(seed)).indices(epoch))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9
    assert tuple(range(50)) not in orders


def test_a_batch_holds_the_same_items_of_every_array_in_its_dtype():
    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    labels = np.arange(6)
    batches = Batches(images, labels, batch_size=4, rng=Rng(1))
    x, y = batches.at(1)
    assert x.shape == (4, 2, 2) and x.dtype == np.uint8 and y.dtype == labels.dtype
    assert (x[:, 0, 0] == 4 * y).all() and y.tolist() == batches.indices(1).tolist()


@pytest.mark.parametrize("batch_size", [0, -1, 7])
def test_a_batch_size_outside_the_data_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"must be 1\.\.6, the number of items; got {batch_size}"):
        Batches(np.arange(6), batch_size=batch_size, rng=Rng())


def test_arrays_of_different_lengths_are_refused_with_their_shapes():
    with pytest.raises(ValueError, match=r"one length, got shapes \[\(6,\), \(5, 2\)\]"):
        Batches(np.arange(6), np.zeros((5, 2)), batch_size=2, rng=Rng())


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="count from 0, got -1"):
        Batches(np.arange(6), batch_size=2, rng=Rng()).indices(-1)
