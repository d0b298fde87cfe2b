"""A Side is another process, which does what it is told and says how long it took."""

import os

import pytest

from tests.benchmarks import side
from tests.benchmarks.side import Side, Task


def counting(start=0):
    """A step that counts, for the other process."""
    count = start

    def step():
        nonlocal count
        count += 1
        return count

    return step


def environment():
    return lambda: float(os.environ.get("TINYDIFF_COMPILED", "nan"))


def growing(megabytes):
    """A step that makes an array and forgets it."""
    return lambda: len(b"x" * (megabytes << 20))


def failing():
    return lambda: os._exit(3)


def task(function, *, environment=side.PLAIN, **arguments):
    return Task(f"{__name__}:{function.__name__}", arguments, environment)


def test_it_takes_as_many_steps_as_told():
    with Side(task(counting, start=5)) as one:
        assert one.go()[1] == 6
        assert one.go(4)[1] == 10


def test_the_time_is_the_median_of_single_steps(monkeypatch):
    """Three steps, of 1, 5 and 2 seconds by this clock."""
    monkeypatch.setattr(side.time, "perf_counter", iter([0, 1, 10, 15, 20, 22]).__next__)
    assert side._timed(counting(), 3) == (2, 3)


def test_it_is_a_fresh_process_that_ends():
    with Side(task(counting)) as one, Side(task(counting)) as other:
        pids = {one._process.pid, other._process.pid, os.getpid()}
        one.go(2)
        assert other.go()[1] == 1 and len(pids) == 3
    assert one._process.exitcode == other._process.exitcode == 0


@pytest.mark.parametrize(("variables", "value"), [(side.PLAIN, 0), ({"TINYDIFF_COMPILED": "1"}, 1)])
def test_its_environment(variables, value):
    with Side(task(environment, environment=variables)) as one:
        assert one.go()[1] == value
    assert Task("a:b").environment == {"TINYDIFF_COMPILED": "0"}


def test_its_memory_is_the_most_so_far():
    with Side(task(growing, megabytes=100)) as one:
        before = one.memory()
        one.go()
        after = one.memory()
    if before is None or after is None:
        pytest.skip("this system does not say how much memory a process takes")
    assert before < 20 and after == pytest.approx(100, rel=0.2)


def test_a_process_that_dies_is_an_error():
    with Side(task(failing)) as one, pytest.raises(ChildProcessError, match="test_side:failing ended"):
        one.go()
