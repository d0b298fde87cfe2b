"""Module: the names of the parameters, their state, their mode and their dtype."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Tensor, ops
from tinydiff.nn import GroupNorm, Linear, Module, Parameter
from tinydiff.rng import Rng


class Pair(Module):
    """Two layers and a scale."""

    def __init__(self, rng):
        self.first = Linear(3, 4, rng)
        self.second = Linear(4, 2, rng, bias=False)
        self.scale = Parameter(rng.normal((2,)))

    def __call__(self, x):
        return self.second(ops.tanh(self.first(x))) * self.scale


class Deep(Module):
    """Modules and parameters in lists, in lists of lists and in tuples, among what is neither."""

    def __init__(self, rng):
        self.levels = [Pair(rng), [Linear(1, 2, rng), GroupNorm(2, 1)], "not a layer"]
        self.scales = (Parameter(rng.normal((3,))), 7.0)
        self.sizes, self.nothing, self.constant = [1, 2], None, Tensor([1.0, 2.0])


def test_parameters_are_named_by_their_way_from_the_module():
    module = Deep(Rng())
    parameters = module.parameters()
    assert list(parameters) == [
        "scales.0",
        "levels.0.scale",
        "levels.0.first.weight",
        "levels.0.first.bias",
        "levels.0.second.weight",
        "levels.1.0.weight",
        "levels.1.0.bias",
        "levels.1.1.gamma",
        "levels.1.1.beta",
    ]
    assert parameters["levels.1.0.weight"] is module.levels[1][0].weight
    assert parameters["scales.0"] is module.scales[0]
    assert module.count_parameters() == 3 + 2 + 12 + 4 + 8 + 2 + 2 + 2 + 2


def test_children_are_the_modules_directly_inside():
    module = Deep(Rng())
    assert [name for name, _ in module.children()] == ["levels.0", "levels.1.0", "levels.1.1"]
    assert dict(module.levels[0].children()) == {"first": module.levels[0].first, "second": module.levels[0].second}


def test_a_state_makes_another_model_the_same(device):
    one, other = Pair(Rng(1)), Pair(Rng(2))
    x = Tensor([[1.0, 2.0, 3.0]])
    assert (one(x).numpy() != other(x).numpy()).any()
    arrays = [p.data for p in other.parameters().values()]
    other.load_state_dict(one.state_dict())
    assert_close(one(x), other(x).numpy())
    assert all(p.data is a for p, a in zip(other.parameters().values(), arrays, strict=True)), "loaded in place"


def test_a_state_is_a_copy_on_the_host(device):
    module = Pair(Rng())
    state = module.state_dict()
    module.scale[...] = 0
    assert all(type(a) is np.ndarray for a in state.values()) and state["scale"].all()
    state["first.weight"][...] = 0
    assert module.first.weight.numpy().all()


def test_loading_keeps_the_dtype(device):
    module = Pair(Rng())
    module.load_state_dict({name: a.astype(np.float64) for name, a in Pair(Rng(1)).state_dict().items()})
    assert_close(module.scale, Pair(Rng(1)).scale.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("second.weight"), "missing second.weight"),
        (lambda state: state.update(extra=np.zeros(2)), "unknown extra"),
        (lambda state: state.update(scale=np.zeros((2, 1))), r"scale is \(2,\) here and \(2, 1\) there"),
        (
            lambda state: [state.pop(name) for name in list(state)[1:]] and state.update(a=np.zeros(1)),
            "missing.*unknown a",
        ),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(change, message):
    module, state = Pair(Rng(1)), Pair(Rng(2)).state_dict()
    before = module.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        module.load_state_dict(state)
    for name, a in module.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


def test_many_problems_are_cut_short():
    with pytest.raises(ValueError, match=r"missing scales\.0; .* and 4 more$"):
        Deep(Rng()).load_state_dict({})


def test_train_and_eval_reach_every_module_inside():
    module = Deep(Rng())
    inside = [module, module.levels[0], module.levels[0].first, *module.levels[1]]
    assert all(m.training for m in inside)
    assert module.eval() is module and not any(m.training for m in inside)
    module.levels[0].train()
    assert [m.training for m in inside] == [False, True, True, False, False]
    assert module.train() is module and all(m.training for m in inside)


def test_to_converts_all_parameters_and_forgets_gradients(device):
    module = Pair(Rng())
    module(Tensor([[1.0, 2.0, 3.0]])).sum().backward()
    before = module.state_dict()
    assert module.to(np.float64) is module
    for name, p in module.parameters().items():
        assert p.grad is None and p.requires_grad
        assert_close(p, before[name].astype(np.float64))


def test_to_what_it_is_already_leaves_the_arrays():
    module = Pair(Rng())
    arrays = [p.data for p in module.parameters().values()]
    module.to(np.float32).to("cpu")
    assert all(p.data is a for p, a in zip(module.parameters().values(), arrays, strict=True))


def test_to_moves_between_devices(device):
    module, x = Pair(Rng()), [[1.0, 2.0, 3.0]]
    y = module(Tensor(x)).numpy()
    home = module.scale.device
    state = module.to("cpu").state_dict()
    assert {p.device for p in module.parameters().values()} == {"cpu"}
    assert_close(module.to(home)(Tensor(x)), y)
    for name, a in module.state_dict().items():
        np.testing.assert_array_equal(a, state[name])


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="'cpu', 'cuda' or 'auto', got 'tpu'"):
        Pair(Rng()).to("tpu")


def test_zero_grad_forgets_all_gradients():
    module = Pair(Rng())
    module(Tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert all(p.grad is not None for p in module.parameters().values())
    module.zero_grad()
    assert all(p.grad is None for p in module.parameters().values())


def test_a_parameter_of_whole_numbers_is_refused():
    with pytest.raises(TypeError, match="floating-point data, got int64"):
        Parameter(np.arange(3))
