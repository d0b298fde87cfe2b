"""What a GPU replays is what the function computes: products, training steps, samplers; and what it must refuse."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests import double_graph, strict_double
from tests.helpers import assert_close
from tests.models.common import stirred, texts
from tinydiff import Rng, Tensor, backend, ops, train
from tinydiff.autograd import no_grad
from tinydiff.backend import captured, to_device
from tinydiff.diffusion import Sampling
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig, TextDiffusion, TextDiffusionConfig
from tinydiff.models import pixel_diffusion as pixel_diffusion_file
from tinydiff.models import text_diffusion as text_diffusion_file
from tinydiff.nn import Embedding, Linear, Module, TimeEmbedding, UNetConfig
from tinydiff.optim import AdamW
from tinydiff.train import Training, TrainSettings
from tinydiff.workers import DrawnLoss, Share, Workers

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # which says that nothing was captured


@pytest.fixture
def double(monkeypatch):
    strict_double.install(monkeypatch)
    with backend.use_device("cuda"):
        yield strict_double.module


@pytest.fixture(params=["double", pytest.param("cuda", marks=pytest.mark.gpu)])
def graphs(request, monkeypatch):
    """Run the test on each device that has graphs."""
    if request.param == "double":
        strict_double.install(monkeypatch)
    elif problem := backend.device_problem("cuda"):
        pytest.skip(problem)
    with backend.use_device("cuda"):
        yield request.param


def numbers(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# ------------------------------------------------------------------------------------------- functions


def polynomial(x, y):
    xp = backend.array_module(x)
    z = xp.exp(x) * y[:, None] + xp.concatenate([x[:, 1:], x[:, :1]], 1)
    z[0] = 2 * y[0]
    z -= z.mean(axis=0)
    return z, z.sum()


def test_a_captured_function_gives_what_the_function_gives(device):
    replayed = captured(polynomial)
    for n, columns in enumerate([4, 4, 4, 5, 4, 5, 5, 5]):
        x, y = numbers(3, columns, seed=n), numbers(3, seed=-n % 7)
        for actual, expected in zip(replayed(to_device(x), to_device(y)), polynomial(x, y), strict=True):
            assert_close(actual, np.asarray(expected), atol=1e-5)


def test_the_host_works_twice_for_each_shape_and_dtype(graphs):
    calls = []

    @captured
    def double_it(x):
        calls.append((x.shape, x.dtype))
        return x + x

    for _ in range(5):
        for x in (numbers(2), numbers(3), numbers(2, dtype=np.float64)):
            assert_close(double_it(to_device(x)), x + x)
    assert len(calls) == 6 and len(set(calls)) == 3


def test_on_the_cpu_a_call_is_a_call():
    count = itertools.count()
    replayed = captured(lambda x: x + next(count))
    assert [replayed(np.zeros(())).item() for _ in range(4)] == [0, 1, 2, 3]


def test_numbers_are_baked_in_and_arguments_are_not(graphs):
    count = itertools.count()
    replayed = captured(lambda x: x + next(count))
    assert [replayed(to_device(np.full((), 10.0 * i))).item() for i in range(4)] == [0, 11, 21, 31]


def test_what_a_function_writes_to_is_written_once_a_call(device):
    total = to_device(np.zeros(2, np.float32))

    @captured
    def add(x):
        total[...] = total + x
        return total

    for i in range(1, 6):
        assert_close(add(to_device(np.full(2, i, np.float32))), np.full(2, i * (i + 1) / 2, np.float32))


def test_an_argument_may_be_missing(device):
    replayed = captured(lambda x, y: x if y is None else x + y)
    x = numbers(2)
    for y in (None, x, None, x, None, x):
        expected = x if y is None else x + y
        assert_close(replayed(to_device(x), None if y is None else to_device(y)), expected)


def test_a_captured_function_within_another_belongs_to_its_graph(device):
    inner = captured(lambda x: x * 2)
    outer = captured(lambda x: inner(x) + 1)
    for i in range(4):
        assert_close(outer(to_device(np.full(2, i, np.float32))), np.full(2, 2 * i + 1, np.float32))


# -------------------------------------------------------------------------------------------- products

LAYOUTS = {
    "rows": lambda xp, x: x,
    "columns": lambda xp, x: xp.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
    "part of rows": lambda xp, x: xp.concatenate([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "part of columns": lambda xp, x: LAYOUTS["part of rows"](xp, x.swapaxes(-1, -2)).swapaxes(-1, -2),
    "backwards": lambda xp, x: x[..., ::-1, :],
    "last first": lambda xp, x: x[::-1],
    "with gaps": lambda xp, x: xp.concatenate([x, x], -1)[..., ::2],
    "one row": lambda xp, x: xp.broadcast_to(x[..., :1, :] if x.size else x, x.shape),
}
SHAPES = [
    ((3, 4), (4, 5)), ((1, 4), (4, 5)), ((3, 1), (1, 5)), ((3, 4), (4, 1)), ((1, 1), (1, 1)), ((0, 4), (4, 5)),
    ((3, 0), (0, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (6, 4, 5)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids="-".join)
def test_products(layouts, dtype, graphs):
    def product(a, b):
        xp = backend.array_module(a)
        return backend.product(LAYOUTS[layouts[0]](xp, a), LAYOUTS[layouts[1]](xp, b))

    replayed = captured(product)
    for shapes, seed in itertools.product(SHAPES, range(3)):
        a, b = (numbers(*shape, seed=seed, dtype=dtype) for shape in shapes)
        bound = 1e-6 if dtype == np.float32 else 1e-14
        assert_close(replayed(to_device(a), to_device(b)), product(a, b), rtol=bound)


def test_products_of_heads_transposed_and_summed(device):
    """As in attention and in a Linear layer's gradient."""

    @captured
    def products(x, g):
        q = x.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3)
        return backend.matmul(q, q.swapaxes(-1, -2)), backend.matmul_transposed(x, g), backend.sum_rows(g)

    for seed in range(3):
        x, g = numbers(6, 8, seed=seed), numbers(6, 5, seed=10 + seed)
        q = x.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3)
        scores, transposed, total = products(to_device(x), to_device(g))
        assert_close(scores, q @ q.swapaxes(-1, -2), rtol=1e-6)
        assert_close(transposed, x.T @ g, rtol=1e-6)
        assert_close(total, g.sum(axis=0), rtol=1e-6)


def test_times_and_labels(device):
    """The tables that they are looked up in are on the device before, and nobody looks at their values."""
    time, label = TimeEmbedding(6, 5, Rng(0)), Embedding(4, 5, Rng(1))

    def embedded(t, rows):
        total = time(t) + label(rows)
        total.backward(total.data)
        gradient = label.weight.grad
        label.weight.grad = None
        return total.data, gradient

    replayed = captured(embedded)
    for seed in range(4):
        draw = np.random.default_rng(seed).integers
        t, rows = to_device(draw(1, 1000, 7)), to_device(draw(0, 4, 7))
        for actual, expected in zip(replayed(t, rows), embedded(t, rows), strict=True):
            assert_close(actual, backend.to_numpy(expected), rtol=1e-6)


def test_a_product_is_written_where_it_should_be(device):
    a, b, wide = numbers(3, 4), numbers(4, 5), to_device(np.zeros((3, 7), np.float32))
    out = to_device(np.zeros((3, 5), np.float32))

    @captured
    def product(a, b):
        assert backend.product(a, b, out=out) is out
        backend.product(a, b, out=wide[:, 1:6])
        return out

    for factor in (1, 2, 3):
        assert_close(product(to_device(factor * a), to_device(b)), factor * a @ b, rtol=1e-6)
        assert_close(wide, np.pad(factor * a @ b, ((0, 0), (1, 1))), rtol=1e-6)


def test_tf32_is_asked_for(monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "0")  # put back at the end, whatever the backend writes there
    monkeypatch.setenv("TINYDIFF_TF32", "1")
    strict_double.install(monkeypatch)
    with backend.use_device("cuda"):
        a, b = numbers(30, 40), numbers(40, 50)
        product = captured(lambda a, b: backend.matmul(a, b))(to_device(a), to_device(b))
    assert backend.os.environ["CUPY_TF32"] == "1"
    assert_close(product, a @ b, rtol=2e-3)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(product, a @ b, rtol=1e-5)


def test_without_cublas_all_runs_as_it_is(double, monkeypatch):
    def not_there(xp):
        raise OSError("libcublas.so.12: cannot open shared object file")

    monkeypatch.setattr(backend, "_cublas", not_there)
    product = captured(lambda a: backend.matmul(a, a))
    a = numbers(3, 3)
    with pytest.warns(RuntimeWarning) as caught:
        for factor in (1, 2, 3):
            assert_close(product(to_device(factor * a)), factor**2 * a @ a, rtol=1e-6)
    assert [str(w.message).split(":")[0] for w in caught] == [
        "cuBLAS cannot be called directly, as CUDA graphs need",
        "<lambda> runs without a CUDA graph, more slowly",
    ]


# -------------------------------------------------------------------------------------- what is refused


REFUSED = {
    "a number": lambda x: x * x.sum().item(),
    "a choice": lambda x: x if x[0] > 0 else -x,
    "to the host": lambda x: to_device(backend.to_numpy(x) * 2),
    "to the device": lambda x: x + to_device(np.ones(3, np.float32)),
}
REFUSED_BY_THE_DOUBLE = {
    "CuPy's own product": lambda x: (x[:, None] @ x[None, :]).sum(axis=0),
    "random numbers": lambda x: x * 0 + Rng(0).normal((3,)),
    "a mask": lambda x: x[x > -100] + 0,
    "a list as index": lambda x: x[[2, 1, 0]],
    "many arrays": lambda x: backend.array_module(x).stack([x] * 9)[0],
}


def check_refused(function):
    refused = captured(function)
    refused_before = to_device(numbers(3))
    first = backend.to_numpy(refused(refused_before))
    with pytest.warns(RuntimeWarning, match=r"<lambda> runs without a CUDA graph, more slowly: .*captur"):
        assert_close(refused(refused_before), first)
    x = to_device(numbers(3, seed=5))
    assert_close(refused(x), backend.to_numpy(function(x)))
    fine = captured(lambda x: x + 1)  # and nothing is left over of the failure
    for i in range(3):
        assert_close(fine(to_device(np.full(3, i, np.float32))), np.full(3, i + 1, np.float32))


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_what_a_graph_cannot_hold_runs_as_it_is_and_says_so(function, graphs):
    check_refused(function)


@pytest.mark.parametrize("function", REFUSED_BY_THE_DOUBLE.values(), ids=REFUSED_BY_THE_DOUBLE)
def test_the_double_refuses_more(function, double):
    check_refused(function)


def test_an_error_while_recording_is_an_error_of_the_function(graphs):
    calls = itertools.count()

    def fails(x):
        if next(calls):
            raise ValueError("no such digit")
        return x

    replayed = captured(fails)
    replayed(to_device(numbers(2)))
    with pytest.warns(RuntimeWarning, match="no such digit"), pytest.raises(ValueError, match="no such digit"):
        replayed(to_device(numbers(2)))


def test_a_value_is_looked_at_where_it_can_be(device):
    seen = []

    @captured
    def look(x):
        seen.append(backend.value_range(x))
        return x + 0

    for _ in range(3):
        look(to_device(np.array([3, -2, 5])))
    assert seen == ([(-2, 5)] * 3 if backend.device() == "cpu" else [None] * 2)
    assert backend.value_range(to_device(np.array([3, -2, 5]))) == (-2, 5)
    assert backend.value_range(to_device(np.array([], np.int64))) is None


# ------------------------------------------------------------------------------ the double is as strict


def test_the_double_runs_nothing_while_it_records(double):
    x, stream, pool = to_device(np.ones(2, np.float32)), double.cuda.Stream(non_blocking=True), double.cuda.MemoryPool()
    with double.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        y = x + 1
        x[0] = 5.0
        graph = stream.end_capture()
    assert np.isnan(y.get()).all() and x.get().tolist() == [1, 1]
    graph.launch()
    assert y.get().tolist() == [2, 2] and x.get().tolist() == [5, 1]
    graph.launch()
    assert y.get().tolist() == [6, 2]
    del pool
    with pytest.raises(RuntimeError, match="given back"):
        graph.launch()


def test_the_double_wants_reserved_memory_and_a_stream_of_its_own(double):
    x, stream = to_device(np.ones(2, np.float32)), double.cuda.Stream(non_blocking=True)
    with pytest.raises(RuntimeError, match="default"):
        double.cuda.get_current_stream().begin_capture()
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="not reserved"):
            x + 1
        stream.end_capture()
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="waiting for a value"):
            float(x[0])
        with pytest.raises(RuntimeError, match="Invalidated"):
            stream.end_capture()


def test_the_doubles_cuda_exists_in_cupy():
    cupy = pytest.importorskip("cupy", reason="checked where CuPy is installed")
    for name in vars(double_graph.make_cuda()):
        assert hasattr(cupy.cuda, name), name
    for name in ("begin_capture", "end_capture", "ptr"):
        assert hasattr(cupy.cuda.Stream, name) or name == "ptr", name
    for name in ("malloc", "free_all_blocks"):
        assert hasattr(cupy.cuda.MemoryPool, name), name
    assert hasattr(cupy.cuda.Graph, "launch") and hasattr(cupy.cuda.Device, "cublas_handle")
    assert callable(cupy.get_default_memory_pool) and callable(cupy.cuda.runtime.runtimeGetVersion)


# -------------------------------------------------------------------------------------------- training

SETTINGS = TrainSettings(steps=20, lr=0.05, warmup=5, ema_decay=0.9, weight_decay=0.01, max_norm=0.5)
BATCH = 6


@dataclasses.dataclass(frozen=True)
class NoConfig:
    pass


class Regression(Module):
    """Two layers that learn a function of noisy points, told a time and a label."""

    kind, config = "regression", NoConfig()

    def __init__(self):
        self.inner, self.outer = Linear(3, 8, Rng(3)), Linear(8, 1, Rng(4))
        self.calls, self.spoilt_step = 0, 0

    def draw(self, step, rng, share):
        x = rng.at(0).normal((BATCH, 3))
        factor = np.float32(np.inf if step == self.spoilt_step else step)
        return x, to_device(np.full((BATCH, 1), factor)), None

    def loss_of(self, x, factor, nothing):
        self.calls += 1
        assert nothing is None
        return ops.mse_loss(self.outer(ops.silu(self.inner(Tensor(x)))), Tensor(ops.cos(x[:, :1] * factor).data))

    loss = property(lambda self: DrawnLoss(self.draw, self.loss_of))


def start(path, settings=SETTINGS):
    return Training(Regression(), settings, path / "checkpoint.npz", {})


def go(training, loss_at, **options):
    train.train(training, loss_at, Rng(7), batch_size=BATCH, resume_with="the command", **options)


def state(training):
    optimiser = training.optimiser
    arrays = (optimiser.vector, optimiser.m, optimiser.v, training.ema.average, training.losses)
    return [backend.to_numpy(a).copy() for a in arrays]


def test_training_is_the_same_captured_or_not(tmp_path, device):
    """The batch, a number that draws give, the learning rate and the bias corrections change from step to step."""
    plain, replayed = start(tmp_path / "plain"), start(tmp_path / "replayed")
    go(plain, lambda *which: plain.model.loss(*which))
    go(replayed, replayed.model.loss)
    for actual, expected in zip(state(replayed), state(plain), strict=True):
        assert_close(actual, expected, rtol=0 if backend.device() == "cpu" else 1e-4)
    assert plain.model.calls == SETTINGS.steps
    assert replayed.model.calls == (SETTINGS.steps if backend.device() == "cpu" else 2)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 13])
def test_a_captured_run_resumes_to_the_last_bit(stop_at, tmp_path, device):
    """Also where the step that was replayed is a first step after the resumption, which runs as it is."""
    whole, first, second = (start(tmp_path / name) for name in ("whole", "broken", "broken"))
    go(whole, whole.model.loss)

    def dies(step, rng, share):
        if step == stop_at:
            raise ConnectionError
        return first.model.draw(step, rng, share)

    with pytest.raises(ConnectionError):
        go(first, DrawnLoss(dies, first.model.loss_of), save_every=0)
    second.restore(*train.checkpoint.load(tmp_path / "broken", "regression"))
    assert second.step == stop_at - 1
    go(second, second.model.loss)
    for actual, expected in zip(state(second), state(whole), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("step", [1, 2, 3, 9])
def test_a_captured_gradient_that_is_not_finite(step, tmp_path, device):
    """The loss shows it first; the gradient too is named, and the weights stay as they were."""
    good = start(tmp_path / "good", dataclasses.replace(SETTINGS, steps=max(1, step - 1), final_lr=SETTINGS.lr))
    bad = start(tmp_path / "bad", dataclasses.replace(SETTINGS, final_lr=SETTINGS.lr))
    if step > 1:
        go(good, good.model.loss)
    bad.model.spoilt_step = step
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=f"the loss is nan at step {step}"):
        go(bad, bad.model.loss, save_every=0)
    for actual, expected in zip(state(bad)[:4], state(good)[:4], strict=True):
        assert_close(actual, expected)
    with (
        np.errstate(all="ignore"),
        pytest.raises(FloatingPointError, match=r"the gradient of \w+\.weight is not finite"),
    ):
        bad.optimiser.step_along_gradient(0.1)
    assert_close(bad.optimiser.vector, state(good)[0])


def test_a_recording_that_fails_half_way_leaves_no_gradient(graphs):
    """Gradients that backward left before it failed were never computed: they must not be added to."""
    model = Regression()
    optimiser = AdamW(model.parameters())

    def of(x, factor, nothing):
        loss = model.loss_of(x, factor, nothing)
        if model.calls == 2:
            loss.backward()
            raise ValueError("half-way")
        return loss

    loss = DrawnLoss(lambda step, share: model.draw(step, Rng(1).at(step), share), of)
    with Workers(optimiser, loss, BATCH, 1) as workers:
        workers.backward(1)
        with pytest.warns(RuntimeWarning, match="half-way"):
            value = workers.backward(2)
    gradient = backend.to_numpy(optimiser.gradient).copy()
    plain = model.loss_of(*model.draw(2, Rng(1).at(2), Share()))
    plain.backward()
    optimiser.gather()
    assert value == pytest.approx(plain.item(), rel=1e-5)
    assert_close(gradient, backend.to_numpy(optimiser.gradient), rtol=1e-5)


# ------------------------------------------------------------------------------------------- diffusion


UNET = UNetConfig(base=8, multipliers=(1, 2), blocks=1, attention=(1,), groups=4, heads=2, classes=2, patch=2)
RECIPES = {
    "x0, weighted, with labels": PixelDiffusionConfig(
        UNET, (8, 8), 12, target="x0", weighting="min-snr", class_names=("a", "b"), label_drop=0.5, stratified=True
    ),
    "eps, plain": PixelDiffusionConfig(dataclasses.replace(UNET, classes=None), (8, 8), 12, target="eps"),
}


def diffusion(recipe):
    """A model whose weights are all drawn, so that none of its layers gives zeros."""
    with backend.use_device("cpu"):
        model = PixelDiffusion(RECIPES[recipe], Rng(0))
        for i, p in enumerate(model.parameters().values()):
            p[...] = numbers(*p.shape, seed=i) * 0.2 + (p.ndim == 1)
    return model.to(backend.device())


def trained(recipe, replay):
    """Weights, their average, losses and norms of a few steps, and how often the host worked."""
    model, calls = diffusion(recipe), []

    def draw(step, share):
        x_0 = to_device(np.tanh(numbers(5, 8, 8, 1, seed=step)))
        return model.draw(x_0, Rng(1).at(step), np.arange(5) % 2 if model.config.unet.classes else None)

    def of(*drawn):
        calls.append(len(drawn))
        return model.loss_of(*drawn)

    optimiser, found = AdamW(model.parameters(), weight_decay=0.01), []
    loss = DrawnLoss(draw, of)
    with Workers(optimiser, loss if replay else lambda *which: loss(*which), 5, 1) as workers:
        for step in range(1, 6):
            found += [workers.backward(step), optimiser.step_along_gradient(1e-2 / step, max_norm=1.0)]
    return backend.to_numpy(optimiser.vector), np.array(found), len(calls)


@pytest.mark.parametrize("recipe", RECIPES)
def test_diffusion_training_is_the_same_captured_or_not(recipe, device):
    weights, found, calls = trained(recipe, replay=True)
    expected, expected_found, _ = trained(recipe, replay=False)
    assert_close(weights, expected, rtol=1e-3)
    assert_close(found, expected_found, rtol=1e-3)
    assert calls == (5 if backend.device() == "cpu" else 2)


@pytest.mark.parametrize(
    ("recipe", "how"),
    [
        ("x0, weighted, with labels", {"guidance": 2.0, "how": Sampling(steps=5)}),
        ("x0, weighted, with labels", {"guidance": 1.0, "label": 1}),
        ("eps, plain", {"how": Sampling("ddpm")}),
    ],
)
def test_samples_are_the_same_captured_or_not(recipe, how, device, monkeypatch):
    model = diffusion(recipe)
    with no_grad():
        states = [backend.to_numpy(x).copy() for x in model.sample(3, Rng(3), **how)]
        kept = list(model.sample(3, Rng(3), **how))  # states do not change under the hands of who keeps them
        monkeypatch.setattr(pixel_diffusion_file, "captured", lambda function: function)
        expected = [backend.to_numpy(x) for x in model.sample(3, Rng(3), **how)]
    for actual, again, wanted in zip(states, kept, expected, strict=True):
        assert_close(actual, wanted, atol=1e-3)
        assert_close(again, actual)


def test_guidance_by_one_pass_is_the_same_captured_or_not(device, monkeypatch):
    unet = UNetConfig(2, 8, (1,), 1, (0,), heads=2, groups=4, context=6)
    model = stirred(TextDiffusion(TextDiffusionConfig(unet, (4, 4), T=20), Rng(0)))

    def drawn():
        states = model.sample(texts(3), Rng(3), Sampling(steps=5), guidance=3.0, negative=texts(1, 7))
        return [backend.to_numpy(x).copy() for x in states]

    replayed = drawn()
    monkeypatch.setattr(text_diffusion_file, "captured", lambda function: function)
    for actual, expected in zip(replayed, drawn(), strict=True):
        assert_close(actual, expected, atol=1e-4)
