"""Devices, moves between them, and the sharing of work among cores, which must change no result."""

import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests import strict_double
from tests.helpers import assert_close
from tinydiff import backend, ops
from tinydiff.backend import DeviceError

RNG = np.random.default_rng(0)


# ---------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, "cpu"), ({"TINYDIFF_DEVICE": "cpu"}, "cpu"), ({"TINYDIFF_DEVICE": "auto"}, None)]
)
def test_the_device_comes_from_the_environment(environment, expected, monkeypatch):
    monkeypatch.delenv("TINYDIFF_DEVICE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert backend.device() == (expected or ("cpu" if backend.device_problem("cuda") else "cuda"))


def test_a_wrong_device_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("TINYDIFF_DEVICE", "tpu")
    with pytest.raises(ValueError, match="'cpu', 'cuda' or 'auto', got 'tpu'"):
        backend.device()


def test_a_context_wins_over_the_environment_and_nests(monkeypatch):
    strict_double.install(monkeypatch)
    monkeypatch.setenv("TINYDIFF_DEVICE", "cuda")
    assert backend.device() == "cuda" and backend.resolve_device("auto") == "cuda"
    with backend.use_device("cpu") as name:
        assert name == backend.device() == backend.resolve_device(None) == "cpu"
        with backend.use_device("cuda"):
            assert backend.device() == "cuda"
            assert backend.device_of(backend.to_device([1.0, 2.0])) == "cuda"
        assert backend.device() == "cpu"
        with pytest.raises(KeyError), backend.use_device("cuda"):
            raise KeyError
        assert backend.device() == "cpu"
    assert backend.device() == "cuda"


def test_a_device_that_is_not_there_is_an_error_with_the_reason():
    if (problem := backend.device_problem("cuda")) is None:
        pytest.skip("CUDA works here")
    assert "CuPy is not installed" in problem or "no CUDA device works" in problem
    with pytest.raises(DeviceError, match=r"'cuda' cannot be used: (CuPy is not installed|CuPy .* no CUDA device)"):
        backend.resolve_device("cuda")
    with pytest.raises(DeviceError), backend.use_device("cuda"):
        pass
    assert backend.resolve_device("auto") == "cpu"


def test_without_cupy_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail
    monkeypatch.setattr(backend, "_cuda_problem", backend._cuda_problem.__wrapped__)
    with pytest.raises(DeviceError, match=r"CuPy is not installed .*pip install -e '\.\[cuda12\]'"):
        backend.resolve_device("cuda")
    assert backend.resolve_device("auto") == "cpu"


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="got 'gpu'"):
        backend.resolve_device("gpu")


# ------------------------------------------------------------------------------------- arrays and moves


def test_moves_are_explicit_and_copy_only_when_they_must(monkeypatch):
    strict_double.install(monkeypatch)
    here = RNG.normal(size=(2, 3))
    there = backend.to_device(here, "cuda")
    assert backend.device_of(there) == "cuda" and backend.array_module(there, 1.0) is strict_double.module
    assert backend.to_device(there, "cuda") is there and backend.to_device(here, "cpu") is here
    assert_close(backend.to_numpy(there), here)
    assert backend.to_numpy(here) is here
    assert backend.array_module(1.0, here) is np and backend.array_module() is np
    with pytest.raises(DeviceError, match=r"cuda \(2, 3\), cpu \(3,\); move one with to_device"):
        backend.array_module(there, here[0])


def test_what_is_an_array():
    assert backend.is_array(np.zeros(2)) and backend.is_array(np.zeros(()))
    assert not backend.is_array(np.float32(1)) and not backend.is_array(1.0) and not backend.is_array([1.0])


# -------------------------------------------------------------------------------------------- the cores


@pytest.mark.parametrize("n", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("grain", [1, 3, 100])
def test_pieces_cover_the_range_once_and_in_order(n, grain, workers):
    pieces = backend.parallel(lambda start, stop: (start, stop), n, grain)
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(n))
    assert len(pieces) <= workers
    assert len(pieces) == 1 or all(stop - start >= grain for start, stop in pieces)


def test_pieces_run_on_several_threads_at_once():
    pool = backend.ThreadPoolExecutor(2)
    meeting = threading.Barrier(3, timeout=10)  # passes only when three pieces are inside at the same time
    with pytest.MonkeyPatch.context() as patch, pool:
        patch.setattr(backend, "_pool", lambda: (3, pool))
        backend.parallel(lambda start, stop: meeting.wait(), 3)


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 12])
def test_every_item_is_in_one_block(n, step, small_pieces, monkeypatch):
    monkeypatch.setattr(backend, "items_per_block", lambda x, bytes_per_item: step)
    blocks = backend.each_block(lambda block: list(range(n))[block], n, 8, on=np.zeros(n), grain=1)
    assert [item for block in blocks for item in block] == list(range(n))
    assert all(1 <= len(block) <= step for block in blocks)


def test_a_block_is_what_the_cache_holds(monkeypatch):
    monkeypatch.setattr(backend, "items_per_block", lambda x, bytes_per_item: 1000 // bytes_per_item)
    blocks = backend.each_block(lambda block: block.stop - block.start, 20, 150, on=np.zeros(20))
    assert blocks == [6, 6, 6, 2]


def test_an_array_on_a_device_is_not_cut(monkeypatch, workers):
    strict_double.install(monkeypatch)
    x = backend.to_device(np.zeros(64), "cuda")
    assert backend.parallel(lambda start, stop: (start, stop), 64, on=x) == [(0, 64)]


def test_an_error_in_a_piece_reaches_the_caller(workers):
    def work(start, stop):
        if stop == 8:
            raise ValueError("the last piece")

    with pytest.raises(ValueError, match="the last piece"):
        backend.parallel(work, 8)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TINYDIFF_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OPENBLAS_NUM_THREADS": "2"}, 2),
        ({"TINYDIFF_THREADS": "0"}, 1),
    ],
)
def test_the_number_of_workers_is_the_users(variables, expected, monkeypatch):
    for name in ("TINYDIFF_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert backend._available_cores() >= 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert backend._available_cores() == expected


def test_a_piece_may_itself_share_work():
    """In a process of its own: pieces that wait for each other would wait for ever."""
    program = (
        "from tinydiff import backend; "
        "print(*backend.parallel(lambda a, b: len(backend.parallel(lambda c, d: None, 8)), 8))"
    )
    environment = {**os.environ, "TINYDIFF_THREADS": "2"}
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_blas_keeps_to_one_thread_beside_ours(threads):
    folder = pathlib.Path(np.__file__).parents[1] / "numpy.libs"
    libraries = [str(path) for path in folder.glob("*openblas*")]
    if not libraries:
        pytest.skip("this NumPy does not carry its own OpenBLAS")
    program = (
        "import ctypes, sys; from tinydiff import backend; backend.cores(); "
        "print(*[ctypes.CDLL(path).scipy_openblas_get_num_threads64_() for path in sys.argv[1:]])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment["TINYDIFF_THREADS"] = threads
    line = [sys.executable, "-c", program, *libraries]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"1"}


# --------------------------------------------------------------------------------------- matrix products

SMALL = [((3, 4), (4, 2)), ((2, 3, 4), (4, 5)), ((4,), (4, 2)), ((2, 0), (0, 3)), ((0, 4), (4, 3))]
SHARED = [
    ((301, 130), (130, 80)),
    ((7, 96, 80), (80, 60)),
    ((7, 96, 80), (7, 80, 60)),
    ((96, 80), (7, 80, 60)),
    ((7, 96, 80), (1, 80, 60)),
    ((1, 96, 80), (7, 80, 60)),
    ((3, 2, 96, 80), (2, 80, 60)),
    ((2, 96, 80), (3, 1, 80, 60)),
    ((160, 160), (160, 160)),
    ((1, 200), (200, 20000)),
    ((7, 800), (7, 800, 600)),
]


@pytest.mark.parametrize(("a", "b"), SMALL + SHARED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matmul_is_numpys(a, b, dtype, workers):
    a, b = RNG.normal(size=a).astype(dtype), RNG.normal(size=b).astype(dtype)
    assert_close(backend.matmul(a, b), np.matmul(a, b), rtol=1e-5 if dtype == np.float32 else 1e-13)
    if a.ndim > 1:
        flipped = np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2)[..., ::-1]
        assert_close(backend.matmul(flipped, b), np.matmul(flipped, b), rtol=1e-5 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((40_000, 9), (40_000, 10)), ((1, 3), (1, 2))])
def test_matmul_transposed_and_sum_rows(shapes, workers):
    a, b = (RNG.normal(size=s) for s in shapes)
    assert_close(backend.matmul_transposed(a, b), a.T @ b, rtol=1e-12)
    assert_close(backend.sum_rows(a.reshape(-1, 1, a.shape[1])), a.sum(axis=0), atol=1e-9)


def test_the_same_bits_each_time(workers):
    a, b = (RNG.normal(size=s).astype(np.float32) for s in [(40_000, 31), (40_000, 33)])
    for function in (lambda: backend.matmul_transposed(a, b), lambda: backend.matmul(a.T, b), lambda: ops.silu(a).data):
        first = function()
        for _ in range(3):
            assert_close(function(), first)


# ------------------------------------------------------------------------------------------ a light import


def test_the_package_imports_nothing_heavy():
    program = "import sys, tinydiff; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    heavy = {"cupy", "matplotlib", "PIL", "tqdm", "urllib3", "requests", "http", "scipy", "pandas", "torch", "pytest"}
    assert not heavy & set(loaded)


def test_more_pieces_than_cores_cover_the_range_in_order():
    pieces = backend.parallel(lambda start, stop: list(range(start, stop)), 101, pieces_per_core=4)
    assert [i for piece in pieces for i in piece] == list(range(101))
    assert len(pieces) == (4 * backend.cores() if backend.cores() > 1 else 1)


def test_an_error_in_any_piece_reaches_the_caller():
    def work(start, stop):
        if stop == 101:
            raise RuntimeError("the last piece fails")

    with pytest.raises(RuntimeError, match="last piece"):
        backend.parallel(work, 101, pieces_per_core=4)
