"""The strict double is as strict as CuPy, has nothing that CuPy has not, and computes what NumPy computes."""

import inspect
import re

import numpy as np
import pytest

from tests import strict_double as double
from tests.helpers import assert_close
from tinydiff import backend

xp = double.module
HOST = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def x(monkeypatch):
    double.install(monkeypatch)
    return xp.asarray(HOST)


# ------------------------------------------------------------------------------------------ strictness


@pytest.mark.parametrize(
    "use",
    [
        lambda x: np.asarray(x),
        lambda x: np.array([x, x]),
        lambda x: x + HOST,
        lambda x: HOST + x,
        lambda x: HOST @ x.T,
        lambda x: x * HOST[0, 0, None],
        lambda x: np.exp(HOST, out=x),
        lambda x: np.add(x, HOST),
        lambda x: xp.maximum(x, HOST),
        lambda x: xp.matmul(x, HOST.T),
        lambda x: xp.concatenate([x, HOST]),
        lambda x: xp.where(x > 0, x, HOST),
        lambda x: xp.add.at(x, 0, HOST[0]),
        lambda x: x.__iadd__(HOST),
        lambda x: x.__setitem__(0, (1.0, 2.0, 3.0)),
        lambda x: x.__setitem__(0, [x[1]]),
        lambda x: HOST[x > 0],
        lambda x: [1, 2][x[0, 0]],
        lambda x: range(x[0, 0]),
        lambda x: x.sum(initial=0),
        lambda x: xp.exp(x, where=x > 0),
        lambda x: np.linalg.norm(x),
        lambda x: hash(x),
        lambda x: xp.random.Generator(np.random.PCG64(0)),
    ],
)
def test_it_refuses_what_cupy_refuses(x, use):
    with pytest.raises(TypeError):
        use(x)


def test_assigning_a_numpy_array_is_refused(x):
    with pytest.raises(ValueError, match=r"non-scalar numpy\.ndarray"):
        x[...] = HOST


@pytest.mark.parametrize("name", ["fromnumeric", "asnumpy_", "put", "linalg", "errstate", "nditer"])
def test_it_has_no_function_outside_its_tables(name):
    with pytest.raises(AttributeError, match=name):
        getattr(xp, name)


@pytest.mark.parametrize("name", ["normal", "permutation", "choice", "shuffle"])
def test_its_generator_has_only_cupys_methods(name):
    assert not hasattr(xp.random.Generator(xp.random.Philox4x3210(1)), name)


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, c: x.sum(),
        lambda x, c: x[0],
        lambda x, c: x if c > 1 else -x,
        lambda x, c: x.reshape(-1),
        lambda x, c: xp.sum(x),
        lambda x, c: xp.concatenate([x, x]),
        lambda x, c: np.exp(x),
        lambda x, c: x * float(c),
        lambda x, c: x * x.shape[0],
        lambda x, c: 1.0,
        lambda x, c: (1.0 - c) * x,
    ],
)
def test_a_fused_function_is_elementwise(x, formula):
    with pytest.raises((TypeError, AttributeError)):
        xp.fuse(kernel_name="formula")(formula)(x, 2.0)


def test_a_function_to_fuse_is_given_after_the_name(x):
    with pytest.raises(TypeError):
        xp.fuse(lambda x: -x, kernel_name="formula")(x)


# -------------------------------------------------------------------------------- it computes as NumPy


def test_values_views_and_types(x):
    assert_close((2 * x + 1) / (x + np.float32(1)) - x.T.swapaxes(0, 1), (2 * HOST + 1) / (HOST + 1) - HOST)
    assert_close(x.sum(axis=0, keepdims=True), HOST.sum(axis=0, keepdims=True))
    assert_close(xp.concatenate([x, x], axis=1), np.concatenate([HOST, HOST], axis=1))
    assert_close(np.exp(x), np.exp(HOST))  # NumPy hands it over, as it does to CuPy
    for value in (x.sum(), x[0, 0], x.mean(), xp.max(x)):
        assert isinstance(value, double.ndarray) and value.shape == ()
    assert float(x[1, 2]) == 5.0 and x.sum().item() == 15.0 and int(x.argmax()) == 5
    y = x[1]
    y += 1
    y[:2] = 0
    y[2, ...] = x[0, 1]
    assert_close(x, np.array([[0, 1, 2], [0, 0, 1]], np.float32))
    assert (x * 0.1).dtype == np.float32 and (x * np.float64(0.1)).dtype == np.float64
    assert_close(x[[1, 0]], x.get()[[1, 0]])


def test_a_fused_function_gives_the_formulas_value(x):
    @xp.fuse(kernel_name="formula")
    def formula(a, b, c):
        t = xp.tanh(a * c)
        t *= 2
        return xp.where(a > 1, t, b), c - a

    first, second = formula(x, x[0], 0.5)
    assert_close(first, np.where(HOST > 1, 2 * np.tanh(0.5 * HOST), HOST[0]), atol=1e-7)
    assert_close(second, 0.5 - HOST)
    assert_close(x, HOST)


def test_the_backend_takes_it_for_cupy(x):
    assert backend.array_module(x, 2.0) is xp
    assert backend.device_of(x) == "cuda" and backend.resolve_device("auto") == "cuda"
    assert_close(backend.to_device(HOST, "cuda"), HOST)
    with pytest.raises(backend.DeviceError, match=r"cpu \(2, 3\), cuda \(2, 3\)"):
        backend.array_module(HOST, x)


# ------------------------------------------------------------------------- the tables, against the wheel


def _keywords(function):
    """The keywords of a CuPy function, from its signature or, for a compiled one, from the docstring's first line."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set(re.findall(r"(\w+)=", function.__doc__.strip().splitlines()[0])), False
    return {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def test_everything_in_the_tables_exists_in_cupy():
    cupy = pytest.importorskip("cupy", reason="the tables are checked where CuPy is installed")
    for name in double.UFUNCS:
        assert isinstance(getattr(cupy, name), cupy.ufunc), name
    for name in (*double.DTYPES, *double.CONSTANTS, "result_type", "broadcast_shapes"):
        assert hasattr(cupy, name), name
    for name in [*double.ATTRIBUTES, "T", "mT", "get", "item", "tolist"]:
        assert hasattr(cupy.ndarray, name), name
    for owner, table in (
        (cupy, double.FUNCTIONS),
        (cupy.ndarray, double.METHODS),
        (cupy.random.Generator, double.GENERATOR_METHODS),
    ):
        for name, wanted in table.items():
            offered, takes_more = _keywords(getattr(owner, name))
            assert takes_more or set(wanted.split()) <= offered, f"{name}: {wanted}, CuPy takes {offered}"
    for name in vars(double.ndarray):
        if name.startswith("__") and callable(vars(double.ndarray)[name]):
            assert hasattr(cupy.ndarray, name), name
    assert callable(cupy.fuse) and callable(cupy.add.at) and callable(cupy.random.Philox4x3210)
    for name in ("as_strided", "sliding_window_view"):
        assert hasattr(cupy.lib.stride_tricks, name)
