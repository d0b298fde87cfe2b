"""Blocks of a batch: each item once, in order, whatever the cores and the size of a block."""

import numpy as np
import pytest

from tinydiff import backend
from tinydiff.ops._blocks import each_block


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 12])
def test_every_item_is_in_one_block(n, step, small_pieces, monkeypatch):
    monkeypatch.setattr(backend, "items_per_block", lambda x, bytes_per_item: step)
    blocks = each_block(lambda block: list(range(n))[block], n, 8, on=np.zeros(n), grain=1)
    assert [item for block in blocks for item in block] == list(range(n))
    assert all(1 <= len(block) <= step for block in blocks)


def test_a_block_is_what_the_cache_holds(monkeypatch):
    monkeypatch.setattr(backend, "items_per_block", lambda x, bytes_per_item: 1000 // bytes_per_item)
    blocks = each_block(lambda block: block.stop - block.start, 20, 150, on=np.zeros(20))
    assert blocks == [6, 6, 6, 2]
