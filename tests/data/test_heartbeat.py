"""The heartbeat (E21)."""

import numpy as np
import pytest

from tinydiff.data.heartbeat import heartbeats


def test_a_pulse_in_every_fifth_place():
    beats = heartbeats()
    assert beats.shape == (5, 20) and beats.dtype == np.float32
    texts = {"".join(str(int(b)) for b in row) for row in beats}
    assert texts == {"10000" * 4, "01000" * 4, "00100" * 4, "00010" * 4, "00001" * 4}
    assert heartbeats(7, 3).tolist()[1] == [0, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("period", [0, 21])
def test_refused(period):
    with pytest.raises(ValueError, match=rf"1\.\.20.*got {period}"):
        heartbeats(20, period)
