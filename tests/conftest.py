"""The devices that tests run on: NumPy, NumPy in many small pieces, the strict double of CuPy, and CuPy."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import strict_double
from tinydiff import backend

os.environ.setdefault("TINYDIFF_COMPILED", "0")  # test_compiled.py turns it on


@pytest.fixture(params=["cpu", "cpu-pieces", "double", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Run the test with this device in use, once for each: new tensors and `backend.to_device` go there.

    "cpu-pieces" has three workers and blocks of a few elements, so that small arrays are cut into ragged pieces where
    only large ones would be; "double" is the strict double of CuPy; "cuda" is skipped where CuPy finds no device.
    """
    if request.param == "cuda" and (problem := backend.device_problem("cuda")):
        pytest.skip(problem)
    if request.param == "double":
        strict_double.install(monkeypatch)
    if request.param == "cpu-pieces":
        request.getfixturevalue("small_pieces")
    with backend.use_device("cpu" if request.param.startswith("cpu") else "cuda"):
        yield request.param


@pytest.fixture
def small_pieces(monkeypatch):
    """Three workers, and pieces of a few elements each."""
    monkeypatch.setattr(backend, "BLOCK", 7)
    monkeypatch.setattr(backend, "_SHARED_PRODUCTS", 1)
    monkeypatch.setattr(backend, "items_per_block", lambda x, bytes_per_item: 1)
    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(backend, "_pool", lambda: (3, pool))
        yield


@pytest.fixture(params=[1, 2, 5])
def workers(request, monkeypatch):
    """This many workers, whatever the machine has."""
    if request.param == 1:
        monkeypatch.setattr(backend, "_pool", lambda: (1, None))
        yield 1
    else:
        with ThreadPoolExecutor(request.param - 1) as pool:
            monkeypatch.setattr(backend, "_pool", lambda: (request.param, pool))
            yield request.param
