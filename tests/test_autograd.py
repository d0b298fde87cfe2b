"""The engine: it adds up gradients, frees what it no longer needs, and says clearly what it cannot do."""

import gc
import itertools
import sys
import weakref

import numpy as np
import pytest

from tests import strict_double
from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend, no_grad, ops
from tinydiff.autograd import checkpoint, op
from tinydiff.gradcheck import gradcheck


def leaf(*values, dtype=np.float32):
    return Tensor(backend.to_device(np.array(values, dtype)), requires_grad=True)


# ------------------------------------------------------------------------------------ gradients add up


@pytest.mark.parametrize(
    ("a", "b"),
    [((), (2, 3)), ((3,), (2, 3)), ((2, 1), (2, 3)), ((1, 1), (4, 2, 3)), ((4, 1, 3), (2, 1)), ((1, 3), (3,))],
)
def test_gradients_are_summed_over_broadcast_axes(a, b, device):
    """Against the same product with the broadcasting done by hand, through an array of places."""
    x, y = (Tensor(backend.to_device(np.random.default_rng(i).normal(size=s)), True) for i, s in enumerate((a, b)))
    (x * y).sum().backward()
    for t, other in ((x, y), (y, x)):
        places = np.broadcast_to(np.arange(t.size).reshape(t.shape), np.broadcast_shapes(a, b))
        factors = np.broadcast_to(other.numpy(), places.shape)
        expected = np.array([factors[places == p].sum() for p in range(t.size)]).reshape(t.shape)
        assert_close(t.grad, expected, rtol=1e-13)


def test_a_tensor_used_again_gets_the_sum(device):
    x = leaf(3.0)
    y = x * x + x * 2 - x / x + ops.exp(x - x)
    y.backward(backend.to_device(np.ones(1, np.float32)))
    assert_close(x.grad, np.array([8], np.float32), rtol=1e-6)


def test_a_diamond_of_paths(device):
    """f = (u + v) u with u = a b, v = a + u: each node's gradient is complete before it is passed on."""
    a, b = leaf(2.0, dtype=np.float64), leaf(5.0, dtype=np.float64)
    u = a * b
    v = a + u
    ((u + v) * u).sum().backward()  # = 2 a² b² + a² b
    assert_close(a.grad, np.array([4 * 2 * 25 + 2 * 2 * 5.0]))
    assert_close(b.grad, np.array([4 * 4 * 5 + 4.0]))


def test_paths_that_share_a_gradient_do_not_disturb_each_other(device):
    """A sum hands one and the same array to both of its terms; what is added for one must not reach the other."""
    a, b = leaf(1.0, 2.0), leaf(3.0, 4.0)
    u, v = a * 1, b * 1
    w = u * 3
    (u + v + w).backward(backend.to_device(np.ones(2, np.float32)))
    assert_close(a.grad, np.array([4, 4], np.float32))
    assert_close(b.grad, np.array([1, 1], np.float32))


def test_a_ladder_of_diamonds_is_walked_once():
    """Sixty doublings: visiting every path would take 2^60 steps."""
    x = leaf(1.0)
    y = x
    for _ in range(60):
        y = (y + y) * 0.5
    y.sum().backward()
    assert_close(x.grad, np.ones(1, np.float32))


def test_backward_adds_to_what_is_there(device):
    x = leaf(1.0, 2.0)
    (x * 3).sum().backward()
    (x * x).sum().backward()
    assert_close(x.grad, np.array([5, 7], np.float32))


def test_only_what_asks_for_a_gradient_gets_one():
    x, y = leaf(1.0), Tensor([2.0])
    (x * y).sum().backward()
    assert_close(x.grad, np.array([2], np.float32))
    assert y.grad is None


def test_backward_from_a_given_gradient(device):
    x = leaf(1.0, 2.0)
    (x * x).backward(backend.to_device(np.array([1, 10])))  # of another dtype
    assert_close(x.grad, np.array([2, 40], np.float32))
    z = leaf(1.0)
    z.backward(z.data * 3)
    assert_close(z.grad, np.array([3], np.float32))


def test_random_expressions_against_finite_differences(device):
    def f(x, y, z):
        h = ops.tanh(x @ y + z)
        return ops.softmax(h * h[:1]) / (1 + ops.exp(z)) - ops.concat([h[:, 1:], h[:, :1]])

    arrays = [backend.to_device(np.random.default_rng(i).normal(size=s)) for i, s in enumerate([(4, 3), (3, 5), (5,)])]
    for seed in range(5):
        assert gradcheck(f, *arrays, rng=Rng(seed)) < 1e-6


# --------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_do_not_widen(dtype, device):
    x = leaf(1.0, 2.0, dtype=dtype)
    y = np.float64(2) * x + np.float64(0.5) - np.int64(1) * x / 3 + x**2 + x ** np.float64(2) + 2.5
    y = ops.clip(y, low=np.float64(-9), high=np.float64(9)) + y.mean() + y.sum() + ops.max(y)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_what_data_a_tensor_takes():
    assert Tensor([1.0, 2.0]).dtype == np.float32 and Tensor(1.5).dtype == np.float32
    assert Tensor(np.array([1.0])).dtype == np.float64 and Tensor(np.float64(1)).dtype == np.float64
    assert Tensor([1, 2]).dtype.kind == "i" and Tensor([True]).dtype == bool
    with pytest.raises(TypeError, match="gradient needs floating-point data, got int"):
        Tensor([1, 2], requires_grad=True)
    with pytest.raises(TypeError, match="numbers, got <U1"):
        Tensor(["a"])


def test_gradients_have_their_leafs_dtype():
    x, y = leaf(1.0, dtype=np.float32), leaf(2.0, dtype=np.float64)
    (x * y).sum().backward()
    assert x.grad.dtype == np.float32 and y.grad.dtype == np.float64


def test_an_array_times_a_tensor_is_a_tensor(device):
    a, x = backend.to_device(np.array([[1.0], [2.0]], np.float32)), leaf(3.0, 4.0)
    for y in (a * x, a + x, a - x, a / x, a @ Tensor(backend.to_device(np.ones((1, 2), np.float32)))):
        assert isinstance(y, Tensor) and y.shape == (2, 2)
    (a * x).sum().backward()
    assert_close(x.grad, np.array([3, 3], np.float32))


# ------------------------------------------------------------------------------------- memory and depth


def test_a_deep_chain_needs_no_recursion():
    """20,000 ops one after the other, twenty times Python's limit; one such graph is walked and one thrown away."""
    assert sys.getrecursionlimit() < 20_000
    for use in (True, False):
        x = leaf(1.0, dtype=np.float64)
        y = x
        for _ in range(20_000):
            y = y + 1e-4
        if use:
            y.sum().backward()
            assert_close(x.grad, np.ones(1))
        del y


def test_backward_frees_the_graph_as_it_goes():
    """When an op's gradient is computed, the arrays of all later ops are gone already."""
    alive: list[weakref.ref] = []
    counts = []

    @op
    def watched(x):
        y = x * 1
        alive.append(weakref.ref(y))

        def vjp(g, y=y):
            counts.append(sum(r() is not None for r in alive))
            return g + 0 * y

        return y, vjp

    x = leaf(1.0, 2.0)
    h = x
    for _ in range(5):
        h = watched(h)
    loss = h.sum()
    del h
    loss.backward()
    assert counts == [5, 4, 3, 2, 1]
    gc.collect()
    assert not any(r() is not None for r in alive)


def test_no_cycles_keep_arrays_alive():
    """A graph that is dropped without backward goes at once, without waiting for the garbage collector."""
    x = leaf(1.0, 2.0)
    gc.disable()
    try:
        h = ops.exp(x)
        array = weakref.ref(h.data)
        y = (h * h).sum()
        del h
        assert array() is not None
        del y
        assert array() is None
    finally:
        gc.enable()


def test_leaf_gradients_share_memory_with_nothing(device):
    """Clipping and optimisers write to them."""
    x, y, z = leaf(1.0, 2.0), leaf(3.0, 4.0), leaf(0.0, 0.0)
    seed = backend.to_device(np.ones(2, np.float32))
    s = x + y + z.reshape(1, 2)[0]
    s.backward(seed)
    scalar = leaf(2.0).sum() * 0 + Tensor(2.0, requires_grad=True)
    a, b = Tensor(2.0, requires_grad=True), Tensor(3.0, requires_grad=True)
    (a + b + scalar).backward()
    for one, other in itertools.permutations([x.grad, y.grad, z.grad, seed], 2):
        before = backend.to_numpy(other).copy()
        one[...] = 7
        assert_close(other, before)
        one[...] = 1
    for g in (a.grad, b.grad):
        assert backend.is_array(g) and g.shape == ()
    z.grad *= 2  # broadcast results are read-only views in NumPy; a gradient is not
    ops.sum(z).backward()
    z.grad[0] = 5


# --------------------------------------------------------------------------------------------- no_grad


def test_nothing_is_recorded_under_no_grad():
    x = leaf(1.0)
    with no_grad():
        y = x * 2
        with no_grad():
            pass
        assert not (x * 2).requires_grad
    assert not y.requires_grad and (x * 2).requires_grad
    with pytest.raises(RuntimeError, match="requires_grad=True; this one was not"):
        y.sum().backward()


def test_no_grad_ends_with_an_error():
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (leaf(1.0) * 2).requires_grad


def test_a_detached_tensor_passes_no_gradient():
    x = leaf(3.0)
    (x * x.detach()).sum().backward()
    assert_close(x.grad, np.array([3], np.float32))


# ---------------------------------------------------------------------------------------- clear errors


def test_a_second_backward_names_the_op():
    x = leaf(1.0)
    h = ops.exp(x)
    y, z = ops.silu(h).sum(), ops.tanh(h).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"through sum before and freed"):
        y.backward()
    with pytest.raises(RuntimeError, match="through exp before and freed"):
        z.backward()


def test_a_change_in_place_names_the_op():
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = ops.mul(x, w).sum()
    w[0] = 9.0
    with pytest.raises(RuntimeError, match="argument of mul was changed in place after mul used it"):
        y.backward()


@pytest.mark.parametrize("change", [lambda x: x.mark_changed(), lambda x: x.detach().__setitem__(0, 1.0)])
def test_a_change_behind_its_back_is_noticed_too(change):
    x = leaf(1.0, 2.0)
    y = ops.exp(x).sum()
    change(x)
    with pytest.raises(RuntimeError, match="argument of exp was changed"):
        y.backward()


def test_a_change_before_use_is_fine():
    x = leaf(1.0, 2.0)
    x[...] = Tensor([3.0, 4.0])
    (x * x).sum().backward()
    assert_close(x.grad, np.array([6, 8], np.float32))


def test_a_computed_tensor_cannot_be_changed():
    y = ops.exp(leaf(1.0))
    with pytest.raises(RuntimeError, match="made by exp cannot be changed in place"):
        y[0] = 1.0


def test_mixing_devices_names_the_op_and_the_shapes(monkeypatch):
    strict_double.install(monkeypatch)
    here = Tensor(np.ones((2, 3), np.float32))
    there = Tensor(backend.to_device(np.ones((4, 3, 3), np.float32), "cuda"))
    with pytest.raises(backend.DeviceError, match=r"matmul\(\(2, 3\), \(4, 3, 3\)\).*cpu \(2, 3\), cuda \(4, 3, 3\)"):
        ops.matmul(here, there)
    with pytest.raises(backend.DeviceError, match=r"mul\(\(2, 3\), \(4, 3, 3\)\).*move one with to_device"):
        here * there


def test_an_op_stays_on_its_arguments_device(monkeypatch):
    """The device in use is for new arrays: it moves no result, not even a sum, which NumPy gives as a number."""
    strict_double.install(monkeypatch)
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    with backend.use_device("cuda"):
        y = ops.mse_loss(x * 2, np.zeros(3, np.float32)) + x.sum() + x[0]
        assert y.device == "cpu"
        y.backward()
    assert isinstance(x.grad, np.ndarray)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: leaf(1.0, 2.0) + leaf(1.0, 2.0, 3.0), r"add\(\(2,\), \(3,\)\): .*broadcast"),
        (lambda: Tensor(np.zeros((2, 3))) @ Tensor(np.zeros((2, 3))), r"matmul\(\(2, 3\), \(2, 3\)\): "),
        (lambda: ops.sum(leaf(1.0), axis=3), r"sum\(\(1,\)\): axis 3 is out of bounds"),
        (lambda: leaf(1.0, 2.0).backward(), r"shape \(2,\) needs its gradient; only a scalar"),
        (lambda: (leaf(1.0, 2.0) * 2).backward(np.ones(3)), r"tensor's shape \(2,\), got \(3,\)"),
        (lambda: leaf(1.0).backward(1.0), r"an array of the tensor's shape \(1,\), got 1.0"),
    ],
)
def test_shapes_that_do_not_fit_are_named(use, message):
    with pytest.raises(ValueError, match=message):
        use()


# ------------------------------------------------------------------------------------------- checkpoint


def test_a_checkpoint_changes_no_value_and_no_gradient(device):
    """Also of parameters that the function was not handed, of an input used elsewhere, and of one never used."""
    arrays = [backend.to_device(np.random.default_rng(i).normal(size=(3, 3))) for i in range(4)]

    def run(through):
        x, w, b, unused = (Tensor(a, requires_grad=True) for a in arrays)

        def block(x, b, unused, number):
            return ops.tanh(x @ w + b) * number

        h = through(block, x, b, unused, 0.5)
        y = (through(block, h, b, unused, 2.0) * x).sum()
        y.backward()
        return [y.data, *(t.grad for t in (x, w, b))]

    for plain, again in zip(run(lambda f, *args: f(*args)), run(checkpoint), strict=True):
        assert_close(again, backend.to_numpy(plain))


def test_a_checkpoint_keeps_no_intermediate_array():
    kept = []

    def block(x):
        h = ops.exp(x)
        kept.append(weakref.ref(h.data))
        assert h.requires_grad == (len(kept) == 2)  # the first time nothing is recorded
        return ops.sin(h)

    x = leaf(0.5, dtype=np.float64)
    y = checkpoint(block, x).sum()
    assert kept[0]() is None
    y.backward()
    assert len(kept) == 2 and kept[1]() is None
    assert_close(x.grad, np.cos(np.exp([0.5])) * np.exp([0.5]), rtol=1e-15)


def test_a_checkpoint_without_gradients_computes_once():
    calls = []
    with no_grad():
        y = checkpoint(lambda x: calls.append(0) or x * 2, leaf(1.0))
    assert len(calls) == 1 and not y.requires_grad


def test_a_checkpoint_draws_the_same_numbers_again():
    x = leaf(*np.ones(100), dtype=np.float64)
    y = checkpoint(lambda x: ops.dropout(x, p=0.5, rng=Rng(0).at(1)), x)
    y.sum().backward()
    assert_close(x.grad, y.numpy())


# ------------------------------------------------------------------------------------------ new ops


def test_a_new_op_is_a_rule_of_arrays():
    @op
    def cube(x, y, *, times):
        """times x³ + y."""
        return times * x**3 + y, lambda g: (lambda: g * 3 * times * x * x, None)

    x, y = leaf(2.0, dtype=np.float64), leaf(1.0, dtype=np.float64)
    z = cube(x, y, times=5)
    z.sum().backward()
    assert z.item() == 41 and x.grad.item() == 60 and y.grad is None
    assert cube.__name__ == "cube" and cube.__doc__ == "times x³ + y."
    assert gradcheck(lambda x: cube(x, 1.0, times=2), np.array([0.3, -2.0]), rng=Rng(0)) < 1e-9


def test_a_gradient_nobody_wants_is_not_computed():
    @op
    def product(a, b):
        return a * b, lambda g: (lambda: g * b, lambda: pytest.fail("this gradient was not asked for"))

    product(leaf(1.0), Tensor([2.0])).sum().backward()
    product(leaf(1.0), 2.0).sum().backward()


def test_a_tensor_does_not_become_an_array_unasked():
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    with pytest.raises(TypeError, match=r"use \.numpy\(\)"):
        np.asarray(x)
    assert isinstance(np.ones(3, np.float32) * x, Tensor)
