"""Processes that share the work of a gradient."""

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, nn, ops, optim
from tinydiff.workers import Share, Workers

forks = pytest.mark.skipif(sys.platform != "linux", reason="work is shared by forking, on Linux only")
BATCH = 7


@given(n=st.integers(1, 50), count=st.integers(1, 8))
def test_shares_are_the_batch_in_order_and_of_one_length_or_one_less(n, count):
    pieces = [Share(i, count).of(np.arange(n)) for i in range(count)]
    assert_close(np.concatenate(pieces), np.arange(n))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def problem(dtype=np.float64):
    """A small network, its optimiser, and the loss of a share of one fixed batch."""
    model = nn.Conv2d(2, 3, Rng(0)).to(dtype)
    x, y = Rng(1).normal((BATCH, 5, 4, 2), dtype), Rng(2).normal((BATCH, 5, 4, 3), dtype)

    def loss(step, share):
        return ops.mse_loss(ops.silu(model(Tensor(share.of(x) * step))), share.of(y))

    return model, optim.Adam(model.parameters()), loss


def train(count, steps=3):
    model, optimiser, loss = problem()
    with Workers(optimiser, loss, BATCH, count) as workers:
        losses = []
        for step in range(1, steps + 1):
            losses.append(workers.backward(step))
            optimiser.step_along_gradient(lr=0.1)
    return np.array(losses), model.state_dict()


@forks
@pytest.mark.parametrize("count", [2, 3])
def test_shared_training_is_training_alone_up_to_rounding(count):
    losses, weights = train(count)
    alone, expected = train(1)
    assert_close(losses, alone, rtol=1e-12)
    for name in expected:
        assert_close(weights[name], expected[name], rtol=1e-9)


@forks
def test_shared_training_gives_the_same_bits_again():
    (losses, weights), (again, same) = train(2), train(2)
    assert np.array_equal(losses, again)
    assert all(np.array_equal(weights[name], same[name]) for name in weights)


@forks
def test_the_other_processes_end_with_the_context():
    _, optimiser, loss = problem()
    with Workers(optimiser, loss, BATCH, 3) as workers:
        workers.backward(1)
        pids = [process.pid for process in workers.processes]
        assert len(pids) == 2
    wait_until(lambda: not any(map(alive, pids)))


@forks
def test_a_failure_in_another_process_is_reported(capfd):
    _, optimiser, loss = problem()

    def fails_elsewhere(step, share):
        if share.index:
            raise ValueError("no such digit")
        return loss(step, share)

    with (
        Workers(optimiser, fails_elsewhere, BATCH, 2) as workers,
        pytest.raises(ChildProcessError, match="a process that shared the work ended"),
    ):
        workers.backward(1)
    assert "no such digit" in capfd.readouterr().err


@forks
def test_a_killed_process_is_reported_at_the_next_step():
    _, optimiser, loss = problem()
    with Workers(optimiser, loss, BATCH, 2) as workers:
        workers.backward(1)
        workers.processes[0].kill()
        workers.processes[0].join()
        with pytest.raises(ChildProcessError, match="a process that shared the work ended"):
            workers.backward(2)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tests.test_workers import BATCH, problem
from tinydiff.workers import Workers
_, optimiser, loss = problem()
with Workers(optimiser, loss, BATCH, 3) as workers:
    workers.backward(1)
    print(*[process.pid for process in workers.processes], flush=True)
    time.sleep(60)
"""


@forks
def test_killing_the_first_process_ends_the_others():
    root = str(pathlib.Path(__file__).parents[1])
    child = subprocess.Popen([sys.executable, "-c", KILLED, root], stdout=subprocess.PIPE, text=True, cwd=root)
    pids = [int(word) for word in child.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_until(lambda: not any(map(alive, pids)))


def alive(pid):
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
