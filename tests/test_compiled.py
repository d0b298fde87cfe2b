"""Compiled formulas give what NumPy gives, to the rounding of float32; skipped where Numba is not installed."""

import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import formula
from tinydiff.ops import elementwise
from tinydiff.optim import _adam

compiled = pytest.importorskip("tinydiff.compiled", reason="Numba is not installed: pip install -e '.[fast]'")
N = 3 * formula.SMALLEST_COMPILED + 5


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setattr(formula, "_compiler", lambda: compiled)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_numpy(function, *args):
    """The same formula on float64, which is never compiled."""
    wide = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args]
    value = function(*wide)
    return [v.astype(np.float32) for v in (value if isinstance(value, tuple) else (value,))]


def runs_compiled(monkeypatch):
    """A list that receives the number of arrays of each call of a compiled loop."""
    calls, loop_of = [], compiled.loop_of

    def watched(*args):
        loop = loop_of(*args)
        return lambda arrays, numbers: (calls.append(len(arrays)), loop(arrays, numbers))

    monkeypatch.setattr(compiled, "loop_of", watched)
    return calls


@pytest.mark.parametrize("name", ["_sigmoid", "_silu", "_gelu"])
def test_activations(name, monkeypatch):
    calls = runs_compiled(monkeypatch)
    function, x = getattr(elementwise, name), 5 * draw(N)
    assert_close(function(x), by_numpy(function, x)[0], rtol=1e-6)
    assert calls and set(calls) == {2}


@pytest.mark.parametrize("name", ["_silu_vjp", "_gelu_vjp"])
def test_derivatives(name, monkeypatch):
    calls = runs_compiled(monkeypatch)
    function, g, x = getattr(elementwise, name), draw(7, N // 7), 3 * draw(7, N // 7, seed=1)
    assert_close(function(g, x), by_numpy(function, g, x)[0], rtol=1e-6)
    assert calls and set(calls) == {3}


@formula.elementwise
def affine_and_exp(xp, x, scale, shift, factor):
    y = x * scale
    y += shift
    return y, factor * xp.exp(-y) + 1.0


@pytest.mark.parametrize("first", [1, 5])
def test_broadcast_rows_and_two_results(first, monkeypatch):
    calls = runs_compiled(monkeypatch)
    x, scale, shift = draw(5, N // 640, 256), draw(first, 1, 256, seed=1), draw(5, 1, 256, seed=2)
    for got, expected in zip(
        affine_and_exp(x, scale, shift, 0.5), by_numpy(affine_and_exp, x, scale, shift, 0.5), strict=True
    ):
        assert_close(got, expected, rtol=1e-6)
    assert calls and set(calls) == {5}


def test_adam_works_in_place(monkeypatch):
    calls = runs_compiled(monkeypatch)
    arrays = [np.abs(draw(N, seed=i)) for i in range(4)]
    numbers = (0.5, 0.9, 0.1, 0.999, 0.001, 1e-3, 1e-8)
    expected = by_numpy(_adam, *[a.copy() for a in arrays], *numbers)
    _adam(*arrays, *numbers, out=tuple(arrays[:3]))
    for got, wanted in zip(arrays[:3], expected, strict=True):
        assert_close(got, wanted, rtol=1e-6)
    assert calls and set(calls) == {4}


def test_what_cannot_be_compiled_is_numpys(monkeypatch):
    """Few elements, float64, arrays with gaps, and those broadcast along the last axis."""
    calls = runs_compiled(monkeypatch)
    for x in (draw(100), draw(N).astype(np.float64), draw(2 * N)[::2]):
        wide = x.astype(np.float64)
        assert_close(elementwise._silu(x), (wide / (1 + np.exp(-wide))).astype(x.dtype), rtol=1e-6)
    y, _ = affine_and_exp(draw(N, 2), draw(1, 2), draw(N, 1), 1.0)
    assert_close(y, draw(N, 2) * draw(1, 2) + draw(N, 1), rtol=1e-6)
    assert not calls


def test_the_exponential():
    x = np.linspace(-87, 88, N).astype(np.float32)

    @formula.elementwise
    def exponential(xp, x):
        return xp.exp(x)

    error = np.abs(exponential(x).astype(np.float64) / np.exp(x.astype(np.float64)) - 1)
    assert error.max() < 2.5e-7
    edges = exponential(np.resize(np.array([-1e30, -np.inf, np.inf, np.nan], np.float32), N))[:4]
    assert edges[0] == edges[1] < 2e-38 and edges[2] > 1e38 and np.isnan(edges[3])


def test_the_variable_turns_it_off():
    program = "from tinydiff import formula; print(formula._compiler() is None)"
    for value, expected in (("0", "True"), ("1", "False")):
        run = subprocess.run(
            [sys.executable, "-c", program], env={"TINYDIFF_COMPILED": value}, capture_output=True, text=True
        )
        assert run.stdout.strip() == expected, run.stderr
