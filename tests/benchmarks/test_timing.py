"""Sides take turns, and the figures are those of the times they took."""

import pytest

from tests.benchmarks import timing
from tests.benchmarks.roofline import Limits
from tests.benchmarks.rows import Row
from tests.benchmarks.side import Task

LIMITS = Limits(flops=100.0, bandwidth=10.0)


class Fake:
    """A side of known times, which writes down its turns."""

    def __init__(self, name, seconds, seen):
        self.name, self.seconds, self.seen = name, iter(seconds), seen

    def go(self, count):
        self.seen.append((self.name, count))
        return next(self.seconds), 0.0


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    rests = []
    monkeypatch.setattr(timing.time, "sleep", rests.append)
    return rests


def row(**changes):
    peers = {"slow": Task("a:b"), "fast": Task("a:b")}
    return Row(**{"id": "toy", "work": "nothing", "ours": Task("a:b"), "peers": peers, "reach": 1.3} | changes)


def test_sides_alternate_after_warming_up(no_rest):
    seen, ticks = [], []
    sides = {name: Fake(name, range(10, 20), seen) for name in "ab"}
    times = timing.take_turns(sides, 3, lambda: ticks.append(1))
    assert [name for name, _ in seen] == list("ab") * 5
    assert times == {"a": [12, 13, 14], "b": [12, 13, 14]} and len(ticks) == 3
    assert no_rest == [timing.REST] * 10 and timing.REST >= 0.02


def test_short_steps_fill_a_turn():
    seen = []
    timing.take_turns({"a": Fake("a", [1, 0.01, 0.01], seen), "b": Fake("b", [1, 0.1, 0.1], seen)}, 1, lambda: None)
    assert [count for _, count in seen] == [1, 1, 1, 1, 3, 3]


def test_the_fastest_peer_counts():
    seconds = {"ours": [2.0, 3.0, 10.0], "slow": [4.0, 4.0, 4.0], "fast": [1.0, 2.0, 2.0]}
    figures = timing.summary(row(memory_reach=1.0), seconds, {"ours": 30.0, "slow": 1.0, "fast": 60.0}, LIMITS)
    assert (figures["peer_name"], figures["ours"], figures["peer"], figures["ratio"]) == ("fast", 3, 2, 1.5)
    assert (figures["ratio_min"], figures["ratio_max"]) == (1.5, 5)
    assert (figures["memory"], figures["peer_memory"], figures["memory_ratio"]) == (30, 60, 0.5)
    assert (figures["reach"], figures["memory_reach"]) == (1.3, 1)
    assert figures["all_peers"] == {"slow": 4, "fast": 2} and "share" not in figures


def test_the_nearer_limit_counts():
    assert LIMITS.share(4.0, flops=200) == 0.5 and LIMITS.share(4.0, flops=200, moved=30) == 0.75
    assert timing.summary(row(flops=lambda: 200, moved=30), {"ours": [4.0]}, {}, LIMITS)["share"] == 0.75


def test_without_peers_ours_is_still_there():
    figures = timing.summary(row(peers={}), {"ours": [4.0]}, {}, LIMITS)
    assert figures["ours"] == 4 and "ratio" not in figures and "peer" not in figures
