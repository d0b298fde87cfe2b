"""Optimisers against plain formulas for each parameter, in float64; their state; the learning rate; the average."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close
from tinydiff import Tensor, ops
from tinydiff.backend import to_device, to_numpy
from tinydiff.nn import Linear, Module, Parameter
from tinydiff.optim import EMA, SGD, Adam, AdamW, warmup_cosine
from tinydiff.rng import Rng

SHAPES = {"bias": (3,), "weight": (4, 3), "kernel": (3, 3, 2, 5), "gamma": (1,)}
"""Vectors before and after matrices: the optimiser's own order is another."""


def parameters(dtype=np.float64):
    return {
        name: Parameter(to_device(np.random.default_rng(i).normal(size=shape).astype(dtype)))
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def gradients(step):
    """The gradients of one step, of very different sizes; every third step the weight has none."""
    rng = np.random.default_rng((7, step))
    grads = {name: 10.0 ** rng.integers(-4, 2) * rng.normal(size=shape) for name, shape in SHAPES.items()}
    if step % 3 == 2:
        grads["weight"] = np.zeros(SHAPES["weight"])
    return grads


def set_gradients(ps, step):
    for name, g in gradients(step).items():
        ps[name].grad = to_device(g) if g.any() else None


def rate(step):
    return 0.02 + 0.01 * math.cos(step)


# ------------------------------------------------------------------- slow references, one parameter each


def sgd(theta, grads, momentum):
    u = np.zeros_like(theta)
    for n, g in enumerate(grads):
        u = momentum * u + g
        theta = theta - rate(n) * u
    return theta


def adam(theta, grads, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    m = v = np.zeros_like(theta)
    for n, g in enumerate(grads):
        if theta.ndim >= 2:
            theta = theta - rate(n) * decay * theta
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** (n + 1)), v / (1 - betas[1] ** (n + 1))
        theta = theta - rate(n) * m_hat / (np.sqrt(v_hat) + eps)
    return theta


KINDS = {
    "sgd": (SGD, {}, lambda theta, grads: sgd(theta, grads, 0.0)),
    "momentum": (lambda ps: SGD(ps, momentum=0.9), {"momentum": 0.9}, lambda theta, grads: sgd(theta, grads, 0.9)),
    "adam": (Adam, {}, adam),
    "adam, other betas": (
        lambda ps: Adam(ps, betas=(0.5, 0.8), eps=1e-3),
        {"betas": (0.5, 0.8), "eps": 1e-3},
        lambda theta, grads: adam(theta, grads, (0.5, 0.8), 1e-3),
    ),
    "adamw": (AdamW, {"weight_decay": 0.01}, lambda theta, grads: adam(theta, grads, decay=0.01)),
    "adamw, more decay": (
        lambda ps: AdamW(ps, weight_decay=0.5),
        {"weight_decay": 0.5},
        lambda theta, grads: adam(theta, grads, decay=0.5),
    ),
}
"""How to make it, PyTorch's settings for the same, and what many steps of it make of one parameter."""

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_many_steps_equal_the_formula_for_each_parameter(kind, device):
    make, _, formula = KINDS[kind]
    ps = parameters()
    start = {name: p.numpy().copy() for name, p in ps.items()}
    optimiser = make(ps)
    for n in range(40):
        set_gradients(ps, n)
        optimiser.step(rate(n))
    for name, p in ps.items():
        assert_close(p, formula(start[name], [gradients(n)[name] for n in range(40)]), rtol=1e-11)


@kinds
def test_many_steps_equal_those_of_pytorch(kind):
    torch = pytest.importorskip("torch", reason="PyTorch, which tinydiff does not need, is not installed")
    make, settings, _ = KINDS[kind]
    ps = parameters()
    peers = {name: torch.from_numpy(p.data.copy()) for name, p in ps.items()}
    groups = [
        {"params": [p for p in peers.values() if p.ndim >= 2]},
        {"params": [p for p in peers.values() if p.ndim < 2]},
    ]
    if kind.startswith("adamw"):
        groups[1]["weight_decay"] = 0.0
    kind_of_peer = {"sgd": torch.optim.SGD, "mom": torch.optim.SGD, "ada": torch.optim.Adam}[kind[:3]]
    peer = (torch.optim.AdamW if kind.startswith("adamw") else kind_of_peer)(groups, lr=1.0, **settings)
    optimiser = make(ps)
    for n in range(40):
        set_gradients(ps, n)
        optimiser.step(rate(n))
        for name, g in gradients(n).items():
            peers[name].grad = torch.from_numpy(g)
        for group in peer.param_groups:
            group["lr"] = rate(n)
        peer.step()
    for name, p in ps.items():
        assert_close(p, peers[name].numpy(), rtol=1e-11)


@kinds
def test_in_float32(kind, device):
    """A step keeps the dtype and follows the float64 one."""
    ps, wide = parameters(np.float32), parameters()
    optimiser, reference = KINDS[kind][0](ps), KINDS[kind][0](wide)
    for n in range(5):
        set_gradients(wide, n)
        for name, p in wide.items():
            ps[name].grad = None if p.grad is None else p.grad.astype(np.float32)
        optimiser.step(rate(n))
        reference.step(rate(n))
    for name, p in ps.items():
        assert_close(p, wide[name].numpy().astype(np.float32), rtol=1e-4)


# -------------------------------------------------------------------------------- the norm and clipping


def norm_of(step):
    return math.sqrt(sum(float((g**2).sum()) for g in gradients(step).values()))


def test_a_step_in_two_parts_is_a_step(device):
    """Gathered gradients are forgotten by the parameters, and stay in the vector until the next gathering."""
    whole, parts = parameters(), parameters()
    one, two = AdamW(whole, weight_decay=0.1), AdamW(parts, weight_decay=0.1)
    for n in range(4):
        set_gradients(whole, n)
        set_gradients(parts, n)
        two.gather()
        assert all(p.grad is None for p in parts.values())
        assert one.step(0.1, max_norm=1.0) == two.step_along_gradient(0.1, max_norm=1.0)
        assert_close(two.vector, to_numpy(one.vector))


def test_a_step_returns_the_norm_of_the_whole_gradient(device):
    ps = parameters()
    optimiser = SGD(ps)
    for n in range(3):
        set_gradients(ps, n)
        assert optimiser.step(0.1) == pytest.approx(norm_of(n), rel=1e-12)
    assert optimiser.step(0.1) == 0.0  # all gradients were forgotten


@pytest.mark.parametrize("part", [0.25, 1.0, 4.0])
def test_a_gradient_that_is_too_long_is_scaled_down(part, device):
    ps = parameters()
    before = {name: p.numpy().copy() for name, p in ps.items()}
    set_gradients(ps, 1)
    norm = SGD(ps).step(0.5, max_norm=part * norm_of(1))
    assert norm == pytest.approx(norm_of(1), rel=1e-12)
    for name, p in ps.items():
        assert_close(p, before[name] - 0.5 * min(part, 1.0) * gradients(1)[name], rtol=1e-12)


def test_clipping_comes_before_adam_remembers():
    """Clipped to half its length, a gradient gives the moments of the half gradient."""
    ps, halves = parameters(), parameters()
    clipped, plain = Adam(ps), Adam(halves)
    for n in range(4):
        set_gradients(ps, n)
        set_gradients(halves, n)
        for p in halves.values():
            p.grad = None if p.grad is None else p.grad / 2
        clipped.step(rate(n), max_norm=norm_of(n) / 2)
        plain.step(rate(n))
    assert_close(clipped.vector, plain.vector, rtol=1e-12)
    assert_close(clipped.v, plain.v, rtol=1e-12)


def test_weight_decay_spares_vectors(device):
    ps = parameters()
    before = {name: p.numpy().copy() for name, p in ps.items()}
    AdamW(ps, weight_decay=0.5).step(0.1)
    for name, p in ps.items():
        assert_close(p, before[name] * (0.95 if p.ndim >= 2 else 1), rtol=1e-12)


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(kind, bad, device):
    ps = parameters()
    optimiser = KINDS[kind][0](ps)
    set_gradients(ps, 0)
    optimiser.step(0.1)
    before, remembered = to_numpy(optimiser.vector).copy(), optimiser.state_dict()
    set_gradients(ps, 1)
    ps["kernel"].grad[1, 2, 0, 3] = bad
    with pytest.raises(FloatingPointError, match="the gradient of kernel is not finite"):
        optimiser.step(0.1, max_norm=1.0)
    assert_close(optimiser.vector, before)
    for name, a in optimiser.state_dict().items():
        np.testing.assert_array_equal(a, remembered[name])


def test_a_gradient_whose_square_overflows_is_refused():
    ps = parameters(np.float32)
    ps["bias"].grad = np.full(3, 1e30, np.float32)
    with np.errstate(over="ignore"), pytest.raises(FloatingPointError, match="all parameters together"):
        SGD(ps).step(0.1)


# ------------------------------------------------------------------------------- the vector and its views


def test_parameters_are_views_of_one_vector_matrices_first(device):
    ps = parameters()
    before = {name: p.numpy().copy() for name, p in ps.items()}
    optimiser = SGD(ps)
    assert list(optimiser.parameters) == ["weight", "kernel", "bias", "gamma"]
    assert optimiser.matrices == 12 + 90
    for name, p in ps.items():
        assert_close(p, before[name])
    optimiser.vector[...] = 3.0
    assert all((p.numpy() == 3.0).all() for p in ps.values())
    ps["kernel"][...] = 5.0
    assert (to_numpy(optimiser.vector) == 5.0).sum() == 90


def test_a_step_makes_a_graph_that_needs_the_old_weights_unusable():
    ps = parameters()
    optimiser = SGD(ps)
    loss = (ps["weight"] * ps["weight"]).sum()
    optimiser.step(0.1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


CUTS = {
    "converted": lambda layer: layer.to(np.float64),
    "replaced": lambda layer: setattr(layer.weight, "data", layer.weight.data.copy()),
    "given to another optimiser": lambda layer: SGD(layer.parameters()),
}


@pytest.mark.parametrize("cut", CUTS)
def test_parameters_that_were_cut_off_are_noticed(cut):
    """A step on the old vector would change nothing that the model uses."""
    layer = Linear(3, 2, Rng())
    optimiser = SGD(layer.parameters())
    CUTS[cut](layer)
    with pytest.raises(RuntimeError, match="weight was moved, converted, replaced or given to another optimiser"):
        optimiser.step(0.1)


def test_a_state_loaded_into_the_model_does_not_cut_it_off():
    layer = Linear(3, 2, Rng())
    optimiser = SGD(layer.parameters())
    layer.load_state_dict(Linear(3, 2, Rng(1)).state_dict())
    layer.to(np.float32).to("cpu")
    before = layer.state_dict()
    layer(Tensor([[1.0, 2.0, 3.0]])).sum().backward()
    optimiser.step(1.0)
    assert_close(layer.bias, before["bias"] - 1)


def test_parameters_can_move_to_other_memory_and_go_on(device):
    ps, moved = parameters(), parameters()
    optimiser, mover = Adam(ps), Adam(moved)
    memory = to_device(np.zeros(106))
    for n in range(6):
        if n == 3:
            mover.move_to(memory)
        set_gradients(ps, n)
        set_gradients(moved, n)
        optimiser.step(rate(n))
        mover.step(rate(n))
    assert_close(memory, to_numpy(optimiser.vector))
    for name, p in moved.items():
        assert_close(p, ps[name].numpy())


@pytest.mark.parametrize("ps", [{}, {"a": Parameter(np.zeros(2)), "b": Parameter(np.zeros(2, np.float32))}])
def test_no_parameters_or_mixed_dtypes_are_refused(ps):
    with pytest.raises(ValueError, match="all of one dtype"):
        SGD(ps)


# ------------------------------------------------------------------------------------------------- state


@kinds
def test_a_restored_run_continues_bit_for_bit(kind, device):
    def steps(optimiser, ps, numbers):
        for n in numbers:
            set_gradients(ps, n)
            optimiser.step(rate(n), max_norm=2.0)

    whole = parameters()
    uninterrupted = KINDS[kind][0](whole)
    steps(uninterrupted, whole, range(9))

    first = parameters()
    stopped = KINDS[kind][0](first)
    steps(stopped, first, range(4))
    state, weights = stopped.state_dict(), {name: p.numpy().copy() for name, p in first.items()}
    steps(stopped, first, range(4, 6))  # must not reach the state that was taken

    second = parameters()
    resumed = KINDS[kind][0](second)
    for name, p in second.items():
        p[...] = to_device(weights[name])
    resumed.load_state_dict(state)
    steps(resumed, second, range(4, 9))
    np.testing.assert_array_equal(to_numpy(resumed.vector), to_numpy(uninterrupted.vector))
    assert resumed.count == 9
    assert all(isinstance(a, np.ndarray) for a in state.values())


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (SGD, lambda state: state.pop("velocity"), r"expected .*'velocity': \(106,\).*got .*'velocity': 'nothing'"),
        (Adam, lambda state: state.pop("v"), "'v': 'nothing'"),
        (Adam, lambda state: state.pop("count"), "'count': 'nothing'"),
        (Adam, lambda state: state.update(v=np.zeros(105)), r"'v': \(105,\)"),
        (EMA, lambda state: state.update(average=np.zeros(105)), r"'average': \(105,\)"),
        (EMA, lambda state: state.pop("count"), "'count': 'nothing'"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(make, change, message):
    ps = parameters()
    optimiser = SGD(ps) if make is EMA else make(ps)
    target = EMA(optimiser) if make is EMA else optimiser
    before = target.state_dict()
    state = {name: a + 1 for name, a in before.items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(state)
    for name, a in target.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


# ----------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (10, 0.0), (10, 0.1), (99, 0.2)])
def test_warmup_cosine_by_its_corners(warmup, final):
    rates = [math.nan, *(warmup_cosine(n, 100, 2.0, warmup, final) for n in range(1, 101))]
    for n in range(1, warmup + 1):
        assert rates[n] == pytest.approx(2.0 * n / warmup)
    assert rates[100] == pytest.approx(final)
    if warmup < 99:
        middle = (warmup + 100) / 2
        assert (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2 == pytest.approx((2.0 + final) / 2)
    assert all(a > b for a, b in zip(rates[max(warmup, 1) :], rates[max(warmup, 1) + 1 :], strict=False))


@given(n=st.integers(1, 500), more=st.integers(0, 500), warmup=st.integers(0, 600), peak=st.floats(1e-5, 1))
def test_warmup_cosine_stays_between_nothing_and_the_peak(n, more, warmup, peak):
    assert 0 <= warmup_cosine(n, n + more, peak, warmup) <= peak * (1 + 1e-12)


def test_only_warmup():
    assert [warmup_cosine(n, 4, 8.0, warmup=4) for n in range(1, 5)] == [2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize("step", [0, 11, -1])
def test_a_step_outside_the_schedule_is_refused(step):
    with pytest.raises(ValueError, match=rf"must be in 1\.\.10, got {step}"):
        warmup_cosine(step, 10, 1.0)


# ----------------------------------------------------------------------------------------------- average


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.9, 0.999])
def test_the_average_is_the_formula(decay, device):
    ps = parameters()
    optimiser = SGD(ps)
    ema = EMA(optimiser, decay)
    expected = to_numpy(optimiser.vector).copy()
    for n in range(1, 30):
        set_gradients(ps, n)
        optimiser.step(0.1)
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * to_numpy(optimiser.vector)
    assert_close(ema.average, expected, rtol=1e-12)


def test_applied_lends_the_model_its_average(device):
    ps = parameters()
    optimiser = SGD(ps)
    ema = EMA(optimiser)
    start = {name: p.numpy().copy() for name, p in ps.items()}
    set_gradients(ps, 0)
    optimiser.step(0.1)
    own = {name: p.numpy().copy() for name, p in ps.items()}
    with ema.applied():
        for name, p in ps.items():
            assert_close(p, start[name])
    for name, p in ps.items():
        assert_close(p, own[name])
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert (own["weight"] != start["weight"]).all()
    for name, p in ps.items():
        assert_close(p, own[name])


def test_a_restored_average_continues():
    ps = parameters()
    optimiser = SGD(ps)
    ema, resumed = EMA(optimiser, 0.5), EMA(optimiser, 0.5)
    for n in range(12):
        set_gradients(ps, n)
        optimiser.step(0.1)
        ema.update()
        if n == 3:
            state = ema.state_dict()
        if n == 4:
            resumed.load_state_dict(state)
            resumed.update()
        if n > 4:
            resumed.update()
    np.testing.assert_array_equal(resumed.average, ema.average)
    assert resumed.count == ema.count == 12


@pytest.mark.parametrize("decay", [1.0, -0.1, 2])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"in \[0, 1\), got {decay}"):
        EMA(SGD(parameters()), decay)


# ---------------------------------------------------------------------------------------------- training


class Net(Module):
    """Two layers."""

    def __init__(self, rng):
        self.first, self.second = Linear(2, 16, rng), Linear(16, 1, rng)

    def __call__(self, x):
        return self.second(ops.tanh(self.first(x)))


@pytest.mark.parametrize(
    ("make", "lr"), [(SGD, 0.3), (lambda ps: SGD(ps, momentum=0.9), 0.1), (Adam, 0.03), (AdamW, 0.03)]
)
def test_a_model_learns(make, lr, device):
    """x_1 x_2 from 32 points: a linear function would leave about the variance."""
    net = Net(Rng(1))
    optimiser = make(net.parameters())
    points = np.random.default_rng(0).uniform(-1, 1, (32, 2)).astype(np.float32)
    x, y = to_device(points), to_device(points[:, :1] * points[:, 1:])
    losses = []
    for _ in range(100):
        loss = ops.mse_loss(net(Tensor(x)), Tensor(y))
        losses.append(loss.item())
        loss.backward()
        optimiser.step(lr, max_norm=1.0)
    assert losses[-1] < 0.1 * losses[0] and losses[-1] < 0.1 * float(points.prod(axis=1).var())
