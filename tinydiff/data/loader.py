"""Batches for training: shuffled, endless, and resumed exactly from the number of the step alone."""

from __future__ import annotations

import functools

import numpy as np

from tinydiff.rng import Rng


class Batches:
    """Endless shuffled batches of arrays that belong together, such as images and labels.

    Each epoch e visits all N items once, in the order rng.at(e).permutation(N). Batch s = 0, 1, ... holds
    places s B .. s B + B - 1 of these orders laid end to end, so every batch is full, and it depends on the
    seed and s alone: a run that is resumed at step s needs no saved state to see what it would have seen.

    arrays: host arrays of one length N along their first axis. batch_size: B, 1..N. rng: a stream for this
    alone. Raises ValueError for arrays of different lengths or a batch size outside 1..N.
    """

    def __init__(self, *arrays: np.ndarray, batch_size: int, rng: Rng):
        lengths = {len(array) for array in arrays}
        if len(lengths) != 1:
            raise ValueError(f"batches expect arrays of one length, got shapes {[array.shape for array in arrays]}")
        self.arrays, self.batch_size, self.n = arrays, batch_size, lengths.pop()
        if not 1 <= batch_size <= self.n:
            raise ValueError(f"the batch size must be 1..{self.n}, the number of items; got {batch_size}")
        # A batch needs one order or two; keeping them saves a shuffle of all N items at every step.
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: rng.at(epoch).permutation(self.n))

    def indices(self, step: int) -> np.ndarray:
        """Which items batch `step` = 0, 1, ... holds: int64 (B,) in 0..N-1. ValueError for step < 0."""
        if step < 0:
            raise ValueError(f"steps of training count from 0, got {step}")
        epoch, place = divmod(step * self.batch_size, self.n)
        orders = self._order(epoch)
        if place + self.batch_size > self.n:
            orders = np.concatenate([orders, self._order(epoch + 1)])
        return orders[place : place + self.batch_size]

    def at(self, step: int) -> tuple[np.ndarray, ...]:
        """Batch `step` of each array: (B, ...), dtype kept (images stay uint8: image.to_signed converts)."""
        chosen = self.indices(step)
        return tuple(array[chosen] for array in self.arrays)
